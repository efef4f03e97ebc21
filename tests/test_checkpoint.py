"""Does the damage for real: kills, flipped bits, truncated files, full disks, wrong shapes, two writers."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import logging
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flm_jax import checkpoint
from flm_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    NoCheckpointError,
    checksum,
    leaf_paths,
    manifest,
    verify,
)

LOGGER = "flm_jax.checkpoint"
# Orbax leaves tasks behind when a read or a write fails, and Python complains when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Moments(NamedTuple):
    count: Any
    mu: Any


def mesh_of(*shape: int) -> Mesh:
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def numpy_state(step: int) -> dict[str, Any]:
    """Every dtype that a train state holds, a pure function of the step."""
    rng = np.random.default_rng(step)
    return {
        "params": {
            "w": rng.normal(size=(16, 32)).astype("f4"),
            "b": rng.normal(size=(8,)).astype(jnp.bfloat16),
        },
        "opt": (Moments(np.array(step, "i4"), {"w": rng.normal(size=(16, 32)).astype("f4")}), ()),
        "mask.ramp": rng.random(5) < 0.5,
        "none": np.zeros((0, 3), "f4"),
        "key": rng.integers(0, 2**32, 2, dtype="u4"),
    }


def state_at(step: int) -> Any:
    return jax.tree.map(jnp.array, numpy_state(step))


def abstract_of(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def raw(x: Any) -> tuple:
    x = np.asarray(x)
    return x.shape, x.dtype.name, x.tobytes()


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert {k: raw(v) for k, v in leaf_paths(found).items()} == {k: raw(v) for k, v in leaf_paths(wanted).items()}


ABSTRACT = abstract_of(numpy_state(0))


def save(directory: Path, *steps: int, **options: Any) -> None:
    with Checkpoints(directory, keep=100) as checkpoints:
        for step in steps:
            checkpoints.save(
                step, state_at(step), meta={"step": step}, blobs={"vocab.model": bytes([step] * 9)}, **options
            )


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    save(directory, 1, 2)
    return directory


@pytest.fixture
def damaged(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "copy")
    return tmp_path / "copy"


# The checksum.


def reference(x: np.ndarray) -> str:
    """The checksum in NumPy, in 64-bit arithmetic reduced by hand, one word at a time."""

    def mix(h: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = ((h ^ (h >> shift)) * factor) % 2**32
        return h ^ (h >> 16)

    shape = x.shape or (1,)
    width = min(x.dtype.itemsize, 4)
    words = np.frombuffer(x.tobytes(), f"<u{width}").astype(int)
    inner = int(np.prod(shape[1:], dtype=int)) * (x.dtype.itemsize // width)
    first = second = 0
    for i, word in enumerate(words.tolist()):
        position = (mix(i // inner) + i % inner) % 2**32
        a = mix(word ^ (position * 0x9E3779B1) % 2**32)
        first, second = first + a, second + mix((a + position) % 2**32)
    return f"{first % 2**32:08x}{second % 2**32:08x}"


def digest_of(x: Any) -> str:
    return checksum.digests({"x": checksum.of(jnp.asarray(x))})["x"]


DTYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "float16",
    "bfloat16",
    "float32",
    "int32",
    "uint32",
    "float64",
    "int64",
]
# Few shapes, as each is compiled: without dimensions, empty, and of one to three dimensions.
SHAPES = [(), (0, 3), (1,), (7,), (3, 5), (2, 3, 4)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.data())
def test_one_flipped_bit_changes_both_lanes(dtype, shape, data):
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    content = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    if dtype == "bool":
        content = bytearray(byte & 1 for byte in content)
    x = np.frombuffer(bytes(content), jnp.dtype(dtype)).reshape(shape)
    with jax.enable_x64(True):
        before = digest_of(x)
        assert before == reference(x)
        if size:
            at = data.draw(st.integers(0, size - 1))
            content[at] ^= 1 << (0 if dtype == "bool" else data.draw(st.integers(0, 7)))
            after = digest_of(np.frombuffer(bytes(content), jnp.dtype(dtype)).reshape(shape))
            assert before[:8] != after[:8] and before[8:] != after[8:]


def test_signs_swaps_and_zeroed_blocks_change_the_checksum():
    x = np.random.default_rng(0).choice(np.float32([-1, 1]), 64).reshape(8, 8)
    seen = {digest_of(x)}
    changed = [x.copy() for _ in range(5)]
    changed[0][0, :2] *= -1  # two sign bits: a weighted sum with odd weights cannot see this
    changed[1][:] = -x
    changed[2][3:5] = 0
    changed[3][[0, 1]] = x[[1, 0]]
    changed[4][:] = x.T
    for other in changed:
        seen.add(digest_of(other))
    assert len(seen) == 6
    assert digest_of(np.float32(0)) != digest_of(np.float32(-0.0))
    nan = np.array([0x7FC00000, 0x7FC00001, 0x7F800001], "u4").view("f4")
    assert len({digest_of(value) for value in nan}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_checksum_does_not_depend_on_the_sharding(dtype):
    x = np.random.default_rng(1).integers(0, 2, (16, 8)).astype(jnp.dtype(dtype))
    shardings = [NamedSharding(mesh_of(8), spec) for spec in (P(), P("data"), P(None, "data"))]
    shardings += [NamedSharding(mesh_of(2, 4), spec) for spec in (P("data", "model"), P("model"), P(("data", "model")))]
    assert {digest_of(jax.device_put(x, sharding)) for sharding in shardings} == {reference(x)}


# Saving and restoring.


def test_round_trip_of_state_meta_blobs_and_signatures(tmp_path):
    signatures = {"params/w": "embed -> mlp"}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state_at(7), meta={"data": {"window": 3}}, signatures=signatures, blobs={"a.gin": b"x"})
        checkpoints.wait()
        restored = checkpoints.restore(ABSTRACT)
        assert checkpoints.latest() == 7
    assert (restored.step, restored.meta, restored.blobs) == (7, {"data": {"window": 3}}, {"a.gin": b"x"})
    assert_same(restored.state, numpy_state(7))
    leaf = checkpoint.read_manifest(tmp_path / "7").leaves["params/w"]
    assert (leaf.shape, leaf.dtype, leaf.signature) == ((16, 32), "float32", "embed -> mlp")
    assert leaf.checksum == reference(numpy_state(7)["params"]["w"])


def test_leaf_paths_names_fields_keys_and_indices():
    paths = list(leaf_paths(numpy_state(0)))
    assert paths == ["key", "mask.ramp", "none", "opt/0/count", "opt/0/mu/w", "params/b", "params/w"]
    for bad in ({"a/b": 1}, {"": 1}, 1):
        with pytest.raises(CheckpointError, match="non-empty keys"):
            leaf_paths(bad)


def test_dots_and_percents_in_names_do_not_collide(tmp_path):
    state = {"a.b": jnp.zeros(2), "a": {"b": jnp.ones(2)}, "a%2Eb": jnp.full(2, 2.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, meta={})
        assert_same(checkpoints.restore(abstract_of(state)).state, state)


def test_another_mesh_has_the_same_bits(tmp_path):
    state = numpy_state(3)
    first = NamedSharding(mesh_of(8, 1), P("data"))
    state["params"]["w"] = jax.device_put(state["params"]["w"], first)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, meta={})
        for sharding in (
            NamedSharding(mesh_of(2, 4), P("model", "data")),
            jax.sharding.SingleDeviceSharding(jax.devices()[5]),
        ):
            asked = jax.tree.map(lambda x: x, ABSTRACT)
            asked["params"]["w"] = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=sharding)
            found = checkpoints.restore(asked).state
            assert found["params"]["w"].sharding == sharding
            assert_same(found, numpy_state(3))


def test_float64_survives(tmp_path):
    with jax.enable_x64(True):
        state = {
            "w": jnp.asarray(np.random.default_rng(0).normal(size=5)),
            "i": jnp.asarray(np.int64(2**40 + 1)),
        }
        save_state = Checkpoints(tmp_path)
        save_state.save(1, state, meta={})
        save_state.close()
        with Checkpoints(tmp_path) as checkpoints:
            assert_same(checkpoints.restore(abstract_of(state)).state, jax.tree.map(np.asarray, state))
    assert verify(tmp_path).ok  # without 64-bit types of its own
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"w: .*float64\[5\].*float32\[5\]"),
    ):
        checkpoints.restore({"w": jax.ShapeDtypeStruct((5,), "f4"), "i": jax.ShapeDtypeStruct((), "i4")})


@pytest.mark.parametrize("how", ["donate", "delete", "numpy"])
def test_the_state_may_be_overwritten_as_soon_as_save_returns(tmp_path, how):
    sharding = NamedSharding(mesh_of(8), P("data"))
    host = np.random.default_rng(0).normal(size=(8, 1 << 17)).astype("f4")
    kept = host.copy()
    state = {
        "w": jax.device_put(host, sharding),
        "r": jax.device_put(host, NamedSharding(sharding.mesh, P())),
    }
    if how == "numpy":
        state = {"w": host, "r": host}
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, meta={})
        if how == "donate":
            for _ in range(3):
                state = overwrite(state)
        elif how == "delete":
            jax.tree.map(lambda x: x.delete(), state)
            [jax.device_put(np.full_like(host, 9), sharding) for _ in range(3)]
        else:
            host[:] = 9
        assert_same(checkpoints.restore(abstract_of({"w": kept, "r": kept})).state, {"w": kept, "r": kept})


def test_keep_policy(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_steps=[2]) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, state_at(step), meta={})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "2", "5", "6"]


def test_steps_only_go_up_unless_discarded(tmp_path):
    save(tmp_path, 1, 2, 3)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        with pytest.raises(CheckpointError, match="step 2 cannot be saved, step 3 is already there"):
            checkpoints.save(2, state_at(2), meta={})
        checkpoints.discard_after(1)
        checkpoints.save(2, state_at(22), meta={})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert_same(checkpoints.restore(ABSTRACT).state, numpy_state(22))


@pytest.mark.parametrize("leaf", [3, 1.5, np.float32(1), "x", jax.random.key(0), np.complex64([1]), np.float64([1])])
def test_only_arrays_are_saved(tmp_path, leaf):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="params/w: "):
            checkpoints.save(1, {"params": {"w": leaf}}, meta={})
        assert checkpoints.latest() is None


def test_wrong_arguments(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=r"does not have: \['params/v'\]"):
            checkpoints.save(1, state_at(1), meta={}, signatures={"params/v": "embed"})
        with pytest.raises(CheckpointError, match="plain file names"):
            checkpoints.save(1, state_at(1), meta={}, blobs={"../x": b""})
        with pytest.raises(CheckpointError, match="no arrays"):
            checkpoints.save(1, {"a": ()}, meta={})
        with pytest.raises(TypeError):
            checkpoints.save(1, state_at(1), meta={"x": object()})
        assert not list(tmp_path.glob("1*"))
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="read_only"),
    ):
        checkpoints.save(1, state_at(1), meta={})


# What does not fit.


def layers(depth: int, width: int = 4, dtype: str = "f4") -> dict[str, Any]:
    return {"blocks": {"query": np.ones((depth, width), dtype), "norm": np.ones((depth, 2), dtype)}}


@pytest.mark.parametrize(
    ("asked", "texts"),
    [
        (layers(16), ["blocks/query", "float32[12, 4]", "float32[16, 4]", "blocks/norm", "2 leaves"]),
        (layers(12, 5), ["blocks/query", "float32[12, 4]", "float32[12, 5]", "1 leaves"]),
        (layers(12, 4, jnp.bfloat16), ["blocks/query", "float32[12, 4]", "bfloat16[12, 4]"]),
        ({"blocks": {"query": layers(12)["blocks"]["query"]}}, ["blocks/norm", "the model lacks it"]),
        ({**layers(12), "head": np.ones(3, "f4")}, ["head", "the checkpoint lacks it", "float32[3]"]),
        ({f"p{i}": np.ones(i + 1, "f4") for i in range(30)}, ["32 leaves", "and 22 more"]),
    ],
)
def test_another_shape_dtype_or_structure_is_refused(tmp_path, asked, texts):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, layers(12), meta={})
        for step in (None, 1):
            with pytest.raises(CheckpointError) as caught:
                checkpoints.restore(abstract_of(asked), step)
            assert not isinstance(caught.value, DamagedError)  # an older step would not fit either
            for text in texts:
                assert text in str(caught.value)


def test_some_leaves_can_be_read_by_name(two_steps):
    with Checkpoints(two_steps, read_only=True) as checkpoints:
        found = checkpoints.restore({"params": ABSTRACT["params"]}, partial=True).state
        assert_same(found, {"params": numpy_state(2)["params"]})
        with pytest.raises(CheckpointError, match="params/v: the checkpoint lacks it"):
            checkpoints.restore({"params": {"v": jax.ShapeDtypeStruct((2,), "f4")}}, partial=True)


def test_nothing_there(tmp_path):
    with Checkpoints(tmp_path / "absent", read_only=True) as checkpoints:
        assert checkpoints.latest() is None
        for step in (None, 4):
            with pytest.raises(NoCheckpointError, match="absent"):
                checkpoints.restore(ABSTRACT, step)
    with pytest.raises(NoCheckpointError):
        verify(tmp_path / "absent")
    (tmp_path / "12").mkdir()  # an empty directory is nothing, and nothing that could have been lost
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(NoCheckpointError):
        checkpoints.restore(ABSTRACT)


# Damage.


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


DAMAGE = {
    "flip": flip,
    "truncate": truncate,
    "empty": lambda path, _: os.truncate(path, 0),
    "delete": lambda path, _: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_file_damaged(damaged, kind, caplog):
    caplog.set_level(logging.WARNING)
    rng = random.Random(kind)
    files = sorted(path for path in (damaged / "2").rglob("*") if path.is_file())
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        caplog.clear()
        DAMAGE[kind](path, rng)
        with Checkpoints(damaged, read_only=True) as checkpoints:
            with pytest.raises(CheckpointError, match=r"/2") as caught:
                checkpoints.restore(ABSTRACT, 2)
            assert path.name in str(caught.value)
            restored = checkpoints.restore(ABSTRACT)
        assert restored.step == 1
        assert_same(restored.state, numpy_state(1))
        assert restored.blobs == {"vocab.model": bytes([1] * 9)}
        told = [record for record in caplog.records if record.name == LOGGER]
        assert len(told) == 1 and path.name in told[0].getMessage(), (path, told)
        report = verify(damaged)
        assert report.step == 2 and not report.ok
        path.write_bytes(content)
    assert verify(damaged).ok


def test_flipped_bits_in_values_are_seen_without_the_file_hashes(damaged, monkeypatch):
    # Small files have a sha256; here none is compared, as for array data of real size. Never silently wrong.
    monkeypatch.setattr(manifest, "file_faults", lambda *_, **__: [])
    rng = random.Random(0)
    files = sorted(path for path in (damaged / "2" / "arrays").rglob("*") if path.is_file())
    refused = named = 0
    for path in files * 3:
        content = path.read_bytes()
        flip(path, rng)
        with Checkpoints(damaged, read_only=True) as checkpoints:
            try:
                assert_same(checkpoints.restore(ABSTRACT, 2).state, numpy_state(2))
            except DamagedError as error:
                refused += 1
                named += any(f"values of {leaf}" in str(error) for leaf in leaf_paths(ABSTRACT))
                assert checkpoints.restore(ABSTRACT).step == 1
        path.write_bytes(content)
    assert refused > 5 and named > 0


def test_a_leaf_that_orbax_does_not_find_is_not_taken_for_read(damaged, monkeypatch):
    monkeypatch.setattr(manifest, "file_faults", lambda *_, **__: [])
    path = damaged / "2" / "arrays" / "_METADATA"
    path.write_bytes(path.read_bytes().replace(b"params", b"parans"))
    with Checkpoints(damaged, read_only=True) as checkpoints:
        for abstract in ({"params": ABSTRACT["params"]}, ABSTRACT):
            with pytest.raises(DamagedError, match=r"/2/arrays"):
                checkpoints.restore(abstract, 2, partial=True)


def flip_value(step_dir: Path) -> None:
    """Flips one bit of params/w and makes its file's sha256 right again, as if the file were a large one."""
    wanted = numpy_state(int(step_dir.name))["params"]["w"].tobytes()[:16]
    (path,) = (p for p in step_dir.rglob("*") if p.is_file() and wanted in p.read_bytes())
    content = bytearray(path.read_bytes())
    content[content.index(wanted)] ^= 1
    path.write_bytes(content)
    saved = manifest.read_manifest(step_dir)
    files = {**saved.files, str(path.relative_to(step_dir)): manifest.describe_file(path)}
    (step_dir / "manifest.json").write_bytes(manifest.dump_manifest(manifest.Manifest(saved.step, saved.leaves, files)))


def test_a_changed_value_names_the_leaf_and_the_step_can_be_saved_again(damaged, caplog):
    flip_value(damaged / "2")
    assert verify(damaged).problems == (f"{damaged / '2'}: the values of params/w have changed",)
    with Checkpoints(damaged, keep=1) as checkpoints:
        with pytest.raises(DamagedError, match="params/w"):
            checkpoints.restore(ABSTRACT, 2)
        assert checkpoints.restore(ABSTRACT).step == 1
        assert "step 2 is REFUSED" in caplog.text and "params/w" in caplog.text
        checkpoints.save(2, state_at(2), meta={})
        assert_same(checkpoints.restore(ABSTRACT).state, numpy_state(2))
        assert checkpoints.steps() == [2]
    assert (damaged / "2.damaged-1").is_dir()  # set aside, not deleted


def test_all_damaged_is_not_the_same_as_none(damaged):
    flip_value(damaged / "2")
    (damaged / "1" / "meta.json").unlink()
    with Checkpoints(damaged) as checkpoints, pytest.raises(DamagedError, match=r"damaged: \[1, 2\]"):
        checkpoints.restore(ABSTRACT)


def test_foreign_empty_and_half_copied_directories_are_ignored_aloud(damaged, caplog):
    (damaged / "900").mkdir()
    (damaged / "901").mkdir()
    (damaged / "901" / "data.bin").write_bytes(b"x")
    (damaged / "tensorboard").mkdir()
    (damaged / "007").mkdir()
    shutil.copytree(damaged / "2", damaged / "902", ignore=shutil.ignore_patterns("d"))
    shutil.copytree(damaged / "2", damaged / "903")  # whole, but its name lies
    shutil.copytree(damaged / "2", damaged / "904.partial")
    (damaged / "905.partial.old").mkdir()
    with Checkpoints(damaged, read_only=True) as checkpoints:
        assert checkpoints.latest() == 2
        assert checkpoints.restore(ABSTRACT).step == 2
    told = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    for name in ("900", "901", "tensorboard", "007", "902", "903", "904.partial", "905.partial.old"):
        assert sum(f"{damaged / name} is ignored: " in line for line in told) == 1, (name, told)
    with Checkpoints(damaged) as checkpoints:  # a writer clears its own leftovers and nothing else
        assert checkpoints.latest() == 2
    assert not (damaged / "904.partial").exists() and (damaged / "905.partial.old").exists()
    assert (damaged / "901" / "data.bin").exists()


def test_without_a_manifest_only_when_asked_for_by_name(damaged, caplog):
    (damaged / "2" / "manifest.json").unlink()
    with Checkpoints(damaged, read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match=r"2 has no manifest\.json; unverified=True"):
            checkpoints.restore(ABSTRACT, 2)
        without_empty = {name: leaf for name, leaf in ABSTRACT.items() if name != "none"}
        restored = checkpoints.restore(without_empty, 2, unverified=True)
        assert_same(restored.state, {name: leaf for name, leaf in numpy_state(2).items() if name != "none"})
        assert restored.meta == {"step": 2} and "UNVERIFIED" in caplog.text
        wrong = {**without_empty, "key": jax.ShapeDtypeStruct((3,), jnp.uint32)}
        with pytest.raises(CheckpointError, match=r"key: the checkpoint has uint32\[2\], the model has uint32\[3\]"):
            checkpoints.restore(wrong, 2, unverified=True)


def test_two_writers(tmp_path):
    first = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path} is being written .*{os.getpid()}"):
        Checkpoints(tmp_path)
    Checkpoints(tmp_path, read_only=True).close()
    first.close()
    first.close()
    Checkpoints(tmp_path).close()


# Full disks and killed processes.


class FullDisk:
    """No file of this process may grow over a limit: writes fail as they do on a full disk."""

    def __enter__(self):
        self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, self.old[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.old)


@pytest.mark.parametrize("large", ["arrays", "blob"])
@pytest.mark.parametrize("seen_by", ["check", "save", "wait", "close"])
def test_full_disk_is_raised_and_the_last_checkpoint_is_intact(tmp_path, seen_by, large):
    big = {"w": jnp.ones((1 << 18,))} if large == "arrays" else {"w": jnp.ones(3)}
    blobs = {"large": bytes(1 << 18)} if large == "blob" else {}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, big, meta={})
    checkpoints.wait()
    with FullDisk():
        checkpoints.save(2, big, meta={}, blobs=blobs)
        with pytest.raises(CheckpointError, match="saving step 2 failed"):
            if seen_by == "check":
                for _ in range(1000):
                    checkpoints.check()
                    time.sleep(0.02)
            elif seen_by == "save":
                checkpoints.save(3, big, meta={})
            else:
                getattr(checkpoints, seen_by)()
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "1"]
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(abstract_of(big)).state, big)
        checkpoints.save(2, big, meta={})  # no save is skipped after a failure
        checkpoints.wait()
        assert checkpoints.latest() == 2


def test_a_failed_commit_is_raised_and_the_same_step_can_be_saved(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "dump_manifest", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
            checkpoints.save(1, state_at(1), meta={})
            with pytest.raises(CheckpointError, match="No space left"):
                checkpoints.wait()
        checkpoints.check()  # raised once
        checkpoints.save(1, state_at(1), meta={})
        assert checkpoints.restore(ABSTRACT).step == 1


def writer(directory: str) -> None:
    """Runs in a process of its own until it is killed."""
    with Checkpoints(directory, keep=2) as checkpoints:
        try:
            step = checkpoints.restore(ABSTRACT).step
        except NoCheckpointError:
            step = 0
        while True:
            step += 1
            checkpoints.save(step, state_at(step), meta={"step": step})
            print(step, flush=True)


def test_kill_at_random_moments(tmp_path):
    rng = random.Random()
    command = [sys.executable, __file__, str(tmp_path)]
    last = 0
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        begun = int((process.stdout.read().split() or [first])[-1])
        process.wait()
        process.stdout.close()
        assert first == last + 1  # it went on from the last good step
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            latest = checkpoints.latest()
            if latest is None:
                assert begun == 1
                continue
            # Each save waits for the one before it, so at most the newest is lost.
            assert latest >= begun - 1
            for step in checkpoints.steps():
                restored = checkpoints.restore(ABSTRACT, step)
                assert restored.meta == {"step": step}
                assert_same(restored.state, numpy_state(step))
            last = latest
    with Checkpoints(tmp_path):
        pass
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.deleted"))


def test_verify(two_steps):
    report = verify(two_steps, 1)
    assert report.ok and (report.step, report.leaves) == (1, 7) and "intact" in str(report)
    assert verify(two_steps).step == 2
    with pytest.raises(NoCheckpointError, match="step 5"):
        verify(two_steps, 5)


if __name__ == "__main__":
    writer(sys.argv[1])
