"""What the tests of evaluation share: one device and eight, and scores that are the same up to rounding."""

import jax
import numpy as np

from flm_jax.sharding import MeshConfig, make_mesh

ONE, EIGHT = MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)


def mesh_of(config):
    return make_mesh(config, jax.devices()[:1] if config == ONE else None)


def assert_same_scores(found, expected):
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=2e-5, atol=2e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]
