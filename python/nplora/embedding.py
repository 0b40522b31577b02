"""`nplora.embedding` is an alias of the module `nplora.finetuning.embedding`."""

import sys

from nplora.finetuning import embedding
from nplora.finetuning.embedding import *  # noqa: F403 (for type checkers)

sys.modules[__name__] = embedding
