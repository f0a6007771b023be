"""Convolutions as low-rank updates: PEFT computes and merges what loratool merges."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

import loratool as lt
from loratool.errors import NothingMatches, Unplaced, UsageError
from loratool.ops.inspect import CheckpointReport
from tests.interop.families import FAMILIES
from tests.interop.test_families import answer, load, save_pair, under_peft
from tests.ops.builders import load_folder

Pair = tuple[Path, Path]

WITH_CONVOLUTIONS: dict[str, tuple[str, ...]] = {
    "deberta-v2 convolution": (),
    "vit": ("*.cls_token", "*.position_embeddings"),
    "clip": ("*.class_embedding", "logit_scale"),
    "whisper": (),
}
"""Families, and their bare parameters, which do not change here."""


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("rank", ["3", "full"])
@pytest.mark.parametrize("name", WITH_CONVOLUTIONS)
def test_convolutions_of_transformers(name: str, rank: str, tmp_path: Path) -> None:
    family = replace(FAMILIES[name], raw=WITH_CONVOLUTIONS[name])
    base, tuned = save_pair(family, tmp_path)
    options = {"rank": rank, "conv_rank": "same", "exclude": family.raw}
    report = lt.extract(base, tuned, tmp_path / "adapter", **options)  # type: ignore[arg-type]
    assert {str(r.status) for r in report.rows if r.kind == "convolution"} == {"low-rank"}
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = answer(family, load(family, tmp_path / "merged"))
    model = under_peft(family, base, tmp_path / "adapter")
    if name == "whisper":  # reads the stride off its convolution, which PEFT's layer does not have
        model = model.merge_and_unload()
    torch.testing.assert_close(answer(family, model), merged, rtol=1e-4, atol=2e-5)
    if rank == "full":
        trained = answer(family, load(family, tuned))
        torch.testing.assert_close(merged, trained, rtol=1e-4, atol=2e-5)


def test_a_convolution_beside_a_class_token_goes_with_its_module(tmp_path: Path) -> None:
    base, tuned = save_pair(FAMILIES["vit"], tmp_path, raw=True)
    with pytest.raises(NothingMatches, match="no convolution to factorise") as caught:
        lt.extract(base, tuned, tmp_path / "a", rank=3, conv_rank=3)
    assert "beside a bare parameter" in (caught.value.hint or "")


# A UNet ---------------------------------------------------------------------------------------


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoised(model: nn.Module) -> torch.Tensor:
    """What the UNet makes of fixed latents, at two times, under fixed prompts."""
    return model(noise(1, 2, 4, 8, 8), torch.tensor([3, 70]), noise(2, 2, 5, 12)).sample


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A UNet of Stable Diffusion's build, and the same after steps of full fine-tuning."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    model.save_pretrained(folder / "base" / "unet")
    (folder / "base" / "model_index.json").write_text('{"_class_name": "AnyPipeline"}')
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        (denoised(model) - noise(3, 2, 4, 8, 8)).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder / "tuned")
    return folder / "base" / "unet", folder / "tuned"


def unet_output(path: Path, adapter: Path | None = None) -> torch.Tensor:
    model: nn.Module = UNet2DConditionModel.from_pretrained(path)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*adapter keys.*")
            model = PeftModel.from_pretrained(model, str(adapter))
        assert not model.load_adapter(str(adapter), "default").unexpected_keys
    with torch.no_grad():
        return denoised(model.eval())


@pytest.mark.parametrize("rank", ["2", "energy:0.9", "full"])
def test_unet(rank: str, unets: Pair, tmp_path: Path) -> None:
    base, tuned = unets
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=rank, conv_rank="same")
    factorised = {row.kind for row in report.rows if row.rank}
    assert factorised == {"linear", "convolution"}
    assert all(row.rank for row in report.rows if row.kind in factorised)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = unet_output(tmp_path / "merged")
    peft = unet_output(base, tmp_path / "adapter")
    torch.testing.assert_close(peft, merged, rtol=1e-4, atol=2e-5)
    before, after = unet_output(base), unet_output(tuned)
    assert (after - before).norm() > 0.05 * before.norm()
    if rank == "full":
        torch.testing.assert_close(merged, after, rtol=1e-4, atol=2e-5)
    else:
        assert (merged - after).norm() < 0.9 * (after - before).norm()


def test_unet_roles_and_budget(unets: Pair, tmp_path: Path) -> None:
    report = lt.extract(
        *unets,
        tmp_path / "a",
        rank="budget:6000",
        conv_rank=4,
        targets="all-linear,all-conv",
        drop_rest=True,
    )
    assert report.adapter_parameters <= 6000
    ranks = [row.rank for row in report.rows if row.kind == "convolution" and row.rank]
    assert ranks
    assert max(ranks) <= 4
    special = lt.extract(
        *unets, tmp_path / "b", conv_rank=3, rank_for={"conv_in": "whole", "conv1": 2}
    )
    rows = {row.name: row for row in special.rows}
    assert rows["conv_in.weight"].status == "stored whole"
    assert rows["mid_block.resnets.0.conv1.weight"].rank == 2
    assert rows["conv_out.weight"].rank == 3


def test_a_pipelines_folder_is_told_from_its_models(unets: Pair, tmp_path: Path) -> None:
    with pytest.raises(lt.LoratoolError, match="pipeline of several models") as caught:
        lt.extract(unets[0].parent, unets[1], tmp_path / "a")
    assert [Path(detail).name for detail in caught.value.details] == ["unet"]
    report = lt.inspect(unets[0])
    assert isinstance(report, CheckpointReport)
    assert report.architecture == "UNet2DConditionModel"


# Kernels of every dimension -------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, conv: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv = conv()


KERNELS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(5, 7, 3, stride=2),
    "1d pointwise": lambda: nn.Conv1d(5, 7, 1),
    "2d": lambda: nn.Conv2d(5, 4, (3, 2), padding=1),
    "2d pointwise": lambda: nn.Conv2d(5, 7, 1),
    "2d one filter": lambda: nn.Conv2d(5, 1, 3),
    "3d": lambda: nn.Conv3d(2, 6, (2, 3, 1)),
}


def save_nets(make: Callable[[], nn.Module], folder: Path) -> Pair:
    torch.manual_seed(1)
    for side in ("base", "tuned"):
        (folder / side).mkdir()
        save_file(Net(make).state_dict(), folder / side / "model.safetensors")
    return folder / "base", folder / "tuned"


@pytest.mark.parametrize("case", KERNELS)
def test_peft_merges_the_same_kernel(case: str, tmp_path: Path) -> None:
    base, tuned = save_nets(KERNELS[case], tmp_path)
    rank = 1 if case == "2d one filter" else 2
    report = lt.extract(base, tuned, tmp_path / "adapter", conv_rank=rank)
    row = next(row for row in report.rows if row.name == "conv.weight")
    state, aim = load_folder(base), load_folder(tuned)
    delta = (aim["conv.weight"] - state["conv.weight"]).double().flatten(1)
    best = torch.linalg.svdvals(delta)[rank:].norm() / delta.norm()
    assert row.rank == rank
    assert row.relative_error == pytest.approx(best.item(), rel=1e-5, abs=1e-6)
    net = Net(KERNELS[case])
    net.load_state_dict(state)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")
    theirs = PeftModel.from_pretrained(net, str(tmp_path / "adapter")).merge_and_unload()
    torch.testing.assert_close(theirs.state_dict(), dict(merged), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((6, 1, 3, 3), {}),
        ((8, 4, 3), {"model_type": "data2vec-audio"}),
    ],
)
def test_grouped_convolutions_are_stored_whole(
    shape: tuple[int, ...], config: dict[str, str], tmp_path: Path
) -> None:
    name = "encoder.pos_conv_embed.conv.weight"
    for seed, side in enumerate(("base", "tuned")):
        (tmp_path / side).mkdir()
        state = {name: noise(seed, *shape), "plain.conv.weight": noise(seed, 6, 4, 3)}
        save_file(state, tmp_path / side / "model.safetensors")
        (tmp_path / side / "config.json").write_text(json.dumps(config))
    report = lt.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", conv_rank=2)
    status = {row.name: str(row.status) for row in report.rows}
    assert status == {name: "stored whole", "plain.conv.weight": "low-rank"}
    (note,) = [note for note in report.notes if "grouped" in note]
    assert name in note


def test_slips_are_refused(tmp_path: Path) -> None:
    base, tuned = save_nets(KERNELS["2d"], tmp_path)
    out = tmp_path / "a"
    with pytest.raises(NothingMatches, match="no matrix is left") as caught:
        lt.extract(base, tuned, out)
    assert "--conv-rank" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="rank 5 is above the smaller side"):
        lt.extract(base, tuned, out, conv_rank=5)
    with pytest.raises(UsageError, match="no budget of their own"):
        lt.extract(base, tuned, out, conv_rank="budget:500")
    with pytest.raises(UsageError, match="with a budget it is same, or a number"):
        lt.extract(base, tuned, out, rank="budget:500", conv_rank="energy:0.5")
    with pytest.raises(NothingMatches, match=r"nothing that 'conv.bias' matches is factorised"):
        lt.extract(base, tuned, out, conv_rank=2, rank_for={"conv.bias": 2})
    with pytest.raises(NothingMatches, match="no convolution to factorise"):
        lt.extract(base, tuned, out, conv_rank=2, rank_for={"conv": "whole"})
    with pytest.raises(Unplaced, match="vllm does not take") as caught:
        lt.extract(base, tuned, out, conv_rank=2, profile="vllm", drop_rest=True)
    assert "conv.weight: an update of a convolution" in caught.value.details
    assert not out.exists()
