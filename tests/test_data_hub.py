"""Names of repositories on the Hugging Face hub told from paths; tokenizers named by their repository."""

from pathlib import Path

import pytest

from flm_jax.data.config import DataConfig
from flm_jax.data.hub import HubError, Name, advice, find, named, origin
from flm_jax.data.train_vocabulary import Bytes, Pretrained, identity
from flm_jax.data.vocabulary import TokenizerVocabulary
from flm_jax.recipe import Recipe, Stage
from flm_jax.stage_run import beginning
from tests import small
from tests.hub import write_tokenizer
from tests.hub_server import COMMIT, hub_here


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_here(monkeypatch, tmp_path / "cache") as found:
        found.add("me/tok", write_tokenizer(tmp_path / "made"))
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield found


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "main"),
        ("me/x_y.z@v1.0", "me/x_y.z", "v1.0"),
        ("me/x@refs/pr/7", "me/x", "refs/pr/7"),
        (f"me/x@{COMMIT}", "me/x", COMMIT),
        ("runs/x@main", "runs/x", "main"),
    ],
)
def test_names_of_repositories(text, repository, revision, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert named(text) == Name(repository, revision)


PATHS = (
    "x", "x@main", "/me/x", "./me/x", "../me/x", "~/me/x", "me/x/", "a/b/c", "me/x@", "me/x@a b", "me/x@a..b",
    "me/x.git", "me/x--y", "me/.x", "-me/x", "me/x.", "mé/x", "", "runs/dmeo", "there/model", "there/model@main",
    "file/x@main", f"me/{'x' * 97}", Path("me/x"),
)  # fmt: skip


@pytest.mark.parametrize("text", PATHS)
def test_what_is_a_path_and_never_sent_to_the_hub(text, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "there" / "model").mkdir(parents=True)
    (tmp_path / "there" / "model@main").mkdir()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "x@main").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    assert named(text) is None
    assert origin(text) is None
    assert advice(text).startswith(" ")


def test_a_tokenizer_of_a_repository_is_that_of_its_directory_and_only_its_files_are_fetched(hub, tmp_path):
    (tmp_path / "made" / "model.safetensors").write_bytes(b"large")
    (tmp_path / "made" / "tokenizer.model").write_bytes(b"not needed")
    hub.add("me/model", tmp_path / "made")
    expected = TokenizerVocabulary.from_directory(tmp_path / "made")
    found = Pretrained("me/model").load()
    assert (found.digest, found.special) == (expected.digest, expected.special)
    assert hub.fetched == {"tokenizer.json", "tokenizer_config.json"}
    # The same tokenizer is the same data, wherever it came from.
    assert identity(Pretrained("me/tok")) == identity(Pretrained(str(tmp_path / "made")))
    assert origin("me/tok") == f"me/tok@{COMMIT}"


def test_a_repository_without_a_tokenizer_is_refused(hub, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    hub.add("me/other", tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=rf"me/other@{COMMIT} has no tokenizer.json"):
        Pretrained("me/other").load()


def test_a_path_with_nothing_there_is_told_how_a_repository_is_named(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json, .* hub is named as org/name or org/name@revision"):
        Pretrained(str(tmp_path / "nothing")).load()
    assert not hub.asked


def test_an_answer_that_is_none_of_a_hub_is_refused(hub):
    hub.heads["me/tok", "main"] = "no commit"
    hub.models["me/tok"]["no commit"] = {}
    with pytest.raises(HubError, match="me/tok@main: the hub's answer has no commit; if HF_ENDPOINT is set"):
        find(Name("me/tok"))


def test_a_stage_records_the_commit_of_its_tokenizer(hub, tmp_path):
    def begun(vocabulary):
        stage = Stage("a", small.shape(vocab=304), steps=1, batch_size=8)
        return beginning(Recipe((stage,), DataConfig(vocabulary=vocabulary), seed=3), 0)

    assert begun(Pretrained("me/tok")) == {"seed": 3, "key": 0, "vocabulary": f"me/tok@{COMMIT}"}
    assert begun(Pretrained(str(tmp_path / "made"))) == begun(Bytes()) == {"seed": 3, "key": 0}
