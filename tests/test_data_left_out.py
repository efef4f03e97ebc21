"""Faulty rows of a corpus: which they are, what stays beside them, how they are counted and told of, and the limit."""

import dataclasses
import gzip
import json
import pickle
import tracemalloc

import pytest

from flm_jax.cli import runs
from flm_jax.data import known
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import SPLITS, Jsonl, Parquet, Records
from flm_jax.data.json_lines import LINE_BYTES, LineError, RowError, TooManyError
from flm_jax.data.left_out import LEFT_OUT, LeftOut, sentence
from flm_jax.data.mixture import Mixture, Source
from flm_jax.data.parts import divide, documents
from flm_jax.data.preparation import prepare_data, report
from flm_jax.data.preparation import sentence as line_of
from flm_jax.data.prepare import prepare, prepare_by, store_path
from flm_jax.data.source import open_data
from flm_jax.data.survey import survey
from flm_jax.data.train_vocabulary import Bytes, build_vocabulary
from flm_jax.data.workers import Workers
from flm_jax.evaluation.evaluate import read_texts
from tests.preparing import FAULTY, SMALL, TEXTS, Stopped, sums, write_faulty


@pytest.fixture
def corpus(tmp_path):
    """Texts with faulty lines among them, of which as many may be left out."""
    return Jsonl(str(tmp_path / "faulty"), heldout_percent=20, most_faulty=write_faulty(tmp_path / "faulty"))


def counted_in(corpus):
    """The names and texts of a corpus, and what was left out of it."""
    left_out = corpus.left_out()
    return list(corpus.lines(left_out)), left_out


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("line", FAULTY)
def test_a_faulty_line_is_left_out_and_named_and_those_beside_it_keep_their_numbers(tmp_path, line, ending):
    for end in (b'\n{"text": "b"}', b""):  # the last line too, without an end
        content = b'{"text": "a"}\n\n' + line + end
        (tmp_path / f"a.jsonl{ending}").write_bytes(gzip.compress(content) if ending else content)
        corpus = Jsonl(str(tmp_path), most_faulty=1)
        found, left_out = counted_in(corpus)
        assert found == [(f"a.jsonl{ending}:1", "a"), (f"a.jsonl{ending}:4", "b")][: 1 + bool(end)]
        assert left_out.reasons == {FAULTY[line]: 1} and f"a.jsonl{ending}:3" in left_out.first[0]
        with pytest.raises(TooManyError, match=r":3\b.*; Jsonl.most_faulty = N leaves out up to N such lines"):
            list(dataclasses.replace(corpus, most_faulty=0).lines())


def test_what_holds_no_text_is_no_fault(tmp_path):
    """Blank lines and empty documents hold nothing, NUL is a character, and a byte order mark is passed over."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n \r\n{"text": ""}\n{"text": "b\\u0000"}\r\n')
    found, left_out = counted_in(Jsonl(str(tmp_path)))
    assert found == [("a.jsonl:1", "a"), ("a.jsonl:4", "b\0")] and not left_out.count


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_line_that_is_too_long_is_passed_over_in_little_memory(tmp_path, ending):
    """50 MB; plain, the file system stores them as a hole."""
    file = tmp_path / f"a.jsonl{ending}"
    before, size, after = b'{"text": "a"}\n', 50_000_000, b'\n{"text": "b"}\n'
    if ending:
        with gzip.open(file, "wb", 1) as stream:
            stream.write(before + bytes(size) + after)
    else:
        with file.open("wb") as stream:
            stream.write(before)
            stream.seek(size, 1)
            stream.write(after)
    corpus = Jsonl(str(file), most_faulty=1)
    tracemalloc.start()
    try:
        found, left_out = counted_in(corpus)
        assert tracemalloc.get_traced_memory()[1] < 3 * LINE_BYTES
    finally:
        tracemalloc.stop()
    assert found == [(f"a.jsonl{ending}:1", "a"), (f"a.jsonl{ending}:3", "b")]
    assert left_out.reasons == {"a line too long": 1} and f"a.jsonl{ending}:2" in left_out.first[0]
    if not ending:
        assert [name for part in divide(corpus, 10) for name, _ in documents(corpus, part)] == [n for n, _ in found]


def test_lines_are_numbered_from_the_start_of_the_file_where_parts_begin_within_it(corpus):
    whole, left_out = counted_in(corpus)
    assert sorted(text for _, text in whole) == sorted(TEXTS)
    assert left_out.count == corpus.most_faulty and len(left_out.first) == 5
    parts = divide(corpus, SMALL)
    assert len(parts) > 15
    added, every = corpus.left_out(), set()
    for part in parts:
        own = corpus.left_out()
        list(documents(corpus, part, own))
        every |= set(own.first)
        added.add_all(json.loads(json.dumps(own.record())))
    assert added.record() == left_out.record()
    assert {where.split("/")[-1].split(" ")[0].rstrip(":") for where in every} >= {
        "a.jsonl:1",
        "a.jsonl:13",
        "c.jsonl:22",
    }


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_the_limit_holds_for_the_whole_corpus_and_is_named_with_the_first_faults(corpus, limit):
    with pytest.raises(TooManyError) as error:
        Jsonl(corpus.path, most_faulty=limit).digest()
    said = str(error.value)
    assert said.startswith(f"there are more faulty lines than the {limit} that Jsonl.most_faulty allows; the first: ")
    assert said.count("a.jsonl:") == min(limit + 1, 3)
    for again in (error.value, LineError("a:1", "b", "c"), RowError("a", "b")):  # between processes
        copied = pickle.loads(pickle.dumps(again))
        assert (type(copied), str(copied), copied.reason) == (type(again), str(again), again.reason)


def test_a_part_that_is_not_read_to_its_end_has_as_many_as_are_refused(corpus):
    """A process that looks at a part stops there, and the one that adds up the parts refuses."""
    added = dataclasses.replace(corpus, most_faulty=3).left_out()
    part = LeftOut(3, "Jsonl.most_faulty", "line")
    with pytest.raises(TooManyError):
        for number in range(9):
            part.add(RowError(f"a.jsonl:{number} is not JSON", "a broken line"))
    assert part.count == 4
    added.add(RowError("earlier.jsonl:1 is not JSON", "a broken line"))
    with pytest.raises(TooManyError, match=r"the first: earlier\.jsonl:1 .*; a\.jsonl:0 .*; a\.jsonl:1 is not JSON$"):
        added.add_all(part.record())


def test_names_of_stores_are_those_of_versions_without_a_limit(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {number}"}}\n' for number in range(8)))
    corpus = Jsonl(str(tmp_path))
    allowing = dataclasses.replace(corpus, most_faulty=5)
    assert {store_path(one, Bytes(), tmp_path).name for one in (corpus, allowing)} == {"jsonl-304c1c7721209d10"}
    assert corpus.describe() == {"kind": "Jsonl", "path": str(tmp_path), "field": "text", "heldout_percent": 5.0}
    # A digest that is remembered was found under a limit, and holds for no other.
    monkeypatch.setattr(known, "SETTLED", -60)
    known.digest_of(allowing, tmp_path / "cache")
    assert known.Known(allowing, tmp_path / "cache").digest is not None
    assert known.Known(corpus, tmp_path / "cache").digest is None


def test_what_was_left_out_is_logged_reported_and_kept_with_the_store(corpus, tmp_path, caplog, capsys):
    config = DataConfig(corpus, Bytes(), context=16, cache_dir=str(tmp_path / "cache"))
    expected = counted_in(corpus)[1].record()
    number = expected["count"]
    said = sentence(expected)
    assert said.startswith(f"{number} lines left out: a broken line (8), no such field (4), no text (3); the first: ")
    assert said.count("a.jsonl:") == 3
    assert f"{said}." in survey(config).notes
    for _ in range(2):  # made, and found
        ((_, found),) = prepare_data(config, Workers(1, SMALL), progress=False)
        record = report("", found)
        assert record[LEFT_OUT] == expected
        assert f"60 documents. {said}. train: " in line_of(record)
    assert caplog.text.count(said) == 1
    assert open_data(config, progress=False).describe()["corpus"][LEFT_OUT] == expected
    runs.run_verify_store(str(found.store.path), str(tmp_path / "verified.json"))
    assert f"are as they were written. Of its text, {said}.\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "verified.json").read_text())["left_out"] == said
    with pytest.raises(TooManyError, match="more faulty lines than the 3"):  # a store that is there is no way around
        open_data(dataclasses.replace(config, corpus=dataclasses.replace(corpus, most_faulty=3)), progress=False)


def test_where_nothing_is_left_out_nothing_is_said(tmp_path, caplog, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    store = prepare(Jsonl(str(tmp_path), most_faulty=3), Bytes(), tmp_path / "cache", progress=False)
    assert LEFT_OUT not in store.describe()["corpus"] and not caplog.records
    runs.run_verify_store(str(store.path), None)
    assert capsys.readouterr().out.endswith("are as they were written.\n")


@pytest.mark.parametrize("after", [1, 7])
def test_a_command_that_was_stopped_counts_what_it_had_left_out(corpus, tmp_path, after):
    expected = prepare(corpus, Bytes(), tmp_path / "here", progress=False)
    with pytest.raises(KeyboardInterrupt):
        prepare_by(Stopped(after), corpus, Bytes(), tmp_path / "there", progress=False)
    found = prepare_by(Stopped(-1), corpus, Bytes(), tmp_path / "there", progress=False)
    assert sums(found.store.path) == sums(expected.path)


@pytest.mark.parametrize("runner", [None, Stopped(-1)], ids=["here", "parts"])
def test_lines_that_become_faulty_after_they_were_counted_are_refused_at_the_end(corpus, tmp_path, runner, monkeypatch):
    def altering(*args):
        path = tmp_path / "faulty" / "a.jsonl"
        path.write_bytes(path.read_bytes().replace(b'{"text": "document 1', b'{"tixt": "document 1', 2))
        return build_vocabulary(*args)

    monkeypatch.setattr("flm_jax.data.prepare.build_vocabulary", altering)
    with pytest.raises(ValueError, match=r"more faulty lines than the 15 " if runner is None else "was altered while"):
        prepare_by(runner, corpus, Bytes(), tmp_path / "cache", progress=False)
    assert not list(tmp_path.glob("cache/jsonl-*"))


def test_a_source_of_a_mixture_has_its_own_limit(corpus, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "a document, {number}"}}\n' for number in range(40)))
    whole = Jsonl(str(tmp_path / "a.jsonl"), heldout_percent=40)
    config = DataConfig(Mixture((Source("whole", whole, 1.0), Source("web", corpus, 1.0))), Bytes(), context=8)
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "cache"))
    sources = open_data(config, progress=False).describe()["sources"]
    assert sources["web"][LEFT_OUT]["count"] == 15 and LEFT_OUT not in sources["whole"]
    few = dataclasses.replace(corpus, most_faulty=1)
    with pytest.raises(
        ValueError, match="^Source 'web': there are more faulty lines than the 1 that Jsonl.most_faulty"
    ):
        open_data(dataclasses.replace(config, corpus=Mixture((Source("whole", whole), Source("web", few)))), False)


def test_text_to_evaluate_has_no_limit_and_no_binding_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the field 'text' is int, and should be text$"):
        list(read_texts(tmp_path / "a.jsonl"))


def test_rows_of_parquet_that_are_not_utf8_are_left_out_and_those_without_a_value_are_no_documents(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    contents = [b"a", b"caf\xe9", None, b"b", b"\xff"]
    column = pa.Array.from_buffers(pa.string(), len(contents), pa.array(contents, pa.binary()).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found, left_out = counted_in(Parquet(str(tmp_path), most_faulty=2))
    assert found == [("a.parquet:1", "a"), ("a.parquet:4", "b")] and left_out.reasons == {"not UTF-8": 2}
    assert "a.parquet, row 2, is not UTF-8" in left_out.first[0] and "2 rows left out" in sentence(left_out.record())
    with pytest.raises(TooManyError, match=r"row 2, .*; Parquet.most_faulty = N leaves out up to N such rows"):
        list(Parquet(str(tmp_path)).lines())


def test_records_that_are_not_utf8_are_left_out(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for content in (b"a", b"caf\xe9", b"b"):
        writer.write(content)
    writer.close()
    found, left_out = counted_in(Records(str(tmp_path), "", most_faulty=1))
    assert [text for _, text in found] == ["a", "b"] and left_out.reasons == {"not UTF-8": 1}
    with pytest.raises(TooManyError, match=r"record 2, .*; Records.most_faulty = N leaves out up to N such records"):
        list(Records(str(tmp_path), "").lines())


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_file_is_refused_whatever_the_limit(tmp_path, damage):
    whole = bytearray(gzip.compress(b'{"text": "a"}\n' * 1000))
    whole[len(whole) // 2] ^= damage == "flipped"
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-9] if damage == "truncated" else whole)
    for split in SPLITS:
        with pytest.raises(ValueError, match="the file is damaged or cut short"):
            list(Jsonl(str(tmp_path), most_faulty=10**6).documents(split))
