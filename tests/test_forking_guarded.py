"""Forks of a run whose loss spikes soon after: a rewind goes no further back than the fork."""

import dataclasses

import jax
import numpy as np
import pytest

from flm_jax import train as training
from flm_jax.data.mixture_batches import MixtureBatches
from flm_jax.guards import SpikeGuard
from flm_jax.recipe import Run, Stage
from flm_jax.sharding import MeshConfig
from flm_jax.step import StageProgram
from tests import pretend
from tests.mixtures import write
from tests.runs import FAST, recipe_of
from tests.small import shape

BATCH, FORKED, POISONED, STEPS = 8, 3, 12, 14  # the batch that step 12 would read
UNUSED = 261
GUARD = SpikeGuard(window=8, rewind_steps=9, save_every=4, skip_batches=1)
HOW = Run(mesh=MeshConfig(), checkpoint_every=99, log_every=1, keep=1, sample_tokens=2)

pretended = pytest.fixture(scope="module", autouse=True)(pretend.pretending)


def stepper(program, masked):
    """Losses that hardly vary, but for the poisoned batch."""
    honest = pretend.stepper(program, masked)

    def step(state, batch, teacher=None):
        state, metrics = honest(state, batch, teacher)
        with jax.transfer_guard("allow"):
            loss = np.float32(9 if batch.targets_BT.max() == UNUSED else 2)
            return state, metrics.replace(loss=jax.device_put(loss))

    return step


def test_a_spike_soon_after_a_fork_goes_back_to_the_fork(tmp_path, monkeypatch):
    """The fork turns the guard on; nine steps before the spike it had not begun, and step 0 is not its own."""
    read, honest = [], MixtureBatches.next

    def poisoned(self, batch_size, rows=None):
        first = self.position
        batch = honest(self, batch_size, rows)
        if len(batch.targets_BT):
            read.append(first // BATCH + 1)
        if first == (POISONED - 1) * BATCH:
            batch.targets_BT[:] = UNUSED
        return batch

    monkeypatch.setattr(StageProgram, "stepper", stepper)
    monkeypatch.setattr(MixtureBatches, "next", poisoned)
    recipe = recipe_of(write(tmp_path / "mixture"), Stage("only", shape(layers=1), FORKED, BATCH, FAST), eval_every=99)
    training.train(recipe, HOW, tmp_path / "old")
    read.clear()
    longer = (dataclasses.replace(recipe.stages[0], steps=STEPS),)
    made = dataclasses.replace(recipe, stages=longer, spike_guard=GUARD)
    report = training.train(made, HOW, tmp_path / "new", fork=tmp_path / "old")
    (rewind,) = report["rewinds"]
    assert (rewind["since"], rewind["to"]) == (POISONED, FORKED)
    assert rewind["windows"] == [FORKED * BATCH, (POISONED + 1) * BATCH - 1]
    # Step 12 would be saved, so its spike is seen at once. All steps since the fork then read what lies behind it.
    assert read == [*range(FORKED + 1, POISONED + 1), *range(POISONED + 2, POISONED + 2 + STEPS - FORKED)]
