"""Every system of the paper through every command: six rows, by name.

``pytest -v`` shows them: test_true_names[gpt3-175b-merge] and so on, from thin models with true
names; test_true_size the same in full size, of which GPT-3's are in test_gpt3.py.
"""

from __future__ import annotations

import pytest

from loratool.ops.estimate import known_models
from tests.systems.checks import CHECKS
from tests.systems.conftest import Rows
from tests.systems.rows import SYSTEMS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
FULL_SIZE = ("roberta-base", "roberta-large", "gpt2-medium", "gpt2-large", "deberta-xxl")


def test_every_system_has_a_row() -> None:
    assert set(SYSTEMS) == set(known_models())


@pytest.mark.parametrize(
    ("name", "command"),
    [pytest.param(name, command, id=f"{name}-{command}") for name in SYSTEMS for command in CHECKS],
)
def test_true_names(name: str, command: str, thin: Rows) -> None:
    CHECKS[command](thin(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "command"),
    [
        pytest.param(name, command, id=f"{name}-{command}")
        for name in FULL_SIZE
        for command in CHECKS
        if (name, command) != ("deberta-xxl", "deploy")  # 13 GB of it in float32
    ],
)
def test_true_size(name: str, command: str, full_size: Rows) -> None:
    CHECKS[command](full_size(name))
