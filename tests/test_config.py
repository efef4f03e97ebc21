"""Configurations of a model: published deviations, and shapes that cannot be."""

import jax
import jax.numpy as jnp
import pytest

from flm_jax import model
from flm_jax.config import ModelConfig, small_1t, tele_flm_52b
from tests import small


def test_initial_deviation_falls_with_the_root_of_fan_in():
    cfg = small_1t(vocab=small.VOCAB)
    params, signatures = jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0)), model.declared(cfg)[1]
    for x, sig in zip(jax.tree.leaves(params), jax.tree.leaves(signatures), strict=True):
        expected = 0 if sig.gains else cfg.std(sig)
        # Truncation at three deviations leaves 0.987 of one.
        assert float(jnp.std(x)) == pytest.approx(0.987 * expected, rel=0.03)
    down = signatures["blocks"]["mlp"]["down"]
    assert cfg.std(down) == pytest.approx(cfg.init_std * (16 * 8 / 3 / cfg.mlp) ** 0.5)


def test_52b_initial_deviation_is_the_published_one():
    _, signatures = model.declared(tele_flm_52b())
    assert tele_flm_52b().std(signatures["blocks"]["attention"]["query"]) == pytest.approx(4.242e-3, rel=1e-3)
    assert tele_flm_52b().std(signatures["embedding"]) == 4e-3


def test_published_width_multiplier_at_52b():
    cfg = tele_flm_52b()
    for name, group in (("query", "attention"), ("out", "attention"), ("gate", "mlp"), ("down", "mlp")):
        sig = model.declared(cfg)[1]["blocks"][group][name]
        assert sig.width_mult(cfg.sizes, cfg.base_sizes) == pytest.approx(32, rel=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(embed=25, head_dim=None), "embed=25 is not divisible by heads=2.*such as 24"),
        (dict(kv_heads=4), "kv_heads=4 must divide heads=2"),
        (dict(head_dim=3), "head_dim = 3: use an integer, even"),
        (dict(remat="some"), "remat = 'some': use one of none, dots, products, inner, mlp, full"),
        (dict(layers=-1), "layers = -1: use an integer, at least 0"),
        (dict(base_layers=0), "base_layers = 0: use an integer, at least 1"),
        (dict(residual_mult=0.0), "residual_mult = 0.0: use a number, greater than 0"),
        (dict(attention_mult=1e9), "attention_mult = 1000000000.0: use a number, from 1e-06 to 1000000.0"),
        (dict(mlp=1.5), "mlp = 1.5: use an integer, at least 1"),
    ],
)
def test_wrong_shapes_are_refused_with_what_would_be_right(changes, message):
    with pytest.raises(ValueError, match=message):
        small.config(**changes)


def test_config_is_hashable_and_static():
    assert hash(small.config()) == hash(small.config())
    assert isinstance(small.config(), ModelConfig)
