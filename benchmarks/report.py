"""The measured results as Markdown. No number in it is written by hand except the targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import report_combine
import report_extract
import report_memory
import report_merge
import report_mergekit
import report_pissa
import report_receipt
import report_spectra
from report_parts import Row, size, table


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
        f"{size(machine['memory_bytes'])} of memory, {machine['system']}, "
        f"Python {machine['python']}, {packages}. No GPU; files in the page cache. Load average "
        f"(the commands themselves count): {load}.",
        *(["**A quick run: sizes and rounds too small to conclude from.**"] * results["quick"]),
        "## Against the targets",
        table(["what", "measured", "target", ""], _targets(results)),
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


SECTIONS: tuple[tuple[str, str, Callable[[Any], list[str]]], ...] = (
    ("Merge", "merge", report_merge.section),
    ("", "merge_large", report_merge.large_section),
    ("Extract, one matrix", "extract_times", report_extract.times_section),
    ("", "extract_errors", report_extract.errors_section),
    ("", "extract_bounds", report_extract.bounds_section),
    ("Extract, whole command", "extract_whole", report_extract.whole_section),
    ("Extract against mergekit-extract-lora", "extract_mergekit", report_mergekit.section),
    ("Combine and resize", "combine", report_combine.section),
    ("PiSSA against PEFT", "pissa", report_pissa.section),
    ("Inspect, spectra of a pair", "spectra", report_spectra.section),
    ("Memory and depth", "memory", report_memory.section),
    ("Receipts", "receipt", report_receipt.section),
)
"""Titles ('' goes on under the one before), the stage that is shown, and how."""

TARGETS: tuple[tuple[str, Callable[[Any], list[Row]]], ...] = (
    ("merge", report_merge.targets),
    ("merge_large", report_merge.large_targets),
    ("extract_times", report_extract.times_targets),
    ("extract_mergekit", report_mergekit.targets),
    ("combine", report_combine.targets),
    ("pissa", report_pissa.targets),
    ("extract_errors", report_extract.errors_targets),
    ("extract_bounds", report_extract.bounds_targets),
    ("spectra", report_spectra.targets),
    ("memory", report_memory.targets),
)
"""Stages that have targets, in the order of their table."""


def _targets(results: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for stage, targets in TARGETS:
        if stage in results:
            rows += targets(results[stage])
    return rows
