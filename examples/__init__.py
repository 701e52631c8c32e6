"""Programs that show how the packages are used: a router and what it is measured with, and three short ones."""
