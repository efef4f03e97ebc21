"""Safetensors: the same bytes as the format's own library, both ways, and an answer to every file that is no good."""

import itertools
import json
import os
import pickle
import re
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from flm_jax.convert import safetensors as reading
from flm_jax.convert import safetensors_writer as writing
from flm_jax.convert.safetensors import DTYPES, INDEX, SINGLE, FormatError, open_shards
from flm_jax.convert.safetensors_writer import Writer

BF16 = np.dtype(ml_dtypes.bfloat16)


def drawn(shape, dtype, seed=0):
    """Bits of every kind, NaNs among them."""
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def values():
    found = {
        "head": drawn((7, 3), BF16, 1),
        "scale": drawn((5,), np.float32, 2),
        "step": drawn((), np.int64, 3),
        "none": drawn((0, 4), np.float16, 4),
        "thin": drawn((3, 0), np.float32, 5),
        "odd": drawn((3,), np.uint8, 6),
        "cube": drawn((4, 2, 3), np.float64, 7),
    }
    return found | {f"as.{name}": drawn((3, 5), dtype, 8) for name, dtype in DTYPES.items()}


def described(tensors):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()}


def write_all(directory, tensors, shard_bytes=5 * 10**9):
    with Writer(directory, described(tensors), shard_bytes) as writer:
        for name, x in tensors.items():
            writer.write(name, 0, x)


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def by_library(directory):
    """What the format's own library reads. Its numpy has no 8-bit floats: those are checked by their bytes."""
    found = {}
    for file in directory.glob("*.safetensors"):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            found[name] = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


# The two directions.


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 100, 1])
def test_the_library_reads_what_is_written(tmp_path, shard_bytes):
    tensors = values()
    write_all(tmp_path / "out", tensors, shard_bytes)
    found = by_library(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(same(found[name], x) for name, x in tensors.items())
    assert not list((tmp_path / "out").glob("*.partial"))


def test_what_is_written_loads_as_numpy_in_bfloat16_too(tmp_path):
    tensors = {"a": drawn((4, 2), BF16), "b": drawn((), np.float32), "c": drawn((0,), np.int8)}
    write_all(tmp_path, tensors)
    found = safetensors.numpy.load_file(tmp_path / SINGLE)
    assert all(same(found[name], x) for name, x in tensors.items())
    with safetensors.safe_open(tmp_path / SINGLE, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path):
    tensors = values()
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    found = open_shards(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(same(found[name].read(), x) for name, x in tensors.items())
    assert all(found[name].nbytes == x.nbytes for name, x in tensors.items())
    assert same(found["head"].rows(2, 5), tensors["head"][2:5])
    assert same(found["head"].rows(7, 7), tensors["head"][7:])
    for start, stop in [(-1, 2), (3, 2), (0, 8)]:
        with pytest.raises(IndexError, match=f"head has rows 0:7, not {start}:{stop}"):
            found["head"].rows(start, stop)


def test_shards_of_the_library_are_read_in_the_order_of_the_index(tmp_path):
    tensors = values()
    names = sorted(tensors, key=lambda name: name[::-1])
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        safetensors.numpy.save_file({n: tensors[n] for n in names if weight_map[n] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    found = open_shards(tmp_path)
    assert list(found) == names
    assert all(same(found[name].read(), x) for name, x in tensors.items())


def test_a_header_may_name_tensors_in_any_order(tmp_path):
    (tmp_path / SINGLE).write_bytes(
        raw({"b": entry(offsets=(8, 16)), "none": entry(shape=(0,), offsets=(8, 8)), "a": entry()}, bytes(8) + b"x" * 8)
    )
    found = open_shards(tmp_path)
    assert list(found) == ["a", "none", "b"]
    assert found["b"].read().tobytes() == b"x" * 8


def test_an_index_of_the_single_file_is_read(tmp_path):
    write_all(tmp_path, {"a": drawn((3,), np.float32)})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE}}))
    assert list(open_shards(tmp_path)) == ["a"]


def test_files_are_as_transformers_writes_them(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.int8), "a": np.arange(4, dtype=np.float32), "c": np.ones((), np.float16)}
    write_all(tmp_path, tensors, shard_bytes=18)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*names, INDEX])
    assert (tmp_path / INDEX).read_text() == (
        '{\n  "metadata": {\n    "total_size": 24\n  },\n  "weight_map": {\n'
        f'    "a": "{names[1]}",\n    "b": "{names[0]}",\n    "c": "{names[1]}"\n  }}\n}}\n'
    )
    for name in names:
        raw = (tmp_path / name).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        assert length % 8 == 0 and raw[8 : 8 + length].decode().rstrip(" ")[-1] == "}"


def test_shards_hold_no_more_than_they_may(tmp_path):
    tensors = {f"{i}": drawn((n,), np.uint8) for i, n in enumerate([3, 4, 3, 50, 2, 8, 10, 1])}
    write_all(tmp_path, tensors, shard_bytes=10)
    found = open_shards(tmp_path)
    shards = [[n for n in tensors if found[n].file == file] for file in sorted({t.file for t in found.values()})]
    assert shards == [["0", "1", "2"], ["3"], ["4", "5"], ["6"], ["7"]]


def test_wider_dtypes_come_first_so_that_all_are_aligned(tmp_path):
    write_all(tmp_path, {"a": drawn((3,), np.uint8), "b": drawn((3,), np.float16), "c": drawn((3,), np.float64)})
    found = open_shards(tmp_path)
    assert list(found) == ["c", "b", "a"]
    assert all(t.offset % t.dtype.itemsize == 0 for t in found.values())


def test_tensors_are_described_as_structs_or_arrays_or_stored_or_tuples(tmp_path):
    write_all(tmp_path / "a", {"x": drawn((3, 2), BF16)})
    stored = open_shards(tmp_path / "a")["x"]
    with Writer(tmp_path / "b", {"s": stored, "t": ((2,), jnp.bfloat16), "n": np.zeros(2)}, metadata={}) as writer:
        writer.write("s", 0, stored.read())
        writer.write("t", 0, jnp.ones((2,), jnp.bfloat16))
        writer.write("n", 0, np.zeros(2))
    assert same(safetensors.numpy.load_file(tmp_path / "b" / SINGLE)["s"], stored.read())


def test_no_tensors_at_all(tmp_path):
    write_all(tmp_path, {})
    assert open_shards(tmp_path) == {}
    assert safetensors.numpy.load_file(tmp_path / SINGLE) == {}


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable())


@given(st.data())
def test_any_tensors_round_trip_by_rows_in_any_order(data):
    kinds = data.draw(st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from([*DTYPES.values()])), max_size=6))
    tensors = {name: drawn(shape, dtype, i) for i, (name, (shape, dtype)) in enumerate(kinds.items())}
    runs = []
    for name, x in tensors.items():
        count = len(x) if x.ndim else 1
        cuts = sorted(data.draw(st.sets(st.integers(0, count), max_size=3)) | {0, count})
        runs += [(name, a, b) for a, b in itertools.pairwise(cuts)]
    with tempfile.TemporaryDirectory() as base, pytest.MonkeyPatch.context() as patch:
        for module in (reading, writing):
            patch.setattr(module, "_PIECE", data.draw(st.integers(1, 40)))
        patch.setattr(writing, "_UNSYNCED", data.draw(st.integers(1, 100)))
        directory = Path(base) / "out"
        with Writer(directory, described(tensors), data.draw(st.integers(1, 300))) as writer:
            for name, a, b in data.draw(st.permutations(runs)):
                x = np.atleast_1d(tensors[name])
                strided = np.asfortranarray(np.repeat(x[a:b], 2, axis=0))[::2]
                writer.write(name, a, strided)
        found, library = open_shards(directory), by_library(directory)
        assert found.keys() == library.keys() == tensors.keys()
        for name, a, b in runs:
            x = tensors[name]
            assert same(found[name].rows(a, b), x[a:b] if x.ndim else x[None])
        for name, x in tensors.items():
            assert same(found[name].read(), x) and same(library[name], x)


# Files that are no good. Each message names the file, what was found and what would be right.


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


EIGHT = bytes(8)
BAD_FILES = {
    "empty": (b"", "(0 bytes) has no header: 8 bytes with its length"),
    "short": (b"\3\0\0", "(3 bytes) has no header: 8 bytes with its length"),
    "length zero": (bytes(20), "(20 bytes) has no header: 8 bytes with its length, above 0"),
    "length too large": (raw({}, length=100_000_001), "gives its header 100000001 bytes, the most are 100000000"),
    "length past the end": (raw({}, length=1000), "was cut short: it has 10 bytes, its header alone goes to byte 1008"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer to the file, not the file"),
    "no json": (raw(b"{no"), "is damaged: its header must be one JSON object, and cannot be read"),
    "no utf-8": (raw(b'{"\xff": 1}'), "is damaged: its header must be one JSON object, and cannot be read"),
    "deep": (raw(b"[" * 100_000), "is damaged: its header must be one JSON object, and cannot be read"),
    "no object": (raw([1]), "is damaged: its header must be one JSON object, and is a list"),
    "twice": (raw(b'{"a": 1, "b": 2, "b": 3}'), "cannot be read: it has 'b' twice"),
    "twice below": (raw(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "cannot be read: it has 'dtype' twice"),
    "metadata": (raw({"__metadata__": {"format": 1}}), "has a '__metadata__' that is not an object of texts"),
    "metadata list": (raw({"__metadata__": []}), "has a '__metadata__' that is not an object of texts"),
    "entry": (raw({"a": 3}), "'a' is described by 3, not by an object of dtype, shape and data_offsets"),
    "entry lacks": (raw({"a": {"dtype": "F32", "shape": [2]}}), "not by an object of dtype, shape and data_offsets"),
    "dtype": (raw({"a": entry("F31")}, EIGHT), "'a' has dtype 'F31', which is not known; it must be one of BOOL, I8"),
    "dtype type": (raw({"a": entry(["F32"])}, EIGHT), "'a' has dtype ['F32'], which is not known"),
    "dtype 4 bits": (
        raw({"a": entry("F4", (16,))}, EIGHT),
        "'F4', which packs values of 4 bits, which is not supported",
    ),
    "dtype 6 bits": (raw({"a": entry("F6_E2M3")}, EIGHT), "packs values of 6 bits, which is not supported"),
    "shape below 0": (raw({"a": entry(shape=(-2, -1))}, EIGHT), "has shape [-2, -1]; it must be a list of integers, 0"),
    "shape float": (
        raw({"a": entry(shape=(2.0,))}, EIGHT),
        "has shape [2.0]; it must be a list of integers, 0 or more",
    ),
    "shape bool": (raw({"a": entry(shape=(True, 2))}, EIGHT), "has shape [True, 2]; it must be a list of integers"),
    "shape int": (raw({"a": {**entry(), "shape": 2}}, EIGHT), "has shape 2; it must be a list of integers, 0 or more"),
    "offsets float": (raw({"a": entry(offsets=(0, 8.0))}, EIGHT), "[0, 8.0]; they must be two integers, begin and end"),
    "offsets three": (
        raw({"a": entry(offsets=(0, 4, 8))}, EIGHT),
        "[0, 4, 8]; they must be two integers, begin and end",
    ),
    "offsets none": (
        raw({"a": {**entry(), "data_offsets": None}}, EIGHT),
        "None; they must be two integers, begin and end",
    ),
    "offsets below 0": (raw({"a": entry(offsets=(-8, 0))}, EIGHT), "[-8, 0]; they must be 0 <= begin <= end"),
    "begin after end": (raw({"a": entry(offsets=(8, 0))}, EIGHT), "[8, 0]; they must be 0 <= begin <= end"),
    "size": (raw({"a": entry(offsets=(0, 7))}, EIGHT), "has 7 bytes by its data_offsets, F32 [2] takes 8"),
    "overlap": (
        raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "'b' overlaps 'a': it begins at byte 4 of the data, and should at 8",
    ),
    "same place": (raw({"a": entry(), "b": entry()}, EIGHT), "'b' overlaps 'a': it begins at byte 0 of the data"),
    "hole": (
        raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
        "'b' leaves a hole after 'a': it begins at byte 12 of the data, and should at 8",
    ),
    "hole first": (raw({"a": entry(offsets=(8, 16))}, bytes(16)), "'a' leaves a hole after the header: it begins at"),
    "out of range": (
        raw({"a": entry(offsets=(800, 808))}, EIGHT),
        "it begins at byte 800 of the data, and should at 0",
    ),
    "cut short": (raw({"a": entry()}, bytes(5)), "was cut short: it has 74 bytes and should have 77; download or copy"),
    "extra": (raw({"a": entry()}, bytes(9)), "has 78 bytes and should have 77: those after 'a' belong to no tensor"),
    "extra only": (raw({}, b"x"), "has 11 bytes and should have 10: those after the header belong to no tensor"),
}


def refused(directory, *parts):
    with pytest.raises(FormatError) as caught:
        open_shards(directory)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_good_is_refused(tmp_path, case):
    content, message = BAD_FILES[case]
    file = tmp_path / SINGLE
    file.write_bytes(content)
    refused(tmp_path, str(file), message)
    if case != "dtype 4 bits":  # the format has it; all else its own library refuses too
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load_file(file)
    # The same file in a shard is named as the shard.
    shard = tmp_path / "model-00001-of-00001.safetensors"
    file.rename(shard)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard.name}}))
    refused(tmp_path, str(shard), message)


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_directories_without_a_model_are_refused(tmp_path):
    refused(tmp_path / "gone", str(tmp_path / "gone"), "does not exist")
    refused(tmp_path, str(tmp_path), f"holds no model: neither {SINGLE} nor {INDEX}")
    write_all(tmp_path / "a", {"x": np.zeros(2)})
    refused(tmp_path / "a" / SINGLE, "is a file; name the directory that it is in")
    (tmp_path / "a" / SINGLE).rename(tmp_path / "a" / "model-00001-of-00002.safetensors")
    refused(tmp_path / "a", f"nor {INDEX}; it has model-00001-of-00002.safetensors, which no index names")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "x.pt", "x.pth", "x.ckpt"])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(1))
    way = f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).save_pretrained(OUT, safe_serialization=True)"
    refused(tmp_path, str(tmp_path), f"only pickles, {name}; a pickle can run code when it is loaded", way)
    write_all(tmp_path, {"x": np.zeros(2)})
    assert list(open_shards(tmp_path)) == ["x"]


def test_missing_shards_are_named(tmp_path):
    write_index(tmp_path, {f"t{i}": f"s{i}.safetensors" for i in range(7)})
    safetensors.numpy.save_file({"t2": np.zeros(1)}, tmp_path / "s2.safetensors")
    message = (
        "names 7 files, 6 of them missing: s0.safetensors, s1.safetensors, s3.safetensors, s4.safetensors and 2 more"
    )
    refused(tmp_path, str(tmp_path / INDEX), message, "download them again")


OUTSIDE = ["../s.safetensors", "/s.safetensors", "a/s.safetensors", "a\\s.safetensors", "..", "", "..safetensors"]


@pytest.mark.parametrize("name", [*OUTSIDE, "pytorch_model.bin", "s\0.safetensors", 3, None])
def test_an_index_leads_to_files_beside_it_only(tmp_path, name):
    (tmp_path / "m").mkdir()
    write_index(tmp_path / "m", {"t": name})
    found = (
        f"says that 't' is in {name!r}: that must be a .safetensors file beside it, named without a directory or '..'"
    )
    refused(tmp_path / "m", str(tmp_path / "m" / INDEX), found, "such as 'model-00001-of-00002.safetensors'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is damaged: it must be one JSON object, and cannot be read"),
        (b"[]", "is damaged: it must be one JSON object, and is a list"),
        (b'{"weight_map": {"a": "x", "a": "x"}}', "it has 'a' twice"),
        (b"{}", "has no 'weight_map', an object of file names by tensor name"),
        (b'{"weight_map": []}', "has no 'weight_map', an object of file names by tensor name"),
    ],
)
def test_an_index_that_is_no_good_is_refused(tmp_path, content, message):
    (tmp_path / INDEX).write_bytes(content)
    refused(tmp_path, str(tmp_path / INDEX), message)


def test_an_index_and_shards_that_do_not_belong_together_are_refused(tmp_path):
    for i in (1, 2):
        safetensors.numpy.save_file({f"t{i}": np.zeros(1), f"u{i}": np.zeros(1)}, tmp_path / f"s{i}.safetensors")
    good = {f"{n}{i}": f"s{i}.safetensors" for n in "tu" for i in (1, 2)}
    write_index(tmp_path, good)
    assert list(open_shards(tmp_path)) == list(good)
    write_index(tmp_path, {**good, "v": "s2.safetensors"})
    refused(tmp_path, str(tmp_path / INDEX), "says that 'v' is in s2.safetensors, which does not have it")
    write_index(tmp_path, {name: file for name, file in good.items() if name != "u1"})
    refused(tmp_path, str(tmp_path / "s1.safetensors"), f"has 'u1', and {INDEX} does not know it")
    safetensors.numpy.save_file({n: np.zeros(1) for n in ("t2", "u2", "u1")}, tmp_path / "s2.safetensors")
    write_index(tmp_path, good)
    refused(tmp_path, str(tmp_path / "s2.safetensors"), f"has 'u1', and {INDEX} says that it is in s1.safetensors")
    safetensors.numpy.save_file({"t": np.zeros(1)}, tmp_path / SINGLE)
    refused(tmp_path, str(tmp_path), f"holds {SINGLE}, and {INDEX} that names other files: remove one of the two")


def test_a_file_that_shrinks_after_opening_is_said(tmp_path):
    write_all(tmp_path, {"a": drawn((10_000,), np.float32)})
    stored = open_shards(tmp_path)["a"]
    os.truncate(tmp_path / SINGLE, 20_000)
    with pytest.raises(FormatError, match="ends after 20000 bytes: it became shorter while a was read"):
        stored.read()


# Writing.


def writer_of(tmp_path, **tensors):
    return Writer(tmp_path / "out", {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in tensors.items()}, 40)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "never written: 'x' rows 0:6 of 6, 's' rows 0:1 of 1; nothing is kept"),
        ([(0, 2)], "'x' rows 2:6 of 6, 's'"),
        ([(4, 6)], "'x' rows 0:4 of 6, 's'"),
        ([(0, 2), (3, 6)], "'x' rows 2:3 of 6, 's'"),
        ([(1, 2), (3, 4)], "'x' rows 0:1 of 6, 's'"),
        ([(3, 6), (0, 3)], "never written: 's' rows 0:1 of 1; nothing is kept"),
    ],
)
def test_rows_that_are_missing_are_named_and_nothing_is_kept(tmp_path, runs, message):
    def attempt():
        with writer_of(tmp_path, x=(6, 2), s=(), none=(0, 2), thin=(2, 0)) as writer:
            for a, b in runs:
                writer.write("x", a, np.zeros((b - a, 2), np.float32))

    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        attempt()
    assert str(tmp_path / "out") in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("again", [(0, 1), (2, 4), (3, 4), (1, 6), (2, 3), (5, 6)])
def test_a_row_is_written_once(tmp_path, again):
    with pytest.raises(ValueError, match=r"'x' has rows \d:\d already"), writer_of(tmp_path, x=(6, 2)) as writer:
        for a, b in [(0, 1), (4, 6), (2, 4), again]:
            writer.write("x", a, np.zeros((b - a, 2), np.float32))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("name", "start", "rows", "message"),
    [
        ("y", 0, np.zeros((1, 2), np.float32), "'y' is none of the tensors that this writer was made for"),
        ("x", 0, np.zeros((1, 2)), "'x' is float32[6, 2]: float64[1, 2] at row 0 is no run of rows of it"),
        ("x", 0, np.zeros((1, 2), ">f4"), "'x' is float32[6, 2]: >f4[1, 2] at row 0 is no run of rows of it"),
        ("x", 0, np.zeros((1, 3), np.float32), "float32[1, 3] at row 0 is no run of rows of it"),
        ("x", 0, np.zeros((2,), np.float32), "float32[2] at row 0 is no run of rows of it"),
        ("x", 5, np.zeros((2, 2), np.float32), "float32[2, 2] at row 5 is no run of rows of it"),
        ("x", -1, np.zeros((1, 2), np.float32), "float32[1, 2] at row -1 is no run of rows of it"),
        ("s", 0, np.zeros((2,), np.float32), "'s' is float32[]: float32[2] at row 0 is no run of rows of it"),
    ],
)
def test_what_is_no_run_of_rows_is_refused(tmp_path, name, start, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)), writer_of(tmp_path, x=(6, 2), s=()) as writer:
        writer.write(name, start, rows)


def test_an_exception_removes_what_was_written(tmp_path):
    def attempt():
        with writer_of(tmp_path, x=(6, 2), y=(6, 2)) as writer:
            writer.write("x", 0, np.zeros((6, 2), np.float32))
            assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
                "model-00001-of-00002.safetensors.partial",
                "model-00002-of-00002.safetensors.partial",
                f"{INDEX}.partial",
            ]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt()
    assert not list((tmp_path / "out").iterdir())


def test_a_failed_write_cannot_be_closed_over(tmp_path, monkeypatch):
    writer = writer_of(tmp_path, x=(6, 2))

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "pwrite", full)
        writer.write("x", 0, np.zeros((6, 2), np.float32))
    with pytest.raises(RuntimeError, match="a write failed, so nothing is kept"):
        writer.close()
    assert not list((tmp_path / "out").iterdir())


def test_closing_does_not_overtake_a_write(tmp_path, monkeypatch):
    writer, real, begun, closed = writer_of(tmp_path, x=(6, 2)), os.pwrite, threading.Event(), threading.Event()

    def slow(*args):
        begun.set()
        assert closed.wait(60)
        return real(*args)

    monkeypatch.setattr(os, "pwrite", slow)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(writer.write, "x", 0, np.zeros((6, 2), np.float32))
        assert begun.wait(60)
        with pytest.raises(RuntimeError, match="a thread is still writing, so nothing is kept"):
            writer.close()
        closed.set()
    assert not list((tmp_path / "out").iterdir())


def test_short_writes_are_gone_on_from(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:3], offset))
    x = drawn((6, 2), np.float32)
    with writer_of(tmp_path, x=(6, 2)) as writer:
        writer.write("x", 0, x)
    assert same(open_shards(tmp_path / "out")["x"].read(), x)


def test_closing_waits_for_the_disk_before_files_get_their_names(tmp_path, monkeypatch):
    seen, sync, rename = [], os.fsync, Path.rename
    base = str(tmp_path / "out")
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append(("sync", str(Path(f"/proc/self/fd/{fd}").readlink()))), sync(fd))
    )
    monkeypatch.setattr(Path, "rename", lambda a, b: (seen.append(("name", str(b))), rename(a, b)))
    with writer_of(tmp_path, x=(6, 2), y=(6, 2)) as writer:
        for name in "xy":
            writer.write(name, 0, np.zeros((6, 2), np.float32))
    writer.close()  # nothing more to do
    files = [f"{base}/model-0000{i}-of-00002.safetensors" for i in (1, 2)] + [f"{base}/{INDEX}"]
    assert seen == [("sync", f"{f}.partial") for f in files] + [("name", f) for f in files] + [("sync", base)]


def test_a_failure_while_naming_keeps_nothing(tmp_path, monkeypatch):
    rename = Path.rename

    def fails_at_the_index(a, b):
        if b.name == INDEX:
            raise OSError(5, "Input/output error")
        return rename(a, b)

    writer = writer_of(tmp_path, x=(6, 2), y=(6, 2))
    for name in "xy":
        writer.write(name, 0, np.zeros((6, 2), np.float32))
    monkeypatch.setattr(Path, "rename", fails_at_the_index)
    with pytest.raises(OSError, match="Input/output"):
        writer.close()
    assert not list((tmp_path / "out").iterdir())


def test_the_disk_is_waited_for_now_and_then(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(writing, "_UNSYNCED", 16)
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), sync(fd)))
    with writer_of(tmp_path, x=(6, 2)) as writer:
        counts = []
        for i in range(6):
            writer.write("x", i, np.zeros((1, 2), np.float32))
            counts.append(len(synced))
    assert counts == [0, 1, 1, 2, 2, 3]


def test_a_closed_writer_writes_no_more(tmp_path):
    with writer_of(tmp_path, x=(1,)) as writer:
        writer.write("x", 0, np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="'x' is written after the writer was closed"):
        writer.write("x", 0, np.zeros(1, np.float32))


@pytest.mark.parametrize("name", [SINGLE, "model-00001-of-00002.safetensors", INDEX])
def test_a_model_is_not_written_over(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"kept")
    with pytest.raises(FormatError, match=f"{re.escape(str(tmp_path / 'out' / name))} exists already"):
        writer_of(tmp_path, x=(1,))
    assert (tmp_path / "out" / name).read_bytes() == b"kept"


def test_what_a_killed_writer_left_is_removed(tmp_path):
    writer_of(tmp_path, x=(6, 2), y=(6, 2))
    assert len(list((tmp_path / "out").iterdir())) == 3
    with writer_of(tmp_path, x=(1,)) as writer:
        writer.write("x", 0, np.zeros(1, np.float32))
    assert [file.name for file in (tmp_path / "out").iterdir()] == [SINGLE]


@pytest.mark.parametrize(
    ("tensors", "more", "message"),
    [
        ({"x": ((1,), np.complex64)}, {}, "'x' has dtype complex64; safetensors files are written with bool, int8"),
        ({"x": ((1,), ml_dtypes.int4)}, {}, "'x' has dtype int4; safetensors files are written with bool, int8"),
        ({"__metadata__": ((1,), np.float32)}, {}, "no tensor can be called '__metadata__'"),
        ({}, {"shard_bytes": 0}, "shard_bytes must be 1 or more, not 0"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, tensors, more, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Writer(tmp_path, tensors, **more)
    assert not list(tmp_path.iterdir())


def test_threads_write_at_the_same_time(tmp_path):
    tensors = {f"{i}": drawn((64, 3), BF16, i) for i in range(8)}
    start = threading.Barrier(8)
    with Writer(tmp_path, described(tensors), 1000) as writer, ThreadPoolExecutor(8) as pool:

        def one(name):
            start.wait()
            for row in range(64):
                writer.write(name, row, tensors[name][row : row + 1])

        list(pool.map(one, tensors))
    found = open_shards(tmp_path)
    assert all(same(found[name].read(), x) for name, x in tensors.items())


def test_of_two_threads_with_one_row_one_is_refused(tmp_path):
    start = threading.Barrier(8)
    writer = writer_of(tmp_path, x=(1, 2))

    def one(_):
        start.wait()
        try:
            writer.write("x", 0, np.zeros((1, 2), np.float32))
        except ValueError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(one, range(8))) == 1
    writer.close()
