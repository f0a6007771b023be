"""What bench_merge.py measured, as Markdown."""

from __future__ import annotations

from typing import Any

from report_parts import Row, size, table, target

OVER_CP, PEFT_OVER_MERGE, PEAK_SHARE = 4.0, 4.0, 1 / 3
LARGE_OVER_CP, PEFT_OVER_LARGE, LARGE_SHARE = 2.5, 8.0, 1 / 4


def section(merge: dict[str, Any]) -> list[str]:
    """Of the smaller model, with what holds for both."""
    return [
        "Every command starts a process and ends with its output on the disk. PEFT: "
        "`from_pretrained`, `merge_and_unload`, `save_pretrained`.",
        *large_section(merge),
    ]


def large_section(merge: dict[str, Any]) -> list[str]:
    """Of the larger one."""
    columns = ["command", "wall", "processor", "peak memory", "of it anonymous"]
    return [_text(merge), table(columns, _rows(merge))]


def targets(merge: dict[str, Any]) -> list[Row]:
    """Of the smaller model."""
    return _targets(merge, OVER_CP, PEFT_OVER_MERGE, PEAK_SHARE)


def large_targets(merge: dict[str, Any]) -> list[Row]:
    """Of the larger one."""
    return _targets(merge, LARGE_OVER_CP, PEFT_OVER_LARGE, LARGE_SHARE)


def _targets(merge: dict[str, Any], over_cp: float, peft_over: float, share: float) -> list[Row]:
    model = size(merge["bytes"])
    bare = "without start-up"
    return [
        target(f"merge ÷ (cp + sync), {model}", merge["over_cp"], over_cp, "×"),
        target(f"the same, {bare}", merge["in_process_over_cp"], over_cp, "×"),
        target(f"PEFT ÷ merge, {model}", merge["peft_over_ours"], peft_over, "×", least=True),
        target(f"the same, {bare}", merge["in_process_peft_over_ours"], peft_over, "×", least=True),
        target(f"merge's peak ÷ PEFT's, {model}", merge["peak_share"], share, "×"),
    ]


def _text(merge: dict[str, Any]) -> str:
    return (
        f"{size(merge['bytes'])} of bf16 in two shards, rank 16 on every linear layer, "
        f"{merge['rounds']} rounds in turns. Without start-up and imports, "
        f"`loratool merge` takes {merge['in_process_seconds']:.1f} s, "
        f"{merge['in_process_over_cp']:.1f} × the copy, and PEFT "
        f"{merge['peft_in_process_seconds']:.1f} s."
    )


def _rows(merge: dict[str, Any]) -> list[Row]:
    names = {"cp": "`cp -r`, sync", "loratool": "`loratool merge`", "peft": "PEFT"}
    return [
        (
            title,
            f"{row['seconds']:.1f} s",
            f"{row['cpu_seconds']:.1f} s",
            *(
                ("", "")
                if name == "cp"
                else (size(row["peak_bytes"]), size(row["anonymous_bytes"]))
            ),
        )
        for name, title in names.items()
        for row in [merge[name]]
    ]
