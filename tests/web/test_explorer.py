"""The rank explorer's numbers against numpy's, from the document of the same command."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tests.web.browsing import Visit
from tests.web.reports import EXPLORED, Made, Opened, Report, ready, settled, show_all_rows, texts

pytestmark = pytest.mark.web

every_explorer = pytest.mark.parametrize("name", EXPLORED)


@dataclass(frozen=True)
class Matrices:
    """What ranks cost and keep. squares: of each matrix's singular values, σ²."""

    squares: list[np.ndarray]
    energies: np.ndarray
    bytes_per_rank: np.ndarray

    @classmethod
    def of(cls, report: Report) -> Matrices:
        document = report.document
        rows = [row for row in report.rows.values() if row["singular_values"]]
        if document["what"] == "pair":
            dtypes = {row["name"]: row["tuned_dtype"] for row in document["tensors"]}
            sizes = [{"BF16": 2, "F32": 4}[dtypes[row["name"]]] for row in rows]
        else:
            sizes = [document["bytes"] / document["parameters"]] * len(rows)
        return cls(
            [np.array(row["singular_values"]) ** 2 for row in rows],
            np.array([row["delta_norm"] for row in rows]) ** 2,
            np.array([sum(row["shape"]) for row in rows]) * np.array(sizes),
        )

    @property
    def most(self) -> int:
        return max(map(len, self.squares))

    def even(self, rank: int) -> np.ndarray:
        """This rank everywhere, or what there is."""
        return np.array([min(rank, len(values)) for values in self.squares])

    def outcome(self, ranks: np.ndarray) -> tuple[float, float]:
        """(relative error, bytes)."""
        kept = [values[:rank].sum() for values, rank in zip(self.squares, ranks, strict=True)]
        missed = np.maximum(0, self.energies - kept).sum()
        return float(np.sqrt(missed / self.energies.sum())), float(ranks @ self.bytes_per_rank)

    def least_error(self, budget: float) -> float:
        """No choice of ranks within ``budget`` bytes has a smaller one: a fraction of the next best
        component is bought with what is left.
        """
        gains = np.concatenate(self.squares)
        costs = np.repeat(self.bytes_per_rank, [len(values) for values in self.squares])
        best = np.argsort(-gains / costs, kind="stable")
        shares = np.clip((budget - np.cumsum(costs[best])) / costs[best] + 1, 0, 1)
        kept = (gains[best] * shares).sum()
        return float(np.sqrt(max(0.0, 1 - kept / self.energies.sum())))


def outcome(seen: Visit) -> tuple[float, float]:
    """(relative error, bytes) that the page states."""
    figure = "document.querySelector('#outcome [data-figure={}]').dataset.value"
    error, nbytes = (float(seen.page.evaluate(figure.format(one))) for one in ("error", "bytes"))
    return error, nbytes


def chosen_ranks(seen: Visit) -> np.ndarray:
    """Of the matrices with a spectrum, in the order of the document, from the table."""
    show_all_rows(seen)
    return np.array([int(cell) for cell in texts(seen, "#rows tbody td:last-child") if cell])


def close(expected: tuple[float, float]) -> tuple[object, object]:
    """The page holds eight digits of each singular value."""
    return pytest.approx(expected[0], rel=1e-5, abs=2e-4), pytest.approx(expected[1])


@every_explorer
def test_one_rank_for_all_costs_and_loses_what_numpy_says(
    name: str, made: Made, opened: Opened
) -> None:
    seen = ready(opened(made(name).page))
    matrices = Matrices.of(made(name))
    for rank in sorted({0, 1, 2, matrices.most // 2, matrices.most}):
        seen.page.locator("#rank-number").fill(str(rank))
        settled(seen)
        expected = matrices.outcome(matrices.even(rank))
        assert outcome(seen) == close(expected)
        assert chosen_ranks(seen).tolist() == matrices.even(rank).tolist()
        if expected[0] > 1e-2:
            assert f"{100 * outcome(seen)[0]:.2f} %" in seen.page.locator("#outcome").inner_text()
    seen.check_quiet()


@every_explorer
def test_a_size_is_spent_almost_as_well_as_can_be(name: str, made: Made, opened: Opened) -> None:
    seen = ready(opened(made(name).page))
    matrices = Matrices.of(made(name))
    seen.page.locator("input[name=mode][value=budget]").check()
    largest_part = max(values[0] for values in matrices.squares) / matrices.energies.sum()
    errors = []
    for position in (0, 300, 600, 1000):
        seen.page.locator("#budget").evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }",
            position,
        )
        settled(seen)
        error, nbytes = outcome(seen)
        assert (error, nbytes) == close(matrices.outcome(chosen_ranks(seen)))
        least = matrices.least_error(nbytes)
        assert least - 2e-4 <= error <= np.sqrt(least**2 + largest_part)
        even = matrices.even(int(nbytes // matrices.bytes_per_rank.sum()))
        assert error <= matrices.outcome(even)[0] + 2e-4
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] - errors[-1] > 0.1
    seen.check_quiet()


def test_the_slider_and_the_number_are_one(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("example").page))
    slider, number = seen.page.locator("#rank"), seen.page.locator("#rank-number")
    slider.focus()
    before = int(number.input_value())
    seen.page.keyboard.press("ArrowRight")
    settled(seen)
    assert int(number.input_value()) == int(slider.input_value()) == before + 1
    assert f"rank {before + 1}" in slider.get_attribute("aria-valuetext")
    assert set(chosen_ranks(seen)) == {before + 1}
    number.fill("3")
    settled(seen)
    assert slider.input_value() == "3"


@pytest.mark.parametrize("typed", ["", "-5", "1e9", "2.5", "999"])
def test_a_rank_that_is_none_is_harmless(typed: str, made: Made, opened: Opened) -> None:
    seen = ready(opened(made("example").page))
    seen.page.locator("#rank-number").fill(typed)
    settled(seen)
    matrices = Matrices.of(made("example"))
    ranks = chosen_ranks(seen)
    assert outcome(seen) == close(matrices.outcome(ranks))
    assert len(ranks) == len(matrices.squares)
    seen.check_quiet()


def test_the_map_shows_the_ranks_chosen(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("example").page))
    seen.page.locator("#metric").select_option("chosen")
    seen.page.locator("input[name=mode][value=budget]").check()
    settled(seen)
    ranks = dict(
        zip(texts(seen, "#rows tbody th"), texts(seen, "#rows tbody td:last-child"), strict=True)
    )
    for cell in seen.page.locator("#map button").all():
        name, _, text = cell.get_attribute("aria-label").rpartition(": rank chosen ")
        assert text == (ranks[name] or "not known")
    assert len(set(ranks.values())) > 3
