"""`nplora.optim` is the module `nplora.nn.optim`."""

import sys

from nplora.nn import optim
from nplora.nn.optim import *  # noqa: F403 (for type checkers)

sys.modules[__name__] = optim
