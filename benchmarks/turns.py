"""Timing in turns: several callables one after the other, round by round.

So other load disturbs all of them alike. The main figure is a ratio of neighbours: both times come from the same
round, so what slows a whole round cancels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Quartiles(NamedTuple):
    """The first quartile, the median and the third quartile of some numbers, interpolated linearly."""

    low: float
    median: float
    high: float

    def text(self, form: str = ".2f", scale: float = 1.0) -> str:
        """The median with the quartiles in parentheses, each times `scale`: "1.02 (0.99 to 1.05)"."""
        low, median, high = (format(value * scale, form) for value in self)
        return f"{median} ({low} to {high})"


def quartiles(values: Sequence[float]) -> Quartiles:
    """The quartiles of some numbers.

    Raises:
      ValueError: there are no numbers.
    """
    if not len(values):
        raise ValueError("There are no rounds to take quartiles of; at least one round must be timed.")
    return Quartiles(*(float(value) for value in np.percentile(values, (25, 50, 75))))


class Timings(NamedTuple):
    """Seconds of each callable, in the order of the rounds."""

    seconds: Mapping[str, Sequence[float]]

    def of(self, name: str) -> Quartiles:
        """Quartiles of the seconds of one callable."""
        return quartiles(self.seconds[name])

    def ratio(self, above: str, below: str) -> Quartiles:
        """Quartiles of the ratios of two callables' seconds, each ratio within one round."""
        return quartiles([a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True)])

    def rate(self, name: str, amount: float) -> Quartiles:
        """Quartiles of `amount` per second of one callable."""
        return quartiles([amount / seconds for seconds in self.seconds[name]])

    def record(self) -> dict[str, Any]:
        """The seconds of every round and their quartiles, JSON-able."""
        return {name: {"rounds": list(values), "quartiles": quartiles(values)} for name, values in self.seconds.items()}


def turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 1,
    rest: Mapping[str, float] | None = None,
    most_seconds: float = float("inf"),
    rotating: bool = False,
) -> Timings:
    """Times callables in turns.

    Args:
      calls: by name, in the order in which they run in a round. One that returns a float has timed itself, and that
        is its number of seconds; others are timed from call to return, so they must wait for what they start.
      rounds: number of timed rounds.
      warm_up: rounds before them that are not counted.
      rest: seconds to sleep after a callable, by name: for those whose threads wait actively for a while.
      most_seconds: no round starts later than this after the first one, except the first that is timed; so that a busy
        machine takes fewer rounds and not hours.

      rotating: whether each round begins with the next callable, for those that disturb their successor, or are
        disturbed by what a round begins with.

    Raises:
      ValueError: `rounds` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}.")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for number in range(-warm_up, rounds):
        if number > 0 and time.perf_counter() - begun > most_seconds:
            break
        first = number % len(calls) if rotating else 0
        for name, call in [*calls.items()][first:] + [*calls.items()][:first]:
            since = time.perf_counter()
            own = call()
            spent = time.perf_counter() - since
            if number >= 0:
                seconds[name].append(own if isinstance(own, float) else spent)
            if rest and name in rest:
                time.sleep(rest[name])
    return Timings(seconds)
