"""``python -m loratool``."""

from loratool.cli.main import entry

entry()
