"""The safetensors files of a model: the library reads what we write and we what it writes; damaged ones are refused."""

import itertools
import json
import os
import pickle
import re
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from flm_jax.convert.tensors import DTYPES, INDEX, SINGLE, FormatError, open_shards, save

FILES = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
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


def write_all(directory, tensors, shard_bytes=10**9):
    save(directory, tensors, lambda name, out: np.copyto(out, tensors[name]), shard_bytes)


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def names(directory):
    return sorted(file.name for file in directory.iterdir())


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def by_library(directory):
    """What the format's own library reads. Its numpy has no 8-bit floats: those are checked by their bytes."""
    found = {}
    for file in directory.glob("*.safetensors"):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            found[name] = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


@pytest.mark.parametrize("shard_bytes", [10**9, 100, 1])
def test_the_library_reads_what_is_written(tmp_path, shard_bytes):
    tensors = values()
    write_all(tmp_path / "out", tensors, shard_bytes)
    found = by_library(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(same(found[name], x) for name, x in tensors.items())
    assert not list((tmp_path / "out").glob("*partial"))


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
    order = sorted(tensors, key=lambda name: name[::-1])
    weight_map = {name: FILES[i % 2] for i, name in enumerate(order)}
    for file in FILES:
        safetensors.numpy.save_file({n: tensors[n] for n in order if weight_map[n] == file}, tmp_path / file)
    write_index(tmp_path, weight_map)
    found = open_shards(tmp_path)
    assert list(found) == order
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
    write_index(tmp_path, {"a": SINGLE})
    assert list(open_shards(tmp_path)) == ["a"]


def test_files_are_as_transformers_writes_them(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.int8), "a": np.arange(4, dtype=np.float32), "c": np.ones((), np.float16)}
    write_all(tmp_path, tensors, shard_bytes=18)
    assert names(tmp_path) == [*FILES, INDEX]
    assert (tmp_path / INDEX).read_text() == (
        '{\n  "metadata": {\n    "total_size": 24\n  },\n  "weight_map": {\n'
        f'    "a": "{FILES[1]}",\n    "b": "{FILES[0]}",\n    "c": "{FILES[1]}"\n  }}\n}}\n'
    )
    with safetensors.safe_open(tmp_path / FILES[0], "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_no_more_than_they_may(tmp_path):
    tensors = {f"{i}": drawn((n,), np.uint8) for i, n in enumerate([3, 4, 3, 50, 2, 8, 10, 1])}
    write_all(tmp_path, tensors, shard_bytes=10)
    found = open_shards(tmp_path)
    shards = [[n for n in tensors if found[n].file == file] for file in sorted({t.file for t in found.values()})]
    assert shards == [["0", "1", "2"], ["3"], ["4", "5"], ["6"], ["7"]]
    with pytest.raises(ValueError, match="shard_bytes must be 1 or more, not 0"):
        write_all(tmp_path / "none", tensors, shard_bytes=0)


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable())


@given(st.data())
def test_any_tensors_round_trip_by_runs_of_rows(data):
    kinds = data.draw(st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from([*DTYPES.values()])), max_size=6))
    tensors = {name: drawn(shape, dtype, i) for i, (name, (shape, dtype)) in enumerate(kinds.items())}
    with tempfile.TemporaryDirectory() as base:
        directory = Path(base) / "out"
        write_all(directory, tensors, data.draw(st.integers(1, 300)))
        found, library = open_shards(directory), by_library(directory)
        assert found.keys() == library.keys() == tensors.keys()
        for name, x in tensors.items():
            assert same(found[name].read(), x) and same(library[name], x)
            count = len(x) if x.ndim else 1
            cuts = sorted(data.draw(st.sets(st.integers(0, count), max_size=3)) | {0, count})
            for a, b in itertools.pairwise(cuts):
                assert same(found[name].rows(a, b), x[a:b] if x.ndim else x[None])


# Damaged files. Each message names the file and what was found.


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


EIGHT = bytes(8)
TWICE = b'{"a": %(entry)b, "a": %(entry)b}' % {b"entry": json.dumps(entry()).encode()}
DAMAGED = {
    "empty": b"",
    "header past the end": raw({}, length=1000),
    "no json": raw(b"{no"),
    "metadata": raw({"__metadata__": {"format": 1}}),
    "entry lacks": raw({"a": {"dtype": "F32", "shape": [2]}}),
    "dtype": raw({"a": entry("F31")}, EIGHT),
    "long dtype": raw({"a": entry("F\n" * 9999)}, EIGHT),
    "shape below 0": raw({"a": entry(shape=(-2, -1))}, EIGHT),
    "shape not of the bytes": raw({"a": entry(shape=(3,))}, EIGHT),
    "overlap": raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "hole": raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "cut short": raw({"a": entry()}, bytes(5)),
    "extra": raw({"a": entry()}, bytes(9)),
}
REFUSED = {
    **{
        name: (content, f"({len(content):,} bytes) is damaged, cut short or no safetensors file; download or copy it")
        for name, content in DAMAGED.items()
    },
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer to the file, not the file"),
    # The library takes these.
    "twice": (raw(TWICE, EIGHT), "its header must be one JSON object, and cannot be read: it has 'a' twice"),
    "dtype of 4 bits": (raw({"a": entry("F4", (16,))}, EIGHT), "'a' has dtype F4, which is not supported; it must be"),
}


def refused(directory, *parts):
    with pytest.raises(FormatError) as caught:
        open_shards(directory)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_file_is_refused(tmp_path, case):
    content, message = REFUSED[case]
    file = tmp_path / SINGLE
    file.write_bytes(content)
    assert len(refused(tmp_path, str(file), message)) < len(str(file)) + 500
    # The same file in a shard is named as the shard.
    shard = tmp_path / "model-00001-of-00001.safetensors"
    file.rename(shard)
    write_index(tmp_path, {"a": shard.name})
    refused(tmp_path, str(shard), message)


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
    refused(tmp_path, str(tmp_path / "s2.safetensors"), f"lacks 'v', which {INDEX} places there")
    write_index(tmp_path, {name: file for name, file in good.items() if name != "u1"})
    refused(tmp_path, str(tmp_path / "s1.safetensors"), f"has 'u1', which {INDEX} does not place there")
    safetensors.numpy.save_file({n: np.zeros(1) for n in ("t2", "u2", "u1")}, tmp_path / "s2.safetensors")
    write_index(tmp_path, good)
    refused(tmp_path, str(tmp_path / "s2.safetensors"), f"has 'u1', which {INDEX} does not place there")
    safetensors.numpy.save_file({"t": np.zeros(1)}, tmp_path / SINGLE)
    refused(tmp_path, str(tmp_path), f"holds {SINGLE}, and {INDEX} that names other files: remove one of the two")


def test_a_file_that_shrinks_after_opening_is_said(tmp_path):
    write_all(tmp_path, {"a": drawn((10_000,), np.float32)})
    stored = open_shards(tmp_path)["a"]
    os.truncate(tmp_path / SINGLE, 20_000)
    with pytest.raises(FormatError, match=f"{re.escape(str(tmp_path / SINGLE))} became shorter while 'a' was read"):
        stored.read()
