"""Settings of the guards: `SpikeGuard` of a recipe, `GradientAlarm` and `Watchdog` of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from flm_jax.records import recorded
from flm_jax.records.fields import Count, NonNegative, Positive, Size, above, at_least

# A median and a deviation of fewer values say little.
Window = Annotated[int, at_least(8)]
Times = Annotated[float, above(1)]


@dataclass(frozen=True)
@recorded
class SpikeGuard:
    """Rewinds a run whose loss spikes, and skips the batches that led there, as in PaLM (2204.02311, section 5.1).

    Median and deviation are those of the last `window` good steps of the stage. The deviation is 1.4826 times the
    median absolute deviation: for normal values the standard deviation, and hardly moved by a few outliers. Steps that
    are not finite or lie above the bound do not enter the window. It is empty at the beginning of a stage and until
    the learning rate has warmed up and masks have risen; before it is full, no step is a spike.

    Attributes:
      sigmas: deviations above the median from which on a step's loss is a spike.
      gradient_sigmas: the same for the logarithm of the gradient's norm; 0: the norm is not looked at. Norms have long
        tails: with it, `in_a_row` is best 2 or more.
      least: nats per token by which the loss of a spike exceeds the median in any case.
      window: good steps that median and deviation are taken over.
      in_a_row: steps above the bound, one after the other, that make a spike.
      rewind_steps: steps between the checkpoint that the run goes back to and the spike's first step, at least.
      save_every: steps between the checkpoints that a rewind may go back to. They are saved besides those of
        `Run.checkpoint_every`, and kept as long as a rewind may need them.
      skip_batches: batches after the spike that are skipped too; those from the checkpoint to the spike always are.
      most_rewinds: rewinds in a stage; the next spike stops the run.
    """

    sigmas: Positive = 6.0
    gradient_sigmas: NonNegative = 0.0
    least: NonNegative = 0.1
    window: Window = 128
    in_a_row: Size = 1
    rewind_steps: Size = 100
    save_every: Size = 100
    skip_batches: Count = 100
    most_rewinds: Count = field(default=10, metadata={"compared": False})

    def rewind_to(self, since: int, begins: int = 0) -> int:
        """The step that the run goes back to after a spike whose first step is `since`.

        Args:
          since: counted from 1.
          begins: the stage's first checkpoint in the work directory: later than 0 if the run has forked there.
        """
        return max(max(since - self.rewind_steps, 0) // self.save_every * self.save_every, begins)

    def points(self, since: int, step: int, begins: int = 0) -> list[int]:
        """The steps up to `step` that a run may go back to after a spike whose first step is `since` or later."""
        first = self.rewind_to(since, begins)
        later = range(first - first % self.save_every + self.save_every, step + 1, self.save_every)
        return [first, *later] if first <= step else []


@dataclass(frozen=True)
@recorded
class GradientAlarm:
    """Says in the log, and records, that the gradient's norm is far above what it was; changes nothing.

    Attributes:
      times: of the median of the last `window` finite steps, from which on there is an alarm.
      window: steps that the median is taken over; there is no alarm before it is full.
      every: steps between two alarms, at least.
    """

    times: Times = 10.0
    window: Window = 100
    every: Size = 100


@dataclass(frozen=True)
@recorded
class Watchdog:
    """Says what a process waits for, and where each of its threads stands, when that takes far longer than usual.

    What is watched: reading a batch, a step, the vote to stop, measuring, saving. Their usual time is the median of the
    last 64 times.

    Attributes:
      times: of the usual time, from which on it is too long.
      at_least_seconds: what is shorter is never too long.
      first_seconds: what is too long as long as the usual time is not known: of the first five steps, which compile.
      end: whether the process then ends, with exit status 79; otherwise it waits on.
    """

    times: Times = 10.0
    at_least_seconds: Positive = 300.0
    first_seconds: Positive = 3600.0
    end: bool = False
