"""`python -m kvindex`."""

from kvindex.cli import main

main()
