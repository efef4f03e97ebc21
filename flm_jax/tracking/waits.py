"""What the training loop waits for: seconds by name, per step, and whether the devices wait for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

# A run is said to wait for its data from this share of its time on, over at least so many steps and seconds.
SHARE, STEPS, SECONDS = 0.2, 20, 10.0


class _Span:
    """Seconds by name since a step."""

    def __init__(self, step: int, since: float) -> None:
        self.step, self.since = step, since
        self.spent: dict[str, float] = {}


class Waits:
    """The seconds that the loop of one stage spends on data, devices, saving and held-out evaluation."""

    def __init__(self, step: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begins to count at a step of the stage; `clock` gives seconds."""
        self._clock = clock
        self.begin(step)

    def begin(self, step: int) -> None:
        """Begins again, at a step."""
        now = self._clock()
        self._entry, self._window = _Span(step, now), _Span(step, now)

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """A context whose time is spent on `what`."""
        begun = self._clock()
        yield
        self._spent(what, begun)

    @contextlib.contextmanager
    def on_data(self, running: Any) -> Iterator[None]:
        """A context that reads the next batch; its time counts as waited for data if devices are idle at its end.

        Args:
          running: an array that the step before computes, as `jax.Array`; None: no step runs.
        """
        begun = self._clock()
        yield
        # Reading while the step before is computed costs nothing.
        if running is None or running.is_ready():
            self._spent("data", begun)

    def _spent(self, what: str, begun: float) -> None:
        seconds = self._clock() - begun
        for span in (self._entry, self._window):
            span.spent[what] = span.spent.get(what, 0.0) + seconds

    def per_step(self, step: int) -> dict[str, float]:
        """Seconds per step since the last call, `seconds/step` in all and `seconds/NAME` of each; {} without a step."""
        span, now = self._entry, self._clock()
        steps = step - span.step
        if steps < 1:
            return {}
        self._entry = _Span(step, now)
        found = {f"seconds/{what}": seconds / steps for what, seconds in sorted(span.spent.items())}
        return {"seconds/step": (now - span.since) / steps, **found}

    def data_share(self, step: int) -> float | None:
        """The share of time that was waited for data since the last answer; None while that is too short to tell."""
        span, now = self._window, self._clock()
        if step - span.step < STEPS or now - span.since < SECONDS:
            return None
        self._window = _Span(step, now)
        return span.spent.get("data", 0.0) / (now - span.since)
