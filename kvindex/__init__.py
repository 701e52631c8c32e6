"""The programs: command line, configuration, HTTP service, simulated fleet and demo. Nothing imports this package."""

__all__: list[str] = []
