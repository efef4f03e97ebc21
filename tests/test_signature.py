"""Signatures, and what follows from them: shapes, muP, shardings, optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from flm_jax import model, sharding
from flm_jax.config import small_1t, tele_flm_1t, tele_flm_52b
from flm_jax.growth.exact_adamw import rescaled_adamw
from flm_jax.optimizer import OptimizerConfig, schedule, state_shardings
from flm_jax.signature import KINDS, Role, Signature
from tests import small

TEXTS = [
    "embed",
    "vocab -> embed",
    "layers: embed -> heads head_dim",
    "layers: mlp -> embed",
    "embed -> vocab",
    "layers: -> kv_heads head_dim*",
]


@pytest.mark.parametrize("text", TEXTS)
def test_parse_and_print_are_inverse(text):
    assert str(Signature.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embed -> width", "unknown axis 'width'; known axes are embed, heads"),
        ("a: embed", "only 'layers' may stand before a colon"),
        ("embed -> mlp -> embed", "expected 'reads -> writes'"),
        ("embed ->", "expected 'reads -> writes'"),
        ("->", "expected 'reads -> writes'"),
        ("layers -> embed", "unknown axis 'layers'"),
    ],
)
def test_what_cannot_be_parsed_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Signature.parse(text)


def test_every_parameter_of_the_model_is_declared_with_the_shape_it_has():
    cfg = small.config(heads=4, kv_heads=2)
    shapes, signatures = model.declared(cfg)
    assert jax.tree.map(lambda s: s.shape(cfg.sizes), signatures) == jax.tree.map(lambda x: x.shape, shapes)
    assert jax.tree.map(
        jnp.shape, jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0))
    ) == jax.tree.map(lambda x: x.shape, shapes)


def test_roles_and_muP_classes():
    query, out = (
        Signature.parse("layers: embed -> heads head_dim"),
        Signature.parse("layers: heads head_dim -> embed"),
    )
    assert (query.role("embed"), query.role("heads"), query.role("layers")) == (
        Role.READER,
        Role.WRITER,
        Role.READER,
    )
    assert (out.role("heads"), out.role("embed"), out.role("layers")) == (
        Role.READER,
        Role.WRITER,
        Role.WRITER,
    )
    assert Signature.parse("embed").role("embed") is Role.GAIN
    classes = {text: Signature.parse(text).is_matrix_like for text in TEXTS}
    assert [text for text, matrix in classes.items() if matrix] == [TEXTS[2], TEXTS[3]]


def test_a_bias_begins_at_zero_and_neither_decays_nor_scales_with_the_width():
    cfg = small.config(qkv_bias=True)
    params, signatures = jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0)), model.declared(cfg)[1]
    biases = [
        (x, sig) for x, sig in zip(jax.tree.leaves(params), jax.tree.leaves(signatures), strict=True) if sig.is_bias
    ]
    assert len(biases) == 3
    for x, sig in biases:
        assert not np.any(x)
        assert (sig.decays, sig.is_matrix_like, cfg.std(sig)) == (False, False, 0.0)
    decaying = {str(sig) for sig in jax.tree.leaves(signatures) if sig.decays}
    assert "vocab -> embed" in decaying and "embed" not in decaying


def test_initial_deviation_falls_with_the_root_of_fan_in():
    cfg = small_1t(vocab=small.VOCAB)
    params, signatures = jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0)), model.declared(cfg)[1]
    for x, sig in zip(jax.tree.leaves(params), jax.tree.leaves(signatures), strict=True):
        expected = 0 if sig.gains else cfg.std(sig)
        # Truncation at three deviations leaves 0.987 of one.
        assert float(jnp.std(x)) == pytest.approx(0.987 * expected, rel=0.03)
    down = signatures["blocks"]["mlp"]["down"]
    assert cfg.std(down) == pytest.approx(cfg.init_std * (16 * 8 / 3 / cfg.mlp) ** 0.5)


def test_published_width_multiplier_at_52b():
    cfg = tele_flm_52b()
    for name, group in (("query", "attention"), ("out", "attention"), ("gate", "mlp"), ("down", "mlp")):
        sig = model.declared(cfg)[1]["blocks"][group][name]
        assert sig.width_mult(cfg.sizes, cfg.base_sizes) == pytest.approx(32, rel=2e-3)


def test_rules_cover_every_axis_and_an_uncovered_one_raises():
    for axis in KINDS:
        sharding.mesh_axes(axis)
    with pytest.raises(ValueError, match="No sharding rule covers axis 'experts'"):
        sharding.mesh_axes("experts")


def test_shardings_of_1t_on_a_pod():
    shapes, signatures = model.declared(tele_flm_1t())
    mesh = jax.sharding.AbstractMesh((1, 64, 1, 16), sharding.MESH_AXES)
    where = sharding.param_shardings(signatures, shapes, mesh)
    assert where["blocks"]["mlp"]["gate"].spec == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert where["blocks"]["mlp"]["gate"].shard_shape(shapes["blocks"]["mlp"]["gate"].shape) == (
        140,
        320,
        6144,
    )


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


def test_a_mesh_that_does_not_divide_an_axis_is_refused_with_sizes_that_work():
    shapes, signatures = model.declared(small.config(heads=6, head_dim=4))
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=4))
    with pytest.raises(ValueError, match=r"blocks/attention/.*axis '(kv_)?heads' of size 6.*tensor=4.*are 4 and 8"):
        sharding.param_shardings(signatures, shapes, mesh)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(tensor=3), "does not fit 8 devices.*nearest that works for tensor, now 3, is 2 and 4"),
        (dict(data=1, fsdp=64, tensor=4), "nearest that works for fsdp, now 64, is 2"),
        (dict(fsdp=64, tensor=16), "The axes other than fsdp need 16 devices, which does not divide 8"),
        (dict(data=-1, fsdp=-1), "at most one is -1"),
        (dict(data=0), "positive"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sharding.MeshConfig(**config))


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
