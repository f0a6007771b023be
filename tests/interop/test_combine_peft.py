"""Combination against PEFT's add_weighted_adapter, where that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import loratool as lt
from loratool.algebra.counter import uniform
from tests.ops.adapters import updates

WEIGHTS = [0.75, -0.5]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 30)
        self.second = nn.Linear(30, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def two_adapters(folder: Path, **config: Any) -> PeftModel:
    """A model with adapters one and two, saved in folders of those names."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"]} | config
    model = get_peft_model(Model(), LoraConfig(**settings), adapter_name="one")
    model.add_adapter("two", LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def by_peft(model: PeftModel, weights: list[float], **how: Any) -> dict[str, torch.Tensor]:
    model.add_weighted_adapter(["one", "two"], weights, "combined", **how)
    return {
        name: getattr(model.base_model.model, name).get_delta_weight("combined").double()
        for name in ("first", "second")
    }


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(
        float((found[name] - expected[name]).norm()) < 1e-4 * float(expected[name].norm())
        for name in expected
    )


def test_cat_is_pefts(tmp_path: Path) -> None:
    expected = by_peft(two_adapters(tmp_path), WEIGHTS, combination_type="cat")
    lt.combine(
        [tmp_path / "one", tmp_path / "two"], tmp_path / "out", weights=WEIGHTS, method="cat"
    )
    assert close(updates(tmp_path / "out"), expected)


@pytest.mark.parametrize("rank", [3, 8])
def test_svd_is_pefts(tmp_path: Path, rank: int) -> None:
    model = two_adapters(tmp_path)
    expected = by_peft(model, WEIGHTS, combination_type="svd", svd_rank=rank)
    lt.combine([tmp_path / "one", tmp_path / "two"], tmp_path / "out", weights=WEIGHTS, rank=rank)
    assert close(updates(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("theirs", "ours", "given"),
    [
        ("ties_svd", "ties", {"majority": "total"}),
        ("ties_svd", "ties", {"majority": "frequency"}),
        ("magnitude_prune_svd", "magnitude_prune", {}),
    ],
)
def test_elementwise_methods_are_pefts(
    tmp_path: Path, theirs: str, ours: str, given: dict[str, Any]
) -> None:
    """At equal weights: PEFT's ties divides by how many agree, ours by the sum of their weights,
    and PEFT elects signs before it applies weights, which mergekit and we do not. Density 0.45 of
    both shapes is a whole number of elements, so that ties in rank do not decide."""
    model = two_adapters(tmp_path)
    majority = {"majority_sign_method": given["majority"]} if given else {}
    how = {"combination_type": theirs, "svd_rank": 6, "density": 0.45, **majority}
    expected = by_peft(model, [1.0, 1.0], **how)
    paths = [tmp_path / "one", tmp_path / "two"]
    lt.combine(paths, tmp_path / "out", method=ours, density=0.45, rank=6, **given)
    assert close(updates(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("theirs", "ours", "given"),
    [
        ("dare_linear_svd", "dare_linear", {}),
        ("dare_ties_svd", "dare_ties", {"normalize": True}),
    ],
)
def test_random_methods_are_pefts_with_the_same_masks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    theirs: str,
    ours: str,
    given: dict[str, Any],
) -> None:
    """PEFT's dare_ties divides by how many agree, which ours does when asked to normalise."""
    model = two_adapters(tmp_path)
    drawn = iter(f"0:{name}.weight:{i}" for name in ("first", "second") for i in range(2))

    def bernoulli(chances: torch.Tensor, **_: Any) -> torch.Tensor:
        rows, columns = chances.shape
        numbers = uniform(0, rows, columns, next(drawn), chances.device)
        return (numbers < chances.double()).to(chances.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    expected = by_peft(model, [1.0, 1.0], combination_type=theirs, svd_rank=24, density=0.5)
    paths = [tmp_path / "one", tmp_path / "two"]
    lt.combine(paths, tmp_path / "out", method=ours, density=0.5, rank=24, **given)
    assert close(updates(tmp_path / "out"), expected)


def test_rslora_is_where_peft_goes_wrong(tmp_path: Path) -> None:
    """PEFT writes lora_alpha = rank and keeps use_rslora, which multiplies by √rank once more."""
    model = two_adapters(tmp_path, use_rslora=True)
    theirs = by_peft(model, [1.0, 1.0], combination_type="cat")
    lt.combine([tmp_path / "one", tmp_path / "two"], tmp_path / "out", method="cat")
    found = updates(tmp_path / "out")
    one, two = updates(tmp_path / "one"), updates(tmp_path / "two")
    assert close(found, {name: one[name] + two[name] for name in one})
    ratio = float(theirs["first"].norm() / found["first"].norm())
    assert ratio == pytest.approx(8**0.5, rel=1e-4)


def test_peft_loads_the_result(tmp_path: Path) -> None:
    model = two_adapters(tmp_path)
    lt.combine(
        [tmp_path / "one", tmp_path / "two"], tmp_path / "out", weights=WEIGHTS, method="cat"
    )
    torch.manual_seed(0)
    base = Model()
    x = torch.randn(5, 24)
    expected = by_peft(model, WEIGHTS, combination_type="cat")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    for name, delta in expected.items():
        found = getattr(loaded.base_model.model, name).get_delta_weight("default").double()
        assert float((found - delta).norm()) < 1e-5 * float(delta.norm())
    assert loaded(x).shape == (5, 24)
