"""What the tests of growth share: pairs of models, plans by one operator, and how far two models' logits are apart."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from flm_jax.growth import REGISTRY, Growth, axis_maps, grow, grown_config
from flm_jax.growth.depth import PLACES
from flm_jax.loss import loss_sum
from flm_jax.signature import KINDS
from tests import small

PRESERVING = sorted(name for name, operator in REGISTRY.items() if operator.preserving)
CONTINUES = sorted(name for name, operator in REGISTRY.items() if operator.continues)
KEY = jax.random.key(7)
GROW = importlib.import_module("flm_jax.growth.grow")  # the package's name `grow` is the function
GROWN = (
    small.config(heads=4, kv_heads=2, layers=2),
    small.config(embed=30, heads=9, kv_heads=3, head_dim=12, layers=3, mlp=50),
)
# All that relatives of Llama have besides.
RELATIVE = dict(qkv_bias=True, qk_norm=True, sliding_window=5, rope_scaling=small.SCALING)
MULTIPLES = GROWN[0], small.config(embed=48, heads=16, kv_heads=4, head_dim=12, layers=3, mlp=80)
STATIC = [p for p in PLACES if p != "distance"]
SILENT = {"layers": "zero", "head_dim": "zero"}


def axes_of(method):
    return [axis for axis, kind in KINDS.items() if kind in REGISTRY[method].kinds]


def plan_with(method, **fields):
    """A plan that grows what it can by `method`, and the rest by zero."""
    return Growth(methods=dict.fromkeys(axes_of(method), method), **fields)


def pair_for(method):
    return MULTIPLES if method == "hypercloning" else GROWN


def tied_mult(old, target, growth):
    """The output multiplier that a tied model must have: muP's own for copies, the old effective one otherwise."""
    embed = axis_maps(old, target, growth).get("embed")
    if embed is not None and embed.active:
        return old.output_mult
    return old.logits_mult * target.embed / target.base_width


def grow_pair(pair, growth, seed=0):
    old, target = pair
    if old.tied:
        target = target.replace(output_mult=tied_mult(old, target, growth))
    new = grown_config(old, target, growth)
    params = small.params(old, seed)
    return old, params, new, jax.jit(lambda p: grow(p, old, new, growth, KEY))(params)


def logits(cfg, params, masks=None, tokens=None):
    return np.asarray(small.apply(cfg, params, small.tokens() if tokens is None else tokens, None, masks))


def relative(a, b):
    return np.abs(a - b).max() / np.abs(a).max()


@st.composite
def mixtures(draw, without=("noise",)):
    """Any preserving operator on every axis that it grows; those that copy heads copy key heads too.

    What noise adds to copies cancels up to its own rounding, which a model of a few entries does not average away: in
    float32 it is held to its bound at the sizes of docs/growth_errors.md.
    """
    free = [m for m in PRESERVING if m not in ("hypercloning", *without)]
    methods = {axis: draw(st.sampled_from([m for m in free if axis in axes_of(m)])) for axis in KINDS}
    methods["kv_heads"] = methods["heads"]
    return Growth(method=None, methods=methods, depth=draw(st.sampled_from(STATIC)))


def loss(cfg, params, masks, tokens):
    x, y = tokens[:, :-1], tokens[:, 1:]
    return loss_sum(cfg, params, x, y, jnp.ones(x.shape), jnp.zeros_like(x), masks) / x.size


gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
