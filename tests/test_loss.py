"""The loss in chunks is the loss, and so are its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.loss import loss_sum
from tests import small


@pytest.mark.parametrize("chunks", [2, 6])
def test_loss_in_chunks_is_the_loss(chunks):
    cfg = small.config()
    params, tokens = small.params(cfg), small.tokens((3, 13))
    x, y = tokens[:, :-1], tokens[:, 1:]
    weights = np.random.default_rng(0).uniform(size=x.shape).astype(np.float32)

    def loss(params, chunks):
        return loss_sum(cfg, params, x, y, weights, jnp.zeros_like(x), chunks=chunks)

    whole = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, 1)
    parts = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, chunks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), whole, parts)
    with pytest.raises(ValueError, match="chunks=5 must divide the context of 12"):
        loss(params, 5)
