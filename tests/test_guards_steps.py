"""What the guards make of measurements: skipped steps and alarms by their batch, limits, memory, and whom they name."""

import json
import math

import numpy as np
import pytest

from flm_jax.checkpoint import DamagedError, NoCheckpointError, Restored
from flm_jax.data.mixture_batches import MixtureBatches
from flm_jax.guards import (
    GradientAlarm,
    NonFiniteError,
    Spike,
    SpikeError,
    SpikeGuard,
    StageFacts,
    StepGuards,
    StepLimits,
    restore_before,
    skip_behind,
)
from flm_jax.guards.steps import batch_text

SPIKE = Spike(step=35, since=35, what="loss", value=9.0, median=2.0, bound=2.5)


class Batches:
    """Stands for data that is not a mixture, and ends."""

    position = 0

    def __init__(self, end=10**9):
        self.end, self.read = end, []

    def next(self, batch_size, rows):
        if self.position + batch_size > self.end:
            raise ValueError("there are no more windows")
        self.position += batch_size
        self.read.append(len(rows))

    def rows_by_source(self, first, count):
        return {}


class Mixed(MixtureBatches):
    """A mixture of which every fourth window is of the second source; without stores."""

    def __init__(self):
        self.asked = []

    def rows_by_source(self, first, count):
        self.asked.append((first, count))
        of_second = sum(n % 4 == 3 for n in range(first, first + count))
        return {"web": count - of_second, "code": of_second}


def guards(history=None, batches=None, spikes=None, alarm=None, written=None, **fields):
    given = {"max_bad_steps": 3, "max_loss": 3.0, "spikes": spikes, "alarm": alarm}
    write = (lambda *line: None) if written is None else (lambda *line: written.append(line))
    history = {"skipped": []} if history is None else history
    return StepGuards(StageFacts("a", 8, 100, 0), StepLimits(**given), history, batches or Batches(), write, **fields)


def values(loss=2.0, norm=1.0, bad=0.0):
    return {"loss": loss, "grad_norm": norm, "update_norm": 0.1, "bad": bad}


def test_a_step_that_is_not_finite_is_named_by_its_windows_and_sources(caplog):
    history, written, mixed = {"skipped": []}, [], Mixed()
    guard = guards(history, mixed, written=written)
    guard.look(1, 0, values())
    assert not mixed.asked, "nothing is looked up for a step that is good"
    guard.look(2, 8, values(math.nan, bad=1.0))
    entry = {"stage": "a", "step": 2, "windows": [8, 15], "sources": {"web": 6, "code": 2}}
    assert history["skipped"] == [entry]
    (line,) = written
    assert line[:2] == ("skip", 2) and line[2]["windows"] == [8, 15] and line[2]["sources"] == entry["sources"]
    assert "not finite, skipped; its batch: windows 8 to 15 of the run: 6 of web, 2 of code." in caplog.text
    assert batch_text({"windows": [0, 7]}) == "windows 0 to 7 of the run"


def test_so_many_in_a_row_stop_the_run_also_across_a_start():
    history = {"skipped": []}
    guard = guards(history)
    for step in (1, 2):
        guard.look(step, 0, values(math.nan, bad=1.0))
    guard.look(3, 0, values())  # one that is good: the count begins again
    for step in (4, 5):
        guard.look(step, 0, values(math.nan, bad=1.0))
    later = guards(history, step=5)
    with pytest.raises(NonFiniteError, match="3 steps in a row, up to step 6"):
        later.look(6, 0, values(math.nan, bad=1.0))
    guards(history, step=3).look(4, 0, values(math.nan, bad=1.0))


def test_an_alarm_is_loud_once_in_so_many_steps_and_goes_on_from_memory(caplog):
    alarm = GradientAlarm(times=10.0, window=8, every=5)
    norms = [1.0] * 7 + [50.0] + [1.0] * 4 + [11.0, 12.0, 9.0, 1.0, 60.0, 70.0]
    loud = [13, 18]  # 50 comes before the window is full, 12 and 60 within five steps of 11

    def look(guard, steps):
        for step in steps:
            assert guard.look(step, 8 * step, values(norm=norms[step - 1])) is None

    history, written = {"skipped": []}, []
    look(guards(history, alarm=alarm, written=written), range(1, 19))
    assert [entry["step"] for entry in history["alarms"]] == loud
    assert [line[:2] for line in written] == [("alarm", step) for step in loud]
    assert history["alarms"][0] == {"stage": "a", "step": 13, "grad_norm": 11.0, "median": 1.0, "windows": [104, 111]}
    assert "step 13: the gradient's norm is 11, 11.0 times the median of the last 8 steps (1)" in caplog.text
    for cut in (3, 12, 13, 16):
        again = {"skipped": []}
        first = guards(again, alarm=alarm)
        look(first, range(1, cut + 1))
        look(guards(again, alarm=alarm, step=cut, memory=first.memory()), range(cut + 1, 19))
        assert again == history
    silent = {"skipped": []}
    guard = guards(silent)
    look(guard, range(1, 19))
    assert silent == {"skipped": []} and guard.memory() == b""


def test_memory_that_is_damaged_is_refused():
    with pytest.raises(ValueError, match="the file 'guards' of the checkpoint"):
        guards(alarm=GradientAlarm(), memory=b'{"norms": ["a"]}')
    with pytest.raises(ValueError, match="the file 'guards' of the checkpoint"):
        guards(spikes=SpikeGuard(), memory=b'{"spikes": [1]}')


def test_a_spike_comes_before_the_limit_of_the_loss_and_too_many_stop_the_run():
    guard, history = SpikeGuard(window=8, most_rewinds=1), {"skipped": []}
    steps = guards(history, spikes=guard)
    for step in range(1, 11):
        assert steps.look(step, 8 * step, values(2.0 + 0.01 * (step % 3))) is None
    assert list(steps.needed(10)) == [0]
    found = steps.look(11, 88, values(50.0))
    assert (found.step, found.since, found.what) == (11, 11, "loss")
    with pytest.raises(NonFiniteError, match="the loss is 50 nats per token, more than 3 times"):
        guards(history).look(11, 88, values(50.0))
    history["rewinds"] = [{"stage": "another"}, {"stage": "a"}]
    with pytest.raises(SpikeError, match="The stage has been rewound 1 time, and SpikeGuard.most_rewinds = 1"):
        guards(history, spikes=guard, step=10, memory=steps.memory()).look(11, 88, values(50.0))


def test_memory_holds_float32_losses_exactly():
    steps = guards(spikes=SpikeGuard(window=8))
    loss = float(np.float32(2.7182817))
    steps.look(1, 0, values(loss))
    assert json.loads(steps.memory())["spikes"]["losses"] == [loss]


class Store:
    """Stands for the checkpoints of a stage; `steps` says of each what happens to whoever restores it."""

    def __init__(self, **steps):
        self.steps, self.asked = steps, []

    def restore(self, abstract, step):
        del abstract
        self.asked.append(step)
        error = self.steps.get(f"s{step}", NoCheckpointError(f"it holds no step {step}"))
        if error is not None:
            raise error
        return Restored(step, None, {}, {})


def test_a_damaged_checkpoint_is_passed_over_on_the_way_back(caplog):
    guard = SpikeGuard(rewind_steps=5, save_every=10)
    assert restore_before(SPIKE, guard, Store(s30=None, s20=None), None).step == 30
    store = Store(s30=DamagedError("one bit"), s10=None)
    assert restore_before(SPIKE, guard, store, None).step == 10
    assert store.asked == [30, 20, 10]
    assert "cannot go back to step 30, and goes back to an older one: one bit" in caplog.text
    with pytest.raises(SpikeError, match=r"the loss is 9, above 2.5 \(median 2\), and there is no checkpoint to go"):
        restore_before(SPIKE, guard, Store(), None)


def test_what_is_left_out_reaches_from_the_checkpoint_to_behind_the_spike():
    batches = Batches()
    batches.position = 30 * 8  # the spike's batch began at window 34 * 8
    found = skip_behind(SPIKE, 34 * 8, SpikeGuard(skip_batches=2), batches, 8)
    assert batches.position == 37 * 8 and found == {"windows": [30 * 8, 37 * 8 - 1]}
    assert batches.read == [0] * 7, "no row of what is left out is read"
    with pytest.raises(SpikeError, match="does not suffice to leave out windows 0 to 295 of the run: there are no"):
        skip_behind(SPIKE, 34 * 8, SpikeGuard(skip_batches=2), Batches(end=100), 8)
