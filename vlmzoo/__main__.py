"""`python -m vlmzoo`."""

import sys

from vlmzoo.cli import main

sys.exit(main())
