"""The command line: `entry` runs it, `parser` knows the commands, and each command has a file of its own."""

from nplora.cli.entry import main

__all__ = ["main"]
