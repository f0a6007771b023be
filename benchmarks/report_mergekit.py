"""What bench_mergekit.py measured, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report_parts import Row, size, table, target

OVER_EXTRACT, PEAK_SHARE = {2048: 20.0, 4096: 30.0}, 1 / 2


def section(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Both commands on the same pairs."""
    columns = ["checkpoints", "command", "wall", "processor", "peak memory", "relative error"]
    return [_intro(rows), table(columns, _rows(rows)), *map(_stages_text, rows)]


def targets(rows: Sequence[dict[str, Any]]) -> list[Row]:
    """Of every pair."""
    return [one for row in rows for one in _targets(row)]


def _targets(row: dict[str, Any]) -> list[Row]:
    width, ours, theirs = row["hidden"], row["ours"], row["theirs"]
    model = _model(row)
    limit = OVER_EXTRACT.get(width, 1.0)
    share = ours["peak_bytes"] / theirs["peak_bytes"]
    return [
        target(
            f"mergekit-extract-lora ÷ extract, {model}, start-up of both included",
            theirs["seconds"] / ours["seconds"],
            limit,
            "×",
            least=True,
        ),
        target(f"extract's peak ÷ mergekit's, {model}", share, PEAK_SHARE, "×"),
    ]


def _intro(rows: Sequence[dict[str, Any]]) -> str:
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


def _rows(rows: Sequence[dict[str, Any]]) -> list[Row]:
    titles = {"theirs": "`mergekit-extract-lora`", "ours": "`loratool extract`"}
    return [
        (
            f"{_model(row)}, 2 × {size(row['bytes'] / 2)}",
            title,
            f"{row[side]['seconds']:.1f} s",
            f"{row[side]['cpu_seconds']:.1f} s",
            size(row[side]["peak_bytes"]),
            f"{100 * row[side]['error']:.3f} %",
        )
        for row in rows
        for side, title in titles.items()
    ]


def _model(row: dict[str, Any]) -> str:
    layers = row["layers"]
    return f"width {row['hidden']}, {layers} layer{'s' if layers > 1 else ''}"


def _stages_text(row: dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["stages"].items())
    reading, products = row["floor"]["read"], row["floor"]["products"]
    shapes = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in row["worker_shapes"].items())
    whole = next(iter(row["worker_shapes"].values()))
    return (
        f"{_model(row).capitalize()}: seconds by stage, added up over the workers: {stages}. "
        "Reading "
        f"the files once takes {reading:.2f} s; the products that no certified randomised "
        "extraction can do without (D and Dᵀ times rank + 8 columns in float32, B·A in float64) "
        f"take {products:.2f} s. The linear layers' extraction without start-up takes "
        f"{whole:.1f} s, {whole / (reading + products):.1f} × both. Workers × BLAS threads: "
        f"{shapes}."
    )
