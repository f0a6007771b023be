"""What an adapter does to one parameter: the kinds of updates, independent of any file format.

Every kind knows ``shape`` (of the parameter as its module sees it), ``tensors`` (what is stored)
and ``is_additive``: whether it adds an amount that does not depend on the weight it is added to,
so that several can be summed, weighted, and taken off again. Tensors stay in their files until
asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratool.algebra.exact_matrix import (
    ExactMatrix,
    Kronecker,
    Product,
    Scaled,
    Spread,
    Stored,
    Tucker,
    diagonal_product,
    matrix_product,
)
from loratool.algebra.lowrank import LowRank
from loratool.plural import counted
from loratool.storage.tensors import LazyTensor


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

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return (self.b, self.a)

    def load(self) -> LowRank:
        """The update in the orientation of ``shape``."""
        value = LowRank(self.b.read().flatten(1), self.a.read().flatten(1), self.scale)
        return value.T if self.is_embedding else value

    def describe(self, weight: float = 1.0) -> str:
        return f"rank {self.rank}, scale {self.scale * weight:g}"


@dataclass(frozen=True)
class DoraUpdate:
    """W becomes m · V / ‖V‖ with V = W + scale · B @ A, norms over each row of the product.

    magnitude: (out,) for a linear module or a convolution. For an embedding it is (dim,), one for
    each row of B @ A and so for each column of the table, as PEFT has it. With a weight w other
    than 1 the result is W + w · (DoRA(W) − W).
    """

    low_rank: LowRankUpdate
    magnitude: LazyTensor
    is_additive: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.low_rank.shape

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return (*self.low_rank.tensors, self.magnitude)

    def describe(self, weight: float = 1.0) -> str:
        weighted = f", weight {weight:g}" if weight != 1 else ""
        return f"DoRA of {self.low_rank.describe()}{weighted}"


@dataclass(frozen=True)
class KasaUpdate:
    """W becomes T(W) + scale · B @ diag(d) @ A, T leaving out the r smallest singular components.

    diagonal: (r,), with r the rank of the factors. PEFT trains it beside the base T(W), rounded to
    the base's dtype, and merges it into that.
    """

    low_rank: LowRankUpdate
    diagonal: LazyTensor
    is_additive: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.low_rank.shape

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return (*self.low_rank.tensors, self.diagonal)

    def load(self) -> Scaled:
        """What is added to T(W)."""
        b, a = self.low_rank.b.read(), self.low_rank.a.read()
        product = diagonal_product(b, self.diagonal.read(), a)
        return Scaled(product, self.low_rank.scale)

    def describe(self, weight: float = 1.0) -> str:
        return f"KaSA of {self.low_rank.describe()}"


@dataclass(frozen=True)
class TensorProduct:
    """One factor of a LoHa or LoKr update: a matrix as stored, b @ a, or a Tucker product.

    factors: (w,), (b, a) or (t, b, a) with t: (r, r, k…), b: (r, rows), a: (r, columns), where
    entry (p, (q, k…)) is Σ_ij t[i, j, k…] · b[i, p] · a[j, q]. A stored w of more than two
    dimensions is read as the matrix (rows, rest).
    """

    factors: tuple[LazyTensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        if len(self.factors) == 3:
            t, b, a = self.factors
            return (b.shape[1], a.shape[1] * math.prod(t.shape[2:]))
        return (self.factors[0].shape[0], math.prod(self.factors[-1].shape[1:]))

    @property
    def rank(self) -> int | None:
        """r, or None of a matrix stored whole."""
        return self.factors[-1].shape[0] if len(self.factors) > 1 else None

    def load(self) -> ExactMatrix:
        """The matrix of ``shape``, its entries known exactly."""
        values = [factor.read() for factor in self.factors]
        if len(values) == 3:
            return Tucker(*values)
        if len(values) == 2:
            return matrix_product(values[0].flatten(1), values[1].flatten(1))
        return Stored(values[0].flatten(1))


@dataclass(frozen=True)
class HadamardUpdate:
    """LoHa: ΔW = scale · first ∘ second, element by element."""

    first: TensorProduct
    second: TensorProduct
    scale: float
    alpha: float
    is_additive: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return (*self.first.factors, *self.second.factors)

    def load(self) -> Scaled:
        """The update in the orientation of ``shape``."""
        return Scaled(Product(self.first.load(), self.second.load()), self.scale)

    def describe(self, weight: float = 1.0) -> str:
        return f"LoHa of rank {self.first.rank}, scale {self.scale * weight:g}"


@dataclass(frozen=True)
class KroneckerUpdate:
    """LoKr: ΔW = scale · first ⊗ second.

    interleaved: second is a kernel (b, d, k) stored whole, and what belongs at row (p, i) and
    column (s, q, t) lies at (i, p) and (q, s, t): so PEFT has it, whose product of a matrix and
    three dimensions adds the missing one in front.
    """

    first: TensorProduct
    second: TensorProduct
    scale: float
    alpha: float
    interleaved: bool = False
    is_additive: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        (a, c), (b, d) = self.first.shape, self.second.shape
        return (a * b, c * d)

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return (*self.first.factors, *self.second.factors)

    def load(self) -> Scaled:
        """The update in the orientation of ``shape``."""
        matrix: ExactMatrix = Kronecker(self.first.load(), self.second.load())
        if self.interleaved:
            rows, columns = self.places
            matrix = Spread(Spread(matrix, rows), columns, columns=True)
        return Scaled(matrix, self.scale)

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """For each row and each column of an interleaved ΔW, that of first ⊗ second which it is."""
        (a, c), (b, d, k) = self.first.shape, self.second.factors[0].shape
        rows, columns = torch.arange(a * b), torch.arange(c * d * k)
        return (
            rows.view(a, b).T.reshape(-1),
            columns.view(c, d, k).transpose(0, 1).reshape(-1),
        )

    def describe(self, weight: float = 1.0) -> str:
        return f"LoKr of {self.first.shape} and {self.second.shape}, scale {self.scale * weight:g}"


@dataclass(frozen=True)
class DenseUpdate:
    """ΔW = scale · value, of any shape: what ``lora_bias`` adds to a bias, for example."""

    value: LazyTensor
    scale: float = 1.0
    is_additive: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return (self.value,)

    def load(self) -> Scaled:
        """The update as a matrix of rows; a vector becomes one column."""
        value = self.value.read()
        return Scaled(Stored(value.reshape(value.shape[0], -1)), self.scale)

    def describe(self, weight: float = 1.0) -> str:
        return f"difference, scale {self.scale * weight:g}"


@dataclass(frozen=True)
class TokenRows:
    """Absolute values for some rows of an embedding or output head: the trained tokens.

    indices: the rows of the table, each once. value: (len(indices), dim).
    """

    indices: tuple[int, ...]
    value: LazyTensor
    is_additive: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return (self.value,)

    def describe(self, weight: float = 1.0) -> str:
        return f"{counted(len(self.indices), 'row')} replaced"


@dataclass(frozen=True)
class Replacement:
    """Absolute values for one parameter, as modules_to_save and bias="all" store them."""

    value: LazyTensor
    is_additive: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return (self.value,)

    def describe(self, weight: float = 1.0) -> str:
        return "replaced"


Update = (
    LowRankUpdate
    | DoraUpdate
    | KasaUpdate
    | HadamardUpdate
    | KroneckerUpdate
    | DenseUpdate
    | TokenRows
    | Replacement
)
