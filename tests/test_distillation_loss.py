"""The loss with a teacher against plain formulas: values and gradients, in chunks, packed, with ignored tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.data.batches import Batch
from flm_jax.distillation import Teacher, distilled_sums, divergence
from tests import small

CFG = small.config(layers=1, output_mult=8.0)
# Of another shape in every way that a teacher may be, with fewer ids than the model.
OTHER = small.config(embed=16, layers=1, heads=1, mlp=24, vocab=50, output_mult=8.0)
TEMPERATURE = 1.7


def packed(vocab: int) -> Batch:
    """Two rows of two documents each, with weights of all sizes, a third of them 0."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, vocab, (2, 13), dtype=np.int32)
    weights = np.where(rng.uniform(size=(2, 12)) < 0.3, 0.0, rng.uniform(size=(2, 12))).astype(np.float32)
    segments = (np.arange(12) >= np.array([[5], [8]])).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], weights, segments)


def plain(params, teacher, teacher_params, batch):
    """Cross-entropy and divergence from whole logits, as the formulas are written."""
    ours = small.apply(CFG, params, batch.inputs_BT, batch.segments_BT)
    theirs = small.apply(teacher, teacher_params, batch.inputs_BT, batch.segments_BT)
    gone = jnp.full((*theirs.shape[:2], CFG.vocab - teacher.vocab), -1e30)
    p = jax.nn.softmax(jnp.concatenate([theirs, gone], -1) / TEMPERATURE, -1)
    log_q = jax.nn.log_softmax(ours / TEMPERATURE, -1)
    kl = jnp.sum(jax.scipy.special.xlogy(p, p) - p * log_q, -1)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(ours, -1), batch.targets_BT[..., None], -1)[..., 0]
    return jnp.sum(losses * batch.weights_BT), jnp.sum(kl * batch.weights_BT)


def mixed(sums, weight=0.6):
    return (1 - weight) * sums[0] + weight * TEMPERATURE**2 * sums[1], sums


def test_loss_and_gradient_in_chunks_are_those_of_the_formula():
    params, theirs, batch = small.params(CFG), small.params(OTHER, seed=1), packed(OTHER.vocab)

    def in_chunks(params):
        return mixed(distilled_sums(CFG, params, OTHER, theirs, batch, None, 4, TEMPERATURE)[:2])

    def whole(params):
        return mixed(plain(params, OTHER, theirs, batch))

    expected = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    assert expected[0][1][1] > 0.5, "the teacher must differ from the model"
    found = jax.jit(jax.value_and_grad(in_chunks, has_aux=True))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-6), found, expected)


def test_a_teacher_that_is_the_model_gives_no_gradient_and_a_teacher_never_gets_one():
    params, batch = small.params(CFG), packed(small.VOCAB)

    def kl(params, teacher_params):
        return distilled_sums(CFG, params, CFG, teacher_params, batch, temperature=TEMPERATURE)[1]

    derived = jax.jit(jax.value_and_grad(kl, argnums=(0, 1)))
    value, grads = derived(params, params)
    assert abs(value) < 1e-5
    jax.tree.map(lambda g: np.testing.assert_allclose(g, np.zeros_like(g), atol=1e-5), grads[0])
    away = derived(small.params(CFG, seed=2), params)[1]
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(away[0])) > 0.1
    assert not any(np.any(g) for g in jax.tree.leaves(away[1]))


@pytest.mark.parametrize(("temperature", "ids"), [(1.0, 7), (0.5, 9)])
def test_the_divergence_and_its_gradient_are_those_of_numpy(temperature, ids):
    rng = np.random.default_rng(0)
    theirs, ours = 6 * rng.normal(size=(2, 3, 7)), 6 * rng.normal(size=(2, 3, ids))
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum(-1, keepdims=True) for x in (theirs, ours))
    expected = (p * (np.log(p) - np.log(q[..., :7]))).sum(-1)
    found, back = jax.vjp(
        lambda a, b: divergence(a, b, temperature), jnp.asarray(theirs, jnp.float32), jnp.asarray(ours, jnp.float32)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    to_theirs, to_ours = back(jnp.ones((2, 3)))
    assert not np.any(to_theirs)
    longer = np.concatenate([p, np.zeros((2, 3, ids - 7))], -1)
    np.testing.assert_allclose(to_ours, (q - longer) / temperature, atol=1e-5)


def test_the_weight_decays_over_the_steps_or_stays():
    falling, constant = Teacher(weight=0.8), Teacher(weight=0.8, decay="constant")
    np.testing.assert_allclose([falling.weight_at(step, 4) for step in range(4)], [0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose([constant.weight_at(step, 4) for step in range(4)], [0.8] * 4, rtol=1e-6)
    for wrong in (dict(weight=0), dict(weight=1.1), dict(decay="cosine"), dict(steps=0), dict(temperature=0)):
        with pytest.raises(ValueError, match=f"Teacher.{next(iter(wrong))} = "):
            Teacher(**wrong)
