"""What a dry run says of the data: counts, the store, and the errors that a run would give, without preparing."""

import dataclasses
import json
import re

import pytest

from flm_jax.chat.corpus import Conversations
from flm_jax.data import survey as module
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import SPLITS, Jsonl, TextFolder
from flm_jax.data.store_writer import StoreWriter
from flm_jax.data.survey import store_path, survey, survey_text
from flm_jax.data.tfds import Tfds
from flm_jax.data.train_vocabulary import Bytes, Pretrained, SentencePiece
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.planning.text import dry_run
from flm_jax.recipe import Recipe, Run, Stage
from tests import small


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text("é" * 100)
    (tmp_path / "texts" / "empty.txt").write_text("")
    return tmp_path / "texts"


def test_a_folder_is_counted_and_nothing_is_written(folder, tmp_path):
    config = DataConfig(TextFolder(str(folder), heldout_percent=20), Bytes(), cache_dir=str(tmp_path / "cache"))
    found = survey(config)
    assert (found.files, found.ids, found.store) == (41, 259, None)
    assert sum(found.splits[split]["documents"] for split in SPLITS) == 40
    assert sum(found.splits[split]["text_bytes"] for split in SPLITS) == 40 * 200
    heldout = found.splits["heldout"]["documents"]
    said = survey_text(found)
    assert f"held out: {heldout} documents, {200 * heldout:,} bytes ({heldout / 40:.1%} of the documents)" in said
    assert "41 files" in said and "none yet" in said and not (tmp_path / "cache").exists()


def test_where_there_is_a_store_its_tokens_are_said(folder, tmp_path):
    config = DataConfig(TextFolder(str(folder)), Bytes(), cache_dir=str(tmp_path / "cache"))
    path = store_path(config.corpus, config.vocabulary, config.cache_dir)
    with StoreWriter(path, ByteVocabulary(), config.corpus.digest(), config.corpus.describe()) as writer:
        for split in SPLITS:
            for text in config.corpus.documents(split):
                writer.append(split, ByteVocabulary().encode(text), len(text.encode()))
        writer.close()
    found = survey(config)
    assert found.store == path and found.splits["train"]["tokens"] >= found.splits["train"]["text_bytes"]
    assert f" bytes, {found.splits['train']['tokens']:,} tokens" in survey_text(found)


def test_a_cache_that_a_run_could_not_write_to_is_refused_and_one_that_it_could_is_left_as_it_was(folder, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for place in ("file", "file/below"):
        config = DataConfig(TextFolder(str(folder)), Bytes(), cache_dir=str(tmp_path / place))
        with pytest.raises(ValueError, match=r"DataConfig\.cache_dir = '.*file.*': .*file is not a directory"):
            survey(config)
        streamed = dataclasses.replace(config, streamed=True)
        survey(streamed)  # with bytes it writes nothing
        with pytest.raises(ValueError, match=r"DataConfig\.cache_dir"):
            survey(dataclasses.replace(streamed, vocabulary=SentencePiece(300)))
    survey(dataclasses.replace(config, cache_dir=str(tmp_path / "full" / "below")))
    assert sorted(tmp_path.rglob("*")) == before


def test_lines_are_counted_too_and_what_is_too_large_is_not_read(tmp_path, monkeypatch):
    lines = "".join(json.dumps({"text": "a" * 10}) + "\n" for _ in range(30))
    (tmp_path / "a.jsonl").write_text(lines)
    config = DataConfig(Jsonl(str(tmp_path / "a.jsonl")), Bytes(), cache_dir=str(tmp_path))
    assert sum(found["documents"] for found in survey(config).splits.values()) == 30
    monkeypatch.setattr(module, "READ_BYTES", 100)
    found = survey(config)
    assert found.files == 1 and not found.splits and "documents were not counted: reading" in survey_text(found)


def test_a_prepared_dataset_is_opened_without_tensorflow(tmp_path):
    place = tmp_path / "mine" / "1.0.0"
    place.mkdir(parents=True)
    (place / "dataset_info.json").write_text(json.dumps({"name": "mine", "version": "1.0.0"}))
    found = survey(DataConfig(Tfds("mine", data_dir=str(tmp_path)), Bytes(), cache_dir=str(tmp_path / "cache")))
    assert found.corpus == "Tfds mine" and found.unread == "only preparing it tells"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda tmp: DataConfig(TextFolder(str(tmp / "nowhere")), Bytes()), "there is no folder .*nowhere"),
        (lambda tmp: DataConfig(TextFolder(str(tmp), pattern="*.md"), Bytes()), "no file .* matches"),
        (lambda tmp: DataConfig(Jsonl(str(tmp / "no.jsonl")), Bytes()), "there is no file or folder"),
        (lambda tmp: DataConfig(TextFolder(str(tmp)), Pretrained(str(tmp))), "holds no tokenizer.json"),
        (lambda tmp: DataConfig(Jsonl(str(tmp / "one.jsonl")), Bytes()), "no document in its split 'heldout'"),
        (lambda tmp: DataConfig(TextFolder(str(tmp), pattern="*.bin"), Bytes()), "is not UTF-8 text"),
    ],
)
def test_data_that_a_run_could_not_read_is_refused(config, message, tmp_path):
    (tmp_path / "a.txt").write_text("only one")
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "only one"}) + "\n")
    (tmp_path / "b.bin").write_bytes(b"\xff")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        survey(config(tmp_path))


def test_a_dry_run_opens_the_data_before_it_lowers_anything(folder):
    def begun(path, vocab):
        recipe = Recipe((Stage("a", small.config(vocab=vocab), 2, 4),), DataConfig(TextFolder(str(path)), Bytes(), 8))
        return next(dry_run(recipe, Run()))

    assert "held out: " in begun(folder, 259)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        begun(folder / "nowhere", 259)
    with pytest.raises(ValueError, match="the vocabulary has 259 tokens"):
        begun(folder, 258)


def test_a_dry_run_says_how_often_the_windows_are_read(tmp_path):
    lines = "".join(json.dumps({"instruction": f"Add {a} and 1.", "output": str(a + 1)}) + "\n" for a in range(40))
    (tmp_path / "talks.jsonl").write_text(lines)
    data = DataConfig(Conversations(str(tmp_path / "talks.jsonl")), Bytes(), 64, cache_dir=str(tmp_path))
    text = "\n".join(dry_run(Recipe((Stage("a", small.config(vocab=259), 6, 8),), data), Run()))
    (windows,) = re.findall(r"train: (\d+) windows of 64", text)
    assert f"  {6 * 8 / int(windows):.2f} passes over the {windows} windows to train on" in text
