"""combine --weights-from: a real command, a real search, interrupted and gone on with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

import loratool as lt
from loratool.errors import InputError, OutputError, UsageError
from tests.builders import snapshot
from tests.cli.invoke import invoke
from tests.ops.adapters import adapter, updates

SCORER = '''
"""How far an adapter's first update is from 0.8 of a's and -0.4 of b's."""
import json, struct, sys
from pathlib import Path

def tensors(folder):
    raw = (Path(folder) / "adapter_model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    for name, info in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            start, stop = info["data_offsets"]
            data = raw[8 + size + start : 8 + size + stop]
            yield name, info["shape"], struct.unpack(f"<{len(data) // 4}f", data)

def update(folder):
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    found = {name.split(".")[-2]: (shape, values) for name, shape, values in tensors(folder)}
    (rank, into), a = found["lora_A"]
    (out, _), b = found["lora_B"]
    scale = config["lora_alpha"] / rank
    return [
        scale * sum(b[i * rank + k] * a[k * into + j] for k in range(rank))
        for i in range(out) for j in range(into)
    ]

calls = Path("calls")
calls.write_text(str(int(calls.read_text()) + 1) if calls.exists() else "1")
if Path("limit").exists() and int(calls.read_text()) > int(Path("limit").read_text()):
    sys.exit("stopped for now")
target = [0.8 * x - 0.4 * y for x, y in zip(update("a"), update("b"))]
print("some words")
print(sum((x - y) ** 2 for x, y in zip(update(sys.argv[-1]), target)))
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two adapters of one small matrix, and the command that scores them."""
    for name, seed in (("a", 0), ("b", 50)):
        adapter(tmp_path / name, 2, seed, modules={"h.0.q": (5, 4)})
    (tmp_path / "score.py").write_text(SCORER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = [sys.executable, "-S", "-E", "score.py"]


def calls(folder: Path) -> int:
    return int((folder / "calls").read_text())


def test_the_best_weights_are_found_and_written_down(here: Path) -> None:
    command = " ".join(COMMAND)
    ended = invoke(
        "combine", "a", "b", "-o", "out", "--method", "cat", "--weights-from", command,
        "--trials", "45", "--penalty", "0", "--write-recipe", "r.yaml",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "trial 1: weights 1 1, score " in ended.err
    report = json.loads((here / "out" / "loratool_report.json").read_text())
    assert report["search"]["best"]["weights"] == pytest.approx([0.8, -0.4], abs=0.05)
    assert report["search"]["trials"] == len(report["search"]["scores"]) == calls(here) <= 45
    one, two, both = (updates(here / name)["h.0.q"] for name in ("a", "b", "out"))
    assert float((both - 0.8 * one + 0.4 * two).norm()) < 0.1 * float(both.norm())
    rows = yaml.safe_load((here / "r.yaml").read_text())["adapters"]
    assert [row["weight"] for row in rows] == report["search"]["best"]["weights"]
    assert {path.name for path in here.iterdir()} == {
        "a", "b", "out", "r.yaml", "score.py", "calls",
    }  # fmt: skip


def test_a_penalty_pulls_towards_nothing(here: Path) -> None:
    found = []
    for name, penalty in (("free", 0.0), ("bound", 1000.0)):
        lt.combine(["a", "b"], name, method="cat", weights_from=COMMAND, trials=16, penalty=penalty)
        report = json.loads((here / name / "loratool_report.json").read_text())
        found.append(sum(map(abs, report["search"]["best"]["weights"])))
    assert found[1] < 0.8 * found[0]


def test_an_interrupted_search_goes_on(here: Path) -> None:
    """To the same bytes, asking the command for nothing twice."""
    options = {"method": "cat", "weights_from": COMMAND, "trials": 14}
    lt.combine(["a", "b"], "straight", **options)  # type: ignore[arg-type]
    total = calls(here)
    (here / "calls").unlink()
    (here / "limit").write_text("8")
    with pytest.raises(InputError, match="ended with 1") as raised:
        lt.combine(["a", "b"], "out", **options)  # type: ignore[arg-type]
    assert "stopped for now" in raised.value.details
    assert len((here / "out.trials.jsonl").read_text().splitlines()) == 9
    (here / "limit").unlink()
    with open(here / "out.trials.jsonl", "a") as log:  # killed in the middle of a line
        log.write('{"weights": [0.1')
    lt.combine(["a", "b"], "out", **options)  # type: ignore[arg-type]
    assert calls(here) == total + 1
    files = [here / name / "adapter_model.safetensors" for name in ("straight", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (here / "out.trials.jsonl").exists()


def test_scores_of_another_search_are_not_used(here: Path) -> None:
    (here / "limit").write_text("3")
    with pytest.raises(InputError):
        lt.combine(["a", "b"], "out", weights_from=COMMAND)
    for weights, content in (([1.0, 0.5], None), ([1.0, 1.0], "not ours")):
        if content:
            (here / "out.trials.jsonl").write_text(content)
        before = (here / "out.trials.jsonl").read_text()
        with pytest.raises(OutputError, match="another search"):
            lt.combine(["a", "b"], "out", weights=weights, weights_from=COMMAND)
        assert (here / "out.trials.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        ("", UsageError, "is empty"),
        ("'unfinished", UsageError, "cannot be read"),
        ("no-such-program", InputError, "cannot be run: no-such-program"),
        ("echo words", InputError, "printed no number"),
        ("false", InputError, "ended with 1"),
        ([sys.executable, "-S", "-c", "print('nan')"], InputError, "no finite number for any"),
    ],
)
def test_commands_that_do_not_score(
    here: Path, command: str, error: type[Exception], message: str
) -> None:
    before = set(snapshot(here))
    with pytest.raises(error, match=message):
        lt.combine(["a", "b"], "out", weights_from=command, trials=3)
    left = {"out.trials.jsonl"} if "no finite" in message else set()
    assert set(snapshot(here)) - before == left
