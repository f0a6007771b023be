"""Which adapters' updates meet at which weight, and what must not meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratool.adapter import Adapter, DenseUpdate, LowRankUpdate, Replacement, TokenRows
from loratool.errors import DisagreementError, NothingMatches, ShapeMismatch
from loratool.ops.biases import check_biases
from loratool.ops.combine_weights import Source
from loratool.ops.low_rank_forms import refuse_others


def groups_of(
    sources: Sequence[Source], adapters: Sequence[Adapter]
) -> dict[str, tuple[LowRankUpdate | None, ...]]:
    """Weight → each adapter's update of it. A weight that an adapter lacks, it leaves unchanged.

    Raises UnsupportedInput for updates that are not low-rank, ShapeMismatch, NothingMatches.
    """
    for source, adapter in zip(sources, adapters, strict=True):
        refuse_others(source.label, adapter, (TokenRows, DenseUpdate))
    names = sorted({name for adapter in adapters for name in adapter.low_rank})
    if not names:
        raise NothingMatches("the adapters hold no low-rank update to combine")
    _refuse_other_names(sources, adapters)
    groups = {}
    for name in names:
        group = tuple(adapter.low_rank.get(name) for adapter in adapters)
        forms = [
            (source.label, update.shape, update.kernel, update.is_embedding)
            for source, update in zip(sources, group, strict=True)
            if update is not None
        ]
        if any(form[1:] != forms[0][1:] for form in forms):
            other = next(form for form in forms if form[1:] != forms[0][1:])
            raise ShapeMismatch(
                f"{name}: is {_form(*forms[0][1:])} in {forms[0][0]}, "
                f"{_form(*other[1:])} in {other[0]}",
                hint="the adapters belong to different models",
            )
        groups[name] = group
    return groups


def biases_of(
    sources: Sequence[Source],
    adapters: Sequence[Adapter],
    groups: Mapping[str, Sequence[LowRankUpdate | None]],
) -> dict[str, tuple[DenseUpdate | None, ...]]:
    """Bias → each adapter's difference of it.

    Raises DisagreementError where the module's weight is not combined, ShapeMismatch.
    """
    found: dict[str, list[DenseUpdate | None]] = {}
    for index, (source, adapter) in enumerate(zip(sources, adapters, strict=True)):
        own = {n: u for n, u in adapter.others.items() if isinstance(u, DenseUpdate)}
        check_biases(source.label, own, groups)
        for name, update in own.items():
            found.setdefault(name, [None] * len(adapters))[index] = update
    for name, updates in found.items():
        shapes = {update.shape for update in updates if update is not None}
        if len(shapes) > 1:
            raise ShapeMismatch(f"{name}: has {sorted(shapes)} in the adapters")
    return {name: tuple(updates) for name, updates in sorted(found.items())}


def _form(shape: tuple[int, int], kernel: tuple[int, ...], is_embedding: bool) -> str:
    what = "a convolution" if kernel else "an embedding" if is_embedding else "a matrix"
    return f"{what} {[shape[0], *kernel] if kernel else list(shape)}"


def _refuse_other_names(sources: Sequence[Source], adapters: Sequence[Adapter]) -> None:
    """Two adapters that share no name, though one's names end like the other's: two namings."""
    for i, one in enumerate(adapters):
        tails = {
            ".".join(name.split(".")[start:]): name
            for name in one.low_rank
            for start in range(1, name.count("."))
        }
        for j, two in enumerate(adapters):
            if i == j or set(one.low_rank) & set(two.low_rank):
                continue
            for name in two.low_rank:
                if name in tails:
                    raise DisagreementError(
                        f"{sources[i].label} and {sources[j].label} name one model differently",
                        details=[f"{tails[name]} in the first, {name} in the second"],
                        hint="save one of them again from the model class of the other",
                    )


def disjoint(
    whole: Mapping[str, Replacement], tokens: Mapping[str, TokenRows]
) -> dict[str, Replacement | TokenRows]:
    """All absolute values by parameter. Raises DisagreementError where both kinds meet."""
    for name in whole:
        if name in tokens:
            raise DisagreementError(
                f"{name}: one adapter stores it whole, another some of its rows",
                hint="use --saved drop, or --exclude",
            )
    return {**whole, **tokens}


def refuse_both(
    sources: Sequence[Source],
    groups: Mapping[str, Sequence[LowRankUpdate | DenseUpdate | None]],
    replaced: Mapping[str, Replacement | TokenRows],
) -> None:
    """Raises DisagreementError for a parameter that is updated and stored whole."""
    for name in replaced:
        if name in groups:
            who = [s.label for s, u in zip(sources, groups[name], strict=True) if u is not None]
            raise DisagreementError(
                f"{name}: {who[0]} updates it, another adapter stores it whole",
                hint="a change and absolute values do not add up; use --saved drop, or --exclude",
            )
