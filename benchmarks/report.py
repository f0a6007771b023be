"""The measured results as Markdown. No number in it is written by hand except the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = Sequence[str]

MERGE_OVER_CP, PEFT_OVER_MERGE, PEAK_SHARE = 4.0, 4.0, 1 / 3
LARGE_OVER_CP, PEFT_OVER_LARGE, LARGE_SHARE = 2.5, 8.0, 1 / 4
RECEIPTS = (
    "What `merge --receipt` keeps so that `unmerge` is exact (`benchmarks/receipt_cost.py`): a "
    "Gaussian 2048×2048 matrix, a rank-16 update; weights that do not follow from the merged ones, "
    "bits kept per weight and per such weight, processor time to encode and decode, per weight."
)
SVD_OVER_EXTRACT, EXCESS = 20.0, 1e-3


def markdown(results: dict[str, Any]) -> str:
    """The whole page."""
    machine = results["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    load = ", ".join(f"{stage} {value:.1f}" for stage, value in results["load"].items())
    parts = [
        "# Benchmarks",
        "Made by `python benchmarks/run_all.py --write`; nothing here is typed by hand. "
        "Medians; ratios are taken between runs next to each other, then their median.",
        f"Machine: {machine['cores']} cores ({machine['processor']}), "
        f"{_size(machine['memory_bytes'])} of memory, {machine['system']}, "
        f"Python {machine['python']}, {packages}. No GPU; files in the page cache. Load average "
        f"(the commands themselves count): {load}.",
        *(["**A quick run: sizes and rounds too small to conclude from.**"] * results["quick"]),
        "## Against the targets",
        _table(["what", "measured", "target", ""], _targets(results)),
        "## Merge",
        "Every command starts a process and ends with its output on the disk. PEFT: "
        "`from_pretrained`, `merge_and_unload`, `save_pretrained`.",
        *(
            part
            for stage in ("merge", "merge_large")
            for part in (
                _merge_text(results[stage]),
                _table(
                    ["command", "wall", "processor", "peak memory", "of it anonymous"],
                    _merge(results[stage]),
                ),
            )
        ),
        "## Extract, one matrix",
        "What extract computes per matrix (factors, the bound on their excess, their bf16 form "
        "and its error) against `torch.linalg.svd(full_matrices=False)` in float32 of the same "
        "delta, both on the same number of threads.",
        _table(
            [
                "shape",
                "threads",
                "rounds",
                "full SVD",
                "rank",
                "loratool",
                "faster",
                "by processor time",
            ],
            _times(results["extract_times"]),
        ),
        "Error beyond the best approximation of the same rank, before the factors are stored: "
        "(err − opt)/opt, or (err − opt)/‖D‖ where opt is below 1 % of ‖D‖ (marked ‖D‖). "
        "Storing the factors in bf16 moves the product by the last column's share of ‖D‖.",
        _table(
            ["singular values", "rank", "opt/‖D‖", "excess", "excess, stored", "bf16 factors"],
            _errors(results["extract_errors"]),
        ),
        "## Extract, whole command",
        _whole_text(results["extract_whole"]),
        "## Memory and depth",
        "Peak resident memory of the commands, start-up included.",
        _table(["layers", "checkpoint", "merge", "extract"], _memory(results["memory"])),
        "## Receipts",
        RECEIPTS,
        receipt_table(results["receipt"]),
    ]
    return "\n\n".join(parts) + "\n"


def _targets(results: dict[str, Any]) -> list[Row]:
    ratios: dict[str, list[float]] = {}
    for row in results["extract_times"]:
        for rank, result in row["ranks"].items():
            ratios.setdefault(rank, []).append(result["ratio"])
    decaying = [row for row in results["extract_errors"] if not row["decay"].startswith("no")]
    excess = max(rank["excess"] for row in decaying for rank in row["ranks"].values())
    first, last = results["memory"][0], results["memory"][-1]
    growth = max(last[key] / first[key] - 1 for key in ("merge_peak_bytes", "extract_peak_bytes"))
    layers = f"{first['layers']} to {last['layers']} layers"
    return [
        *_merge_targets(results["merge"], MERGE_OVER_CP, PEFT_OVER_MERGE, PEAK_SHARE),
        *_merge_targets(results["merge_large"], LARGE_OVER_CP, PEFT_OVER_LARGE, LARGE_SHARE),
        *(
            _target(
                f"full SVD ÷ extract, rank {rank}, slowest case",
                min(ratios[rank]),
                SVD_OVER_EXTRACT,
                "×",
                least=True,
            )
            for rank in sorted(ratios, key=int)
        ),
        _target("excess error, decaying spectra", 100 * excess, 100 * EXCESS, " %"),
        _target(f"peak memory, growth from {layers}", 100 * growth, 5.0, " %"),
    ]


def _merge_targets(
    merge: dict[str, Any], over_cp: float, peft_over: float, share: float
) -> list[Row]:
    size = _size(merge["bytes"])
    bare = "without start-up"
    return [
        _target(f"merge ÷ (cp + sync), {size}", merge["over_cp"], over_cp, "×"),
        _target(f"the same, {bare}", merge["in_process_over_cp"], over_cp, "×"),
        _target(f"PEFT ÷ merge, {size}", merge["peft_over_ours"], peft_over, "×", least=True),
        _target(
            f"the same, {bare}", merge["in_process_peft_over_ours"], peft_over, "×", least=True
        ),
        _target(f"merge's peak ÷ PEFT's, {size}", merge["peak_share"], share, "×"),
    ]


def _target(what: str, measured: float, limit: float, unit: str, *, least: bool = False) -> Row:
    met = measured >= limit if least else measured <= limit
    sign = "≥" if least else "≤"
    return (
        what,
        f"{measured:.2g}{unit}" if measured < 1 else f"{measured:.1f}{unit}",
        (f"{sign} {limit:.2g}{unit}"),
        "met" if met else "**not met**",
    )


def _merge_text(merge: dict[str, Any]) -> str:
    return (
        f"{_size(merge['bytes'])} of bf16 in two shards, rank 16 on every linear layer, "
        f"{merge['rounds']} rounds in turns. Without start-up and imports, "
        f"`loratool merge` takes {merge['in_process_seconds']:.1f} s, "
        f"{merge['in_process_over_cp']:.1f} × the copy, and PEFT "
        f"{merge['peft_in_process_seconds']:.1f} s."
    )


def _merge(merge: dict[str, Any]) -> list[Row]:
    names = {"cp": "`cp -r`, sync", "loratool": "`loratool merge`", "peft": "PEFT"}
    return [
        (
            title,
            f"{row['seconds']:.1f} s",
            f"{row['cpu_seconds']:.1f} s",
            *(
                ("", "")
                if name == "cp"
                else (_size(row["peak_bytes"]), _size(row["anonymous_bytes"]))
            ),
        )
        for name, title in names.items()
        for row in [merge[name]]
    ]


def _times(rows: Sequence[dict[str, Any]]) -> list[Row]:
    return [
        (
            "×".join(map(str, row["shape"])),
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


def _whole_text(whole: dict[str, Any]) -> str:
    return (
        f"`loratool extract base tuned --rank 16` of {_size(whole['bytes'])} (two checkpoints in "
        f"which every tensor changed): {whole['seconds']:.1f} s, {whole['cpu_seconds']:.1f} s of "
        f"processor time, peak memory {_size(whole['peak_bytes'])}; {whole['rounds']} rounds."
    )


def _memory(rows: Sequence[dict[str, Any]]) -> list[Row]:
    sizes = ("bytes", "merge_peak_bytes", "extract_peak_bytes")
    return [(str(row["layers"]), *(_size(row[key]) for key in sizes)) for row in rows]


def receipt_table(rows: Sequence[dict[str, Any]]) -> str:
    """What receipts cost, as receipt_cost.py measures it."""
    columns = ("dtype", "‖ΔW‖/‖W0‖", "not guessed", "bit per weight", "bit per miss", "coding")
    cells = [
        (
            row["dtype"],
            f"{100 * row['ratio']:g} %",
            f"{100 * row['missed']:.2f} %",
            f"{row['bits_per_weight']:.3f}",
            f"{row['bits_per_miss']:.1f}",
            f"{row['coding_ns']:.1f} ns",
        )
        for row in rows
    ]
    return _table(columns, cells)


def _table(columns: Row, rows: Sequence[Row]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
