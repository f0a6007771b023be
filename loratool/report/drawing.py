"""The charting library, used without a network: Vega, through vl-convert (extra ``report``)."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from typing import Any

from loratool.errors import MissingExtra

_ID = re.compile(r"(?<=[\"#])(gradient_|clip)\d+(?=[\")])")

Spec = dict[str, Any]


def require_drawing() -> None:
    """Raises MissingExtra where the extra is not installed."""
    if find_spec("vl_convert") is None:
        raise MissingExtra(
            "pages and pictures need vl-convert, which is not installed",
            hint="pip install 'vl-convert-python>=1.7', or loratool with its extra: report",
        )


@cache
def library() -> str:
    """JavaScript that defines ``vegaEmbed``, with all that it needs; it ends no script element."""
    require_drawing()
    from vl_convert import javascript_bundle

    code = javascript_bundle("window.vegaEmbed=vegaEmbed;")
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def png(spec: Spec, scale: float = 2.0) -> bytes:
    """A picture of a Vega-Lite specification that holds its data."""
    require_drawing()
    from vl_convert import vegalite_to_png

    return vegalite_to_png(spec, scale=scale, allowed_base_urls=[])


def svg(spec: Spec) -> bytes:
    """The same as SVG, in UTF-8."""
    require_drawing()
    from vl_convert import vegalite_to_svg

    return _renumbered(vegalite_to_svg(spec, allowed_base_urls=[])).encode("utf-8")


def _renumbered(text: str) -> str:
    """With ids counted from 0: the library goes on counting from one picture to the next."""
    known: dict[str, str] = {}
    return _ID.sub(lambda found: known.setdefault(found[0], f"{found[1]}{len(known)}"), text)
