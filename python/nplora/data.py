"""`nplora.data` is an alias of the module `nplora.finetuning.data`."""

import sys

from nplora.finetuning import data
from nplora.finetuning.data import *  # noqa: F403 (for type checkers)

sys.modules[__name__] = data
