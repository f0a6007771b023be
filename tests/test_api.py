"""The Python API as such: what its arguments may be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import loratool as lt
from loratool.errors import UsageError
from tests.conftest import REPOSITORY

FUNCTIONS = [name for name in lt.__all__ if not isinstance(getattr(lt, name), type)]


@pytest.fixture
def pair(example_pair: Path) -> tuple[str, str]:
    return str(example_pair / "base"), str(example_pair / "tuned")


@pytest.fixture
def adapter(pair: tuple[str, str], tmp_path: Path) -> str:
    lt.extract(*pair, tmp_path / "adapter", rank=2, drop_rest=True)
    return str(tmp_path / "adapter")


def error_of(call: Callable[[], Any]) -> lt.LoratoolError:
    with pytest.raises(lt.LoratoolError) as raised:
        call()
    return raised.value


@pytest.mark.parametrize("jobs", [0, -1])
def test_jobs_are_positive(jobs: int, pair: tuple[str, str], adapter: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for call in (
        lambda: lt.extract(*pair, out, jobs=jobs),
        lambda: lt.merge(pair[0], adapter, out, jobs=jobs),
        lambda: lt.inspect(pair[0], jobs=jobs),
    ):
        assert isinstance(error_of(call), UsageError)
        assert not out.exists()


def test_choices_are_checked(pair: tuple[str, str], adapter: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong: Any = "sideways"
    assert "'sideways'" in error_of(lambda: lt.merge(pair[0], adapter, out, ties=wrong)).message
    assert "'sideways'" in error_of(lambda: lt.recover(pair[0], wrong)).message
    assert "rank 0" in error_of(lambda: lt.inspect(pair[0], cost=[4, 0])).message


def test_a_string_is_one_pattern(pair: tuple[str, str], adapter: str, tmp_path: Path) -> None:
    """Not one for each of its letters."""
    one = lt.extract(*pair, tmp_path / "one", rank=2, include="mlp", drop_rest=True)
    same = lt.extract(*pair, tmp_path / "same", rank=2, include=["mlp"], drop_rest=True)
    assert one.to_json()["tensors"] == same.to_json()["tensors"]
    assert "'hh'" in error_of(lambda: lt.inspect(pair[0], only="hh")).message
    assert "one adapter cannot" in error_of(lambda: lt.compare(adapter)).message


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_described(name: str) -> None:
    """In the function's docstring, or with those that mean the same everywhere; and in api.md."""
    page = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    top, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    here = [text for text in sections if name in text.splitlines()[0].split(", ")]
    here = here or [text for text in sections if f"lt.{name}(" in text]
    function = getattr(lt, name)
    doc = f"{function.__doc__} {lt.__doc__}"
    doc += {
        "merge_in_place": lt.merge.__doc__,
        "mitigate": lt.intruders.__doc__,
    }.get(name) or ""
    for argument, known in inspect.signature(function).parameters.items():
        if known.kind is known.KEYWORD_ONLY:
            assert re.search(rf"\b{argument}\b", doc), argument
            assert re.search(rf"`{argument}[`=]|\b{argument}=", top + "".join(here)), argument


@pytest.mark.parametrize(("start", "stop"), [(-1, 0), (0, 10**6), (5, 4)])
def test_rows_that_are_not_there(start: int, stop: int, pair: tuple[str, str]) -> None:
    """Bytes before and behind a tensor are another's."""
    info = next(iter(lt.open_checkpoint(pair[0]).values()))
    assert info.name in error_of(lambda: info.read_rows(start, stop)).message


def set_usual() -> None:
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.fixture
def defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    if isinstance(request.param, str):
        torch.set_default_device(request.param)
    else:
        torch.set_default_dtype(request.param)
    yield
    set_usual()


@pytest.mark.parametrize("defaults", [torch.bfloat16, torch.float64, "meta"], indirect=True)
def test_the_defaults_of_a_program_change_nothing(
    defaults: None,
    pair: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bfloat16 is what many programs set to load models; compiled loops wrote past the tensors.

    meta stands for a GPU: what is made there cannot be read here.
    """

    def everything(place: Path) -> dict[str, bytes]:
        place.mkdir()
        monkeypatch.chdir(place)  # notes hold paths as they are given
        folder = Path()
        lt.extract(*pair, folder / "a", rank="energy:0.5")
        lt.extract(*pair, folder / "b", rank=2, dora=True)
        lt.merge(pair[0], folder / "a", folder / "merged", receipt=True, lost=True)
        lt.merge(pair[0], folder / "b", folder / "dora")
        lt.unmerge(folder / "merged", folder / "a", folder / "base")
        lt.combine([folder / "a"] * 2, folder / "c", method="sce", include="c_attn", saved="drop")
        lt.resize(folder / "a", folder / "r", rank=2)
        lt.init(pair[0], folder / "i", method="pissa", residual=folder / "residual")
        reports = [
            lt.inspect(*pair),
            lt.inspect(*pair, level="values"),
            lt.inspect(pair[0], level="values"),
            lt.inspect(folder / "a", base=pair[0], level="values"),
            lt.inspect(folder / "a", base=pair[0]),
            lt.compare([folder / "a", folder / "r"]),
            lt.intruders(*pair, top=1),
            lt.verify(folder / "merged", pair[0], folder / "a"),
        ]
        found = {str(index): repr(one.to_json()).encode() for index, one in enumerate(reports)}
        for path in sorted(folder.rglob("*.safetensors")):
            found[str(path.relative_to(folder))] = path.read_bytes()
        return found

    mine = everything(tmp_path / "mine")
    set_usual()
    usual = everything(tmp_path / "usual")
    assert mine.keys() == usual.keys()
    assert [name for name in usual if mine[name] != usual[name]] == []
