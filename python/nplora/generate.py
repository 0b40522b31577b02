"""`nplora.generate` is another name for the module `nplora.lm.generation`."""

import sys

from nplora.lm import generation
from nplora.lm.generation import *  # noqa: F403 (for type checkers)

sys.modules[__name__] = generation
