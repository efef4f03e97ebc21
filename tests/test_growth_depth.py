"""Where new layers go: places, copies by distance, and the distances themselves."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_jax.growth import (
    Growth,
)
from flm_jax.growth.depth import METRICS, by_distance, place
from flm_jax.growth.distance import layer_distances
from flm_jax.growth.verify import forward
from tests import small
from tests.growing import (
    STATIC,
    grow_pair,
)


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


def test_middle_is_the_depth_up_scaling_of_solar():
    """Two copies of 32 layers, the top 8 of the first and the bottom 8 of the second left out (2312.15166)."""
    span = place(32, 48, "middle")
    np.testing.assert_array_equal(span.source, [*range(24), *range(8, 32)])
    growth = Growth(methods={"layers": "stack"}, depth="middle")
    old, params, _, grown = grow_pair((small.config(layers=4), small.config(layers=6)), growth)
    for before, after in zip(jax.tree.leaves(params["blocks"]), jax.tree.leaves(grown["blocks"]), strict=True):
        np.testing.assert_array_equal(after, np.concatenate([before[:3], before[1:]]))


def test_interleaved_identities_are_the_expansion_of_llama_pro():
    """One silent block after each group of layers (2401.02415, which copies what it silences: `zero`)."""
    span = place(32, 40, "interleave")
    np.testing.assert_array_equal(np.flatnonzero(span.fresh), np.arange(4, 40, 5))
    np.testing.assert_array_equal(span.source[span.fresh], np.arange(3, 32, 4))


@given(distances=st.lists(st.floats(0, 1), min_size=1, max_size=9), extra=st.integers(0, 20))
def test_copies_go_where_the_distance_is_smallest(distances, extra):
    copies = by_distance(distances, len(distances) + extra)
    span = place(len(distances), len(distances) + extra, copies)
    np.testing.assert_array_equal(np.bincount(span.source) - 1, copies)
    more = [d for d, n in zip(distances, copies, strict=True) if n > min(copies)]
    assert max(more, default=0) <= min([d for d, n in zip(distances, copies, strict=True) if n == min(copies)])


@pytest.mark.parametrize("metric", METRICS)
def test_layer_distances_equal_numpy_and_are_0_for_a_silent_layer(metric):
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
