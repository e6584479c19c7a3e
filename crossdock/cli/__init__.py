"""The command line."""

from crossdock.cli.main import main

__all__ = ["main"]
