"""The adapter formats that loratool writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loratool.adapter import Adapter
from loratool.errors import UsageError
from loratool.formats import loralib, peft
from loratool.storage.tensors import LazyTensor


@dataclass(frozen=True)
class Encoded:
    """An adapter as files: tensors for a safetensors file of that name, and small files beside it.

    notes: what the format does not hold and its reader has to be told.
    """

    weights_file: str
    tensors: Mapping[str, LazyTensor]
    side_files: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WrittenFormat:
    """name: for options. label: for reports, as the codec calls it. check: raises Unplaced for
    kinds of updates that the format has no place for. encode: the files. one_alpha: it holds a
    single alpha and rank for all modules.
    """

    name: str
    label: str
    check: Callable[[Adapter], None]
    encode: Callable[[Adapter], Encoded]
    one_alpha: bool = False


def _peft(adapter: Adapter) -> Encoded:
    return Encoded(peft.WEIGHTS_FILE, *peft.encode(adapter, None))


def _loralib(adapter: Adapter) -> Encoded:
    tensors = loralib.encode(adapter)
    alpha = loralib.alpha_of(adapter)
    note = (
        f"loralib stores no alpha: it is {alpha:g}, as the layers need it, and --alpha to read it"
    )
    return Encoded(loralib.WEIGHTS_FILE, tensors, notes=(note,))


FORMATS = {
    known.name: known
    for known in (
        WrittenFormat("peft", peft.NAME, peft.check_kinds, _peft),
        WrittenFormat("loralib", loralib.NAME, loralib.check_kinds, _loralib, one_alpha=True),
    )
}
DEFAULT = "peft"


def find_format(name: str) -> WrittenFormat:
    """The format of that name. Raises UsageError naming the choices."""
    if name not in FORMATS:
        raise UsageError(
            f"unknown format {name!r}", hint=f"loratool writes {' and '.join(FORMATS)}"
        )
    return FORMATS[name]
