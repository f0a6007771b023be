"""From the updates placed on one tensor to the arithmetic that carries them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.adapter import (
    DenseUpdate,
    DoraUpdate,
    HadamardUpdate,
    KasaUpdate,
    KroneckerUpdate,
    LowRankUpdate,
    Replacement,
    TokenRows,
    Update,
)
from loratool.algebra.certified_scaled import CertifiedScaled, unpacked
from loratool.algebra.certified_terms import CertifiedTerms
from loratool.algebra.dora import CertifiedDora, Dora
from loratool.algebra.exact_matrix import ExactMatrix, Scaled, Spread, checked, low_rank_matrix
from loratool.algebra.kasa import KasaSum
from loratool.algebra.lowrank import LowRank
from loratool.algebra.rounding import U32, U64, CertifiedSum, RoundedBlock, Rounder, round_once
from loratool.errors import DisagreementError, NonFiniteValues, UnsupportedInput
from loratool.layouts.placing import PlacedUpdate
from loratool.layouts.scales import ScaledBy
from loratool.storage.tensors import LazyTensor, TensorInfo
from loratool.storage.views import Flattened

_BLOCK_ELEMENTS = 2**20
_UNITS = U32 / U64


def rounder_of(
    updates: Sequence[PlacedUpdate],
    base: LazyTensor,
    start: int,
    stop: int,
    *,
    device: torch.device,
    scaled: ScaledBy | None = None,
) -> Rounder:
    """The rounder for rows ``start:stop`` of a tensor; its own rows count from ``start``.

    updates: all that are placed on the tensor; the weights of additive ones may have either sign.
    base: the tensor they were made for, which some kinds need beyond the rows asked for.
    scaled: of a tensor in 8 bits, which keeps its scales. Low-rank updates are calculated on
    ``device``, other kinds on the CPU. Raises NonFiniteValues and UnsupportedInput naming the
    update.
    """
    kinds = {type(update.update) for update in updates}
    try:
        if scaled is not None:
            return CertifiedScaled(_mixed(updates, base, start, scaled), scaled.rows, start)
        if any(update.member is not None for update in updates):
            return _Members(tuple(updates), start, device)
        if kinds == {LowRankUpdate}:
            factors = [_low_rank(update, start, stop, device) for update in updates]
            return CertifiedSum(factors)
        if kinds in ({Replacement}, {TokenRows}):
            (only,) = updates
            return _replaced(only, start)
        if kinds == {KasaUpdate}:
            (only,) = updates
            assert isinstance(only.update, KasaUpdate)
            return KasaSum(base.read(), only.update.low_rank.rank, only.update.load(), start)
        return _mixed(updates, base, start)
    except (NonFiniteValues, UnsupportedInput, DisagreementError) as error:
        sources = " + ".join(dict.fromkeys(update.source for update in updates))
        where = _not_finite(updates) if isinstance(error, NonFiniteValues) else None
        raise type(error)(f"{sources}: {where or error.message}", hint=error.hint) from None


def _not_finite(updates: Sequence[PlacedUpdate]) -> str | None:
    """Which value of the adapters is no number, by the stored tensor's name."""
    for tensor in (tensor for one in updates for tensor in one.update.tensors):
        odd = torch.nonzero(~torch.isfinite(tensor.read()))
        if len(odd):
            stored = tensor.source if isinstance(tensor, Flattened) else tensor
            name = stored.name if isinstance(stored, TensorInfo) else "the adapter"
            return f"{name} holds NaN or infinity at {odd[0].tolist()}"
    return None


def float32_errors(
    updates: Sequence[PlacedUpdate], base: LazyTensor
) -> Callable[[Tensor, int], Tensor] | None:
    """By how much a merge calculated in float32 may miss each value: the a-priori bound that
    float64 has, in units of float32. Takes rows of the base and the first one's number. None for
    what is replaced or rounded on the way (KaSA)."""
    if any(isinstance(one.update, Replacement | TokenRows | KasaUpdate) for one in updates):
        return None
    members = {update.member for update in updates if update.member is not None}
    if not members:
        whole = _mixed(updates, base, 0)
        return lambda rows, first: _UNITS * whole.estimate(rows.double(), first)[1]
    ours = {member: [one for one in updates if one.member == member] for member in members}
    sums = {member: _mixed(of_one, base, 0) for member, of_one in ours.items()}

    def of_members(rows: Tensor, first: int) -> Tensor:
        errors = torch.zeros(rows.shape, dtype=torch.float64)
        for offset, flat in enumerate(rows):
            if (summed := sums.get(first + offset)) is not None:
                matrix = flat.double().view(_matrix_shape(ours[first + offset][0]))
                errors[offset] = _UNITS * summed.estimate(matrix, 0)[1].reshape(-1)
        return errors

    return of_members


@dataclass(frozen=True)
class ReplacedRows:
    """Rows that become those of ``value``, from row ``start`` on; what was there does not matter.

    rows: where each row of ``value`` goes, or None where it has a value for every row; the others
    stay.
    """

    value: LazyTensor
    start: int
    rows: tuple[int, ...] | None = None

    def add_to(self, w0: Tensor, first_row: int, dtype: torch.dtype) -> RoundedBlock:
        """Those rows, each value rounded once. Raises NonFiniteValues."""
        first = self.start + first_row
        if self.rows is None:
            new = self.value.read_rows(first, first + len(w0)).reshape(w0.shape).to(w0.device)
            values = self._rounded(new, dtype, first)
        else:
            values = w0.to(dtype, copy=True)
            for index, row in enumerate(self.rows):
                if first <= row < first + len(w0):
                    new = self.value.read_rows(index, index + 1).reshape(-1).to(w0.device)
                    values[row - first] = self._rounded(new[None], dtype, row)[0]
        overflowed = int(torch.isinf(values).sum())
        return RoundedBlock(values, int((values != w0).sum()), 0, 0, overflowed)

    def _rounded(self, new: Tensor, dtype: torch.dtype, first: int) -> Tensor:
        if not bool(torch.isfinite(new).all()):
            row, column = torch.nonzero(~torch.isfinite(new))[0].tolist()
            where = [first + row, column] if new.shape[1] > 1 else [first + row]
            raise NonFiniteValues(f"the adapter replaces it by NaN or infinity at {where}")
        return round_once(new, dtype)


@dataclass(frozen=True)
class _Members:
    """Rows are the matrices of a stack, each of which has low-rank updates of its own."""

    updates: tuple[PlacedUpdate, ...]
    start: int
    device: torch.device

    def add_to(self, w0: Tensor, first_row: int, dtype: torch.dtype) -> RoundedBlock:
        """Those matrices, each flattened. Raises NonFiniteValues."""
        blocks = [
            self._matrix(flat, self.start + first_row + offset, dtype)
            for offset, flat in enumerate(w0)
        ]
        return _joined(blocks, w0.shape)

    def _matrix(self, flat: Tensor, member: int, dtype: torch.dtype) -> RoundedBlock:
        ours = [update for update in self.updates if update.member == member]
        if not ours:
            return RoundedBlock(flat.to(dtype), 0, 0, 0, 0)
        rows, columns = _matrix_shape(ours[0])
        terms = [_low_rank(update, 0, rows, self.device) for update in ours]
        summed = CertifiedSum(terms)
        matrix = flat.view(rows, columns)
        step = max(1, _BLOCK_ELEMENTS // max(1, columns))
        parts = [
            summed.add_to(matrix[row : row + step], row, dtype) for row in range(0, rows, step)
        ]
        return _joined(parts, (-1,))


def _matrix_shape(placed: PlacedUpdate) -> tuple[int, int]:
    outputs, inputs = placed.update.shape
    outputs = outputs if placed.places is None else len(placed.places)
    return (inputs, outputs) if placed.transposed else (outputs, inputs)


def _joined(parts: Sequence[RoundedBlock], shape: Sequence[int]) -> RoundedBlock:
    return RoundedBlock(
        torch.cat([part.values.reshape(-1) for part in parts]).reshape(shape),
        sum(part.changed for part in parts),
        sum(part.level2 for part in parts),
        sum(part.level3 for part in parts),
        sum(part.overflowed for part in parts),
    )


def _replaced(placed: PlacedUpdate, start: int) -> ReplacedRows:
    update = placed.update
    assert isinstance(update, Replacement | TokenRows)
    rows = update.indices if isinstance(update, TokenRows) else None
    return ReplacedRows(update.value, start, rows)


def _low_rank(placed: PlacedUpdate, start: int, stop: int, device: torch.device) -> LowRank:
    update = placed.update
    assert isinstance(update, LowRankUpdate)
    value = update.load()
    if placed.places is not None:
        places = torch.tensor(placed.places)
        covered = (places >= 0).to(value.b.dtype)
        value = LowRank(value.b[places.clamp(min=0)] * covered[:, None], value.a, value.scale)
    value = value.T if placed.transposed else value
    part = value.rows(start, stop)
    return LowRank(part.b.to(device), part.a.to(device), part.scale * placed.weight)


def _mixed(
    updates: Sequence[PlacedUpdate],
    base: LazyTensor,
    start: int,
    scaled: ScaledBy | None = None,
) -> CertifiedTerms | CertifiedDora:
    """Any kinds that can be summed, on the CPU. scaled: of a base in 8 bits."""
    doras = [_dora(placed) for placed in updates if isinstance(placed.update, DoraUpdate)]
    terms = [
        _in_place(_scaled(placed.update, placed.weight), placed)
        for placed in updates
        if not isinstance(placed.update, DoraUpdate)
    ]
    if not doras:
        return CertifiedTerms(terms, start)

    def read_rows(first: int, last: int) -> Tensor:
        rows = base.read_rows(first, last).reshape(last - first, -1)
        return unpacked(rows, scaled.rows, first, first)[0] if scaled else rows

    return CertifiedDora(doras, terms, read_rows, start)


def _scaled(update: Update, weight: float) -> Scaled:
    """The update with its scale times the weight, rounded once to a double."""
    if isinstance(update, LowRankUpdate):
        matrix = low_rank_matrix(update.load())
    elif isinstance(update, HadamardUpdate | KroneckerUpdate | DenseUpdate):
        matrix = update.load()
    else:
        raise UnsupportedInput(f"{update.describe()}: cannot be summed with other updates")
    return Scaled(matrix.matrix, matrix.factor * weight)


def _in_place(matrix: ExactMatrix, placed: PlacedUpdate) -> ExactMatrix:
    """In the stored tensor's orientation."""
    if placed.places is not None:
        matrix = Spread(matrix, torch.tensor(placed.places))
    return matrix.T if placed.transposed else matrix


def _dora(placed: PlacedUpdate) -> Dora:
    update = placed.update
    assert isinstance(update, DoraUpdate)
    magnitude, by_column = dora_lines(placed)
    return Dora(
        _in_place(low_rank_matrix(update.low_rank.load()), placed),
        magnitude,
        placed.weight,
        by_column=by_column,
    )


def dora_lines(placed: PlacedUpdate) -> tuple[Tensor, bool]:
    """A DoRA's magnitudes for each line of the stored tensor, float64, NaN for lines that it does
    not touch; and whether lines are columns."""
    update = placed.update
    assert isinstance(update, DoraUpdate)
    magnitude = checked(update.magnitude.read()).double().reshape(-1)
    if placed.places is not None:
        places = torch.tensor(placed.places)
        magnitude = torch.where(places >= 0, magnitude[places.clamp(min=0)], torch.nan)
    return magnitude, placed.transposed or update.low_rank.is_embedding
