"""The command line."""

from nplora.cli.commands import main

__all__ = ["main"]
