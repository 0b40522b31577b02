"""The command line: `entry` runs a command, `parser` lists the commands. Each command has its own file."""

from nplora.cli.entry import main

__all__ = ["main"]
