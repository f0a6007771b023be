"""The Adapter value: what an adapter file does to a model, whatever format it came in.

Updates are named by the parameter they change in the full model's own naming
(``transformer.h.0.attn.c_attn.weight``); how that name meets a checkpoint's is the business of
``layouts``. Tensors stay in their files until asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from loratool.algebra.lowrank import LowRank
from loratool.storage.tensors import LazyTensor


class ModuleKind(StrEnum):
    """What a parameter's module does with it; decides orientation and how it may be adapted."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"
    POSITION = "position table"
    CONV = "convolution"
    NORM = "norm"
    BIAS = "bias"
    OTHER = "other"


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW = scale · B @ A on one weight.

    b: (out, r), a: (r, in) for a linear module. For an embedding the factors are PEFT's
    ``lora_embedding_B`` (dim, r) and ``lora_embedding_A`` (r, vocabulary), whose product is the
    transposed change of the (vocabulary, dim) table. For a convolution a: (r, in, k…) and
    b: (out, r, 1…), and the weight is read as the matrix (out, in·k…). r and alpha are as the
    file states them.
    """

    b: LazyTensor
    a: LazyTensor
    scale: float
    alpha: float
    is_embedding: bool = False
    is_additive: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """(in, k…) of a convolution; () of a matrix."""
        return self.a.shape[1:] if len(self.a.shape) > 2 else ()

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight as a matrix: (out, in), or (vocabulary, dim) of an embedding."""
        product = (self.b.shape[0], math.prod(self.a.shape[1:]))
        return (product[1], product[0]) if self.is_embedding else product

    def load(self) -> LowRank:
        """The update in the orientation of ``shape``."""
        value = LowRank(self.b.read().flatten(1), self.a.read().flatten(1), self.scale)
        return value.T if self.is_embedding else value


@dataclass(frozen=True)
class Replacement:
    """Absolute values for one parameter, as modules_to_save and bias="all" store them."""

    value: LazyTensor
    is_additive: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


Update = LowRankUpdate | Replacement
"""``is_additive``: adds an amount that does not depend on the weight it is added to, so that
several can be summed, weighted, and taken off again."""


@dataclass(frozen=True)
class Adapter:
    """A set of updates.

    updates: parameter name → update; one of several matrices in one parameter is named by its
    index behind the parameter's name (``…experts.gate_up_proj.3``). base_copies: base weights
    that the file carries along unchanged (PEFT stores embeddings beside their updates); they are
    facts about the base, not changes. fan_in_fan_out: what the file says about weights stored as
    (in, out).
    """

    updates: Mapping[str, Update]
    format: str
    base_model: str | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_copies: Mapping[str, LazyTensor] = field(default_factory=dict)

    @property
    def low_rank(self) -> dict[str, LowRankUpdate]:
        """The low-rank updates only."""
        return {
            name: update
            for name, update in self.updates.items()
            if isinstance(update, LowRankUpdate)
        }

    @property
    def replacements(self) -> dict[str, Replacement]:
        """The replaced parameters only."""
        return {
            name: update for name, update in self.updates.items() if isinstance(update, Replacement)
        }


def module_of(parameter: str) -> str:
    """``a.b.weight`` → ``a.b``."""
    return parameter.rpartition(".")[0]
