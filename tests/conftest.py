"""Shared fixtures. Files that nobody here made are read from ../shared/data where it exists."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tests run side by side; threads of theirs would only fight
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.pop("COLUMNS", None)  # test runners set it for their workers; output would follow

# New cases are found while developing; a change is judged on the same ones every time.
# No test is timed: a busy machine is not a fault.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("here", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real adapters and text; skips where the checkout stands alone."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs ../shared/data, which this checkout does not have")
    return SHARED_DATA


@pytest.fixture
def example_pair() -> Path:
    """examples/e2e, with base/ and tuned/."""
    return REPOSITORY / "examples" / "e2e"
