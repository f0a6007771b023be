"""Checkpoints and adapters whose reports are looked at in the browser."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.ops.builders import LLAMA, State, save_folder, save_peft

LAYERS, KINDS = 100, 20

HOSTILE = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=1</script>",
    "--><script>window.hacked=1</script><!--",
    "<!--<script>",
    "]]></style><img src=x onerror=window.hacked=1>",
    '"><img src=x onerror="window.hacked=1">',
    "' onmouseover='window.hacked=1' onfocus='window.hacked=1' autofocus='",
    "javascript:window.hacked=1//",
    "'+(window.hacked=1)+'",
    "${window.hacked=1}",
    "{{constructor.constructor('window.hacked=1')()}}",
    "__proto__",
    "constructor",
    "toString",
    "hasOwnProperty",
    "a\u202ebackwards\u202c",
    "a\u2066isolated",
    "\u200bunseen",
    "line\u2028break",
    "&lt;b&gt;&amp;amp;",
    "datum['x'] + event",
    "a[0].b\\.c",
    "über 名前 😀",
    "long" + "er" * 2000,
    "spaced   out",
)
"""What stands where a module's name should. Run, it would leave ``window.hacked``."""


def changed(shape: tuple[int, int], rank: int, seed: int) -> torch.Tensor:
    """A change of this rank with falling singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, rank, generator=generator) for size in shape)
    return (left * 0.5 ** torch.arange(rank)) @ right.T / 50


def save_pair(
    folder: Path, matrices: dict[str, tuple[int, int]], names: tuple[str, str] = ("base", "tuned")
) -> tuple[Path, Path]:
    """BASE, TUNED, folders of these names: every matrix changed by a rank of its own."""
    generator = torch.Generator().manual_seed(0)
    base: State = {
        name: torch.randn(*shape, generator=generator) / 10 for name, shape in matrices.items()
    }
    tuned = {
        name: value + changed(matrices[name], 1 + index % 5, index) * (1 + index % 7)
        for index, (name, value) in enumerate(base.items())
    }
    before, after = (folder / name for name in names)
    return save_folder(base, before, LLAMA), save_folder(tuned, after, LLAMA)


def many_modules(folder: Path) -> tuple[Path, Path]:
    """A pair of 2,000 matrices."""
    return save_pair(
        folder,
        {
            f"model.layers.{layer}.part_{kind}.weight": (6, 8) if kind % 2 else (10, 6)
            for layer in range(LAYERS)
            for kind in range(KINDS)
        },
    )


def hostile_names() -> list[str]:
    """Of parameters: every hostile text as a module of two layers, and outside of layers."""
    return [
        f"{place}{text}.weight"
        for text in HOSTILE
        for place in ("model.layers.0.", "model.layers.1.", "")
    ]


def hostile_pair(folder: Path) -> tuple[Path, Path]:
    """A pair whose names are hostile, those of its folders included."""
    names = '<img src=x onerror="window.hacked=1">', "\u202e'; window.hacked=1; '"
    return save_pair(folder, dict.fromkeys(hostile_names(), (6, 8)), names)


def hostile_adapter(folder: Path, label: str) -> Path:
    """An adapter whose modules, base and folder have hostile names."""
    path = folder / f"<script>window.hacked=1</script>\u202e{label}".replace("/", "\u2215")
    pairs = {
        name.removesuffix(".weight"): (
            changed((2, 8), 2, sum(map(ord, label)) + index),
            changed((6, 2), 2, index + 1),
        )
        for index, name in enumerate(hostile_names())
    }
    return save_peft(path, pairs, base_model_name_or_path="</script><script>hacked=1</script>")


def adapters(folder: Path, count: int) -> list[Path]:
    """Adapters of one small model, the first two from the same A."""
    paths = []
    for number in range(count):
        starts = torch.Generator().manual_seed(number // 2)
        learned = torch.Generator().manual_seed(10 + number)
        pairs = {
            f"model.layers.{layer}.{module}": (
                torch.randn(4, 16, generator=starts),
                torch.randn(24, 4, generator=learned) / (1 + number),
            )
            for layer in range(6)
            for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
        }
        paths.append(save_peft(folder / f"adapter-{'abcdef'[number]}", pairs, lora_alpha=8))
    return paths


def adapter_and_base(folder: Path) -> tuple[Path, Path]:
    """One of ``adapters``, and a checkpoint that it fits."""
    (adapter,) = adapters(folder, 1)
    generator = torch.Generator().manual_seed(5)
    state: State = {
        f"model.layers.{layer}.{module}.weight": torch.randn(24, 16, generator=generator)
        for layer in range(6)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    }
    return adapter, save_folder(state, folder / "base", LLAMA)


def hostile_adapters(folder: Path) -> list[Path]:
    return [hostile_adapter(folder, label) for label in ("one", "two")]
