"""`python -m nplora` runs the command `nplora`."""

import sys

from nplora.cli import main

sys.exit(main())
