"""AdamW and Muon with muP: rates and decay by signature, what their states hold and where, and schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from flm_jax import model, sharding
from flm_jax.config import tele_flm_52b
from flm_jax.growth.rescaling import rescaled_optimizer
from flm_jax.optimizer import OPTIMIZERS, OptimizerConfig, direction, only, schedule, state_shardings
from tests import small

MUON = OptimizerConfig(name="muon")


def test_muP_divides_updates_of_matrices_and_spares_gains_from_decay():
    cfg = small.config(embed=64)
    _, signatures = model.declared(cfg)
    params = small.params(cfg)
    grads = jax.tree.map(jnp.ones_like, params)
    plain = OptimizerConfig(clip=0.0, eps=0.0)
    tx = rescaled_optimizer(plain, cfg, signatures)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    decaying = rescaled_optimizer(OptimizerConfig(clip=0.0, eps=0.0, weight_decay=0.5), cfg, signatures)
    decayed, _ = jax.jit(decaying.update)(grads, decaying.init(params), params)

    def check(sig, w, u, d):
        np.testing.assert_allclose(u, 1 / sig.width_mult(cfg.sizes, cfg.base_sizes), rtol=1e-5)
        np.testing.assert_allclose(d - u, 0 * w if sig.gains else 0.5 * w, atol=1e-5)

    jax.tree.map(check, signatures, params, updates, decayed)


def test_matrix_like_parameters_may_have_a_rate_of_their_own():
    """Tele-FLM searched two rates; at 32 base widths, 32 times the rate makes both 1.5e-4 (2404.16645, Table 4)."""
    cfg = tele_flm_52b()
    _, signatures = model.declared(cfg)
    for matrix_rate, ratio in ((1.0, 1 / 32), (32.0, 1.0)):
        tx = rescaled_optimizer(OptimizerConfig(matrix_rate=matrix_rate, clip=0.0), cfg, signatures)
        ones = jax.tree.map(lambda sig: np.ones((1,) * len(sig.axes)), signatures)
        updates, _ = tx.update(ones, tx.init(ones), ones)
        assert updates["embedding"].item() == pytest.approx(1.0, rel=1e-5)
        assert updates["blocks"]["attention"]["query"].item() == pytest.approx(ratio, rel=1e-5)


def small_step(cfg, optimizer, **changes):
    """The updates of one step from a random gradient, the gradient, the state after it, and the signatures."""
    _, signatures = model.declared(cfg)
    params, grads = small.params(cfg), small.params(cfg, 1)
    tx = rescaled_optimizer(dataclasses.replace(optimizer, **changes), cfg, signatures)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    return updates, grads, state, signatures


@pytest.mark.parametrize("wider", [{}, dict(embed=48, heads=6, mlp=80)], ids=["base width", "wider"])
def test_muons_updates_have_the_spectral_norm_of_their_fans(wider):
    """At the base width their root mean square is 0.2; from there the largest singular value follows the fans."""
    cfg = small.config(**{**dict(embed=24, heads=3, head_dim=8, mlp=64, base_width=24), **wider})
    updates, _, _, signatures = small_step(cfg, MUON, matrix_rate=0.5)

    def check(sig, u):
        if not sig.is_matrix_like:
            return
        (fan_in, fan_out), bases = sig.fans(cfg.sizes), sig.fans(cfg.base_sizes)
        matrix = np.asarray(u)[0].reshape(int(fan_in), int(fan_out))
        spectral = 0.1 * np.sqrt(max(bases) * fan_out * bases[0] / (fan_in * bases[1]))
        assert np.linalg.norm(matrix, 2) == pytest.approx(spectral, rel=0.21)
        if not wider:
            assert np.sqrt(np.mean(matrix**2)) == pytest.approx(0.1, rel=0.2)

    jax.tree.map(check, signatures, updates)


def test_muon_leaves_vectors_to_adamw_and_decays_what_adamw_decays():
    cfg = small.config(embed=64, qkv_bias=True)
    plain = dict(clip=0.0)
    (theirs, *_), (mine, _, _, signatures) = (small_step(cfg, OptimizerConfig(name=n), **plain) for n in OPTIMIZERS)
    decayed, *_ = small_step(cfg, MUON, weight_decay=0.5, **plain)

    def check(sig, w, a, m, d):
        assert np.allclose(a, m, rtol=1e-6) != sig.is_matrix_like
        np.testing.assert_allclose(d - m, 0.5 * w if sig.decays else 0 * w, atol=1e-5)

    jax.tree.map(check, signatures, small.params(cfg), theirs, mine, decayed)


@pytest.mark.parametrize("nesterov", [False, True])
def test_muons_direction_is_that_of_optax(nesterov):
    """Optax corrects the bias of its average, which has no effect without a look ahead; with one, it is left out."""
    cfg = small.config(layers=1)
    _, signatures = model.declared(cfg)
    ones = jax.tree.map(lambda _: 1.0, signatures)
    tx = direction(dataclasses.replace(MUON, nesterov=nesterov), signatures, ones, ones, jnp.float32)
    how = dict(nesterov=False, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers((1,), (2, 3)))
    theirs, at_once = optax.contrib.scale_by_muon(**how), optax.contrib.scale_by_muon(beta=0.0, **how)
    params, ours, optaxs = small.params(cfg), jax.jit(tx.update), jax.jit(theirs.update)
    query = params["blocks"]["attention"]["query"]
    state, other, m = tx.init(params), theirs.init(query), 0.0
    for seed in range(1, 4):
        grads = small.params(cfg, seed)
        g = grads["blocks"]["attention"]["query"]
        m = 0.95 * m + 0.05 * g
        updates, state = ours(grads, state, params)
        expected, other = optaxs(g, other)
    if nesterov:
        expected, _ = jax.jit(at_once.update)(0.95 * m + 0.05 * g, at_once.init(query))
    np.testing.assert_allclose(updates["blocks"]["attention"]["query"], expected, atol=1e-4)
    np.testing.assert_allclose(state[0].mu["blocks"]["attention"]["query"], m, rtol=1e-5)


def test_muons_state_has_one_moment_for_matrices_and_two_for_the_rest():
    cfg = small.config(heads=4, vocab=64, qkv_bias=True)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=4), jax.devices())
    shapes, signatures = model.declared(cfg)
    state, shardings = state_shardings(rescaled_optimizer(MUON, cfg, signatures), signatures, shapes, mesh)
    where = sharding.param_shardings(signatures, shapes, mesh)
    matrices = jax.tree.map(lambda sig: sig.is_matrix_like, signatures)
    flags = jax.tree.leaves(matrices)
    assert 0 < sum(flags) < len(flags)
    assert jax.tree.leaves(state[0].mu) == jax.tree.leaves(shapes) and shardings[0].mu == where
    assert jax.tree.structure(state[0].nu) == jax.tree.structure(shardings[0].nu)
    assert shardings[0].nu == only(jax.tree.map(lambda on: not on, matrices), where)
    assert len(jax.tree.leaves(state)) == 1 + len(flags) + flags.count(False)
    made = rescaled_optimizer(MUON, cfg, signatures).init(small.params(cfg))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_muon_takes_the_same_steps_on_one_device_and_on_eight():
    cfg = small.shape(layers=3)
    shapes, signatures = model.declared(cfg)
    tx = rescaled_optimizer(MUON, cfg, signatures)
    given = (small.params(cfg, 1), tx.init(small.params(cfg)), small.params(cfg))
    expected = jax.jit(tx.update)(*given)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, sequence=2, tensor=2))
    params = sharding.param_shardings(signatures, shapes, mesh)
    _, state = state_shardings(tx, signatures, shapes, mesh)
    with jax.set_mesh(mesh):
        found = jax.jit(tx.update, out_shardings=(params, state))(*jax.device_put(given, (params, state, params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), expected, found)


def test_what_belongs_to_one_optimizer_is_refused_with_the_other():
    for field, value in (("momentum", 0.9), ("nesterov", False), ("newton_schulz_steps", 6)):
        assert getattr(OptimizerConfig(name="muon", **{field: value}), field) == value
        with pytest.raises(ValueError, match=f"OptimizerConfig.{field}={value} belongs to muon, not adamw"):
            OptimizerConfig(**{field: value})
    with pytest.raises(ValueError, match=r"OptimizerConfig.name = 'moun'.*adamw, muon"):
        OptimizerConfig(name="moun")


def test_eps_of_blocks_follows_the_depth_and_that_of_others_does_not():
    """CompleteP, 2505.01618, Table 1: their gradients are as small as what a block adds to the stream."""
    cfg = small.config(layers=4, base_layers=2, embed=16)
    _, signatures = model.declared(cfg)
    params = small.params(cfg)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
    settings = OptimizerConfig(clip=0.0, eps=1e-3, weight_decay=0.1)
    found = {}
    for other in (cfg, cfg.replace(base_layers=4), cfg.replace(base_layers=None)):
        tx = rescaled_optimizer(settings, other, signatures)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
        found[other.base_layers] = updates, state
    jax.tree.map(np.testing.assert_array_equal, found[4], found[None])
    jax.tree.map(np.testing.assert_array_equal, found[2][1], found[None][1])

    def check(sig, w, u):
        mult = sig.width_mult(cfg.sizes, cfg.base_sizes)
        expected = 1e-3 / (1e-3 + 1e-3 * (0.5 if sig.stacked else 1)) / mult + (0.1 * w if sig.decays else 0)
        np.testing.assert_allclose(u, expected, rtol=1e-4)

    jax.tree.map(check, signatures, params, found[2][0])


def test_moments_live_where_their_parameters_do():
    cfg = small.config(heads=4)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=4), jax.devices())
    cfg = cfg.replace(vocab=64)
    shapes, signatures = model.declared(cfg)
    tx = rescaled_optimizer(OptimizerConfig(weight_decay=0.1), cfg, signatures)
    _, shardings = state_shardings(tx, signatures, shapes, mesh)
    adam = next(s for s in shardings if isinstance(s, optax.ScaleByAdamState))
    where = sharding.param_shardings(signatures, shapes, mesh)
    assert adam.mu == where
    assert adam.nu == where
    assert adam.count.spec == PartitionSpec()


def test_schedules_warm_up_stay_and_decay():
    wsd = schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, decay_steps=20, final_rate=0.1), 100)
    np.testing.assert_allclose([wsd(s) for s in (0, 5, 10, 79, 80, 90, 100)], [0, 0.5, 1, 1, 1, 0.55, 0.1], rtol=1e-6)
    rewarmed = schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, warmup_from=0.5), 100)
    assert rewarmed(0) == 0.5
    for name in ("cosine", "linear"):
        rate = schedule(OptimizerConfig(learning_rate=2.0, schedule=name, final_rate=0.25), 50)
        np.testing.assert_allclose([rate(0), rate(25), rate(50)], [2.0, 1.25, 0.5], rtol=1e-6)
    with pytest.raises(ValueError, match=r"longer than the stage \(20\)"):
        schedule(OptimizerConfig(warmup_steps=15, decay_steps=10), 20)
    with pytest.raises(ValueError, match="use one of wsd, cosine"):
        OptimizerConfig(schedule="step")


def test_decay_laid_out_over_more_than_one_stage_goes_on_where_it_was():
    """Two stages on one cosine are one stage on it; the second's warm-up rises to where the cosine stands."""
    one = schedule(OptimizerConfig(learning_rate=1.0, schedule="cosine", final_rate=0.1), 100)
    first = schedule(OptimizerConfig(learning_rate=1.0, schedule="cosine", final_rate=0.1, decay_span=100), 60)
    rest = dict(learning_rate=1.0, schedule="cosine", final_rate=0.1, decay_span=100, decay_passed=60)
    second = schedule(OptimizerConfig(**rest), 40)
    np.testing.assert_allclose(
        [one(s) for s in range(100)], [first(s) for s in range(60)] + [second(s) for s in range(40)]
    )
    warmed = schedule(OptimizerConfig(**rest, warmup_steps=4, warmup_from=0.5), 40)
    np.testing.assert_allclose([warmed(0), warmed(2), warmed(4)], [one(60) / 2, one(62) * 0.75, one(64)])
    with pytest.raises(ValueError, match="decay_span=100 minus decay_passed=60 is less than the stage's 41"):
        schedule(OptimizerConfig(**rest), 41)
    with pytest.raises(ValueError, match="belong to cosine and linear, not wsd"):
        OptimizerConfig(decay_span=100)
    with pytest.raises(ValueError, match="decay_passed=100 is not within decay_span=100"):
        OptimizerConfig(schedule="linear", decay_span=100, decay_passed=100)
