"""Growth plans: targets that name only what changes, and every plan that is refused, with what would be right."""

import numpy as np
import pytest

from flm_jax.growth import (
    REGISTRY,
    Growth,
    axis_maps,
    grow,
    grown_config,
)
from flm_jax.growth import masks as growth_masks
from flm_jax.growth.lineage import Lineage
from flm_jax.growth.operators import ALIASES
from flm_jax.growth.plan import changed
from flm_jax.growth.rescaling import check_continues
from tests import small
from tests.growing import (
    KEY,
)


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
    with pytest.raises(ValueError, match="no field width; its fields are embed, layers"):
        changed(old, dict(width=30), Growth())
    with pytest.raises(ValueError, match="no field layer; its fields are .*; did you mean 'layers'"):
        changed(old, dict(layer=3), Growth())


def test_head_dim_under_query_and_key_norms_grows_by_masks_only():
    """Drawn queries would change the mean square that their norm divides by; masks hide them from it."""
    old = small.config(qk_norm=True)
    with pytest.raises(ValueError, match="head_dim grows by 'zero'.*grow head_dim by 'mask'"):
        axis_maps(old, old.replace(head_dim=12), Growth("zero"))
    with pytest.raises(ValueError, match="'copy' does not grow .*: bind Growth.methods = {'head_dim': 'mask'}"):
        axis_maps(old, old.replace(head_dim=12), Growth("copy"))


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
        (dict(method="zeros"), "Unknown growth operator .zeros.; the registry has.*did you mean .zero."),
        (dict(methods={"width": "zero"}), "Growth.methods.key. = 'width': use one of embed"),
        (dict(optimizer="drop"), "use one of carry, exact, fresh, asymmetric"),
        (dict(methods=["layers"]), "Growth.methods = .'layers'.: use a dict, each value a text"),
        (dict(ramps={"layers": 10}), r"Growth.ramps.'layers'. = 10: use a Ramp"),
        (dict(depth=5), "Growth.depth = 5: use one of .*, or a list"),
        (dict(depth="midle"), "did you mean 'middle'"),
        (dict(distance="l1"), "use one of angular, cosine, relative_l2"),
        (dict(rewarm_steps=3), "belong to 'asymmetric', not 'carry'"),
        (dict(ramp_shape="square"), "use one of linear, cosine"),
        (dict(ramps={"width": growth_masks.Ramp(3)}), "ramps.key. = 'width'"),
    ],
)
def test_a_plan_with_a_wrong_field_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Growth(**fields)


@pytest.mark.parametrize(
    ("new", "growth", "message"),
    [
        (dict(mlp=60), Growth(method=None), r"Axis 'mlp' grows, but Growth gives it no method"),
        (dict(mlp=60), Growth("hypercloning"), "'mlp' by whole multiples, not from 40 to 60; take 'copy'"),
        (
            dict(head_dim=12),
            Growth("copy"),
            "axis 'head_dim'; these do: .*mask, .*zero: bind Growth.methods = {'head_dim': 'zero'}",
        ),
        (
            dict(head_dim=12, embed=30),
            Growth("copy", methods={"embed": "zero"}),
            "bind Growth.methods = {'embed': 'zero', 'head_dim': 'zero'}",
        ),
        (
            dict(heads=4),
            Growth(methods={"heads": "copy"}),
            "by 'copy' and the key heads .* by 'zero'.*Grow both by one",
        ),
        (dict(heads=4), Growth("zero", methods={"kv_heads": "copy"}), "Grow both by one"),
        (dict(heads=4), Growth("copy", methods={"kv_heads": "net2net"}), "Grow both by one"),
        (dict(layers=4), Growth(depth="distance"), "measure them"),
        (dict(layers=4), Growth(depth=(1, 2)), r"a number of copies for each of 2 layers, 2 in all"),
    ],
)
def test_a_plan_that_does_not_fit_the_two_models_is_refused(new, growth, message):
    with pytest.raises(ValueError, match=message):
        axis_maps(small.config(), small.config(**new), growth)


def test_parameters_of_another_shape_are_refused_by_path():
    old, new = small.config(), small.config(mlp=60)
    params = small.params(small.config(mlp=44))
    with pytest.raises(ValueError, match=r"\['mlp'\]\['down'\] has shape \(2, 44, 24\).*\(2, 40, 24\)"):
        grow(params, old, new, Growth(), KEY)


def test_an_alias_is_its_operator_and_stands_in_no_table():
    """Plans may say `fpi`; what is tested and measured over the registry is done once, under `net2net`."""
    assert not set(ALIASES) & set(REGISTRY)
    old, new = small.config(), small.config(embed=30, mlp=50)
    for alias, name in ALIASES.items():
        found, expected = (axis_maps(old, new, Growth(method)) for method in (alias, name))
        for axis in expected:
            np.testing.assert_array_equal(found[axis].span.source, expected[axis].span.source)
        lineage = Lineage(old).grown(new, Growth(alias, optimizer="exact"))
        assert lineage.preserving == REGISTRY[name].preserving
        check_continues(lineage)
    with pytest.raises(ValueError, match="'fpy'; the registry has .*fpi.*net2net"):
        Growth("fpy")
