"""Writing safetensors files: the order of writing, and what is left where it fails."""

import errno
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from flm_jax.convert.tensors import INDEX, SINGLE, FormatError, open_shards, save
from tests.test_convert_tensors import FILES, drawn, names, same, write_all

TWO = {"x": drawn((6, 2), np.float32, 1), "y": drawn((6, 2), np.float32, 2)}


def test_one_file_is_on_the_disk_before_the_next_is_begun(tmp_path):
    seen, buffers = [], set()

    def fill(name, out):
        seen.append(names(tmp_path / "model.partial"))
        buffers.add(out.__array_interface__["data"][0])
        out[...] = three[name]

    three = {**TWO, "z": drawn((6, 2), np.float32, 3)}
    save(tmp_path, three, fill, 48)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert seen == [files[:1], files[:2], files]
    assert len(buffers) == 2  # of one tensor's size
    assert all(same(x.read(), three[name]) for name, x in open_shards(tmp_path).items())


def test_a_tensor_is_filled_while_the_one_before_is_written(tmp_path, monkeypatch):
    filled, put = threading.Event(), os.pwrite

    def slow(descriptor, content, offset):
        if bytes(content) == TWO["x"].tobytes():
            assert filled.wait(10)
        return put(descriptor, content, offset)

    def fill(name, out):
        out[...] = TWO[name]
        if name == "y":
            filled.set()

    monkeypatch.setattr(os, "pwrite", slow)
    save(tmp_path, TWO, fill)
    assert all(same(x.read(), TWO[name]) for name, x in open_shards(tmp_path).items())


def test_values_are_aligned_and_headers_are_what_the_library_writes(tmp_path):
    """Of a file of one dtype, in the library's order of names, every byte is the same."""
    tensors = {name: drawn((3, 5), np.float32, i) for i, name in enumerate("abc")}
    write_all(tmp_path, tensors)
    assert (tmp_path / SINGLE).read_bytes() == safetensors.numpy.save(tensors, {"format": "pt"})
    mixed = {"a": drawn((3,), np.int8), "b": drawn((2,), np.float64), "c": drawn((3,), np.float16)}
    write_all(tmp_path / "mixed", mixed)
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in open_shards(tmp_path / "mixed").values())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_removes_what_was_written(tmp_path, error):
    def fill(name, out):
        if name == "y":
            raise error("stop")

    with pytest.raises(error):
        save(tmp_path / "out", TWO, fill, 48)
    assert not names(tmp_path / "out")


def test_a_full_disk_keeps_nothing(tmp_path, monkeypatch):
    def full(descriptor, content, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=f"No space left on device: '.*{SINGLE}'"):
        write_all(tmp_path / "out", TWO)
    assert not names(tmp_path / "out")


def test_a_disk_that_takes_part_of_a_write_gets_the_rest(tmp_path, monkeypatch):
    put = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, offset: put(descriptor, content[:7], offset))
    write_all(tmp_path, TWO)
    assert all(same(x.read(), TWO[name]) for name, x in open_shards(tmp_path).items())


def test_files_get_their_names_once_all_are_on_the_disk(tmp_path, monkeypatch):
    seen, sync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append(("sync", str(Path(f"/proc/self/fd/{fd}").readlink()))), sync(fd))
    )
    monkeypatch.setattr(Path, "rename", lambda a, b: (seen.append(("name", str(b))), rename(a, b)))
    write_all(tmp_path, TWO, 48)
    drafts = [str(tmp_path / "model.partial" / file) for file in (*FILES, INDEX)]
    named = [str(tmp_path / file) for file in (*FILES, INDEX)]
    assert seen == [("sync", f) for f in drafts] + [("name", f) for f in named] + [("sync", str(tmp_path))]


def test_a_failure_while_naming_keeps_nothing(tmp_path, monkeypatch):
    rename = Path.rename

    def fails_at_the_index(a, b):
        if b.name == INDEX:
            raise OSError(5, "Input/output error")
        return rename(a, b)

    monkeypatch.setattr(Path, "rename", fails_at_the_index)
    with pytest.raises(OSError, match="Input/output"):
        write_all(tmp_path / "out", TWO, 48)
    assert not names(tmp_path / "out")


@pytest.mark.parametrize("name", [SINGLE, FILES[0], INDEX])
def test_a_model_is_not_written_over(tmp_path, name):
    (tmp_path / name).write_bytes(b"kept")
    with pytest.raises(FormatError, match=f"{re.escape(str(tmp_path / name))} exists already"):
        write_all(tmp_path, TWO)
    assert (tmp_path / name).read_bytes() == b"kept"


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "model.partial").mkdir()
    for name in (*FILES, INDEX, ".tmp"):
        (tmp_path / "model.partial" / name).write_bytes(b"left")
    write_all(tmp_path, TWO)
    assert names(tmp_path) == [SINGLE]


def test_files_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o002)
    try:
        write_all(tmp_path, TWO, 48)
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in names(tmp_path)} == {0o664}
