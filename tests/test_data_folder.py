"""Folders and files of text as people have them: one long file, other endings, links, pipes."""

import os

import pytest

from flm_jax.data.corpora import Jsonl, TextFolder
from flm_jax.data.text import SPLITS, cut


def test_one_file_is_cut_into_parts_some_of_them_held_out(tmp_path, capsys):
    text = "".join(f"Paragraph {i}. " + "word " * 60 + "\n\n" for i in range(300))
    (tmp_path / "input.txt").write_text(text)
    (tmp_path / "empty.txt").write_text("")
    folder, file = TextFolder(str(tmp_path)), TextFolder(str(tmp_path / "input.txt"))
    assert folder.digest() == file.digest()
    train, heldout = (list(folder.documents(split)) for split in SPLITS)
    assert (len(train) + len(heldout), "".join(part.decode() for part in cut(text.encode()))) == (47, text)
    assert sorted(train + heldout) == sorted(part.decode() for part in cut(text.encode()))
    assert 1 <= len(heldout) <= 5 and all(part.endswith("\n\n") for part in train + heldout)
    assert folder.parts("heldout") == [part.encode() for part in heldout]
    (note,) = file.notes()
    assert note == f"{tmp_path}/input.txt is the only document: its {len(text):,} bytes are cut into 47 parts."


@pytest.mark.parametrize("text", ["ab", "x" * 10_000, "é€😀" * 3_000, "line\n" * 4_000, "\n\n" * 5_000, "a\n\nb"])
def test_parts_joined_are_the_text_and_each_is_text(text):
    parts = cut(text.encode())
    assert "".join(part.decode() for part in parts) == text
    assert all(parts) and len(parts) >= 2


def test_a_short_single_document_is_said_to_be_short(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 30)
    assert TextFolder(str(tmp_path)).notes()[-1] == "So little held-out text measures a loss only roughly."
    assert list(TextFolder(str(tmp_path)).documents("heldout"))


def test_two_documents_are_not_cut(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 9_000)
    corpus = TextFolder(str(tmp_path))
    assert corpus.parts("train") is None and sum(len(list(corpus.documents(split))) for split in SPLITS) == 2


def test_what_does_not_match_is_said(tmp_path):
    for name in ("a.txt", "b.txt", "c.md", "d.md", "e.rst", "LICENSE", ".git/config", "sub/f.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    said = TextFolder(str(tmp_path)).notes()
    assert said[0] == f"{tmp_path}: 2 files match '**/*.txt'; left out: 3 *.md, 1 *.rst, 1 without an ending."
    assert said[1] == f"{tmp_path}: folders that are links are not entered: {tmp_path}/linked."
    with pytest.raises(FileNotFoundError, match=r"matches the pattern '\*\*/\*.tex'; it holds 3 \*.md, 2 \*.txt, 1"):
        TextFolder(str(tmp_path), "**/*.tex").paths()
    with pytest.raises(FileNotFoundError, match=r"1 \*.rst, 1 other: bind TextFolder.pattern = '\*\*/\*.md'$"):
        TextFolder(str(tmp_path), "**/*.tex").paths()
    with pytest.raises(FileNotFoundError, match=r"there is no \*.jsonl or .* file in .*; it holds 3 \*.md, 2 \*.txt"):
        Jsonl(str(tmp_path)).files()
    for name in ("d", "e.md"):
        (tmp_path / "last" / name).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"matches the pattern '\*\*/\*.txt'$"):
        TextFolder(str(tmp_path / "last")).paths()
    (tmp_path / "last" / "f").write_text("text")
    with pytest.raises(FileNotFoundError, match=r"holds 1 without an ending: bind TextFolder.pattern = '\*\*/\*'$"):
        TextFolder(str(tmp_path / "last")).paths()
    with pytest.raises(ValueError, match="a pattern begins at the folder"):
        TextFolder(str(tmp_path), "/etc/*").paths()


def test_pipes_and_sockets_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a.txt").write_text("text\n" * 9)
    (tmp_path / "a.jsonl").write_text('{"text": "text"}\n' * 3)
    assert [path.name for path in TextFolder(str(tmp_path)).paths()] == ["a.txt"]
    assert [path.name for _, path in Jsonl(str(tmp_path)).files()] == ["a.jsonl"]
    with pytest.raises((FileNotFoundError, ValueError), match=r"pipe.jsonl"):
        Jsonl(str(tmp_path / "pipe.jsonl")).files()
