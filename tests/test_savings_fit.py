"""Savings that were planted are found, and none where there are none."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest

from flm_jax.savings.fit import Point, fit_frontier, flops_at, frontier_ratio, pooled_noise, same_size_ratio

SIZES, BUDGETS = (1e5, 2e5, 4e5, 8e5), (5e5, 1e6, 2e6, 4e6, 8e6)


def law(params, tokens):
    """A loss that falls with size and tokens."""
    return 1.2 + 40 * params**-0.34 + 60 * tokens**-0.28


def runs(noise=0.0, seed=0):
    """Scratch runs of every size and budget, at 6 FLOPs per parameter and token."""
    rng = np.random.default_rng(seed)
    return [
        Point(n, d, 6 * n * d, law(n, d) + noise * rng.standard_normal()) for n, d in itertools.product(SIZES, BUDGETS)
    ]


def of(size, points):
    return [point for point in points if point.params == size]


def test_flops_are_interpolated_between_budgets_and_never_beyond():
    points = of(4e5, runs())
    for point in points:
        assert flops_at(points, point.loss) == pytest.approx(point.flops)
    between = law(4e5, 1.4e6)
    assert flops_at(points, between) == pytest.approx(6 * 4e5 * 1.4e6, rel=0.005)
    assert flops_at(points, points[-1].loss - 1e-6) is None
    assert flops_at(points, points[0].loss + 1e-6) is None
    # A budget that reached less than a smaller one is not used.
    worse = [*points, dataclasses.replace(points[-1], flops=2 * points[-1].flops, loss=points[-1].loss + 0.1)]
    assert flops_at(worse, between) == flops_at(points, between)


@pytest.mark.parametrize("saving", [1.0, 1.6, 0.8])
def test_a_planted_saving_is_found(saving):
    """A run that reaches the loss of a scratch run with `saving` times its FLOPs."""
    points, noise = runs(), 0.004
    own = of(4e5, points)
    loss, flops = law(4e5, 3e6), 6 * 4e5 * 3e6 / saving
    ratio = same_size_ratio(own, loss, flops, noise, 3)
    assert ratio is not None
    assert ratio.value == pytest.approx(saving, rel=0.01)
    assert ratio.low < ratio.value < ratio.high
    assert (ratio.low <= 1 <= ratio.high) == (saving == 1)
    # Less noise and more seeds give a narrower interval.
    sure = same_size_ratio(own, loss, flops, noise / 4, 3)
    assert sure is not None
    assert sure.high - sure.low < 0.5 * (ratio.high - ratio.low)
    assert same_size_ratio(own, 1.0, flops, noise) is None


def test_an_interval_has_no_end_where_the_data_has_none():
    own, noise = of(4e5, runs()), 0.004
    dear, cheap = own[-1], own[0]
    above = same_size_ratio(own, dear.loss + 0.001, dear.flops / 1.5, noise)
    assert above is not None
    assert above.low < above.value == pytest.approx(1.5, rel=0.02)
    assert math.isinf(above.high)
    assert re.fullmatch(r"1\.4\d \(1\.\d\d or more\)", str(above))
    below = same_size_ratio(own, cheap.loss - 0.001, cheap.flops / 1.5, noise)
    assert below is not None
    assert below.low == 0
    assert re.fullmatch(r"1\.5\d \(1\.\d\d or less\)", str(below))
    # With so much noise nothing is known.
    unknown = same_size_ratio(own, (own[0].loss + own[1].loss) / 2, own[0].flops, 10.0)
    assert unknown is not None
    assert (unknown.low, unknown.high) == (0, math.inf)
    assert re.fullmatch(r"1\.\d\d \(no interval\)", str(unknown))


@pytest.mark.parametrize("saving", [1.0, 1.5])
def test_a_frontier_ratio_is_against_the_best_size(saving):
    points = runs(0.002)
    frontier = fit_frontier(points)
    assert max(map(abs, frontier.residuals)) < 0.006
    flops = 6 * 4e5 * 2e6
    sizes = np.geomspace(SIZES[0], SIZES[-1], 2000)
    best = min(law(n, flops / 6 / n) for n in sizes)
    assert frontier.best(flops)[0] == pytest.approx(best, abs=0.004)
    ratio = frontier_ratio(points, best, flops / saving, 0.002, 3)
    assert ratio is not None
    assert ratio.value == pytest.approx(saving, rel=0.06)
    assert (ratio.low <= 1 <= ratio.high) == (saving == 1)
    assert frontier_ratio(points, 1.0, flops, 0.002) is None


def test_a_frontier_needs_three_sizes_with_three_budgets():
    with pytest.raises(ValueError, match="three sizes with three budgets each; there are 2 sizes with 5, 5"):
        fit_frontier([point for point in runs() if point.params < 3e5])


def test_noise_is_pooled_over_groups():
    assert pooled_noise([[1.0, 1.2], [2.0]]) == pytest.approx(0.2 / math.sqrt(2))
    assert pooled_noise([[1.0], []]) is None
