"""The command line: module `entry` runs a command, and module `parser` lists the commands.

Each command has its own module.
"""

from nplora.cli.entry import main

__all__ = ["main"]
