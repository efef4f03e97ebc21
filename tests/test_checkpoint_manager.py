"""Saving and restoring states: what comes back, which steps are kept, and which arguments are refused."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flm_jax import checkpoint
from flm_jax.checkpoint import CheckpointError, Checkpoints, NoCheckpointError, verify
from tests.checkpoints import (
    ABSTRACT,
    abstract_of,
    assert_same,
    checksum_in_numpy,
    mesh_of,
    numpy_state,
    save,
    state_at,
)

# Orbax leaves tasks behind when a read or a write fails, and Python complains when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_round_trip_of_state_meta_blobs_and_signatures(tmp_path):
    signatures = {"params/w": "embed -> mlp"}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state_at(7), meta={"data": {"window": 3}}, signatures=signatures, blobs={"a.gin": b"x"})
        checkpoints.wait()
        restored = checkpoints.restore(ABSTRACT)
        assert checkpoints.steps() == [7]
    assert (restored.step, restored.meta, restored.blobs) == (7, {"data": {"window": 3}}, {"a.gin": b"x"})
    assert_same(restored.state, numpy_state(7))
    leaf = checkpoint.read_manifest(tmp_path / "7").leaves["params/w"]
    assert (leaf.shape, leaf.dtype, leaf.signature) == ((16, 32), "float32", "embed -> mlp")
    assert leaf.checksum == checksum_in_numpy(numpy_state(7)["params"]["w"])


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


def test_small_replicated_arrays_are_saved_without_programs_that_cut_out_parts(tmp_path, caplog):
    state = {"w": jax.device_put(np.ones((16, 24), "f4"), NamedSharding(mesh_of(8), P()))}
    with Checkpoints(tmp_path) as checkpoints, jax.log_compiles():
        checkpoints.save(1, state, meta={})
        checkpoints.wait()
    assert "Compiling" in caplog.text and "slice" not in caplog.text


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


def test_nothing_there(tmp_path):
    with Checkpoints(tmp_path / "absent", read_only=True) as checkpoints:
        assert checkpoints.steps() == []
        for step in (None, 4):
            with pytest.raises(NoCheckpointError, match="absent"):
                checkpoints.restore(ABSTRACT, step)
    with pytest.raises(NoCheckpointError):
        verify(tmp_path / "absent")
    (tmp_path / "12").mkdir()  # an empty directory is nothing, and nothing that could have been lost
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(NoCheckpointError):
        checkpoints.restore(ABSTRACT)
