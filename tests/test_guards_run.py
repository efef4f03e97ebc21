"""A run on data with a poisoned batch: it rewinds and leaves the batch out, also if it is killed while it does."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from flm_jax import train as training
from flm_jax.checkpoint import Checkpoints, read_manifest
from flm_jax.data.mixture_batches import MixtureBatches
from flm_jax.data.source import open_data
from flm_jax.guards import SpikeGuard
from flm_jax.guards.steps import batch_record
from flm_jax.recipe import Recipe, Run, Stage
from flm_jax.sharding import MeshConfig
from tests.mixtures import write
from tests.runs import FAST, measurements, recipe_of
from tests.small import shape

pytestmark = pytest.mark.integration

STEPS, BATCH, POISONED = 24, 8, 17  # the batch that step 17 would read holds targets that no text has
RUN = Run(mesh=MeshConfig(fsdp=2, tensor=2), checkpoint_every=5, keep=1, log_every=1, sample_tokens=2)
GUARD = SpikeGuard(sigmas=2.0, least=0.5, window=8, rewind_steps=3, save_every=4, skip_batches=1)
UNUSED = 261  # an id of the model's embedding beyond the bytes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    data = write(tmp_path_factory.mktemp("mixture"))
    return recipe_of(data, Stage("only", shape(layers=1), STEPS, BATCH, FAST), eval_every=50, spike_guard=GUARD)


@pytest.fixture(scope="module")
def read():
    """The position of every batch that was read, of which the poisoned one has other targets."""
    positions, honest = [], MixtureBatches.next

    def poisoned(self, batch_size, rows=None):
        first = self.position
        batch = honest(self, batch_size, rows)
        if rows is None or len(rows):
            positions.append(first // BATCH + 1)
        if first == (POISONED - 1) * BATCH and len(batch.targets_BT):
            batch.targets_BT[:] = UNUSED
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixtureBatches, "next", poisoned)
        yield positions


@pytest.fixture(scope="module")
def unbroken(recipe, read, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    read.clear()
    return workdir, training.train(recipe, RUN, workdir), list(read)


def digest(workdir) -> str:
    return read_manifest(workdir / "checkpoints" / "0_only" / str(STEPS)).state_digest


def lines(workdir) -> list[dict]:
    """The log, without times, and without what differs between starts and ways to run."""
    return [line for line in measurements(workdir) if line["kind"] not in ("start", "save")]


def test_batches_that_are_left_out_leave_the_data_where_reading_them_does(recipe):
    source = dataclasses.replace(recipe.data, corpus=recipe.data.mixture.sources[0].corpus)
    for data in (recipe.data, source):
        skipped, whole = open_data(data, progress=False).train(), open_data(data, progress=False).train()
        for _ in range(30):  # beyond an epoch of the source
            skipped.next(BATCH, np.zeros(0, np.int64))
            whole.next(BATCH)
        assert skipped.state() == whole.state() and skipped.position == 30 * BATCH
        np.testing.assert_array_equal(skipped.next(BATCH).inputs_BT, whole.next(BATCH).inputs_BT)
    mixed = open_data(recipe.data, progress=False).train()
    counts = np.bincount(mixed.next(BATCH).sources.numbers_B, minlength=3).tolist()
    assert batch_record(mixed, 0, BATCH)["sources"] == dict(zip(("prose", "code", "numbers"), counts, strict=True))
    joined = open_data(dataclasses.replace(recipe.data, packing="joined"), progress=False).train()
    joined.next(BATCH)
    assert joined.position == BATCH
    assert batch_record(joined, 0, BATCH) == batch_record(mixed, 0, BATCH)


def test_a_run_rewinds_before_a_spike_leaves_its_batch_out_and_learns_on(unbroken):
    workdir, report, read = unbroken
    (rewind,) = report["rewinds"]
    # Steps 1 to 18 run: the spike of step 17 is seen while the next one is computed. The last saved step that is three
    # before it is 12; the batches from there to one behind the spike are left out.
    assert read == [*range(1, 19), *range(19, 19 + STEPS - 12)]
    assert {name: rewind[name] for name in ("stage", "step", "since", "what", "to", "windows")} == {
        "stage": "only",
        "step": POISONED,
        "since": POISONED,
        "what": "loss",
        "to": 12,
        "windows": [12 * BATCH, 18 * BATCH - 1],
    }
    assert sum(rewind["sources"].values()) == 6 * BATCH and set(rewind["sources"]) == {"prose", "code", "numbers"}
    log = lines(workdir)
    train = [line for line in log if line["kind"] == "train"]
    assert [line["stage_step"] for line in train] == list(range(1, STEPS + 1))
    assert max(line["loss"] for line in train[12:]) < rewind["bound"] < rewind["value"]
    (line,) = [line for line in log if line["kind"] == "rewind"]
    assert (line["stage_step"], line["to"], line["spike"], line["windows"]) == (13, 12, POISONED, rewind["windows"])
    first, last = report["evals"][0]["loss"], report["evals"][-1]["loss"]
    assert last < first - 0.5
    page = (workdir / "report.md").read_text()
    assert "| only | 17 | the loss is " in page and "| to step 12, without windows 96 to 143 of the run: " in page


def test_a_run_that_is_killed_while_it_rewinds_ends_with_the_same_bits(unbroken, recipe, read, tmp_path, monkeypatch):
    """Saving at other steps than the one that is not killed: where a rewind goes to is up to the recipe alone."""
    workdir, run = tmp_path / "run", dataclasses.replace(RUN, checkpoint_every=6, keep=2)
    saved = workdir / "checkpoints" / "0_only"

    def killed(name, step):
        """Trains until a method of the checkpoint manager is called with a step; the steps that are then on disk."""
        honest = getattr(Checkpoints, name)

        def kill(self, at, *given, **named):
            if at == step:
                raise SystemExit("killed")
            return honest(self, at, *given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, name, kill)
            with pytest.raises(SystemExit, match="killed"):
                training.train(recipe, run, workdir)
        return sorted(int(path.name) for path in saved.glob("[0-9]*"))

    # Before the steps after the rewind are deleted; before the first step after it is saved; and later.
    assert killed("discard_after", 12) == [0, 12, 16]
    assert killed("save", 13) == [0, 12]
    assert killed("save", STEPS) == [0, 16, 18, 20]
    read.clear()
    report = training.train(recipe, run, workdir)
    assert read == [27, 28, 29, 30], "from step 20, whose data lies behind what was left out"
    assert digest(workdir) == digest(unbroken[0])
    assert json.loads(json.dumps(report)) == json.loads(json.dumps(unbroken[1]))
    assert lines(workdir) == lines(unbroken[0])
    assert np.isfinite(report["evals"][-1]["loss"])
    shutil.rmtree(workdir)
