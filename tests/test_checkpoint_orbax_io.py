"""Leaves through Orbax: every dtype and mesh, some by name, and what it reads without noticing damage."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flm_jax.checkpoint import CheckpointError, Checkpoints, DamagedError, leaf_paths, manifest, verify
from tests.checkpoints import ABSTRACT, abstract_of, assert_same, flip, mesh_of, numpy_state

# Orbax leaves tasks behind when a read or a write fails, and Python complains when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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
    assert verify(tmp_path / "1").ok  # without 64-bit types of its own
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"w: .*float64\[5\].*float32\[5\]"),
    ):
        checkpoints.restore({"w": jax.ShapeDtypeStruct((5,), "f4"), "i": jax.ShapeDtypeStruct((), "i4")})


@pytest.mark.parametrize("leaf", [3, 1.5, np.float32(1), "x", jax.random.key(0), np.complex64([1]), np.float64([1])])
def test_only_arrays_are_saved(tmp_path, leaf):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="params/w: "):
            checkpoints.save(1, {"params": {"w": leaf}}, meta={})
        assert checkpoints.steps() == []


def test_some_leaves_can_be_read_by_name(two_steps):
    with Checkpoints(two_steps, read_only=True) as checkpoints:
        found = checkpoints.restore({"params": ABSTRACT["params"]}, partial=True).state
        assert_same(found, {"params": numpy_state(2)["params"]})
        with pytest.raises(CheckpointError, match="params/v: the checkpoint lacks it"):
            checkpoints.restore({"params": {"v": jax.ShapeDtypeStruct((2,), "f4")}}, partial=True)


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


def test_a_step_without_a_manifest_is_damaged(damaged):
    (damaged / "2" / "manifest.json").unlink()
    with Checkpoints(damaged, read_only=True) as checkpoints:
        with pytest.raises(DamagedError, match=r"2/manifest\.json is missing"):
            checkpoints.restore(ABSTRACT, 2)
        assert checkpoints.restore(ABSTRACT).step == 1


def test_a_leaf_of_another_shape_is_refused(two_steps):
    wrong = {**ABSTRACT, "key": jax.ShapeDtypeStruct((3,), jnp.uint32)}
    with (
        Checkpoints(two_steps, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"key: the checkpoint has uint32\[2\], the model has uint32\[3\]"),
    ):
        checkpoints.restore(wrong, 2)
