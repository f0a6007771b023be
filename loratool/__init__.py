"""loratool: model surgery and adapter management for LoRA.

The names below are the public API. They are loaded when first used, so that importing loratool
(and ``loratool --help``) does not load torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":  # pragma: no cover
    raise ImportError("loratool runs on Linux and macOS; on Windows use WSL")

if TYPE_CHECKING:
    from loratool.adapter import Adapter
    from loratool.algebra.lowrank import LowRank
    from loratool.api import (
        combine,
        combine_recipe,
        compare,
        convert,
        estimate,
        extract,
        init,
        inspect,
        inspect_adapters,
        intruders,
        list_models,
        merge,
        merge_in_place,
        mitigate,
        open_adapter,
        open_checkpoint,
        push,
        recover,
        resize,
        swap,
        unmerge,
        verify,
        verify_adapter,
        write_html,
        write_picture,
    )
    from loratool.errors import LoratoolError
    from loratool.storage.checkpoint import Checkpoint

_WHERE = {
    "Adapter": "loratool.adapter",
    "Checkpoint": "loratool.storage.checkpoint",
    "LoratoolError": "loratool.errors",
    "LowRank": "loratool.algebra.lowrank",
    "combine": "loratool.api",
    "combine_recipe": "loratool.api",
    "compare": "loratool.api",
    "convert": "loratool.api",
    "estimate": "loratool.api",
    "extract": "loratool.api",
    "init": "loratool.api",
    "inspect": "loratool.api",
    "inspect_adapters": "loratool.api",
    "intruders": "loratool.api",
    "list_models": "loratool.api",
    "merge": "loratool.api",
    "merge_in_place": "loratool.api",
    "mitigate": "loratool.api",
    "open_adapter": "loratool.api",
    "open_checkpoint": "loratool.api",
    "push": "loratool.api",
    "recover": "loratool.api",
    "resize": "loratool.api",
    "swap": "loratool.api",
    "unmerge": "loratool.api",
    "verify": "loratool.api",
    "verify_adapter": "loratool.api",
    "write_html": "loratool.api",
    "write_picture": "loratool.api",
}

__all__ = [
    "Adapter",
    "Checkpoint",
    "LoratoolError",
    "LowRank",
    "combine",
    "combine_recipe",
    "compare",
    "convert",
    "estimate",
    "extract",
    "init",
    "inspect",
    "inspect_adapters",
    "intruders",
    "list_models",
    "merge",
    "merge_in_place",
    "mitigate",
    "open_adapter",
    "open_checkpoint",
    "push",
    "recover",
    "resize",
    "swap",
    "unmerge",
    "verify",
    "verify_adapter",
    "write_html",
    "write_picture",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'loratool' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
