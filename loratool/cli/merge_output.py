"""What merge says: its plan and its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.cli.output import Output
from loratool.layouts.families import by_name, natural
from loratool.plural import counted
from loratool.provenance import document
from loratool.report.text import percent, size_text

if TYPE_CHECKING:
    from loratool.ops.merge_inputs import Merging
    from loratool.ops.merge_report import MergeReport


def shown_as_json(out: Output, body: dict[str, Any]) -> bool:
    """Print the plan as JSON if that was asked for."""
    if out.as_json:
        out.document(document("merge-plan", 1, body))
    return out.as_json


def show_changes(out: Output, merging: Merging, body: dict[str, Any], total_bytes: int) -> None:
    """Which tensors a plan would change."""
    out.line(
        f"would change {len(merging.updates)} of {counted(len(merging.base.checkpoint), 'tensor')} "
        f"({size_text(merging.changed_bytes)} of {size_text(total_bytes)}) on {merging.device}"
    )
    if out.verbose:
        out.table(
            "updates",
            ["tensor", "update"],
            sorted(
                ([row["name"], row["update"]] for row in body["tensors"]),
                key=lambda line: natural(line[0]),
            ),
            text=2,
        )


def show_rest(
    out: Output,
    merging: Merging,
    body: dict[str, Any],
    skipped: tuple[str, ...],
    notes: tuple[str, ...],
) -> None:
    """Memory, what is left out, notes."""
    out.line(f"working memory: about {size_text(body['peak_bytes'])}")
    _show_left_out(out, merging.left_out, skipped)
    out.notes([*merging.notes, *notes])


def receipt_size(weights: int, tensors: int) -> str:
    """About how large a receipt would be."""
    from loratool.ops.merge_receipt import likely_bytes

    low, high = (size_text(nbytes) for nbytes in likely_bytes(weights, tensors))
    return f"about {low} to {high}, by how much changes"


def show_receipt(out: Output, report: MergeReport) -> None:
    """The receipt that was left, or how large one would be."""
    left = report.facts["receipt"]
    if left is None:
        size = receipt_size(report.total("elements"), report.facts["tensors_total"])
        out.line(f"to undo it bit for bit, merge with --receipt ({size})")
        return
    out.line(
        f"receipt: {left['name']}, {size_text(left['bytes'])}, "
        f"{left['bits_per_weight']:.2f} bit per changed weight"
    )


def _show_left_out(
    out: Output, updates: tuple[str, ...] | list[str], files: tuple[str, ...] | list[str]
) -> None:
    if updates:
        out.line(f"left out of the adapter as asked: {counted(len(updates), 'update')}")
    if files:
        out.complain(f"note: other weight files were not carried along: {', '.join(files)}")


def show(out: Output, report: MergeReport, output: Path) -> None:
    """The result."""
    if out.verbose:
        out.table(
            "changed tensors",
            ["tensor", "update", "elements", "changed", "by float64", "by exact sum", "lost"],
            [
                [
                    row.name,
                    row.update,
                    f"{row.elements:,}",
                    percent(row.changed / max(row.elements, 1)),
                    f"{row.recomputed:,}",
                    f"{row.exact:,}",
                    percent(row.lost_share),
                ]
                for row in by_name(report.rows)
            ],
            text=2,
        )
    elements, changed = report.total("elements"), report.total("changed")
    total = counted(report.facts["tensors_total"], "tensor")
    out.line(
        f"merged into {output}: {len(report.rows)} of {total}, scale {report.facts['scale']:g}, on "
        f"{report.facts['device']}"
    )
    out.line(
        f"{changed:,} of {elements:,} weights in them changed "
        f"({percent(changed / max(elements, 1))}); all correctly rounded"
    )
    if report.lost_share is not None:
        out.line(f"rounding swallowed {percent(report.lost_share)} of the update's energy")
    if overflowed := report.total("overflowed"):
        values = counted(overflowed, "value")
        out.complain(f"note: infinite, since beyond the dtype's range: {values}")
    _show_left_out(out, report.facts["left_out"], report.facts["skipped_files"])
    out.notes(report.facts["notes"])
