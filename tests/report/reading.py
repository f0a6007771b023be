"""A page read by the standard library's parser, as a browser would find it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "input", "br", "img"}


@dataclass
class Element:
    """A tag with its attributes and the text directly or indirectly inside it."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        found = [self] if self.tag == tag else []
        for child in self.children:
            found += child.all(tag)
        return found

    def by_id(self, wanted: str) -> Element:
        (found,) = [one for one in self.walk() if one.attributes.get("id") == wanted]
        return found

    def walk(self) -> list[Element]:
        found = [self]
        for child in self.children:
            found += child.walk()
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def read(text: str) -> Element:
    """The document's tree; every element must be closed where it was opened."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


def data_of(root: Element) -> dict[str, Any]:
    """What the page's script gets."""
    found: dict[str, Any] = json.loads(root.by_id("page-data").text)
    return found


def table_of(root: Element) -> list[list[str]]:
    """The cells of the page's rows."""
    (body,) = root.by_id("rows").all("tbody")
    return [
        [cell.text for cell in row.children if cell.tag in ("td", "th")] for row in body.all("tr")
    ]
