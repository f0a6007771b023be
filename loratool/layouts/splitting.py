"""A pair of checkpoints with fused projections, described as if they were stored apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from loratool.errors import NothingMatches, Unplaced
from loratool.layouts.config import ModelConfig
from loratool.layouts.fused import split_fused
from loratool.layouts.fusing import Undecided
from loratool.layouts.pairs import Alignment, Pair


def split_pairs(alignment: Alignment, config: ModelConfig) -> Alignment:
    """The alignment with q_proj, k_proj, v_proj and gate_proj, up_proj in place of fused layers.

    Raises Unplaced for a fused layer whose arrangement is not known, NothingMatches where none is
    fused.
    """
    pairs = [part for pair in alignment.pairs for part in _parts(pair, config)]
    if len(pairs) == len(alignment.pairs):
        raise NothingMatches(
            "--split-fused: the base has no fused q|k|v or gate|up layer",
            hint="its projections are apart already",
        )
    note = "fused projections are split into q_proj, k_proj, v_proj and gate_proj, up_proj"
    return replace(alignment, pairs=tuple(pairs), notes=(*alignment.notes, note))


def _parts(pair: Pair, config: ModelConfig) -> Iterator[Pair]:
    base = split_fused(pair.name, pair.base, config)
    tuned = split_fused(pair.name, pair.tuned, config)
    for found in (base, tuned):
        if isinstance(found, Undecided):
            raise Unplaced(
                f"{pair.name}: is fused, and which of its outputs are whose is not known: "
                f"{found.reason}",
                hint="extract without --split-fused, or correct config.json",
            )
    assert not isinstance(base, Undecided)
    assert not isinstance(tuned, Undecided)
    if not base:
        yield pair
    for name, part in base.items():
        yield replace(pair, name=name, base=part, tuned=tuned[name])
