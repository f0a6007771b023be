"""The measured results as Markdown. No number in it is written by hand except the targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import report_combine
import report_pissa
import report_spectra

Row = Sequence[str]

MERGE_OVER_CP, PEFT_OVER_MERGE, PEAK_SHARE = 4.0, 4.0, 1 / 3
LARGE_OVER_CP, PEFT_OVER_LARGE, LARGE_SHARE = 2.5, 8.0, 1 / 4
RECEIPTS = (
    "What `merge --receipt` keeps so that `unmerge` is exact (`benchmarks/receipt_cost.py`): a "
    "Gaussian 2048×2048 matrix, a rank-16 update; weights that do not follow from the merged ones, "
    "bits kept per weight and per such weight, processor time to encode and decode, per weight."
)
SVD_OVER_EXTRACT, EXCESS = 20.0, 1e-3
LARGEST, LARGEST_OVER_EXTRACT = [4096, 11008], 40.0
MERGEKIT_OVER_EXTRACT, MERGEKIT_SHARE = {2048: 20.0, 4096: 30.0}, 1 / 2


def markdown(results: dict[str, Any]) -> str:
    """The whole page."""
    machine = results["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    load = ", ".join(f"{stage} {value:.1f}" for stage, value in results["load"].items())
    parts: list[str] = [
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
    ]
    missing = []
    for title, stage, section in SECTIONS:
        if stage in results:
            parts += [*([f"## {title}"] if title else []), *section(results[stage])]
        else:
            missing.append(stage)
    if missing:
        parts.append(f"Not measured for this page: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _merge_section(merge: dict[str, Any]) -> list[str]:
    columns = ["command", "wall", "processor", "peak memory", "of it anonymous"]
    return [_merge_text(merge), _table(columns, _merge(merge))]


def _merge_intro(merge: dict[str, Any]) -> list[str]:
    return [
        "Every command starts a process and ends with its output on the disk. PEFT: "
        "`from_pretrained`, `merge_and_unload`, `save_pretrained`.",
        *_merge_section(merge),
    ]


def _times_section(rows: Sequence[dict[str, Any]]) -> list[str]:
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
        _table(columns, _times(rows)),
    ]


def _errors_section(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = ["singular values", "rank", "opt/‖D‖", "excess", "excess, stored", "bf16 factors"]
    return [
        "Error beyond the best approximation of the same rank, before the factors are stored: "
        "(err − opt)/opt, or (err − opt)/‖D‖ where opt is below 1 % of ‖D‖ (marked ‖D‖). "
        "Storing the factors in bf16 moves the product by the last column's share of ‖D‖.",
        _table(columns, _errors(rows)),
    ]


def _rival_section(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = ["checkpoints", "command", "wall", "processor", "peak memory", "relative error"]
    return [_rival_intro(rows), _table(columns, _rivals(rows)), *map(_stages_text, rows)]


def _combine_section(measured: dict[str, Any]) -> list[str]:
    return [
        report_combine.INTRO,
        _table(report_combine.COLUMNS, report_combine.rows(measured)),
    ]


def _pissa_section(measured: dict[str, Any]) -> list[str]:
    return [
        report_pissa.text(measured),
        _table(report_pissa.COLUMNS, report_pissa.rows(measured)),
    ]


def _spectra_section(measured: dict[str, Any]) -> list[str]:
    return [
        report_spectra.text(measured),
        _table(report_spectra.COLUMNS, report_spectra.rows(measured)),
    ]


def _memory_section(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        "Peak resident memory of the commands, start-up included.",
        _table(["layers", "checkpoint", "merge", "extract"], _memory(rows)),
    ]


def _receipt_section(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [RECEIPTS, receipt_table(rows)]


SECTIONS: tuple[tuple[str, str, Callable[[Any], list[str]]], ...] = (
    ("Merge", "merge", _merge_intro),
    ("", "merge_large", _merge_section),
    ("Extract, one matrix", "extract_times", _times_section),
    ("", "extract_errors", _errors_section),
    ("", "extract_bounds", lambda bounds: [_bounds_text(bounds)]),
    ("Extract, whole command", "extract_whole", lambda whole: [_whole_text(whole)]),
    ("Extract against mergekit-extract-lora", "extract_mergekit", _rival_section),
    ("Combine and resize", "combine", _combine_section),
    ("PiSSA against PEFT", "pissa", _pissa_section),
    ("Inspect, spectra of a pair", "spectra", _spectra_section),
    ("Memory and depth", "memory", _memory_section),
    ("Receipts", "receipt", _receipt_section),
)
"""Titles ('' goes on under the one before), the stage that is shown, and how."""


def _targets(results: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for stage, targets in TARGETS:
        if stage in results:
            rows += targets(results[stage])
    return rows


def _svd_targets(times: Sequence[dict[str, Any]]) -> list[Row]:
    ratios: dict[str, list[float]] = {}
    for row in times:
        for rank, result in row["ranks"].items():
            ratios.setdefault(rank, []).append(result["ratio"])
    return [
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
        *_largest_targets(times),
    ]


def _excess_targets(errors: Sequence[dict[str, Any]]) -> list[Row]:
    decaying = [row for row in errors if not row["decay"].startswith("no")]
    excess = max(rank["excess"] for row in decaying for rank in row["ranks"].values())
    return [_target("excess error, decaying spectra", 100 * excess, 100 * EXCESS, " %")]


def _combine_targets(measured: dict[str, Any]) -> list[Row]:
    return [
        _target(
            f"{rival} ÷ {what}, slowest layer",
            report_combine.slowest(measured, what),
            report_combine.OVER_RIVAL,
            "×",
            least=True,
        )
        for what, rival in (("combine", "PEFT"), ("resize", "kohya"))
    ]


def _pissa_targets(measured: dict[str, Any]) -> list[Row]:
    return [
        _target(
            "PEFT's PiSSA alone ÷ init --method pissa, whole command",
            measured["ratio"],
            report_pissa.PEFT_OVER_INIT,
            "×",
            least=True,
        ),
        _target(
            "PiSSA: energy short of the optimum",
            100 * report_pissa.missed(measured),
            100 * report_pissa.MISSED,
            " %",
        ),
    ]


def _spectra_targets(measured: dict[str, Any]) -> list[Row]:
    return [
        _target(
            "full SVDs of a pair's changes, as weightwatcher's ÷ inspect",
            measured["ratio"],
            report_spectra.SVD_OVER_INSPECT,
            "×",
            least=True,
        ),
        _target(
            "the same in float32 ÷ inspect",
            measured["ratio_float32"],
            report_spectra.SVD_OVER_INSPECT,
            "×",
            least=True,
        ),
        _target(
            "inspect: worst error of a printed singular value",
            100 * measured["worst_error"],
            100 * report_spectra.LARGEST_ERROR,
            " %",
        ),
    ]


def _memory_targets(rows: Sequence[dict[str, Any]]) -> list[Row]:
    first, last = rows[0], rows[-1]
    growth = max(last[key] / first[key] - 1 for key in ("merge_peak_bytes", "extract_peak_bytes"))
    layers = f"{first['layers']} to {last['layers']} layers"
    return [_target(f"peak memory, growth from {layers}", 100 * growth, 5.0, " %")]


def _largest_targets(rows: Sequence[dict[str, Any]]) -> list[Row]:
    return [
        _target(
            f"full SVD ÷ extract, {_shape(row)}, rank 64, {row['threads']} threads",
            row["ranks"]["64"]["ratio"],
            LARGEST_OVER_EXTRACT,
            "×",
            least=True,
        )
        for row in rows
        if list(row["shape"]) == LARGEST
    ]


def _rival_targets(row: dict[str, Any]) -> list[Row]:
    width, ours, theirs = row["hidden"], row["ours"], row["theirs"]
    model = _rival_model(row)
    limit = MERGEKIT_OVER_EXTRACT.get(width, 1.0)
    share = ours["peak_bytes"] / theirs["peak_bytes"]
    return [
        _target(
            f"mergekit-extract-lora ÷ extract, {model}, start-up of both included",
            theirs["seconds"] / ours["seconds"],
            limit,
            "×",
            least=True,
        ),
        _target(f"extract's peak ÷ mergekit's, {model}", share, MERGEKIT_SHARE, "×"),
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
        f"{sign} {limit:,.0f}{unit}" if limit >= 100 else f"{sign} {limit:.2g}{unit}",
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
            _shape(row),
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


def _bounds_text(bounds: dict[str, Any]) -> str:
    bound, ratio = bounds["bounds"], bounds["ratios"]
    return (
        f"The bound on that excess, over {bounds['claims']} truncations of matrices of many "
        f"decays, shapes and scales, against float64 SVDs: {bounds['violations']} violations. The "
        f"bound is {_percent(bound['median'])} in the median, {_percent(bound['nine_in_ten'])} or "
        f"less for nine in ten, {_percent(bound['largest'])} at most. Where the excess is large "
        f"enough to divide by (above 0.001 %: {bounds['measurable']} of them) the bound is "
        f"{ratio['median']:.1f} × the truth in the median, {ratio['nine_in_ten']:.0f} × or less "
        f"for nine in ten, {ratio['largest']:.0f} × at most."
    )


def _rival_intro(rows: Sequence[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in rows[0]["versions"].items())
    crashed = any(row["theirs"]["exit_code"] for row in rows)
    return (
        f"Same pair (singular values falling as 1/i, stored in bf16), rank {rows[0]['rank']}, all "
        "linear layers factorised, embedding, head and norms stored whole by both. Each command "
        "whole, imports included, its output on the disk at the end; ours is the median of "
        f"{rows[0]['rounds']} runs, before and after theirs, which is one. Theirs runs with "
        f"{versions}. The error is "
        "‖D − s·B·A‖/‖D‖ over all linear layers as stored in bf16; theirs comes from full SVDs."
        + (
            " Theirs failed at its last step, writing a model card without a network; the adapter "
            "was complete then, and the time counts up to there."
            if crashed
            else ""
        )
    )


def _rivals(rows: Sequence[dict[str, Any]]) -> list[Row]:
    titles = {"theirs": "`mergekit-extract-lora`", "ours": "`loratool extract`"}
    return [
        (
            f"{_rival_model(row)}, 2 × {_size(row['bytes'] / 2)}",
            title,
            f"{row[side]['seconds']:.1f} s",
            f"{row[side]['cpu_seconds']:.1f} s",
            _size(row[side]["peak_bytes"]),
            f"{100 * row[side]['error']:.3f} %",
        )
        for row in rows
        for side, title in titles.items()
    ]


def _rival_model(row: dict[str, Any]) -> str:
    layers = row["layers"]
    return f"width {row['hidden']}, {layers} layer{'s' if layers > 1 else ''}"


def _stages_text(row: dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["stages"].items())
    reading, products = row["floor"]["read"], row["floor"]["products"]
    shapes = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in row["worker_shapes"].items())
    whole = next(iter(row["worker_shapes"].values()))
    return (
        f"{_rival_model(row).capitalize()}: seconds by stage, added up over the workers: {stages}. "
        "Reading "
        f"the files once takes {reading:.2f} s; the products that no certified randomised "
        "extraction can do without (D and Dᵀ times rank + 8 columns in float32, B·A in float64) "
        f"take {products:.2f} s. The linear layers' extraction without start-up takes "
        f"{whole:.1f} s, {whole / (reading + products):.1f} × both. Workers × BLAS threads: "
        f"{shapes}."
    )


def _shape(row: dict[str, Any]) -> str:
    return "×".join(map(str, row["shape"]))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


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


TARGETS: tuple[tuple[str, Callable[[Any], list[Row]]], ...] = (
    ("merge", lambda m: _merge_targets(m, MERGE_OVER_CP, PEFT_OVER_MERGE, PEAK_SHARE)),
    ("merge_large", lambda m: _merge_targets(m, LARGE_OVER_CP, PEFT_OVER_LARGE, LARGE_SHARE)),
    ("extract_times", _svd_targets),
    ("extract_mergekit", lambda rows: [one for row in rows for one in _rival_targets(row)]),
    ("combine", _combine_targets),
    ("pissa", _pissa_targets),
    ("extract_errors", _excess_targets),
    (
        "extract_bounds",
        lambda b: [_target("violated bounds on the excess", b["violations"], 0, "")],
    ),
    ("spectra", _spectra_targets),
    ("memory", _memory_targets),
)
