"""Looks at the measurements of each step of a stage: what is skipped, what is said, what stops or rewinds the run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flm_jax.data.batches import TokenBatches
from flm_jax.distributed import is_primary
from flm_jax.guards.config import GradientAlarm, SpikeGuard
from flm_jax.guards.spikes import Spike, SpikeDetector, Window
from flm_jax.records import counted
from flm_jax.records.foreign_json import check, field, parse_json

log = logging.getLogger(__name__)

# The file of a checkpoint with what the guards remember of the steps before; it concerns only the run that wrote it.
MEMORY = "guards"


class NonFiniteError(RuntimeError):
    """Raised when too many consecutive steps were not finite, or when the loss exceeds `Run.max_loss`."""


class SpikeError(RuntimeError):
    """Raised at a spike when the run has been rewound as often as it may, or its checkpoints do not allow it."""


def batch_record(batches: TokenBatches, first: int, count: int) -> dict[str, Any]:
    """Which windows of the run, first and last, a batch or several held; of a mixture also how many of each source."""
    found: dict[str, Any] = {"windows": [first, first + count - 1]}
    if sources := batches.rows_by_source(first, count):
        found["sources"] = sources
    return found


def batch_text(record: Mapping[str, Any]) -> str:
    """The same in words."""
    text = "windows {} to {} of the run".format(*record["windows"])
    sources = ", ".join(f"{count} of {name}" for name, count in record.get("sources", {}).items())
    return f"{text}: {sources}" if sources else text


@dataclass(frozen=True)
class StageFacts:
    """What the guards need to know about a stage.

    Attributes:
      name: of the stage.
      batch_size: windows per step.
      vocab: tokens of the model's vocabulary.
      quiet_steps: steps at its start in which masks or rates rise.
      begins: its first step in the work directory: later than 0 if the run has forked there.
    """

    name: str
    batch_size: int
    vocab: int
    quiet_steps: int
    begins: int = 0


@dataclass(frozen=True)
class StepLimits:
    """What a run allows.

    Attributes:
      max_bad_steps, max_loss: see `Run`.
      spikes: see `Recipe.spike_guard`.
      alarm: see `Run.gradient_alarm`.
    """

    max_bad_steps: int
    max_loss: float
    spikes: SpikeGuard | None
    alarm: GradientAlarm | None


class StepGuards:
    """The guards of one stage; they are shown each of its steps in order, once it is done.

    What they decide follows from the measurements alone, which are the same in all processes.
    """

    def __init__(
        self,
        stage: StageFacts,
        limits: StepLimits,
        history: dict[str, list[Any]],
        batches: TokenBatches,
        write: Callable[[str, int, Mapping[str, Any]], None],
        step: int = 0,
        memory: bytes | None = None,
    ) -> None:
        """Begins after `step` steps of the stage.

        Args:
          stage: the stage.
          limits: what the run allows.
          history: of the run; gains entries under 'skipped' and 'alarms'.
          batches: where its batches come from.
          write: takes kind, step and values of what is written to the log of measurements.
          step: steps of the stage that are done.
          memory: what `memory` returned there; None: nothing is known of earlier steps.

        Raises:
          ValueError: the memory is damaged.
        """
        self._stage, self._limits, self._history, self._batches, self._write = stage, limits, history, batches, write
        where = f"the file {MEMORY!r} of the checkpoint"
        known = {} if memory is None else dict(check(parse_json(memory, where), dict, where))
        self._detector = None
        if limits.spikes is not None:
            of_spikes = check(known.get("spikes"), (dict, type(None)), where)
            self._detector = SpikeDetector(limits.spikes, stage.quiet_steps, of_spikes)
        norms = field(known, "norms", list, where) if "norms" in known else []
        self._norms = Window(limits.alarm.window if limits.alarm else 1, [check(n, float, where) for n in norms])
        skipped = {entry["step"] for entry in history["skipped"] if entry["stage"] == stage.name}
        self._bad_in_a_row = next(n for n in range(step + 1) if step - n not in skipped)
        alarms = [entry["step"] for entry in history.get("alarms", []) if entry["stage"] == stage.name]
        self._quiet_until = alarms[-1] + limits.alarm.every if alarms and limits.alarm else 0

    def memory(self) -> bytes:
        """Everything that guards need to go on exactly here, as JSON; empty if there is nothing to remember."""
        found: dict[str, Any] = {}
        if self._limits.alarm is not None and self._norms.values:
            found["norms"] = self._norms.values
        if self._detector is not None:
            found["spikes"] = self._detector.memory()
        return json.dumps(found).encode() if found else b""

    def needed(self, step: int) -> list[int]:
        """The steps up to `step` whose checkpoints a spike that is seen after it may need."""
        if self._limits.spikes is None or self._detector is None:
            return []
        return self._limits.spikes.points(self._detector.begins(step), step, self._stage.begins)

    def look(self, step: int, first: int, values: Mapping[str, float]) -> Spike | None:
        """What the measurements of a step lead to: None, or a spike because of which the run is to be rewound.

        Args:
          step: of the stage, counted from 1.
          first: the first window of its batch, of the run.
          values: by name, as `Metrics.by_name`.

        Raises:
          NonFiniteError: too many steps in a row were not finite, or the loss is above the bound.
          SpikeError: it is a spike, and the run has been rewound as often as it may.
        """
        loss, norm = values["loss"], values["grad_norm"]
        if values["bad"]:
            self._skipped(step, first, values)
            self._check_loss(step, first, loss)
            return None
        self._bad_in_a_row = 0
        spike = None if self._detector is None else self._detector.look(step, loss, norm)
        if spike is not None:
            self._check_rewinds(spike, first)
            return spike
        self._alarm(step, first, norm)
        self._check_loss(step, first, loss)
        return None

    def _batch(self, first: int) -> dict[str, Any]:
        return batch_record(self._batches, first, self._stage.batch_size)

    def _named(self, first: int) -> str:
        return f"its batch: {batch_text(self._batch(first))}"

    def _skipped(self, step: int, first: int, values: Mapping[str, float]) -> None:
        name, record = self._stage.name, self._batch(first)
        self._bad_in_a_row += 1
        self._history["skipped"].append({"stage": name, "step": step, **record})
        self._write("skip", step, {**values, **record})
        batch = f"its batch: {batch_text(record)}"
        _say(f"Stage {name}, step {step}: not finite, skipped; {batch}.")
        if self._bad_in_a_row >= self._limits.max_bad_steps:
            raise NonFiniteError(
                f"Stage {name!r}: {self._bad_in_a_row} steps in a row, up to step {step}, had a loss, gradient "
                f"or update that is not finite (loss {values['loss']}, gradient norm {values['grad_norm']}, "
                f"update norm {values['update_norm']}; {batch}). None of them was applied. "
                "Lower the learning rate, or look at the data."
            )

    def _check_loss(self, step: int, first: int, loss: float) -> None:
        uniform = math.log(self._stage.vocab)
        if loss > self._limits.max_loss * uniform:
            raise NonFiniteError(
                f"Stage {self._stage.name!r}, step {step}: the loss is {loss:.6g} nats per token, more than "
                f"{self._limits.max_loss:g} times that of a uniform guess ({uniform:.4g}; {self._named(first)}): "
                "training has diverged. Start again from an earlier checkpoint with a lower learning rate. "
                "Run.max_loss sets this bound."
            )

    def _check_rewinds(self, spike: Spike, first: int) -> None:
        assert self._limits.spikes is not None
        most, name = self._limits.spikes.most_rewinds, self._stage.name
        done = sum(entry["stage"] == name for entry in self._history.get("rewinds", []))
        if done >= most:
            raise SpikeError(
                f"Stage {name!r}, step {spike.step}: {spike_text(spike)}; {self._named(first)}. The stage has been "
                f"rewound {counted(done, 'time')}, and SpikeGuard.most_rewinds = {most}. Look at the data, raise "
                "most_rewinds, or begin a new work directory with an earlier checkpoint of this one (--fork) and a "
                "lower learning rate."
            )

    def _alarm(self, step: int, first: int, norm: float) -> None:
        alarm = self._limits.alarm
        if alarm is None:
            return
        if step >= self._quiet_until and self._norms.full:
            middle = self._norms.median()
            if norm > alarm.times * middle > 0:
                batch = self._batch(first)
                found = {"grad_norm": norm, "median": middle, **batch}
                self._history.setdefault("alarms", []).append({"stage": self._stage.name, "step": step, **found})
                self._write("alarm", step, found)
                self._quiet_until = step + alarm.every
                _say(
                    f"Stage {self._stage.name}, step {step}: the gradient's norm is {norm:.4g}, {norm / middle:.1f} "
                    f"times the median of the last {alarm.window} steps ({middle:.4g}); its batch: {batch_text(batch)}."
                )
        self._norms.add(norm)


def spike_text(spike: Spike) -> str:
    """What was seen, as a part of a sentence."""
    what = "the loss" if spike.what == "loss" else "the gradient's norm"
    return f"{what} is {spike.value:.4g}, above {spike.bound:.4g} (median {spike.median:.4g})"


def _say(sentence: str) -> None:
    if is_primary():
        log.warning("%s", sentence)
