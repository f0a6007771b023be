"""A merge on file systems that share blocks, mounted from images. Needs root and their mkfs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import loratool as lt
from tests.builders import random_tensor
from tests.faults.killing import bytes_of
from tests.ops.builders import LLAMA, save_folder, save_peft

MEBIBYTE = 2**20
SIZES = {"btrfs": 130 * MEBIBYTE, "xfs": 310 * MEBIBYTE}
Q = "model.layers.0.self_attn.q_proj"

pytestmark = pytest.mark.slow


@pytest.fixture(params=SIZES)
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    kind = request.param
    make = shutil.which(f"mkfs.{kind}", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if os.geteuid() != 0 or make is None:
        pytest.skip(f"needs root and mkfs.{kind}")
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(SIZES[kind])
    subprocess.run([make, "-q", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True).returncode:
        pytest.skip("no loop device can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def used(folder: Path) -> int:
    os.sync()
    about = os.statvfs(folder)
    return (about.f_blocks - about.f_bfree) * about.f_frsize


def test_what_stays_takes_no_room(mounted: Path, tmp_path: Path) -> None:
    """An untouched shard, and an untouched range of 8 MiB beside a small tensor that changes."""
    large = [random_tensor(4096, 1024, seed=seed, dtype=torch.bfloat16) for seed in (1, 2)]
    state = {
        "model.embed_tokens.weight": large[0],
        f"{Q}.weight": random_tensor(256, 256, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(256, dtype=torch.bfloat16),
        "lm_head.weight": large[1],
    }
    base = save_folder(state, mounted / "base", LLAMA, shards=2)
    adapter = save_peft(mounted / "a", {Q: (random_tensor(2, 256), random_tensor(256, 2))})
    before, kept = used(mounted), bytes_of(base)
    merged = mounted / "merged"
    lt.merge(base, adapter, merged)
    assert used(mounted) - before < 2 * MEBIBYTE, "of 16 MiB"
    lt.merge(base, adapter, tmp_path / "elsewhere")
    assert bytes_of(merged) == bytes_of(tmp_path / "elsewhere")
    lt.merge_in_place(merged, adapter)
    assert bytes_of(base) == kept
