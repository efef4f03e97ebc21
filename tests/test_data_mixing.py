"""Which source a position reads: proportions, limits, and other weights from a position on; exact, and by position."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_jax.data.mixing import BITS, Order, SupplyError, corput, count_below
from tests.small import examples

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def counts(sources, k):
    return np.bincount(sources, minlength=k).tolist()


def test_the_sequence_fills_every_power_of_two_evenly():
    assert [int(x) for x in corput(np.arange(4)) >> np.uint64(BITS - 2)] == [0, 2, 1, 3]
    assert sorted((corput(np.arange(64, 128)) >> np.uint64(BITS - 6)).tolist()) == list(range(64))


@given(st.integers(0, 2000), st.integers(0, 2**BITS))
def test_how_many_numbers_lie_below_a_border_is_exact(n, border):
    assert count_below(n, border) == int((corput(np.arange(n)) < np.uint64(border)).sum())


@given(WEIGHTS, st.integers(1, 4000))
def test_proportions_are_those_of_the_weights_at_every_length(weights, n):
    order = Order(tuple(weights), (None,) * len(weights))
    sources, _ = order.span(0, n)
    assert counts(sources, len(weights)) == list(order.counts(n))
    for found, weight in zip(order.counts(n), weights, strict=True):
        assert abs(found - n * weight / sum(weights)) <= math.log2(n) / 3 + 1


@given(WEIGHTS, st.integers(0, 10**15))
def test_far_positions_cost_no_more_and_are_as_exact(weights, position):
    order = Order(tuple(weights), (None,) * len(weights))
    assert sum(order.counts(position)) == position
    sources, numbers = order.span(position, 32)
    for k, seen in enumerate(order.counts(position)):
        assert numbers[sources == k].tolist() == list(range(seen, seen + int((sources == k).sum())))


@examples(30)
@given(st.data(), WEIGHTS)
def test_no_window_is_lost_or_repeated_where_sources_run_out_or_weights_change(data, weights):
    k = len(weights)
    limits = data.draw(st.lists(st.one_of(st.none(), st.integers(1, 60)), min_size=k, max_size=k))
    order, position, seen = Order(tuple(weights), tuple(limits)), 0, [[] for _ in range(k)]
    for _ in range(data.draw(st.integers(1, 4))):
        many = data.draw(st.integers(1, 80))
        if order.end is not None and order.end < position + many:
            with pytest.raises(SupplyError, match=f"after {order.end:,} windows every source"):
                order.span(position, many)
            break
        sources, numbers = order.span(position, many)
        for source, number in zip(sources.tolist(), numbers.tolist(), strict=True):
            seen[source].append(number)
        position += many
        again = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=k, max_size=k))
        order = order.weighed(again, position)
        assert order.counts(position) == tuple(map(len, seen))
    for own, limit in zip(seen, limits, strict=True):
        assert own == list(range(len(own))) and (limit is None or len(own) <= limit)


def test_the_weight_of_a_source_that_runs_out_goes_to_the_others_in_proportion():
    order = Order((1.0, 2.0, 3.0), (None, None, 70))
    ((at, ended),) = order.run_out
    assert ended == (2,) and order.counts(at)[2] == 70 and order.counts(at - 1)[2] == 69
    assert order.shares(at - 1) == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    assert order.shares(at) == pytest.approx([1 / 3, 2 / 3, 0])
    after = np.subtract(order.counts(at + 3000), order.counts(at))
    assert after == pytest.approx([1000, 2000, 0], abs=5) and order.end is None


def test_everything_is_read_before_nothing_is_left():
    order = Order((1.0, 2.0, 3.0, 0.0), (100, 50, 70, 5))
    assert order.end == 220 and order.counts(220) == (100, 50, 70, 0)
    with pytest.raises(SupplyError, match="after 220 windows"):
        order.span(200, 21)


def test_the_same_weights_again_are_no_border():
    order = Order((1.0, 3.0), (None, None))
    assert order.weighed((1.0, 3.0), 17) is order and order.weighed((3.0, 1.0), 17).start == 17
