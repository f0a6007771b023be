"""Combining whole adapters: files in, file out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.algebra.lowrank import LowRank
from loratool.combining.method import Updates
from loratool.combining.registry import find_method
from loratool.errors import (
    DisagreementError,
    InputMissing,
    NonFiniteValues,
    NothingMatches,
    OutputError,
    OutputExists,
    RangeOverflow,
    ShapeMismatch,
    UnsupportedInput,
    UsageError,
)
from tests.builders import random_tensor, snapshot
from tests.combining.values import whole
from tests.ops.adapters import MODULES, adapter, convolution, patterned, ranks, updates

Q = "model.layers.0.self_attn.q_proj"


def three(folder: Path) -> list[Path]:
    """Of different ranks and scalings: α/r, α/√r, patterns."""
    return [
        adapter(folder / "a", 4, 0),
        adapter(folder / "b", 6, 100, use_rslora=True),
        adapter(folder / "c", 2, 200, alpha_pattern={"up_proj": 1, ".*0.*q_proj": 9}),
    ]


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], error: float) -> bool:
    assert set(found) == set(expected)
    return all(
        float((found[name] - expected[name]).norm()) <= error * float(expected[name].norm())
        for name in expected
    )


def weighted(paths: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    parts = [updates(path) for path in paths]
    zero = torch.zeros(())
    return {
        name: sum((w * p.get(name, zero) for w, p in zip(weights, parts, strict=True)), zero)
        for name in {name for part in parts for name in part}
    }


def test_cat_is_the_weighted_sum(tmp_path: Path) -> None:
    paths = three(tmp_path)
    report = lt.combine(paths, tmp_path / "out", weights=[0.7, -0.3, 2], method="cat")
    expected = weighted(paths, [0.7, -0.3, 2])
    assert same(updates(tmp_path / "out"), expected, 1e-6)
    assert set(ranks(tmp_path / "out").values()) == {12}
    assert report.relative_error < 1e-6


def test_svd_is_the_best_of_its_rank_and_says_what_it_misses(tmp_path: Path) -> None:
    paths = three(tmp_path)
    report = lt.combine(paths, tmp_path / "out", weights=[1, 0.5, 1])
    expected = weighted(paths, [1, 0.5, 1])
    found = updates(tmp_path / "out")
    assert set(ranks(tmp_path / "out").values()) == {6}
    for row in report.rows:
        module = row.name.removesuffix(".weight")
        sigma = torch.linalg.svdvals(expected[module])
        missed = float((found[module] - expected[module]).norm())
        assert missed == pytest.approx(float(sigma[6:].square().sum().sqrt()), rel=1e-5)
        assert row.relative_error == pytest.approx(missed / float(sigma.norm()), rel=1e-5)
        assert row.norm == pytest.approx(float(sigma.norm()), rel=1e-9)
    assert json.loads((tmp_path / "out" / "loratool_report.json").read_text()) == report.to_json()


@pytest.mark.parametrize("rank", ["full", "error:0", "12"])
def test_svd_without_a_cut_is_cat(tmp_path: Path, rank: str) -> None:
    paths = three(tmp_path)
    lt.combine(paths, tmp_path / "cat", method="cat")
    lt.combine(paths, tmp_path / "svd", rank=rank)
    assert same(updates(tmp_path / "svd"), updates(tmp_path / "cat"), 1e-6)


def test_one_adapter_at_weight_one_is_itself_to_the_byte(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", dtype=torch.bfloat16, lora_alpha=3)
    lt.combine([path], tmp_path / "out", method="cat")
    one, two = (load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / "out"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one)
    assert same(updates(tmp_path / "out"), updates(path), 1e-15)


def test_the_scaling_convention_does_not_matter(tmp_path: Path) -> None:
    """The same updates, written with another alpha or rsLoRA, combine to the same."""
    plain = adapter(tmp_path / "plain", 4, lora_alpha=8)
    stable = adapter(tmp_path / "stable", 4, lora_alpha=4, use_rslora=True)
    patterned = adapter(tmp_path / "pattern", 4, lora_alpha=1, alpha_pattern={".*": 8})
    other = adapter(tmp_path / "other", 3, 50)
    outputs = []
    for path in (plain, stable, patterned):
        lt.combine([path, other], tmp_path / f"out-{path.name}", method="ties")
        outputs.append((tmp_path / f"out-{path.name}" / "adapter_model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_weight_that_one_adapter_lacks(tmp_path: Path) -> None:
    few = adapter(tmp_path / "few", modules={Q: MODULES[Q]})
    paths = [adapter(tmp_path / "all", seed=70), few]
    report = lt.combine(paths, tmp_path / "out", method="cat")
    assert same(updates(tmp_path / "out"), weighted(paths, [1, 1]), 1e-6)
    assert [row.ranks for row in report.rows if row.name != f"{Q}.weight"] == [(4, 0)] * 3
    assert any("has no update for 3 of 4" in note for note in report.notes)


def test_what_cancels_is_absent(tmp_path: Path) -> None:
    """For one weight; and where all cancel, there is no adapter."""
    paths = [adapter(tmp_path / "a"), adapter(tmp_path / "b", modules={Q: MODULES[Q]})]
    report = lt.combine(paths, tmp_path / "out", weights=[1, -1])
    assert Q not in updates(tmp_path / "out")
    assert any("1 weight came out as zero" in note for note in report.notes)
    with pytest.raises(NothingMatches, match="zero everywhere"):
        lt.combine([paths[1], paths[1]], tmp_path / "none", weights=[1, -1])
    assert not (tmp_path / "none").exists()


def test_weights_by_pattern_adapter_and_layer(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=50)]
    rules = ["mlp=0.5", "2@layers.0=3", f"{paths[0]}@layers=0,1", "q_proj=2"]
    lt.combine(paths, tmp_path / "out", method="cat", weight_rules=rules)
    one, two = updates(paths[0]), updates(paths[1])
    expected = {
        "model.layers.0.self_attn.q_proj": 0 * one[Q] + 3 * 2 * two[Q],
        "model.layers.0.mlp.up_proj": 0.5 * 3 * two["model.layers.0.mlp.up_proj"],
        "model.layers.1.self_attn.q_proj": 2
        * (one["model.layers.1.self_attn.q_proj"] + two["model.layers.1.self_attn.q_proj"]),
        "model.layers.1.mlp.up_proj": 0.5
        * (one["model.layers.1.mlp.up_proj"] + two["model.layers.1.mlp.up_proj"]),
    }
    assert same(updates(tmp_path / "out"), expected, 1e-6)


def test_gradients_are_interpolated(tmp_path: Path) -> None:
    modules = {f"h.{i}.q": (6, 5) for i in range(5)}
    path = adapter(tmp_path / "a", 2, modules=modules)
    lt.combine([path], tmp_path / "out", method="cat", weight_rules=["q=1,3,2"])
    found, before = updates(tmp_path / "out"), updates(path)
    for layer, factor in enumerate([1, 2, 3, 2.5, 2]):
        assert torch.allclose(found[f"h.{layer}.q"], factor * before[f"h.{layer}.q"], rtol=1e-6)


def test_convolutions(tmp_path: Path) -> None:
    paths = [convolution(tmp_path / "a"), convolution(tmp_path / "b", 2, 7)]
    lt.combine(paths, tmp_path / "out", weights=[1, 0.5], rank=4)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    shapes = {key.split(".")[-2]: tuple(value.shape) for key, value in tensors.items()}
    assert shapes == {"lora_A": (4, 5, 3, 3), "lora_B": (8, 4, 1, 1)}
    found, expected = updates(tmp_path / "out"), weighted(paths, [1, 0.5])
    u, s, vh = torch.linalg.svd(expected["unet.conv"], full_matrices=False)
    assert torch.allclose(found["unet.conv"], (u[:, :4] * s[:4]) @ vh[:4], atol=1e-5)


def test_embeddings(tmp_path: Path) -> None:
    def embedding(name: str, rank: int, seed: int) -> Path:
        keys = {
            "base_model.model.wte.lora_embedding_A": random_tensor(rank, 50, seed=seed),
            "base_model.model.wte.lora_embedding_B": random_tensor(8, rank, seed=seed + 1),
        }
        return adapter(tmp_path / name, rank, seed, modules={"h.0.q": (6, 8)}, extra=keys)

    paths = [embedding("a", 2, 0), embedding("b", 3, 9)]
    for method in ("svd", "ties"):
        lt.combine(paths, tmp_path / method, method=method, rank="full")
        keys = load_file(tmp_path / method / "adapter_model.safetensors")
        assert keys["base_model.model.wte.lora_embedding_A"].shape[1] == 50
    assert same(updates(tmp_path / "svd"), weighted(paths, [1, 1]), 1e-5)


def experts(path: Path, rank: int, seed: int) -> Path:
    owner = "base_model.model.model.layers.0.mlp.experts.base_layer"
    tensors = {
        f"{owner}.lora_A.weight": random_tensor(3 * rank, 6, seed=seed),
        f"{owner}.lora_B.weight": random_tensor(10, 3 * rank, seed=seed + 1),
        f"{owner.removesuffix('.base_layer')}.lora_A.weight": random_tensor(3 * rank, 5, seed=seed),
        f"{owner.removesuffix('.base_layer')}.lora_B.weight": random_tensor(6, 3 * rank, seed=seed),
    }
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_parameters": targets}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def expert_updates(path: Path) -> dict[str, torch.Tensor]:
    return {name: u.load().dense() for name, u in lt.open_adapter(path).low_rank.items()}


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_experts_keep_one_rank(tmp_path: Path, method: str) -> None:
    """Also where one expert's updates cancel and the others do not."""
    paths = [experts(tmp_path / "a", 2, 0), experts(tmp_path / "b", 3, 40)]
    rules = ["experts.gate_up_proj.1=0"] if method == "svd" else []
    lt.combine(
        paths,
        tmp_path / "out",
        method=method,
        weight_rules=rules,
        rank="full" if method == "svd" else None,
    )
    found = expert_updates(tmp_path / "out")
    one, two = (expert_updates(path) for path in paths)
    assert set(found) == set(one)
    for name, value in found.items():
        factor = 0 if rules and name.endswith("gate_up_proj.1") else 1
        assert torch.allclose(value, factor * (one[name] + two[name]), atol=1e-5)


def test_experts_keep_one_scale(tmp_path: Path) -> None:
    """Where equal scales stay outside the factors, and one expert has another weight."""
    paths = [experts(tmp_path / "a", 2, 0), experts(tmp_path / "b", 2, 40)]
    rules = ["experts.gate_up_proj.1=0.5"]
    lt.combine(paths, tmp_path / "out", method="cat", weight_rules=rules)
    found = expert_updates(tmp_path / "out")
    one, two = (expert_updates(path) for path in paths)
    for name, value in found.items():
        factor = 0.5 if name.endswith("gate_up_proj.1") else 1
        assert torch.allclose(value, factor * (one[name] + two[name]), atol=1e-5)


# What adapters hold besides ---------------------------------------------------------------------


def saved(path: Path, value: torch.Tensor, seed: int = 0) -> Path:
    key = "base_model.model.score.weight"
    return adapter(path, seed=seed, extra={key: value}, modules_to_save=["score"])


def test_equal_saved_parameters_are_kept(tmp_path: Path) -> None:
    paths = [saved(tmp_path / name, torch.ones(2, 3), seed) for seed, name in enumerate("ab")]
    report = lt.combine(paths, tmp_path / "out", weights=[0.5, 0.1])
    kept = lt.open_adapter(tmp_path / "out").replacements
    assert torch.equal(kept["score.weight"].value.read(), torch.ones(2, 3))
    assert any("stored whole" in note for note in report.notes)


def test_saved_parameters_that_differ_are_a_decision(tmp_path: Path) -> None:
    paths = [saved(tmp_path / name, torch.full((2, 3), float(i))) for i, name in enumerate("ab")]
    with pytest.raises(DisagreementError, match="stored whole with different values") as raised:
        lt.combine(paths, tmp_path / "out")
    assert "--saved mean" in str(raised.value.hint)
    for choice, value in (("mean", 0.25), ("first", 0.0)):
        lt.combine(paths, tmp_path / choice, weights=[3, 1], saved=choice)
        kept = lt.open_adapter(tmp_path / choice).replacements["score.weight"].value.read()
        assert torch.equal(kept, torch.full((2, 3), value))
    lt.combine(paths, tmp_path / "drop", saved="drop")
    assert not lt.open_adapter(tmp_path / "drop").replacements


def trained(path: Path, rows: dict[int, float], seed: int = 0) -> Path:
    """An adapter with trained tokens, each row of one value."""
    value = torch.tensor(list(rows.values()))[:, None].expand(-1, 6).contiguous()
    key = "base_model.model.embed.token_adapter.trainable_tokens_delta"
    indices = {"embed": list(rows)}
    return adapter(path, seed=seed, extra={key: value}, trainable_token_indices=indices)


def tokens(path: Path) -> dict[int, float]:
    config = json.loads((path / "adapter_config.json").read_text())
    key = "base_model.model.embed.token_adapter.trainable_tokens_delta"
    value = load_file(path / "adapter_model.safetensors")[key]
    assert torch.equal(value, value[:, :1].expand(-1, 6))
    return dict(zip(config["trainable_token_indices"]["embed"], value[:, 0].tolist(), strict=True))


def test_trained_tokens_are_put_together(tmp_path: Path) -> None:
    paths = [
        trained(tmp_path / "a", {7: 1.0, 3: 2.0}),
        trained(tmp_path / "b", {5: 4.0, 3: 2.0}, 9),
    ]
    lt.combine(paths, tmp_path / "out", weights=[0.5, 0.1])
    assert list(tokens(tmp_path / "out").items()) == [(3, 2.0), (5, 4.0), (7, 1.0)]
    lt.resize(tmp_path / "out", tmp_path / "small", rank=2)
    assert tokens(tmp_path / "small") == {3: 2.0, 5: 4.0, 7: 1.0}


def test_tokens_that_collide_are_a_decision(tmp_path: Path) -> None:
    paths = [trained(tmp_path / "a", {7: 1.0, 3: 2.0}), trained(tmp_path / "b", {3: 6.0}, 9)]
    with pytest.raises(DisagreementError, match="1 token was trained to different") as raised:
        lt.combine(paths, tmp_path / "out")
    assert raised.value.details[0].startswith("token 3: in ")
    for choice, value in (("mean", 3.0), ("first", 2.0)):
        lt.combine(paths, tmp_path / choice, weights=[3, 1], saved=choice)
        assert tokens(tmp_path / choice) == {3: value, 7: 1.0}
    lt.combine(paths, tmp_path / "drop", saved="drop")
    assert not lt.open_adapter(tmp_path / "drop").others


def dora(path: Path, seed: int = 0) -> Path:
    magnitudes = {
        f"base_model.model.{name}.lora_magnitude_vector": torch.arange(1.0, shape[0] + 1)
        for name, shape in MODULES.items()
    }
    return adapter(path, seed=seed, extra=magnitudes, use_dora=True)


def test_dora_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedInput, match="4 updates are not low-rank") as raised:
        lt.combine([dora(tmp_path / "a")], tmp_path / "out")
    assert raised.value.details[0].startswith("model.layers.0.mlp.up_proj.weight: DoRA")
    assert "depends on the weight of the base" in raised.value.details[0]
    assert "loratool extract" in str(raised.value.hint)


def biased(path: Path, rank: int, seed: int, **config: object) -> Path:
    """An adapter with a difference of every bias."""
    biases = {
        f"base_model.model.{name}.lora_B.bias": random_tensor(shape[0], seed=seed + 5 * i)
        for i, (name, shape) in enumerate(MODULES.items())
    }
    return adapter(path, rank, seed, extra=biases, lora_bias=True, **config)


def bias_differences(path: Path) -> dict[str, torch.Tensor]:
    """What is added to every bias, by hand: PEFT's scaling times lora_B.bias."""
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["lora_bias"] is True
    tensors = load_file(path / "adapter_model.safetensors")
    found = {}
    for key, value in tensors.items():
        if key.endswith("lora_B.bias"):
            rank = tensors[key.replace(".bias", ".weight")].shape[1]
            module = key.removeprefix("base_model.model.").removesuffix(".lora_B.bias")
            alpha = patterned(config, "alpha_pattern", module, config["lora_alpha"])
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            found[f"{module}.bias"] = scale * value.double()
    return found


@pytest.mark.parametrize("method", ["svd", "cat", "linear", "ties", "iso_c", "tsv_m", "core_ties"])
def test_bias_differences_are_combined_by_the_method(tmp_path: Path, method: str) -> None:
    """As matrices of one column."""
    paths = [biased(tmp_path / "a", 4, 0), biased(tmp_path / "b", 6, 100, use_rslora=True)]
    weights = [0.75, 0.5]
    report = lt.combine(paths, tmp_path / "out", weights=weights, method=method)
    parts = [bias_differences(path) for path in paths]
    found = bias_differences(tmp_path / "out")
    for name, value in found.items():
        columns = [LowRank(part[name][:, None], torch.ones(1, 1)) for part in parts]
        chosen = find_method(method)
        combined = chosen(Updates(name, tuple(columns), tuple(weights)), chosen.check({}, 2))
        assert torch.allclose(value[:, None], whole(combined), rtol=1e-5, atol=1e-6)
        row = next(row for row in report.rows if row.name == name)
        assert (row.how, row.ranks) == ("bias", (1, 1))
        assert row.relative_error < 1e-6
    if method == "svd":
        key = next(iter(found))
        assert torch.allclose(found[key], 0.75 * parts[0][key] + 0.5 * parts[1][key], atol=1e-6)


def test_a_bias_stays_where_its_weight_cancels(tmp_path: Path) -> None:
    one = biased(tmp_path / "a", 4, 0)
    two = adapter(tmp_path / "b", 4, 0)  # the same factors, no biases
    lt.combine([one, two], tmp_path / "out", weights=[1, -1])
    expected, found = bias_differences(one), bias_differences(tmp_path / "out")
    assert all(torch.allclose(found[key], expected[key], rtol=1e-6) for key in expected)
    assert all(float(value.norm()) == 0 for value in updates(tmp_path / "out").values())


def test_a_bias_without_its_weight_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DisagreementError, match="but the weight beside it no update"):
        lt.combine([biased(tmp_path / "a", 4, 0)], tmp_path / "out", exclude=["q_proj.weight"])


def test_updated_here_and_saved_there_is_refused(tmp_path: Path) -> None:
    key = f"base_model.model.{Q}.weight"
    whole = adapter(
        tmp_path / "b",
        modules={"model.layers.0.mlp.up_proj": (40, 24)},
        extra={key: torch.ones(20, 24)},
        modules_to_save=["q_proj"],
    )
    with pytest.raises(DisagreementError, match="another adapter stores it whole"):
        lt.combine([adapter(tmp_path / "a"), whole], tmp_path / "out")


def test_different_bases_are_said(tmp_path: Path) -> None:
    paths = [
        adapter(tmp_path / "a", base_model_name_or_path="owner/one"),
        adapter(tmp_path / "b", base_model_name_or_path="owner/two"),
    ]
    report = lt.combine(paths, tmp_path / "out")
    assert any("owner/one, owner/two" in note for note in report.notes)


# Refusals ---------------------------------------------------------------------------------------


def test_two_namings_of_one_model(tmp_path: Path) -> None:
    short = {name.removeprefix("model."): shape for name, shape in MODULES.items()}
    paths = [adapter(tmp_path / "a"), adapter(tmp_path / "b", modules=short)]
    with pytest.raises(DisagreementError, match="name one model differently"):
        lt.combine(paths, tmp_path / "out")


def test_shapes_that_differ(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / "a"), adapter(tmp_path / "b", modules={Q: (22, 24)})]
    with pytest.raises(ShapeMismatch, match=r"\[20, 24\] in .*a, a matrix \[22, 24\] in .*b"):
        lt.combine(paths, tmp_path / "out")


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    bad = adapter(
        tmp_path / "a",
        extra={f"base_model.model.{Q}.lora_A.weight": torch.full((4, 24), torch.nan)},
    )
    with pytest.raises(NonFiniteValues, match=r"q_proj.lora_A"):
        lt.combine([bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_beyond_the_dtype(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", dtype=torch.float16)
    with pytest.raises(RangeOverflow, match="range of F16"):
        lt.combine([path], tmp_path / "out", weights=[1e12])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 4, "method": "cat"}, UsageError, "takes no --rank"),
        ({"rank": 0}, UsageError, "needs a whole number"),
        ({"method": "teis"}, UsageError, "unknown method"),
        ({"density": 0.5}, UsageError, "takes no density"),
        ({"weights": [1.0]}, UsageError, "1 weight for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, UsageError, "finite"),
        ({"weight_rules": ["mlp"]}, UsageError, "not of the form"),
        ({"weight_rules": ["mlp=many"]}, UsageError, "not of the form"),
        ({"weight_rules": ["3@mlp=1"]}, UsageError, "names no adapter"),
        ({"weight_rules": ["mpl=1"]}, NothingMatches, "matches nothing"),
        ({"dtype": "int8"}, UsageError, "unknown dtype"),
        ({"saved": "keep"}, UsageError, "refuse, mean, first or drop"),
        ({"include": ["mpl"]}, NothingMatches, "matches nothing"),
    ],
)
def test_requests_that_make_no_sense(
    tmp_path: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    paths = [adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=9)]
    before = snapshot(tmp_path)
    with pytest.raises(error, match=message):
        lt.combine(paths, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert snapshot(tmp_path) == before


def test_outputs_are_protected(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a")
    with pytest.raises(OutputError, match="is one of the inputs"):
        lt.combine([path], path, overwrite=True)
    lt.combine([path], tmp_path / "out")
    with pytest.raises(OutputExists):
        lt.combine([path], tmp_path / "out")
    lt.combine([path], tmp_path / "out", overwrite=True)
    with pytest.raises(InputMissing):
        lt.combine([tmp_path / "gone"], tmp_path / "other")


# The same bytes, little memory --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "ties", "dare_ties", "della"])
def test_the_same_bytes_for_any_number_of_workers(tmp_path: Path, method: str) -> None:
    modules = {f"h.{i}.q": (90, 70) for i in range(6)}
    paths = [adapter(tmp_path / name, 3, seed, modules) for seed, name in enumerate("ab")]
    outputs = []
    for jobs in (1, 3):
        lt.combine(paths, tmp_path / f"out-{jobs}", method=method, jobs=jobs)
        outputs.append((tmp_path / f"out-{jobs}" / "adapter_model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


class Largest(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
    """Remembers the largest result of any torch function."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


WIDE = 16384


@pytest.mark.parametrize("method", ["svd", "cat", "linear", "karcher", "model_stock"])
def test_factor_methods_never_build_the_matrix(method: str) -> None:
    from loratool.algebra.truncation import truncate
    from loratool.combining.method import Updates
    from loratool.combining.registry import find_method
    from tests.combining.values import low_rank

    values = tuple(low_rank(WIDE, WIDE, 4, seed) for seed in range(3))
    chosen = find_method(method)
    with Largest() as largest:
        combined = chosen(Updates("w", values, (1.0, 1.0, 1.0)), chosen.check({}, 3))
        truncate(combined, lambda _: 4)
    assert largest.numel <= 12 * WIDE


def test_elementwise_methods_hold_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result too large to hold is made again for every pass."""
    from loratool.algebra.factorize_rows import factorize_rows
    from loratool.algebra.ranks import parse_rank_rule
    from loratool.combining.method import Updates
    from loratool.combining.registry import find_method
    from tests.combining.values import low_rank

    side, block = 1500, 20_000
    monkeypatch.setattr("loratool.algebra.row_blocks.BLOCK_ELEMENTS", block)
    monkeypatch.setattr("loratool.algebra.row_blocks.HELD_BYTES", 1)
    values = tuple(low_rank(side, side, 4, seed) for seed in range(2))
    ties = find_method("ties")
    with Largest() as largest:
        combined = ties(Updates("w", values, (1.0, 1.0)), ties.check({}, 2))
        factorize_rows(combined.held(), parse_rank_rule("4"), key="k")
    assert largest.numel <= max(80 * side, 2**16)
