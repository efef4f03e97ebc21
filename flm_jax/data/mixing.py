"""Which source of a mixture each position reads: a pure function of weights and position, computed, not stored.

Position j reads the source in whose interval of [0, 1) the j-th number of van der Corput's sequence lies: the bits of j
in reverse order, behind the binary point. Intervals are as long as the shares of the sources. Of the first n numbers
n x lie below any x, up to log2(n) / 3 + 1 (Bejian and Faure 1977): proportions are exact over long runs, and every
aligned batch of 2^k windows is a stratified draw. How many lie below x is a sum of at most 62 terms, so that any
position can be computed alone. The rule of the largest deficit deviates by less, but has to go through all positions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

# Positions and ends of intervals are multiples of 1 / 2^62.
BITS = 62
_SWAPS = (
    (1, 0x5555555555555555),
    (2, 0x3333333333333333),
    (4, 0x0F0F0F0F0F0F0F0F),
    (8, 0x00FF00FF00FF00FF),
    (16, 0x0000FFFF0000FFFF),
    (32, 0x00000000FFFFFFFF),
)


def corput(numbers: np.ndarray) -> np.ndarray:
    """The given numbers of van der Corput's sequence, times 2^62: uint64, in the shape of `numbers`.

    Args:
      numbers: integers in [0, 2^62).
    """
    x = np.asarray(numbers).astype(np.uint64)
    for width, mask in _SWAPS:
        low, by = np.uint64(mask), np.uint64(width)
        x = ((x >> by) & low) | ((x & low) << by)
    return x >> np.uint64(64 - BITS)


def count_below(n: int, border: int) -> int:
    """How many of the first `n` numbers of the sequence lie below `border` / 2^62, exactly.

    The numbers from a to a + 2^b, where 2^b divides a, are those of the first 2^b, which are all multiples of 2^-b,
    moved by the a-th: one term for each bit of n.
    """
    total, moved = 0, 0
    for b in reversed(range(n.bit_length())):
        if n >> b & 1:
            total += min(max(-((moved - border) >> (BITS - b)), 0), 1 << b)
            moved += 1 << (BITS - 1 - b)
    return total


class SupplyError(ValueError):
    """Every source that has a weight has been read as often as it may."""


@dataclass(frozen=True)
class Phase:
    """Positions that are read in the same proportions.

    Attributes:
      start: the first of them.
      drawn: windows of each source that were read before.
      borders: where the interval of each source begins, times 2^62, and 2^62.
    """

    start: int
    drawn: tuple[int, ...]
    borders: tuple[int, ...]

    def count(self, source: int, position: int) -> int:
        """Windows of one source that are read before a position."""
        n, (low, high) = position - self.start, self.borders[source : source + 2]
        return self.drawn[source] + count_below(n, high) - count_below(n, low)

    def reaches(self, source: int, limit: int) -> int | None:
        """The first position before which a source has been read `limit` times; None: it is not read."""
        if not _width(self, source):
            return None
        # Counts differ from their share by less than 24, at any of 2^62 positions.
        width, left = _width(self, source), limit - self.drawn[source]
        low = self.start + max((left - 24) * 2**BITS // width, 0)
        high = self.start + (left + 24) * 2**BITS // width + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.count(source, middle) >= limit else (middle, high)
        return high


@dataclass(frozen=True)
class Order:
    """The source of every position from `start` on, and which of the source's windows, counted from 0, it reads.

    Attributes:
      weights: of each source, none of them negative.
      limits: windows that may be read of each; None: any number.
      start: the position from which on these weights hold.
      drawn: windows of each source that were read before it; empty: none.
    """

    weights: tuple[float, ...]
    limits: tuple[int | None, ...]
    start: int = 0
    drawn: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.drawn:
            object.__setattr__(self, "drawn", (0,) * len(self.weights))

    def weighed(self, weights: Sequence[float], position: int) -> Order:
        """The order that has other weights from a position on; with the same weights it goes on as it is."""
        if tuple(weights) == self.weights:
            return self
        return Order(tuple(weights), self.limits, position, self.counts(position))

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The parts of the order, at most one more than sources: where a source runs out, the next one begins."""
        found: list[Phase] = []
        start, drawn = self.start, self.drawn
        while True:
            left = [limit is None or seen < limit for seen, limit in zip(drawn, self.limits, strict=True)]
            weights = [Fraction(w) if more else Fraction(0) for w, more in zip(self.weights, left, strict=True)]
            if not (total := sum(weights)):
                return tuple(found)
            sums = [sum(weights[:k], Fraction(0)) / total for k in range(len(weights) + 1)]
            found.append(Phase(start, drawn, tuple(int(x * 2**BITS) for x in sums)))
            ends = [found[-1].reaches(k, limit) for k, limit in enumerate(self.limits) if limit is not None and left[k]]
            if not (ends := [end for end in ends if end is not None]):
                return tuple(found)
            start = min(ends)
            drawn = tuple(found[-1].count(k, start) for k in range(len(weights)))

    @functools.cached_property
    def end(self) -> int | None:
        """The position at which every source that has a weight has run out; None: that never happens."""
        if not self.phases:
            return self.start
        ends = [
            self.phases[-1].reaches(k, limit)
            for k, limit in enumerate(self.limits)
            if limit is not None and self.phases[-1].drawn[k] < limit
        ]
        found = [end for end in ends if end is not None]
        return min(found) if found else None

    @property
    def run_out(self) -> list[tuple[int, tuple[int, ...]]]:
        """The positions at which sources run out while others do not, and which these are."""
        return [
            (after.start, tuple(k for k in range(len(self.weights)) if _width(before, k) and not _width(after, k)))
            for before, after in itertools.pairwise(self.phases)
        ]

    def shares(self, position: int) -> list[float]:
        """The share of each source in the windows from a position on."""
        phase = self._phase(position)
        return [_width(phase, k) / 2**BITS for k in range(len(self.weights))]

    def counts(self, position: int) -> tuple[int, ...]:
        """Windows of each source that are read before a position.

        Raises:
          SupplyError: every source has run out before it.
        """
        if position == self.start:
            return self.drawn
        phase = self._phase(position - 1)
        return tuple(phase.count(k, position) for k in range(len(self.weights)))

    def span(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of `count` positions from `first` on, and the numbers of their windows; int64 (count,) each.

        Raises:
          SupplyError: every source has run out before the last of them.
        """
        self._check(first + count - 1)
        sources, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
        at = 0
        while at < count:
            phase = self._phase(first + at)
            later = [other.start for other in self.phases if other.start > phase.start]
            until = min([count, *(start - first for start in later)])
            places = np.arange(first + at, first + until) - phase.start
            inner = np.array(phase.borders[1:-1], np.uint64)
            here = np.searchsorted(inner, corput(places), side="right")
            for source in np.unique(here):
                mine = np.flatnonzero(here == source)
                numbers[at + mine] = phase.count(int(source), first + at) + np.arange(len(mine))
            sources[at:until] = here
            at = until
        return sources, numbers

    def _check(self, position: int) -> None:
        if self.end is not None and position >= self.end:
            raise SupplyError(
                f"after {self.end:,} windows every source that has a weight has been read as often as it may"
            )

    def _phase(self, position: int) -> Phase:
        self._check(position)
        return next(phase for phase in reversed(self.phases) if phase.start <= position)


def _width(phase: Phase, source: int) -> int:
    return phase.borders[source + 1] - phase.borders[source]
