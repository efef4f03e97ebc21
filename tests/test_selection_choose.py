"""The choice in the order of scores: quotas, similarity, filling up; against a plain loop."""

import numpy as np
import pytest

from flm_jax.selection import choose, picture
from flm_jax.selection.choose import CHOSEN, NO_PLACE, SIMILAR, UNREADABLE, WAITING


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_ranking_keeps_the_order_of_the_pool_among_equals():
    assert choose.ranking(np.array([1, 3, 3, 2]), True).tolist() == [1, 2, 3, 0]
    assert choose.ranking(np.array([1, 3, 3, 1]), False).tolist() == [0, 3, 1, 2]
    many = np.arange(1000) % 2
    assert choose.ranking(many, False).tolist() == [*range(0, 1000, 2), *range(1, 1000, 2)]


def test_a_precut_takes_the_longest_of_each_group():
    kept = choose.precut(np.array([5, 9, 7, 1, 2]), np.array([0, 0, 0, 1, 1]), np.array([2, 1]))
    assert kept.tolist() == [False, True, True, False, True]


def test_places_of_a_precut_that_a_group_cannot_fill_go_to_the_longest_of_the_others():
    lengths, groups, room = np.array([5, 9, 7, 1, 2]), np.array([0, 0, 0, 1, 1]), np.array([1, 3])
    assert choose.precut(lengths, groups, room).tolist() == [False, True, False, True, True]
    assert choose.precut(lengths, groups, room, fill=True).tolist() == [False, True, True, True, True]


def test_places_are_taken_by_the_best_and_freed_ones_are_filled():
    order, groups = np.array([0, 1, 2, 3, 4]), np.array([0, 0, 0, 1, 0])
    found = choose.choose(order, groups, np.array([2, 2]), None, 0.9, fill=False)
    assert found.chosen.tolist() == [0, 1, 3]
    assert found.states.tolist() == [CHOSEN, CHOSEN, NO_PLACE, CHOSEN, NO_PLACE]
    filled = choose.choose(order, groups, np.array([2, 2]), None, 0.9, fill=True)
    assert filled.chosen.tolist() == [0, 1, 3, 2]
    assert filled.states.tolist() == [CHOSEN, CHOSEN, CHOSEN, CHOSEN, NO_PLACE]


def test_enough_is_enough():
    found = choose.choose(np.arange(4), np.zeros(4, np.int64), np.array([2]), None, 0.9, fill=True)
    assert found.states.tolist() == [CHOSEN, CHOSEN, WAITING, WAITING]


def test_what_is_like_a_chosen_one_or_cannot_be_read_falls_out():
    features = unit([[1, 0], [1, 0.1], [0, 1], [1, 1], [0.1, 1]])
    features[3] = np.nan
    found = choose.choose(np.arange(5), np.zeros(5, np.int64), np.array([5]), lambda _, n: features[n], 0.9, True)
    assert found.states.tolist() == [CHOSEN, SIMILAR, CHOSEN, UNREADABLE, SIMILAR]


def plain(order, groups, room, features, threshold):
    """The same without blocks."""
    room, chosen = room.copy(), []
    for number in order.tolist():
        if room[groups[number]] and not any(features[number] @ features[c] >= threshold for c in chosen):
            chosen.append(number)
            room[groups[number]] -= 1
    return chosen


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_choose_what_a_plain_loop_chooses(block, monkeypatch):
    monkeypatch.setattr(choose, "BLOCK", block)
    monkeypatch.setattr(choose, "COMPARED", 5)
    rng = np.random.default_rng(0)
    features = unit(rng.standard_normal((120, 4))).astype(np.float16).astype(np.float32)
    order, groups, room = rng.permutation(120), rng.integers(0, 3, 120), np.array([10, 8, 30])
    found = choose.choose(order, groups, room, lambda _, numbers: features[numbers], 0.85, fill=False)
    assert found.chosen.tolist() == plain(order, groups, room, features, 0.85)
    assert 10 < len(found.chosen) < 48  # neither quotas nor similarity decide alone


def test_a_projection_finds_the_two_widest_directions():
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((300, 2)) * [5, 2]
    directions = np.linalg.qr(rng.standard_normal((20, 2)))[0]
    points = (wide @ directions.T + 0.1 * rng.standard_normal((300, 20))).astype(np.float32)
    axes, shares = picture.projection(points)
    _, _, exact = np.linalg.svd(points - points.mean(axis=0)[None], full_matrices=False)
    assert np.abs(np.sum(axes * exact[:2].T, axis=0)) == pytest.approx([1, 1], abs=1e-3)
    assert shares[0] > shares[1] and shares.sum() > 0.98
    again = picture.projection(points)[0]
    assert (axes == again).all() and (np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], 0) > 0).all()
