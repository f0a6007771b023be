"""A Hub on loopback, an adapter to push to it, and the real command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub.hub_adapters import make_adapter
from tests.hub.hub_processes import PreparedProcess, Result, run
from tests.hub.hub_server import running_hub
from tests.hub.hub_state import Hub


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreparedProcess]:
    with PreparedProcess(tmp_path_factory.mktemp("runs")) as process:
        yield process


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as running:
        yield running


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """What a child process needs to talk to the test Hub and to nothing else."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {
        **inherited,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_TOKEN": "hf_alice",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def push(
    prepared: PreparedProcess, environment: dict[str, str], adapter: Path
) -> Callable[..., Result]:
    """``loratool push ADAPTER OWNER/NAME OPTIONS…`` as a user runs it."""

    def run(repo_id: str = "alice/lora", *options: str, **variables: str | None) -> Result:
        folder = Path(variables.pop("folder", None) or adapter)
        return prepared.run(["push", str(folder), repo_id, *options], {**environment, **variables})

    return run


@pytest.fixture
def python(environment: dict[str, str]) -> Callable[..., Result]:
    """The interpreter in a process of its own, beside the test Hub."""
    return lambda *arguments: run([sys.executable, *arguments], environment)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A PEFT adapter with a report: two matrices at ranks 4 and 2, one norm stored whole."""
    return make_adapter(tmp_path / "adapter")
