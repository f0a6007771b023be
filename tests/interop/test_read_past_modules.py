"""Models that read weights without calling their modules: PEFT would change nothing there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import loratool as lt
from loratool.errors import Unplaced
from tests.interop.families import Family
from tests.interop.test_families import answer, load, save_pair, under_peft

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_VISION: dict[str, Any] = {"image_size": 16, "patch_size": 8, "hidden_size": 32}
_VISION |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(2, 26).reshape(2, 12)}


def _random(name: str, *shape: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(1))}


def _wavlm() -> tf.PreTrainedModel:
    layers = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3)}
    embedding = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    return tf.WavLMForCTC(
        tf.WavLMConfig(**_SIZES, **layers, **embedding, num_feat_extract_layers=2)
    )


def _speaker() -> tf.PreTrainedModel:
    layers = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3)}
    embedding = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    head = {"tdnn_dim": (16, 16), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1)}
    return tf.Wav2Vec2ForXVector(
        tf.Wav2Vec2Config(
            **_SIZES, **layers, **embedding, **head, num_feat_extract_layers=2, xvector_output_dim=8
        )
    )


def _pages() -> tf.PreTrainedModel:
    return tf.LayoutLMv3ForTokenClassification(
        tf.LayoutLMv3Config(
            **_SIZES,
            max_position_embeddings=40,
            max_2d_position_embeddings=64,
            coordinate_size=6,
            shape_size=4,
            rel_pos_bins=8,
            rel_2d_pos_bins=8,
            visual_embed=False,
            num_labels=3,
            pad_token_id=1,
        )
    )


def _jamba() -> tf.PreTrainedModel:
    mamba = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    kinds = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
    return tf.JambaForCausalLM(
        tf.JambaConfig(
            **_SIZES, **mamba, **kinds, num_key_value_heads=2, num_experts_per_tok=1, pad_token_id=0
        )
    )


def _mobilebert() -> tf.PreTrainedModel:
    return tf.MobileBertForMaskedLM(
        tf.MobileBertConfig(
            **_SIZES, embedding_size=16, intra_bottleneck_size=16, max_position_embeddings=40
        )
    )


def _siglip() -> tf.PreTrainedModel:
    return tf.SiglipForImageClassification(tf.SiglipConfig(vision_config=_VISION, num_labels=3))


FAMILIES = {
    "wavlm": Family(
        _wavlm,
        lambda: _random("input_values", 2, 800),
        raw=("*.gru_rel_pos_const", "*.parametrizations.*", "wavlm.masked_spec_embed"),
    ),
    "speaker": Family(
        _speaker,
        lambda: _random("input_values", 2, 800),
        raw=("*.parametrizations.*", "wav2vec2.masked_spec_embed"),
    ),
    "layoutlmv3": Family(_pages, _tokens),
    "jamba": Family(_jamba, _tokens, raw=("*.A_log", "*.D")),
    "mobilebert": Family(_mobilebert, _tokens),
    "siglip": Family(
        _siglip, lambda: _random("pixel_values", 2, 3, 16, 16), raw=("vision_model.head.probe",)
    ),
}
READ_SO = {
    "wavlm": "wavlm.encoder.layers.1.attention.q_proj.weight",
    "speaker": "tdnn.1.kernel.weight",
    "layoutlmv3": "layoutlmv3.encoder.rel_pos_bias.weight",
    "jamba": "model.layers.0.mamba.dt_proj.weight",
    "mobilebert": "cls.predictions.dense.weight",
    "siglip": "vision_model.head.attention.out_proj.weight",
}


@pytest.mark.parametrize("rank", ["3", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_stored_whole(name: str, rank: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base, tuned = save_pair(family, tmp_path)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=rank)
    status = {row.name: row.status for row in report.rows}
    assert status[READ_SO[name]] == "stored whole"
    assert any("without calling their modules" in note for note in report.notes)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = answer(family, load(family, tmp_path / "merged"))
    peft = answer(family, under_peft(family, base, tmp_path / "adapter"))
    torch.testing.assert_close(peft, merged, rtol=1e-4, atol=2e-5)
    if rank == "full":
        wanted = answer(family, load(family, tuned))
        torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=2e-5)


def test_a_module_stored_whole_takes_its_bare_parameters_along(tmp_path: Path) -> None:
    """As the refusal says: torch's attention and the probe beside it."""
    family = FAMILIES["siglip"]
    base, tuned = save_pair(family, tmp_path, raw=True)
    with pytest.raises(Unplaced, match="1 changed") as caught:
        lt.extract(base, tuned, tmp_path / "adapter", rank=3)
    assert "vision_model.head=whole" in (caught.value.hint or "")
    lt.extract(
        base, tuned, tmp_path / "adapter", rank="full", rank_for={"vision_model.head": "whole"}
    )
    peft = answer(family, under_peft(family, base, tmp_path / "adapter"))
    torch.testing.assert_close(peft, answer(family, load(family, tuned)), rtol=1e-4, atol=2e-5)
