"""What is said of all changes together."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.ops.findings import lora_summary, rounding_notes


@dataclass(frozen=True)
class Matrix:
    """What is known of one change."""

    lora_rank: int | None
    lora_least: int | None
    lora_tail: float | None = 0.01
    noise_share: float = 0.1
    near_noise: bool = False


def test_the_report_gives_the_range() -> None:
    row = Matrix(lora_rank=9, lora_least=1)
    (note,) = rounding_notes([row, Matrix(lora_rank=4, lora_least=4)])
    assert "1 of 2 matrices" in note
    assert "from 1 to 9" in note
    said = lora_summary([row], "any rank")
    assert said is not None
    assert "of rank 1 to 9" in said
    open_ended = Matrix(lora_rank=None, lora_least=2)
    (note,) = rounding_notes([open_ended])
    assert "from 2 to beyond those extracted" in note
    said = lora_summary([open_ended], "any rank")
    assert said is not None
    assert "may be a LoRA's of rank 2 or more" in said
    assert rounding_notes([Matrix(lora_rank=None, lora_least=None)]) == []


def test_the_answer_yes_is_of_the_matrices_that_were_asked() -> None:
    """A norm or a table stored whole may have changed in any way."""
    row = Matrix(lora_rank=4, lora_least=4)
    assert (lora_summary([row], "any rank") or "").startswith("the change is a LoRA's of rank 4")
    said = lora_summary([row, row], "any rank", 3) or ""
    assert said.startswith("the change of 2 matrices is a LoRA's of rank 4")
    assert said.endswith("; 3 other tensors changed as well")
