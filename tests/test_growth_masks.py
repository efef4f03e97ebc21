"""Masks: their ramps, what they hide at step 0, and that nothing is left of them at the end."""

import numpy as np
import pytest

from flm_jax.growth import Growth, masks_at
from flm_jax.growth import masks as growth_masks
from flm_jax.growth.lineage import Lineage, lineage_of
from tests import small
from tests.growing import (
    GROWN,
    grow_pair,
    logits,
    plan_with,
    relative,
)

pytestmark = pytest.mark.usefixtures("cheap_draws")


def test_masks_change_nothing_at_the_end_of_the_ramp_and_ever_more_before_it():
    growth = Growth(method="mask", ramp_steps=100)
    old, params, new, grown = grow_pair(GROWN, growth)
    assert set(lineage_of(old, new, growth).mask_flags) == {"embed", "heads", "head_dim", "mlp", "layers"}
    at = [logits(new, grown, masks_at(old, new, growth, step)) for step in (0, 1, 10, 50, 100)]
    assert relative(at[-1], logits(new, grown)) < 1e-5
    distances = [relative(at[0], x) for x in at]
    assert 1e-5 < distances[1] < distances[2] < min(distances[3:])


def test_a_ramp_is_linear_or_cosine_after_its_delay():
    at = [growth_masks.Ramp(10, 3).at(step) for step in (0, 3, 4, 8, 13, 15)]
    np.testing.assert_allclose(at, [0, 0, 0.1, 0.5, 1, 1], atol=1e-6)
    at = [growth_masks.Ramp(4, shape="cosine").at(step) for step in range(6)]
    np.testing.assert_allclose(at, [0, 0.5 - 0.125**0.5, 0.5, 0.5 + 0.125**0.5, 1, 1], atol=1e-6)


def test_axes_have_ramps_of_their_own_and_the_longest_ends_the_masks():
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
