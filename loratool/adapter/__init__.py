"""The Adapter value and the kinds of updates it is made of, whatever format they came in."""

from loratool.adapter.updates import (
    DenseUpdate,
    DoraUpdate,
    HadamardUpdate,
    KasaUpdate,
    KroneckerUpdate,
    LowRankUpdate,
    Replacement,
    TensorProduct,
    TokenRows,
    Update,
)
from loratool.adapter.value import Adapter, ModuleKind, module_of

__all__ = [
    "Adapter",
    "DenseUpdate",
    "DoraUpdate",
    "HadamardUpdate",
    "KasaUpdate",
    "KroneckerUpdate",
    "LowRankUpdate",
    "ModuleKind",
    "Replacement",
    "TensorProduct",
    "TokenRows",
    "Update",
    "module_of",
]
