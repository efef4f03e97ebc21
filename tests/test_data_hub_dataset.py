"""Data sets of the library datasets: saved directories, a repository of the hub; identity by contents, no code run."""

import json
import os
import subprocess
import sys

import pytest

from flm_jax.data import hub, hub_dataset
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import HubDataset
from flm_jax.data.hub import HubError
from flm_jax.data.prepare import prepare
from flm_jax.data.reading import MissingExtraError
from flm_jax.data.survey import survey, survey_text
from flm_jax.data.train_vocabulary import Bytes
from tests.environment import as_user
from tests.hub_server import COMMIT, hub_here

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.integration

TEXTS = [f"text {n}" for n in range(40)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of one split and of several."""
    root = tmp_path_factory.mktemp("saved")
    pages = [{"text": f"page {n}"} for n in range(40)]
    data = datasets.Dataset.from_dict({"number": range(40), "text": [*TEXTS[:-1], None], "page": pages})
    data.save_to_disk(root / "one", num_shards=3)
    datasets.DatasetDict({"train": data.select([5, 3, 1]), "test": data.select(range(2))}).save_to_disk(root / "two")
    data.with_format("numpy").shuffle(seed=0).save_to_disk(root / "shuffled")
    return root


def test_rows_come_in_their_order_with_names(saved):
    found = list(HubDataset(str(saved / "one")).lines())
    assert found == [(f"train:{n + 1}", text) for n, text in enumerate(TEXTS[:-1])], "empty documents are left out"
    assert [text for _, text in HubDataset(str(saved / "two")).lines()] == ["text 5", "text 3", "text 1"]
    assert [name for name, _ in HubDataset(str(saved / "two"), split="test").lines()] == ["test:1", "test:2"]
    assert list(HubDataset(str(saved / "one"), "page.text").lines())[1] == ("train:2", "page 1")
    shuffled = datasets.load_from_disk(saved / "shuffled")["text"]
    assert [text for _, text in HubDataset(str(saved / "shuffled")).lines()] == [text for text in shuffled if text]


def test_it_becomes_a_token_store(saved, tmp_path):
    corpus = HubDataset(str(saved / "one"), heldout_percent=20)
    found = survey_text(survey(DataConfig(corpus, Bytes(), 8, cache_dir=str(tmp_path))))
    assert "3 files" in found and "held out" in found
    store = prepare(corpus, Bytes(), tmp_path, progress=False)
    counts = store.describe()["splits"]
    assert counts["train"]["documents"] + counts["heldout"]["documents"] == 39
    state = json.loads((saved / "one/state.json").read_text())
    assert store.describe()["corpus"]["fingerprint"] == state["_fingerprint"]


def test_identity_is_that_of_the_documents(saved, tmp_path):
    data = datasets.load_from_disk(saved / "one")
    same, other = tmp_path / "same", tmp_path / "other"
    data.save_to_disk(same, num_shards=1)
    assert HubDataset(str(same)).digest() == HubDataset(str(saved / "one")).digest()
    data.map(lambda row: {"text": (row["text"] or "").upper()}).save_to_disk(other)
    (other / "state.json").write_text(
        json.dumps({**json.loads((other / "state.json").read_text()), "_fingerprint": data._fingerprint})
    )
    assert HubDataset(str(other)).describe()["fingerprint"] == data._fingerprint
    assert HubDataset(str(other)).digest() != HubDataset(str(saved / "one")).digest(), "a fingerprint is not trusted"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "two", "split": "tset"}, "has no split 'tset': found train, test; did you mean 'test'"),
        ({"path": "one", "field": "txet"}, "has no column 'txet': found number, text, page; did you mean 'text'"),
        ({"path": "one", "field": "number"}, "row 1 of 'train': the field 'number' is int, and should be text"),
        ({"path": "one", "field": "page.txt"}, "row 1 of 'train' has no field 'page.txt': found text"),
        ({"path": "one", "subset": "en"}, "HubDataset.subset = 'en' is for repositories"),
        ({"path": "."}, "holds no state.json, so it is no data set of save_to_disk"),
    ],
)
def test_what_is_not_there_is_said(saved, fields, message):
    with pytest.raises(ValueError, match=message):
        list(HubDataset(**{**fields, "path": str(saved / fields["path"])}).lines())


def test_damage_is_said_in_a_sentence(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        list(HubDataset(str(tmp_path / "nowhere")).lines())
    data = datasets.load_from_disk(saved / "one")
    data.save_to_disk(tmp_path / "cut", num_shards=1)
    (file,) = (tmp_path / "cut").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cut cannot be read by the library datasets: "):
        list(HubDataset(str(tmp_path / "cut")).lines())


def test_a_library_that_could_run_code_is_refused(monkeypatch):
    hub_dataset._library.cache_clear()
    monkeypatch.setattr(hub_dataset.importlib.metadata, "version", lambda name: "3.6.0")
    with pytest.raises(MissingExtraError, match="version 3.6.0 would run code of a repository: install 'datasets>=4'"):
        hub_dataset._library("me/data")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[datasets\]'"):
        hub_dataset._library("me/data")
    hub_dataset._library.cache_clear()


CODE = """
from flm_jax.data.corpora import HubDataset
import sys
for path, fields in ((sys.argv[1], {}), (sys.argv[1], {"split": "none"}), ("me/script@main", {})):
    corpus = HubDataset(path, **fields)
    try:
        print([text for _, text in corpus.lines()], corpus.describe()["commit"])
    except (ValueError, OSError) as error:
        print("error:", error)
"""


def test_a_repository_is_read_at_its_commit_and_no_code_of_it_is_run(monkeypatch, tmp_path):
    made = tmp_path / "made"
    (made / "data").mkdir(parents=True)
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[:6]]
    (made / "data/train-00001.jsonl").write_text("".join(lines[3:]))
    (made / "data/train-00000.jsonl").write_text("".join(lines[:3]))
    (made / "README.md").write_text("---\n---\n")
    (tmp_path / "script").mkdir()
    (tmp_path / "script/script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with hub_here(monkeypatch, tmp_path / "cache") as server:
        server.add("datasets/me/data", made)
        server.add("datasets/me/script", tmp_path / "script")
        environment = {**as_user(), "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", CODE, "me/data@main"], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        said = done.stdout.splitlines()
        assert said[:1] == [f"{TEXTS[:6]} {COMMIT}"], done.stderr
        assert said[1].startswith("error: me/data@main cannot be read by the library datasets: Unknown split")
        assert said[2].startswith("error: me/script@main cannot be read by the library datasets: ")
        assert not (tmp_path / "ran").exists()


def test_a_name_is_resolved_to_its_commit_and_nothing_is_fetched_by_a_survey(monkeypatch, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/train.jsonl").write_text("{}\n")
    hub.dataset_commit.cache_clear()
    with hub_here(monkeypatch, tmp_path / "cache") as server:
        server.add("datasets/me/data", tmp_path / "made")
        config = DataConfig(HubDataset("me/data"), Bytes(), 8, cache_dir=str(tmp_path / "stores"))
        assert "the first run fetches it" in survey_text(survey(config))
        assert not server.fetched and HubDataset("me/data").describe()["commit"] == COMMIT
        for path, message in (("me/dta", "shows no repository"), ("me/data@old", "has no revision 'old'")):
            with pytest.raises(HubError, match=message):
                HubDataset(path).describe()
        server.down = 503
        hub.dataset_commit.cache_clear()
        with pytest.raises(HubError, match="give all 40 digits of that commit"):
            HubDataset("me/data").describe()
        assert HubDataset(f"me/data@{COMMIT}").describe()["commit"] == COMMIT
    hub.dataset_commit.cache_clear()
