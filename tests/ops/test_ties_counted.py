"""A matrix that is stored under two names is one in every total."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

import loratool as lt
from loratool.hub.extraction import extraction_section
from loratool.ops.inspect_pair import inspect_pair
from tests.ops.builders import LLAMA, llama_like, moved, save_folder

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Pair(NamedTuple):
    base: Path
    tuned: Path


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Pair, Pair]:
    """The same model, with its tied table stored once and twice."""
    config = LLAMA | {"tie_word_embeddings": True}
    sides = {"base": llama_like(), "tuned": moved(llama_like())}
    found = []
    for times in ("once", "twice"):
        folders = []
        for side, state in sides.items():
            once = {name: value for name, value in state.items() if name != HEAD}
            again = {HEAD: state[TABLE].clone()} if times == "twice" else {}
            folders.append(save_folder(once | again, tmp_path / times / side, config))
        found.append(Pair(*folders))
    return found[0], found[1]


@pytest.mark.parametrize("drop_rest", [False, True])
def test_in_an_extraction_and_in_what_is_verified_of_it(
    pairs: tuple[Pair, Pair], drop_rest: bool
) -> None:
    once, twice = (
        lt.extract(*pair, pair.base.parent / "a", rank=2, drop_rest=drop_rest) for pair in pairs
    )
    assert once.energy == pytest.approx(twice.energy, rel=1e-12)
    assert once.relative_error == pytest.approx(twice.relative_error, rel=1e-12)
    assert once.left_out_share == pytest.approx(twice.left_out_share, rel=1e-12)
    assert {row.name: row.tied_to for row in twice.rows if row.tied_to} == {HEAD: TABLE}
    claims = [lt.verify_adapter(pair.base.parent / "a", *pair) for pair in pairs]
    assert claims[0].relative_error == pytest.approx(claims[1].relative_error, rel=1e-9)
    shares = [
        {status: claim.share(status) for status in type(claim.rows[0].status)} for claim in claims
    ]
    assert shares[0] == pytest.approx(shares[1], rel=1e-9)


def test_on_the_card(pairs: tuple[Pair, Pair]) -> None:
    cards = [
        "\n".join(extraction_section(lt.extract(*pair, pair.base.parent / "a", rank=2).to_json()))
        for pair in pairs
    ]
    said = [
        [line for line in card.splitlines() if "`linear`" in line or "misses" in line]
        for card in cards
    ]
    assert said[0] == said[1]
    assert len(said[0]) == 2


def test_in_a_look_at_the_pair(pairs: tuple[Pair, Pair]) -> None:
    once, twice = (inspect_pair(*pair) for pair in pairs)
    assert once.energy == pytest.approx(twice.energy, rel=1e-12)
    assert once.adapter_bytes(0.9) == twice.adapter_bytes(0.9)
    assert f"{HEAD} is tied to {TABLE}: counted once" in twice.notes
    alone = inspect_pair(*pairs[1], only=[HEAD])
    assert [row.name for row in alone.rows] == [HEAD]
