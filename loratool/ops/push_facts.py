"""An adapter's facts, as its model card states them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from loratool.adapter import Adapter, module_of
from loratool.hub.card import CardFacts
from loratool.provenance import loratool_version

_HEAD_WEIGHTS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def facts_of(
    adapter: Adapter,
    repo_id: str,
    base: str,
    licence: str | None,
    report: dict[str, Any] | None,
) -> CardFacts:
    """What a model card says about an adapter, counted from its headers."""
    low_rank = adapter.low_rank
    ranks = sorted(update.rank for update in low_rank.values())
    typical = Counter(ranks).most_common(1)
    tensors = list(adapter.tensors)
    return CardFacts(
        repo_id=repo_id,
        base_model=base,
        task_type=adapter.task_type if isinstance(adapter.task_type, str) else None,
        ranks=(ranks[0], typical[0][0], ranks[-1]) if ranks else None,
        alphas=tuple(sorted({update.alpha for update in low_rank.values()})),
        targets=tuple(sorted({module_of(name).rpartition(".")[2] for name in low_rank})),
        adapted=len(low_rank),
        replaced=len(adapter.replacements),
        others=len(adapter.others),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        size_bytes=sum(math.prod(tensor.shape) * tensor.dtype.bits // 8 for tensor in tensors),
        dtypes=tuple(sorted({tensor.dtype.name for tensor in tensors})),
        version=loratool_version(),
        licence=licence,
        num_labels=_num_labels(adapter),
        report=report,
    )


def _num_labels(adapter: Adapter) -> int | None:
    """Rows of a classification head that the adapter replaces: its base must be given as many."""
    if adapter.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = [adapter.replacements.get(name) for name in _HEAD_WEIGHTS]
    return next((head.shape[0] for head in heads if head is not None and head.shape), None)
