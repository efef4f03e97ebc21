"""Files of JSON lines: numbers and places of lines, compressed files, and what is damaged or not there."""

import gzip
import json

import pytest

from flm_jax.data import json_lines
from flm_jax.data.json_lines import LineError, read_lines

RECORD = {"text": "One and one are two."}


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_that_is_cut_short_or_damaged_is_named(ending, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    content = (json.dumps(RECORD) + "\n").encode() * 1000
    whole = gzip.compress(content) if ending.endswith("gz") else zstandard.compress(content)
    path = tmp_path / f"pool{ending}"
    path.write_bytes(b"\0\0\0" + whole)
    with pytest.raises(LineError, match=f"pool{ending}:1: the file is damaged or cut short"):
        list(read_lines(path))
    path.write_bytes(whole[:-9])
    with pytest.raises(LineError, match=rf"pool{ending}:\d+: the file is damaged or cut short"):
        list(read_lines(path))


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        list(read_lines(tmp_path / "none"))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(
        FileNotFoundError,
        match=r"there is no \*\.jsonl or \*\.jsonl\.gz or \*\.jsonl\.zst file in .*; it holds 1 \*\.txt",
    ):
        list(read_lines(tmp_path))


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "LINE_BYTES", 50)
    path = tmp_path / "pool.jsonl"
    path.write_text("x" * 100)
    with pytest.raises(LineError, match="a line too long"):
        list(read_lines(path))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_lines_know_their_number_and_the_bytes_before_them(ending, tmp_path):
    content = '{"é": 1}\n\n  \r\n{"b": 2}\n{"c": 3}'.encode()
    path = tmp_path / f"pool.jsonl{ending}"
    path.write_bytes(gzip.compress(content) if ending else content)
    found = list(json_lines.file_lines(path))
    assert [line.number for line in found] == [1, 4, 5]
    assert [content[line.offset :][: len(line.content)] for line in found] == [line.content for line in found]


def test_a_broken_line_is_named_by_file_line_and_column_once():
    with pytest.raises(LineError) as error:
        json_lines.parse_object(b'{"text": "a"\n', "pool.jsonl:3")
    assert str(error.value) == "pool.jsonl:3: a broken line: it is not JSON: Expecting ',' delimiter at column 13"


def test_counts_are_said_in_the_singular_and_in_the_plural():
    skipped = json_lines.Skipped(limit=None, quiet=True)
    assert skipped.summary() == ""
    said = []
    for reason in ("an empty turn", "no answer", "an empty turn"):
        skipped.add(LineError("f:1", reason))
        said.append(skipped.summary())
    assert said[0] == "1 line left out: an empty turn (1)"
    assert said[2] == "3 lines left out: an empty turn (2), no answer (1)"
