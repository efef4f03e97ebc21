"""The loss in chunks is the loss, and so are its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.loss import cross_entropy, loss_sum
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_loss_of_a_token_is_that_of_its_log_probability(dtype):
    rng = np.random.default_rng(0)
    logits, targets = jnp.asarray(rng.normal(size=(2, 5, 11)) * 4, dtype), rng.integers(0, 11, (2, 5), dtype=np.int32)

    def by_index(logits):
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]

    mine, back = jax.vjp(lambda x: cross_entropy(x.astype(jnp.float32), targets), logits)
    expected, of_index = jax.vjp(by_index, logits)
    np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)
    weights = jnp.asarray(rng.uniform(size=(2, 5)), jnp.float32)
    for a, b in zip(back(weights), of_index(weights), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-2, atol=1e-6)
    text = jax.jit(jax.grad(lambda x: jnp.sum(cross_entropy(x, targets)))).lower(logits).as_text()
    assert "scatter" not in text and "gather" not in text


def test_an_id_that_the_vocabulary_does_not_have_gives_no_plausible_loss():
    logits = jnp.zeros((1, 3, 5))
    found = cross_entropy(logits, jnp.asarray([[4, 5, -1]], jnp.int32))
    assert jnp.isnan(found).tolist() == [[False, True, True]]
