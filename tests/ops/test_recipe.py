"""Recipes: everything that decides a result, in a file; and files that try to be clever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import loratool as lt
from loratool.errors import DisagreementError, InputMissing, MalformedFile, OutputExists, UsageError
from tests.builders import snapshot
from tests.cli.invoke import invoke
from tests.ops.adapters import adapter, updates


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three adapters."""
    for seed, name in enumerate("abc"):
        adapter(tmp_path / name, 2 + seed, 50 * seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights_file(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def write(path: Path, body: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(body if isinstance(body, str) else yaml.safe_dump(body))
    return path


def test_what_was_written_makes_the_same_bytes(here: Path) -> None:
    """From another folder, with every kind of option."""
    options: dict[str, Any] = {
        "weights": [0.7, -0.3, 2],
        "method": "dare_ties",
        "density": 0.4,
        "lambda_": 2.0,
        "majority": "frequency",
        "weight_rules": ["mlp=0.5", "2@layers=0,1", "a@q_proj=3"],
        "rank": "energy:0.9",
        "max_rank": 5,
        "multiple_of": 2,
        "dtype": "bfloat16",
        "seed": 7,
        "exclude": ["layers.1.mlp"],
    }
    (here / "elsewhere").mkdir()
    lt.combine(["a", "b", "c"], "out", write_recipe="elsewhere/r.yaml", **options)
    lt.combine_recipe("elsewhere/r.yaml", "elsewhere/out")
    assert weights_file(here / "out") == weights_file(here / "elsewhere" / "out")
    lt.combine(["a", "b", "c"], "other", method="dare_ties", seed=8, density=0.4)
    assert weights_file(here / "out") != weights_file(here / "other")


def test_the_command_line_does_the_same(here: Path) -> None:
    ended = invoke("combine", "a:0.5", "b", "-o", "out", "--rank", "3", "--write-recipe", "r.yaml")
    assert ended.code == 0, ended.err
    assert invoke("combine", "r.yaml", "-o", "again").code == 0
    assert weights_file(here / "out") == weights_file(here / "again")
    body = yaml.safe_load((here / "r.yaml").read_text())
    assert [row["path"] for row in body["adapters"]] == ["a", "b"]
    assert all(len(row["sha256"]) == 64 for row in body["adapters"])


def test_recipes_in_recipes(here: Path) -> None:
    inner = {"method": "cat", "adapters": [{"path": "../b", "weight": 2}, "../c"]}
    write(here / "sub" / "inner.yaml", inner)
    again = {"method": "cat", "adapters": [{"path": "b", "weight": 2}, "c"]}
    for name, nested in (("file", "sub/inner.yaml"), ("inline", again)):
        rows = [{"path": "a"}, {"recipe": nested, "weight": -0.5}]
        write(here / f"{name}.yaml", {"method": "cat", "adapters": rows})
        before = snapshot(here)
        assert invoke("combine", f"{name}.yaml", "-o", f"out-{name}", "--dry-run").code == 0
        assert snapshot(here) == before
        report = lt.combine_recipe(f"{name}.yaml", f"out-{name}")
        new = {path.split("/")[0] for path in set(snapshot(here)) - set(before)}
        assert new == {f"out-{name}"}
        assert str(here) not in str(report.to_json())
        one, two, three = (updates(here / letter) for letter in "abc")
        for module, value in updates(here / f"out-{name}").items():
            expected = one[module] - 0.5 * (2 * two[module] + three[module])
            assert torch.allclose(value, expected, rtol=1e-5, atol=1e-5)
    assert weights_file(here / "out-file") == weights_file(here / "out-inline")


def test_what_lies_between_is_not_rounded_to_16_bits(here: Path) -> None:
    paths = [adapter(here / name, 2, seed, dtype=torch.bfloat16) for seed, name in enumerate("de")]
    rows = [{"path": path.name, "weight": 0.3 + i} for i, path in enumerate(paths)]
    inner = {"method": "cat", "adapters": rows}
    body = {"method": "cat", "dtype": "float32", "adapters": [{"recipe": inner}]}
    lt.combine_recipe(write(here / "r.yaml", body), "out")
    one, two = (updates(path) for path in paths)
    for module, value in updates(here / "out").items():
        expected = 0.3 * one[module] + 1.3 * two[module]
        assert float((value - expected).norm()) < 1e-6 * float(expected.norm())


def test_a_nested_recipe_is_written_out(here: Path) -> None:
    write(here / "inner.yaml", {"adapters": ["b", "c"]})
    write(here / "outer.yaml", {"adapters": ["a", {"recipe": "inner.yaml"}]})
    ended = invoke("combine", "outer.yaml", "-o", "out", "--write-recipe", "flat.yaml")
    assert ended.code == 0, ended.err
    (here / "inner.yaml").unlink()
    lt.combine_recipe("flat.yaml", "again")
    assert weights_file(here / "out") == weights_file(here / "again")


def test_an_adapter_that_changed_is_refused(here: Path) -> None:
    lt.combine(["a", "b"], "out", write_recipe="r.yaml")
    config = here / "b" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))
    with pytest.raises(DisagreementError, match="b: is not the adapter"):
        lt.combine_recipe("r.yaml", "again")


def test_errors_of_what_it_asks_for_name_the_recipe(here: Path) -> None:
    write(here / "r.yaml", {"adapters": ["a", "gone"]})
    with pytest.raises(InputMissing, match="gone"):
        lt.combine_recipe("r.yaml", "out")
    with pytest.raises(InputMissing, match="no such recipe"):
        lt.combine_recipe("none.yaml", "out")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "a mapping is needed"),
        ("- a\n- b\n", "a mapping is needed, not list"),
        ("adapters: [", "is not valid YAML"),
        ("adapters: " + "[" * 5000, "nested more than 60 levels"),
        ("adapters: []", "lists no adapters"),
        ("adapters: a", "lists no adapters"),
        ("adapters: [a]\nmehtod: svd", "unknown key 'mehtod'"),
        ("adapters: [{path: a, wieght: 2}]", "unknown key 'wieght'"),
        ("adapters: [{weight: 2}]", "needs a path or a recipe"),
        ("adapters: [{path: a, recipe: b.yaml}]", "needs a path or a recipe, not both"),
        ("adapters: [{path: a, weight: much}]", "weight 'much' is not a number"),
        ("adapters: [{path: a, weight: .nan}]", "is not a number"),
        ("adapters: [{path: a, weight: true}]", "is not a number"),
        ("adapters: [{path: 3}]", "3 is not a path"),
        ("adapters: [a]\nrank: [3]", "neither a number nor a rule"),
        ("adapters: [a]\nseed: x", "seed 'x'"),
        ("adapters: [a]\nmax_rank: 0", "at least 1"),
        ("adapters: [a]\nparameters: 3", "parameters 3"),
        ("adapters: [a]\nweights: mlp=2", "weights 'mlp=2'"),
        ("adapters: [a]\nweights: [mlp]", "not of the form"),
        ("adapters: [a]\nmethod: tied", "unknown method 'tied'"),
        ("adapters: [a]\nparameters: {density: 0.5}", "svd takes no density"),
        ("adapters: [a]\nmethod: slerp", "exactly 2 adapters"),
        ("adapters: [a]\nsaved: maybe", "choose refuse"),
        ("adapters: [&x {path: a}, *x]", "uses YAML aliases"),
        ("&x\nadapters: [{recipe: *x}]", "uses YAML aliases"),
        ("adapters: [{recipe: r.yaml}]", "includes itself"),
        ("adapters: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        ("adapters: [" + ",".join(["a"] * 1001) + "]", "names more than 1000"),
        ("#" * 200_001, "is over 200,000 bytes"),
    ],
)
def test_recipes_that_make_no_sense(here: Path, body: str, message: str) -> None:
    write(here / "r.yaml", body)
    before = snapshot(here)
    with pytest.raises(MalformedFile, match=message):
        lt.combine_recipe("r.yaml", "out")
    assert snapshot(here) == before


def test_recipes_are_not_followed_forever(here: Path) -> None:
    for i in range(12):
        write(here / f"{i}.yaml", {"adapters": [{"recipe": f"{i + 1}.yaml"}]})
    with pytest.raises(MalformedFile, match="nested more than 8 deep"):
        lt.combine_recipe("0.yaml", "out")


def test_an_option_beside_a_recipe_is_refused(here: Path) -> None:
    write(here / "r.yaml", {"adapters": ["a", "b"]})
    ended = invoke("combine", "r.yaml", "-o", "out", "--seed", "0")
    assert ended.code == 2
    assert "--seed does not go with a recipe" in ended.err


def test_a_recipe_is_written_last_and_over_nothing(here: Path) -> None:
    with pytest.raises(UsageError):
        lt.combine(["a", "b"], "out", method="slurp", write_recipe="r.yaml")
    assert not (here / "r.yaml").exists()
    write(here / "r.yaml", "mine")
    with pytest.raises(OutputExists):
        lt.combine(["a", "b"], "out", write_recipe="r.yaml")
    with pytest.raises(UsageError, match=r"ends in \.yaml"):
        lt.combine(["a", "b"], "out", write_recipe="recipe.txt")
    assert (here / "r.yaml").read_text() == "mine"
