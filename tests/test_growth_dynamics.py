"""After a growth: every new entry gets a gradient, and gradients and moments follow the dual of the map."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flm_jax import model
from flm_jax.growth import (
    Growth,
    axis_maps,
    grow_moments,
    grow_optimizer,
    masks_at,
)
from flm_jax.growth.rescaling import rescaled_optimizer
from flm_jax.optimizer import OptimizerConfig
from flm_jax.signature import Role
from tests import small
from tests.growing import (
    CONTINUES,
    GROWN,
    PRESERVING,
    RELATIVE,
    SILENT,
    gradient,
    grow_pair,
    pair_for,
    plan_with,
)

pytestmark = pytest.mark.usefixtures("cheap_draws")


@pytest.mark.battery
@pytest.mark.parametrize("fields", [{}, RELATIVE], ids=["plain", "relatives of Llama"])
@pytest.mark.parametrize("method", PRESERVING)
def test_every_new_entry_gets_a_gradient_within_two_steps(method, fields):
    """After two SGD steps every fresh slice of every parameter has had a gradient."""
    growth = plan_with(method, ramp_steps=10)
    old, target = (cfg.replace(**fields) for cfg in pair_for(method))
    if fields and method != "mask":
        target = target.replace(head_dim=old.head_dim)
    old, _, new, grown = grow_pair((old, target), growth)
    maps, (_, signatures) = axis_maps(old, new, growth), model.declared(new)
    seen = jax.tree.map(jnp.zeros_like, grown)
    tokens = small.tokens((4, 64))
    for step in range(3):
        masks = masks_at(old, new, growth, step)
        grads = gradient(new, grown, masks, tokens)
        seen = jax.tree.map(lambda s, g: s + jnp.abs(g), seen, grads)
        grown = jax.tree.map(lambda w, g: w - 0.5 * g, grown, grads)

    def check(path, sig, total):
        for dim, axis in enumerate(sig.axes):
            if axis in maps:
                total_A = np.asarray(total).sum(axis=tuple(i for i in range(total.ndim) if i != dim))
                assert (total_A[maps[axis].span.fresh] > 0).all(), f"{path}: dead slices on {axis}"

    jax.tree_util.tree_map_with_path(check, signatures, seen)


@pytest.mark.battery
@pytest.mark.parametrize("method", sorted({*CONTINUES, "zero", "mask", "identity"}))
def test_gradients_follow_the_dual_so_moments_carry_over(method, x64):
    growth = plan_with(method)
    pair = [c.replace(compute_dtype="float64", param_dtype="float64") for c in pair_for(method)]
    # Copied layers add nothing, and pass gradients on unchanged.
    old, params, new, grown = grow_pair(pair, growth)
    tokens = small.tokens((4, 20))
    before = gradient(old, params, None, tokens)
    after = gradient(new, grown, masks_at(old, new, growth, 0), tokens)
    expected = jax.jit(lambda moments: grow_moments(moments, old, new, growth, power=1))(before)
    maps, (_, signatures) = axis_maps(old, new, growth), model.declared(new)

    def check(path, sig, a, b):
        for dim, axis in enumerate(sig.axes):
            if axis in maps:
                rule = maps[axis].rules[sig.role(axis)]
                known = ~maps[axis].span.fresh | ((rule.fill == "copy") & np.all(rule.dual != 0))
                a, b = (np.asarray(x).take(np.flatnonzero(known), axis=dim) for x in (a, b))
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, signatures, expected, after)


def copied_dual(old, new):
    return axis_maps(old, new, Growth("copy", methods=SILENT))["embed"].rules[Role.READER].dual


def test_gradients_and_moments_follow_a_residual_multiplier_that_falls_with_the_depth(x64):
    """What is folded into the weights of `out` and `down` is what their gradients are multiplied by."""
    wide = dict(compute_dtype="float64", param_dtype="float64", base_layers=3, residual_mult=0.7)
    growth = Growth("zero")
    target = small.config(layers=5, embed=30, **{**wide, "residual_mult": 1.1})
    old, params, new, grown = grow_pair((small.config(**wide), target), growth)
    fold = new.effective_residual_mult / old.effective_residual_mult
    assert fold == pytest.approx(1.1 / 0.7 * 2 / 5)
    before, after = gradient(old, params, None, small.tokens()), gradient(new, grown, None, small.tokens())
    moments = {power: grow_moments(before, old, new, growth, power) for power in (1, 2)}
    kept = np.flatnonzero(~axis_maps(old, new, growth)["layers"].span.fresh)
    for part, name, by in (("attention", "out", fold), ("mlp", "down", fold), ("mlp", "up", 1)):
        was, found = (np.asarray(g["blocks"][part][name]) for g in (before, after))
        entries = (kept, *(slice(size) for size in was.shape[1:]))
        np.testing.assert_allclose(found[entries], was * by, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(moments[1]["blocks"][part][name][entries], was * by, rtol=1e-12)
        np.testing.assert_allclose(moments[2]["blocks"][part][name][entries], was * by**2, rtol=1e-12)
        weights = [np.asarray(p["blocks"][part][name]) for p in (params, grown)]
        np.testing.assert_allclose(weights[1][entries], weights[0] / by, rtol=1e-12)


def test_adam_moments_grow_by_the_dual_of_the_map():
    growth = Growth(method="zero")
    old, params, new, grown = grow_pair(GROWN, growth)
    tx = rescaled_optimizer(OptimizerConfig(), old, model.declared(old)[1])
    grads = gradient(old, params, None, small.tokens())
    state = jax.jit(lambda params, grads: tx.update(grads, tx.init(params), params)[1])(params, grads)

    def grown_by(plan):
        return jax.jit(lambda state: grow_optimizer(state, old, new, plan))(state)

    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    after = next(s for s in grown_by(growth) if isinstance(s, optax.ScaleByAdamState))
    assert int(after.count) == 1
    fold = new.logits_mult / old.logits_mult
    np.testing.assert_allclose(after.mu["head"][:24], adam.mu["head"] * fold, rtol=1e-6)
    np.testing.assert_allclose(after.nu["head"][:24], adam.nu["head"] * fold**2, rtol=1e-6)
    assert float(jnp.abs(after.mu["head"][24:]).max()) == 0
    fresh = axis_maps(old, new, growth)["layers"].span.fresh
    assert float(jnp.abs(after.nu["blocks"]["mlp"]["up"][fresh]).max()) == 0
    assert jax.tree.map(jnp.shape, after.mu) == jax.tree.map(jnp.shape, grown)
    apart = grown_by(Growth("copy", methods=SILENT, optimizer="asymmetric"))
    apart = next(s for s in apart if isinstance(s, optax.ScaleByAdamState))
    np.testing.assert_allclose(
        apart.mu["head"][:24], after.mu["head"][:24] * copied_dual(old, new)[:24, None], rtol=1e-5
    )
    assert float(jnp.abs(apart.mu["head"][24:]).max()) == 0
    assert int(apart.count) == 1
    anew = grown_by(dataclasses.replace(growth, optimizer="fresh"))
    zeros = next(s for s in anew if isinstance(s, optax.ScaleByAdamState))
    assert int(zeros.count) == 0
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(zeros.nu)) == 0
