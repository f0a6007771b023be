"""PEFT's ``target_parameters``: updates of bare parameters, mostly the experts of a mixture.

A parameter (E, out, in) holds one matrix per expert. PEFT keeps all their factors in one pair:
lora_A (E·r, in), expert after expert, and lora_B (out, r·E), read as (out, r, E). In an Adapter
each matrix has an update of its own, named by parameter and index (``…experts.gate_up_proj.3``);
a parameter of two dimensions is one matrix and has no index.

PEFT wraps a module once for each of its parameters, in the order in which the module defines
them, so the first of them is innermost: ``experts.base_layer.lora_A`` belongs to gate_up_proj
and ``experts.lora_A`` to down_proj where both are adapted. Checked against PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from loratool.adapter import LowRankUpdate, module_of
from loratool.errors import MalformedFile, Unplaced
from loratool.storage.tensors import LazyTensor
from loratool.storage.views import Columns, Interleaved, Joined, rows_of

_DEFINED_FIRST = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "gate_proj",
    "up_proj",
    "down_proj",
    "down_proj_bias",
)
"""The order in which transformers' modules of experts define their parameters."""
_INDEXED = re.compile(r"(.+)\.(\d+)")
_LAYER = ".base_layer"


def parameter_of(name: str) -> str:
    """The bare parameter that an update's name belongs to: ``a.gate_up_proj.3`` → without index."""
    indexed = _INDEXED.fullmatch(name)
    return indexed[1] if indexed else name


def is_bare(name: str) -> bool:
    """Whether a name is of a parameter that is no module's weight, or of one of its matrices."""
    return not name.endswith(".weight")


@dataclass(frozen=True)
class Wrapped:
    """Which parameters a config targets. targets: its target_parameters."""

    label: str
    targets: tuple[str, ...]

    def parameter(self, module: str, keys: Collection[str]) -> str | None:
        """The parameter that the factors of ``module`` (as in the file, with its base_layers)
        belong to; None where they are an ordinary module's. Raises Unplaced."""
        owner, levels = module, 0
        while owner.endswith(_LAYER):
            owner, levels = owner.removesuffix(_LAYER), levels + 1
        names = self._of(owner)
        if not names:
            return None
        depth = 0
        while any(f"{owner}{_LAYER * (depth + 1)}.lora_A" in key for key in keys):
            depth += 1
        unknown = [name for name in names if name not in _DEFINED_FIRST]
        if len(names) != depth + 1 or (unknown and len(names) > 1):
            raise Unplaced(
                f"{self.label}: {owner}: has factors for {depth + 1} parameters, the config names "
                f"{', '.join(names) or 'none'}",
                hint="which factors belong to which parameter cannot be told",
            )
        return f"{owner}.{names[depth - levels]}"

    def _of(self, owner: str) -> list[str]:
        found = set()
        for target in self.targets:
            parent, _, last = target.rpartition(".")
            here = owner == parent or owner.endswith(f".{parent}") if parent else "expert" in owner
            if here:
                found.add(last)
        order = {name: place for place, name in enumerate(_DEFINED_FIRST)}
        return sorted(found, key=lambda name: (order.get(name, len(order)), name))


def decode_parameter(
    label: str,
    name: str,
    a: LazyTensor,
    b: LazyTensor,
    *,
    rank: int,
    scale: float,
    alpha: float,
) -> dict[str, LowRankUpdate]:
    """The updates of a parameter's matrices. a: (E·r, in), b: (out, r·E). Raises MalformedFile."""
    if len(a.shape) != 2 or len(b.shape) != 2 or not rank or a.shape[0] != b.shape[1]:
        raise MalformedFile(f"{label}: {name}: lora_B {b.shape} and lora_A {a.shape} do not chain")
    experts, rest = divmod(a.shape[0], rank)
    if rest or not experts:
        raise MalformedFile(
            f"{label}: {name}: lora_A has {a.shape[0]} rows, no multiple of its rank {rank}"
        )
    if experts == 1:
        return {name: LowRankUpdate(b, a, scale, alpha)}
    return {
        f"{name}.{e}": LowRankUpdate(
            Columns(b, e, rank * experts, experts),
            rows_of(a, e * rank, (e + 1) * rank),
            scale,
            alpha,
        )
        for e in range(experts)
    }


@dataclass(frozen=True)
class EncodedParameter:
    """Factors of all matrices of one parameter. owner: the module as PEFT's keys name it."""

    name: str
    owner: str
    b: LazyTensor
    a: LazyTensor
    scale: float
    alpha: float
    rank: int


def encode_parameters(updates: Mapping[str, LowRankUpdate]) -> Iterator[EncodedParameter]:
    """What PEFT stores for updates of bare parameters.

    Raises Unplaced where a parameter's matrices are not all there or differ in rank or scale.
    """
    stacks: dict[str, dict[str, LowRankUpdate]] = {}
    for name, update in updates.items():
        stacks.setdefault(parameter_of(name), {})[name] = update
    for name, stack in stacks.items():
        owner, _, last = name.rpartition(".")
        siblings = [other for other in stacks if module_of(other) == owner]
        places = {other.rpartition(".")[2] for other in siblings}
        if len(places) > 1 and not places <= set(_DEFINED_FIRST):
            raise Unplaced(f"{owner}: the order of its parameters in PEFT is not known")
        later = (
            sum(_DEFINED_FIRST.index(other) > _DEFINED_FIRST.index(last) for other in places)
            if len(places) > 1
            else 0
        )
        parts = _in_order(name, stack)
        first = parts[0]
        yield EncodedParameter(
            name,
            owner + _LAYER * later,
            first.b if len(parts) == 1 else Interleaved(tuple(part.b for part in parts)),
            first.a if len(parts) == 1 else Joined(tuple(part.a for part in parts)),
            first.scale,
            first.alpha,
            first.rank,
        )


def _in_order(name: str, stack: Mapping[str, LowRankUpdate]) -> list[LowRankUpdate]:
    if set(stack) == {name}:
        return [stack[name]]
    wanted = [f"{name}.{index}" for index in range(len(stack))]
    if set(wanted) != set(stack):
        raise Unplaced(f"{name}: PEFT stores the updates of all its matrices or of none")
    parts = [stack[each] for each in wanted]
    first = parts[0]
    for part in parts:
        same = (part.rank, part.scale, part.alpha, part.shape, part.a.dtype, part.b.dtype)
        if same != (
            first.rank,
            first.scale,
            first.alpha,
            first.shape,
            first.a.dtype,
            first.b.dtype,
        ):
            raise Unplaced(f"{name}: PEFT stores one rank and one scale for all its matrices")
    return parts
