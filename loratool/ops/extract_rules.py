"""Which rank rule each tensor of an extraction follows, from what the user asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loratool.adapter import ModuleKind
from loratool.algebra.ranks import RankLimits, RankRule, parse_rank_rule
from loratool.errors import NothingMatches, UsageError
from loratool.layouts.pairs import Pair
from loratool.layouts.patterns import matches
from loratool.ops.extract_jobs import ExtractJob, Treatment

BUDGET = "budget:"
BUDGET_RANK = 256
"""Components per matrix that a budget chooses among, unless --max-rank says otherwise."""

_WHOLE = "whole"
_SAME = "same"


@dataclass(frozen=True)
class Rules:
    """general: for every matrix. convolutions: for theirs, None where they are stored whole.
    special: by pattern, None where what it matches is stored whole; the last match wins."""

    general: RankRule
    convolutions: RankRule | None
    special: dict[str, RankRule | None]

    def of(self, pair: Pair) -> RankRule | None:
        """The rule of one tensor; None to store it whole."""
        is_conv = pair.kind is ModuleKind.CONV
        if is_conv and self.convolutions is None:
            return None
        for pattern, rule in reversed(self.special.items()):
            if matches(pattern, pair.name):
                return rule
        return self.convolutions if is_conv else self.general

    def check_used(self, jobs: Iterable[ExtractJob]) -> None:
        """Raises NothingMatches where there is nothing to factorise, at all or for an option."""
        factorised = [job for job in jobs if job.treatment is Treatment.LOW_RANK]
        if not factorised and self.convolutions is None:
            raise NothingMatches(
                "no matrix is left to factorise",
                hint="loosen --include, --exclude and --targets; convolutions need --conv-rank",
            )
        if self.convolutions and not any(job.pair.kind is ModuleKind.CONV for job in factorised):
            raise NothingMatches(
                "--conv-rank: there is no convolution to factorise",
                hint="grouped ones, and those beside a bare parameter (a class token) unless "
                "--exclude names that, are stored whole; --targets may have left all out (try "
                "all-linear,all-conv)",
            )
        for pattern, rule in self.special.items():
            if rule and not any(matches(pattern, job.pair.name) for job in factorised):
                raise NothingMatches(
                    f"--rank-for: nothing that {pattern!r} matches is factorised",
                    hint="convolutions need --conv-rank; norms, biases and tied tables have no "
                    "rank",
                )


def read_rules(
    rank: str, rank_for: Mapping[str, str | int], conv_rank: str | int | None, limits: RankLimits
) -> Rules:
    """Parse the rank options. Raises UsageError."""
    is_budget = rank.startswith(BUDGET)
    if is_budget and (limits.least > 1 or limits.multiple > 1):
        raise UsageError("a budget goes with --max-rank, not with --min-rank or --multiple-of")
    general = parse_rank_rule(str(limits.most or BUDGET_RANK) if is_budget else rank, limits)
    special = {
        pattern: None if rule == _WHOLE else parse_rank_rule(str(rule), limits)
        for pattern, rule in rank_for.items()
    }
    for pattern, rule in special.items():
        if is_budget and rule and rule.kind.name != "fixed":
            raise UsageError(
                f"--rank-for {pattern}={rule}: with a budget it is whole, or a number that these "
                "may have at most"
            )
    _check_full({"--rank": general}, limits)
    _check_full({f"--rank-for {pattern}": rule for pattern, rule in special.items()}, limits)
    if conv_rank is None:
        return Rules(general, None, special)
    if conv_rank == _SAME:
        return Rules(general, general, special)
    if str(conv_rank).startswith(BUDGET):
        raise UsageError(
            "convolutions have no budget of their own", hint="--rank budget:SIZE --conv-rank same"
        )
    convolutions = parse_rank_rule(str(conv_rank), limits)
    if is_budget and convolutions.kind.name != "fixed":
        raise UsageError(
            f"--conv-rank {conv_rank}: with a budget it is same, or a number that convolutions may "
            "have at most"
        )
    _check_full({"--conv-rank": convolutions}, limits)
    return Rules(general, convolutions, special)


def _check_full(rules: Mapping[str, RankRule | None], limits: RankLimits) -> None:
    """Raises UsageError where a rank is both full and limited."""
    for option, rule in rules.items():
        if rule and rule.kind.name == "full" and limits != RankLimits():
            raise UsageError(
                f"{option}{'=' if '-for ' in option else ' '}full stores the whole change; "
                "--min-rank, --max-rank and --multiple-of do not go with it"
            )
