"""The Python API as such: what its arguments may be, and how its errors speak."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool.cli.main import main
from loratool.errors import InputError, OutputError, UsageError
from tests.conftest import REPOSITORY

OPTION = re.compile(r"(?<![\w-])(--[a-z]|-o\b)")
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


def text_of(error: lt.LoratoolError) -> str:
    return "\n".join([error.message, *error.details, error.hint or ""])


def test_errors_name_parameters(pair: tuple[str, str], adapter: str, tmp_path: Path) -> None:
    base, tuned = pair
    out = tmp_path / "out"
    for said, call in (
        ("overwrite=True to replace it, or another output", lambda: lt.extract(*pair, adapter)),
        ("min_rank 9 is above max_rank 3", lambda: lt.extract(*pair, out, min_rank=9, max_rank=3)),
        ("dora=True does not go with into", lambda: lt.extract(*pair, out, dora=True, into=base)),
        ("targets 'zz' matches nothing", lambda: lt.extract(*pair, out, targets="zz")),
        ("name it with adapters", lambda: lt.verify(base, base, [])),
        ("leave base out", lambda: lt.inspect(adapter, base=base, level="headers")),
        (
            "exact=True: goes with level",
            lambda: lt.inspect(base, tuned, level="values", exact=True),
        ),
        ("top 0", lambda: lt.intruders(base, tuned, top=0)),
        ("factor 1", lambda: lt.mitigate(base, tuned, out, factor=1)),
        ("takes no rank\nuse method svd", lambda: lt.combine([adapter], out, method="cat", rank=3)),
        ("components sets its", lambda: lt.combine([adapter], out, method="iso_c", rank=3)),
        ("weight_rules 'x'", lambda: lt.combine([adapter], out, weight_rules="x")),
        ("residual DIR says", lambda: lt.init(base, out, method="pissa")),
        ("fused_parts 'x'", lambda: lt.convert(adapter, out, fused_parts="x")),
        ("pass base_model", lambda: lt.push(adapter, "a/b")),
    ):
        error = error_of(call)
        assert said in text_of(error)
        assert not OPTION.search(text_of(error))
        assert str(error) == error.message


def test_what_the_system_says_is_an_error_of_ours(pair: tuple[str, str], tmp_path: Path) -> None:
    far = "a" * 300
    assert isinstance(error_of(lambda: lt.inspect(far)), InputError)
    assert isinstance(error_of(lambda: lt.extract(*pair, tmp_path / far)), OutputError)


def test_options_of_other_commands_stay(pair: tuple[str, str], adapter: str) -> None:
    """They are no parameters of the function that failed."""
    error = error_of(lambda: lt.inspect(pair[0], adapter))
    assert f"loratool inspect {adapter} --base {pair[0]}" in text_of(error)
    error = error_of(lambda: lt.unmerge(*pair[:1], adapter, "out", receipt=f"{adapter}/nothing"))
    assert "no such receipt" in text_of(error)


def test_the_command_line_names_options(
    pair: tuple[str, str], adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after the same functions have spoken of parameters."""
    error_of(lambda: lt.verify(pair[0], pair[0], []))
    with pytest.raises(SystemExit):
        main(["verify", pair[0], "--base", pair[0]])
    assert "--adapter PATH" in capsys.readouterr().err


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


def test_functions_can_be_pickled() -> None:
    for name in FUNCTIONS:
        function = getattr(lt, name)
        assert pickle.loads(pickle.dumps(function)) is function


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
