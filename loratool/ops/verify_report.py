"""What verify found: a verdict, what is behind it, and one row per tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.ops.verify_row import Cause, Status, VerifyRow
from loratool.plural import counted
from loratool.provenance import document

SCHEMA_VERSION = 1
EXACT, ROUNDED, DIFFERS = "equal", "within rounding", "differs"


@dataclass(frozen=True)
class VerifyReport:
    """verdict: ``equal`` (every value is the correctly rounded one), ``within rounding`` (the
    adapter is in, rounded otherwise) or ``differs``. diagnosis: sentences, the main one first."""

    verdict: str
    diagnosis: tuple[str, ...]
    rows: tuple[VerifyRow, ...]
    facts: Mapping[str, Any]

    @staticmethod
    def of(rows: Sequence[VerifyRow], facts: Mapping[str, Any]) -> VerifyReport:
        """Draw the conclusion."""
        found = {row.status for row in rows}
        verdict = DIFFERS
        if found <= {Status.EQUAL}:
            verdict = EXACT
        elif found <= {Status.EQUAL, Status.ROUNDING}:
            verdict = ROUNDED
        return VerifyReport(verdict, tuple(_diagnosis(rows, facts)), tuple(rows), facts)

    @property
    def differs(self) -> bool:
        """Whether the answer is no."""
        return self.verdict == DIFFERS

    @property
    def is_equal(self) -> bool:
        """Whether every value compared is the correctly rounded one."""
        return self.verdict == EXACT

    def count(self, *statuses: Status) -> int:
        """How many tensors ended so."""
        return sum(row.status in statuses for row in self.rows)

    @property
    def updated(self) -> list[VerifyRow]:
        """The tensors that the adapters change."""
        return [row for row in self.rows if row.update]

    @property
    def fit(self) -> float | None:
        """The factor of the adapters' update that fits best over all tensors; None if unknown."""
        return overall_fit(self.rows)

    @property
    def fits(self) -> dict[int, float]:
        """The same for each adapter, counted from 0, where it is known."""
        return adapter_fits(self.rows)

    def to_json(self) -> dict[str, Any]:
        return document(
            "verify",
            SCHEMA_VERSION,
            {
                **self.facts,
                "verdict": self.verdict,
                "diagnosis": list(self.diagnosis),
                "fit": self.fit,
                "fits": [
                    {"name": one["name"], "fit": self.fits.get(index)}
                    for index, one in enumerate(self.facts["adapters"])
                ],
                "totals": {
                    **{str(status): self.count(status) for status in Status},
                    "elements": sum(row.elements for row in self.rows),
                    "checked": sum(row.checked for row in self.rows),
                    "different": sum(row.different for row in self.rows),
                    "beyond": sum(row.beyond for row in self.rows),
                },
                "tensors": [row.to_json() for row in self.rows],
            },
        )


def overall_fit(rows: Sequence[VerifyRow]) -> float | None:
    """Σ fit·‖ΔW‖² / Σ ‖ΔW‖², over the tensors where it was looked for."""
    known = [row for row in rows if row.fit is not None and row.delta_energy]
    energy = sum(row.delta_energy for row in known)
    return sum((row.fit or 0.0) * row.delta_energy for row in known) / energy if energy else None


def adapter_fits(rows: Sequence[VerifyRow]) -> dict[int, float]:
    """As ``overall_fit``, for each adapter that tensors tell of."""
    total: dict[int, float] = {}
    energy: dict[int, float] = {}
    for fit in (fit for row in rows for fit in row.fits):
        total[fit.adapter] = total.get(fit.adapter, 0.0) + fit.fit * fit.energy
        energy[fit.adapter] = energy.get(fit.adapter, 0.0) + fit.energy
    return {one: total[one] / energy[one] for one in sorted(total) if energy[one]}


_SENTENCES = {
    Cause.NOT_APPLIED: "the update is not in",
    Cause.SUBTRACTED: "the update was subtracted",
    Cause.TWICE: "the update was applied twice",
    Cause.TRANSPOSED: "the update was added transposed",
    Cause.VALUES: "the update is in, but some values are off",
    Cause.OTHER: "something else than this update was added",
}


def _diagnosis(rows: Sequence[VerifyRow], facts: Mapping[str, Any]) -> list[str]:
    updated = [row for row in rows if row.update]
    lines = []
    causes = Counter(row.cause for row in updated if row.cause is not None)
    for cause, count in causes.most_common():
        those = [row for row in updated if row.cause is cause]
        where = f"{count} of {counted(len(updated), 'updated tensor')}"
        if count == len(updated):
            where = "all updated tensors"
        if cause in (Cause.SCALE, Cause.PART):
            names = [str(one["name"]) for one in facts["adapters"]]
            lines.append(_scale_line(those, where, names))
        else:
            lines.append(f"{where}: {_SENTENCES[cause]}")
    orders = Counter(row.order for row in updated if row.order is not None)
    for order, count in orders.most_common():
        lines.append(f"{counted(count, 'tensor')}: rounded as if {order}")
    unexplained = [row for row in updated if row.status is Status.ROUNDING and row.order is None]
    if unexplained:
        lines.append(f"{counted(len(unexplained), 'tensor')}: rounded in an order of their own")
    for status, what in (
        (Status.MISSING, "missing from the merged checkpoint"),
        (Status.EXTRA, "in the merged checkpoint but not in the base"),
        (Status.SHAPE, "of another shape or dtype than the base's"),
        (Status.CHANGED, "changed, though no update names them"),
    ):
        names = [row.name for row in rows if row.status is status]
        if names:
            more = f", … {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{counted(len(names), 'tensor')} {what}: {', '.join(names[:3])}{more}")
    others = [
        row for row in rows if not row.update and row.status in (Status.EQUAL, Status.CHANGED)
    ]
    if len([row for row in others if row.status is Status.CHANGED]) > max(1, len(others) / 2):
        lines.append("most tensors that no update names differ: was it merged into another base?")
    return lines


def _scale_line(rows: Sequence[VerifyRow], where: str, names: Sequence[str]) -> str:
    each = adapter_fits(rows)
    if len(names) > 1 and each:
        what = "wrong scales" if rows[0].cause is Cause.SCALE else "not all adapters are in"
        told = ", ".join(f"{fit:.4g} times {names[one]}" for one, fit in each.items())
        return f"{where}: {what}; what fits is {told}"
    fits = [row.fit for row in rows if row.fit is not None]
    fit = overall_fit(rows)
    assert fit is not None
    if max(fits) - min(fits) <= 0.02 * max(1.0, abs(fit)):
        return f"{where}: wrong scale; {fit:.4g} times the update fits"
    return (
        f"{where}: wrong scales; between {min(fits):.4g} and {max(fits):.4g} times the update fit"
    )


def excluded_share(rows: int, confidence: float = 0.99) -> float:
    """With ``rows`` rows sampled and right: a larger share of wrong rows than this would have been
    seen with that confidence."""
    return float(1 - (1 - confidence) ** (1 / max(1, rows)))
