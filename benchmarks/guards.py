"""What the guards cost a run: processor time of the training thread per step.

  python benchmarks/guards.py

Nothing of it waits for the devices: the guards look at numbers that the loop has fetched in any case.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app

from flm_jax.data.batches import Batch
from flm_jax.guards import GradientAlarm, SpikeGuard, StageFacts, StepGuards, StepLimits, Watchdog, watching
from flm_jax.guards.watch import DATA, STEP, VOTE

STEPS, REPEATS = 1_000, 5


class NoBatches:
    """In place of the data, which is asked for nothing while all is well."""

    position = 0

    def rows_by_source(self, first: int, count: int) -> dict[str, int]:
        """See TokenBatches."""
        del first, count
        return {}

    def next(self, batch_size: int, rows: np.ndarray | None = None) -> Batch:
        """See TokenBatches."""
        raise NotImplementedError

    def state(self) -> bytes:
        """See TokenBatches."""
        raise NotImplementedError

    def mark(self) -> str:
        """See TokenBatches."""
        raise NotImplementedError

    def restore(self, state: bytes) -> None:
        """See TokenBatches."""
        raise NotImplementedError


def microseconds(act: Callable[[int], Any]) -> float:
    """Processor time of this thread per call: the least of some repeats."""
    least = float("inf")
    for repeat in range(REPEATS):
        begun = time.thread_time()
        for step in range(STEPS):
            act(repeat * STEPS + step + 1)
        least = min(least, (time.thread_time() - begun) / STEPS * 1e6)
    return least


def looking(spikes: SpikeGuard | None, alarm: GradientAlarm | None) -> float:
    """Microseconds per step of guards with these settings, on noise."""
    facts, limits = StageFacts("stage", 8, 32_000, 0), StepLimits(3, 3.0, spikes, alarm)
    guards = StepGuards(facts, limits, {"skipped": []}, NoBatches(), write=_nothing)
    noise = [{"loss": random.gauss(3, 0.03), "grad_norm": random.gauss(1, 0.1), "bad": 0.0} for _ in range(STEPS)]
    return microseconds(lambda step: guards.look(step, 0, noise[step % STEPS]))


def _nothing(kind: str, step: int, values: Mapping[str, Any]) -> None:
    del kind, step, values


def main(argv: Sequence[str]) -> None:
    """Prints a line per guard."""
    del argv
    with tempfile.TemporaryDirectory() as folder, watching(Watchdog(), Path(folder)) as watch:

        def watched(step: int) -> None:
            for what in (DATA, STEP, VOTE):
                watch.at(what, step)

        of_watchdog = microseconds(watched)
    always = looking(None, None)
    print(f"watchdog:                              {of_watchdog:.1f} us per step")
    print(f"steps that are not finite, max_loss:   {always:.1f} us per step")
    print(f"gradient alarm:                        {looking(None, GradientAlarm()) - always:.1f} us per step")
    print(f"spike guard, loss:                     {looking(SpikeGuard(), None) - always:.1f} us per step")
    both = SpikeGuard(gradient_sigmas=6.0)
    print(f"spike guard, loss and gradient norm:   {looking(both, None) - always:.1f} us per step")


if __name__ == "__main__":
    app.run(main)
