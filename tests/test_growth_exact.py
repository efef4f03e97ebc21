"""Every preserving operator keeps the logits, on every axis and in every mixture: a battery over the registry."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_jax import model
from flm_jax.growth import (
    REGISTRY,
    Growth,
    axis_maps,
    compare,
    grow,
    grown_config,
    masks_at,
    register,
)
from flm_jax.growth.axis_map import append, nested
from flm_jax.sharding import MeshConfig, abstract, make_mesh, param_shardings
from flm_jax.signature import Kind
from tests import small
from tests.growing import (
    GROW,
    GROWN,
    KEY,
    PRESERVING,
    RELATIVE,
    STATIC,
    axes_of,
    grow_pair,
    logits,
    mixtures,
    pair_for,
    plan_with,
    relative,
    tied_mult,
)
from tests.small import examples

pytestmark = pytest.mark.usefixtures("cheap_draws")


@pytest.mark.battery
@pytest.mark.parametrize("method", PRESERVING)
@examples(4)
@given(data=st.data())
def test_exact_in_float64_on_any_axes_at_any_ratio(method, data):
    wide = dict(compute_dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        pair = data.draw(small.growths(axes_of(method), multiples=method == "hypercloning", **wide))
        growth = plan_with(method, depth=data.draw(st.sampled_from(STATIC)))
        old, params, new, grown = grow_pair(pair, growth)
        after = logits(new, grown, masks_at(old, new, growth, 0))
        assert relative(logits(old, params), after[..., : old.vocab]) < 1e-12


@examples(8)
@given(pair=small.growths(), growth=mixtures())
def test_exact_in_float32_with_any_mixture_of_methods(pair, growth):
    old, params, new, grown = grow_pair(pair, growth)
    found = compare(old, params, new, grown, growth, small.tokens())
    assert found.preserving
    assert found.max_rel_logit_diff < 1e-5
    assert max(found.layer_diffs) < 1e-5
    assert len(found.layer_diffs) == new.layers


@examples(6)
@given(data=st.data(), growth=mixtures(without=()))
def test_exact_in_float64_with_any_mixture_of_methods_noise_included(data, growth):
    with jax.enable_x64(True):
        pair = data.draw(small.growths(compute_dtype="float64", param_dtype="float64"))
        old, params, new, grown = grow_pair(pair, growth)
        found = compare(old, params, new, grown, growth, small.tokens())
        assert found.max_rel_logit_diff < 1e-12
        assert max(found.layer_diffs) < 1e-12


@examples(5)
@given(pair=small.growths(compute_dtype="bfloat16"))
def test_zero_is_bit_equal_in_bfloat16(pair):
    # The multipliers are kept: folding their change into parameters would round these once more.
    old, target = pair
    target = target.replace(output_mult=old.logits_mult * target.embed / target.base_width)
    target = target.replace(residual_mult=old.effective_residual_mult, base_layers=None)
    old, params, new, grown = grow_pair((old, target), Growth(method="zero"))
    np.testing.assert_array_equal(logits(old, params), logits(new, grown)[..., : old.vocab])


@examples(4)
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
    # What is compared has been rounded by two growths: 1.04e-5 was seen.
    assert relative(logits(mid, grown), logits(new, again, masks_at(mid, new, plan, 0))) < 2e-5


@pytest.mark.parametrize("order", [("embed", "mlp", "heads"), ("heads", "mlp", "embed")], ids=" ".join)
def test_growing_axes_one_by_one_equals_growing_them_together(order, x64):
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


@pytest.mark.battery
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("method", PRESERVING)
def test_exact_with_biases_head_norms_a_sliding_window_and_scaled_frequencies(method, tied, x64):
    """Biases, norms of queries and keys, a sliding window, scaled frequencies; every axis that the method grows."""
    fields = dict(compute_dtype="float64", param_dtype="float64", tied=tied, **RELATIVE)
    old, target = (cfg.replace(**fields) for cfg in pair_for(method))
    if method != "mask":
        target = target.replace(head_dim=old.head_dim)
    growth = plan_with(method)
    old, params, new, grown = grow_pair((old, target), growth)
    assert relative(logits(old, params), logits(new, grown, masks_at(old, new, growth, 0))) < 1e-12


@pytest.mark.battery
@pytest.mark.parametrize("method", ["zero", "mask", "identity"])
def test_content_behind_masks_or_silent_weights_changes_no_logit(method):
    """Where the mathematics says arbitrary, a loud constant changes nothing."""
    growth = plan_with(method)
    old, params, new, _ = grow_pair(GROWN, growth)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GROW, "draw", lambda sig, key, shape, std, dtype: jnp.full(shape, 42.0, dtype))
        loud = jax.jit(lambda p: grow(p, old, new, growth, KEY))(params)
    assert max(float(jnp.max(x)) for x in jax.tree.leaves(loud)) == 42
    assert relative(logits(old, params), logits(new, loud, masks_at(old, new, growth, 0))) < 1e-5


@pytest.mark.battery
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


@pytest.mark.battery
@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_grown_parameters_have_the_declared_shapes_and_depend_on_the_key_alone(method):
    growth = plan_with(method)
    old, params, new, grown = grow_pair(pair_for(method), growth)
    shapes, _ = model.declared(new)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), grown) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    again = jax.jit(lambda p, k: grow(p, old, new, growth, k))(params, KEY)
    jax.tree.map(np.testing.assert_array_equal, grown, again)
    other = jax.jit(lambda p, k: grow(p, old, new, growth, k))(params, jax.random.key(8))
    # head_dim grows by zero, which draws queries, whatever else is copied.
    assert not np.array_equal(other["blocks"]["attention"]["query"], grown["blocks"]["attention"]["query"])


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


@pytest.mark.battery
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
