"""Which view makes a page of which report. A new kind of report is one file here and its line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loratool.errors import UsageError
from loratool.layouts.families import natural, without_common_start
from loratool.ops.amplification import AmplificationReport
from loratool.ops.compare_report import CompareReport
from loratool.ops.inspect_adapter import AdapterReport
from loratool.ops.inspect_adapters import AdaptersReport
from loratool.ops.inspect_checkpoint import CheckpointReport
from loratool.ops.inspect_forecast import ForecastReport
from loratool.ops.inspect_pair import PairReport
from loratool.ops.intruders import IntruderReport
from loratool.ops.views.adapter import adapter_page
from loratool.ops.views.adapters import adapters_page
from loratool.ops.views.amplification import amplification_page
from loratool.ops.views.checkpoint import checkpoint_page
from loratool.ops.views.compare import compare_page
from loratool.ops.views.forecast import forecast_page
from loratool.ops.views.intruders import intruders_page
from loratool.ops.views.pair import pair_page
from loratool.report.page import Page

Viewable = (
    AdapterReport
    | AdaptersReport
    | AmplificationReport
    | CheckpointReport
    | CompareReport
    | ForecastReport
    | IntruderReport
    | PairReport
)

VIEWS: dict[type, Callable[[Any], Page]] = {
    AdapterReport: adapter_page,
    AdaptersReport: adapters_page,
    AmplificationReport: amplification_page,
    CheckpointReport: checkpoint_page,
    CompareReport: compare_page,
    ForecastReport: forecast_page,
    IntruderReport: intruders_page,
    PairReport: pair_page,
}


def page_of(report: Viewable) -> Page:
    """The page that shows a report. Raises UsageError for a value that is no such report."""
    view = VIEWS.get(type(report))
    if view is None:
        raise UsageError(
            f"a {type(report).__name__} has no page",
            hint="reports of inspect and compare have one",
        )
    return _shortened(_sorted(view(report)))


def _sorted(page: Page) -> Page:
    """With rows and listed names as people count; the rows of each group together."""
    return replace(
        page,
        rows=tuple(sorted(page.rows, key=lambda row: (row.group, natural(row.name)))),
        lists=tuple(
            replace(one, names=tuple(sorted(one.names, key=natural))) for one in page.lists
        ),
    )


def _shortened(page: Page) -> Page:
    """With families as the map names them: without what all begin with, and ``.weight``."""
    names = page.families
    bare = {family: family.removesuffix(".weight") for family in names}
    if len(set(bare.values())) < len(bare):
        bare = {family: family for family in names}
    short = without_common_start(bare.values())
    label = {family: short[bare[family]] for family in names}
    return replace(
        page,
        rows=tuple(replace(row, family=label.get(row.family, row.family)) for row in page.rows),
        still=tuple((label[family], layer) for family, layer in page.still),
    )
