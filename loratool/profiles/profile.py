"""What a consumer accepts, and making an adapter acceptable to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loratool.adapter import Adapter, Replacement, TokenRows
from loratool.errors import Unplaced, UsageError
from loratool.profiles import llama_cpp, peft, sglang, vllm
from loratool.profiles.limits import Limits
from loratool.profiles.padding import padded


@dataclass(frozen=True)
class Profile:
    """A consumer by name, and its limits."""

    name: str
    limits: Limits


PROFILES = {
    name: Profile(name, module.LIMITS)
    for name, module in {
        "peft": peft,
        "vllm": vllm,
        "sglang": sglang,
        "llama.cpp": llama_cpp,
    }.items()
}


@dataclass(frozen=True)
class Fitted:
    """An adapter that the profile accepts, and what had to be done to it."""

    adapter: Adapter
    notes: tuple[str, ...]


def find_profile(name: str) -> Profile:
    """The profile of that name. Raises UsageError naming the choices."""
    if name not in PROFILES:
        raise UsageError(f"unknown profile {name!r}", hint=f"choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def fit(adapter: Adapter, profile: Profile, key: str) -> Fitted:
    """The adapter as ``profile`` takes it: its values are not changed, only their form.

    Ranks are made uniform by adding columns of zeros to B and Gaussian rows to A (not zeros, or
    the added rank could never be trained), drawn from ``key``. Raises Unplaced for what is in
    the way, naming it.
    """
    limits = profile.limits
    _refuse(profile, _kinds_in_the_way(adapter, limits) or _scales_in_the_way(adapter, limits))
    if not profile.limits.experts:
        adapter = replace(adapter, as_parameters=frozenset())
    if not profile.limits.one_rank or not adapter.low_rank:
        return Fitted(adapter, _without_target(adapter))
    ranks = sorted({update.rank for update in adapter.low_rank.values()})
    rank = allowed_rank(ranks[-1], profile)
    updates = dict(adapter.updates)
    alpha = next(iter(adapter.low_rank.values())).scale * rank
    for name, update in adapter.low_rank.items():
        fitted = padded(update, rank, f"{key}:{name}")
        updates[name] = replace(fitted, alpha=alpha, scale=alpha / rank)
    notes = [profile.limits.serve.format(rank=rank)] if profile.limits.serve else []
    if ranks != [rank]:
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        notes.append(f"ranks of {span} were padded to {rank} for {profile.name}")
    return Fitted(replace(adapter, updates=updates), tuple(notes))


def _without_target(adapter: Adapter) -> tuple[str, ...]:
    """PEFT loads trained tokens alone, if they are the same of every table, as a type of their own;
    values stored whole it loads only beside an update."""
    updates = list(adapter.updates.values())
    tokens = [update.indices for update in updates if isinstance(update, TokenRows)]
    if not updates or not all(isinstance(one, Replacement | TokenRows) for one in updates):
        return ()
    if len(tokens) == len(updates) and len(set(tokens)) == 1:
        return ()
    return (
        "no module is updated, only stored whole: PEFT loads no such adapter; loratool merge does",
    )


def check_kinds(adapter: Adapter, profile: Profile) -> None:
    """Raises Unplaced for updates that the profile takes in no form, naming them."""
    _refuse(profile, _kinds_in_the_way(adapter, profile.limits))


def _kinds_in_the_way(adapter: Adapter, limits: Limits) -> list[str]:
    in_the_way = []
    for name in adapter.replacements:
        if not (limits.biases if name.endswith(".bias") else limits.whole_modules):
            in_the_way.append(f"{name}: stored whole")
    for name, other in adapter.others.items():
        if not limits.other_kinds:
            in_the_way.append(f"{name}: {other.describe()}")
    for name, update in adapter.low_rank.items():
        last = name.split(".")[-2] if "." in name else name
        if update.is_embedding and not limits.embeddings:
            in_the_way.append(f"{name}: an update of an embedding")
        elif update.kernel and not limits.convolutions:
            in_the_way.append(f"{name}: an update of a convolution")
        elif not limits.experts and not name.endswith(".weight"):
            in_the_way.append(f"{name}: an update of an expert")
        elif last in limits.refused_modules:
            in_the_way.append(f"{name}: an update of {last}")
    return in_the_way


def _scales_in_the_way(adapter: Adapter, limits: Limits) -> list[str]:
    scale = next((update.scale for update in adapter.low_rank.values()), 1.0)
    return [
        f"{name}: scale {update.scale:g} where others have {scale:g}"
        for name, update in adapter.low_rank.items()
        if limits.one_rank and not math.isclose(update.scale, scale, rel_tol=1e-12)
    ]


def _refuse(profile: Profile, in_the_way: list[str]) -> None:
    if in_the_way:
        more = [f"… {len(in_the_way) - 12} more"] if len(in_the_way) > 12 else []
        raise Unplaced(
            f"{profile.name} does not take {len(in_the_way)} of the adapter's parameters",
            details=[*in_the_way[:12], *more],
            hint="leave them out with --exclude (what is stored whole also with --drop-rest), or "
            "use --profile peft",
        )


def allowed_rank(largest: int, profile: Profile) -> int:
    """The rank to which a consumer of one rank has all padded. Raises Unplaced above its ranks."""
    if profile.limits.ranks is None:
        return largest
    fitting = [rank for rank in profile.limits.ranks if rank >= largest]
    if not fitting:
        raise Unplaced(
            f"{profile.name} takes ranks up to {profile.limits.ranks[-1]}, this adapter has "
            f"{largest}",
            hint=f"--max-rank {profile.limits.ranks[-1]} bounds every rank but full",
        )
    return fitting[0]
