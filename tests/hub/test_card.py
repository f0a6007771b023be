"""Cards: what they say, and what they leave alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from loratool.errors import MalformedFile, UsageError
from loratool.hub.card import (
    END_MARKER,
    MARKER,
    CardFacts,
    CardPicture,
    has_own_text,
    merge_card,
    render_card,
)
from loratool.hub.markdown import code, percent
from loratool.hub.push import compose_card
from loratool.hub.readme import Readme, decode_readme
from tests.hub.hub_adapters import BASE, make_report

FACTS = CardFacts(
    repo_id="alice/my-lora",
    base_model=BASE,
    task_type="CAUSAL_LM",
    ranks=(2, 4, 8),
    alphas=(2.0, 4.0),
    targets=("c_attn", "c_fc"),
    adapted=12,
    replaced=1,
    others=0,
    parameters=123_456,
    size_bytes=493_824,
    dtypes=("F32",),
    version="0.1.0",
    report=make_report(),
)
EVIL = "x|`</td><script>alert(1)</script>\n# hi [a](javascript:b) <!-- made by loratool -->\x1b[31m"


def with_(**changes: Any) -> CardFacts:
    return dataclasses.replace(FACTS, **changes)


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(Readme.parse(text).metadata)


def rendered(text: str) -> str:
    """The body as HTML, with HTML in it shown rather than obeyed."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(Readme.parse(text).body)


# What a card says -----------------------------------------------------------------------------


def test_metadata() -> None:
    assert metadata(render_card(FACTS)) == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "loratool", f"base_model:adapter:{BASE}"],
    }


@pytest.mark.parametrize(
    ("task", "tag"),
    [
        ("SEQ_CLS", "text-classification"),
        ("TOKEN_CLS", "token-classification"),
        ("QUESTION_ANS", "question-answering"),
        ("FEATURE_EXTRACTION", "feature-extraction"),
        ("SEQ_2_SEQ_LM", None),
        ("SOMETHING", None),
        (None, None),
    ],
)
def test_pipeline_tag_only_where_the_task_decides_it(task: str | None, tag: str | None) -> None:
    assert metadata(render_card(with_(task_type=task))).get("pipeline_tag") == tag


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", None])
def test_snippets_are_python(task: str | None) -> None:
    text = render_card(with_(task_type=task, num_labels=3 if task == "SEQ_CLS" else None))
    snippet = text.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert "alice/my-lora" in snippet
    assert ("num_labels=3" in snippet) == (task == "SEQ_CLS")


def test_numbers_of_the_report() -> None:
    text = render_card(FACTS)
    assert "**0.282**" in text, "sqrt((9·0.01 + 16·0.0625 + 1) / 26.25)"
    assert "**92.04 %**" in text
    assert "| `transformer.h.0.mlp.c_fc.weight` | 2 | 93.75 % | 0.25 |" in text
    assert "1 tensor (`transformer.wpe.weight`); 3.81 %" in text


def test_no_placeholders_and_no_html_but_our_markers() -> None:
    text = render_card(FACTS)
    for word in ("More Information", "TODO", "None", "nan", "[optional]"):
        assert word not in text
    assert text.replace(MARKER, "").replace(END_MARKER, "").count("<") == 0


def test_without_a_report_nothing_is_claimed_about_quality() -> None:
    for report in (None, {}, {"schema": "loratool/resize/1", "tensors": make_report()["tensors"]}):
        assert "How it was made" not in render_card(with_(report=report))


@pytest.mark.parametrize("name", ["no-owner/", "a/b/c", "a b/c", "a/b|c", "a/b--c", "a/<b>", ""])
def test_ids_that_the_hub_refuses(name: str) -> None:
    with pytest.raises(UsageError):
        with_(base_model=name)
    with pytest.raises(UsageError):
        with_(repo_id=name)


# Reports that lie -----------------------------------------------------------------------------


def every_text_evil(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: item if key in ("schema", "status") else every_text_evil(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [every_text_evil(item) for item in value]
    return EVIL if isinstance(value, str) else value


def test_text_from_files_is_never_markup() -> None:
    report = every_text_evil(make_report())
    report["tensors"][3]["status"] = EVIL
    text = render_card(with_(report=report, targets=(EVIL,), dtypes=(EVIL,), version=EVIL))
    html = rendered(text)
    assert "<script" not in text
    assert "<script" not in html
    assert "\x1b" not in text
    assert text.count(MARKER) == 1
    assert '<a href="javascript' not in html
    assert html.count("<h1>") == 1
    sane = rendered(render_card(FACTS))
    assert html.count("<tr>") == sane.count("<tr>")
    assert html.count("<td") == sane.count("<td")


@given(st.text(max_size=60))
def test_code_is_one_inert_span_whatever_the_text(text: str) -> None:
    html = MarkdownIt("commonmark").enable("table").render(f"| a |\n| - |\n| {code(text)} |")
    assert html.count("<td>") == 1
    assert html.count("<code>") == html.count("</code>") == 1
    assert code(text).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "kind", "status", "rank", "delta_norm", "relative_error"]),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(JSON)
def test_no_shape_of_report_breaks_the_card(value: Any) -> None:
    for report in (
        {"schema": "loratool/extract/1", "tensors": value},
        {"schema": "loratool/extract/1", "tensors": [value], "base": value, "rank": value},
        {**make_report(), "seed": value, "tuned": value},
    ):
        render_card(with_(report=report))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 10**400, "0.5", True, None])
def test_numbers_that_are_none(value: object) -> None:
    report = make_report()
    report["tensors"][0] |= {"relative_error": value, "delta_norm": value}
    text = render_card(with_(report=report))
    assert "nan" not in text
    assert "inf " not in text


def test_a_budget_rule_is_readable() -> None:
    assert code("budget:5%") == "`budget:5%`"
    assert code("a|b`<c>") == "`a\\u007cb\\u0060\\u003cc\\u003e`"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.5, "50.00 %"), (1.0, "100.00 %"), (0.0, "0.00 %"), (1e-7, "1e-05 %"), (None, "n/a")],
)
def test_percent(share: float | None, text: str) -> None:
    assert percent(share) == text


def test_nearly_all_is_not_all() -> None:
    assert percent(1 - 1e-9) == "100 - 1e-07 %"


# README.md files that exist -------------------------------------------------------------------

OWN_BODY = "\n# Mine\n\nWords  \n| not | a | table\n\n---\nmore\n"
BODIES = ["# Mine\n", OWN_BODY, "\r\n# Mine\r\n\r\n", "   \n\ttext\x0c", "---\n", "é — 漢字"]
HEADS = [
    "",
    "---\nlicense: mit\n---\n",
    "---\r\nlicense: mit\r\ntags:\r\n- mine\r\n---\r\n",
    "---\nlanguage: no\ntags: [a, b]  # flow\nlicense: mit\n# the end\n---\n",
    "---\n{license: mit, tags: [a]}\n---\n",
    "---\ntags: one\nlicense: mit\nlicense: mit\n---\n",
    "\ufeff---\nlicense: mit\n---\n",
    "---\n# nothing\n---\n",
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("head", HEADS)
def test_a_persons_body_stays_byte_for_byte(head: str, body: str) -> None:
    merged = merge_card(head + body, FACTS)
    if head:
        assert Readme.parse(merged).body == body
    assert merged.endswith(body)
    values = metadata(merged)
    assert values["base_model"] == BASE
    assert values["library_name"] == "peft"
    assert set(FACTS.tags) <= set(values["tags"])
    if "license" in head:
        assert values["license"] == "mit"


def test_a_picture_comes_and_goes_with_our_part() -> None:
    picture = CardPicture("loratool_picture.png", "Map of ‖ΔW‖ by layer and module")
    card = render_card(with_(picture=picture))
    assert '<img src="loratool_picture.png" alt="Map of ‖ΔW‖ by layer and module"' in rendered(card)
    assert merge_card(card, with_(picture=picture)) == card
    assert merge_card(card, FACTS) == render_card(FACTS)


@pytest.mark.parametrize("head", HEADS)
def test_merging_twice_is_merging_once(head: str) -> None:
    once = merge_card(head + OWN_BODY, FACTS)
    assert merge_card(once, FACTS) == once


def test_metadata_that_is_complete_is_left_alone() -> None:
    text = render_card(FACTS).replace("base_model:", "base_model:   ", 1)
    assert merge_card(text, FACTS) == text


def test_comments_and_other_keys_stay() -> None:
    head = (
        "---\n# first\nlanguage: no # Norwegian\ntags:\n- mine # why\n# after\nlicense: mit\n---\n"
    )
    merged = merge_card(head + OWN_BODY, FACTS)
    for line in ("# first\n", "language: no # Norwegian\n", "# after\n", "license: mit\n"):
        assert line in merged
    assert metadata(merged)["tags"][0] == "mine"


@pytest.mark.parametrize("base", ["/home/me/base", "[/home/me/a, /home/me/b]", "other/model", "''"])
def test_a_base_that_contradicts_the_adapter_is_corrected(base: str) -> None:
    head = f"---\nbase_model: {base}\ntags:\n- base_model:adapter:/home/me/base\n---\n"
    merged = merge_card(head + OWN_BODY, FACTS)
    assert metadata(merged)["base_model"] == BASE
    assert "/home/me" not in merged


def test_a_block_of_text_is_replaced_without_disturbing_its_neighbours() -> None:
    head = "---\nlicense: |\n  mit\n# comment\nlanguage: no\n---\n"
    merged = merge_card(head + OWN_BODY, with_(licence="apache-2.0"))
    assert "license: apache-2.0\n# comment\nlanguage: no\n" in merged


def test_a_list_of_bases_with_ours_is_kept() -> None:
    head = f"---\nbase_model:\n- {BASE}\n- other/model\n---\n"
    assert metadata(merge_card(head + OWN_BODY, FACTS))["base_model"] == [BASE, "other/model"]


def test_a_licence_that_is_asked_for_wins() -> None:
    merged = merge_card("---\nlicense: mit\n---\n" + OWN_BODY, with_(licence="apache-2.0"))
    assert metadata(merged)["license"] == "apache-2.0"


def test_only_our_part_is_written_anew() -> None:
    text = render_card(FACTS).replace("energy:0.95", "stale")
    head, section, tail = text.partition(MARKER)
    edited = f"{head}Before.\n{section}{tail}\nAfter.\n"
    merged = merge_card(edited, FACTS)
    assert merged == edited.replace("stale", "energy:0.95")


def test_a_part_that_lost_its_end_is_somebodys_text() -> None:
    text = render_card(FACTS).replace(END_MARKER, "") + "mine"
    assert merge_card(text, FACTS) == text


def test_pefts_empty_form_gives_way_to_the_card() -> None:
    from huggingface_hub import ModelCard, ModelCardData

    card = ModelCard.from_template(ModelCardData())
    card.data["library_name"], card.data["base_model"] = "peft", "/home/me/x"
    empty = str(card) + "\n### Framework versions\n\n- PEFT 0.21.2"
    assert not has_own_text(empty)
    merged = merge_card(empty, FACTS)
    assert MARKER in merged
    assert "More Information" not in merged
    assert "/home/me" not in merged


def test_pefts_form_filled_in_stays() -> None:
    from huggingface_hub import ModelCard, ModelCardData

    filled = str(ModelCard.from_template(ModelCardData(), model_summary="It writes poems."))
    assert has_own_text(filled)
    assert Readme.parse(merge_card(filled, FACTS)).body == Readme.parse(filled).body


@pytest.mark.parametrize(
    ("local", "remote", "expected"),
    [
        (None, None, MARKER),
        ("local words", None, "local words"),
        (None, "remote words", "remote words"),
        ("local words", "remote words", "remote words"),
        ("local words", render_card(FACTS), "local words"),
        (render_card(FACTS), "remote words", "remote words"),
        (None, "---\nlicense: mit\n---\n", "license: mit"),
    ],
)
def test_whose_words_go_up(local: str | None, remote: str | None, expected: str) -> None:
    text, _ = compose_card(FACTS, local, remote)
    assert expected in text
    assert metadata(text)["base_model"] == BASE


@pytest.mark.parametrize(
    "data",
    [
        b"---\n[\n---\n",
        b"---\n- a\n- b\n---\n",
        b"---\n1: 2\n---\n",
        b"---\n" + b"[" * 5000 + b"\n---\n",
        b"---\na: " + b"x" * 200_000 + b"\n---\n",
        b"---\na: &a [x]\nb: [" + b"*a," * 100 + b"]\n---\n",
        b"---\na: !!python/object:os.system x\n---\n",
        b"\xff\xfe",
        b"x" * 1_000_001,
    ],
)
def test_readmes_that_cannot_be_read(data: bytes) -> None:
    with pytest.raises(MalformedFile, match=r"^here/README\.md: "):
        decode_readme(data, "here/README.md")


@given(st.text(), st.text())
def test_any_text_survives_parsing(head: str, body: str) -> None:
    for text in (head, body, f"---\n{head}\n---\n{body}"):
        assert Readme.parse(text).text == text
