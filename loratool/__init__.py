"""loratool: model surgery and adapter management for LoRA.

The names below are the public API. They are loaded when first used, so that importing loratool
(and ``loratool --help``) does not load torch.

What arguments mean wherever they occur:
    include, exclude, only: globs over dotted parameter names, one as a string or several.
    alpha: LoRA's alpha, for an adapter whose format does not store it.
    dtype: of what is written, "float32", "float16" or "bfloat16".
    device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".
    seed: of random numbers.
    overwrite: replace an existing output of the same kind.
    jobs: tensors to work on at once; by default the usable cores.
    progress: an object with ``start(what, total)``, ``advance(amount)`` and ``finish()``, called
        from any thread; total and amount in bytes.
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
    from loratool.api.adapters import combine, combine_recipe, convert, init, push, resize
    from loratool.api.files import open_adapter, open_checkpoint, write_html, write_picture
    from loratool.api.look import (
        compare,
        estimate,
        inspect,
        inspect_adapters,
        intruders,
        list_models,
        verify,
        verify_adapter,
    )
    from loratool.api.surgery import (
        extract,
        merge,
        merge_in_place,
        mitigate,
        recover,
        swap,
        unmerge,
    )
    from loratool.errors import LoratoolError
    from loratool.storage.checkpoint import Checkpoint

_WHERE = {
    "Adapter": "loratool.adapter",
    "Checkpoint": "loratool.storage.checkpoint",
    "LoratoolError": "loratool.errors",
    "LowRank": "loratool.algebra.lowrank",
    "combine": "loratool.api.adapters",
    "combine_recipe": "loratool.api.adapters",
    "compare": "loratool.api.look",
    "convert": "loratool.api.adapters",
    "estimate": "loratool.api.look",
    "extract": "loratool.api.surgery",
    "init": "loratool.api.adapters",
    "inspect": "loratool.api.look",
    "inspect_adapters": "loratool.api.look",
    "intruders": "loratool.api.look",
    "list_models": "loratool.api.look",
    "merge": "loratool.api.surgery",
    "merge_in_place": "loratool.api.surgery",
    "mitigate": "loratool.api.surgery",
    "open_adapter": "loratool.api.files",
    "open_checkpoint": "loratool.api.files",
    "push": "loratool.api.adapters",
    "recover": "loratool.api.surgery",
    "resize": "loratool.api.adapters",
    "swap": "loratool.api.surgery",
    "unmerge": "loratool.api.surgery",
    "verify": "loratool.api.look",
    "verify_adapter": "loratool.api.look",
    "write_html": "loratool.api.files",
    "write_picture": "loratool.api.files",
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
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
