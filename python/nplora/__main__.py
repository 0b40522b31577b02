"""`python -m nplora`: the command `nplora`."""

import sys

from nplora.cli import main

sys.exit(main())
