"""Query, key and value where a model keeps them in one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratool.layouts.config import ModelConfig
from loratool.layouts.fusing import Offer, offered_names

PARTS = ("q", "k", "v")
_NAMES = {"q_proj": 0, "query": 0, "k_proj": 1, "key": 1, "v_proj": 2, "value": 2}


@dataclass(frozen=True)
class QkvPart:
    """One of q, k and v. whole: the stored weight it lies in. part: 0, 1 or 2.

    equal_thirds: whether it is the part-th third of the outputs of ``whole``, which is how the
    LoRA authors' MergedLinear divides a matrix.
    """

    whole: str
    part: int
    equal_thirds: bool


def qkv_parts(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, *, conv1d: bool
) -> dict[str, QkvPart]:
    """The names that q, k and v of fused weights have in other models → where they lie.

    conv1d: matrices are (in, out).
    """
    found = {}
    for stored, shape in shapes.items():
        if len(shape) != 2 or ".crossattention." in f".{stored}":  # holds k and v alone
            continue
        for name, offer in offered_names({stored: shape}, config, conv1d=conv1d).items():
            number = _NAMES.get(name.removesuffix(".weight").rpartition(".")[2])
            if number is not None:
                found[name] = QkvPart(stored, number, _is_third(offer, number))
    return found


def _is_third(offer: Offer, number: int) -> bool:
    (piece,) = offer.pieces
    if piece.places is None or 3 * piece.rows != len(piece.places):
        return False
    start = number * piece.rows
    return piece.places[start : start + piece.rows] == tuple(range(piece.rows))
