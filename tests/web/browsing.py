"""One page in a browser, and everything it did that a report must not do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NARROW, WIDE = 360, 1280


@dataclass
class Visit:
    """An open page. requests: every address it asked for, its own included. complaints: errors and
    warnings of the console, exceptions, dialogs, windows it opened."""

    page: Any
    address: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def check_quiet(self) -> None:
        """Nothing asked for but the file itself, nothing complained of, nothing from a name run."""
        assert self.requests == [self.address]
        assert self.complaints == []
        assert self.page.evaluate("'hacked' in window") is False

    def overflow(self) -> list[str]:
        """What reaches beyond the window to the right, where the page would have to be scrolled
        for it; what lies in a box that scrolls by itself does not."""
        found: list[str] = self.page.evaluate(_OVERFLOW)
        return found

    def faults(self) -> list[str]:
        """What axe-core calls a serious or critical fault, with where it is."""
        from axe_playwright_python.sync_playwright import Axe

        violations = Axe().run(self.page).response["violations"]
        return [
            f"{violation['id']}: {node['html'][:120]} {node.get('failureSummary', '')[:300]}"
            for violation in violations
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]


_OVERFLOW = """() => {
  const wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= wide) return [];
  const boxed = e => e && (getComputedStyle(e).overflowX !== 'visible' || boxed(e.parentElement));
  return [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > wide + 0.5 && !boxed(e.parentElement))
    .map(e => `${e.tagName.toLowerCase()}#${e.id}.${e.className.baseVal ?? e.className}`)
    .concat('the page');
}"""


@contextmanager
def visit(
    browser: Any,
    path: Path,
    *,
    width: int = WIDE,
    height: int = 900,
    scheme: str = "light",
    media: str = "screen",
    scripts: bool = True,
) -> Iterator[Visit]:
    """Open a file in a window of its own. scheme: the colours the reader prefers."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        java_script_enabled=scripts,
        offline=True,
    )
    try:
        page = context.new_page()
        page.set_default_timeout(60_000)
        seen = Visit(page, path.as_uri())
        context.on("request", lambda request: seen.requests.append(request.url))
        context.on("page", lambda _: seen.complaints.append("a window was opened"))
        page.on(
            "console",
            lambda said: (
                seen.complaints.append(f"{said.type}: {said.text}")
                if said.type in ("error", "warning", "assert")
                else None
            ),
        )
        page.on("pageerror", lambda error: seen.complaints.append(f"exception: {error}"))
        page.on("dialog", lambda dialog: (seen.complaints.append("a dialog"), dialog.dismiss()))
        page.emulate_media(media=media)
        page.goto(path.as_uri())
        yield seen
    finally:
        context.close()
