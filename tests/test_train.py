"""Whole runs: what they report, stopped and resumed, on meshes of their own, and what stops or refuses them."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from flm_jax import stage_run
from flm_jax import train as training
from flm_jax.checkpoint import Checkpoints
from flm_jax.data.corpora import TextFolder
from flm_jax.data.reading import load_tensorflow
from flm_jax.data.source import open_data
from flm_jax.growth import Growth, GrowthError
from flm_jax.guards import NonFiniteError
from flm_jax.guards.watch import FIRST_STEP, STEP, Watch
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run, Stage, resolve
from flm_jax.records import check_identity
from flm_jax.run_comparison import read_run_curves
from flm_jax.savings.replicas import train_stage
from flm_jax.savings.target import run_flops
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.source_checkpoint import read_source
from flm_jax.step import StageProgram
from tests import small
from tests.runs import RAMP, RUN, StopAfter, measurements, recipe_of
from tests.small import shape, write_corpus

pytestmark = pytest.mark.integration


def digest(recipe: Recipe, run: Run, workdir: Path) -> str:
    """sha256 over every array of the last state."""
    stage = resolve(recipe)[-1]
    mesh = make_mesh(run.mesh)
    with Checkpoints(workdir / "checkpoints" / stage.directory, read_only=True) as store:
        state = store.restore(StageProgram(stage, mesh, 1).abstract_state, stage.steps).state
    return state_digest(state)


def state_digest(state) -> str:
    """sha256 over every array of a state."""
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
        whole.update(np.ascontiguousarray(leaf).tobytes())
    return whole.hexdigest()


@pytest.fixture(scope="session")
def watched():
    """What the watchdog was told of in the run that is never stopped, and of which step."""
    return []


@pytest.fixture(scope="session")
def reference(recipe, watched, tmp_path_factory):
    """The run that is never stopped."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "at", lambda watch, what, step: watched.append((what, step)))
        report = training.train(recipe, RUN, workdir, {"config.gin": "# as given"})
    return workdir, report, digest(recipe, RUN, workdir)


def test_a_step_that_compiles_is_told_apart_for_the_watchdog(reference, watched, recipe):
    """It is one where a stage begins, and after the last step of a ramp."""
    compiled, others = ([step for what, step in watched if what == kind] for kind in (FIRST_STEP, STEP))
    assert compiled == [1, 1, RAMP + 1, 1]
    assert sorted(compiled + others) == sorted(step for stage in recipe.stages for step in range(1, stage.steps + 1))


def test_a_run_learns_grows_exactly_and_reports(reference, recipe):
    workdir, report, _ = reference
    assert json.loads((workdir / "report.json").read_text()) == json.loads(json.dumps(report))
    losses = [s["eval_loss"] for s in report["stages"]]
    assert losses[-1] < losses[0] < np.log(264)
    for growth, method in zip(report["growths"], ("mask", "zero"), strict=True):
        assert growth["method"] == method
        assert growth["max_rel_logit_diff"] < 1e-5
        assert growth["eval_loss_before"] == pytest.approx(growth["eval_loss_after"], abs=5e-5)
        assert growth["params_after"] > growth["params_before"]
        assert len(growth["source_digest"]) == 64
    assert [s["tokens"] for s in report["stages"]] == [6 * 8 * 16, 8 * 8 * 16, 4 * 16 * 16]
    total = sum(s["flops"] for s in report["stages"])
    assert report["stages"][-1]["total_flops"] == total
    text = (workdir / "report.md").read_text()
    assert "| second | mask |" in text
    assert (workdir / "loss.png").stat().st_size > 5_000
    assert list((workdir / "events").rglob("events.out.tfevents*"))
    assert "blocks/attention/query" in (workdir / "parameters.txt").read_text()
    assert (workdir / "config.gin").read_text() == "# as given"


def test_a_run_of_a_study_is_this_run_bit_for_bit(reference, recipe):
    """What `flm_jax.savings` trains in memory: the same states and losses, without checkpoints."""
    snapshot = None
    for index in range(len(recipe.stages)):
        (snapshot,) = train_stage([recipe], index, [snapshot], RUN)
    assert state_digest(snapshot.state) == reference[2]
    assert [e["loss"] for e in snapshot.evals] == [e["loss"] for e in reference[1]["evals"]]
    assert snapshot.evals[-1]["flops"] == reference[1]["stages"][-1]["total_flops"] == run_flops(recipe)
    assert snapshot.evals[-1]["tokens"] == sum(stage["tokens"] for stage in reference[1]["stages"])


def test_a_stage_without_a_growth_continues_the_one_before_bit_for_bit(data, tmp_path):
    """At a constant rate, cutting a stage in two changes nothing: not the batches, the moments or Adam's count.

    Nor does stopping it. The moments are those of Muon, which leaves some parameters to AdamW.
    """
    steady = OptimizerConfig(learning_rate=1e-2, schedule="constant", name="muon")
    first, last = Stage("first", shape(), 3, 8, steady), Stage("last", shape(), 2, 8, steady)
    cut = recipe_of(data, first, last)
    training.train(cut, RUN, tmp_path / "run")
    (whole,) = train_stage([recipe_of(data, dataclasses.replace(first, steps=5))], 0, [None], RUN)
    expected = state_digest(whole.state.replace(step=np.int32(2)))
    assert digest(cut, RUN, tmp_path / "run") == expected
    last_step = tmp_path / "run" / "checkpoints" / "1_last" / "2"
    assert read_source(last_step).meta.record()["optimizer"] == "muon"
    shutil.rmtree(last_step)
    training.train(cut, RUN, tmp_path / "run")
    assert digest(cut, RUN, tmp_path / "run") == expected
    # What rises after a growth has risen by the end of its stage, so a stage that continues has no masks.
    grown = dataclasses.replace(last, growth=Growth("mask", ramp_steps=2), model=shape(layers=3))
    stages = resolve(recipe_of(data, first, grown, dataclasses.replace(grown, name="end", growth=None)))
    assert (stages[1].ramp_steps, stages[2].ramp_steps, stages[2].growth) == (2, 0, None)
    assert stages[2].lineage.growth == grown.growth


def test_stages_on_meshes_of_their_own_give_the_same_losses(reference, recipe, tmp_path):
    """The state moves from mesh to mesh where a stage begins."""
    meshes = {"second": MeshConfig(sequence=2, fsdp=4), "third": MeshConfig(data=4, tensor=2)}
    run = dataclasses.replace(RUN, meshes=meshes)
    training.train(recipe, run, tmp_path / "run")
    found = json.loads((tmp_path / "run/report.json").read_text())
    for mine, theirs in zip(found["stages"], reference[1]["stages"], strict=True):
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-4)
    assert found["growths"][0]["eval_loss_before"] == pytest.approx(
        reference[1]["growths"][0]["eval_loss_before"], abs=1e-5
    )
    with pytest.raises(ValueError, match="Run.meshes names other; the stages are first, second, third"):
        training.train(recipe, dataclasses.replace(RUN, meshes={"other": MeshConfig()}), tmp_path / "run")


def test_event_files_are_read_by_tensorboard(reference):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    load_tensorflow()  # the reader would import it otherwise, without what lets triton be loaded later
    workdir, report, _ = reference
    events = EventAccumulator(str(workdir / "events" / "1_second"))
    events.Reload()
    names = {
        "loss",
        "grad_norm",
        "grad_norm/new",
        "update_norm/attention",
        "seconds/step",
        "memory/process",
        "update_norm",
        "param_norm",
        "learning_rate",
        "mask",
        "tokens",
        "tokens_per_second",
    }
    assert {f"train/{n}" for n in names} <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("train/mask")][: RAMP + 1] == [0.0, 0.25, 0.5, 0.75, 1.0]
    held_out = [e for e in report["evals"] if e["stage"] == "second"]
    assert [e.value for e in events.Scalars("heldout/loss")] == pytest.approx([e["loss"] for e in held_out])
    # Steps and tokens go on where the stage before ended.
    first = report["stages"][0]
    assert [e.step for e in events.Scalars("heldout/loss")] == [first["steps"] + e["step"] for e in held_out]
    assert events.Scalars("train/tokens")[-1].value == report["stages"][1]["total_tokens"]
    (growth,) = report["growths"][:1]
    assert events.Scalars("growth/loss_before")[0].value == pytest.approx(growth["eval_loss_before"])


def test_every_measurement_is_a_line_of_metrics_jsonl(reference):
    workdir, report, _ = reference
    lines = measurements(workdir)
    by_kind = {
        kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "heldout", "growth", "save")
    }
    steps = [row["steps"] for row in report["stages"]]
    assert [line["step"] for line in by_kind["train"]] == list(range(1, sum(steps) + 1))
    assert [line["loss"] for line in by_kind["heldout"]] == [e["loss"] for e in report["evals"]]
    assert [(line["stage"], line["step"]) for line in by_kind["growth"]] == [
        ("second", steps[0]),
        ("third", steps[0] + steps[1]),
    ]
    assert by_kind["save"][-1]["step"] == sum(steps)
    last = report["stages"][-1]
    assert (lines[-1]["tokens"], lines[-1]["flops"]) == (last["total_tokens"], last["total_flops"])


def test_the_page_and_a_comparison_see_the_curves_that_the_report_has(reference, recipe):
    workdir, report, _ = reference
    curves = read_run_curves(workdir)
    assert [point.loss for point in curves.heldout] == [e["loss"] for e in report["evals"]]
    # The log's FLOPs are those of the models that were trained, the curves' those of the recipe.
    logged = [(line["tokens"], line["flops"]) for line in measurements(workdir) if line["kind"] == "train"]
    assert [(point.tokens, point.flops) for point in curves.train] == logged
    assert [stage.grown for stage, _ in curves.growths()] == ["mask", "zero"]
    assert not curves.notes and curves.device == "8 x cpu"
    assert '"heldout": [{' in (workdir / "report.html").read_text()


def test_stopped_everywhere_and_resumed_equals_never_stopped(reference, recipe, tmp_path, monkeypatch):
    """Within each stage, inside the mask ramp, at the borders of stages and of epochs, and one damaged checkpoint."""
    _, report, expected = reference
    consumed = sum(stage.steps * stage.batch_size for stage in recipe.stages)
    assert consumed > open_data(recipe.data).store.num_windows("train", 16), "the run must cross an epoch's border"
    starts, steps, result = 0, [], None
    while result is None:
        starts += 1
        assert starts < 30
        monkeypatch.setattr(training, "Interrupts", lambda asked=4 + starts % 3: StopAfter(asked))
        result = training.train(recipe, RUN, tmp_path / "run")
        found = sorted((int(p.parent.name[0]), int(p.name)) for p in (tmp_path / "run").glob("checkpoints/*/[0-9]*"))
        steps.append(found[-1])
    assert starts > 2
    assert any(step % RUN.checkpoint_every for _, step in steps), "a stop saves where it stopped, not where it is due"
    assert result == report
    assert digest(recipe, RUN, tmp_path / "run") == expected
    found, whole = (
        [line for line in measurements(w) if line["kind"] not in ("save", "start")]
        for w in (tmp_path / "run", reference[0])
    )
    assert found == whole


def test_lines_of_the_log_that_a_kill_prevented_are_written_when_the_run_goes_on(
    reference, recipe, tmp_path, monkeypatch
):
    """A growth is saved before its lines are written, a step before the line of its save: they are taken away here."""
    log = tmp_path / "run" / "metrics.jsonl"

    def go_on(checks):
        monkeypatch.setattr(training, "Interrupts", lambda: StopAfter(checks))
        assert training.train(recipe, RUN, tmp_path / "run") is None
        return [
            line for line in measurements(tmp_path / "run") if line["stage"] == "second" and line["kind"] != "start"
        ]

    def cut(kinds):
        lines = log.read_text().splitlines(keepends=True)
        assert [json.loads(line)["kind"] for line in lines[-len(kinds) :]] == kinds
        log.write_text("".join(lines[: -len(kinds)]))

    go_on(8)  # at the start of the second stage
    cut(["growth", "heldout"])
    go_on(2)
    cut(["save"])
    found = go_on(1)
    whole = [line for line in measurements(reference[0]) if line["stage"] == "second" and line["stage_step"] <= 2]
    assert [line for line in found if line["stage_step"] <= 2] == whole
    assert [line["kind"] for line in whole] == ["growth", "heldout", "train", "train", "save"]


def test_a_damaged_last_checkpoint_is_refused_and_the_one_before_leads_to_the_same_end(
    reference, recipe, tmp_path, monkeypatch, caplog
):
    _, report, expected = reference
    monkeypatch.setattr(training, "Interrupts", lambda: StopAfter(12))
    assert training.train(recipe, RUN, tmp_path / "run") is None
    monkeypatch.undo()
    newest = max((tmp_path / "run" / "checkpoints").glob("*/[0-9]*"), key=lambda p: p.stat().st_mtime)
    victim = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    assert training.train(recipe, RUN, tmp_path / "run") == report
    assert "REFUSED" in caplog.text
    assert digest(recipe, RUN, tmp_path / "run") == expected


def test_a_growth_that_breaks_its_promise_stops_the_run(reference, recipe, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    from flm_jax.step import growers as steps

    honest = steps.grow_params

    def broken(*args):
        grown = honest(*args)
        return {**grown, "embedding": grown["embedding"] * 1.01}

    monkeypatch.setattr(steps, "grow_params", broken)
    with pytest.raises(GrowthError, match="more than the tolerance of 1e-05; layer 0 of the grown model is the first"):
        training.train(recipe, RUN, workdir)
    assert not (workdir / "checkpoints" / "1_second" / "0").exists()


def test_steps_that_are_not_finite_are_skipped_counted_and_then_stop_the_run(recipe, tmp_path, monkeypatch):
    honest = stage_run.put_batch

    def poisoned(bad):
        calls = iter(range(10_000))

        def put(batch, mesh, *size):
            factor = np.float32(np.nan if batch.weights_BT.shape[0] == 8 and next(calls) in bad else 1)
            return honest(batch._replace(weights_BT=batch.weights_BT * factor), mesh, *size)

        return put

    one = dataclasses.replace(recipe, stages=recipe.stages[:1])
    monkeypatch.setattr(stage_run, "put_batch", poisoned({2}))
    report = training.train(one, RUN, tmp_path / "one")
    assert report["skipped_steps"] == [{"stage": "first", "step": 3, "windows": [16, 23]}]
    assert np.isfinite(report["stages"][0]["eval_loss"])
    monkeypatch.setattr(stage_run, "put_batch", poisoned({2, 3, 4, 5}))
    with pytest.raises(NonFiniteError, match=r"Stage 'first': 3 steps in a row, up to step 5.*None of them"):
        training.train(one, RUN, tmp_path / "three")
    skipped = [line for line in measurements(tmp_path / "three") if line["kind"] == "skip"]
    assert [(line["step"], line["loss"]) for line in skipped] == [(3, None), (4, None), (5, None)]
    monkeypatch.setattr(stage_run, "put_batch", honest)
    with pytest.raises(
        NonFiniteError,
        match=r"Stage 'first', step 1: the loss is 5\.\d+ nats per token, more than 0.9 times that of a uniform guess "
        r"\(5.576; its batch: windows 0 to 7 of the run\): training has diverged",
    ):
        training.train(one, dataclasses.replace(RUN, max_loss=0.9), tmp_path / "far")


def snapshot(folder: Path):
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


def test_another_recipe_other_data_or_a_foreign_folder_are_refused_and_nothing_is_touched(
    reference, recipe, tmp_path, data
):
    workdir, _, _ = reference
    before = snapshot(workdir)
    with pytest.raises(ValueError, match="was begun with another recipe: seed: 0 there, 1 here.*Nothing was changed"):
        training.train(dataclasses.replace(recipe, seed=1), RUN, workdir)
    assert snapshot(workdir) == before

    changed = tmp_path / "changed"
    write_corpus(changed)
    moved = dataclasses.replace(data, corpus=TextFolder(str(changed)))
    one = dataclasses.replace(recipe, stages=recipe.stages[:1], data=moved)
    training.train(one, RUN, tmp_path / "run")
    (changed / "07.txt").write_text("one document is not what it was\n" * 20)
    before = snapshot(tmp_path / "run")
    with pytest.raises(ValueError, match="was begun with other data or another start: .*digest"):
        training.train(one, RUN, tmp_path / "run")
    assert snapshot(tmp_path / "run") == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not a work directory"):
        training.train(one, RUN, foreign)
    with pytest.raises(
        ValueError, match=r"the vocabulary has 259 tokens, the model's embedding only 100; set its vocab"
    ):
        tiny = dataclasses.replace(one.stages[0], model=small.config(vocab=100))
        training.train(dataclasses.replace(one, stages=(tiny,)), RUN, tmp_path / "tiny")
    # A start that was refused does not claim the directory.
    assert not (tmp_path / "tiny").exists()
    check_identity(tmp_path / "tiny", "recipe.json", {}, "another recipe")
