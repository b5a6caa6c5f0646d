"""``python -m mogan`` is ``mogan``."""

import sys

from mogan.cli import main

sys.exit(main())
