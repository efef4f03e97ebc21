"""Models named by their repository on the Hugging Face hub: pinned to a commit, fetched once, refused in a sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flm_jax.checkpoint.find import step_directory
from flm_jax.checkpoint.manifest import read_manifest, read_meta
from flm_jax.cli import errors
from flm_jax.convert import importing
from flm_jax.convert.companions import FormatError
from flm_jax.convert.importing import import_model
from flm_jax.convert.repository import located
from flm_jax.data.hub import HubError, find
from flm_jax.data.train_vocabulary import load_vocabulary
from flm_jax.evaluation.loaded import load_model
from tests import foreign
from tests.environment import as_user
from tests.hub_server import COMMIT, OTHER, PIECE, hub_here, hub_server

ROOT = Path(__file__).resolve().parent.parent
# What repositories hold beside a model, and nobody asks for here.
MORE = ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "onnx/model.onnx", "README.md")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model in three files, and the work directory that it becomes when it is read as a directory."""
    base = tmp_path_factory.mktemp("made")
    foreign.write(base / "in", shard_bytes=6000)
    import_model(base / "in", base / "checkpoint")
    (base / "in" / "onnx").mkdir()
    for name in MORE:
        (base / "in" / name).write_bytes(b"never fetched")
    return base


@pytest.fixture
def hub(monkeypatch, tmp_path, made):
    with hub_here(monkeypatch, tmp_path / "cache") as found:
        found.add("me/tiny", made / "in")
        monkeypatch.chdir(tmp_path)
        yield found


def meta_of(workdir):
    step = step_directory(workdir)
    return read_meta(step, read_manifest(step))


def digest_of(workdir):
    return read_manifest(step_directory(workdir)).state_digest


def restarted():
    """What a program knows of the hub when it starts."""
    from huggingface_hub import _tree_cache

    find.cache_clear()
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()


def unlisted(directory):
    """Makes a snapshot one of a program that fetched files one by one, so that nothing says which there are."""
    (directory.parents[1] / "trees" / f"{directory.name}.json").unlink()


def test_a_repository_becomes_the_checkpoint_that_its_directory_becomes_and_records_the_commit(hub, made, tmp_path):
    found = import_model("me/tiny", tmp_path / "run")
    assert digest_of(tmp_path / "run") == digest_of(made / "checkpoint")
    assert (
        meta_of(tmp_path / "run")["provenance"].items()
        >= dict(source="me/tiny", revision="main", commit=COMMIT).items()
    )
    assert found["commit"] == COMMIT and "tokenizer.json" in found["files"]
    shards = {path.name for path in (made / "in").glob("model-*.safetensors")}
    assert len(shards) == 3 and hub.fetched == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
        *shards,
    }


def test_a_commit_stays_what_it_is_when_main_moves_on(hub, tmp_path):
    foreign.write(tmp_path / "next", tokenizer=False)
    hub.add("me/tiny", tmp_path / "next", OTHER)
    assert import_model("me/tiny", tmp_path / "a")["commit"] == OTHER
    assert import_model(f"me/tiny@{COMMIT}", tmp_path / "b")["commit"] == COMMIT
    assert len(importing.examine(located(f"me/tiny@{COMMIT}")[0])[3]) > len(importing.examine(located("me/tiny")[0])[3])


def test_one_program_sees_one_commit(hub, tmp_path):
    assert located("me/tiny")[1]["commit"] == COMMIT
    foreign.write(tmp_path / "next", tokenizer=False)
    hub.add("me/tiny", tmp_path / "next", OTHER)
    assert located("me/tiny")[1]["commit"] == COMMIT
    restarted()
    assert located("me/tiny")[1]["commit"] == OTHER


def test_a_directory_of_that_name_comes_first(hub, made, tmp_path):
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "tiny").symlink_to(made / "in")
    assert located("me/tiny") == (Path("me/tiny"), {"source": "me/tiny"})
    assert not hub.asked


def test_what_is_in_the_cache_is_read_again_without_the_hub(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    located("me/tiny")
    restarted()
    hub.asked.clear()
    located("me/tiny")
    assert not hub.fetched
    restarted()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert import_model("me/tiny", tmp_path / "offline")["commit"] == COMMIT
    assert not hub.asked
    restarted()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.down = 503
    assert import_model("me/tiny", tmp_path / "down")["commit"] == COMMIT


def test_a_download_that_breaks_goes_on_at_its_byte(hub, made, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", PIECE)
    name = "model-00002-of-00003.safetensors"
    hub.cut, hub.breaks = {name: 1000}, 1
    import_model("me/tiny", tmp_path / "run")
    assert [held for _, path, held in hub.asked if path.endswith(name) and held] == ["bytes=1000-"]
    assert digest_of(tmp_path / "run") == digest_of(made / "checkpoint")


def test_a_download_that_was_given_up_keeps_the_complete_files(hub, made, monkeypatch, tmp_path):
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    name = "model-00003-of-00003.safetensors"
    hub.cut, hub.breaks = {name: 0}, 100
    with pytest.raises(HubError, match=r"me/tiny@0123\w+: the download broke off \(.*\)\. Run the same command again"):
        import_model("me/tiny", tmp_path / "run")
    assert not list(tmp_path.glob("run/**/0*"))
    hub.breaks = 0
    restarted()
    hub.asked.clear()
    import_model("me/tiny", tmp_path / "run")
    assert hub.fetched == {name}
    assert digest_of(tmp_path / "run") == digest_of(made / "checkpoint")


def test_an_interrupt_ends_a_download_in_the_middle_of_a_file_and_leaves_no_part_of_it(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    def sending(name, at):
        if name.startswith("model-00001") and at:
            if at == 2 * PIECE:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", PIECE)
    hub.sending = sending
    with pytest.raises(KeyboardInterrupt):
        import_model("me/tiny", tmp_path / "run")
    assert not list(tmp_path.rglob("*.incomplete"))
    assert not list(tmp_path.rglob("model-00001*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/large", "no directory me/large here, and the hub shows no repository of that name: check it, or, if"),
        ("me/tiny@v2", "me/tiny has no revision 'v2': give a branch, a tag or a whole commit after the @; without one"),
        ("me/gated", "me/gated is gated: accept its terms on its page, then log in with `hf auth login`, or set HF_TO"),
        (
            "me/tiny@a..b",
            "is not a directory; .* A repository of the Hugging Face hub is named as org/name or org/name@",
        ),
        ("tiny", "is not a directory; .* A repository of the Hugging Face hub is named"),
        ("runs/dmeo", "runs/dmeo is not a directory; .* so it was taken for a path; .* that name is runs/dmeo@main"),
    ],
)
def test_what_is_not_there_or_not_given_is_said(name, message, hub, made, tmp_path):
    (tmp_path / "runs").mkdir()
    hub.add("me/gated", made / "in")
    hub.gated.add("me/gated")
    with pytest.raises(errors.EXPECTED, match=message):
        import_model(name, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("drop", "changes", "message"),
    [
        ("config.json", {}, r"me/other@0123\w+ has no config.json: it is no model"),
        ("*.safetensors*", {}, r"holds neither model.safetensors nor .*; it has pytorch_model.bin: only safetensors"),
        ("model-00002*", {}, r"me/other@0123\w+ has no model-00002-of-00003.safetensors: give another"),
        ("", {"architectures": ["GPT2LMHeadModel"]}, r"me/other@\w+: config.json names GPT2LMHeadModel as its arch"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused_before_its_weights_are_fetched(
    drop, changes, message, hub, made, tmp_path
):
    other = foreign.write(tmp_path / "other", shard_bytes=6000)
    (other / "pytorch_model.bin").write_bytes(b"x")
    for path in other.glob(drop) if drop else ():
        path.unlink()
    if changes:
        foreign.change_json(other / "config.json", **changes)
    hub.add("me/other", other)
    with pytest.raises((FormatError, ValueError, HubError), match=message):
        import_model("me/other", tmp_path / "run")
    assert not [name for name in hub.fetched if name.endswith((".safetensors", ".bin"))]


@pytest.mark.parametrize(("dtype", "message"), [(None, "run is not empty"), ("bf16", "did you mean 'bfloat16'")])
def test_what_is_wrong_with_the_command_is_said_before_anything_is_asked(dtype, message, hub, tmp_path):
    if dtype is None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine").touch()
    with pytest.raises(ValueError, match=message):
        import_model("me/tiny", tmp_path / "run", dtype)
    assert not hub.asked


def test_without_room_nothing_is_fetched(hub, monkeypatch, tmp_path):
    from flm_jax.data import hub as client

    monkeypatch.setattr(client, "missing_room", lambda folder, needed: f"{folder} is full for {needed}")
    with pytest.raises(HubError, match=rf"me/tiny@main: {tmp_path} is full for \d+, or set HF_HUB_CACHE"):
        located("me/tiny")
    assert not hub.fetched


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_one_sentence_says_how_to_bring_the_files(offline, hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        reason = "HF_HUB_OFFLINE is set, so the hub is not asked"
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        reason = "the hub cannot be reached .*refused"
    way = "run `hf download me/tiny --revision main --local-dir DIR`; copy DIR here and give it in place of the name"
    with pytest.raises(
        HubError, match=f"me/tiny@main: {reason}.*, and {tmp_path}/cache does not hold it. Where .*{way}"
    ):
        located("me/tiny")


def test_a_cache_that_lacks_files_says_which_when_the_hub_cannot_be_asked(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    directory, _ = located("me/tiny")
    (directory / "model-00001-of-00003.safetensors").unlink()
    restarted()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, .* the cache lacks model-00001-of-00003.safetensors"):
        located("me/tiny")


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors"])
def test_what_a_cache_lacks_is_not_said_of_the_repository(lacking, hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    directory, _ = located("me/tiny")
    unlisted(directory)
    for path in directory.glob("*.safetensors*" if lacking == "model.safetensors" else lacking):
        path.unlink()
    restarted()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=f"so the hub is not asked, and the cache lacks {lacking}. Where there is a net"):
        located("me/tiny")


def test_a_tokenizer_that_the_cache_lacks_is_missed_aloud(hub, monkeypatch, caplog):
    from huggingface_hub import constants

    directory, _ = located("me/tiny")
    unlisted(directory)
    restarted()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    located("me/tiny")
    assert not caplog.records
    (directory / "tokenizer.json").unlink()
    restarted()
    located("me/tiny")
    (said,) = [record.message for record in caplog.records]
    assert said.endswith("the cache has no tokenizer.json: the model is taken without a tokenizer.")
    restarted()
    with pytest.raises(HubError, match=r"the cache lacks tokenizer\.json"):
        load_vocabulary("me/tiny")


@pytest.mark.parametrize("lacking", ["tokenizer_config.json", "tokenizer.json", "model-00002-of-00003.safetensors"])
def test_a_download_that_broke_off_is_not_taken_for_the_whole_repository(lacking, hub, made, monkeypatch, tmp_path):
    """Neither by its name, where the hub is not asked, nor as the directory that it is."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.cut, hub.breaks = {lacking: 0}, 100
    with pytest.raises(HubError, match="the download broke off"):
        located("me/tiny")
    hub.breaks = 0
    restarted()
    (snapshot,) = tmp_path.glob("cache/models--me--tiny/snapshots/*")
    if not lacking.endswith(".safetensors"):  # what else there is came by other ways
        for file in (made / "in").glob("*.*"):
            if file.name != lacking and not (snapshot / file.name).exists():
                (snapshot / file.name).write_bytes(file.read_bytes())
        with pytest.raises(HubError, match=f"that was not fetched whole: it lacks {lacking}. Give its name, org/name@"):
            importing.examine(snapshot)
        with pytest.raises(HubError, match=f"it lacks {lacking}"):
            load_vocabulary(str(snapshot))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=f"me/tiny@{COMMIT}: HF_HUB_OFFLINE is set.*, and the cache lacks {lacking}"):
        located(f"me/tiny@{COMMIT}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    restarted()
    assert import_model("me/tiny", tmp_path / "run")["commit"] == COMMIT
    assert digest_of(tmp_path / "run") == digest_of(made / "checkpoint")


def test_what_a_repository_does_not_have_is_said_of_it_without_the_hub_too(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    foreign.write(tmp_path / "other", tokenizer=False)
    hub.add("me/other", tmp_path / "other")
    located("me/other")
    restarted()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    located("me/other")
    with pytest.raises(FileNotFoundError, match=rf"me/other@{COMMIT} has no tokenizer.json; give a repository with"):
        load_vocabulary("me/other")


def test_an_evaluation_records_the_commit_of_a_tokenizer(hub, made):
    assert load_model(made / "checkpoint", "me/tiny").record()["tokenizer"]["origin"] == f"me/tiny@{COMMIT}"
    assert "origin" not in load_model(made / "checkpoint", str(made / "in")).record()["tokenizer"]


@pytest.mark.integration
def test_the_program_takes_a_mirror_and_says_the_commit(made, tmp_path):
    env = {**as_user(), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    with hub_server() as hub:
        hub.add("me/tiny", made / "in", revision="v1")
        command = [sys.executable, ROOT / "experiments/convert.py", "--from_hf=me/tiny@v1", "--workdir=run"]
        done = subprocess.run(
            command,
            env={**env, "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"me/tiny, v1: commit {COMMIT}."
    assert "Traceback" not in done.stderr
