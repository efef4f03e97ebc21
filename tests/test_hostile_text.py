"""Text that is damaged, cut short, empty, too long or of strange characters, in every format of corpora."""

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from flm_jax.data.batches import read_batch
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import Jsonl, Parquet, Records, TextFolder
from flm_jax.data.json_lines import LINE_BYTES
from flm_jax.data.mixture import Mixture, Source
from flm_jax.data.prepare import prepare
from flm_jax.data.source import open_data
from flm_jax.data.train_vocabulary import Bytes

LATIN = b"caf\xe9 au lait"


def as_line(content: bytes) -> bytes:
    return b'{"text": "' + content.replace(b"\0", b"\\u0000") + b'"}\n'


def write_folder(path: Path, contents: list[bytes]) -> TextFolder:
    """One file per document, or an empty one."""
    for number, content in enumerate(contents or [b""]):
        (path / f"{path.name}{number}.txt").write_bytes(content)
    return TextFolder(str(path))


def write_lines(path: Path, contents: list[bytes], ending: str = "") -> Jsonl:
    zstandard = pytest.importorskip("zstandard")
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[ending]
    (path / f"{path.name}.jsonl{ending}").write_bytes(pack(b"".join(map(as_line, contents))))
    return Jsonl(str(path))


def write_table(path: Path, contents: list[bytes]) -> Parquet:
    """Arrow does not look whether its texts are UTF-8."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pa.Array.from_buffers(pa.string(), len(contents), pa.array(contents, pa.binary()).buffers())
    pq.write_table(pa.table({"text": column}), path / f"{path.name}.parquet", write_page_checksum=True)
    return Parquet(str(path))


def write_records(path: Path, contents: list[bytes]) -> Records:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path / f"{path.name}.array_record"), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()
    return Records(str(path), "")


WRITERS = {
    "folder": write_folder,
    "lines": write_lines,
    "gz": lambda path, contents: write_lines(path, contents, ".gz"),
    "zst": lambda path, contents: write_lines(path, contents, ".zst"),
    "table": write_table,
    "records": write_records,
}
EVERY = pytest.mark.parametrize("kind", WRITERS)


def texts(corpus) -> list[str]:
    return [text for split in ("train", "heldout") for text in corpus.documents(split)]


@pytest.fixture
def made(tmp_path):
    """Makes a corpus of a kind that holds some documents, in files whose names begin with `a`."""

    def make(kind, contents, name="a"):
        (tmp_path / name).mkdir()
        return WRITERS[kind](tmp_path / name, contents)

    return make


@pytest.mark.parametrize("kind", ["gz", "zst", "table", "records"])
@pytest.mark.parametrize("damage", ["halved", "without its end", "flipped", "emptied"])
def test_a_file_that_is_damaged_or_cut_short_is_named_alone_and_in_a_mixture(made, tmp_path, kind, damage):
    corpus = made(kind, [b"document %d " % number * 400 for number in range(300)])
    (file,) = (tmp_path / "a").iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    content = {
        "halved": whole[:middle],
        "without its end": whole[:-5],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "emptied": b"",
    }[damage]
    if damage == "flipped" and kind == "records":
        content = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]  # the middle is padding
    file.write_bytes(content)
    if damage == "emptied" and kind in ("gz", "zst"):  # as many tools write it: it holds nothing
        with pytest.raises(ValueError, match=r"a holds no document"):
            texts(corpus)
        return
    with pytest.raises(ValueError, match=rf"{file.name}\b.* damaged or cut short"):
        texts(corpus)
    mixture = Mixture((Source("web", corpus, 1.0),))
    with pytest.raises(ValueError, match=rf"Source 'web': .*{file.name}\b.* damaged or cut short"):
        open_data(DataConfig(mixture, Bytes(), cache_dir=str(tmp_path / "cache")), progress=False)
    assert not list(tmp_path.glob("cache/*"))


@EVERY
def test_text_that_is_not_utf8_is_named_with_its_place(made, kind):
    corpus = made(kind, [b"fine", LATIN, b"fine"])
    where = {
        "folder": r"a1\.txt is not UTF-8 text .*at byte 3",
        "table": r"a\.parquet, row 2, is not UTF-8 text .*at byte 3",
        "records": r"a\.array_record, record 2, is not UTF-8 text .*at byte 3",
    }.get(kind, r"a\.jsonl[.a-z]*:2 is not UTF-8 text.* at byte 13")
    with pytest.raises(ValueError, match=where):
        texts(corpus)


@EVERY
def test_nul_is_a_character(made, kind):
    wanted = [b"a\0b", b"\0", b"ends with it\0"]
    assert sorted(texts(made(kind, wanted))) == sorted(content.decode() for content in wanted)


def test_nul_bytes_where_json_should_be_are_named(made, tmp_path):
    corpus = made("lines", [b"fine"])
    (tmp_path / "a/b.jsonl").write_bytes(as_line(b"fine") + bytes(4096) + b"\n")  # as a crash of the machine leaves it
    with pytest.raises(ValueError, match=r"b\.jsonl:2 is not JSON"):
        texts(corpus)


@EVERY
def test_an_empty_shard_holds_nothing(made, tmp_path, kind):
    corpus = made(kind, [])
    with pytest.raises(ValueError, match="holds no document"):
        texts(corpus)
    for name in ("0", "b"):
        made(kind, [b"one", b"two"], name)
        for file in (tmp_path / name).iterdir():
            file.rename(tmp_path / "a" / file.name)
    assert sorted(texts(corpus)) == ["one", "one", "two", "two"]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_line_that_does_not_end_is_refused_without_being_read(tmp_path, ending):
    """400 MB, which the file system stores as a hole; compressed 50 MB."""
    file = tmp_path / f"a.jsonl{ending}"
    if ending:
        file.write_bytes(gzip.compress(bytes(50 << 20), 1))
    else:
        file.write_bytes(as_line(b"fine"))
        with file.open("r+b") as stream:
            stream.truncate(400 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"a\.jsonl[.gz]*:[12]: a line too long: over 33,554,432 bytes; each line"):
            texts(Jsonl(str(file)))
        assert tracemalloc.get_traced_memory()[1] < 3 * LINE_BYTES
    finally:
        tracemalloc.stop()


def test_a_document_longer_than_the_context_is_read_whole(made, tmp_path):
    wanted = [bytes(np.random.default_rng(n).integers(97, 123, 1000).astype(np.uint8)) for n in range(3)]
    corpus = made("gz", wanted)
    store = prepare(corpus, Bytes(), tmp_path / "cache", progress=False, context=16)
    found = [store.vocabulary.decode(store.document("train", n)) for n in range(store.num_documents("train"))]
    assert found == list(corpus.documents("train")) and all(len(text) == 1000 for text in found)
    count = store.num_windows("train", 16)
    batch = read_batch(store, "train", np.arange(count), 16)
    assert np.array_equal(batch.inputs_BT.reshape(-1), store.tokens("train", np.arange(count * 16)))


def test_a_text_in_json_may_be_as_long_as_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * (8 << 20)}) + "\n" + json.dumps({"text": "y"}))
    assert sorted(map(len, texts(Jsonl(str(tmp_path))))) == [1, 8 << 20]
