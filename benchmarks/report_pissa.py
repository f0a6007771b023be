"""What bench_pissa.py measured, as Markdown."""

from __future__ import annotations

from typing import Any

from report_parts import Row, table, target

PEFT_OVER_INIT, MISSED = 20.0, 1e-3
COLUMNS = (
    "PEFT, one matrix",
    "stands for",
    "seconds",
    "processor",
    "captured",
    "optimum",
    "ours ÷ optimum",
)


def section(measured: dict[str, Any]) -> list[str]:
    """The whole command against PEFT's initialisation alone."""
    return [_text(measured), table(COLUMNS, _rows(measured))]


def targets(measured: dict[str, Any]) -> list[Row]:
    """How many times faster, and how near the optimum."""
    return [
        target(
            "PEFT's PiSSA alone ÷ init --method pissa, whole command",
            measured["ratio"],
            PEFT_OVER_INIT,
            "×",
            least=True,
        ),
        target(
            "PiSSA: energy short of the optimum",
            100 * _missed(measured),
            100 * MISSED,
            " %",
        ),
    ]


def _missed(measured: dict[str, Any]) -> float:
    """The largest share of the optimal energy that ours does not capture."""
    return max(1.0 - float(sample["captured"]) for sample in measured["samples"])


def _text(measured: dict[str, Any]) -> str:
    """What was measured, and ours."""
    return (
        f"A Llama of width {measured['hidden']} (MLP {measured['intermediate']}, "
        f"{measured['layers']} layers, bf16, {measured['bytes'] / 1e9:.2f} GB; half of each "
        f"weight's energy in singular values falling as 1/√i), rank {measured['rank']} on all "
        f"{measured['matrices']} linear layers. `loratool init --method pissa --residual`, "
        f"everything included, writes adapter and residual base in {measured['seconds']:.1f} s "
        f"({measured['cpu_seconds']:.1f} s of processor time, "
        f"{measured['peak_bytes'] / 1e9:.2f} GB of memory; median of {measured['rounds']}). PEFT's "
        'initialisation alone, `init_lora_weights="pissa"`, was timed on one matrix of each shape '
        f"and multiplied by their number: {measured['peft_seconds']:.0f} s, "
        f"{measured['ratio']:.0f} × as long, {measured['cpu_ratio']:.0f} × by processor time. "
        "Captured: the share of ‖W‖² that W − B·A no longer has."
    )


def _rows(measured: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per matrix that PEFT was timed on."""
    return [
        (
            f"`{sample['module']}`",
            str(sample["stands_for"]),
            f"{sample['seconds']:.1f} s",
            f"{sample['cpu_seconds']:.1f} s",
            f"{100 * sample['energy_kept']:.3f} %",
            f"{100 * sample['optimum']:.3f} %",
            f"{sample['captured']:.6f}",
        )
        for sample in measured["samples"]
    ]
