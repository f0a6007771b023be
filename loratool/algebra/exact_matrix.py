"""Matrices whose entries are known exactly although they are never built: LoHa, LoKr, differences.

Such a matrix gives its rows two ways: estimated in float64 with a bound on the error of every
entry, and, for chosen entries, as doubles whose exact sum is the entry. Stored values have at
most 24 significant bits, so a product of two is exact in float64; products beyond that are split
without error (Dekker, 1971). Bounds: standard analysis of dot products (Higham, 2002, §3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.exact_sum import two_product
from loratool.algebra.lowrank import LowRank
from loratool.errors import NonFiniteValues, UnsupportedInput

U64 = 2.0**-53
TINY = 2.0**-1000
"""Covers what is lost to underflow in float64, far below any stored format."""
STORED = (torch.bfloat16, torch.float16, torch.float32)


class ExactMatrix(Protocol):
    """A (rows, columns) matrix with exactly known entries."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def T(self) -> ExactMatrix: ...  # noqa: N802  (the field's own name)

    def block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """These rows in float64, and a bound on the absolute error of each entry.

        rows: (n,) indices. Both results broadcast to (n, columns).
        """

    def exact(self, rows: Tensor, columns: Tensor) -> np.ndarray:
        """(K, N) doubles; column k of them sums, exactly, to entry (rows[k], columns[k])."""


class Stored:
    """A matrix as stored, in at most float32. Raises NonFiniteValues and UnsupportedInput."""

    def __init__(self, values: Tensor):
        self._values = checked(values).double()

    @property
    def shape(self) -> tuple[int, int]:
        return self._values.shape[0], self._values.shape[1]

    @property
    def T(self) -> Stored:  # noqa: N802
        turned = Stored.__new__(Stored)
        turned._values = self._values.T
        return turned

    def block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._values[rows], torch.zeros(1, 1, dtype=torch.float64)

    def exact(self, rows: Tensor, columns: Tensor) -> np.ndarray:
        return self._values[rows, columns].numpy()[None]


@dataclass(frozen=True)
class MatrixProduct:
    """b @ a with b: (rows, r), a: (r, columns), both float64 holding at most 24-bit values."""

    b: Tensor
    a: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def T(self) -> MatrixProduct:  # noqa: N802
        return type(self)(self.a.T, self.b.T)

    def block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        b = self.b[rows]
        size = torch.outer(b.norm(dim=1), self.a.norm(dim=0))  # Cauchy–Schwarz
        return b @ self.a, (U64 * (1.01 * self.b.shape[1] + 2)) * size + TINY

    def exact(self, rows: Tensor, columns: Tensor) -> np.ndarray:
        products: np.ndarray = (self.b[rows].T * self.a[:, columns]).numpy()
        return products


def matrix_product(b: Tensor, a: Tensor) -> MatrixProduct:
    """b @ a of stored factors. Raises NonFiniteValues and UnsupportedInput."""
    return MatrixProduct(checked(b).double(), checked(a).double())


class WideProduct(MatrixProduct):
    """The same with factors of up to 48 bits: products of two stored values."""

    def exact(self, rows: Tensor, columns: Tensor) -> np.ndarray:
        return np.concatenate(two_product(self.b[rows].T.numpy(), self.a[:, columns].numpy()))


def diagonal_product(b: Tensor, d: Tensor, a: Tensor) -> WideProduct:
    """b @ diag(d) @ a of stored values. Raises NonFiniteValues and UnsupportedInput."""
    return WideProduct(checked(b).double() * checked(d).double(), checked(a).double())


def low_rank_matrix(value: LowRank) -> Scaled:
    """scale · b @ a. Raises NonFiniteValues and UnsupportedInput."""
    return Scaled(matrix_product(value.b, value.a), value.scale)


class Tucker:
    """Entry (p, (q, k…)) = Σ_ij t[i, j, k…] · b[i, p] · a[j, q].

    t: (r, r, k…), b: (r, rows), a: (r, columns). Raises NonFiniteValues and UnsupportedInput.
    """

    def __init__(self, t: Tensor, b: Tensor, a: Tensor):
        self._t = checked(t).double().flatten(2)
        self._b = checked(b).double()
        self._a = checked(a).double()

    @property
    def shape(self) -> tuple[int, int]:
        return self._b.shape[1], self._a.shape[1] * self._t.shape[2]

    @property
    def T(self) -> ExactMatrix:  # noqa: N802
        raise UnsupportedInput("a convolution's Tucker product has no transposed form")

    def block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        b = self._b[:, rows]
        size = _tucker(self._t.abs(), b.abs(), self._a.abs())
        terms = 1.01 * (self._t.shape[0] + self._t.shape[1]) + 6
        return _tucker(self._t, b, self._a), (U64 * terms) * size + TINY

    def exact(self, rows: Tensor, columns: Tensor) -> np.ndarray:
        kernel = self._t.shape[2]
        q, k = columns // kernel, columns % kernel
        pairs = (self._t[:, :, k] * self._b[:, None, rows]).flatten(0, 1).numpy()
        others = self._a[None, :, q].expand(self._t.shape[0], -1, -1).flatten(0, 1).numpy()
        return np.concatenate(two_product(pairs, others))


def _tucker(t: Tensor, b: Tensor, a: Tensor) -> Tensor:
    inner = torch.einsum("ijk,ip->pkj", t, b)
    return (inner @ a).transpose(1, 2).flatten(1)


@dataclass(frozen=True)
class Product:
    """Two matrices of one shape, multiplied element by element."""

    first: ExactMatrix
    second: ExactMatrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape

    @property
    def T(self) -> Product:  # noqa: N802
        return Product(self.first.T, self.second.T)

    def block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return _times(self.first.block(rows), self.second.block(rows))

    def exact(self, rows: Tensor, columns: Tensor) -> np.ndarray:
        return _all_products(self.first.exact(rows, columns), self.second.exact(rows, columns))


@dataclass(frozen=True)
class Kronecker:
    """first ⊗ second."""

    first: ExactMatrix
    second: ExactMatrix

    @property
    def shape(self) -> tuple[int, int]:
        (a, c), (b, d) = self.first.shape, self.second.shape
        return a * b, c * d

    @property
    def T(self) -> Kronecker:  # noqa: N802
        return Kronecker(self.first.T, self.second.T)

    def block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        height = self.second.shape[0]
        outer = [part[:, :, None] for part in self.first.block(rows // height)]
        inner = [part[:, None, :] for part in self.second.block(rows % height)]
        value, error = _times((outer[0], outer[1]), (inner[0], inner[1]))
        return value.flatten(1), error.expand(value.shape).flatten(1)

    def exact(self, rows: Tensor, columns: Tensor) -> np.ndarray:
        height, width = self.second.shape
        return _all_products(
            self.first.exact(rows // height, columns // width),
            self.second.exact(rows % height, columns % width),
        )


@dataclass(frozen=True)
class Scaled:
    """factor · matrix."""

    matrix: ExactMatrix
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def T(self) -> Scaled:  # noqa: N802
        return Scaled(self.matrix.T, self.factor)

    def block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        value, error = self.matrix.block(rows)
        value = value * self.factor
        return value, error * abs(self.factor) + value.abs() * U64 + TINY

    def exact(self, rows: Tensor, columns: Tensor) -> np.ndarray:
        values = self.matrix.exact(rows, columns)
        return np.concatenate(two_product(values, np.float64(self.factor)))


@dataclass(frozen=True)
class Spread:
    """Rows (or columns) of a matrix at other places of a larger one; zeros elsewhere.

    places: for each row (column) of the result, the one it comes from, or −1.
    """

    matrix: ExactMatrix
    places: Tensor
    columns: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return (rows, len(self.places)) if self.columns else (len(self.places), columns)

    @property
    def T(self) -> Spread:  # noqa: N802
        return Spread(self.matrix.T, self.places, not self.columns)

    def block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.columns:
            value, error = self.matrix.block(rows)
            here = self.places.clamp(min=0)
            covered = (self.places >= 0).double()[None]
            return value[:, here] * covered, error.expand(value.shape)[:, here] * covered
        places = self.places[rows]
        value, error = self.matrix.block(places.clamp(min=0))
        covered = (places >= 0).double()[:, None]
        return value * covered, error * covered

    def exact(self, rows: Tensor, columns: Tensor) -> np.ndarray:
        places = self.places[columns if self.columns else rows]
        inside = places.clamp(min=0)
        values = (
            self.matrix.exact(rows, inside) if self.columns else self.matrix.exact(inside, columns)
        )
        covered: np.ndarray = values * (places >= 0).numpy()[None]
        return covered


def checked(values: Tensor) -> Tensor:
    """The values, if they are finite and of a precision that products stay exact for."""
    if values.dtype not in STORED:
        raise UnsupportedInput(f"adapter factors of {values.dtype} cannot be merged")
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteValues("the adapter's factors hold NaN or infinity")
    return values


def _times(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (x, dx), (y, dy) = first, second
    value = x * y
    return value, x.abs() * dy + y.abs() * dx + dx * dy + value.abs() * U64 + TINY


def _all_products(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    count = first.shape[1]
    pairs = two_product(first[:, None, :], second[None, :, :])
    return np.concatenate([part.reshape(-1, count) for part in pairs])
