"""A whole run on a mixture: losses by source, other weights in a later stage, and stops that change nothing."""

import dataclasses
import json

import numpy as np
import pytest

from flm_jax import train as training
from flm_jax.checkpoint import Checkpoints
from flm_jax.data.mixture_batches import MixtureBatches
from flm_jax.data.source import open_data
from flm_jax.loss import bits_per_byte, make_heldout_loss
from flm_jax.recipe import Run, Stage, resolve
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.source_checkpoint import POSITION
from flm_jax.step import StageProgram
from flm_jax.tracking import read_log
from tests.mixtures import changed, write
from tests.runs import FAST, StopAfter, recipe_of
from tests.small import shape

pytestmark = pytest.mark.integration
MODEL = shape(layers=1)
NAMES = ("prose", "code", "numbers")


RUN = Run(mesh=MeshConfig(fsdp=2, tensor=2), checkpoint_every=2, log_every=1, sample_tokens=2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The second stage continues the model, and reads two of the three sources."""
    weights = {"prose": 1.0, "numbers": 3.0}
    first = Stage("first", MODEL, 3, 8, FAST, accumulate=2)
    second = Stage("second", MODEL, 4, 8, FAST, accumulate=2, source_weights=weights)
    data = changed(write(tmp_path_factory.mktemp("mixture")), code={"weight": 1.5})
    return recipe_of(data, first, second, eval_windows=12, eval_every=10)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A run that is stopped in its second stage and goes on: its directory, report, and where each batch was read."""
    workdir, read, honest = tmp_path_factory.mktemp("run") / "run", [], MixtureBatches.next

    def recorded(self, batch_size, rows=None):
        read.append((self.position, self.order.span(self.position, batch_size)))
        return honest(self, batch_size, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixtureBatches, "next", recorded)
        patch.setattr(training, "Interrupts", lambda: StopAfter(7))
        assert training.train(recipe, RUN, workdir) is None
        patch.undo()
        patch.setattr(MixtureBatches, "next", recorded)
        return workdir, training.train(recipe, RUN, workdir), read


def state_of(workdir, stage, step):
    with Checkpoints(workdir / "checkpoints" / stage.directory, read_only=True) as store:
        restored = store.restore(StageProgram(stage, make_mesh(RUN.mesh), 1).abstract_state, step)
    return restored.state, restored.blobs


def lines(workdir, kind):
    return [line for line in read_log(workdir / "metrics.jsonl") if line["kind"] == kind]


def test_losses_of_sources_are_those_that_each_source_has_alone(recipe, run):
    workdir, report, _ = run
    stage, data, mesh = resolve(recipe)[0], open_data(recipe.data), make_mesh(RUN.mesh)
    loss = make_heldout_loss(stage.cfg, mesh)
    params = state_of(workdir, stage, 0)[0].params
    held, trained = lines(workdir, "heldout")[0], lines(workdir, "train")[0]
    batch, means = data.train().next(8), []
    for k, (name, source) in enumerate(zip(NAMES, recipe.data.mixture.sources, strict=True)):
        alone = open_data(dataclasses.replace(recipe.data, corpus=source.corpus))
        means.append(loss(params, alone.heldout(4, 4)))
        assert held[f"{name}/loss"] == pytest.approx(means[-1], rel=1e-5)
        assert held[f"{name}/bits_per_byte"] == bits_per_byte(held[f"{name}/loss"], alone.bytes_per_token)
        rows = batch.sources.numbers_B == k
        weights = batch.weights_BT * rows[:, None]
        own = loss(params, [batch._replace(weights_BT=weights, sources=None)])
        assert trained[f"{name}/loss"] == pytest.approx(own, rel=1e-5)
    shares = np.array([3, 1.5, 1]) / 5.5
    assert held["loss"] == pytest.approx(np.dot(shares, means), rel=1e-5)
    assert trained["loss"] == pytest.approx(loss(params, [batch._replace(sources=None)]), rel=1e-5)
    assert set(report["evals"][-1]["sources"]) == set(NAMES)


def test_a_source_that_a_stage_does_not_read_is_measured_still(run):
    train, held = (lines(run[0], kind)[-1] for kind in ("train", "heldout"))
    assert train["stage"] == "second" and "code/loss" not in train and "numbers/loss" in train
    assert held["stage"] == "second" and "code/loss" in held


def test_the_report_has_a_table_of_sources(run):
    workdir, report, _ = run
    row = report["stages"][-1]["sources"]["numbers"]
    assert row["bits_per_byte"] > 0
    assert (
        f"| numbers | {report['stages'][0]['sources']['numbers']['loss']:.4f} | {row['loss']:.4f} |"
        in (workdir / "report.md").read_text()
    )


def test_a_run_that_is_stopped_reads_each_window_of_each_source_in_turn(recipe, run):
    workdir, _, read = run
    assert [position for position, _ in read] == [8 * step for step in range(7)]
    sources, numbers = (np.concatenate([found[i] for _, found in read]) for i in (0, 1))
    for k in range(3):
        assert numbers[sources == k].tolist() == list(range(int((sources == k).sum())))
    assert not (sources[24:] == 1).any()
    last = resolve(recipe)[-1]
    order = json.loads(state_of(workdir, last, 4)[1][POSITION])["order"]
    drawn = np.bincount(sources[:24], minlength=3).tolist()
    assert order == {"weights": [1.0, 0.0, 3.0], "start": 24, "drawn": drawn}


def test_more_steps_than_the_sources_allow_are_refused_before_anything_is_written(recipe, tmp_path):
    long = dataclasses.replace(recipe.stages[1], steps=10**6, source_weights={"code": 1})
    with pytest.raises(ValueError, match=r"Stage 'second' needs 8,000,000 windows.*raise Source.epochs"):
        training.train(dataclasses.replace(recipe, stages=(recipe.stages[0], long)), RUN, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()
