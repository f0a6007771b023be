"""What a combination method is: a function with its parameters, source, space and cost declared.

Command-line options, checks and docs/methods.md come from the declaration.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from loratool.algebra.lowrank import LowRank
from loratool.algebra.row_blocks import RowBlocks
from loratool.algebra.truncation import total
from loratool.errors import UsageError

Value = float | int | bool | str
Combined = LowRank | RowBlocks


class Space(StrEnum):
    """Where a method works, which decides what it costs."""

    FACTORS = "factors"
    """On the factors alone, through inner products: O((m+n)·R²) for joint rank R."""

    CORE = "core"
    """On R×R matrices in joint bases of all factors: O((m+n)·R² + R³)."""

    DENSE = "dense"
    """On every element of the updates, in blocks of rows; the result is factorised again."""


@dataclass(frozen=True)
class Parameter:
    """A number, switch or choice of one or more methods.

    low, high: the range of a number, both included unless ``open_low``/``open_high``.
    """

    name: str
    kind: type[float] | type[int] | type[bool] | type[str]
    default: Value
    help: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()

    @property
    def argument(self) -> str:
        """The name of the method's keyword argument."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name

    @property
    def range_text(self) -> str:
        """The values it takes, in words."""
        if self.choices:
            return " or ".join(self.choices)
        if self.kind is bool:
            return "true or false"
        what = "a whole number" if self.kind is int else "a number"
        bounds = []
        if self.low > -math.inf:
            bounds.append(f"{'above' if self.open_low else 'from'} {self.low:g}")
        if self.high < math.inf:
            bounds.append(f"{'below' if self.open_high else 'up to'} {self.high:g}")
        return " ".join([what, *bounds])

    def check(self, value: object) -> Value:
        """The value in the parameter's own type. Raises UsageError naming the range."""
        number = self._converted(value)
        if number is None or (self.choices and number not in self.choices):
            raise UsageError(f"{self.name} {value!r}: needs {self.range_text}")
        if isinstance(number, int | float) and self.kind is not bool:
            low = number > self.low if self.open_low else number >= self.low
            high = number < self.high if self.open_high else number <= self.high
            if not (low and high):
                raise UsageError(f"{self.name} {value!r}: needs {self.range_text}")
        return number

    def _converted(self, value: object) -> Value | None:
        if self.kind is bool or isinstance(value, bool):
            return value if isinstance(value, bool) and self.kind is bool else None
        if self.kind is str:
            return value if isinstance(value, str) else None
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        if self.kind is int:
            return int(value) if value == int(value) else None
        return float(value)


@dataclass(frozen=True)
class Updates:
    """What all adapters do to one weight.

    name: the parameter's. updates: one per adapter, in the user's order and orientation (out, in),
    its scale inside, of rank 0 where an adapter has none for this weight; on ``device``. weights:
    the user's, not yet applied. seed: of the random methods.
    """

    name: str
    updates: tuple[LowRank, ...]
    weights: tuple[float, ...]
    seed: int = 0

    @property
    def weighted(self) -> tuple[LowRank, ...]:
        """The updates times their weights."""
        return tuple(u * w for u, w in zip(self.updates, self.weights, strict=True))

    @property
    def shape(self) -> tuple[int, int]:
        return self.updates[0].shape

    @property
    def device(self) -> torch.device:
        return self.updates[0].b.device

    def key(self, adapter: int) -> str:
        """What the random numbers for one adapter's update of this weight depend on."""
        return f"{self.seed}:{self.name}:{adapter}"


@dataclass(frozen=True)
class Method:
    """A registered way of combining.

    run: from the updates of one weight and the parameters as keyword arguments to the combined
    update. adapters: fewest and most it takes. keeps_rank: its result is stored as it is, and
    takes no rank rule. is_sum: unless it normalises, its result is λ·Σ wᵢΔWᵢ, or that of
    the elements it keeps. validate: what must hold between parameters, else UsageError.
    """

    name: str
    run: Callable[..., Combined]
    space: Space
    source: str
    cost: str
    weights: str
    parameters: tuple[Parameter, ...] = ()
    adapters: tuple[int, int | None] = (1, None)
    keeps_rank: bool = False
    is_sum: bool = False
    notes: str = ""
    validate: Callable[[Mapping[str, Value]], None] | None = None
    summary: str = field(init=False)

    def __post_init__(self) -> None:
        text = (self.run.__doc__ or "").strip().splitlines()[0]
        object.__setattr__(self, "summary", text)

    def __call__(self, updates: Updates, parameters: Mapping[str, Value]) -> Combined:
        """Combine; ``parameters`` by name, complete (see ``check``)."""
        arguments = {p.argument: parameters[p.name] for p in self.parameters}
        return self.run(updates, **arguments)

    def check(self, given: Mapping[str, object], adapters: int) -> dict[str, Value]:
        """All parameters with their values. Raises UsageError for what does not fit."""
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in given:
            if name not in known:
                raise UsageError(
                    f"method {self.name} takes no {name}",
                    hint=f"it takes {', '.join(known) or 'no parameters'}",
                )
        least, most = self.adapters
        if adapters < least or (most is not None and adapters > most):
            wanted = f"exactly {least}" if least == most else f"at least {least}"
            raise UsageError(f"method {self.name} combines {wanted} adapters, not {adapters}")
        values = {
            name: parameter.check(given.get(name, parameter.default))
            for name, parameter in known.items()
        }
        if self.validate is not None:
            self.validate(values)
        return values


def method(name: str, **facts: Any) -> Callable[[Callable[..., Combined]], Method]:
    """Make a function a method; the first line of its docstring is the summary."""
    return lambda run: Method(name, run, **facts)


def linear_combination(updates: Sequence[LowRank], coefficients: Sequence[float]) -> LowRank:
    """Σ cᵢ·ΔWᵢ, exact, of rank Σr."""
    return total([u * c for u, c in zip(updates, coefficients, strict=True)])
