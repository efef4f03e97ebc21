"""What a step minimises: the z-loss, losses of sources and a teacher together, against plain formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.data.batches import Batch, RowSources
from flm_jax.distillation import Teacher
from flm_jax.distillation.resolved import ResolvedTeacher
from flm_jax.growth import Growth, grow, grown_config
from flm_jax.growth.lineage import Lineage
from flm_jax.loss import token_sums
from flm_jax.recipe import Recipe, Stage, resolve
from flm_jax.step.objective import accumulated, objective_of
from tests import small

CFG = small.config(init_std_vector=0.7)
Z, WEIGHT, TEMPERATURE = 0.3, 0.6, 1.5
SOURCES = np.array([0, 2, 0, 2], np.int32)


def batch() -> Batch:
    """Four rows of two of three sources."""
    ids, rng = small.tokens((4, 13)), np.random.default_rng(1)
    weights = rng.uniform(size=(4, 12)).astype(np.float32)
    segments = (np.arange(12)[None] >= rng.integers(3, 9, (4, 1))).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], weights, segments, RowSources(SOURCES, 3))


def stage(z_loss=Z, teacher=None, **fields):
    found = resolve(Recipe((Stage("one", CFG, 4, 4, z_loss=z_loss, **fields),)))[0]
    return dataclasses.replace(found, teacher=teacher)


def derived(of, rows, teacher=None, chunks=3, parts=1):
    """What an objective measures, and its gradient."""
    weight = None if teacher is None else jnp.float32(WEIGHT)

    def step(params, rows, teacher):
        objective, zero = objective_of(of, chunks, rows, None, teacher, weight)
        return accumulated(objective, zero, params, rows, parts)

    return jax.jit(step)(small.params(CFG), rows, teacher)


def plain(rows, theirs=None, z_loss=Z):
    """The same from whole logits, as the formulas are written."""

    def of(params):
        ours = small.apply(CFG, params, rows.inputs_BT, rows.segments_BT)
        log_z = jnp.log(jnp.sum(jnp.exp(ours), -1))
        losses = log_z - jnp.take_along_axis(ours, rows.targets_BT[..., None], -1)[..., 0]
        total = rows.weights_BT.sum()
        loss, z = jnp.sum(losses * rows.weights_BT) / total, z_loss * jnp.sum(log_z**2 * rows.weights_BT) / total
        found = {"loss": loss, "z_loss": z}
        for k in (0, 2):
            own = rows.weights_BT * (k == SOURCES)[:, None]
            found[f"source_{k}"] = jnp.sum(losses * own) / own.sum()
        if theirs is None:
            return loss + z, found
        p = jax.nn.softmax(theirs / TEMPERATURE, -1)
        kl = jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(ours / TEMPERATURE, -1)), -1)
        found["kl"] = jnp.sum(kl * rows.weights_BT) / total
        return (1 - WEIGHT) * loss + WEIGHT * TEMPERATURE**2 * found["kl"] + z, found

    (_, found), grads = jax.jit(jax.value_and_grad(of, has_aux=True))(small.params(CFG))
    return found, grads


def compare(found, expected):
    (loss, measured), grads = found
    losses, of_formula = expected
    np.testing.assert_allclose(loss, losses["loss"], rtol=1e-5)
    for name in {"z_loss", "kl"} & measured.keys():
        np.testing.assert_allclose(measured[name], losses[name], rtol=2e-5)
    by_source = np.asarray(measured["source_losses_S"])
    assert np.isnan(by_source[1]), "the batch has no row of it"
    np.testing.assert_allclose(by_source[[0, 2]], [losses["source_0"], losses["source_2"]], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, of_formula)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_z_loss_is_minimised_and_the_loss_stays_without_it(parts):
    expected = plain(batch())
    assert expected[0]["z_loss"] > 1, "it must be felt"
    compare(derived(stage(), batch(), parts=parts), expected)


def test_a_step_with_a_teacher_measures_its_sources_and_has_a_z_loss_too():
    theirs, rows = small.params(CFG, seed=3), batch()
    teacher = ResolvedTeacher(Teacher(temperature=TEMPERATURE), Lineage(CFG), 4, None)
    logits = small.apply(CFG, theirs, rows.inputs_BT, rows.segments_BT)
    found = derived(stage(teacher=teacher), rows, theirs)
    assert {"kl", "z_loss", "source_losses_S"} == found[0][1].keys()
    compare(found, plain(rows, logits))


def test_without_a_weight_there_is_no_z_loss_and_no_program_for_one():
    rows = batch()._replace(sources=None)
    objective, zero = objective_of(stage(z_loss=0.0), 1, rows)
    assert zero[1] == {} and jax.eval_shape(objective, small.params(CFG), rows)[1][1] == {}
    with pytest.raises(ValueError, match=r"z_loss.*at least 0"):
        Stage("one", CFG, 4, 4, z_loss=-1e-4)


def test_a_growth_that_preserves_logits_preserves_the_z_loss():
    plan = Growth("zero")
    new = grown_config(CFG, small.config(embed=30, layers=3, mlp=50), plan)
    params, rows = small.params(CFG), batch()._replace(sources=None)
    larger = jax.jit(lambda p: grow(p, CFG, new, plan, jax.random.key(7)))(params)
    before, after = (
        jax.jit(lambda p, cfg=cfg: token_sums(cfg, p, rows, log_z=True))(p) for cfg, p in ((CFG, params), (new, larger))
    )
    np.testing.assert_allclose(before, after, rtol=1e-5)
    assert after.squared_log_z > 100
