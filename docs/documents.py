"""What is in the JSON documents, in short: generate.py makes docs/schemas/ of it.

A dictionary is an object with exactly these fields, one whose name begins with ? may be absent; a
list is an array of its one element.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from loratool.ops.catalogue_alike import CRITERIA
from loratool.ops.extract_report import Status as ExtractStatus
from loratool.ops.inspect_level import Level
from loratool.ops.verify_claim import ClaimStatus
from loratool.ops.verify_row import Cause, Order
from loratool.ops.verify_row import Status as VerifyStatus

Form = Any
"""One of the names below, a function's result, a dictionary, or a list of one."""

TEXT: Form = {"type": "string"}
WHOLE: Form = {"type": "integer"}
NUMBER: Form = {"type": "number"}
YES_NO: Form = {"type": "boolean"}
_READY = ("type", "enum", "anyOf", "additionalProperties")


def either(*forms: Form) -> Form:
    """One of several forms."""
    return {"anyOf": [schema_of(form) for form in forms]}


def maybe(form: Form) -> Form:
    """Null where there is none."""
    return either(form, {"type": "null"})


def one_of(*words: str) -> Form:
    return {"enum": list(words)}


def word_of(kind: type[StrEnum]) -> Form:
    return one_of(*map(str, kind))


def by_name(form: Form) -> Form:
    """An object whose field names are data: tensors, dtypes, parameters."""
    return {"type": "object", "additionalProperties": schema_of(form)}


def schema_of(form: Form) -> dict[str, Any]:
    """JSON Schema of a form."""
    if isinstance(form, list):
        (item,) = form
        return {"type": "array", "items": schema_of(item)}
    if any(isinstance(form.get(key), str | list | dict) and key in _READY for key in form):
        return dict(form)
    return {
        "type": "object",
        "properties": {name.lstrip("?"): schema_of(part) for name, part in form.items()},
        "required": [name for name in form if not name.startswith("?")],
        "additionalProperties": False,
    }


GRID: Form = {"i": [WHOLE], "j": [WHOLE], "values": [[maybe(NUMBER)]]}
WEIGHTED: Form = {"name": TEXT, "weight": NUMBER}
UPDATE_TEXT: Form = {"name": TEXT, "update": TEXT}
FILE: Form = {"name": TEXT, "bytes": WHOLE}
SIDE: Form = {"name": TEXT, "tensors": WHOLE, "bytes": WHOLE, "fingerprint": TEXT}
KINDS = one_of("checkpoint", "adapter")

# Merging and back ------------------------------------------------------------------------------

MERGED_FROM: Form = {"adapter": TEXT, "format": TEXT, "weight": NUMBER}
RECEIPT: Form = {"name": TEXT, "bytes": WHOLE, "corrected": WHOLE, "bits_per_weight": NUMBER}
MERGE_COUNTS: Form = {
    "elements": WHOLE,
    "changed": WHOLE,
    "recomputed": WHOLE,
    "exact": WHOLE,
    "overflowed": WHOLE,
    "lost_share": maybe(NUMBER),
}
MERGE_ROWS: Form = {
    "totals": {"tensors_changed": WHOLE, **MERGE_COUNTS},
    "tensors": [{"name": TEXT, "update": TEXT, **MERGE_COUNTS}],
}
MERGE: Form = {
    "base": TEXT,
    "adapter": TEXT,
    "adapter_format": TEXT,
    "adapters": [MERGED_FROM],
    "scale": NUMBER,
    "device": TEXT,
    "tensors_total": WHOLE,
    "left_out": [TEXT],
    "skipped_files": [TEXT],
    "notes": [TEXT],
    "?grown": by_name(WHOLE),
    "?receipt": maybe(RECEIPT),
    "?in_place": YES_NO,
    **MERGE_ROWS,
}
MERGE_PLAN: Form = {
    "files": [TEXT],
    "changed_bytes": WHOLE,
    "peak_bytes": WHOLE,
    "device": TEXT,
    "scale": NUMBER,
    "adapters": [MERGED_FROM],
    "tensors": [UPDATE_TEXT],
    "left_out": [TEXT],
    "notes": [TEXT],
    "?output_bytes": WHOLE,
    "?written_bytes": WHOLE,
    "?side_files": [TEXT],
    "?skipped_files": [TEXT],
    "?in_place": YES_NO,
    "?disk_at_least": WHOLE,
    "?disk_at_most": WHOLE,
}
UNMERGE: Form = {
    "merged": TEXT,
    "adapters": [{"format": TEXT, **WEIGHTED}],
    "receipt": maybe(TEXT),
    "exact": YES_NO,
    "device": TEXT,
    "tensors_total": WHOLE,
    "notes": [TEXT],
    "totals": {
        "tensors_restored": WHOLE,
        "uncertain_share": NUMBER,
        "elements": WHOLE,
        "corrected": WHOLE,
        "uncertain": WHOLE,
    },
    "tensors": [{"name": TEXT, "elements": WHOLE, "corrected": WHOLE, "uncertain": WHOLE}],
}
UNMERGE_PLAN: Form = {
    "output_bytes": WHOLE,
    "receipt": maybe(TEXT),
    "exact": YES_NO,
    "device": TEXT,
    "files": [TEXT],
    "tensors": [TEXT],
    "notes": [TEXT],
}
SWAP: Form = {
    "merged": TEXT,
    "removed": [WEIGHTED],
    "added": [WEIGHTED],
    "restored": WHOLE,
    "tensors_total": WHOLE,
    "device": TEXT,
    "notes": [TEXT],
    "receipt": maybe(RECEIPT),
    **MERGE_ROWS,
}
SWAP_PLAN: Form = {
    "output_bytes": WHOLE,
    "receipt": TEXT,
    "restored": [TEXT],
    "changed": [TEXT],
    "device": TEXT,
    "notes": [TEXT],
}
RECOVER: Form = {
    "path": TEXT,
    "found": YES_NO,
    "action": maybe(one_of("forward", "back")),
    "interrupted": maybe(TEXT),
    "adapters": [[either(TEXT, NUMBER)]],
    "blocks": WHOLE,
    "blocks_changed": WHOLE,
    "blocks_between": WHOLE,
    "bytes": WHOLE,
}
VERIFY_COUNTS: Form = {"elements": WHOLE, "checked": WHOLE, "different": WHOLE, "beyond": WHOLE}
VERIFY: Form = {
    "merged": TEXT,
    "base": TEXT,
    "adapters": [{"format": TEXT, **WEIGHTED}],
    "compared": TEXT,
    "seed": maybe(WHOLE),
    "device": TEXT,
    "notes": [TEXT],
    "verdict": one_of("equal", "within rounding", "differs"),
    "diagnosis": [TEXT],
    "fit": maybe(NUMBER),
    "fits": [{"name": TEXT, "fit": maybe(NUMBER)}],
    "totals": {**{str(status): WHOLE for status in VerifyStatus}, **VERIFY_COUNTS},
    "tensors": [
        {
            "name": TEXT,
            "update": TEXT,
            "status": word_of(VerifyStatus),
            **VERIFY_COUNTS,
            "worst": maybe(NUMBER),
            "worst_at": [WHOLE],
            "fit": maybe(NUMBER),
            "fits": [{"adapter": WHOLE, "fit": maybe(NUMBER), "energy": maybe(NUMBER)}],
            "residual": maybe(NUMBER),
            "order": maybe(word_of(Order)),
            "cause": maybe(word_of(Cause)),
            "delta_energy": maybe(NUMBER),
            "detail": TEXT,
        }
    ],
}
VERIFY_ADAPTER: Form = {
    "adapter": TEXT,
    "adapter_format": TEXT,
    "base": TEXT,
    "tuned": TEXT,
    "unchanged": WHOLE,
    "device": TEXT,
    "notes": [TEXT],
    "verdict": one_of("as stated", "differs", "states nothing"),
    "relative_error": NUMBER,
    "totals": {str(status): WHOLE for status in ClaimStatus},
    "tensors": [
        {
            "name": TEXT,
            "update": TEXT,
            "status": word_of(ClaimStatus),
            "delta_norm": maybe(NUMBER),
            "missed_norm": NUMBER,
            "measured": maybe(NUMBER),
            "stated": maybe(NUMBER),
            "tied_to": maybe(TEXT),
        }
    ],
}

# Extracting ------------------------------------------------------------------------------------

EXTRACT: Form = {
    "rank": TEXT,
    "dtype": TEXT,
    "device": TEXT,
    "seed": WHOLE,
    "base_model": maybe(TEXT),
    "base": {**SIDE, "?samples": by_name(TEXT)},
    "tuned": SIDE,
    "lora": maybe(TEXT),
    "notes": [TEXT],
    "totals": {
        "delta_norm": NUMBER,
        "relative_error": NUMBER,
        "energy_kept": NUMBER,
        "low_rank": WHOLE,
        "stored_whole": WHOLE,
        "unchanged": WHOLE,
        "left_out": WHOLE,
        "left_out_share": NUMBER,
        "adapter_parameters": WHOLE,
        "adapter_bytes": WHOLE,
    },
    "tensors": [
        {
            "name": TEXT,
            "kind": TEXT,
            "shape": [WHOLE],
            "added_rows": WHOLE,
            "tied_to": maybe(TEXT),
            "status": word_of(ExtractStatus),
            "delta_norm": NUMBER,
            "base_norm": NUMBER,
            "rank": maybe(WHOLE),
            "kept_rank": maybe(WHOLE),
            "rest_norm": maybe(NUMBER),
            "relative_error": maybe(NUMBER),
            "energy_kept": maybe(NUMBER),
            "clamped": YES_NO,
            "method": maybe(TEXT),
            "excess_bound": maybe(NUMBER),
            "excess_bound_failure_probability": maybe(NUMBER),
            "noise_floor": NUMBER,
            "noise_share": NUMBER,
            "near_noise": YES_NO,
            "changed_share": NUMBER,
            "lora_rank": maybe(WHOLE),
            "lora_least": maybe(WHOLE),
            "lora_tail": maybe(NUMBER),
            "singular_values": [NUMBER],
        }
    ],
    "?seconds": {
        f"?{stage}": NUMBER for stage in ("read", "sketch", "orthogonalise", "certify", "write")
    },
}
EXTRACT_PLAN: Form = {
    "rank": TEXT,
    "dtype": TEXT,
    "device": TEXT,
    "read_bytes": WHOLE,
    "adapter_bytes_at_most": WHOLE,
    "peak_bytes": WHOLE,
    "notes": [TEXT],
    "tensors": [{"name": TEXT, "kind": TEXT, "shape": [WHOLE], "if_changed": TEXT}],
}
EXTRACT_RANKS: Form = {
    "matrices": WHOLE,
    "ranks": [
        {
            "rank": WHOLE,
            "parameters": WHOLE,
            "nbytes": WHOLE,
            "error": NUMBER,
            "budget_error": NUMBER,
        }
    ],
}

# Adapters --------------------------------------------------------------------------------------

COMBINED_FROM: Form = {"format": TEXT, "base_model": maybe(TEXT), **WEIGHTED}
COMBINE_FACTS: Form = {
    "format": TEXT,
    "method": TEXT,
    "parameters": by_name(either(NUMBER, TEXT, YES_NO)),
    "rank": TEXT,
    "dtype": TEXT,
    "device": TEXT,
    "seed": WHOLE,
    "saved": TEXT,
    "adapters": [COMBINED_FROM],
}
RESIZE_FACTS: Form = {
    "format": TEXT,
    "adapter": TEXT,
    "adapter_format": TEXT,
    "base_model": maybe(TEXT),
    "rank": TEXT,
    "uniform": YES_NO,
    "balance": YES_NO,
    "profile": TEXT,
    "dtype": TEXT,
    "device": TEXT,
    "seed": WHOLE,
}
UPDATES: Form = {
    "notes": [TEXT],
    "totals": {
        "norm": NUMBER,
        "relative_error": NUMBER,
        "updates": WHOLE,
        "zero": WHOLE,
        "adapter_parameters": WHOLE,
        "adapter_bytes": WHOLE,
    },
    "updates": [
        {
            "name": TEXT,
            "shape": [WHOLE],
            "ranks": [WHOLE],
            "weights": [NUMBER],
            "rank": WHOLE,
            "norm": NUMBER,
            "relative_error": NUMBER,
            "how": TEXT,
        }
    ],
}
COMBINE: Form = {
    **COMBINE_FACTS,
    "overlap": {
        "cosines": [[maybe(NUMBER)]],
        "own_weights": [maybe(NUMBER)],
        "reach": [maybe(NUMBER)],
    },
    "?search": {
        "trials": WHOLE,
        "penalty": NUMBER,
        "start": {"weights": [NUMBER], "score": maybe(NUMBER)},
        "best": {"weights": [NUMBER], "score": NUMBER},
        "scores": [maybe(NUMBER)],
    },
    **UPDATES,
}
PLANNED_UPDATE: Form = {"name": TEXT, "shape": [WHOLE], "rank_at_most": WHOLE}
COMBINE_PLAN: Form = {
    **COMBINE_FACTS,
    "read_bytes": WHOLE,
    "adapter_bytes_at_most": WHOLE,
    "peak_bytes": WHOLE,
    "notes": [TEXT],
    "updates": [{**PLANNED_UPDATE, "ranks": [WHOLE], "weights": [NUMBER]}],
    "stored_whole": [TEXT],
}
RESIZE: Form = {**RESIZE_FACTS, **UPDATES}
RESIZE_PLAN: Form = {
    **RESIZE_FACTS,
    "read_bytes": WHOLE,
    "adapter_bytes_at_most": WHOLE,
    "notes": [TEXT],
    "updates": [{**PLANNED_UPDATE, "rank": WHOLE}],
}
CONVERT_PLAN: Form = {
    "adapter": TEXT,
    "from": TEXT,
    "to": TEXT,
    "start": maybe(TEXT),
    "base_model": maybe(TEXT),
    "updates": [UPDATE_TEXT],
}
CONVERT: Form = {
    **CONVERT_PLAN,
    "notes": [TEXT],
    "totals": {"updates": WHOLE, "parameters": WHOLE, "bytes": WHOLE},
}
INIT: Form = {
    "format": TEXT,
    "fused_parts": [TEXT],
    "method": TEXT,
    "source": TEXT,
    "rank": WHOLE,
    "alpha": NUMBER,
    "dtype": TEXT,
    "base_model": maybe(TEXT),
    "base": {"name": TEXT, "fingerprint": TEXT, "?samples": by_name(TEXT)},
    "residual": maybe(TEXT),
    "notes": [TEXT],
    "totals": {"modules": WHOLE, "parameters": WHOLE},
    "modules": [
        {
            "name": TEXT,
            "kind": TEXT,
            "shape": [WHOLE],
            "rank": WHOLE,
            "parameters": WHOLE,
            "parts": [TEXT],
            "energy_kept": maybe(NUMBER),
        }
    ],
}
INIT_PLAN: Form = {
    "format": TEXT,
    "method": TEXT,
    "rank": WHOLE,
    "alpha": NUMBER,
    "fused_parts": [TEXT],
    "parameters": WHOLE,
    "adapter_bytes": WHOLE,
    "residual_bytes": WHOLE,
    "modules": [{"name": TEXT, "shape": [WHOLE], "rank": WHOLE}],
    "notes": [TEXT],
}
COMPARE: Form = {
    "adapters": [
        {
            "name": TEXT,
            "format": TEXT,
            "base_model": maybe(TEXT),
            "modules": WHOLE,
            "alone": [TEXT],
            "norm": NUMBER,
        }
    ],
    "pairs": [
        {
            "pair": [WHOLE],
            "shared_modules": WHOLE,
            "cosine": maybe(NUMBER),
            "phi_left": maybe(NUMBER),
            "phi_right": maybe(NUMBER),
            "phi_left_by_chance": maybe(NUMBER),
            "phi_right_by_chance": maybe(NUMBER),
            "phi_left_grid": GRID,
            "phi_right_grid": GRID,
            "phi_a_grid": GRID,
            "common_energy": [maybe(NUMBER)],
            "sign_agreement": maybe(NUMBER),
            "initial_a": maybe(
                {
                    "verdict": TEXT,
                    "cosine": NUMBER,
                    "distance": NUMBER,
                    "positive_rows": WHOLE,
                    "rows": WHOLE,
                    "chance": NUMBER,
                }
            ),
        }
    ],
    "survives_sum": [maybe(NUMBER)],
    "survives_ties": [maybe(NUMBER)],
    "advice": maybe({"method": TEXT, "options": TEXT, "why": TEXT}),
    "notes": [TEXT],
    "modules": [
        {
            "name": TEXT,
            "shape": [WHOLE],
            "adapters": [WHOLE],
            "ranks": [WHOLE],
            "numerical_ranks": [WHOLE],
            "norms": [NUMBER],
            "pairs": [
                {
                    "pair": [WHOLE],
                    "cosine": maybe(NUMBER),
                    "norm_ratio": maybe(NUMBER),
                    "angles_left": [NUMBER],
                    "angles_right": [NUMBER],
                    "phi_left": GRID,
                    "phi_right": GRID,
                    "phi_a": GRID,
                    "common_energy": [maybe(NUMBER)],
                    "sign_agreement": maybe(NUMBER),
                    "a_cosine": maybe(NUMBER),
                }
            ],
            "joint": maybe(
                {
                    "left": WHOLE,
                    "right": WHOLE,
                    "effective_rank": NUMBER,
                    "rank_for": WHOLE,
                    "share": NUMBER,
                }
            ),
            "survives_sum": [maybe(NUMBER)],
            "survives_ties_trimming": maybe([maybe(NUMBER)]),
            "survives_ties": maybe([maybe(NUMBER)]),
            "entries": WHOLE,
            "entries_total": WHOLE,
        }
    ],
}
PUSHED: Form = {
    "repo_id": TEXT,
    "base_model": TEXT,
    "private": YES_NO,
    "card_origin": TEXT,
    "files": [FILE],
    "notes": [TEXT],
}
PUSH: Form = {
    **PUSHED,
    "url": TEXT,
    "commit_url": maybe(TEXT),
    "commit": maybe(TEXT),
    "changed": YES_NO,
}
PUSH_PLAN: Form = {
    **PUSHED,
    "revision": maybe(TEXT),
    "message": TEXT,
    "not_uploaded": [TEXT],
    "card": TEXT,
}

# Looking ---------------------------------------------------------------------------------------

TRAINING: Form = {"weights": WHOLE, "gradients": WHOLE, "optimizer": WHOLE, "total": WHOLE}
ESTIMATE: Form = {
    "model": TEXT,
    "model_type": maybe(TEXT),
    "parameters": WHOLE,
    "model_bytes": WHOLE,
    "rank": WHOLE,
    "targets": TEXT,
    "trained_parameters": WHOLE,
    "adapter_bytes": by_name(WHOLE),
    "model_over_adapter": NUMBER,
    "training_memory": {"full": TRAINING, "lora": TRAINING},
    "merge": {"read_bytes": WHOLE, "written_bytes": WHOLE, "flops": WHOLE},
    "extract": {
        "read_bytes": WHOLE,
        "written_bytes": WHOLE,
        "full_svd_flops": WHOLE,
        "largest_matrix_bytes": WHOLE,
    },
    "modules": [
        {"name": TEXT, "matrices": WHOLE, "shape": [WHOLE], "rank": WHOLE, "parameters": WHOLE}
    ],
    "assumptions": [TEXT],
    "notes": [TEXT],
}
LIST: Form = {
    "checksum": YES_NO,
    "entries": [
        {
            "name": TEXT,
            "kind": KINDS,
            "format": TEXT,
            "read": YES_NO,
            "evidence": maybe(TEXT),
            "base": maybe(TEXT),
            "architecture": maybe(TEXT),
            "ranks": [WHOLE],
            "alphas": [NUMBER],
            "scales": [NUMBER],
            "targets": [TEXT],
            "whole": WHOLE,
            "parameters": maybe(WHOLE),
            "dtypes": [TEXT],
            "files": WHOLE,
            "bytes": WHOLE,
            "modified": TEXT,
            "health": TEXT,
            "error": maybe(TEXT),
            "fingerprint": maybe(TEXT),
            "content": maybe(TEXT),
        }
    ],
    "alike": [{"likeness": one_of(*CRITERIA), "criterion": TEXT, "entries": [WHOLE]}],
    "notes": [TEXT],
}
LEVEL = word_of(Level)
VALUES: Form = {
    "name": TEXT,
    "sha256": maybe(TEXT),
    "findings": [TEXT],
    "?nan": WHOLE,
    "?infinite": WHOLE,
    "?saturated": WHOLE,
    "?zero_rows": WHOLE,
    "?all_zero": YES_NO,
    "?largest": NUMBER,
    "?largest_at": maybe([WHOLE]),
    "?rms": NUMBER,
    "?outlier": maybe(NUMBER),
    "?outlier_rows": WHOLE,
}
SPECTRUM: Form = {
    "stable_rank": maybe(NUMBER),
    "effective_rank": maybe(NUMBER),
    "participation_rank": maybe(NUMBER),
    "rank_for": by_name(maybe(WHOLE)),
}
SIZES = maybe(by_name({"bytes": WHOLE, "at_least": YES_NO}))
WORK: Form = {
    "read_bytes": WHOLE,
    "written_bytes": WHOLE,
    "flops": WHOLE,
    "peak_bytes": WHOLE,
    "seconds": NUMBER,
}
CHECKPOINT: Form = {
    "what": one_of("checkpoint"),
    "level": LEVEL,
    "name": TEXT,
    "architecture": maybe(TEXT),
    "files": WHOLE,
    "tied": maybe(TEXT),
    "quantised": maybe(TEXT),
    "parameters": WHOLE,
    "bytes": WHOLE,
    "kinds": [
        {"kind": TEXT, "tensors": WHOLE, "parameters": WHOLE, "nbytes": WHOLE, "dtypes": [TEXT]}
    ],
    "tensors": [{"name": TEXT, "kind": TEXT, "dtype": TEXT, "shape": [WHOLE], "bytes": WHOLE}],
    "?values": [VALUES],
    "?equal": [[TEXT]],
    "?weights": [
        {
            "name": TEXT,
            "kind": TEXT,
            "layer": maybe(WHOLE),
            "shape": [WHOLE],
            "norm": NUMBER,
            "spectral_norm": NUMBER,
            **SPECTRUM,
            "singular_values": [NUMBER],
        }
    ],
    "?cost": {
        "targets": TEXT,
        "matrices": WHOLE,
        "workers": WHOLE,
        "flops_per_second": NUMBER,
        "copied_per_second": NUMBER,
        "ranks": [
            {
                "rank": WHOLE,
                "parameters": WHOLE,
                "adapter_bytes": WHOLE,
                "merge": WORK,
                "extract": WORK,
            }
        ],
    },
}
ADAPTER: Form = {
    "what": one_of("adapter"),
    "level": LEVEL,
    "name": TEXT,
    "format": TEXT,
    "base_model": maybe(TEXT),
    "parameters": WHOLE,
    "bytes": WHOLE,
    "adapter_bytes": SIZES,
    "updates": [
        {
            "name": TEXT,
            "shape": [WHOLE],
            "rank": WHOLE,
            "alpha": NUMBER,
            "scale": NUMBER,
            "norm": maybe(NUMBER),
            **SPECTRUM,
            "values": [NUMBER],
        }
    ],
    "replaced": [{"name": TEXT, "shape": [WHOLE], "dtype": TEXT}],
    "others": [{"name": TEXT, "shape": [WHOLE], "update": TEXT}],
    "?values": [VALUES],
    "?equal": [[TEXT]],
    "?zero_b": [TEXT],
}
PAIR: Form = {
    "what": one_of("pair"),
    "level": LEVEL,
    "base": TEXT,
    "tuned": TEXT,
    "device": TEXT,
    "delta_norm": NUMBER,
    "lora": maybe(TEXT),
    "notes": [TEXT],
    "adapter_bytes": SIZES,
    "tensors": [
        {
            "name": TEXT,
            "kind": TEXT,
            "base_dtype": TEXT,
            "tuned_dtype": TEXT,
            "added_rows": WHOLE,
        }
    ],
    "changed": [
        {
            "name": TEXT,
            "kind": TEXT,
            "layer": maybe(WHOLE),
            "shape": [WHOLE],
            "delta_norm": NUMBER,
            "base_norm": NUMBER,
            "changed_share": NUMBER,
            "singular_values": maybe([NUMBER]),
            **SPECTRUM,
            "noise_floor": maybe(NUMBER),
            "above_noise": maybe(WHOLE),
            "gavish_donoho": maybe(WHOLE),
            "noise_share": NUMBER,
            "near_noise": YES_NO,
            "lora_rank": maybe(WHOLE),
            "lora_least": maybe(WHOLE),
            "lora_tail": maybe(NUMBER),
        }
    ],
    "unchanged": [TEXT],
}
AMPLIFICATION: Form = {
    "what": one_of("amplification"),
    "adapter": TEXT,
    "of_pair": YES_NO,
    "base": TEXT,
    "device": TEXT,
    "updates": [
        {
            "name": TEXT,
            "shape": [WHOLE],
            "rank": WHOLE,
            "delta_norm": NUMBER,
            "base_norm": NUMBER,
            "inside": NUMBER,
            "inside_own": NUMBER,
            "inside_by_chance": NUMBER,
            "phi_left": maybe(NUMBER),
            "phi_right": maybe(NUMBER),
            "amplification": maybe(NUMBER),
            "phi_left_by_chance": NUMBER,
            "phi_right_by_chance": NUMBER,
        }
    ],
    "notes": [TEXT],
}
FORECAST: Form = {
    "what": one_of("forecast"),
    "level": LEVEL,
    "adapter": TEXT,
    "base": TEXT,
    "device": TEXT,
    "lost_share": by_name(maybe(NUMBER)),
    "swallowed_share": by_name(maybe(NUMBER)),
    "updates": [
        {
            "name": TEXT,
            "dtype": TEXT,
            "update_norm": NUMBER,
            "base_norm": NUMBER,
            "lost_share": by_name(maybe(NUMBER)),
            "swallowed_share": by_name(maybe(NUMBER)),
            "overflowed": by_name(WHOLE),
            "spectral_norm": maybe(NUMBER),
            "base_spectral_norm": maybe(NUMBER),
            "strength": maybe(NUMBER),
        }
    ],
    "notes": [TEXT],
}
INTRUDERS: Form = {
    "what": one_of("intruders"),
    "level": LEVEL,
    "base": TEXT,
    "tuned": TEXT,
    "top": WHOLE,
    "epsilon": NUMBER,
    "device": TEXT,
    "intruders": WHOLE,
    "examined": WHOLE,
    "unchanged": WHOLE,
    "mitigated": maybe(
        {
            "output": TEXT,
            "kind": KINDS,
            "lambda": NUMBER,
            "tensors": WHOLE,
            "relative_error": NUMBER,
        }
    ),
    "weights": [
        {
            "name": TEXT,
            "shape": [WHOLE],
            "intruders": WHOLE,
            "intruder_energy": NUMBER,
            "update_spectral_norm": NUMBER,
            "base_spectral_norm": NUMBER,
            "strength": maybe(NUMBER),
            "exact": YES_NO,
            "sine_at_most": NUMBER,
            "directions": [
                {
                    "index": WHOLE,
                    "singular_value": NUMBER,
                    "cosine": NUMBER,
                    "cosine_at_most": NUMBER,
                    "intruder": YES_NO,
                }
            ],
        }
    ],
    "notes": [TEXT],
}
MITIGATE_PLAN: Form = {
    "base": TEXT,
    "tuned": TEXT,
    "kind": KINDS,
    "lambda": NUMBER,
    "top": WHOLE,
    "epsilon": NUMBER,
    "device": TEXT,
    "weights": [TEXT],
    "read_bytes": WHOLE,
    "output_bytes_at_most": WHOLE,
    "notes": [TEXT],
}
ADAPTERS: Form = {"what": one_of("adapters"), "level": LEVEL, "adapters": [ADAPTER]}

ERROR: Form = {
    "error": {
        "kind": TEXT,
        "message": TEXT,
        "details": [TEXT],
        "hint": maybe(TEXT),
        "exit_code": WHOLE,
    }
}

DOCUMENTS: dict[str, list[Form]] = {
    "combine/1": [COMBINE],
    "combine-plan/1": [COMBINE_PLAN],
    "compare/1": [COMPARE],
    "convert/1": [CONVERT],
    "convert-plan/1": [CONVERT_PLAN],
    "error/1": [ERROR],
    "estimate/1": [ESTIMATE],
    "extract/1": [EXTRACT],
    "extract-plan/1": [EXTRACT_PLAN],
    "extract-ranks/1": [EXTRACT_RANKS],
    "init/1": [INIT],
    "init-plan/1": [INIT_PLAN],
    "inspect/1": [CHECKPOINT, ADAPTER, ADAPTERS, PAIR, AMPLIFICATION, FORECAST, INTRUDERS],
    "list/1": [LIST],
    "merge/1": [MERGE],
    "merge-plan/1": [MERGE_PLAN],
    "mitigate-plan/1": [MITIGATE_PLAN],
    "push/1": [PUSH],
    "push-plan/1": [PUSH_PLAN],
    "recover/2": [RECOVER],
    "resize/1": [RESIZE],
    "resize-plan/1": [RESIZE_PLAN],
    "swap/1": [SWAP],
    "swap-plan/1": [SWAP_PLAN],
    "unmerge/1": [UNMERGE],
    "unmerge-plan/1": [UNMERGE_PLAN],
    "verify/1": [VERIFY],
    "verify-adapter/1": [VERIFY_ADAPTER],
}
"""Name and version → what the document is; several where ``what`` tells them apart."""


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a document by name and version."""
    envelope = {"schema": one_of(f"loratool/{name}"), "command": TEXT, "version": TEXT}
    bodies = [schema_of({**envelope, **form}) for form in DOCUMENTS[name]]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"loratool/{name}",
    }
    return head | (bodies[0] if len(bodies) == 1 else {"oneOf": bodies})
