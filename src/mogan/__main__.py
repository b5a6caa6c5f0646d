"""``python -m mogan`` is ``mogan``."""

from mogan.cli import run

run()
