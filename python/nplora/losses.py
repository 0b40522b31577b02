"""`nplora.losses` is the module `nplora.nn.losses`."""

import sys

from nplora.nn import losses
from nplora.nn.losses import *  # noqa: F403 (for type checkers)

sys.modules[__name__] = losses
