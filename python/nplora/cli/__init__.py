"""The command line: `entry` runs it, `parser` lists the commands, and each command has its own file."""

from nplora.cli.entry import main

__all__ = ["main"]
