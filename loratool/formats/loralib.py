"""The LoRA authors' own layout (loralib): ``<module>.lora_A``, ``<module>.lora_B``, no alpha.

Other tensors in such a file are trained whole (a task's head). A MergedLinear adapts some of the
equal parts of a fused matrix (q|k|v), each with factors of its own: lora_A is (g·r, in) and lora_B
(g·d, r) for g adapted parts of d rows. Which parts they are the file does not say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.adapter import Adapter, LowRankUpdate, Replacement, Update, module_of
from loratool.errors import MalformedFile, Unplaced, UnsupportedInput, UsageError
from loratool.formats.hints import Hints
from loratool.storage.dtypes import DType
from loratool.storage.tensors import LazyTensor

NAME = "loralib"
STORES_ALPHA = False
WEIGHTS_FILE = "lora.safetensors"

_A, _B = ".lora_A", ".lora_B"


def detect(keys: frozenset[str], side_files: Mapping[str, bytes]) -> bool:
    """Keys that end in lora_A with nothing behind it."""
    return "adapter_config.json" not in side_files and any(key.endswith(_A) for key in keys)


def decode(
    label: str,
    tensors: Mapping[str, LazyTensor],
    side_files: Mapping[str, bytes],
    hints: Hints,
) -> Adapter:
    """Read the file; alpha is required, since the format does not hold it.

    Raises UsageError without a positive alpha, or without the adapted parts of a fused matrix;
    MalformedFile for a factor without its partner.
    """
    if hints.alpha is None:
        raise UsageError(
            f"{label}: this format (loralib) does not store alpha",
            hint="pass --alpha with the value used in training; the update is alpha/rank · B·A",
        )
    if not hints.alpha > 0:
        raise UsageError(
            f"{label}: alpha {hints.alpha:g} is not positive",
            hint="pass --alpha with the value used in training; the update is alpha/rank · B·A",
        )
    updates: dict[str, Update] = {}
    for key, tensor in tensors.items():
        if key.endswith(_A):
            module = key.removesuffix(_A)
            updates[f"{module}.weight"] = _update(
                label, module, tensors, hints.alpha, hints.fused_parts
            )
        elif key.endswith(_B):
            if key.removesuffix(_B) + _A not in tensors:
                raise MalformedFile(f"{label}: {key} has no {_A[1:]} beside it")
        else:
            updates[key] = Replacement(tensor)
    if hints.fused_parts and not any(
        isinstance(update, LowRankUpdate) and isinstance(update.b, PlacedParts)
        for update in updates.values()
    ):
        raise UsageError(f"{label}: --fused-parts is for fused modules (MergedLinear), it has none")
    return Adapter(updates, NAME)


def _update(
    label: str,
    module: str,
    tensors: Mapping[str, LazyTensor],
    alpha: float,
    fused_parts: tuple[bool, ...],
) -> LowRankUpdate:
    a, b = tensors[module + _A], tensors.get(module + _B)
    if b is None:
        raise MalformedFile(f"{label}: {module}{_A} has no {_B[1:]} beside it")
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise UnsupportedInput(f"{label}: {module}: only matrices are supported, not convolutions")
    if a.shape[0] == 0:
        raise MalformedFile(f"{label}: {module}: factors of rank 0")
    if a.shape[0] == b.shape[1]:
        return LowRankUpdate(b, a, scale=alpha / a.shape[0], alpha=alpha)
    rank = b.shape[1]
    parts = a.shape[0] // rank if rank else 0
    if parts < 2 or a.shape[0] % rank or b.shape[0] % parts:
        raise MalformedFile(
            f"{label}: {module}: lora_B {list(b.shape)} and lora_A {list(a.shape)} do not chain"
        )
    if sum(fused_parts) != parts:
        raise UsageError(
            f"{label}: {module}: adapts {parts} parts of a fused matrix (MergedLinear), and the "
            "file does not name them",
            hint="loratool convert --fused-parts says which: q,v is what the authors trained",
        )
    return merged_linear(b, a, alpha, fused_parts)


def merged_linear(
    b: LazyTensor, a: LazyTensor, alpha: float, fused_parts: tuple[bool, ...]
) -> LowRankUpdate:
    """The update of a MergedLinear: b (g·d, r), a (g·r, in), alpha as its layers are given it."""
    placed = PlacedParts(b, fused_parts)
    return LowRankUpdate(placed, a, scale=alpha / b.shape[1], alpha=alpha * sum(fused_parts))


def encode(adapter: Adapter) -> dict[str, LazyTensor]:
    """The tensors of a file that the authors' library loads; its alpha is not among them.

    Raises Unplaced for what is neither a plain update of a matrix nor a value stored whole.
    """
    check_kinds(adapter)
    tensors: dict[str, LazyTensor] = {}
    for name, update in adapter.replacements.items():
        tensors[name] = update.value
    for name, low_rank in adapter.low_rank.items():
        module, b = module_of(name), low_rank.b
        tensors[module + _A] = low_rank.a
        tensors[module + _B] = b.b if isinstance(b, PlacedParts) else b
    return dict(sorted(tensors.items()))


def check_kinds(adapter: Adapter) -> None:
    """Raises Unplaced for what is neither a plain update of a module's matrix nor stored whole."""
    for name, update in adapter.updates.items():
        plain = isinstance(update, LowRankUpdate) and not update.is_embedding and not update.kernel
        if not isinstance(update, Replacement) and not (plain and name.endswith(".weight")):
            raise Unplaced(
                f"{name}: {update.describe()}: has no place in loralib's layout",
                hint="it holds updates of linear layers and values stored whole; use --format peft",
            )


def alpha_of(adapter: Adapter) -> float:
    """The one alpha of all modules, which the file does not hold. Raises Unplaced where they
    differ, or are none."""
    alphas = {}
    for name, update in adapter.low_rank.items():
        b = update.b.b if isinstance(update.b, PlacedParts) else update.b
        alphas[name] = update.scale * b.shape[1]
    first = next(iter(alphas), None)
    if first is None:
        raise Unplaced("the adapter holds no update of a linear layer, which loralib is for")
    for name, alpha in alphas.items():
        if not math.isclose(alpha, alphas[first], rel_tol=1e-12):
            raise Unplaced(
                f"{name}: has alpha {alpha:g}, {first} has {alphas[first]:g}; loralib takes one",
                hint="loratool resize --rank full --format loralib makes it one",
            )
    return alphas[first]


@dataclass(frozen=True)
class PlacedParts:
    """lora_B of a MergedLinear as that of one plain adapter: (parts·d, g·r), group j's block in
    the rows of the j-th adapted part and the columns of its own rows of lora_A."""

    b: LazyTensor
    fused_parts: tuple[bool, ...]

    @property
    def dtype(self) -> DType:
        return self.b.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        adapted = sum(self.fused_parts)
        rows = self.b.shape[0] // adapted * len(self.fused_parts)
        return rows, adapted * self.b.shape[1]

    def read(self) -> Tensor:
        values = self.b.read()
        rows, rank = values.shape[0] // sum(self.fused_parts), values.shape[1]
        placed = torch.zeros(self.shape, dtype=values.dtype)
        adapted = [part for part, is_adapted in enumerate(self.fused_parts) if is_adapted]
        for group, part in enumerate(adapted):
            block = values[group * rows : (group + 1) * rows]
            columns = slice(group * rank, (group + 1) * rank)
            placed[part * rows : (part + 1) * rows, columns] = block
        return placed

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]
