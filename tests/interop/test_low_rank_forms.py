"""LoHa and LoKr taken as low-rank updates: against PEFT's own deltas, and through the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, get_peft_model
from torch import Tensor, nn

import loratool as lt
from loratool.adapter import HadamardUpdate, KroneckerUpdate, TensorProduct
from loratool.adapter.forms import form_rank, low_rank_form
from loratool.errors import UnsupportedInput
from loratool.storage.tensors import MemoryTensor
from tests.ops.adapters import adapter, updates


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(60, 48)
        self.conv = nn.Conv2d(16, 24, 3)
        self.line = nn.Conv1d(4, 50, 9)


CONFIGS: dict[str, Any] = {
    "LoHa": LoHaConfig(r=3, alpha=5, target_modules=["wide"], init_weights=False),
    "LoHa, Tucker": LoHaConfig(
        r=3, alpha=5, target_modules=["conv"], use_effective_conv2d=True, init_weights=False
    ),
    "LoKr": LoKrConfig(r=2, alpha=5, target_modules=["wide"], init_weights=False),
    "LoKr, two products": LoKrConfig(
        r=2, alpha=5, target_modules=["wide"], decompose_both=True, init_weights=False
    ),
    "LoKr, Tucker": LoKrConfig(
        r=2, alpha=5, target_modules=["conv"], use_effective_conv2d=True, init_weights=False
    ),
    "LoKr, a whole kernel of one dimension": LoKrConfig(
        r=5, alpha=5, target_modules=["line"], init_weights=False
    ),
}
KERNELS = {"wide.weight": (), "conv.weight": (16, 3, 3), "line.weight": (4, 9)}


def saved(folder: Path, kind: str) -> dict[str, Tensor]:
    """Save a PEFT adapter; its deltas as matrices, by parameter, as PEFT computes them."""
    torch.manual_seed(3)
    model = get_peft_model(Model(), CONFIGS[kind])
    model.save_pretrained(folder)
    found = {}
    for name in CONFIGS[kind].target_modules:
        delta = getattr(model.base_model.model, name).get_delta_weight("default")
        found[name] = delta.detach().flatten(1).double()
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_form_is_pefts_delta(tmp_path: Path, kind: str) -> None:
    expected = saved(tmp_path / "a", kind)
    for name, update in lt.open_adapter(tmp_path / "a").updates.items():
        assert isinstance(update, HadamardUpdate | KroneckerUpdate)
        form = low_rank_form(update)
        assert form is not None
        assert form.rank == form_rank(update)
        delta = expected[name.removesuffix(".weight")]
        assert form.shape == delta.shape
        assert float((form.load().dense() - delta).norm()) < 1e-6 * float(delta.norm())
        assert form.kernel == KERNELS[name]


@pytest.mark.parametrize("kind", CONFIGS)
def test_resized_without_a_cut_it_is_the_same_update(tmp_path: Path, kind: str) -> None:
    expected = saved(tmp_path / "a", kind)
    report = lt.resize(tmp_path / "a", tmp_path / "out", rank="full")
    assert report.relative_error < 1e-6
    assert "are taken as the low-rank updates that they are" in report.notes[0]
    found = updates(tmp_path / "out")
    assert set(found) == set(expected)
    for name, delta in expected.items():
        assert float((found[name] - delta).norm()) < 1e-6 * float(delta.norm())


def test_a_cut_is_the_best_of_its_rank(tmp_path: Path) -> None:
    expected = saved(tmp_path / "a", "LoHa")
    report = lt.resize(tmp_path / "a", tmp_path / "out", rank=4)
    (row,) = report.rows
    sigma = torch.linalg.svdvals(expected["wide"])
    assert row.ranks == (9,)
    assert row.relative_error == pytest.approx(float(sigma[4:].norm() / sigma.norm()), rel=1e-4)


def test_combined_and_compared_with_a_lora(tmp_path: Path) -> None:
    deltas = [saved(tmp_path / name, kind) for name, kind in (("a", "LoHa"), ("b", "LoKr"))]
    plain = adapter(tmp_path / "c", modules={"wide": (48, 60)})
    paths = [tmp_path / "a", tmp_path / "b", plain]
    lt.combine(paths, tmp_path / "out", weights=[1, -0.5, 2], method="cat")
    expected = deltas[0]["wide"] - 0.5 * deltas[1]["wide"] + 2 * updates(plain)["wide"]
    found = updates(tmp_path / "out")["wide"]
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())
    report = lt.compare(paths)
    one, two = deltas[0]["wide"], updates(plain)["wide"]
    cosine = float((one * two).sum() / one.norm() / two.norm())
    pair = next(pair for pair in report.pairs if pair.pair == (0, 2))
    assert pair.cosine == pytest.approx(cosine, rel=1e-4)
    assert any("LoHa" in note for note in report.notes)
    assert not any("not compared" in note for note in report.notes)


def test_factors_larger_than_the_matrix_are_refused_with_a_remedy(tmp_path: Path) -> None:
    config = LoKrConfig(r=64, alpha=5, target_modules=["wide"], init_weights=False)
    get_peft_model(Model(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedInput, match="1 update is not low-rank") as raised:
        lt.resize(tmp_path / "a", tmp_path / "out", rank=4)
    assert "its rank of 48 is too high for a 48×60 matrix" in raised.value.details[0]
    assert "extract" in str(raised.value.hint)


@st.composite
def products(draw: st.DrawFn, rows: int, columns: int) -> TensorProduct:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))

    def tensor(*shape: int) -> MemoryTensor:
        return MemoryTensor(torch.randn(shape, generator=generator).to(dtype))

    r = draw(st.integers(1, 3))
    if draw(st.booleans()):
        return TensorProduct((tensor(rows, columns),))
    return TensorProduct((tensor(rows, r), tensor(r, columns)))


@given(st.data(), *(st.integers(1, 5) for _ in range(4)))
def test_any_shapes_and_dtypes(data: st.DataObject, a: int, c: int, b: int, d: int) -> None:
    """Against the outer product of the dense factors, to float64's rounding."""
    first, second = data.draw(products(a, c)), data.draw(products(b, d))
    update = KroneckerUpdate(first, second, 0.75, 1.0)
    form = low_rank_form(update)
    if form is None:
        assert form_rank(update) * (a * b + c * d) > a * b * c * d
        return
    one, two = (dense(product) for product in (first, second))
    expected = 0.75 * torch.kron(one, two)
    size = float(one.abs().sum() * two.abs().sum()) + 1
    assert float((form.load().dense() - expected).abs().max()) < 1e-14 * size


def dense(product: TensorProduct) -> Tensor:
    parts = [factor.read().double() for factor in product.factors]
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]


def test_bf16_factors_lose_nothing() -> None:
    """Products of two bf16 values have at most 16 bits."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(*shape, generator=generator).bfloat16() for shape in ((8, 2), (2, 9)) * 2]
    first, second = (TensorProduct(tuple(map(MemoryTensor, parts[i : i + 2]))) for i in (0, 2))
    form = low_rank_form(HadamardUpdate(first, second, 1.0, 1.0))
    assert form is not None
    for factor in (form.b.read(), form.a.read()):
        assert torch.equal(factor.float().double(), factor)
