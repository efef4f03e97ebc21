"""Digests of corpora that are remembered: what is read again, and what is not."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from flm_jax import train as training
from flm_jax.data import known
from flm_jax.data.corpora import Jsonl, Parquet, TextFolder
from flm_jax.data.known import Known, digest_of, forget
from flm_jax.data.mixture import Mixture, Source
from tests.runs import RUN


class Counted(list):
    """The names of files that were opened."""


@pytest.fixture
def read(monkeypatch):
    """The names of text files that are read."""
    names, honest = Counted(), Path.open

    def counting(path, *args, **named):
        if path.suffix in (".txt", ".jsonl"):
            names.append(path.name)
        return honest(path, *args, **named)

    monkeypatch.setattr(Path, "open", counting)
    return names


@pytest.fixture
def later(monkeypatch):
    """A function after which files that were just written have not changed for a while."""

    def pass_time(seconds=2 * known.SETTLED):
        now = time.time()
        monkeypatch.setattr(known.time, "time", lambda: now + seconds)

    return pass_time


def folder(path):
    path.mkdir()
    for number in range(4):
        (path / f"{number}.txt").write_text(f"text {number}")
    return TextFolder(str(path))


def lines(path):
    path.mkdir()
    (path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(4)))
    return Jsonl(str(path))


@pytest.mark.parametrize("make", [folder, lines])
def test_texts_that_have_not_changed_are_read_once(tmp_path, read, later, make):
    corpus, cache = make(tmp_path / "text"), tmp_path / "cache"
    digest = corpus.digest()
    later()
    assert digest_of(corpus, cache) == digest
    read.clear()
    assert digest_of(corpus, cache) == digest and not read
    other = type(corpus)(corpus.path, heldout_percent=30)  # other settings are another corpus
    assert digest_of(other, cache) == other.digest() != digest
    forget(cache)
    read.clear()
    assert digest_of(corpus, cache) == digest and read


@pytest.mark.parametrize("make", [folder, lines])
@pytest.mark.parametrize("how", ["content", "same size and mtime", "another file", "touched", "added", "removed"])
def test_what_changed_is_read_and_what_is_equal_has_the_same_digest(tmp_path, later, make, how):
    corpus, cache = make(tmp_path / "text"), tmp_path / "cache"
    later()
    digest = digest_of(corpus, cache)
    assert Known(corpus, cache).digest == digest
    file = sorted(Path(corpus.path).iterdir())[0]
    before, content = file.stat(), file.read_bytes()
    changed = content.replace(b"text 0", b"TEXT 0")
    if how == "content":
        file.write_bytes(changed + b"\n")
    elif how == "same size and mtime":  # as rsync --times and cp -p leave it
        file.write_bytes(changed)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns and file.stat().st_size == before.st_size
    elif how == "another file":
        (tmp_path / "new").write_bytes(changed)
        os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
        (tmp_path / "new").rename(file)
    elif how == "touched":
        file.touch()
    elif how == "added":
        file.with_name(f"new{file.suffix}").write_bytes(content)
    else:
        file.with_name(f"new{file.suffix}").write_bytes(content)
        later()
        digest_of(corpus, cache)
        file.unlink()
    assert Known(corpus, cache).digest is None
    found = digest_of(corpus, cache)
    assert found == corpus.digest()
    assert (found == digest) == (how == "touched")


def test_files_that_changed_just_now_or_while_they_were_read_are_not_remembered(tmp_path, later):
    corpus, cache = folder(tmp_path / "text"), tmp_path / "cache"
    digest_of(corpus, cache)  # within the clock's resolution they could change once more
    assert not (cache / known.FOLDER).exists()
    later()
    looked = Known(corpus, cache)
    digest = corpus.digest()
    (Path(corpus.path) / "0.txt").write_text("changed meanwhile")
    assert looked.keep(digest) == digest and Known(corpus, cache).digest is None
    assert not (cache / known.FOLDER).exists()


def test_a_damaged_record_is_read_over_and_a_cache_that_cannot_be_written_is_no_error(tmp_path, later):
    corpus, cache = folder(tmp_path / "text"), tmp_path / "cache"
    later()
    digest = digest_of(corpus, cache)
    (file,) = (cache / known.FOLDER).iterdir()
    whole = file.read_bytes()
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert Known(corpus, cache).digest is None, place
    assert digest_of(corpus, cache) == digest and file.read_bytes() == whole
    assert digest_of(corpus, "/proc/cache") == digest


def test_a_run_that_verifies_its_data_forgets(recipe, tmp_path, monkeypatch):
    def opened(config):
        raise SystemExit(str(folder.exists()))

    folder = Path(recipe.data.cache_dir) / known.FOLDER
    monkeypatch.setattr(training, "open_data", opened)
    for verify_data, kept in ((0, "True"), (1, "False")):
        folder.mkdir(parents=True, exist_ok=True)
        with pytest.raises(SystemExit, match=kept):
            training.train(recipe, dataclasses.replace(RUN, verify_data=verify_data), tmp_path / "run")
    assert not folder.exists()


def test_mixtures_and_other_kinds(tmp_path, read, later):
    mixture = Mixture((Source("a", folder(tmp_path / "a"), 1.0), Source("b", lines(tmp_path / "b"), 2.0)))
    later()
    assert digest_of(mixture, tmp_path / "cache") == mixture.digest()
    read.clear()
    assert digest_of(mixture, tmp_path / "cache") == mixture.digest()
    assert len(read) == 5, "only mixture.digest() itself has read them"

    class Special(Parquet):
        """Who knows what it reads."""

        def digest(self):
            return "special"

    assert digest_of(Special("nowhere"), tmp_path / "cache") == "special"
