"""`nplora.plot` is the module `nplora.trainer.plot`."""

import sys

from nplora.trainer import plot
from nplora.trainer.plot import *  # noqa: F403 (for type checkers)

sys.modules[__name__] = plot
