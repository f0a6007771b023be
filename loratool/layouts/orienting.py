"""How an update lies on its tensor: as it is, transposed, or on some of its rows."""

from __future__ import annotations

import math

from loratool.adapter import (
    DoraUpdate,
    HadamardUpdate,
    KasaUpdate,
    KroneckerUpdate,
    LowRankUpdate,
    ModuleKind,
    Replacement,
    TokenRows,
    Update,
)
from loratool.errors import ShapeMismatch, UnsupportedInput
from loratool.layouts.fusing import Piece
from loratool.layouts.placed import PlacedUpdate


def on_piece(
    source: str,
    target: str,
    update: Update,
    piece: Piece,
    stored: tuple[int, ...],
    kind: ModuleKind,
) -> PlacedUpdate:
    """The update on a part of a tensor, or a part of it on the tensor.

    target: the stored name of the piece's. Raises ShapeMismatch and UnsupportedInput.
    """
    if isinstance(update, Replacement | TokenRows):
        raise UnsupportedInput(
            f"{source}: is replaced, but the base stores it as a part of {target} or in parts",
            hint=f"leave it out with --exclude {source}",
        )
    if isinstance(update, KasaUpdate):
        raise UnsupportedInput(
            f"{source}: is a KaSA, but the base stores it as a part of {target} or in parts, whose "
            "singular values are others",
            hint="merge it into a base with the adapter's own names",
        )
    if piece.member is not None and not isinstance(update, LowRankUpdate):
        raise UnsupportedInput(
            f"{source}: {update.describe()}: only low-rank updates are merged into stacks of "
            "matrices",
            hint=f"leave it out with --exclude {source}",
        )
    matrix = stored if piece.member is None else stored[1:]
    transposed = piece.transposed or kind is ModuleKind.CONV1D
    inputs = matrix[: len(matrix) - 1] if transposed else matrix[1:]
    expected = (piece.rows, *inputs)
    if update.shape != expected:
        if piece.places is None and update.shape == expected[::-1]:
            transposed = not transposed  # PEFT 0.18 exchanged inputs and outputs of experts
        else:
            raise _wrong_shape(source, target, update.shape, expected, " there")
    return PlacedUpdate(
        source, target, update, transposed, places=piece.places, member=piece.member
    )


def oriented(
    source: str, target: str, update: Update, stored: tuple[int, ...], kind: ModuleKind
) -> PlacedUpdate:
    """The update on the whole of its tensor. Raises ShapeMismatch and UnsupportedInput."""
    if isinstance(update, TokenRows):
        return _rows_of_table(source, target, update, stored)
    core = update.low_rank if isinstance(update, DoraUpdate | KasaUpdate) else update
    if isinstance(update, KasaUpdate) and kind is not ModuleKind.LINEAR:
        raise UnsupportedInput(f"{target}: is a {kind}; KaSA is for linear layers")
    is_product = isinstance(core, LowRankUpdate | HadamardUpdate | KroneckerUpdate)
    of_table = isinstance(core, LowRankUpdate) and core.is_embedding
    shape: tuple[int, ...] = update.shape
    if is_product and kind is ModuleKind.CONV1D and not of_table:
        if shape == stored[::-1]:
            return PlacedUpdate(source, target, update, transposed=True)
        raise _wrong_shape(source, target, shape, stored, " as (in, out)")
    if isinstance(core, LowRankUpdate) and core.kernel:
        shape = (shape[0], *core.kernel)
        if shape != stored and (stored[:1], stored[2:]) == (shape[:1], shape[2:]):
            raise UnsupportedInput(
                f"{target}: is a grouped convolution {list(stored)}, the update is for {shape[1]} "
                "input channels, which cross its groups; PEFT does not merge it either",
                hint=f"leave it out with --exclude {source}",
            )
    elif isinstance(core, HadamardUpdate | KroneckerUpdate):  # of convolutions as well
        stored = (stored[0], math.prod(stored[1:])) if len(stored) > 2 else stored
    if shape != stored:
        raise _wrong_shape(source, target, shape, stored, "")
    return PlacedUpdate(source, target, update)


def _rows_of_table(
    source: str, target: str, update: TokenRows, stored: tuple[int, ...]
) -> PlacedUpdate:
    if len(stored) != 2 or update.shape[1:] != stored[1:]:
        raise _wrong_shape(source, target, update.shape, stored, "")
    if max(update.indices, default=0) >= stored[0]:
        raise ShapeMismatch(
            f"{target}: the adapter trained token {max(update.indices)}, the base has {stored[0]}",
            hint="add the tokens to the base first, as for the training",
        )
    return PlacedUpdate(source, target, update)


def _wrong_shape(
    source: str, target: str, shape: tuple[int, ...], stored: tuple[int, ...], how: str
) -> ShapeMismatch:
    return ShapeMismatch(
        f"{target}: the update has shape {list(shape)}, the base stores {list(stored)}{how}",
        details=[f"in the adapter: {source}"] if source != target else [],
        hint="another size of the same model, a resized vocabulary, or another number of labels",
    )
