"""``loratool push`` against a Hub on loopback, through the real client in another process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.hub.hub_adapters import BASE, CONFIG, NORM, REPORT, WEIGHTS, make_adapter, make_report
from tests.hub.hub_processes import Result
from tests.hub.hub_state import Fault, Hub

Push = Callable[..., Result]
PICTURE = "loratool_picture.png"
SNAPSHOT = "from huggingface_hub import snapshot_download; print(snapshot_download('alice/lora'))"


def metadata(readme: bytes) -> dict[str, object]:
    return yaml.safe_load(readme.decode().split("---")[1])


def assert_hub_error(result: Result, *words: str) -> None:
    assert result.code == 6, result
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err
    assert "hf_" not in result.err.replace("hf_transfer", "")


# What a push does -----------------------------------------------------------------------------


def test_a_push_creates_a_public_repository_with_exactly_these_files(hub: Hub, push: Push) -> None:
    result = push()
    assert result.code == 0, result.err
    repo = hub.repos["alice/lora"]
    assert not repo.private
    assert set(repo.files) == {".gitattributes", CONFIG, WEIGHTS, REPORT, "README.md"}
    assert len(repo.commits) == 2, "the repository's own first commit, and one push"
    assert f"{hub.url}/alice/lora" in result.out
    assert repo.sha in result.out


def test_as_a_program(hub: Hub, python: Callable[..., Result], adapter: Path) -> None:
    result = python("-m", "loratool", "push", str(adapter), "alice/lora")
    assert result.code == 0, result.err
    assert hub.repos["alice/lora"].files[WEIGHTS] == (adapter / WEIGHTS).read_bytes()


def test_weights_go_the_way_of_large_files(hub: Hub, push: Push) -> None:
    assert push().code == 0
    assert hub.repos["alice/lora"].large == {WEIGHTS}
    assert len(hub.asked("PUT /lfs/")) == 1
    assert len(hub.asked("POST /lfs-verify")) == 1


def test_weights_in_parts(hub: Hub, push: Push, adapter: Path) -> None:
    hub.part_bytes = 700
    assert push().code == 0
    assert len(hub.asked("PUT /lfs/")) == -(-(adapter / WEIGHTS).stat().st_size // 700)
    assert hub.repos["alice/lora"].files[WEIGHTS] == (adapter / WEIGHTS).read_bytes()


def test_a_download_gives_the_same_bytes(
    hub: Hub, push: Push, python: Callable[..., Result], adapter: Path
) -> None:
    assert push().code == 0
    folder = Path(python("-c", SNAPSHOT).out.strip())
    for name in (CONFIG, WEIGHTS, REPORT):
        assert (folder / name).read_bytes() == (adapter / name).read_bytes()
    assert not (adapter / "README.md").exists(), "a push writes nothing into the folder"


def test_a_picture_goes_up_with_the_card_that_shows_it(hub: Hub, push: Push) -> None:
    planned = json.loads(push("alice/lora", "--picture", "--dry-run", "--json").out)
    assert PICTURE in {file["name"] for file in planned["files"]}
    result = push("alice/lora", "--picture")
    assert result.code == 0, result.err
    files = hub.repos["alice/lora"].files
    assert files[PICTURE].startswith(b"\x89PNG")
    shown = "![Bars: ‖ΔW‖ of the updates that have most, and singular values"
    assert shown in files["README.md"].decode()
    assert f"]({PICTURE})" in files["README.md"].decode()
    assert push("alice/lora").code == 0
    again = hub.repos["alice/lora"].files["README.md"].decode()
    assert PICTURE not in again, "the card is written anew"


def test_a_picture_that_nobody_sees_is_said(hub: Hub, push: Push, adapter: Path) -> None:
    (adapter / "README.md").write_text("# Mine\n\nWords of my own.\n")
    for options in (("--dry-run",), ()):
        result = push("alice/lora", "--picture", *options)
        assert result.code == 0
        assert result.err.count("does not show the picture") == 1
    (adapter / "README.md").unlink()
    assert push("alice/lora", "--picture").err.count("does not show the picture") == 1
    assert "Words of my own" in hub.repos["alice/lora"].files["README.md"].decode()
    assert PICTURE in hub.repos["alice/lora"].files


def test_card_metadata(hub: Hub, push: Push) -> None:
    assert push("alice/lora", "--license", "apache-2.0").code == 0
    assert metadata(hub.repos["alice/lora"].files["README.md"]) == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "loratool", f"base_model:adapter:{BASE}"],
    }


def test_no_licence_is_claimed_unless_given(hub: Hub, push: Push) -> None:
    assert push().code == 0
    assert "license" not in metadata(hub.repos["alice/lora"].files["README.md"])


def test_pushing_again_changes_nothing(hub: Hub, push: Push) -> None:
    first, second = push(), push()
    assert (first.code, second.code) == (0, 0), second.err
    assert "nothing to change" in second.out
    assert len(hub.repos["alice/lora"].commits) == 2
    assert len(hub.asked("PUT /lfs/")) == 1


def test_pushing_a_changed_adapter_makes_one_more_commit(
    hub: Hub, push: Push, adapter: Path
) -> None:
    push()
    (adapter / REPORT).unlink()
    assert push("alice/lora", "--message", "without report").code == 0
    assert hub.repos["alice/lora"].messages[-1] == "without report"
    assert b"How it was made" not in hub.repos["alice/lora"].files["README.md"]


def test_other_files_of_the_folder_stay_at_home(hub: Hub, push: Push, adapter: Path) -> None:
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / ".env").write_text("SECRET=1")
    result = push()
    assert not {"tokenizer.json", ".env"} & set(hub.repos["alice/lora"].files)
    assert "not uploaded: .env, tokenizer.json" in result.err


def test_json(hub: Hub, push: Push) -> None:
    result = push("alice/lora", "--json")
    body = result.document
    repo = hub.repos["alice/lora"]
    assert body["schema"] == "loratool/push/1"
    assert (body["commit"], body["changed"], body["private"]) == (repo.sha, True, False)
    assert {file["name"]: file["bytes"] for file in body["files"]} == {
        name: len(repo.files[name]) for name in (CONFIG, WEIGHTS, REPORT, "README.md")
    }


def test_quiet_says_nothing(push: Push) -> None:
    result = push("alice/lora", "-q")
    assert (result.code, result.out, result.err) == (0, "", "")


# Private --------------------------------------------------------------------------------------


def test_private(hub: Hub, push: Push) -> None:
    result = push("team/lora", "--private")
    assert result.code == 0, result.err
    assert hub.repos["team/lora"].private
    assert "(private)" in result.out


def test_private_refuses_a_public_repository_before_uploading(hub: Hub, push: Push) -> None:
    repo = hub.add_repo("alice/lora", {})
    assert_hub_error(push("alice/lora", "--private"), "public")
    assert len(repo.commits) == 1
    assert not hub.asked("lfs")


def test_a_private_repository_stays_private_without_the_option(hub: Hub, push: Push) -> None:
    repo = hub.add_repo("alice/lora", {}, private=True)
    assert push().code == 0
    assert repo.private


# Dry run --------------------------------------------------------------------------------------


def test_a_dry_run_makes_no_request(hub: Hub, push: Push) -> None:
    result = push("alice/lora", "--dry-run", HF_TOKEN=None)
    assert result.code == 0, result.err
    assert hub.requests == []
    assert f"base_model: {BASE}" in result.out
    for name in (CONFIG, WEIGHTS, REPORT, "README.md"):
        assert name in result.out


def test_a_dry_run_shows_the_card_that_is_pushed(hub: Hub, push: Push) -> None:
    shown = push("alice/lora", "--dry-run", "--json").document["card"]
    push()
    assert hub.repos["alice/lora"].files["README.md"].decode() == shown


# Refused by the Hub ---------------------------------------------------------------------------


def test_not_logged_in(hub: Hub, push: Push) -> None:
    result = push(HF_TOKEN=None)
    assert_hub_error(result, "not logged in", "hf auth login")
    assert hub.requests == []


def test_invalid_token(push: Push) -> None:
    assert_hub_error(push(HF_TOKEN="hf_wrong"), "does not accept this token", "HF_TOKEN")


def test_token_that_only_reads(hub: Hub, push: Push) -> None:
    assert_hub_error(push(HF_TOKEN="hf_read"), "can only read", "write access")
    assert hub.repos == {}


def test_token_that_only_reads_on_an_existing_repository(hub: Hub, push: Push) -> None:
    repo = hub.add_repo("alice/lora", {})
    assert_hub_error(push(HF_TOKEN="hf_read"), "can only read")
    assert len(repo.commits) == 1


@pytest.mark.parametrize("exists", [False, True])
def test_somebody_elses_repository(hub: Hub, push: Push, exists: bool) -> None:
    if exists:
        hub.add_repo("alice/lora", {})
    assert_hub_error(push(HF_TOKEN="hf_bob"), "belongs to alice", "logged in as bob", "bob/lora")


def test_somebody_elses_private_repository(hub: Hub, push: Push) -> None:
    hub.add_repo("alice/lora", {}, private=True)
    assert_hub_error(push(HF_TOKEN="hf_bob"), "belongs to alice")


def test_unknown_branch(hub: Hub, push: Push) -> None:
    assert_hub_error(push("alice/lora", "--revision", "draft"), "no such branch")


def test_a_push_at_the_same_time(hub: Hub, push: Push) -> None:
    repo = hub.add_repo("alice/lora", {})
    hub.faults.append(Fault("POST .*/commit/", 412, body='{"error": "A commit has happened"}'))
    assert_hub_error(push(), "at the same time", "push again")
    assert len(repo.commits) == 1


def test_a_commit_states_what_it_builds_on(hub: Hub, push: Push) -> None:
    repo = hub.add_repo("alice/lora", {"README.md": b"# Mine"})
    before = repo.sha
    assert push().code == 0
    assert repo.parents == [before], "or a README.md edited meanwhile would be lost"


def test_the_card_is_refused(hub: Hub, push: Push) -> None:
    body = '{"errors": [{"message": "license must be one of"}]}'
    hub.faults.append(Fault("validate-yaml", 400, body=body))
    assert_hub_error(push("alice/lora", "--license", "nonsense"), "license must be one of")


def test_what_the_server_says_cannot_steer_the_terminal(hub: Hub, push: Push) -> None:
    body = json.dumps({"error": "no\x1b[2J\u202e way hf_alice"})
    hub.faults.append(Fault("POST /api/repos/create", 418, body=body))
    result = push()
    assert_hub_error(result, "418", "\\u001b[2J\\u202e way ***")
    assert "\x1b" not in result.err


def test_a_model_repository_takes_no_adapter(hub: Hub, push: Push) -> None:
    repo = hub.add_repo("alice/lora", {"config.json": b"{}", "model.safetensors": b""})
    assert_hub_error(push(), "holds a model")
    assert len(repo.commits) == 1


# Trouble on the way ---------------------------------------------------------------------------


def test_server_down(push: Push) -> None:
    result = push(HF_ENDPOINT="http://127.0.0.1:9")
    assert_hub_error(result, "http://127.0.0.1:9 cannot be reached")


def test_credentials_in_the_endpoint_are_not_shown(push: Push) -> None:
    result = push(HF_ENDPOINT="http://me:secret@127.0.0.1:9")
    assert_hub_error(result, "cannot be reached")
    assert "secret" not in result.err


def test_offline_mode(hub: Hub, push: Push) -> None:
    assert_hub_error(push(HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_server_without_xet(hub: Hub, push: Push) -> None:
    pytest.importorskip("hf_xet")
    result = push(HF_HUB_DISABLE_XET="0")
    if not hub.asked("xet-write-token"):
        pytest.skip("this client asks for large-file uploads first and falls back by itself")
    assert_hub_error(result, "HF_HUB_DISABLE_XET=1")


@pytest.mark.parametrize(
    "route",
    [
        "POST /api/repos/create",
        "GET /api/models/alice/lora$",
        "POST /api/validate-yaml",
        "/preupload/",
        "/objects/batch",
        "PUT /lfs/",
        "POST /lfs-verify",
        "/commit/",
    ],
)
def test_a_passing_5xx_is_retried(hub: Hub, push: Push, route: str) -> None:
    fault = Fault(route, 503, times=1, body="<html>busy</html>")
    hub.faults.append(fault)
    result = push()
    assert result.code == 0, result.err
    assert len(hub.repos["alice/lora"].commits) == 2
    assert fault.times == 0, "it did happen"


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: Hub, push: Push) -> None:
    hub.faults.append(Fault("/commit/", 502, times=1, after=True))
    result = push()
    assert result.code == 0, result.err
    assert len(hub.repos["alice/lora"].commits) == 2


def test_a_lasting_5xx(hub: Hub, push: Push) -> None:
    hub.faults.append(Fault("/commit/", 500))
    assert_hub_error(push(), "HTTP 500", "try again")
    assert len(hub.asked("/commit/")) == 3


def test_an_upload_that_fails_for_good(hub: Hub, push: Push) -> None:
    hub.faults.append(Fault("PUT /lfs/", 403, body="<Error>expired</Error>"))
    assert_hub_error(push(), "HTTP 403")
    assert len(hub.repos["alice/lora"].commits) == 1


def test_not_a_hub_at_all(hub: Hub, push: Push) -> None:
    hub.faults.append(Fault(".*", 200, body="<html>hotel wifi</html>"))
    assert_hub_error(push(), "does not understand", "HF_ENDPOINT")


# README.md ------------------------------------------------------------------------------------

OWN = "\r\n# Mine\r\n\r\nWords  \r\n| not | a | table\r\n---\r\n"


def test_own_words_in_the_folder_go_up_as_they_are(hub: Hub, push: Push, adapter: Path) -> None:
    (adapter / "README.md").write_bytes(f"---\r\nlanguage: no\r\n---\r\n{OWN}".encode())
    result = push()
    pushed = hub.repos["alice/lora"].files["README.md"].decode()
    assert result.code == 0, result.err
    assert pushed.startswith("---\r\nlanguage: no\r\nbase_model: ")
    assert pushed.split("---\r\n", 2)[2] == OWN
    assert "loratool" in pushed.split("---\r\n", 2)[1]


def test_own_words_in_the_repository_stay(hub: Hub, push: Push) -> None:
    text = f"---\nlicense: mit # chosen with care\n---\n{OWN}"
    repo = hub.add_repo("alice/lora", {"README.md": text.encode()})
    assert push().code == 0
    pushed = repo.files["README.md"].decode()
    assert pushed.endswith(f"---\n{OWN}")
    assert "license: mit # chosen with care\n" in pushed
    assert metadata(repo.files["README.md"])["base_model"] == BASE


def test_own_words_in_both_places(hub: Hub, push: Push, adapter: Path) -> None:
    repo = hub.add_repo("alice/lora", {"README.md": OWN.encode()})
    (adapter / "README.md").write_text("# From the folder\n")
    result = push()
    assert repo.files["README.md"].decode().endswith(OWN)
    assert "README.md in the folder was not uploaded" in result.err


def test_words_around_our_part_survive_the_next_push(hub: Hub, push: Push, adapter: Path) -> None:
    push()
    repo = hub.repos["alice/lora"]
    edited = repo.files["README.md"].decode() + "\n## My own notes\n"
    edited = edited.replace("energy:0.95", "tampered")
    repo.commit({**repo.files, "README.md": edited.encode()})
    assert push().code == 0
    pushed = repo.files["README.md"].decode()
    assert pushed.endswith("\n## My own notes\n")
    assert "energy:0.95" in pushed
    assert "tampered" not in pushed


def test_an_unreadable_readme_up_there_stops_the_push(hub: Hub, push: Push) -> None:
    repo = hub.add_repo("alice/lora", {"README.md": b"---\n[\n---\nwords"})
    result = push()
    assert result.code == 3
    assert "alice/lora/README.md" in result.err
    assert len(repo.commits) == 1


# The base model -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base", ["/home/me/gpt2", "./gpt2", "../a/b", "C:\\gpt2", "gpt2", "", None]
)
def test_a_base_that_is_no_hub_name_is_refused(
    hub: Hub, push: Push, tmp_path: Path, base: str | None
) -> None:
    folder = make_adapter(tmp_path / "other", base=base)
    result = push(folder=str(folder))
    assert result.code == 2
    assert "--base-model owner/name" in result.err
    assert hub.requests == []


def test_base_model_option_corrects_only_what_goes_up(hub: Hub, push: Push, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "other", base="/home/me/gpt2")
    before = (folder / CONFIG).read_bytes()
    result = push("alice/lora", "--base-model", BASE, folder=str(folder))
    assert result.code == 0, result.err
    files = hub.repos["alice/lora"].files
    assert json.loads(files[CONFIG]) == {**json.loads(before), "base_model_name_or_path": BASE}
    assert (folder / CONFIG).read_bytes() == before
    assert b"/home/me" not in b"".join(files.values())


def test_a_relative_path_that_looks_like_a_hub_name_is_refused(
    push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    folder = make_adapter(tmp_path / "other", base="models/base")
    assert push(folder=str(folder)).code == 2


# What is not pushed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lora", "a/b/c", "https://huggingface.co/a/b", "a/b--c", "a/b.git"]
)
def test_bad_repository_names(hub: Hub, push: Push, name: str) -> None:
    result = push(name)
    assert result.code == 2
    assert "Traceback" not in result.err
    assert hub.requests == []


def test_a_single_file_is_refused(push: Push, adapter: Path) -> None:
    result = push(folder=str(adapter / WEIGHTS))
    assert result.code == 2
    assert "folder" in result.err


def test_a_pickle_is_refused(push: Push, adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    result = push()
    assert result.code == 3
    assert "safetensors" in result.err


def test_a_report_with_local_paths_is_refused(hub: Hub, push: Push, adapter: Path) -> None:
    report = make_report()
    report["base"]["name"] = "/home/me/secret-project"
    (adapter / REPORT).write_text(json.dumps(report))
    result = push()
    assert result.code == 3
    assert "base.name" in result.err
    assert hub.requests == []


def test_a_config_with_local_paths_is_refused(push: Push, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "other", auto_mapping={"from": "~/models/base"})
    result = push(folder=str(folder))
    assert result.code == 3
    assert "auto_mapping.from" in result.err


def test_a_report_about_another_adapter_is_refused(push: Push, adapter: Path) -> None:
    report = make_report()
    report["tensors"][0]["rank"] = 8
    (adapter / REPORT).write_text(json.dumps(report))
    result = push()
    assert result.code == 4
    assert "describes another adapter" in result.err


def test_a_report_in_the_bare_models_names_is_about_this_adapter(push: Push, adapter: Path) -> None:
    text = (adapter / REPORT).read_text()
    (adapter / REPORT).write_text(text.replace("transformer.", ""))
    assert push("alice/lora", "--dry-run").code == 0


def test_hostile_names_do_not_get_into_the_card(hub: Hub, push: Push, adapter: Path) -> None:
    report = make_report()
    evil = "x|`</td><script>alert(1)</script>\n# hi <!-- made by loratool -->\x1b[31m"
    report["tensors"][2]["name"] = evil
    report["tensors"][3]["kind"] = report["rank"] = report["tuned"]["name"] = evil
    (adapter / REPORT).write_text(json.dumps(report))
    assert push().code == 0
    card = hub.repos["alice/lora"].files["README.md"].decode()
    assert "<script" not in card
    assert "</td" not in card
    assert "\x1b" not in card
    assert card.count("<!-- made by loratool -->") == 1
    assert "\n# hi" not in card
    assert NORM not in card
