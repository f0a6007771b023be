"""What reaches a terminal: quick help, no escape codes in pipes, no names that steer it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratool.cli.main import main
from loratool.cli.output import printable
from tests.builders import GPT2_CONFIG, gpt2_weights, lora_factors, write_checkpoint, write_peft
from tests.cli.failures import C_ATTN, extract_setup, merge_setup
from tests.cli.invoke import invoke

WHAT_WAS_IMPORTED = """
import sys
from loratool.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print(ended.code, sorted(set(sys.modules) & {"torch", "numpy", "huggingface_hub", "rich"}))
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["merge", "--help"], ["merge", "--json"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WHAT_WAS_IMPORTED, *arguments], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == ("2 []" if "--json" in arguments else "0 []")


def test_help_names_every_command_and_exit_code() -> None:
    ended = invoke("--help")
    assert ended.code == 0
    for word in ("extract", "merge", "inspect", "push", "130", "70"):
        assert word in ended.out


ESCAPE = "\x1b"


def test_a_pipe_gets_no_escape_codes(tmp_path: Path) -> None:
    """However colourful the terminal behind it says it is."""
    extract_setup(tmp_path)
    paths = [str(tmp_path / "base"), str(tmp_path / "tuned")]
    variables = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "inspect", *paths, "-v"],
        capture_output=True,
        text=True,
        env=variables | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "120"},
    )
    assert done.returncode == 0
    assert C_ATTN in done.stdout
    assert ESCAPE not in done.stdout + done.stderr


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_no_color_is_honoured_by_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = extract_setup(tmp_path)[1:3]
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        main(["inspect", str(base)])
    assert "parameters" in terminal.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*[34]\d", terminal.getvalue()), "a colour"


BIDI = "a\u202eb\u2066c"
HOSTILE_NAMES = {
    "right-to-left override": BIDI,
    "zero width": "a\u200bb",
    "line separator": "a\u2028b",
    "no-break space": "a\u00a0b",
    "private use": "a\ue000b",
    "console markup": "[red]a[/red]",
    "an emoji of rich": "a:smiley:b",
}


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def test_names_from_headers_are_shown_and_do_not_steer(name: str, tmp_path: Path) -> None:
    weights = gpt2_weights() | {f"{name}.weight": torch.ones(2, 2)}
    write_checkpoint(tmp_path / "base", weights, GPT2_CONFIG)
    ended = invoke("inspect", tmp_path / "base", "-v")
    assert ended.code == 0
    check_harmless(ended.out, name)
    document = json.loads(invoke("inspect", tmp_path / "base", "--json").out)
    assert f"{name}.weight" in {tensor["name"] for tensor in document["tensors"]}


@pytest.mark.parametrize("options", [[], ["--debug"], ["-v"]])
def test_names_in_errors_do_not_steer_either(options: list[str], tmp_path: Path) -> None:
    merge_setup(tmp_path)
    factors = lora_factors(BIDI, 24, 8, 2)
    write_peft(tmp_path / "adapter", factors)
    arguments = ["merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out"]
    ended = invoke(*arguments, *options)
    assert ended.code == 4
    check_harmless(ended.err, BIDI)
    ended = invoke(*arguments, "--include", f"{BIDI}*", "--include", "no\x1b[31m", *options)
    assert ended.code == 4
    check_harmless(ended.err, "no\x1b[31m")


@pytest.mark.parametrize("options", [[], ["--debug"]])
def test_a_shard_name_does_not_steer(options: list[str], tmp_path: Path) -> None:
    """Some names reach messages by way of the file system."""
    name = f"m\x1b[2J{BIDI}.safetensors"
    save_file({"w": torch.ones(2)}, tmp_path / name)
    (tmp_path / name).write_bytes(b"short")
    ended = invoke("inspect", tmp_path / name, *options)
    assert ended.code == 3
    check_harmless(ended.err, BIDI)


def test_an_adapters_config_does_not_steer(tmp_path: Path) -> None:
    factors = lora_factors(C_ATTN, 24, 8, 2)
    write_peft(tmp_path / "adapter", factors, base_model_name_or_path="x\x1b[2J\u202ey")
    ended = invoke("inspect", tmp_path / "adapter")
    assert ended.code == 0
    check_harmless(ended.out, "x\x1b[2J\u202ey")


def check_harmless(text: str, name: str) -> None:
    """All of it printable, and the name there in its escaped form."""
    assert printable(name) in text.replace("\n", "")
    assert all(char.isprintable() or char == "\n" for char in text)


def test_printable_shows_what_it_hides() -> None:
    assert printable("plain über 名前") == "plain über 名前"
    assert printable("\x1b[31m\u202e\x9b\ud800\n") == "\\x1b[31m\\u202e\\x9b\\ud800\\n"


def test_a_narrow_ascii_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stdout can hold only ASCII, the report still comes, with escapes for the rest."""
    base, tuned = extract_setup(tmp_path)[1:3]
    monkeypatch.setenv("COLUMNS", "40")
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", pipe)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(base), str(tuned)])
    assert ended.value.code == 0
    pipe.seek(0)
    assert "\\u2016W" in pipe.read()
