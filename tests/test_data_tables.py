"""Corpora of tables and records: their documents, places and splits, and what is wrong with a file."""

import pytest

from flm_jax.data import tasks
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import Parquet, Records
from flm_jax.data.prepare import prepare
from flm_jax.data.survey import survey
from flm_jax.data.train_vocabulary import Bytes

TEXTS = [f"document {i}\n" for i in range(10)]


def write_table(path, **columns):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, row_group_size=3)


def write_records(path, contents):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()


def check_splits(corpus, folder):
    """The two splits are all of the documents, and a store holds them."""
    both = [list(corpus.documents(split)) for split in ("train", "heldout")]
    assert sorted(both[0] + both[1]) == TEXTS and all(both)
    store = prepare(corpus, Bytes(), folder / "cache", progress=False)
    for split, texts in zip(("train", "heldout"), both, strict=True):
        stored = [store.vocabulary.decode(store.document(split, i)) for i in range(store.num_documents(split))]
        assert stored == texts
    found = survey(DataConfig(corpus, Bytes(), cache_dir=str(folder / "cache")))
    assert found.splits["train"]["documents"] == len(both[0]) and found.store == store.path


@pytest.mark.parametrize("field", ["text", "page.text"])
def test_parquet(tmp_path, field):
    texts = [*TEXTS, "", None]
    columns = {"text": texts} if field == "text" else {"page": [{"text": text, "id": 1} for text in texts]}
    write_table(tmp_path / "a.parquet", number=list(range(12)), **columns)
    corpus = Parquet(str(tmp_path), field, heldout_percent=30)
    assert list(corpus.lines()) == [(f"a.parquet:{i + 1}", text) for i, text in enumerate(TEXTS)]
    check_splits(corpus, tmp_path)


def test_what_is_wrong_with_a_table_is_said(tmp_path):
    path = tmp_path / "a.parquet"
    write_table(path, text=["a"], number=[1])
    with pytest.raises(ValueError, match=r"a.parquet has no column 'txt': found number, text; did you mean 'text'"):
        list(Parquet(str(path), "txt").lines())
    with pytest.raises(ValueError, match="has no column 'text.inner': found none"):
        list(Parquet(str(path), "text.inner").lines())
    with pytest.raises(ValueError, match="the column 'number' is int64, and should be text"):
        list(Parquet(str(path), "number").lines())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="a.parquet cannot be read as Parquet"):
        list(Parquet(str(path)).lines())
    with pytest.raises(FileNotFoundError, match=r"there is no \*.parquet file in .*; it holds 1 \*.txt"):
        (tmp_path / "b").mkdir()
        (tmp_path / "b/a.txt").write_text("a")
        Parquet(str(tmp_path / "b")).files()
    with pytest.raises(ValueError, match="neither compressed lines nor tables.*set DataConfig.streamed = False"):
        tasks.resolve(Parquet(str(path)))


def test_records_of_text(tmp_path):
    write_records(tmp_path / "a.array_record-00000-of-00001", [text.encode() for text in TEXTS])
    corpus = Records(str(tmp_path), "", heldout_percent=30)
    assert next(corpus.lines()) == ("a.array_record-00000-of-00001:1", TEXTS[0])
    check_splits(corpus, tmp_path)
    write_records(tmp_path / "b.array_record", [b"\xff"])
    with pytest.raises(ValueError, match="b.array_record, record 1, is not UTF-8 text"):
        list(corpus.lines())
    (tmp_path / "b.array_record").write_bytes(b"no records at all")
    with pytest.raises(ValueError, match="b.array_record cannot be read as ArrayRecord"):
        list(corpus.lines())
