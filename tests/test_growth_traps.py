"""Rules that look right and are not: each is broken on purpose here, and the tests of growth see it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import model
from flm_jax.growth import (
    Growth,
    axis_maps,
    grow,
    grown_config,
)
from flm_jax.signature import Role
from tests import small
from tests.growing import (
    GROW,
    KEY,
    gradient,
    grow_pair,
    logits,
    relative,
)

pytestmark = pytest.mark.usefixtures("cheap_draws")


def test_new_weights_that_are_all_zero_never_get_a_gradient():
    """The test above would see it: when all that is new is zero, nothing new ever has a gradient on inner axes."""
    growth = Growth(method="zero")
    old, target = small.config(), small.config(mlp=60)
    new, params = grown_config(old, target, growth), small.params(old)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GROW, "draw", lambda sig, key, shape, std, dtype: jnp.zeros(shape, dtype))
        dead = grow(params, old, new, growth, KEY)
    grads = gradient(new, dead, None, small.tokens())
    assert float(jnp.abs(grads["blocks"]["mlp"]["gate"][..., 40:]).max()) == 0
    assert float(jnp.abs(grads["blocks"]["mlp"]["down"][:, 40:]).max()) == 0


def test_zero_padding_that_leaves_eps_as_it_was_is_not_exact():
    """Zero-padding with the scale times sqrt(d/D) but eps as it was: close, and not exact (first norm at std 0.02)."""
    growth = Growth(method="zero")
    old, params, new, grown = grow_pair((small.config(), small.config(embed=30)), growth)
    plain = new.replace(norm_width=None)
    _, signatures = model.declared(new)
    shrunk = jax.tree.map(lambda x, sig: x * (24 / 30) ** 0.5 if sig.gains else x, grown, signatures)
    assert relative(logits(old, params), logits(plain, shrunk)) > 1e-4
    folded = plain.replace(norm_eps=new.norm_eps * 24 / 30)
    assert relative(logits(old, params), logits(folded, shrunk)) < 1e-5


def test_a_head_that_does_not_absorb_the_new_multiplier_is_not_exact():
    growth = Growth(method="zero")
    old, params, new, grown = grow_pair((small.config(), small.config(embed=30)), growth)
    assert relative(logits(old, params), logits(new, {**grown, "head": grown["head"] * 24 / 30})) > 0.1


def test_a_layer_whose_norm_scale_is_zero_never_gets_a_gradient():
    """Under SwiGLU a scale of 0 stops every gradient of the MLP, its own included."""
    cfg = small.config()
    params = small.params(cfg)
    blocks = params["blocks"]
    blocks["mlp_norm"]["scale"] = blocks["mlp_norm"]["scale"].at[1].set(0)
    grads = gradient(cfg, params, None, small.tokens())["blocks"]
    for leaf in (*grads["mlp"].values(), grads["mlp_norm"]["scale"]):
        assert float(jnp.abs(leaf[1]).max()) == 0
        assert float(jnp.abs(leaf[0]).max()) > 0


def test_plain_duplication_is_not_exact_at_a_fractional_ratio():
    """Net2Net and FPI as published: copies as they are, readers over their number; RMSNorm sees another mean square."""
    old, params, new, grown = grow_pair((small.config(), small.config(embed=30)), Growth("copy"))
    _, signatures = model.declared(new)
    span = axis_maps(old, new, Growth("copy"))["embed"].span
    c = np.sqrt(span.shares() * span.new / span.old).astype(np.float32)

    def published(x, sig):
        for dim, axis in enumerate(sig.axes):
            if axis == "embed" and not sig.gains:
                by = c if sig.role(axis) is Role.READER else 1 / c
                x = x * by.reshape((1,) * dim + (-1,) + (1,) * (x.ndim - dim - 1))
                x = (
                    x
                    if sig.role(axis) is Role.WRITER
                    else x
                    * (span.shares() / c**2 * span.new / span.old)
                    .reshape((1,) * dim + (-1,) + (1,) * (x.ndim - dim - 1))
                    .astype(np.float32)
                )
        return x

    assert relative(logits(old, params), logits(new, grown)) < 1e-5
    assert relative(logits(old, params), logits(new, jax.tree.map(published, grown, signatures))) > 1e-2


def test_key_heads_appended_under_unmoved_queries_are_not_exact():
    """Appending key heads while queries keep their order sends queries to keys they never read."""
    growth = Growth(method="zero")
    old, target = small.config(heads=4, kv_heads=2), small.config(heads=8, kv_heads=4)
    new, params = grown_config(old, target, growth), small.params(old)
    right = jax.jit(lambda p: grow(p, old, new, growth, KEY))(params)
    assert relative(logits(old, params), logits(new, right)) < 1e-5
    attention = right["blocks"]["attention"]
    tiled = {n: attention[n][..., np.array([0, 1, 0, 1]), :] for n in ("key", "value")}
    order = np.array([0, 2, 1, 3, 4, 6, 5, 7])
    wrong = {
        **attention,
        **tiled,
        "query": attention["query"][:, :, order],
        "out": attention["out"][:, order],
    }
    assert (
        relative(logits(old, params), logits(new, {**right, "blocks": {**right["blocks"], "attention": wrong}})) > 1e-2
    )
