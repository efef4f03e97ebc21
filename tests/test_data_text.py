"""Corpora and vocabularies: what is held out, what is refused, and that text comes back."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flm_jax.data import text
from flm_jax.data.corpora import Jsonl, SeqioTask, StandardLibrary, TextFolder, Tfds
from flm_jax.data.prepare import prepare
from flm_jax.data.sentencepiece_training import chunks, sample, train
from flm_jax.data.train_vocabulary import Bytes, SentencePiece, build_vocabulary
from flm_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary
from flm_jax.data.vocabulary_files import from_spec

CODE = 'def f(x):\n\tif x == 10:\n        return "é"  # twelve\n\n\nclass A:\n    pass\n'


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    for i in range(20):
        (root / ("deep" if i % 2 else ".") / f"{i}.txt").write_text(f"document {i}\n" + CODE * 8, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def bpe():
    return SentencePieceVocabulary(model=train(SentencePiece(size=320), [CODE * 40]))


@given(st.sets(st.text(max_size=8), min_size=2, max_size=40), st.floats(0.01, 99.99))
def test_neither_side_is_empty(names, percent):
    border = text.heldout_border(names, percent)
    heldout = {name for name in names if text.name_hash(name) < border}
    assert 0 < len(heldout) < len(names)


def test_split_is_by_name_and_near_its_share():
    names = [f"{i}.txt" for i in range(4000)]
    border = text.heldout_border(names, 5.0)
    share = np.mean([text.name_hash(name) < border for name in names])
    assert 0.04 < share < 0.06
    # A number written down once: another hash, or Python's own, would move documents between the sides.
    assert text.name_hash("0.txt") == 0xF79BDD9D0C9BD497  # printf 0.txt | sha256sum
    assert text.heldout_border(names[:3000], 5.0) == border


@pytest.mark.parametrize("percent", [0, 100, -1])
def test_held_out_share_must_leave_both_sides(percent):
    with pytest.raises(ValueError, match="between 0 and 100"):
        text.heldout_border(["a", "b"], percent)


def test_folder(folder, tmp_path):
    corpus = TextFolder(str(folder), heldout_percent=20)
    train_side, heldout = list(corpus.documents("train")), list(corpus.documents("heldout"))
    assert len(train_side) + len(heldout) == 20 and not set(train_side) & set(heldout) and heldout
    assert list(corpus.documents("train")) == train_side
    digest = corpus.digest()
    folder.rename(tmp_path / "moved")
    moved = dataclasses.replace(corpus, path=str(tmp_path / "moved"))
    assert moved.digest() == digest and list(moved.documents("heldout")) == heldout
    assert dataclasses.replace(moved, heldout_percent=30.0).digest() != digest
    (tmp_path / "moved" / "0.txt").write_text("changed")
    assert moved.digest() != digest


def test_lines_of_json_that_are_read_as_text_are_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert any("a.jsonl is read as text" in note for note in TextFolder(str(tmp_path / "a.jsonl")).notes())


def test_line_ends_are_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    (tmp_path / "b.txt").write_bytes(b"four")
    corpus = TextFolder(str(tmp_path))
    assert {*corpus.documents("train"), *corpus.documents("heldout")} == {"one\r\ntwo\rthree\n", "four"}


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TextFolder(str(tmp_path / "nowhere")).digest()
    with pytest.raises(FileNotFoundError, match=r"\*\.txt"):
        TextFolder(str(tmp_path)).digest()
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="holds no document"):
        list(TextFolder(str(tmp_path)).documents("train"))
    with pytest.raises(ValueError, match="no split 'test'"):
        list(TextFolder(str(tmp_path)).documents("test"))
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 .* at byte 3"):
        TextFolder(str(tmp_path)).digest()


def test_standard_library_is_there():
    corpus = StandardLibrary()
    names = [name for name, _, _ in corpus.contents()]
    assert names == sorted(names) and "json/__init__.py" in names
    assert not any("site-packages" in name for name in names)
    assert 0.02 < len(corpus.files("heldout")) / len(names) < 0.08


def test_jsonl(tmp_path):
    lines = [json.dumps({"text": f"line {i}\n\ttab", "other": 1}) for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:6], "", *lines[6:]]))
    corpus = Jsonl(str(tmp_path / "a.jsonl"), heldout_percent=30)
    both = [*corpus.documents("train"), *corpus.documents("heldout")]
    assert sorted(both) == [f"line {i}\n\ttab" for i in range(10)]
    assert Jsonl(str(tmp_path), heldout_percent=30).digest() == corpus.digest()


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_lines_and_fields_inside_others(tmp_path, ending):
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(json.dumps({"id": i, "page": {"text": f"line {i}"}, "a.b": "dotted"}) + "\n" for i in range(10))
    content = gzip.compress(lines.encode()) if ending == ".gz" else zstandard.compress(lines.encode())
    (tmp_path / f"a.jsonl{ending}").write_bytes(content)
    corpus = Jsonl(str(tmp_path), "page.text", heldout_percent=30)
    assert corpus.compressed and [text for _, text in corpus.lines()] == [f"line {i}" for i in range(10)]
    assert {text for _, text in Jsonl(str(tmp_path), "a.b").lines()} == {"dotted"}
    store = prepare(corpus, Bytes(), tmp_path / "cache", progress=False)
    assert store.vocabulary.decode(store.document("heldout", 0)) == next(corpus.documents("heldout"))
    with pytest.raises(ValueError, match=rf"a.jsonl{ending}:1 has no field 'page.txt': .* did you mean 'text'"):
        list(Jsonl(str(tmp_path), "page.txt").lines())
    (tmp_path / f"a.jsonl{ending}").write_bytes(content[:-9])
    with pytest.raises(ValueError, match="the file is damaged or cut short"):
        list(corpus.lines())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"a\.jsonl:2 is not JSON"),
        ('{"body": "x"}', r"a\.jsonl:2 has no field 'text': found the fields \['body'\]"),
        ("[1]", r"a\.jsonl:2 has no field 'text': found a list"),
        ('{"text": 5}', r"a\.jsonl:2: the field 'text' is int"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2: .* surrogate"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(Jsonl(str(tmp_path)).documents("train"))


def test_jsonl_without_documents(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        Jsonl(str(tmp_path / "a.jsonl")).digest()
    with pytest.raises(FileNotFoundError, match=r"no \*\.jsonl"):
        Jsonl(str(tmp_path)).digest()
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no document"):
        list(Jsonl(str(tmp_path)).documents("train"))


def test_descriptions_are_json(folder):
    for corpus in (StandardLibrary(), TextFolder(str(folder)), Jsonl("x"), Tfds("x"), SeqioTask("x")):
        assert json.loads(json.dumps(corpus.describe()))["kind"] == type(corpus).__name__


@given(st.text(), st.integers(1, 9))
def test_chunks_lose_nothing(document, limit):
    pieces = list(chunks([document], limit))
    assert "".join(pieces) == document and all(0 < len(piece) <= limit for piece in pieces)


@given(st.lists(st.text(min_size=1, max_size=9), max_size=30), st.integers(1, 60))
def test_sample_is_in_order_and_within_its_limit(pieces, limit):
    numbered = [f"{i}:{piece}" for i, piece in enumerate(pieces)]
    chosen = sample(numbered, limit)
    assert [numbered.index(piece) for piece in chosen] == sorted(numbered.index(piece) for piece in chosen)
    assert len(chosen) <= 1 or sum(len(piece.encode()) for piece in chosen) <= limit
    assert bool(chosen) == bool(pieces)
    if sum(len(piece.encode()) for piece in numbered) <= limit:
        assert chosen == numbered


@given(st.text())
@example(CODE)
@example(" \t\n  <unk></s><0x0A>\0\r\n\u2585\ufeff")
def test_text_comes_back(bpe, text):
    text = text.replace("\u2581", "_")  # the one character that SentencePiece cannot give back
    for vocabulary in (ByteVocabulary(), bpe):
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text
        assert vocabulary.eos_id not in ids and all(3 <= i < vocabulary.size for i in ids)


@given(st.lists(st.integers(-5, 2000)))
def test_any_ids_decode(bpe, ids):
    for vocabulary in (ByteVocabulary(), bpe):
        decoded = vocabulary.decode(ids)
        assert decoded.count("\ufffd") >= sum(not 0 <= i < vocabulary.size for i in ids)


@given(st.text(), st.text())
def test_texts_join_where_their_ids_do(bpe, one, two):
    one, two = one.replace("\u2581", "_"), two.replace("\u2581", "_")
    for vocabulary in (ByteVocabulary(), bpe):  # a prompt and its continuation: no space comes between
        assert vocabulary.decode(vocabulary.encode(one) + vocabulary.encode(two)) == one + two


def test_indentation_is_one_piece(bpe):
    assert len(bpe.encode("    ")) == 1 < len(bpe.encode("\t\t"))


def test_training_gives_the_same_bytes():
    documents = [CODE * 40 + str(i) for i in range(20)]
    assert train(SentencePiece(320), documents) == train(SentencePiece(320), documents)
    assert train(SentencePiece(320), documents) != train(SentencePiece(321), documents)


def test_vocabulary_is_cached_and_guarded(folder, tmp_path):
    corpus, config, cache = TextFolder(str(folder)), SentencePiece(320), tmp_path / "cache"
    first = build_vocabulary(config, corpus, cache)
    (model,) = cache.glob("*.model")
    stamp = model.stat().st_mtime_ns
    assert build_vocabulary(config, corpus, cache).digest == first.digest
    assert model.stat().st_mtime_ns == stamp and len(list(cache.iterdir())) == 2
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    with pytest.raises(ValueError, match=f"{model.name} was altered"):
        build_vocabulary(config, corpus, cache)
    model.unlink()
    assert build_vocabulary(config, corpus, cache).digest == first.digest
    model.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"\.json is damaged"):
        build_vocabulary(config, corpus, cache)


def test_vocabulary_is_trained_on_the_training_split_alone(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(CODE * 20)
    corpus = TextFolder(str(tmp_path), heldout_percent=20)
    (heldout, *_) = corpus.files("heldout")
    heldout.write_text("zebra " * 1000)
    vocabulary = build_vocabulary(SentencePiece(320), corpus, tmp_path / "cache")
    assert len(vocabulary.encode("zebra")) == 5  # letters: a piece would show that it has been seen


def test_vocabulary_errors(folder, tmp_path):
    corpus = TextFolder(str(folder))
    assert isinstance(build_vocabulary(Bytes(), corpus, tmp_path), ByteVocabulary)
    with pytest.raises(ValueError, match="no SentencePiece vocabulary of 100000 ids"):
        build_vocabulary(SentencePiece(100_000), corpus, tmp_path)
    with pytest.raises(ValueError, match="no training text"):
        train(SentencePiece(), [])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SentencePieceVocabulary(tmp_path / "nowhere.model")
    for content in (b"", b"no model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model"):
            SentencePieceVocabulary(tmp_path / "bad.model")


def test_spec_stands_on_its_own(bpe):
    for vocabulary in (ByteVocabulary(), ByteVocabulary(extra_ids=100), bpe):
        spec = json.loads(json.dumps(vocabulary.spec()))
        again = from_spec(spec)
        assert (again.digest, again.size, again.eos_id) == (
            vocabulary.digest,
            vocabulary.size,
            vocabulary.eos_id,
        )
        assert again.encode(CODE) == vocabulary.encode(CODE)
        with pytest.raises(ValueError, match="sha256"):
            from_spec({**spec, "digest": "0"})
    with pytest.raises(ValueError, match="damaged"):
        from_spec({**bpe.spec(), "model": "AAAA"})
    with pytest.raises(ValueError, match="unknown vocabulary kind 'words'"):
        from_spec({"kind": "words"})


@settings(max_examples=20)
@given(st.integers(0, 2))
def test_special_ids_leave_nothing(bpe, i):
    assert ByteVocabulary().decode([i, 100, i]) == "a"
    if i != 2:
        assert bpe.decode([i, *bpe.encode("a"), i]) == "a"
