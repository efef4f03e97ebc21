"""What is said of a growth: the first layer that differs, slices that would never learn, copies that have parted."""

import jax
import pytest

from flm_jax.growth import (
    Growth,
    compare,
    grow,
    grown_config,
)
from flm_jax.growth.diagnostics import copies_apart, dead_slices
from flm_jax.growth.lineage import lineage_of
from tests import small
from tests.growing import (
    GROWN,
    KEY,
    grow_pair,
)

pytestmark = pytest.mark.usefixtures("cheap_draws")


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


def test_verification_does_not_need_the_kernel_of_the_run():
    growth = Growth(method="zero")
    old, target = (c.replace(attention="cudnn") for c in GROWN)
    new, params = grown_config(old, target, growth), small.params(GROWN[0])
    grown = jax.jit(lambda p: grow(p, old, new, growth, KEY))(params)
    assert compare(old, params, new, grown, growth, small.tokens()).max_rel_logit_diff < 1e-5


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
