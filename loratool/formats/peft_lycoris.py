"""PEFT's LoHa and LoKr: the factors that LyCORIS introduced, one module at a time."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter import HadamardUpdate, KroneckerUpdate, TensorProduct, Update
from loratool.errors import MalformedFile
from loratool.formats.peft_config import Scaling
from loratool.storage.tensors import LazyTensor


def lycoris_updates(
    label: str, modules: Mapping[str, Mapping[str, LazyTensor]], scaling: Scaling
) -> dict[str, Update]:
    """Updates by parameter. modules: the factors of each by their last name.

    Raises MalformedFile for factors that are missing, of one kind too many, or do not chain.
    """
    updates: dict[str, Update] = {}
    for module, parts in modules.items():
        hadamard = any(part.startswith("hada") for part in parts)
        read = _hadamard if hadamard else _kronecker
        updates[f"{module}.weight"] = read(label, module, parts, scaling)
    return updates


def _hadamard(
    label: str, module: str, parts: Mapping[str, LazyTensor], scaling: Scaling
) -> HadamardUpdate:
    first, second = (_product(label, module, parts, f"hada_w{k}", f"hada_t{k}") for k in (1, 2))
    used = len(first.factors) + len(second.factors)
    if used != len(parts) or first.rank is None or first.rank != second.rank:
        raise MalformedFile(f"{label}: {module}: LoHa factors {', '.join(sorted(parts))}")
    if first.shape != second.shape:
        raise MalformedFile(
            f"{label}: {module}: LoHa factors make {list(first.shape)} and {list(second.shape)}"
        )
    scale, alpha = scaling.of(module, first.rank)
    return HadamardUpdate(first, second, scale, alpha)


def _kronecker(
    label: str, module: str, parts: Mapping[str, LazyTensor], scaling: Scaling
) -> KroneckerUpdate:
    first = _product(label, module, parts, "lokr_w1", "lokr_t1")
    second = _product(label, module, parts, "lokr_w2", "lokr_t2")
    if len(first.factors) + len(second.factors) != len(parts) or len(first.factors) == 3:
        raise MalformedFile(f"{label}: {module}: LoKr factors {', '.join(sorted(parts))}")
    ranks = {product.rank for product in (first, second)} - {None}
    if len(ranks) > 1:
        raise MalformedFile(f"{label}: {module}: LoKr factors of ranks {sorted(map(str, ranks))}")
    scale, alpha = scaling.of(module, next(iter(ranks), None))
    interleaved = len(second.factors) == 1 and len(second.factors[0].shape) == 3
    return KroneckerUpdate(first, second, scale, alpha, interleaved)


def _product(
    label: str, module: str, parts: Mapping[str, LazyTensor], name: str, core: str
) -> TensorProduct:
    keys = [key for key in (core, f"{name}_a", f"{name}_b") if key in parts]
    if name in parts and not keys:
        whole = parts[name]
        if len(whole.shape) < 2:
            raise MalformedFile(f"{label}: {module}.{name} has the shape {list(whole.shape)}")
        return TensorProduct((whole,))
    if name in parts or [f"{name}_a", f"{name}_b"] != keys[-2:]:
        raise MalformedFile(f"{label}: {module}: no usable {name} among {', '.join(sorted(parts))}")
    factors = tuple(parts[key] for key in keys)
    *_, a, b = (factor.shape for factor in factors)
    if len(a) != 2 or len(b) != 2 or not b[0]:
        raise MalformedFile(f"{label}: {module}: {name} of shapes {list(a)} and {list(b)}")
    chains = a[1] == b[0] if len(factors) == 2 else factors[0].shape[:2] == (a[0], b[0])
    if not chains or (len(factors) == 3 and (len(factors[0].shape) < 3 or a[0] != b[0])):
        shapes = ", ".join(str(list(factor.shape)) for factor in factors)
        raise MalformedFile(f"{label}: {module}: {name} of shapes {shapes} do not chain")
    return TensorProduct(factors)
