"""What is a spike: a step whose loss or gradient norm lies far above those of the good steps before it."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from flm_jax.guards.config import SpikeGuard
from flm_jax.records.foreign_json import check, field

# The standard deviation of normal values over their median absolute deviation.
_NORMAL = 1.4826


def median(values: Iterable[float]) -> float:
    """The median of at least one value."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


class Window:
    """The last values of something, with their median and a deviation that few outliers hardly move."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self._values = collections.deque(values, size)
        self._size = size

    @property
    def full(self) -> bool:
        """Whether it has as many values as it holds."""
        return len(self._values) == self._size

    @property
    def values(self) -> list[float]:
        """The values, oldest first."""
        return list(self._values)

    def add(self, value: float) -> None:
        """Adds a value; the oldest one goes if the window is full."""
        self._values.append(value)

    def median(self) -> float:
        """The median of its values, of which there must be one."""
        return median(self._values)

    def spread(self) -> tuple[float, float]:
        """The median, and 1.4826 times the median absolute deviation."""
        middle = median(self._values)
        return middle, _NORMAL * median([abs(value - middle) for value in self._values])


class Spike(NamedTuple):
    """A spike that has been seen.

    Attributes:
      step: the step that it was seen at, counted from 1.
      since: its first step.
      what: 'loss' or 'grad_norm', which of them lies above its bound.
      value: its value at `step`.
      median: of the good steps before.
      bound: what was allowed.
    """

    step: int
    since: int
    what: str
    value: float
    median: float
    bound: float

    def record(self) -> dict[str, Any]:
        """What was seen, JSON-able, without the step."""
        found = self._asdict()
        del found["step"]
        return found


class SpikeDetector:
    """Tells spikes in the loss and gradient norm of the steps of one stage, given in order."""

    def __init__(self, guard: SpikeGuard, quiet_steps: int = 0, memory: Mapping[str, Any] | None = None) -> None:
        """Starts with an empty window, or where `memory` was taken.

        Args:
          guard: what is a spike.
          quiet_steps: steps at the start of the stage that are no spikes, and do not enter the window.
          memory: of an earlier detector.

        Raises:
          ValueError: the memory is damaged.
        """
        self._guard, self._quiet = guard, quiet_steps
        self._losses, self._norms = Window(guard.window), Window(guard.window)
        self._above, self.since = 0, 0
        if memory is not None:
            where = "the memory of the spike guard"
            losses, norms = (field(dict(memory), name, list, where) for name in ("losses", "norms"))
            for value in losses + norms:
                check(value, float, where)
            self._losses, self._norms = Window(guard.window, losses), Window(guard.window, norms)
            self._above, self.since = (field(dict(memory), name, int, where) for name in ("above", "since"))

    def memory(self) -> dict[str, Any]:
        """Everything that a later detector needs to go on exactly here, JSON-able."""
        return {
            "losses": self._losses.values,
            "norms": self._norms.values,
            "above": self._above,
            "since": self.since,
        }

    def begins(self, step: int) -> int:
        """The first step of a spike that is seen after `step`, at the earliest."""
        return self.since or step + 1

    def look(self, step: int, loss: float, grad_norm: float) -> Spike | None:
        """The spike that a finite step ends or goes on with, if it is one."""
        if step <= self._quiet:
            return None
        log_norm = math.log(max(grad_norm, 1e-30))
        found = self._above_bound(step, loss, log_norm) if self._losses.full else None
        if found is None:
            self._losses.add(loss)
            self._norms.add(log_norm)
            self._above, self.since = 0, 0
            return None
        self._above += 1
        self.since = self.since or step
        return found._replace(since=self.since) if self._above >= self._guard.in_a_row else None

    def _above_bound(self, step: int, loss: float, log_norm: float) -> Spike | None:
        guard = self._guard
        middle, sigma = self._losses.spread()
        bound = middle + max(guard.sigmas * sigma, guard.least)
        if loss > bound:
            return Spike(step, step, "loss", loss, middle, bound)
        if guard.gradient_sigmas:
            middle, sigma = self._norms.spread()
            # A norm that hardly varies: a hundredth more is no spike.
            bound = middle + guard.gradient_sigmas * max(sigma, 0.01)
            if log_norm > bound:
                return Spike(step, step, "grad_norm", math.exp(log_norm), math.exp(middle), math.exp(bound))
        return None
