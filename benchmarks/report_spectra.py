"""What pair_spectra.py measured, as Markdown."""

from __future__ import annotations

from typing import Any

from report_parts import Row, shape_of, table, target

SVD_OVER_INSPECT, LARGEST_ERROR = 30.0, 1e-2
COLUMNS = ("shape", "matrices", "decomposed in full", "SVD in float64, each", "in float32")


def section(measured: dict[str, Any]) -> list[str]:
    """inspect of a pair against full SVDs."""
    return [_text(measured), table(COLUMNS, _rows(measured))]


def targets(measured: dict[str, Any]) -> list[Row]:
    """How many times faster, and how true."""
    return [
        target(
            "full SVDs of a pair's changes, as weightwatcher's ÷ inspect",
            measured["ratio"],
            SVD_OVER_INSPECT,
            "×",
            least=True,
        ),
        target(
            "the same in float32 ÷ inspect",
            measured["ratio_float32"],
            SVD_OVER_INSPECT,
            "×",
            least=True,
        ),
        target(
            "inspect: worst error of a printed singular value",
            100 * measured["worst_error"],
            100 * LARGEST_ERROR,
            " %",
        ),
    ]


def _text(measured: dict[str, Any]) -> str:
    """What was measured, and ours."""
    whole = measured["checked"] == measured["matrices"]
    scaled = "" if whole else ", timed on the first of each shape and multiplied by their number"
    return (
        f"All {measured['matrices']} changed matrices of a pair, {measured['bytes'] / 1e9:.2f} GB "
        f"on both sides. What `loratool inspect BASE TUNED` computes (reading, norms, noise floors "
        f"and up to {measured['values']} singular values of each) takes "
        f"{measured['seconds']:.1f} s without start-up ({measured['cpu_seconds']:.1f} s of "
        f"processor time; median of {measured['rounds']}), {measured['over_reading']:.1f} × what "
        f"reading the files takes ({measured['read_seconds']:.2f} s). All singular values of each "
        f"change in float64 on {measured['threads']} threads, as weightwatcher 0.7.7 has them on a "
        f"CPU{scaled}: {measured['svd_seconds']:.0f} s, {measured['ratio']:.0f} × as long, "
        f"{measured['cpu_ratio']:.0f} × by processor time; in float32, by `torch.linalg.svdvals`: "
        f"{measured['svd_seconds_float32']:.0f} s, {measured['ratio_float32']:.0f} × as long; both "
        "without reading. Against float64 eigenvalues of the decomposed ones' Gram matrices, the "
        f"largest singular value is off by at most {100 * measured['worst_error_of_largest']:.2g} "
        f"%, any printed one by at most {100 * measured['worst_error']:.2g} %."
    )


def _rows(measured: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per shape."""
    return [
        (
            shape_of(shape),
            str(shape["matrices"]),
            str(shape["timed"]),
            f"{shape['svd_seconds']:.2f} s",
            f"{shape['svd_seconds_float32']:.2f} s",
        )
        for shape in measured["shapes"]
    ]
