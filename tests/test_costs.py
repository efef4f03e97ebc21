"""Parameters and FLOPs: those that are published, and those that XLA counts."""

import jax
import jax.numpy as jnp
import pytest

from flm_jax.config import tele_flm_1t, tele_flm_52b, tele_flm_102b
from flm_jax.costs import forward_flops_per_token, leaves, orthogonalisation_flops, param_count
from flm_jax.kernels.orthogonal import orthogonalized
from tests import small


@pytest.mark.parametrize(
    ("cfg", "billions", "mult"),
    [(tele_flm_52b(), 52.85, 0.03125), (tele_flm_102b(), 102.24, 0.025), (tele_flm_1t(), 1083.8, 0.025)],
)
def test_named_shapes_have_the_published_size(cfg, billions, mult):
    assert param_count(cfg) / 1e9 == pytest.approx(billions, abs=0.05)
    assert cfg.logits_mult == mult


def test_flops_count_what_xla_counts():
    cfg = small.config(layers=1, embed=32, mlp=96, heads=4, vocab=512)
    tokens = jnp.zeros((1, 64), jnp.int32)
    compiled = small.apply.lower(cfg, small.params(cfg), tokens).compile()
    measured = compiled.cost_analysis()["flops"]
    assert measured == pytest.approx(64 * forward_flops_per_token(cfg, 64), rel=0.15)


def test_flops_of_orthogonalisation_are_those_that_xla_counts():
    cfg = small.config(embed=128, mlp=320, heads=4, head_dim=32)
    measured = 0.0
    for _, like, sig in leaves(cfg):
        if sig.is_matrix_like:
            lowered = jax.jit(orthogonalized, static_argnums=(1, 2, 3)).lower(like, sig, 1, jnp.float32)
            measured += lowered.compile().cost_analysis()["flops"]
    assert measured == pytest.approx(orthogonalisation_flops(cfg, 1), rel=0.05)
