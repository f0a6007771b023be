"""All initialisations by name."""

from __future__ import annotations

from loratool.errors import UsageError
from loratool.inits.method import Init
from loratool.inits.milora import MILORA
from loratool.inits.olora import OLORA
from loratool.inits.pissa import PISSA
from loratool.inits.zero import GAUSSIAN, KAIMING

INITS = {init.name: init for init in (GAUSSIAN, KAIMING, PISSA, OLORA, MILORA)}


def find_init(name: str) -> Init:
    """The initialisation of this name. Raises UsageError listing all."""
    if name not in INITS:
        raise UsageError(f"unknown initialisation {name!r}", hint=f"known: {', '.join(INITS)}")
    return INITS[name]
