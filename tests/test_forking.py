"""Runs that fork from another one: the same run where nothing changes; what may change, how it counts, what is told."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest

from flm_jax import costs, forking
from flm_jax import train as training
from flm_jax.checkpoint import CheckpointError, NoCheckpointError, read_manifest
from flm_jax.checkpoint.directory import take_lock
from flm_jax.checkpoint.manifest import read_blobs, read_meta
from flm_jax.checkpoint_care import describe, list_checkpoints
from flm_jax.checkpoint_care.text import description_text, listing_text
from flm_jax.data.mixture_batches import MixtureBatches
from flm_jax.distillation import Teacher
from flm_jax.forking.old import read_old
from flm_jax.growth import Growth
from flm_jax.guards import SpikeGuard
from flm_jax.optimizer import OptimizerConfig, schedule
from flm_jax.recipe import Run, Stage
from flm_jax.records import DATA, FORK, RECIPE
from flm_jax.records.foreign_json import read_json
from flm_jax.report import _sources, forked_at
from flm_jax.run_comparison import compare_runs, markdown, read_run_curves
from flm_jax.sharding import MeshConfig
from flm_jax.source_checkpoint import POSITION
from flm_jax.tracking import read_fork, read_log
from tests.golden_run import RUN as GOLDEN
from tests.mixtures import CONTEXT, changed, write
from tests.pretend import pretending
from tests.runs import StopAfter, recipe_of
from tests.small import shape

HOW = Run(mesh=MeshConfig(fsdp=2, tensor=2), checkpoint_every=2, log_every=1, keep=99, sample_tokens=2)
DECAYS = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, decay_steps=2)
STEADY = OptimizerConfig(learning_rate=1e-2, schedule="constant")

pretended = pytest.fixture(scope="module", autouse=True)(pretending)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A stage whose rate decays, and one that grows by masks, on three sources, with other weights in the second."""
    first = Stage("first", shape(layers=1), 4, 8, DECAYS)
    growth = Growth("mask", ramp_steps=4)
    second = Stage("second", shape(layers=2), 6, 8, STEADY, growth, source_weights={"prose": 1.0, "numbers": 2.0})
    return recipe_of(write(tmp_path_factory.mktemp("mixture")), first, second, eval_windows=8, eval_every=4)


@pytest.fixture(scope="module")
def old(recipe, tmp_path_factory):
    """The run that is forked from, never stopped; nothing is written there."""
    workdir = tmp_path_factory.mktemp("old") / "old"
    training.train(recipe, HOW, workdir)
    before = files(workdir)
    yield workdir
    assert files(workdir) == before


def files(folder: Path) -> dict:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def at(workdir, step, stage="0_first") -> Path:
    return workdir / "checkpoints" / stage / str(step)


def digest(workdir, step=6, stage="1_second") -> str:
    return read_manifest(at(workdir, step, stage)).state_digest


def staged(recipe, *stages, **fields):
    """The recipe with other stages; with none, its own, the first with other fields."""
    first = dataclasses.replace(recipe.stages[0], **fields)
    return dataclasses.replace(recipe, stages=stages or (first, *recipe.stages[1:]))


def lines(workdir, kind):
    return [line for line in read_log(workdir / "metrics.jsonl") if line["kind"] == kind]


@pytest.mark.parametrize("stage, step", [("0_first", 2), ("0_first", 4), ("1_second", 0), ("1_second", 2)])
def test_a_fork_that_changes_nothing_ends_where_the_run_ends(old, recipe, tmp_path, stage, step):
    """From within a stage, from its end, right after a growth, and from the middle of its ramp."""
    new = tmp_path / "new"
    report = training.train(recipe, HOW, new, fork=at(old, step, stage))
    assert digest(new) == digest(old)
    assert digest(new, step, stage) == digest(old, step, stage)
    expected = json.loads((old / "report.json").read_text())
    (fork,) = report.pop("forks")
    assert (fork["checkpoint"], fork["digest"]) == (str(at(old, step, stage)), digest(old, step, stage))
    assert fork["changes"] == []
    windows = 8 * (step + 4 * (stage == "1_second"))
    assert fork["notes"] == [
        f"The data goes on after the {windows} windows that were read: none is left out or comes twice."
    ]
    measured = [e for e in report["evals"] if (e["stage"], e["step"]) != (stage[2:], step) or e in expected["evals"]]
    assert {**report, "evals": measured} == expected
    if step == 0:
        provenance = (
            read_meta(one, read_manifest(one))["provenance"] for one in (at(new, 0, stage), at(old, 0, stage))
        )
        assert len({json.dumps(p) for p in provenance}) == 1


@pytest.fixture(scope="module")
def longer(old, recipe, tmp_path_factory):
    """A finished stage that goes on: more steps at the stable rate and half the batch, from before its decay."""
    optimizer = dataclasses.replace(DECAYS, learning_rate=5e-3)
    stages = (dataclasses.replace(recipe.stages[0], steps=8, batch_size=4, optimizer=optimizer),)
    made, read, honest = staged(recipe, *stages), [], MixtureBatches.next

    def recorded(self, batch_size, rows=None):
        read.append((self.position, *self.order.span(self.position, batch_size)))
        return honest(self, batch_size, rows)

    workdir = tmp_path_factory.mktemp("longer") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixtureBatches, "next", recorded)
        patch.setattr(training, "Interrupts", lambda: StopAfter(3))
        assert training.train(made, HOW, workdir, fork=at(old, 2)) is None
        patch.undo()
        patch.setattr(MixtureBatches, "next", recorded)
        return workdir, training.train(made, HOW, workdir), read, made


def test_other_steps_rate_and_batch_size_hold_from_the_fork_on(longer):
    """Stopped on the way, and started again without --fork."""
    workdir, _, read, made = longer
    optimizer = made.stages[0].optimizer
    rates = [line["learning_rate"] for line in lines(workdir, "train")]
    assert rates == pytest.approx([float(schedule(optimizer, 8)(step)) for step in range(2, 8)])
    fork = read_fork(workdir)
    assert [str(change) for change in fork.changes] == [
        "stages.first.steps: 4 -> 8",
        "stages.first.batch_size: 8 -> 4",
        "stages.first.optimizer.learning_rate: 0.01 -> 0.005",
        "stages.second: a Stage -> -",
    ]
    assert fork.notes[0] == "The learning rate of stage 'first' goes from 0.01 to 0.005 at step 2."
    assert [position for position, _, _ in read] == [16, 20, 24, 28, 32, 36]


def test_no_window_is_read_twice_or_left_out(longer, old):
    _, _, read, _ = longer
    before = json.loads(read_blobs(at(old, 2), read_manifest(at(old, 2)))[POSITION])
    assert before["position"] == 16
    _, sources, numbers = (np.concatenate([found[i] for found in read]) if i else None for i in range(3))
    begun = MixtureBatches(training.open_data(longer[3].data).parts, CONTEXT, 0)
    for k, count in enumerate(begun.order.counts(16)):
        own = numbers[sources == k]
        assert own.tolist() == list(range(count, count + len(own)))


def test_tokens_and_flops_count_from_the_start_of_the_run_before(longer, old):
    workdir, report, _, made = longer
    per_token = costs.train_flops_per_token(made.stages[0].model, CONTEXT)
    tokens = (2 * 8 + 6 * 4) * CONTEXT
    (row,) = report["stages"]
    assert (row["tokens"], row["total_tokens"], row["flops"]) == (tokens, tokens, tokens * per_token)
    assert [(e["step"], e["tokens"], e["flops"]) for e in report["evals"]] == [
        (step, own * CONTEXT, own * CONTEXT * per_token) for step, own in ((0, 0), (2, 16), (4, 24), (8, 40))
    ]
    assert report["evals"][0] == json.loads((old / "report.json").read_text())["evals"][0]
    logged = [(line["step"], line["tokens"], line["flops"]) for line in lines(workdir, "heldout")]
    assert logged == [(step, own * CONTEXT, own * CONTEXT * per_token) for step, own in ((2, 16), (4, 24), (8, 40))]
    stages = forking.with_fork(training.resolve(made), read_fork(workdir))
    assert forked_at(stages, report, CONTEXT) == [("forked at step 2", 16 * CONTEXT * per_token)]
    curves = read_run_curves(workdir)
    assert [(p.step, p.tokens, p.flops) for p in curves.heldout] == logged
    assert [(p.step, p.tokens) for p in curves.train][:2] == [(3, 20 * CONTEXT), (4, 24 * CONTEXT)]
    assert any("Its curve begins there" in note for note in curves.notes)
    assert [(e.step, e.tokens) for e in list_checkpoints(workdir).entries] == [
        (step, own * CONTEXT) for step, own in ((2, 16), (4, 24), (5, 28), (6, 32), (8, 40))
    ]


def test_programs_name_the_run_before_and_what_changed(longer, old):
    workdir, _, _, _ = longer
    where, change = str(at(old, 2)), "stages.first.batch_size: 8 -> 4"
    texts = [
        listing_text(list_checkpoints(workdir)),
        description_text(describe(at(workdir, 8))),
        (workdir / "report.md").read_text(),
    ]
    assert all(where in text and change in text for text in texts)
    found = compare_runs([str(old), str(workdir)])
    assert f"Forked from {where}" in markdown(found)
    # The fork has no loss where the run before had spent less than at the fork.
    assert len(found.at_equal_flops) == 1
    assert where in (workdir / "report.html").read_text()


def test_a_fork_of_a_fork_without_the_runs_before_it(longer, old, recipe, tmp_path):
    """Both are deleted once the third has a checkpoint of its own."""
    between, new = tmp_path / "between", tmp_path / "new"
    shutil.copytree(longer[0], between)
    third = dataclasses.replace(longer[3].stages[0], batch_size=16)
    made = staged(recipe, third)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Interrupts", lambda: StopAfter(1))
        assert training.train(made, HOW, new, fork=at(between, 6)) is None
    shutil.rmtree(between)
    report = training.train(made, HOW, new, fork=at(between, 6))
    assert report["stages"][0]["tokens"] == (2 * 8 + 4 * 4 + 2 * 16) * CONTEXT
    assert [fork["checkpoint"] for fork in report["forks"]] == [str(at(old, 2)), str(at(between, 6))]
    assert read_run_curves(new).heldout[-1].tokens == report["stages"][0]["tokens"]
    text = description_text(describe(new))
    assert f"{at(old, 2)}" in text and f"{at(between, 6)}" in text
    with pytest.raises(ValueError, match=r"holds a fork of .*between.*, and --fork=.*old names another one"):
        training.train(made, HOW, new, fork=old)


def test_a_rate_that_has_decayed_is_told_with_the_checkpoints_from_before(old, recipe):
    only = staged(recipe, dataclasses.replace(recipe.stages[0], steps=6))
    fork = planned(only, at(old, 4))
    assert fork.notes[1:] == (
        "Its decay began at step 2 there, so that the last 2 steps of this checkpoint had falling rates; a fork from a "
        "checkpoint up to step 2 keeps the stable rate: 0, 2.",
    )
    assert fork.notes[0] == "The learning rate of stage 'first' goes from 0.005 to 0.01 at step 4."
    assert planned(only, at(old, 2)).notes == ()
    assert list(forking.preview(only, at(old, 4)))[1:] == [
        "  stages.first.steps: 4 -> 6",
        "  stages.second: a Stage -> -",
        *fork.notes,
    ]


def planned(recipe, step):
    source, stages = training.begin(recipe)
    return forking.planned(recipe, stages, source, str(step), step)


def test_other_weights_and_sources_are_told_and_recorded(old, recipe, tmp_path):
    """What the mixture supplies is counted from the fork on."""
    data = changed(recipe.data, prose={"weight": 1.0}, code={"epochs": 1.0})
    made = staged(dataclasses.replace(recipe, data=data), dataclasses.replace(recipe.stages[0], batch_size=4))
    report = training.train(made, HOW, tmp_path / "new", fork=at(old, 2))
    (fork,) = report["forks"]
    assert {"field": "data.corpus.sources.prose.weight", "old": 3.0, "new": 1.0} in fork["changes"]
    assert [change["field"] for change in fork["changes"]][-1] == "data.digest"
    assert "Of the data, prose goes on after 8 windows, code goes on after 6 windows" in fork["notes"][0]
    assert fork["notes"][1].startswith("The held-out loss is measured on other text from here on")
    # Measured once more, on the text that is measured from here on.
    assert [(e["step"], len(e["sources"])) for e in report["evals"]] == [(0, 3), (2, 3), (4, 3)]


def test_other_data_is_read_from_its_beginning_and_measured_at_once(old, recipe, tmp_path):
    """One of the corpora alone, in another order."""
    data = dataclasses.replace(recipe.data, corpus=recipe.data.mixture.sources[0].corpus, seed=1)
    made = staged(dataclasses.replace(recipe, data=data), dataclasses.replace(recipe.stages[0], steps=4))
    report = training.train(made, HOW, tmp_path / "new", fork=at(old, 2))
    step = at(tmp_path / "new", 4)
    assert json.loads(read_blobs(step, read_manifest(step))[POSITION])["position"] == 2 * 8
    (fork,) = report["forks"]
    assert fork["position"] is None and "starts from its beginning" in fork["notes"][0]
    assert {"data.corpus", "data.seed", "data.digest"} <= {change["field"] for change in fork["changes"]}
    assert [(e["step"], "sources" in e) for e in report["evals"]] == [(0, True), (2, False), (4, False)]
    assert report["stages"][0]["tokens"] == 4 * 8 * CONTEXT


def test_a_report_has_no_loss_of_a_source_from_before_it_was_read():
    rows = [{"name": "a"}, {"name": "b", "sources": {"x": {"loss": 1.0, "bits_per_byte": 2.0}}}]
    assert _sources(rows)[-1] == "| x | - | 1.0000 | 2.000 |"


REFUSED = {
    "model": (dict(model=shape(layers=1, embed=32)), r"stages.second.model.embed is 24 there and 32 here.*by a growth"),
    "growth": (dict(growth=Growth("mask", ramp_steps=5)), r"stages.second.growth.ramp_steps is 4 there and 5 here"),
    "train": (dict(train="new"), "stages.second.train is 'all' there and 'new' here"),
    "steps": (dict(steps=4), r"it is at step 6, and stages.second.steps is 4 here \(there 6\).*checkpoint: 0, 2, 4"),
    "name": (dict(name="other"), "up to there are first, second, and here first, other"),
    "end": (dict(), r"1_second/6 is the end of this recipe: raise stages.second.steps = 6.*checkpoint: 0, 2, 4"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_change_is_refused_field_by_field(old, recipe, what):
    fields, message = REFUSED[what]
    second = dataclasses.replace(recipe.stages[1], **fields)
    if what == "model":
        second = dataclasses.replace(second, model=shape(layers=2, embed=32))
    with pytest.raises(ValueError, match=message):
        planned(staged(recipe, recipe.stages[0], second), at(old, 6, "1_second"))


def test_a_stage_that_is_over_and_another_start_are_refused(old, recipe, tmp_path):
    made = staged(recipe, batch_size=16)
    with pytest.raises(ValueError, match=r"stages.first.batch_size is 8 there and 16 here. Note: what was over"):
        planned(made, at(old, 2, "1_second"))
    made = staged(recipe, dataclasses.replace(recipe.stages[0], optimizer=dataclasses.replace(DECAYS, name="muon")))
    with pytest.raises(ValueError, match=r"stages.first.optimizer.name is 'adamw' there and 'muon' here.*='fresh'"):
        planned(made, at(old, 2))
    made = dataclasses.replace(staged(recipe, steps=8), start=str(at(old, 4)))
    with pytest.raises(ValueError, match=r"Recipe.start was none there, and is a checkpoint of digest \w{12} here"):
        planned(made, at(old, 2))


def test_another_vocabulary_is_refused_and_nobody_is_told_to_enlarge_the_model_for_it(
    old, recipe, tmp_path, monkeypatch
):
    other = types.SimpleNamespace(vocabulary=types.SimpleNamespace(digest="0" * 64, size=1 << 20))
    monkeypatch.setattr(training, "open_data", lambda config: other)
    with pytest.raises(
        ValueError, match=r"the vocabulary has the digest \w{12} there and 0{12} here.*Pretrained.path ="
    ):
        training.train(staged(recipe, steps=8), HOW, tmp_path / "new", fork=at(old, 2))


def test_guards_remember_losses_only_as_long_as_they_are_comparable(old, recipe):
    """An earlier window of losses would make spikes of the first steps on other data."""
    data = read_json(old / DATA)

    def memory(made, identity=data):
        return planned(made, at(old, 2)).memory(identity)

    assert memory(staged(recipe, steps=8, optimizer=dataclasses.replace(DECAYS, learning_rate=1e-3))) is not None
    assert memory(staged(recipe, recipe.stages[0], dataclasses.replace(recipe.stages[1], batch_size=16))) is not None
    for fields in (dict(batch_size=16), dict(z_loss=1e-4), dict(source_weights={"prose": 1.0})):
        assert memory(staged(recipe, **fields)) is None
    assert memory(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, packing="joined"))) is None
    assert memory(dataclasses.replace(recipe, spike_guard=SpikeGuard())) is None
    assert memory(staged(recipe, steps=8), {**data, "digest": "of other texts"}) is None


def test_a_loss_that_was_measured_with_another_packing_is_measured_again(old, recipe):
    data = read_json(old / DATA)
    assert planned(recipe, at(old, 0)).measured(data, recipe.eval_windows) is not None
    joined = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, packing="joined"))
    assert planned(joined, at(old, 0)).measured(data, recipe.eval_windows) is None


def test_a_run_that_trains_meanwhile_is_read_up_to_its_last_whole_checkpoint(old, recipe, tmp_path):
    there = tmp_path / "old"
    shutil.copytree(old, there, ignore=shutil.ignore_patterns("1_second"))
    shutil.copytree(at(old, 4), at(there, "6.partial"))
    (at(there, 8)).mkdir()
    with take_lock(there), take_lock(there / "checkpoints/0_first"):
        assert forking.located(tmp_path / "new", there) == str(at(there, 4))
        training.train(
            staged(recipe, dataclasses.replace(recipe.stages[0], steps=6)), HOW, tmp_path / "new", fork=there
        )
    assert at(tmp_path / "new", 6).is_dir()


def test_a_run_of_an_earlier_version_can_be_forked_from():
    found = read_old(GOLDEN)
    assert (found.index, found.step, found.stage["name"]) == (1, 1, "second")


def test_places_that_cannot_be_forked_from_or_to(old, recipe, tmp_path):
    shutil.copytree(at(old, 2), tmp_path / "copy")
    for path, error, message in (
        (tmp_path / "copy", CheckpointError, "does not lie in the work directory of a run.*by Recipe.start"),
        (tmp_path / "none", NoCheckpointError, "none is no directory"),
    ):
        with pytest.raises(error, match=message):
            training.train(recipe, HOW, tmp_path / "new", fork=path)
    with pytest.raises(ValueError, match="lies in .*old, the run to fork from, where nothing is written"):
        forking.located(old / "inside", at(old, 2))
    shutil.copytree(at(old, 2), at(tmp_path / "plain", 2))
    shutil.copy(old / RECIPE, tmp_path / "plain")
    with pytest.raises(ValueError, match="plain holds a run that did not begin with --fork="):
        forking.located(tmp_path / "plain", old)
    assert not (tmp_path / "new").exists()


def test_a_fork_that_was_killed_before_its_first_checkpoint_begins_again(old, recipe, tmp_path, monkeypatch):
    new, made = tmp_path / "new", staged(recipe, dataclasses.replace(recipe.stages[0], steps=6))
    with monkeypatch.context() as patch:
        patch.setattr(training.StageRun, "adopt", lambda *given: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            training.train(made, HOW, new, fork=at(old, 2))
    assert (new / FORK).is_file()
    for written_later in ("recipe.json", "data.json"):
        (new / written_later).unlink()
    shutil.rmtree(new / "checkpoints")
    for record in new.glob("*.txt"):
        record.unlink()
    training.train(made, HOW, new)
    assert digest(new, 2, "0_first") == digest(old, 2, "0_first") and at(new, 6).is_dir()


def test_the_model_that_a_stage_grew_from_comes_along_as_its_teacher(old, recipe, tmp_path):
    taught = dataclasses.replace(recipe.stages[1], teacher=Teacher(steps=4))
    new = tmp_path / "new"
    training.train(staged(recipe, recipe.stages[0], taught), HOW, new, fork=at(old, 2, "1_second"))
    assert digest(new, 4, "0_first") == digest(old, 4, "0_first")
    assert [line["step"] for line in lines(new, "train")] == [7, 8, 9, 10]
    assert digest(new) != digest(old)
