"""The orthogonalisation of Muon: singular values, layers, copies, and the same on one device as on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.kernels.orthogonal import layer_groups, orthogonalized
from flm_jax.sharding import MeshConfig, make_mesh, sharding
from flm_jax.signature import Signature

QUERY = Signature.parse("layers: embed -> heads head_dim")
OUT = Signature.parse("layers: heads head_dim -> embed")
run = jax.jit(orthogonalized, static_argnums=(1, 2, 3))


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("sig", "shape", "split"), [(QUERY, (3, 24, 4, 8), 2), (OUT, (3, 4, 4, 24), 3)])
def test_every_layer_becomes_a_matrix_with_singular_values_near_1(sig, shape, split):
    """The matrix is from what is read to what is written, and its singular vectors stay."""
    x = normal(shape)
    found = np.asarray(run(x, sig, 5, jnp.float32))
    for before, after in zip(x, found, strict=True):
        sides = np.prod(shape[1:split], dtype=int), -1
        u, s, v = np.linalg.svd(before.reshape(sides), full_matrices=False)
        assert s.max() / s.min() > 3
        inside = u.T @ after.reshape(sides) @ v.T
        assert np.diag(inside).min() > 0.68 and np.diag(inside).max() < 1.21
        np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-4)
        np.testing.assert_allclose(u @ inside @ v, after.reshape(sides), atol=1e-4)


def test_the_size_of_a_matrix_has_no_effect_and_zeros_stay_zeros():
    x = normal((2, 8, 2, 4))
    for size in (1e-12, 1.0, 1e12):
        np.testing.assert_allclose(run(size * x, QUERY, 5, jnp.float32), run(x, QUERY, 5, jnp.float32), atol=1e-5)
    x[1] = 0
    found = np.asarray(run(x, QUERY, 5, jnp.float32))
    assert np.abs(found[0]).max() > 0.1 and not found[1].any()
    alone = run(x[0], QUERY.stack(False), 5, jnp.float32)
    np.testing.assert_allclose(alone, found[0], atol=1e-5)


def test_products_are_computed_in_the_dtype_that_is_asked_for():
    x = normal((2, 32, 4, 8))
    narrow, wide = (run(x, QUERY, 5, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert narrow.dtype == jnp.float32
    assert 1e-3 < float(jnp.linalg.norm(narrow - wide) / jnp.linalg.norm(wide)) < 0.1
    assert "bf16[2,32,32]" in run.lower(x, QUERY, 5, jnp.bfloat16).as_text("hlo")


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(fsdp=2, sequence=2, tensor=2)], ids=str)
def test_one_device_and_eight_give_the_same(mesh):
    """Three layers on eight and on four groups of devices: some have none."""
    x = normal((3, 16, 4, 4))
    expected = run(x, QUERY, 5, jnp.float32)
    where = make_mesh(mesh)
    with jax.set_mesh(where):
        assert layer_groups() == 8 // mesh.tensor == layer_groups(where.shape)
        given = jax.device_put(x, sharding(QUERY, where, x.shape))
        found = jax.jit(orthogonalized, static_argnums=(1, 2, 3))(given, QUERY, 5, jnp.float32)
    assert found.sharding.is_equivalent_to(given.sharding, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
