"""The Adapter value: what an adapter file does to a model, whatever format it came in.

Updates are named by the parameter they change in the full model's own naming
(``transformer.h.0.attn.c_attn.weight``); how that name meets a checkpoint's is the business of
``layouts``. Tensors stay in their files until asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from loratool.adapter.updates import DoraUpdate, LowRankUpdate, Replacement, Update
from loratool.storage.tensors import LazyTensor


class ModuleKind(StrEnum):
    """What a parameter's module does with it; decides orientation and how it may be adapted."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"
    POSITION = "position table"
    CONV = "convolution"
    EXPERT = "expert"
    NORM = "norm"
    BIAS = "bias"
    OTHER = "other"


@dataclass(frozen=True)
class Adapter:
    """A set of updates.

    updates: parameter name → update; one of several matrices in one parameter is named by its
    index behind the parameter's name (``…experts.gate_up_proj.3``). base_copies: base weights
    that the file carries along unchanged (PEFT stores embeddings beside their updates); they are
    facts about the base, not changes. fan_in_fan_out: what the file says about weights stored as
    (in, out). as_parameters: weights that PEFT adapts as parameters rather than by their modules.
    lacking: what the config announces and the file does not hold, in a few words each.
    """

    updates: Mapping[str, Update]
    format: str
    base_model: str | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_copies: Mapping[str, LazyTensor] = field(default_factory=dict)
    as_parameters: frozenset[str] = frozenset()
    lacking: tuple[str, ...] = ()

    @property
    def low_rank(self) -> dict[str, LowRankUpdate]:
        """The low-rank updates only."""
        return {
            name: update
            for name, update in self.updates.items()
            if isinstance(update, LowRankUpdate)
        }

    @property
    def factors(self) -> dict[str, LowRankUpdate]:
        """The low-rank updates, those inside DoRA updates among them."""
        return {
            name: update.low_rank if isinstance(update, DoraUpdate) else update
            for name, update in self.updates.items()
            if isinstance(update, DoraUpdate | LowRankUpdate)
        }

    @property
    def replacements(self) -> dict[str, Replacement]:
        """The replaced parameters only."""
        return {
            name: update for name, update in self.updates.items() if isinstance(update, Replacement)
        }

    @property
    def others(self) -> dict[str, Update]:
        """Updates that are neither low-rank nor replacements."""
        return {
            name: update
            for name, update in self.updates.items()
            if not isinstance(update, LowRankUpdate | Replacement)
        }

    @property
    def tensors(self) -> Iterator[LazyTensor]:
        """Every stored tensor of every update."""
        for update in self.updates.values():
            yield from update.tensors


def module_of(parameter: str) -> str:
    """``a.b.weight`` → ``a.b``."""
    return parameter.rpartition(".")[0]
