"""merge --receipt, unmerge: the base comes back bit for bit, or the difference is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool as lt
from loratool.errors import (
    DisagreementError,
    InputMissing,
    MalformedFile,
    NothingMatches,
    OutputError,
    UnsupportedInput,
)
from loratool.ops.unmerge import plan_unmerge, run_unmerge
from loratool.ops.verify_report import DIFFERS, EXACT
from loratool.receipt import RECEIPT_FILE, read_receipt
from tests.builders import snapshot
from tests.ops.builders import (
    GPT2,
    LLAMA,
    State,
    gpt2_like,
    llama_like,
    load_folder,
    moved,
    save_folder,
    save_peft,
)
from tests.ops.test_merge import DOWN1, Q0, factors

Q, DOWN = f"{Q0}.weight", f"{DOWN1}.weight"
FACTORS = {Q0: factors(24, 24), DOWN1: factors(24, 40)}


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, but for the receipt's."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECEIPT_FILE
    }


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """base/, adapter/ and merged/ with a receipt, bf16 in two shards."""
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA, shards=2)
    save_peft(tmp_path / "adapter", FACTORS, lora_alpha=16)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged", receipt=True)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_base_comes_back(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    base = save_folder(llama_like(dtype), tmp_path / "base", LLAMA, shards)
    (base / "tokenizer.json").write_text('{"a": 1}')
    adapter = save_peft(tmp_path / "adapter", FACTORS, lora_alpha=16)
    merged = lt.merge(base, adapter, tmp_path / "merged", receipt=True)
    without = lt.merge(base, adapter, tmp_path / "plain")
    assert bytes_of(tmp_path / "merged") == bytes_of(tmp_path / "plain")
    assert merged.facts["receipt"]["corrected"] > 0
    assert without.facts["receipt"] is None
    report = lt.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert report.exact
    assert report.total("corrected") == merged.facts["receipt"]["corrected"]
    assert bytes_of(tmp_path / "back") == bytes_of(base)


def test_weights_scale_and_order(tmp_path: Path) -> None:
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA)
    one = save_peft(tmp_path / "one", FACTORS, lora_alpha=16)
    two = save_peft(tmp_path / "two", {Q0: factors(24, 24, seed=8)}, lora_alpha=5)
    lt.merge(base, [(one, 0.7), (two, -0.4)], tmp_path / "merged", scale=0.5, receipt=True)
    given = [(two, -0.4 * 0.5), (one, 0.7 * 0.5)]
    lt.unmerge(tmp_path / "merged", given, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(base)
    with pytest.raises(DisagreementError, match=r"weight 0\.35, and is given with 0\.7") as caught:
        lt.unmerge(tmp_path / "merged", [(one, 0.7), (two, -0.2)], tmp_path / "no")
    assert caught.value.hint == "write it as one:0.35"
    with pytest.raises(DisagreementError, match="2 adapters were merged, the number given is 1"):
        lt.unmerge(tmp_path / "merged", [(one, 0.35)], tmp_path / "no")


def test_every_kind_that_extract_writes(tmp_path: Path) -> None:
    """Conv1D, and tensors replaced whole: biases, norms, tables."""
    state = gpt2_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", GPT2)
    tuned = save_folder(moved(state), tmp_path / "tuned", GPT2)
    lt.extract(base, tuned, tmp_path / "adapter", rank=4)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged", receipt=True)
    lt.unmerge(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(base)
    methods = {record.method for record in receipt_of(tmp_path).tensors.values()}
    assert methods == {"subtract", "keep"}


def receipt_of(folder: Path):  # type: ignore[no-untyped-def]
    return read_receipt(folder / "merged" / RECEIPT_FILE)


@pytest.mark.parametrize(
    ("base_dtype", "options"),
    [
        (torch.bfloat16, {"dtype": "float32"}),
        (torch.float32, {"dtype": "bfloat16"}),
        (torch.float16, {"dtype": "bfloat16"}),
        (torch.bfloat16, {"max_shard_size": "4KB"}),
    ],
)
def test_another_dtype_and_other_shards(
    base_dtype: torch.dtype, options: dict[str, str], tmp_path: Path
) -> None:
    """A wider result costs little, a narrower one the base itself; either way it comes back."""
    base = save_folder(llama_like(base_dtype), tmp_path / "base", LLAMA, shards=2)
    adapter = save_peft(tmp_path / "adapter", FACTORS, lora_alpha=16)
    lt.merge(base, adapter, tmp_path / "merged", receipt=True, **options)
    lt.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(base)


def test_a_pickled_base_comes_back_as_safetensors(tmp_path: Path) -> None:
    state = llama_like(torch.bfloat16)
    (tmp_path / "base").mkdir()
    torch.save(state, tmp_path / "base" / "pytorch_model.bin")
    adapter = save_peft(tmp_path / "adapter", FACTORS, lora_alpha=16)
    lt.merge(tmp_path / "base", adapter, tmp_path / "merged", receipt=True)
    lt.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    back = load_folder(tmp_path / "back")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_a_single_file_and_a_receipt_elsewhere(tmp_path: Path) -> None:
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base") / "model.safetensors"
    adapter = save_peft(tmp_path / "adapter", FACTORS, lora_alpha=16)
    lt.merge(base, adapter, tmp_path / "m.safetensors", receipt=True)
    beside = tmp_path / f"m.{RECEIPT_FILE}"
    assert beside.is_file()
    lt.unmerge(tmp_path / "m.safetensors", adapter, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()
    lt.merge(base, adapter, tmp_path / "n.safetensors", receipt=tmp_path / "r.safetensors")
    lt.unmerge(
        tmp_path / "n.safetensors",
        adapter,
        tmp_path / "again.safetensors",
        receipt=tmp_path / "r.safetensors",
    )
    assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()


def test_the_config_beside_a_single_file(tmp_path: Path) -> None:
    """Merged into a folder, it says the new dtype; the restored one says the base's."""
    config = LLAMA | {"torch_dtype": "float32"}
    base = save_folder(llama_like(), tmp_path / "base", config)
    adapter = save_peft(tmp_path / "adapter", FACTORS)
    file, merged = base / "model.safetensors", tmp_path / "merged"
    lt.merge(file, adapter, merged, dtype="bfloat16", receipt=True)
    assert json.loads((merged / "config.json").read_text())["torch_dtype"] == "bfloat16"
    lt.unmerge(merged, adapter, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(base)


def test_small_files_that_are_not_as_the_merge_left_them(made: Path) -> None:
    """They come along as they are, and it is said; weights are the base's all the same."""
    merged, adapter = made / "merged", made / "adapter"
    assert lt.unmerge(merged, adapter, made / "back").facts["notes"] == []
    config = (merged / "config.json").read_text()
    (merged / "config.json").write_text(config + " ")
    (merged / "notes.txt").write_text("later")
    expected = [
        "config.json: was changed since the merge, and is not the base's",
        "notes.txt: came into the merged folder since the merge",
    ]
    assert lt.unmerge(merged, adapter, made / "two").facts["notes"] == expected
    swapped = lt.swap(merged, adapter, [(adapter, 0.5)], made / "swapped")
    assert swapped.facts["notes"] == expected
    (merged / "config.json").unlink()
    report = lt.unmerge(merged, adapter, made / "three")
    assert report.facts["notes"][0].startswith("config.json: the base had it")


def test_where_a_receipt_may_go(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", FACTORS)
    for place in (tmp_path / "out" / "other.safetensors", tmp_path / "base", tmp_path / "x.json"):
        with pytest.raises(OutputError):
            lt.merge(base, adapter, tmp_path / "out", receipt=place)
    assert not (tmp_path / "out").exists()


def test_a_merge_of_a_folder_with_a_receipt_reads_its_weights(made: Path) -> None:
    """The receipt is no weight file, whatever its suffix."""
    (made / "merged" / "model.safetensors.index.json").unlink()
    first, second = sorted((made / "merged").glob("model-*"))
    second.unlink()
    first.rename(made / "merged" / "odd.safetensors")
    assert len(lt.open_checkpoint(made / "merged")) > 0


# Any values -----------------------------------------------------------------------------------

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    """w0, b, a, alpha: mixed magnitudes, subnormals, both zeros, rows of B that are zero."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, columns, rank = (draw(st.integers(1, most)) for most in (9, 9, 3))
    special = [0.0, -0.0, 1.0, -1.0, 1.5, float(torch.finfo(dtype).tiny), 3e-5, -6e-8]

    def values(count: int, size: float) -> Tensor:
        element = st.one_of(st.sampled_from(special), st.floats(-size, size, width=32))
        return torch.tensor(draw(st.lists(element, min_size=count, max_size=count)))

    w0 = values(rows * columns, 4.0).reshape(rows, columns).to(dtype)
    b = values(rows * rank, 2.0).reshape(rows, rank)
    a = values(rank * columns, 2.0).reshape(rank, columns)
    return w0, b, a, draw(st.sampled_from([1.0, 16.0, -3.0, 0.0]))


@given(st.lists(cases(), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_any_base_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    cases: list[tuple[Tensor, Tensor, Tensor, float]],
) -> None:
    folder = tmp_path_factory.mktemp("case")
    modules = [f"model.layers.{index}.self_attn.q_proj" for index in range(len(cases))]
    state = {f"{module}.weight": case[0] for module, case in zip(modules, cases, strict=True)}
    base = save_folder(state, folder / "base", LLAMA)
    adapter = save_peft(
        folder / "adapter",
        {module: (a, b) for module, (_, b, a, _) in zip(modules, cases, strict=True)},
        alpha_pattern={module: case[3] for module, case in zip(modules, cases, strict=True)},
        rank_pattern={module: len(case[2]) for module, case in zip(modules, cases, strict=True)},
    )
    lt.merge(base, adapter, folder / "merged", receipt=True)
    lt.unmerge(folder / "merged", adapter, folder / "back")
    assert bytes_of(folder / "back") == bytes_of(base)
    (folder / "merged" / RECEIPT_FILE).unlink()
    report = lt.unmerge(folder / "merged", adapter, folder / "near")
    near = load_folder(folder / "near")
    for row in report.rows:
        width = {2: torch.int16, 4: torch.int32}[state[row.name].element_size()]
        wrong = int((near[row.name].view(width) != state[row.name].view(width)).sum())
        assert wrong <= row.uncertain, "what is called certain is the base's"
    shutil.rmtree(folder)


# Without a receipt ----------------------------------------------------------------------------


def test_without_a_receipt_what_is_uncertain_is_counted(tmp_path: Path) -> None:
    """A small update loses little: most weights are certain, and right."""
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA)
    small = {module: (a * 0.02, b) for module, (a, b) in FACTORS.items()}
    adapter = save_peft(tmp_path / "adapter", small)
    lt.merge(base, adapter, tmp_path / "merged")
    report = lt.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert not report.exact
    before, after = load_folder(base), load_folder(tmp_path / "back")
    wrong = sum(int((before[name] != after[name]).sum()) for name in before)
    assert 0 < wrong <= report.total("uncertain")
    assert report.uncertain_share < 0.1


def test_what_was_replaced_needs_a_receipt(tmp_path: Path) -> None:
    state = gpt2_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", GPT2)
    tuned = save_folder(moved(state), tmp_path / "tuned", GPT2)
    lt.extract(base, tuned, tmp_path / "adapter", rank=4)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(DisagreementError, match="cannot be restored without a receipt"):
        lt.unmerge(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# Receipts that do not fit ---------------------------------------------------------------------


def refused(folder: Path, kind: type[Exception], message: str, **options: Path) -> None:
    """unmerge says ``message``, writes nothing, and harms nothing."""
    before = snapshot(folder)
    with pytest.raises(kind, match=message):
        lt.unmerge(
            options.get("merged", folder / "merged"),
            options.get("adapter", folder / "adapter"),
            folder / "back",
            receipt=options.get("receipt"),
        )
    assert snapshot(folder) == before


def test_another_adapter(made: Path) -> None:
    save_peft(made / "other", {**FACTORS, Q0: factors(24, 24, seed=6)}, lora_alpha=16)
    refused(made, DisagreementError, "q_proj.weight holds other values", adapter=made / "other")
    save_peft(made / "scaled", FACTORS, lora_alpha=8)
    message = "has the scale 2.66.*, was merged with 5.33"
    refused(made, DisagreementError, message, adapter=made / "scaled")
    save_peft(made / "fewer", {Q0: FACTORS[Q0]}, lora_alpha=16)
    refused(made, DisagreementError, "it has no update for .*down_proj", adapter=made / "fewer")


def test_another_merge(made: Path) -> None:
    other = save_folder(llama_like(torch.bfloat16, seed=3), made / "base2", LLAMA, shards=2)
    lt.merge(other, made / "adapter", made / "merged2")
    message = "its values are not those that the receipt was made for"
    receipt = made / "merged" / RECEIPT_FILE
    refused(made, DisagreementError, message, merged=made / "merged2", receipt=receipt)
    smaller = save_folder(llama_like(torch.bfloat16, layers=3), made / "base3", LLAMA)
    lt.merge(made / "base3", made / "adapter", made / "merged3")
    assert smaller.is_dir()
    state = {
        name: value
        for name, value in llama_like(torch.bfloat16).items()
        if name != "model.norm.weight"
    }
    save_folder(state, made / "base4", LLAMA)
    lt.merge(made / "base4", made / "adapter", made / "merged4")
    refused(made, DisagreementError, "no such tensor", merged=made / "merged4", receipt=receipt)


def test_one_bit_of_the_merged_weights(made: Path) -> None:
    path = next((made / "merged").glob("model-00001*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(made, DisagreementError, "its values are not those that the receipt was made for")


def test_no_receipt_where_one_is_named(made: Path) -> None:
    refused(made, InputMissing, "no such receipt", receipt=made / "nowhere.safetensors")
    weights = next((made / "base").glob("*.safetensors"))
    refused(made, UnsupportedInput, "is not a receipt", receipt=weights)


def test_damaged_receipts_are_refused(made: Path) -> None:
    """Cut short anywhere; every 29th byte changed: an error, or, for a byte that does not matter
    (a name of a tensor's own choosing), the base all the same."""
    path = made / "merged" / RECEIPT_FILE
    good, base = path.read_bytes(), bytes_of(made / "base")
    for length in (0, 7, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        refused(made, MalformedFile, RECEIPT_FILE)
    restored = 0
    for index in range(8, len(good), 29):
        damaged = bytearray(good)
        damaged[index] ^= 0x11
        path.write_bytes(damaged)
        try:
            lt.unmerge(made / "merged", made / "adapter", made / "back")
        except lt.LoratoolError:
            assert not (made / "back").exists()
            continue
        assert bytes_of(made / "back") == base
        shutil.rmtree(made / "back")
        restored += 1
    assert restored < 0.1 * len(good) / 29


def edit(made: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Rewrite the receipt's record, or its tensors, as a forger would."""
    path = made / "merged" / RECEIPT_FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    record = json.loads(tensors["record"].numpy().tobytes())
    change(record, tensors)
    text = json.dumps(record).encode()
    tensors["record"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(tensors, path, metadata | {"sha256": seal_of(tensors)})


def seal_of(tensors: State) -> str:
    """As the format has it: of names, shapes and bytes of all but corrections and norms."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not name.startswith(("corrections.", "norms.")):
            digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
            digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _forge(key: str, value: object):  # type: ignore[no-untyped-def]
    def change(record: dict, tensors: dict) -> None:  # type: ignore[type-arg]
        record["tensors"][Q][key] = value

    return change


def _norms(record: dict, tensors: dict) -> None:  # type: ignore[type-arg]
    record["tensors"][Q]["method"] = "lines"
    tensors[f"norms.{Q}"] = torch.ones(24, dtype=torch.float64)


def _outside(record: dict, tensors: dict) -> None:  # type: ignore[type-arg]
    record["files"][0]["name"] = "../../escape.safetensors"


def _twice(record: dict, tensors: dict) -> None:  # type: ignore[type-arg]
    record["files"][1]["name"] = record["files"][0]["name"]


def _stray(record: dict, tensors: dict) -> None:  # type: ignore[type-arg]
    tensors["stray"] = torch.zeros(3, dtype=torch.uint8)


def _side_file(record: dict, tensors: dict) -> None:  # type: ignore[type-arg]
    tensors["file./etc/passwd"] = torch.zeros(3, dtype=torch.uint8)


def _huge_header(record: dict, tensors: dict) -> None:  # type: ignore[type-arg]
    record["files"][0]["size"] = 2**62


def _no_corrections(record: dict, tensors: dict) -> None:  # type: ignore[type-arg]
    del tensors[f"corrections.{Q}"]


def _long_corrections(record: dict, tensors: dict) -> None:  # type: ignore[type-arg]
    key = f"corrections.{Q}"
    tensors[key] = torch.cat([tensors[key], torch.zeros(4, dtype=torch.uint8)])


def _huge_count(record: dict, tensors: dict) -> None:  # type: ignore[type-arg]
    tensors[f"corrections.{Q}"][2:6] = 255


def _weight(record: dict, tensors: dict) -> None:  # type: ignore[type-arg]
    record["adapters"][0]["weight"] = "1.0"


FORGERIES = {
    "unknown method": (_forge("method", "divine"), MalformedFile, "unknown method"),
    "no norms": (_forge("method", "lines"), MalformedFile, "lacks the norms"),
    "foreign norms": (_norms, MalformedFile, "has norms, the adapter no DoRA"),
    "no hash": (_forge("base_sha256", "abc"), MalformedFile, "no SHA-256"),
    "wrong base hash": (_forge("base_sha256", "0" * 64), DisagreementError, "is not the base"),
    "wrong merged hash": (_forge("merged_sha256", "0" * 64), DisagreementError, "not those"),
    "huge misses": (_forge("misses", 2**60), MalformedFile, "more differences"),
    "same": (_forge("method", "same"), MalformedFile, "does not mention"),
    "keep": (_forge("method", "keep"), DisagreementError, "is not the base"),
    "a file outside": (_outside, MalformedFile, "outside its own folder"),
    "a side file outside": (_side_file, MalformedFile, "outside its own folder"),
    "a file twice": (_twice, MalformedFile, "twice"),
    "a stray tensor": (_stray, MalformedFile, "does not mention"),
    "a huge file": (_huge_header, MalformedFile, "does not mention"),
    "no corrections": (_no_corrections, MalformedFile, "lacks the corrections"),
    "long corrections": (_long_corrections, MalformedFile, "last block"),
    "a huge count": (_huge_count, MalformedFile, "claims 4,294,967,295 differences"),
    "a decimal weight": (_weight, MalformedFile, "hexadecimal"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_receipts_are_refused(name: str, made: Path) -> None:
    change, kind, message = FORGERIES[name]
    edit(made, change)
    refused(made, kind, message)


def test_an_unforged_receipt_still_works(made: Path) -> None:
    """The forger's own tools leave it intact."""
    edit(made, lambda record, tensors: None)
    lt.unmerge(made / "merged", made / "adapter", made / "back")
    assert bytes_of(made / "back") == bytes_of(made / "base")


def test_a_plan_writes_nothing(made: Path) -> None:
    before = snapshot(made)
    plan = plan_unmerge(made / "merged", [(made / "adapter", 1.0)], made / "back")
    assert plan.to_json()["exact"] is True
    assert snapshot(made) == before
    assert run_unmerge(plan).exact


def test_a_part_of_an_adapter_without_a_receipt(tmp_path: Path) -> None:
    """What --include and --exclude left out of the merge does not come out again."""
    base = save_folder(llama_like(torch.float32), tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", FACTORS, lora_alpha=16)
    lt.merge(base, adapter, tmp_path / "merged", exclude=["q_proj"])
    lt.unmerge(tmp_path / "merged", adapter, tmp_path / "back", exclude=["q_proj"])
    before, back = load_folder(base), load_folder(tmp_path / "back")
    assert torch.equal(before[Q], back[Q])
    assert not torch.equal(before[DOWN], load_folder(tmp_path / "merged")[DOWN])
    torch.testing.assert_close(back[DOWN], before[DOWN])
    with pytest.raises(NothingMatches, match="'nosuch' matches nothing"):
        lt.unmerge(tmp_path / "merged", adapter, tmp_path / "no", include=["nosuch"])
    partly = {"exclude": ["q_proj"]}
    assert lt.verify(tmp_path / "merged", base, adapter, **partly).verdict == EXACT  # type: ignore[arg-type]
    assert lt.verify(tmp_path / "merged", base, adapter).verdict == DIFFERS


def test_a_part_that_the_receipt_does_not_record_is_said_to_be_left_out(tmp_path: Path) -> None:
    base = save_folder(llama_like(torch.float32), tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", FACTORS, lora_alpha=16)
    lt.merge(base, adapter, tmp_path / "merged", exclude=["q_proj"], receipt=True)
    assert lt.unmerge(tmp_path / "merged", adapter, tmp_path / "b", exclude=["q_proj"]).exact
    for options in ({"include": ["q_proj"]}, {"exclude": ["down_proj"]}):
        with pytest.raises(DisagreementError, match="it has no update for") as refused:
            lt.unmerge(tmp_path / "merged", adapter, tmp_path / "no", **options)  # type: ignore[arg-type]
        assert "--include and --exclude leave out" in str(refused.value.hint)
