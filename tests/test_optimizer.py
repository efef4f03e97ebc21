"""AdamW with muP: rates and decay by signature, where moments live, and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from flm_jax import model, sharding
from flm_jax.config import tele_flm_52b
from flm_jax.growth.exact_adamw import rescaled_adamw
from flm_jax.optimizer import OptimizerConfig, schedule, state_shardings
from tests import small


def test_muP_divides_updates_of_matrices_and_spares_gains_from_decay():
    cfg = small.config(embed=64)
    _, signatures = model.declared(cfg)
    params = small.params(cfg)
    grads = jax.tree.map(jnp.ones_like, params)
    plain = OptimizerConfig(clip=0.0, eps=0.0)
    tx = rescaled_adamw(plain, cfg, signatures)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    decaying = rescaled_adamw(OptimizerConfig(clip=0.0, eps=0.0, weight_decay=0.5), cfg, signatures)
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
        tx = rescaled_adamw(OptimizerConfig(matrix_rate=matrix_rate, clip=0.0), cfg, signatures)
        ones = jax.tree.map(lambda sig: np.ones((1,) * len(sig.axes)), signatures)
        updates, _ = tx.update(ones, tx.init(ones), ones)
        assert updates["embedding"].item() == pytest.approx(1.0, rel=1e-5)
        assert updates["blocks"]["attention"]["query"].item() == pytest.approx(ratio, rel=1e-5)


def test_moments_live_where_their_parameters_do():
    cfg = small.config(heads=4)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=4), jax.devices())
    cfg = cfg.replace(vocab=64)
    shapes, signatures = model.declared(cfg)
    tx = rescaled_adamw(OptimizerConfig(weight_decay=0.1), cfg, signatures)
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
