"""What the tests of evaluation share: one device and eight, a saved model, scores that are the same up to rounding."""

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.checkpoint import Checkpoints
from flm_jax.growth import Lineage
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.source_checkpoint import CheckpointMeta
from flm_jax.state import abstract_state

ONE, EIGHT = MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)


def mesh_of(config):
    return make_mesh(config, jax.devices()[:1] if config == ONE else None)


def assert_same_scores(found, expected):
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=2e-5, atol=2e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]


def saved(workdir, cfg, params, blobs, lineage=None, **about):
    """A work directory with one checkpoint."""
    lineage, mesh = lineage or Lineage(cfg), mesh_of(ONE)
    with jax.set_mesh(mesh):
        like = abstract_state(lineage, mesh)
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like).replace(params=params)
        meta = CheckpointMeta("saved", lineage, **about).record()
        with Checkpoints(workdir / "checkpoints" / "0_saved") as store:
            store.save(0, state, meta=meta, blobs=blobs)
            store.wait()
    return workdir
