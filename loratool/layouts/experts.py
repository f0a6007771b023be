"""Mixtures of experts: what transformers 5 and PEFT make of weights stored expert by expert.

transformers 5 loads them into one three-dimensional parameter for all experts of a layer, and the
router into a module of its own kind. There is then no module to adapt or to save for one expert.
PEFT, finding the names of the former modules in a config (gate_proj, w1 …), retargets them to the
fused parameters, so an ordinary layer of such a name can only be saved whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from loratool.adapter import module_of

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.+)\.(?:weight|bias)")


@dataclass(frozen=True)
class Experts:
    """Of one model. blocks: the modules that hold an ``experts`` list. parts: names in experts."""

    blocks: frozenset[str]
    parts: frozenset[str]

    def is_expert(self, name: str) -> bool:
        """Whether a parameter belongs to one expert."""
        return _EXPERT.fullmatch(name) is not None

    def is_saved_whole(self, name: str) -> bool:
        """Whether a weight is a router, or bears a name that PEFT takes for an expert's."""
        parent, _, last = module_of(name).rpartition(".")
        return (last == "gate" and parent in self.blocks) or last in self.parts


def find_experts(names: Iterable[str]) -> Experts:
    """The experts among these parameter names."""
    found = [match for match in map(_EXPERT.fullmatch, names) if match]
    return Experts(
        frozenset(module_of(match[1]) for match in found),
        frozenset(match[2] for match in found),
    )
