"""The tests of pages can fail: each fault they look for, on a page that has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.web.browsing import NARROW
from tests.web.reports import Opened

pytestmark = pytest.mark.web

SOUND = "<!doctype html><html lang=en><title>t</title><main><h1>Title</h1><p>Text.</p></main>"


def page(folder: Path, body: str) -> Path:
    path = folder / "page.html"
    path.write_text(SOUND.replace("<p>Text.</p>", body), encoding="utf-8")
    return path


def test_a_sound_page_has_no_fault(opened: Opened, tmp_path: Path) -> None:
    seen = opened(page(tmp_path, "<p>Text.</p>"), width=NARROW)
    seen.check_quiet()
    assert seen.faults() == []
    assert seen.overflow() == []


@pytest.mark.parametrize(
    "body",
    [
        "<img src='http://127.0.0.1:9/a.png' alt=a>",
        "<img src='neighbour.png' alt=a>",
        "<script>fetch('http://127.0.0.1:9/').catch(() => 0)</script>",
        "<script>new WebSocket('ws://127.0.0.1:9/')</script>",
        "<style>@import 'http://127.0.0.1:9/a.css';</style>",
        "<script>console.error('no')</script>",
        "<script>console.warn('no')</script>",
        "<script>throw new Error('no')</script>",
        "<script>Promise.reject('no')</script>",
        "<script>alert(1)</script>",
        "<script>window.hacked = 1</script>",
        "<script>window.open('about:blank')</script>",
    ],
)
def test_what_a_page_must_not_do_is_seen(body: str, opened: Opened, tmp_path: Path) -> None:
    seen = opened(page(tmp_path, body))
    seen.page.wait_for_timeout(200)
    with pytest.raises(AssertionError):
        seen.check_quiet()


@pytest.mark.parametrize(
    "body",
    [
        "<button></button>",
        "<p style='color: #bbb; background: #fff'>Pale.</p>",
        "<input>",
        "<img src='data:,'>",
        "<p role=nonsense>Text.</p>",
    ],
)
def test_faults_of_accessibility_are_seen(body: str, opened: Opened, tmp_path: Path) -> None:
    assert opened(page(tmp_path, body)).faults() != []


def test_overflow_is_seen(opened: Opened, tmp_path: Path) -> None:
    wide = "<div style='width: 400px'>Wide.</div>"
    assert opened(page(tmp_path, wide), width=NARROW).overflow() != []
    boxed = f"<div style='overflow-x: auto' tabindex=0>{wide}</div>"
    assert opened(page(tmp_path, boxed), width=NARROW).overflow() == []
