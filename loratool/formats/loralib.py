"""The LoRA authors' own layout (loralib): ``<module>.lora_A``, ``<module>.lora_B``, no alpha.

Other tensors in such a file are trained whole (a task's head). Plain modules only: a MergedLinear
(fused q|k|v), whose factors hold several groups, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter import Adapter, LowRankUpdate, Replacement, Update
from loratool.errors import MalformedFile, UnsupportedInput, UsageError
from loratool.storage.tensors import LazyTensor

NAME = "loralib"

_A, _B = ".lora_A", ".lora_B"


def detect(keys: frozenset[str], side_files: Mapping[str, bytes]) -> bool:
    """Keys that end in lora_A with nothing behind it."""
    return "adapter_config.json" not in side_files and any(key.endswith(_A) for key in keys)


def decode(
    label: str,
    tensors: Mapping[str, LazyTensor],
    side_files: Mapping[str, bytes],
    alpha: float | None,
) -> Adapter:
    """Read the file; ``alpha`` is required, since the format does not hold it.

    Raises UsageError without alpha, MalformedFile for a factor without its partner.
    """
    if alpha is None:
        raise UsageError(
            f"{label}: this format (loralib) does not store alpha",
            hint="pass --alpha with the value used in training; the update is alpha/rank · B·A",
        )
    updates: dict[str, Update] = {}
    for key, tensor in tensors.items():
        if key.endswith(_A):
            module = key.removesuffix(_A)
            updates[f"{module}.weight"] = _update(label, module, tensors, alpha)
        elif key.endswith(_B):
            if key.removesuffix(_B) + _A not in tensors:
                raise MalformedFile(f"{label}: {key} has no {_A[1:]} beside it")
        else:
            updates[key] = Replacement(tensor)
    return Adapter(updates, NAME)


def _update(
    label: str, module: str, tensors: Mapping[str, LazyTensor], alpha: float
) -> LowRankUpdate:
    a, b = tensors[module + _A], tensors.get(module + _B)
    if b is None:
        raise MalformedFile(f"{label}: {module}{_A} has no {_B[1:]} beside it")
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise UnsupportedInput(f"{label}: {module}: only matrices are supported, not convolutions")
    if a.shape[0] == 0:
        raise MalformedFile(f"{label}: {module}: factors of rank 0")
    if a.shape[0] != b.shape[1]:
        raise UnsupportedInput(
            f"{label}: {module}: factors {b.shape} and {a.shape} do not chain; they look like a "
            "fused projection (MergedLinear), whose groups the file does not name"
        )
    return LowRankUpdate(b, a, scale=alpha / a.shape[0], alpha=alpha)
