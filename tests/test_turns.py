"""Timing in turns: the order of calls, what is counted, and the statistics."""

import time

import pytest

from benchmarks.turns import Timings, quartiles, turns


def test_the_quartiles_are_those_of_the_numbers():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one round"):
        quartiles([])


def test_a_ratio_is_one_of_neighbours_and_not_of_medians():
    # Each round is slower than the one before it; within a round, b takes twice as long.
    timings = Timings({"a": [1.0, 10.0, 100.0], "b": [2.0, 20.0, 200.0]})
    assert timings.ratio("b", "a") == (2.0, 2.0, 2.0)
    # The medians are equal, and the median of the ratios is not 1.
    timings = Timings({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 1.0]})
    assert timings.of("a").median == timings.of("b").median == 2.0
    assert timings.ratio("b", "a").median == 1.5


def test_a_rate_is_amount_per_second():
    assert Timings({"a": [0.5, 0.25, 1.0]}).rate("a", 10).median == 20.0


def test_rounds_may_begin_with_another_callable_each():
    said = []
    turns({name: lambda name=name: said.append(name) for name in "abc"}, rounds=4, warm_up=0, rotating=True)
    assert "".join(said) == "abcbcacababc"


def test_callables_take_turns_and_rounds_of_warm_up_do_not_count():
    said = []
    timings = turns({name: lambda name=name: said.append(name) for name in "ab"}, rounds=3, warm_up=2)
    assert "".join(said) == "ab" * 5
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 3, "b": 3}
    with pytest.raises(ValueError, match="not 0"):
        turns({}, rounds=0)


def test_a_float_is_the_callables_own_time_and_a_rest_is_not_counted():
    timings = turns({"own": lambda: 42.0, "timed": lambda: time.sleep(0.01)}, rounds=2, rest={"timed": 0.1})
    assert timings.seconds["own"] == [42.0, 42.0]
    assert all(0.01 <= seconds < 0.1 for seconds in timings.seconds["timed"])


def test_quartiles_are_written_with_the_median_first():
    assert quartiles([1.0, 2.0, 3.0]).text() == "2.00 (1.50 to 2.50)"
    assert quartiles([1.0, 2.0, 3.0]).text(".0f", 1000) == "2000 (1500 to 2500)"


def test_no_round_starts_when_the_time_is_over_but_one_is_timed():
    timings = turns({"a": lambda: time.sleep(0.02)}, rounds=1000, most_seconds=0.1)
    assert 1 <= len(timings.seconds["a"]) < 10
    assert len(turns({"a": lambda: None}, rounds=5, most_seconds=0).seconds["a"]) == 1
