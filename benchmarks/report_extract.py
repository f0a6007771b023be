"""What bench_extract.py and bound_looseness.py measured, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report_parts import Row, percent, shape_of, size, table, target

SVD_OVER_EXTRACT, EXCESS = 20.0, 1e-3
LARGEST, LARGEST_OVER_EXTRACT = [4096, 11008], 40.0


def times_section(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Single matrices against full SVDs: how long."""
    columns = [
        "shape",
        "threads",
        "rounds",
        "full SVD",
        "rank",
        "loratool",
        "faster",
        "by processor time",
    ]
    return [
        "What extract computes per matrix (factors, the bound on their excess, their bf16 form "
        "and its error) against `torch.linalg.svd(full_matrices=False)` in float32 of the same "
        "delta, both on the same number of threads.",
        table(columns, _times(rows)),
    ]


def times_targets(times: Sequence[dict[str, Any]]) -> list[Row]:
    """How many times faster than full SVDs."""
    ratios: dict[str, list[float]] = {}
    for row in times:
        for rank, result in row["ranks"].items():
            ratios.setdefault(rank, []).append(result["ratio"])
    return [
        *(
            target(
                f"full SVD ÷ extract, rank {rank}, slowest case",
                min(ratios[rank]),
                SVD_OVER_EXTRACT,
                "×",
                least=True,
            )
            for rank in sorted(ratios, key=int)
        ),
        *_largest_targets(times),
    ]


def _largest_targets(rows: Sequence[dict[str, Any]]) -> list[Row]:
    return [
        target(
            f"full SVD ÷ extract, {shape_of(row)}, rank 64, {row['threads']} threads",
            row["ranks"]["64"]["ratio"],
            LARGEST_OVER_EXTRACT,
            "×",
            least=True,
        )
        for row in rows
        if list(row["shape"]) == LARGEST
    ]


def _times(rows: Sequence[dict[str, Any]]) -> list[Row]:
    return [
        (
            shape_of(row),
            str(row["threads"]),
            str(row["rounds"]),
            f"{row['svd_seconds']:.2f} s",
            rank,
            f"{ours['seconds']:.3f} s",
            f"{ours['ratio']:.0f} ×",
            f"{ours['cpu_ratio']:.0f} ×",
        )
        for row in rows
        for rank, ours in row["ranks"].items()
    ]


def errors_section(rows: Sequence[dict[str, Any]]) -> list[str]:
    """And how near the optimum."""
    columns = ["singular values", "rank", "opt/‖D‖", "excess", "excess, stored", "bf16 factors"]
    return [
        "Error beyond the best approximation of the same rank, before the factors are stored: "
        "(err − opt)/opt, or (err − opt)/‖D‖ where opt is below 1 % of ‖D‖ (marked ‖D‖). "
        "Storing the factors in bf16 moves the product by the last column's share of ‖D‖.",
        table(columns, _errors(rows)),
    ]


def errors_targets(errors: Sequence[dict[str, Any]]) -> list[Row]:
    """Of the errors beyond the optimum."""
    decaying = [row for row in errors if not row["decay"].startswith("no")]
    excess = max(rank["excess"] for row in decaying for rank in row["ranks"].values())
    return [target("excess error, decaying spectra", 100 * excess, 100 * EXCESS, " %")]


def _errors(rows: Sequence[dict[str, Any]]) -> list[Row]:
    return [
        (
            row["decay"],
            rank,
            f"{one['optimum']:.4f}",
            *(
                f"{100 * one[key]:.2g} %" + (" of ‖D‖" if one["excess_is_of_norm"] else "")
                for key in ("excess", "stored_excess")
            ),
            f"{100 * one['storage_rounding']:.2g} %",
        )
        for row in rows
        for rank, one in row["ranks"].items()
    ]


def bounds_section(bounds: dict[str, Any]) -> list[str]:
    """How loose the bound on the excess is."""
    return [_bounds_text(bounds)]


def bounds_targets(bounds: dict[str, Any]) -> list[Row]:
    """None may be violated."""
    return [target("violated bounds on the excess", bounds["violations"], 0, "")]


def _bounds_text(bounds: dict[str, Any]) -> str:
    bound, ratio = bounds["bounds"], bounds["ratios"]
    return (
        f"The bound on that excess, over {bounds['claims']} truncations of matrices of many "
        f"decays, shapes and scales, against float64 SVDs: {bounds['violations']} violations. The "
        f"bound is {percent(bound['median'])} in the median, {percent(bound['nine_in_ten'])} or "
        f"less for nine in ten, {percent(bound['largest'])} at most. Where the excess is large "
        f"enough to divide by (above 0.001 %: {bounds['measurable']} of them) the bound is "
        f"{ratio['median']:.1f} × the truth in the median, {ratio['nine_in_ten']:.0f} × or less "
        f"for nine in ten, {ratio['largest']:.0f} × at most."
    )


def whole_section(whole: dict[str, Any]) -> list[str]:
    """The command on a pair of checkpoints."""
    return [_whole_text(whole)]


def _whole_text(whole: dict[str, Any]) -> str:
    return (
        f"`loratool extract base tuned --rank 16` of {size(whole['bytes'])} (two checkpoints in "
        f"which every tensor changed): {whole['seconds']:.1f} s, {whole['cpu_seconds']:.1f} s of "
        f"processor time, peak memory {size(whole['peak_bytes'])}; {whole['rounds']} rounds."
    )
