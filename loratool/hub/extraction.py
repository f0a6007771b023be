"""What an extraction report says, as Markdown. The report is a file: nothing in it is trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.hub.markdown import code, count, percent, small, table
from loratool.plural import counted

SCHEMA = "loratool/extract/1"
_LOW_RANK, _WHOLE, _UNCHANGED = "low-rank", "stored whole", "unchanged"
_NOT_MEASURED = "excluded and not measured"
_BESIDE = ("stored as a difference", "new rows stored")
_WORST = 5
_NAMED = 8


@dataclass(frozen=True)
class _Row:
    """One tensor of the report, of the right types and finite."""

    name: str
    kind: str
    status: str
    rank: int
    delta_norm: float
    relative_error: float | None
    tied: bool

    @property
    def energy(self) -> float:
        """Of a matrix with several names once."""
        return 0.0 if self.tied else self.delta_norm**2

    @property
    def missed(self) -> float:
        """Energy that the adapter does not give back."""
        return self.energy * (1.0 if self.relative_error is None else self.relative_error**2)


def report_ranks(report: Mapping[str, Any]) -> dict[str, int]:
    """Rank by tensor name, as the report states it; empty for reports of other kinds."""
    rows = _rows(report) if report.get("schema") == SCHEMA else ()
    return {row.name: row.rank for row in rows if row.status == _LOW_RANK}


def extraction_section(report: Mapping[str, Any]) -> Iterator[str]:
    """How the adapter was made and how close it comes. Nothing for reports of other kinds."""
    rows = list(_rows(report)) if report.get("schema") == SCHEMA else []
    if not rows:
        return
    yield "## How it was made"
    yield _origin(report)
    yield _closeness(rows)
    adapted = [row for row in rows if row.status == _LOW_RANK]
    if adapted:
        yield _by_kind(adapted, sum(row.energy for row in rows))
        yield "Where the low-rank form is furthest from the change itself:"
        yield _worst(adapted)
    yield from _whole([row for row in rows if row.status == _WHOLE])
    if beside := [row for row in rows if row.status in _BESIDE]:
        yield f"Stored as differences or new rows: {_names(beside)}."
    yield from _left_out(rows)


def _origin(report: Mapping[str, Any]) -> str:
    sides = [report.get(side) for side in ("base", "tuned")]
    names = [side.get("name") if isinstance(side, dict) else None for side in sides]
    tuned = f" {code(names[1])}" if isinstance(names[1], str) else ""
    facts = [
        f"{label} {code(str(report[key]))}"
        for label, key in (("rank rule", "rank"), ("factors stored as", "dtype"), ("seed", "seed"))
        if isinstance(report.get(key), str | int)
    ]
    return (
        f"Extracted from the difference between the tuned checkpoint{tuned} and the base: each "
        f"changed matrix was factorised on its own ({', '.join(facts)}). The complete account, "
        "tensor by tensor, is in `loratool_report.json`."
    )


def _closeness(rows: Sequence[_Row]) -> str:
    energy, missed = sum(row.energy for row in rows), sum(row.missed for row in rows)
    share = missed / energy if energy else 0.0
    return (
        "Base plus adapter misses the tuned weights by a relative error of "
        f"**{small(math.sqrt(share))}** of the whole change (Frobenius norm), measured on the "
        f"factors as stored; **{percent(1 - share)}** of the change's energy is kept."
    )


def _by_kind(rows: Sequence[_Row], energy: float) -> str:
    kinds: dict[str, list[_Row]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    lines = []
    for kind, members in sorted(kinds.items()):
        ranks = sorted(row.rank for row in members)
        part = sum(row.energy for row in members)
        lost = sum(row.missed for row in members) / part if part else 0.0
        span = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        lines.append(
            (
                code(kind),
                count(len(members)),
                span,
                percent(part / energy if energy else 0.0),
                percent(1 - lost),
                small(math.sqrt(lost)),
            )
        )
    head = ("Kind", "Tensors", "Rank", "Share of the change", "Energy kept", "Relative error")
    return table(head, lines, align="lrrrrr")


def _worst(rows: Sequence[_Row]) -> str:
    ordered = sorted(rows, key=lambda row: -(row.relative_error or 0.0))[:_WORST]
    lines = [
        (
            code(row.name),
            str(row.rank),
            percent(None if row.relative_error is None else 1 - row.relative_error**2),
            small(row.relative_error),
        )
        for row in ordered
    ]
    return table(("Tensor", "Rank", "Energy kept", "Relative error"), lines, align="lrrr")


def _whole(rows: Sequence[_Row]) -> Iterator[str]:
    if rows:
        yield f"Stored whole, not as factors: {_names(rows)}."


def _left_out(rows: Sequence[_Row]) -> Iterator[str]:
    left = [row for row in rows if row.status not in (_LOW_RANK, _WHOLE, _UNCHANGED, *_BESIDE)]
    energy = sum(row.energy for row in rows)
    if not left:
        yield "Nothing that changed was left out."
        return
    share = sum(row.energy for row in left) / energy if energy else 0.0
    reasons = ", ".join(code(status) for status in sorted({row.status for row in left}))
    said = f"**Left out** ({reasons}): {_names(left)}; {percent(share)} of the change's energy"
    unknown = [row for row in left if row.status == _NOT_MEASURED]
    yield said + (f", which counts nothing for {_names(unknown)}." if unknown else ".")


def _names(rows: Sequence[_Row]) -> str:
    named = ", ".join(code(row.name) for row in rows[:_NAMED])
    more = f" and {count(len(rows) - _NAMED)} more" if len(rows) > _NAMED else ""
    return f"{counted(len(rows), 'tensor')} ({named}{more})"


def _rows(report: Mapping[str, Any]) -> Iterable[_Row]:
    tensors = report.get("tensors")
    for entry in tensors if isinstance(tensors, list) else ():
        if isinstance(entry, dict) and all(
            isinstance(entry.get(key), str) for key in ("name", "kind", "status")
        ):
            rank = entry.get("rank")
            yield _Row(
                entry["name"],
                entry["kind"],
                entry["status"],
                rank if isinstance(rank, int) and not isinstance(rank, bool) else 0,
                _number(entry.get("delta_norm")) or 0.0,
                _number(entry.get("relative_error")),
                entry.get("tied_to") is not None,
            )


def _number(value: object) -> float | None:
    """A finite, sane number; JSON from elsewhere may hold 1e400 or 10**5000."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < 1e100 else None
