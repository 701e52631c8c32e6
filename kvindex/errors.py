"""What a person at the terminal did that cannot work; shown as one line, exit status 2."""


class UserError(Exception):
    """The message names the thing, its value and the remedy."""


class ConfigError(UserError):
    """A configuration key is unknown or its value cannot be used; the message begins with the key's path."""
