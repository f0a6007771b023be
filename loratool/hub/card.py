"""The card of a pushed adapter: what it is, how well it stands for the tuning, how to use it.

Facts may come from files that others wrote, so every free text in them is shown as code with
anything but plain characters escaped; nothing in a tensor name can become Markdown or HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from loratool.errors import UsageError
from loratool.hub.extraction import extraction_section
from loratool.hub.markdown import code, count, table
from loratool.hub.readme import Readme, is_untouched_template

MARKER = "<!-- made by loratool -->"
END_MARKER = "<!-- end of what loratool made -->"
_SECTION = re.compile(re.escape(MARKER) + r".*?" + re.escape(END_MARKER), re.DOTALL)
_BASE_TAG = "base_model:"

PIPELINE_TAGS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""PEFT task types with a pipeline tag of their own. Sequence-to-sequence has none: the Hub gave
up text2text-generation, and whether a model translates or summarises is not in the config."""

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class CardPicture:
    """A picture that lies beside the card. alt: what it shows, in our own words."""

    file: str
    alt: str


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    base_model: the Hub id of the base. ranks: smallest, most common and largest; None without
    low-rank updates. alphas: the distinct values. targets: last components of the adapted
    modules' names. replaced: parameters stored whole. others: updates of
    other kinds (DoRA, LoHa, trained tokens …). num_labels: outputs of a classification
    head that the adapter carries. report: a loratool_report.json, structure not trusted.

    Raises UsageError when an id is not one that the Hub accepts.
    """

    repo_id: str
    base_model: str
    task_type: str | None
    ranks: tuple[int, int, int] | None
    alphas: tuple[float, ...]
    targets: tuple[str, ...]
    adapted: int
    replaced: int
    others: int
    parameters: int
    size_bytes: int
    dtypes: tuple[str, ...]
    version: str
    licence: str | None = None
    num_labels: int | None = None
    report: Mapping[str, Any] | None = None
    picture: CardPicture | None = None

    def __post_init__(self) -> None:
        for name in (self.repo_id, self.base_model):
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                first = str(error).splitlines()[0]
                raise UsageError(f"{name!r} is not a name that the Hub accepts ({first})") from None

    @property
    def pipeline_tag(self) -> str | None:
        return PIPELINE_TAGS.get(self.task_type or "")

    @property
    def tags(self) -> tuple[str, ...]:
        return ("lora", "loratool", f"{_BASE_TAG}adapter:{self.base_model}")

    @property
    def metadata(self) -> dict[str, Any]:
        """The card's YAML block."""
        data = ModelCardData(
            base_model=self.base_model,
            base_model_relation="adapter",
            library_name="peft",
            license=self.licence,
            pipeline_tag=self.pipeline_tag,
            tags=list(self.tags),
        )
        return dict(data.to_dict())  # type: ignore[no-untyped-call]


def render_card(facts: CardFacts) -> str:
    """A whole README.md for an adapter that has none."""
    return Readme("", "", "", f"\n{_section(facts)}\n").with_metadata(facts.metadata).text


def merge_card(existing_text: str, facts: CardFacts) -> str:
    """An existing README.md brought up to date.

    Between our markers the text is ours and written anew. Without markers the body is somebody's
    own and stays byte for byte, unless it is the empty form that PEFT writes. Metadata keys are
    added where missing; changed only where they contradict the facts. Raises MalformedFile.
    """
    readme = Readme.parse(existing_text)
    readme = readme.with_metadata(_metadata_changes(readme.values, facts))
    if _SECTION.search(readme.body):
        body = _SECTION.sub(lambda _: _section(facts), readme.body, count=1)
    elif has_own_text(existing_text):
        body = readme.body
    else:
        body = f"\n{_section(facts)}\n"
    return readme.with_body(body).text


def has_own_text(text: str) -> bool:
    """Whether a README.md holds words that somebody wrote, beside ours and PEFT's empty form."""
    body = _SECTION.sub("", Readme.parse(text).body, count=1)
    return bool(body.strip()) and not is_untouched_template(body)


def _metadata_changes(values: Mapping[str, Any], facts: CardFacts) -> dict[str, Any]:
    changes = {key: value for key, value in facts.metadata.items() if not values.get(key)}
    bases = _strings(values.get("base_model"))
    if facts.base_model not in bases or not all(_is_id(base) for base in bases):
        changes["base_model"] = facts.base_model
    if facts.licence and values.get("license") != facts.licence:
        changes["license"] = facts.licence
    old_tags = _strings(values.get("tags"))
    kept = [tag for tag in old_tags if not tag.startswith(_BASE_TAG)]
    tags = [*kept, *(tag for tag in facts.tags if tag not in kept)]
    if set(tags) != set(old_tags):
        changes["tags"] = tags
    return changes


def _strings(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(item) for item in values if item is not None]


def _is_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _section(facts: CardFacts) -> str:
    parts = [
        MARKER,
        f"# {facts.repo_id.partition('/')[2]}",
        _summary(facts),
        table(("", ""), _fact_rows(facts), align="ll"),
        *((f"![{facts.picture.alt}]({facts.picture.file})",) if facts.picture is not None else ()),
        *(extraction_section(facts.report) if facts.report is not None else ()),
        "## Use it with PEFT",
        _peft_snippet(facts),
        "## Merge it into the base",
        _merge_snippet(facts),
        END_MARKER,
    ]
    return "\n\n".join(parts)


def _summary(facts: CardFacts) -> str:
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    return f"A LoRA adapter for {base}, in PEFT's format."


def _fact_rows(facts: CardFacts) -> Iterable[tuple[str, str]]:
    if facts.ranks is not None:
        low, typical, high = facts.ranks
        rank = str(low) if low == high else f"{low} to {high}, most often {typical}"
        yield "Rank", rank
        yield "Alpha", _alphas(facts.alphas)
        yield "Adapted modules", f"{count(facts.adapted)} ({', '.join(map(code, facts.targets))})"
    if facts.replaced:
        yield "Parameters stored whole", count(facts.replaced)
    if facts.others:
        yield "Updates of other kinds", count(facts.others)
    yield "Size", f"{count(facts.parameters)} values, {count(facts.size_bytes)} bytes"
    yield "Stored as", ", ".join(map(code, facts.dtypes))
    yield "Made ready by", f"loratool {code(facts.version)}"


def _alphas(alphas: tuple[float, ...]) -> str:
    if len(alphas) == 1:
        return f"{alphas[0]:g}"
    return f"{min(alphas):g} to {max(alphas):g}, per module"


def _peft_snippet(facts: CardFacts) -> str:
    loader = _AUTO_CLASSES.get(facts.task_type or "")
    if loader is None:
        return "\n\n".join(
            (
                f"Load `{facts.base_model}` with the class it was made for, as `base`; then:",
                _fenced(
                    "python",
                    "from peft import PeftModel",
                    "",
                    f'model = PeftModel.from_pretrained(base, "{facts.repo_id}")',
                ),
            )
        )
    options = f", num_labels={facts.num_labels}" if facts.num_labels else ""
    return _fenced(
        "python",
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f'base = {loader}.from_pretrained("{facts.base_model}"{options})',
        f'model = PeftModel.from_pretrained(base, "{facts.repo_id}")',
    )


def _merge_snippet(facts: CardFacts) -> str:
    return _fenced(
        "sh",
        f"hf download {facts.base_model} --local-dir base",
        f"hf download {facts.repo_id} --local-dir adapter",
        "loratool merge base adapter -o merged",
    )


def _fenced(language: str, *lines: str) -> str:
    return "\n".join((f"```{language}", *lines, "```"))
