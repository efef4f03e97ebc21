"""What writing measurements costs a run: processor time of the training thread per logged step.

  python benchmarks/tracking.py

The service is a stand-in that takes no time; what a real one costs in its own thread depends on its client.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app

from flm_jax.tracking import Background, Measurement, MetricsLog, Session, StageCost, Totals
from flm_jax.tracking.services import About, Service

STEPS, REPEATS = 500, 5
# As many numbers as a step of a run writes.
VALUES = {f"value_{i}": 1.0 / (i + 1) for i in range(32)}


class Nowhere:
    """In place of a service: takes everything."""

    package = "nowhere"

    def begin(self, about: About) -> tuple[Service, str]:
        """See Tracker."""
        del about
        return self, "nowhere"

    def write(self, measured: Measurement) -> None:
        """See Service."""

    def close(self, failed: bool) -> None:
        """See Service."""


def microseconds(write: Callable[[int], None]) -> float:
    """Processor time of this thread per call: the least of some repeats."""
    least = float("inf")
    for _ in range(REPEATS):
        begun = time.thread_time()
        for step in range(STEPS):
            write(step)
        least = min(least, (time.thread_time() - begun) / STEPS * 1e6)
    return least


def main(argv: Sequence[str]) -> None:
    """Prints a line per writer."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(Path(folder), "0_stage", "stage", Totals(0, 0, 0), StageCost(2048, 10**6), Session())
        log.open(0)
        files = microseconds(lambda step: log.write("train", step, VALUES))
        log.close()
        with Background(Nowhere(), About("run", "key", Path(folder), {})) as service:
            one = Measurement("train", "stage", 1, Totals(1, 2048, 10**9), time.time(), VALUES)
            handed = microseconds(lambda _: service.write(one))
    print(f"metrics.jsonl and TensorBoard events: {files:.0f} us per logged step")
    print(f"handing it to a service's thread:     {handed:.0f} us per logged step")


if __name__ == "__main__":
    app.run(main)
