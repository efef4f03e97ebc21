"""What every operator owes: the battery runs over the registry, so registering an operator enrols it."""

import dataclasses
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_jax import model
from flm_jax.convert.fold import fold
from flm_jax.growth import (
    REGISTRY,
    Growth,
    axis_maps,
    compare,
    grow,
    grow_moments,
    grow_optimizer,
    grown_config,
    mask_flags,
    masks_at,
    register,
)
from flm_jax.growth import masks as growth_masks
from flm_jax.growth.axis_map import append, nested
from flm_jax.growth.depth import METRICS, PLACES, by_distance, place
from flm_jax.growth.diagnostics import copies_apart, dead_slices
from flm_jax.growth.distance import layer_distances
from flm_jax.growth.exact_adamw import rescaled_adamw
from flm_jax.growth.lineage import Lineage, lineage_of
from flm_jax.growth.plan import changed
from flm_jax.growth.verify import forward
from flm_jax.loss import loss_sum
from flm_jax.optimizer import OptimizerConfig
from flm_jax.sharding import MeshConfig, abstract, make_mesh, param_shardings
from flm_jax.signature import KINDS, Kind, Role
from tests import reference, small

PRESERVING = sorted(name for name, operator in REGISTRY.items() if operator.preserving)
CONTINUES = sorted(name for name, operator in REGISTRY.items() if operator.continues)
KEY = jax.random.key(7)
GROW = importlib.import_module("flm_jax.growth.grow")  # the package's name `grow` is the function


@pytest.fixture(scope="module", autouse=True)
def cheap_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GROW, "draw", small.waves)
        yield


def axes_of(method):
    return [axis for axis, kind in KINDS.items() if kind in REGISTRY[method].kinds]


def plan_with(method, **fields):
    """A plan that grows what it can by `method`, and the rest by zero."""
    return Growth(methods=dict.fromkeys(axes_of(method), method), **fields)


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


STATIC = [p for p in PLACES if p != "distance"]


@pytest.mark.parametrize("method", PRESERVING)
@settings(max_examples=4)
@given(data=st.data())
def test_exact_in_float64_on_any_axes_at_any_ratio(method, data):
    wide = dict(compute_dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        pair = data.draw(small.growths(axes_of(method), multiples=method == "hypercloning", **wide))
        growth = plan_with(method, depth=data.draw(st.sampled_from(STATIC)))
        old, params, new, grown = grow_pair(pair, growth)
        after = logits(new, grown, masks_at(old, new, growth, 0))
        assert relative(logits(old, params), after[..., : old.vocab]) < 1e-12


@settings(max_examples=8)
@given(pair=small.growths(), growth=mixtures())
def test_exact_in_float32_with_any_mixture_of_methods(pair, growth):
    old, params, new, grown = grow_pair(pair, growth)
    found = compare(old, params, new, grown, growth, small.tokens())
    assert found.preserving
    assert found.max_rel_logit_diff < 1e-5
    assert max(found.layer_diffs) < 1e-5
    assert len(found.layer_diffs) == new.layers


@settings(max_examples=6)
@given(data=st.data(), growth=mixtures(without=()))
def test_exact_in_float64_with_any_mixture_of_methods_noise_included(data, growth):
    with jax.enable_x64(True):
        pair = data.draw(small.growths(compute_dtype="float64", param_dtype="float64"))
        old, params, new, grown = grow_pair(pair, growth)
        found = compare(old, params, new, grown, growth, small.tokens())
        assert found.max_rel_logit_diff < 1e-12
        assert max(found.layer_diffs) < 1e-12


@settings(max_examples=5)
@given(pair=small.growths(compute_dtype="bfloat16"))
def test_zero_is_bit_equal_in_bfloat16(pair):
    # The multiplier is kept: folding its change into the head would round the head anew.
    old, target = pair
    target = target.replace(output_mult=old.logits_mult * target.embed / target.base_width)
    old, params, new, grown = grow_pair((old, target), Growth(method="zero"))
    np.testing.assert_array_equal(logits(old, params), logits(new, grown)[..., : old.vocab])


@settings(max_examples=4)
@given(
    first=small.growths(), growth=mixtures(), extra=st.integers(1, 20), method=st.sampled_from(["copy", "mask", "zero"])
)
def test_growing_twice_by_any_two_methods_stays_exact(first, growth, extra, method):
    """The second growth starts from the first one's model as it is after its ramp, when its masks are gone."""
    _, _, mid, grown = grow_pair(first, growth)
    target = mid.replace(embed=mid.embed + extra, norm_width=None, mlp=mid.mlp + extra)
    plan = Growth(method=method) if method != "copy" else plan_with("copy")
    if mid.tied:
        target = target.replace(output_mult=tied_mult(mid, target, plan))
    new = grown_config(mid, target, plan)
    again = jax.jit(lambda p: grow(p, mid, new, plan, KEY))(grown)
    assert relative(logits(mid, grown), logits(new, again, masks_at(mid, new, plan, 0))) < 1e-5


@pytest.mark.parametrize("order", [("embed", "mlp", "heads"), ("heads", "mlp", "embed")], ids=" ".join)
def test_axis_after_axis_is_all_at_once(order, x64):
    """Where nothing is drawn, the order of axes does not matter; the multiplier's changes fold one after the other."""
    wide = dict(compute_dtype="float64", param_dtype="float64", head_dim=4)
    sizes, plan = dict(embed=54, mlp=90, heads=5), Growth("copy")
    old, params, target, at_once = grow_pair((small.config(**wide), small.config(**wide, **sizes)), plan)
    cfg = old
    for axis in order:
        kv = {"kv_heads": sizes["heads"]} if axis == "heads" else {}
        new = grown_config(cfg, cfg.replace(**{axis: sizes[axis]}, **kv), plan)
        params = grow(params, cfg, new, plan, KEY)
        cfg = new
    assert cfg == target
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), params, at_once)


GROWN = (
    small.config(heads=4, kv_heads=2, layers=2),
    small.config(embed=30, heads=9, kv_heads=3, head_dim=12, layers=3, mlp=50),
)
# All that relatives of Llama have besides.
RELATIVE = dict(qkv_bias=True, qk_norm=True, sliding_window=5, rope_scaling=small.SCALING)
MULTIPLES = GROWN[0], small.config(embed=48, heads=16, kv_heads=4, head_dim=12, layers=3, mlp=80)


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("method", PRESERVING)
def test_exact_with_all_that_relatives_of_llama_have(method, tied, x64):
    """Biases, norms of queries and keys, a sliding window, scaled frequencies; every axis that the method grows."""
    fields = dict(compute_dtype="float64", param_dtype="float64", tied=tied, **RELATIVE)
    old, target = (cfg.replace(**fields) for cfg in pair_for(method))
    if method != "mask":
        target = target.replace(head_dim=old.head_dim)
    growth = plan_with(method)
    old, params, new, grown = grow_pair((old, target), growth)
    assert relative(logits(old, params), logits(new, grown, masks_at(old, new, growth, 0))) < 1e-12


def test_a_target_may_name_only_what_changes():
    """Key heads follow, logits keep their multiplier, widths that were kept are asked for anew."""
    old = small.config(heads=4, kv_heads=2, norm_width=20.0, output_mult=0.5, base_width=24)
    target = changed(old, dict(embed=30, heads=6), Growth("copy"))
    assert (target.embed, target.heads, target.kv_heads, target.head_dim, target.mlp) == (30, 6, 3, 8, 40)
    assert target.logits_mult == pytest.approx(old.logits_mult, rel=1e-12)
    assert target.norm_width is None
    # Tied, copies speak louder, and the multiplier makes up for it.
    tied = changed(old.replace(tied=True), dict(embed=30), Growth("copy"))
    assert tied.logits_mult == pytest.approx(old.logits_mult * 24 / 30, rel=1e-12)
    assert changed(old, dict(embed=30, output_mult=3.0), Growth("zero")).output_mult == 3.0
    assert grown_config(old, changed(old, dict(embed=30), Growth("mask")), Growth("mask")).norm_width is None
    with pytest.raises(ValueError, match="no width; its fields are embed, layers"):
        changed(old, dict(width=30), Growth())


def test_heads_behind_norms_of_their_own_do_not_grow_wider_by_zeros():
    """Drawn queries would change the mean square that their norm divides by; masks hide them from it."""
    old = small.config(qk_norm=True)
    with pytest.raises(ValueError, match="head_dim grows by 'zero'.*grow head_dim by 'mask'"):
        axis_maps(old, old.replace(head_dim=12), Growth("zero"))


def pair_for(method):
    return MULTIPLES if method == "hypercloning" else GROWN


@pytest.mark.parametrize("method", ["zero", "mask", "identity"])
def test_masked_or_silenced_content_may_be_anything(method):
    """Where the mathematics says arbitrary, a loud constant changes nothing."""
    growth = plan_with(method)
    old, params, new, _ = grow_pair(GROWN, growth)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GROW, "draw", lambda sig, key, shape, std, dtype: jnp.full(shape, 42.0, dtype))
        loud = jax.jit(lambda p: grow(p, old, new, growth, KEY))(params)
    assert max(float(jnp.max(x)) for x in jax.tree.leaves(loud)) == 42
    assert relative(logits(old, params), logits(new, loud, masks_at(old, new, growth, 0))) < 1e-5


def loss(cfg, params, masks, tokens):
    x, y = tokens[:, :-1], tokens[:, 1:]
    return loss_sum(cfg, params, x, y, jnp.ones(x.shape), jnp.zeros_like(x), masks) / x.size


gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)


@pytest.mark.parametrize("fields", [{}, RELATIVE], ids=["plain", "relatives of Llama"])
@pytest.mark.parametrize("method", PRESERVING)
def test_no_new_entry_is_dead(method, fields):
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


def test_the_trap_of_all_zero_new_weights_is_dead():
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


def test_the_published_rule_that_forgets_eps_fails():
    """Zero-padding with the scale times sqrt(d/D) but eps as it was: close, and not exact (first norm at std 0.02)."""
    growth = Growth(method="zero")
    old, params, new, grown = grow_pair((small.config(), small.config(embed=30)), growth)
    plain = new.replace(norm_width=None)
    _, signatures = model.declared(new)
    shrunk = jax.tree.map(lambda x, sig: x * (24 / 30) ** 0.5 if sig.gains else x, grown, signatures)
    assert relative(logits(old, params), logits(plain, shrunk)) > 1e-4
    folded = plain.replace(norm_eps=new.norm_eps * 24 / 30)
    assert relative(logits(old, params), logits(folded, shrunk)) < 1e-5


FOLDED = {
    "norm width": (dict(), dict(embed=30, mlp=50)),
    "norm and head width": (dict(), dict(embed=30, head_dim=12)),
    "with biases": (dict(qkv_bias=True), dict(embed=30, head_dim=12)),
    "with query and key norms": (dict(qk_norm=True), dict(embed=30, heads=3)),
    "with scaled frequencies": (dict(rope_scaling=small.SCALING), dict(embed=30, head_dim=12)),
    "tied": (dict(tied=True, input_mult=3.0), dict(embed=30)),
    "multipliers": (dict(input_mult=3.0, output_mult=0.5), dict(embed=30)),
}


@pytest.mark.parametrize("multipliers", [True, False], ids=["multipliers too", "multipliers kept"])
@pytest.mark.parametrize(("fields", "changes"), FOLDED.values(), ids=FOLDED)
def test_kept_widths_and_multipliers_fold_into_an_ordinary_model(fields, changes, multipliers, x64):
    """By a decoder that is not ours, and knows no kept widths."""
    old = small.config(compute_dtype="float64", param_dtype="float64", **fields)
    old, params, new, grown = grow_pair((old, old.replace(**changes, kv_heads=changes.get("heads"))), Growth("zero"))
    folded, cfg = fold(grown, new, multipliers)
    assert (cfg.norm_width, cfg.head_width) == (None, None)
    if multipliers:
        assert (cfg.input_mult, cfg.logits_mult) == (1, 1)
    tokens = small.tokens((1, 9))
    expected = logits(old, params, tokens=tokens)[0]
    assert relative(expected, reference.forward(cfg, folded, tokens[0])) < 1e-12
    # What it holds in place of the widths is needed, every bit of it.
    assert relative(expected, reference.forward(cfg.replace(norm_eps=new.norm_eps), folded, tokens[0])) > 1e-5


def test_the_widths_of_heads_behind_norms_fold_too(x64):
    """They grow by masks, which are gone at the end of the ramp: the model after it is what is folded."""
    wide = dict(compute_dtype="float64", param_dtype="float64", qk_norm=True, rope_scaling=small.SCALING)
    growth = Growth("zero", methods={"head_dim": "mask"})
    _, _, new, grown = grow_pair((small.config(**wide), small.config(embed=30, head_dim=12, **wide)), growth)
    assert (new.norm_width, new.head_width) == (24, 8)
    tokens = small.tokens((1, 9))
    folded, cfg = fold(grown, new)
    assert relative(logits(new, grown, tokens=tokens)[0], reference.forward(cfg, folded, tokens[0])) < 1e-12


def test_a_stale_multiplier_fails():
    growth = Growth(method="zero")
    old, params, new, grown = grow_pair((small.config(), small.config(embed=30)), growth)
    assert relative(logits(old, params), logits(new, {**grown, "head": grown["head"] * 24 / 30})) > 0.1


def test_a_layer_silenced_by_its_norms_scale_is_dead_for_ever():
    """Under SwiGLU a scale of 0 stops every gradient of the MLP, its own included."""
    cfg = small.config()
    params = small.params(cfg)
    blocks = params["blocks"]
    blocks["mlp_norm"]["scale"] = blocks["mlp_norm"]["scale"].at[1].set(0)
    grads = gradient(cfg, params, None, small.tokens())["blocks"]
    for leaf in (*grads["mlp"].values(), grads["mlp_norm"]["scale"]):
        assert float(jnp.abs(leaf[1]).max()) == 0
        assert float(jnp.abs(leaf[0]).max()) > 0


def test_plain_duplication_is_not_exact_at_a_ratio_that_is_no_whole_number():
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


def test_tiled_key_heads_under_unchanged_queries_fail():
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


@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_shapes_dtypes_and_bytes(method):
    growth = plan_with(method)
    old, params, new, grown = grow_pair(pair_for(method), growth)
    shapes, _ = model.declared(new)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), grown) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    again = jax.jit(lambda p, k: grow(p, old, new, growth, k))(params, KEY)
    jax.tree.map(np.testing.assert_array_equal, grown, again)
    other = jax.jit(lambda p, k: grow(p, old, new, growth, k))(params, jax.random.key(8))
    # head_dim grows by zero, which draws queries, whatever else is copied.
    assert not np.array_equal(other["blocks"]["attention"]["query"], grown["blocks"]["attention"]["query"])


def test_masks_at_one_are_the_ordinary_program_and_between_the_difference_grows():
    growth = Growth(method="mask", ramp_steps=100)
    old, params, new, grown = grow_pair(GROWN, growth)
    assert set(mask_flags(old, new, growth)) == {"embed", "heads", "head_dim", "mlp", "layers"}
    at = [logits(new, grown, masks_at(old, new, growth, step)) for step in (0, 1, 10, 50, 100)]
    assert relative(at[-1], logits(new, grown)) < 1e-5
    distances = [relative(at[0], x) for x in at]
    assert 1e-5 < distances[1] < distances[2] < min(distances[3:])


def test_ramps():
    at = [growth_masks.Ramp(10, 3).at(step) for step in (0, 3, 4, 8, 13, 15)]
    np.testing.assert_allclose(at, [0, 0, 0.1, 0.5, 1, 1], atol=1e-6)
    at = [growth_masks.Ramp(4, shape="cosine").at(step) for step in range(6)]
    np.testing.assert_allclose(at, [0, 0.5 - 0.125**0.5, 0.5, 0.5 + 0.125**0.5, 1, 1], atol=1e-6)


def test_axes_ramp_on_their_own_and_the_longest_ends_the_masks():
    growth = Growth("mask", ramp_steps=4, ramps={"layers": growth_masks.Ramp(6, delay=4, shape="cosine")})
    old, new = GROWN
    assert lineage_of(old, new, growth).ramp_steps == 10
    masks = masks_at(old, new, growth, 4)
    assert float(masks.embed_D.min()) == 1
    assert float(masks.norm_width) == 30
    assert float(masks.layers_L.min()) == 0


def test_the_norm_width_may_ramp_to_the_new_width_and_starts_exact():
    growth = Growth("zero", norm="ramp", ramp_steps=5)
    old, params, new, grown = grow_pair(GROWN, growth)
    assert new.norm_width is None
    assert lineage_of(old, new, growth).ramp_steps == 5
    assert relative(logits(old, params), logits(new, grown, masks_at(old, new, growth, 0))) < 1e-5
    assert relative(logits(new, grown), logits(new, grown, masks_at(old, new, growth, 5))) < 1e-5
    assert relative(logits(old, params), logits(new, grown)) > 1e-3


@pytest.mark.parametrize("method", sorted({*CONTINUES, "zero", "mask", "identity"}))
def test_gradients_follow_the_dual_so_moments_carry_over(method, x64):
    growth = plan_with(method)
    pair = [c.replace(compute_dtype="float64", param_dtype="float64") for c in pair_for(method)]
    # Copied layers add nothing, and pass gradients on unchanged.
    old, params, new, grown = grow_pair(pair, growth)
    tokens = small.tokens((4, 20))
    before = gradient(old, params, None, tokens)
    after = gradient(new, grown, masks_at(old, new, growth, 0), tokens)
    expected = grow_moments(before, old, new, growth, power=1)
    maps, (_, signatures) = axis_maps(old, new, growth), model.declared(new)

    def check(path, sig, a, b):
        for dim, axis in enumerate(sig.axes):
            if axis in maps:
                rule = maps[axis].rules[sig.role(axis)]
                known = ~maps[axis].span.fresh | ((rule.fill == "copy") & np.all(rule.dual != 0))
                a, b = (np.asarray(x).take(np.flatnonzero(known), axis=dim) for x in (a, b))
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, signatures, expected, after)


SILENT = {"layers": "zero", "head_dim": "zero"}


def copied_dual(old, new):
    return axis_maps(old, new, Growth("copy", methods=SILENT))["embed"].rules[Role.READER].dual


def test_adam_moments_grow_by_the_dual_of_the_map():
    growth = Growth(method="zero")
    old, params, new, grown = grow_pair(GROWN, growth)
    tx = rescaled_adamw(OptimizerConfig(), old, model.declared(old)[1])
    state = tx.init(params)
    grads = gradient(old, params, None, small.tokens())
    _, state = tx.update(grads, state, params)
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    after = next(s for s in grow_optimizer(state, old, new, growth) if isinstance(s, optax.ScaleByAdamState))
    assert int(after.count) == 1
    fold = new.logits_mult / old.logits_mult
    np.testing.assert_allclose(after.mu["head"][:24], adam.mu["head"] * fold, rtol=1e-6)
    np.testing.assert_allclose(after.nu["head"][:24], adam.nu["head"] * fold**2, rtol=1e-6)
    assert float(jnp.abs(after.mu["head"][24:]).max()) == 0
    fresh = axis_maps(old, new, growth)["layers"].span.fresh
    assert float(jnp.abs(after.nu["blocks"]["mlp"]["up"][fresh]).max()) == 0
    assert jax.tree.map(jnp.shape, after.mu) == jax.tree.map(jnp.shape, grown)
    apart = grow_optimizer(state, old, new, Growth("copy", methods=SILENT, optimizer="asymmetric"))
    apart = next(s for s in apart if isinstance(s, optax.ScaleByAdamState))
    np.testing.assert_allclose(
        apart.mu["head"][:24], after.mu["head"][:24] * copied_dual(old, new)[:24, None], rtol=1e-5
    )
    assert float(jnp.abs(apart.mu["head"][24:]).max()) == 0
    assert int(apart.count) == 1
    anew = grow_optimizer(state, old, new, dataclasses.replace(growth, optimizer="fresh"))
    zeros = next(s for s in anew if isinstance(s, optax.ScaleByAdamState))
    assert int(zeros.count) == 0
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(zeros.nu)) == 0


@given(old=st.integers(1, 12), extra=st.integers(0, 30), where=st.sampled_from(STATIC))
def test_every_place_keeps_the_old_layers_in_order(old, extra, where):
    span = place(old, old + extra, where)
    assert span.new == old + extra
    np.testing.assert_array_equal(span.source[~span.fresh], np.arange(old))
    counts = np.bincount(span.source, minlength=old)
    if where == "interleave":
        assert (np.diff(span.source) >= 0).all()
        assert counts.max() - counts.min() <= 1
    elif where == "middle":
        copied = np.flatnonzero(counts > 1)
        assert extra == 0 or abs(copied.min() - (old - 1 - copied.max())) <= 1
    elif extra:
        assert span.fresh[-1]


@given(distances=st.lists(st.floats(0, 1), min_size=1, max_size=9), extra=st.integers(0, 20))
def test_copies_go_where_the_distance_is_smallest(distances, extra):
    copies = by_distance(distances, len(distances) + extra)
    span = place(len(distances), len(distances) + extra, copies)
    np.testing.assert_array_equal(np.bincount(span.source) - 1, copies)
    more = [d for d, n in zip(distances, copies, strict=True) if n > min(copies)]
    assert max(more, default=0) <= min([d for d, n in zip(distances, copies, strict=True) if n == min(copies)])


@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_what_numpy_says_and_0_for_a_silent_layer(metric):
    cfg = small.config(layers=3)
    params = small.params(cfg)
    blocks = params["blocks"]
    for part, name in (("attention", "out"), ("mlp", "down")):
        blocks[part][name] = blocks[part][name].at[1].set(0)
    found = layer_distances(cfg, params, small.tokens(), metric=metric)
    _, hidden = forward(cfg, params, small.tokens(), None, None)
    x, y = np.asarray(hidden[1], np.float64), np.asarray(hidden[2], np.float64)
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    expected = {
        "angular": np.arccos(cosine) / np.pi,
        "cosine": 1 - cosine,
        "relative_l2": np.linalg.norm(y - x, axis=-1) / np.linalg.norm(x, axis=-1),
    }
    assert found[2] == pytest.approx(expected[metric].mean(), rel=1e-4)
    assert found[1] < 1e-3 < found[0]
    assert Growth(depth="distance").settled(found, 4).depth == (0, 1, 0)


@pytest.mark.parametrize("method", ["zero", "mask", "copy", "net2net"])
@pytest.mark.parametrize(
    "new", [dict(heads=8, kv_heads=4), dict(heads=10, kv_heads=5), dict(heads=9, kv_heads=9)], ids=str
)
def test_key_heads_are_divided_among_their_queries_before_any_are_added(method, new):
    growth = Growth(method)
    before = small.config(heads=8, kv_heads=2, head_dim=4)
    old, params, new, grown = grow_pair((before, before.replace(**new)), growth)
    assert relative(logits(old, params), logits(new, grown, masks_at(old, new, growth, 0))) < 1e-5
    keys = [np.asarray(p["blocks"]["attention"]["key"]) for p in (params, grown)]
    parts = 4 // (new.heads // new.kv_heads)
    np.testing.assert_array_equal(keys[1][:, :, : 2 * parts], keys[0].repeat(parts, axis=2))


def test_query_heads_stay_with_their_key_heads():
    kv, group = append("kv_heads", 2, 3), append("group", 2, 3)
    span = nested("heads", kv, group)
    np.testing.assert_array_equal(np.flatnonzero(~span.fresh), [0, 1, 3, 4])
    np.testing.assert_array_equal(span.source[[0, 1, 3, 4]], [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({}, dict(embed=22), "Axis 'embed' would shrink from 24 to 22"),
        ({}, dict(layers=1), "Axis 'layers' would shrink from 2 to 1"),
        (dict(heads=4), dict(heads=2), "Axis 'heads' would shrink from 4 to 2"),
        (
            dict(heads=6, kv_heads=2),
            dict(heads=8, kv_heads=4),
            "2 queries per key head where there were 3.*heads=12.*number per key head that divides 3",
        ),
        ({}, dict(vocab=50), "Axis 'vocab' would shrink from 61 to 50"),
        ({}, dict(head_dim=6, heads=4), "Axis 'head_dim' would shrink from 8 to 6"),
        ({}, dict(rope_theta=1e6), "rope_theta changes from"),
        (dict(tied=True), dict(tied=True, embed=30), "Tied embeddings.*set output_mult=1.25"),
    ],
)
def test_what_cannot_grow_is_refused_with_what_would_be_right(old, new, message):
    before = small.config(**old)
    with pytest.raises(ValueError, match=message):
        grown_config(before, small.config(**{**old, **new}), Growth())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(method="zeros"), "Unknown growth operator 'zeros'; the registry has"),
        (dict(methods={"width": "zero"}), "names axis 'width'; the axes that grow are embed"),
        (dict(optimizer="drop"), "use one of carry, exact, fresh, asymmetric"),
        (dict(methods=["layers"]), "must map axes to str"),
        (dict(ramps={"layers": 10}), "must map axes to Ramp"),
        (dict(depth=5), "must name a place"),
        (dict(distance="l1"), "use one of angular, cosine, relative_l2"),
        (dict(rewarm_steps=3), "belong to 'asymmetric', not 'carry'"),
        (dict(ramp_shape="square"), "use one of linear, cosine"),
        (dict(ramps={"width": growth_masks.Ramp(3)}), "names axis 'width'"),
    ],
)
def test_an_impossible_plan_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Growth(**fields)


@pytest.mark.parametrize(
    ("new", "growth", "message"),
    [
        (dict(mlp=60), Growth(method=None), r"Axis 'mlp' grows, but Growth gives it no method"),
        (dict(mlp=60), Growth("hypercloning"), "'mlp' by whole multiples, not from 40 to 60; take 'copy'"),
        (dict(head_dim=12), Growth("copy"), "'copy' does not grow axis 'head_dim'.*these do: .*mask.*zero"),
        (
            dict(heads=4),
            Growth(methods={"heads": "copy"}),
            "by 'copy' and the key heads .* by 'zero'.*Grow both by one",
        ),
        (dict(heads=4), Growth("zero", methods={"kv_heads": "copy"}), "Grow both by one"),
        (dict(heads=4), Growth("copy", methods={"kv_heads": "net2net"}), "Grow both by one"),
        (dict(layers=4), Growth(depth="distance"), "measure them"),
        (dict(layers=4), Growth(depth=(1, 2)), r"a number of copies for each of 2 layers, 2 in all"),
        (dict(layers=4), Growth(depth="sideways"), "new layers go to one of interleave"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(new, growth, message):
    with pytest.raises(ValueError, match=message):
        axis_maps(small.config(), small.config(**new), growth)


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        (Growth("mask"), "masks embed, .*give the ramp at least one step"),
        (Growth("zero", ramp_steps=3), "growing by zero masks nothing"),
        (plan_with("copy", ramps={"mlp": growth_masks.Ramp(3)}), "growing it by copy masks nothing"),
    ],
)
def test_a_ramp_without_masks_and_masks_without_a_ramp_are_refused(growth, message):
    with pytest.raises(ValueError, match=message):
        _ = Lineage(GROWN[0]).grown(GROWN[1], growth).ramp_steps


def test_a_norm_width_that_the_method_does_not_keep_is_refused():
    with pytest.raises(ValueError, match=r"divide by 30, but growing by zero .* exact at 24: .*grown_config"):
        masks_at(small.config(), small.config(embed=30), Growth("zero"), 0)


def test_parameters_of_another_shape_are_refused_by_path():
    old, new = small.config(), small.config(mlp=60)
    params = small.params(small.config(mlp=44))
    with pytest.raises(ValueError, match=r"\['mlp'\]\['down'\] has shape \(2, 44, 24\).*\(2, 40, 24\)"):
        grow(params, old, new, Growth(), KEY)


def test_verification_names_the_first_layer_that_differs():
    growth = Growth(method="zero")
    old, params, new, grown = grow_pair(GROWN, growth)
    down = grown["blocks"]["mlp"]["down"].at[1].add(0.1)
    broken = {**grown, "blocks": {**grown["blocks"], "mlp": {**grown["blocks"]["mlp"], "down": down}}}
    found = compare(old, params, new, broken, growth, small.tokens())
    with pytest.raises(
        RuntimeError, match="logits differ by .* relative, more than the tolerance of 1e-05; layer 1 of the grown"
    ):
        found.check(1e-5)
    headless = compare(old, params, new, {**grown, "head": grown["head"] * 2}, growth, small.tokens())
    assert "final norm, the head or the logit multiplier" in headless.first_difference(1e-5)


def test_a_new_token_by_mean_has_the_mean_logit_of_the_old_ones():
    old, params, new, grown = grow_pair((small.config(), small.config(vocab=70)), Growth("mean"))
    after = logits(new, grown)
    np.testing.assert_allclose(after[..., 61:], after[..., :61].mean(-1, keepdims=True).repeat(9, -1), atol=1e-5)
    np.testing.assert_allclose(
        grown["embedding"][61:], np.asarray(params["embedding"]).mean(0)[None].repeat(9, 0), atol=1e-6
    )


def test_aki_takes_fresh_entries_from_the_layer_above():
    growth = Growth(methods={"mlp": "aki"})
    old, params, new, grown = grow_pair((small.config(layers=3), small.config(layers=3, mlp=60)), growth)
    span = axis_maps(old, new, growth)["mlp"].span
    before, after = (np.asarray(p["blocks"]["mlp"]["gate"]) for p in (params, grown))
    np.testing.assert_array_equal(after[:, :, :40], before)
    np.testing.assert_array_equal(after[:-1, :, 40:], before[1:][:, :, span.source[40:]])


def test_dead_slices_are_found_and_named():
    growth = Growth("zero")
    old, params, new, grown = grow_pair((small.config(), small.config(mlp=60, layers=3)), growth)
    tokens = small.tokens((4, 32))
    assert dead_slices(grown, lineage_of(old, new, growth), tokens) == []
    mlp = grown["blocks"]["mlp"]
    dead = {**mlp, "gate": mlp["gate"].at[..., 40:].set(0), "up": mlp["up"].at[..., 40:].set(0)}
    found = dead_slices({**grown, "blocks": {**grown["blocks"], "mlp": dead}}, lineage_of(old, new, growth), tokens)
    assert "blocks/mlp/down: 20 of 20 new slices on mlp" in found
    assert len(found) == 3


def test_copies_apart_sees_one_copy_that_is_not_like_the_others():
    growth = Growth("uneven", methods={"layers": "zero"})
    old, params, new, grown = grow_pair((small.config(), small.config(embed=30, mlp=50)), growth)
    assert copies_apart(grown, lineage_of(old, new, growth)) < 1e-6
    moved = {**grown, "head": grown["head"].at[25].add(0.01)}
    assert copies_apart(moved, lineage_of(old, new, growth)) > 1e-3
    assert copies_apart(grown, lineage_of(old, new, Growth("zero"))) is None


def test_an_operator_may_be_limited_to_some_axes():
    limited = register("inner only", preserving=True, source="this test", kinds=frozenset({Kind.INNER}))
    try:
        limited(REGISTRY["zero"].map)
        plan = Growth(method="inner only")
        old = small.config()
        assert set(axis_maps(old, small.config(mlp=50), plan)) == {"mlp"}
        with pytest.raises(ValueError, match="'inner only' does not grow axis 'embed'"):
            axis_maps(old, small.config(embed=30), plan)
    finally:
        del REGISTRY["inner only"]


def test_verification_does_not_need_the_kernel_of_the_run():
    growth = Growth(method="zero")
    old, target = (c.replace(attention="cudnn") for c in GROWN)
    new, params = grown_config(old, target, growth), small.params(GROWN[0])
    grown = jax.jit(lambda p: grow(p, old, new, growth, KEY))(params)
    assert compare(old, params, new, grown, growth, small.tokens()).max_rel_logit_diff < 1e-5


@pytest.mark.parametrize("method", ["zero", "mask", "copy"])
def test_growing_on_a_mesh_gathers_no_matrix(method):
    """Each device exchanges the entries that move; at most a norm's scale is ever whole on one."""
    old = small.config(embed=256, layers=4, heads=8, head_dim=8, mlp=512, vocab=512)
    plan = plan_with(method)
    new = grown_config(old, old.replace(embed=320, layers=5, heads=16, kv_heads=16, mlp=704), plan)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    (shapes, signatures), (grown_shapes, grown_signatures) = model.declared(old), model.declared(new)
    params = abstract(shapes, param_shardings(signatures, shapes, mesh))
    target = param_shardings(grown_signatures, grown_shapes, mesh)
    with jax.set_mesh(mesh):
        growing = jax.jit(lambda p: grow(p, old, new, plan, KEY), out_shardings=target)
        text = growing.lower(params).compile().as_text()
    gathered = re.findall(r"\w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    assert max((np.prod([int(n) for n in dims.split(",") if n]) for dims in gathered), default=0) <= new.embed, gathered
    assert "collective-permute" in text
