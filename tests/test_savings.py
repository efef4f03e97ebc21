"""A study of savings: its runs are those of a launcher, stages are shared, and what is done is not done again."""

import concurrent.futures
import dataclasses
import json
import math
import os
import time
import types

import jax
import numpy as np
import pytest

from flm_jax import train as training
from flm_jax.checkpoint import Checkpoints
from flm_jax.costs import orthogonalisation_flops
from flm_jax.data.corpora import TextFolder
from flm_jax.data.source import open_data
from flm_jax.distillation import Teacher
from flm_jax.growth import Growth
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Stage, resolve
from flm_jax.savings import execute
from flm_jax.savings import results as kept
from flm_jax.savings.execute import How, Task, perform, tasks_of, train_all
from flm_jax.savings.replicas import Snapshot, recipe_record, stages_record, train_stage
from flm_jax.savings.results import Arm
from flm_jax.savings.run import run_steps
from flm_jax.savings.second_text import _Loss, _measured, measure, on_second_text, windows
from flm_jax.savings.snapshots import Snapshots
from flm_jax.savings.study import STEPS, Study, missing
from flm_jax.savings.summary import summarise
from flm_jax.savings.target import GrowthPoint, PlanGrid, Target, Tuning, run_recipe, seeded
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.state import TrainState, abstract_state
from tests.runs import RUN, recipe_of
from tests.small import shape, write_corpus

pytestmark = pytest.mark.integration


def trained(recipe):
    """The snapshot at the end of a recipe."""
    snapshot = None
    for index in range(len(recipe.stages)):
        (snapshot,) = train_stage([recipe], index, [snapshot])
    return snapshot


@pytest.mark.slow
def test_a_stage_with_a_teacher_and_frozen_entries_is_that_of_the_launcher(data, tmp_path):
    """The teacher is the model before the growth; then all entries train again."""
    steady = OptimizerConfig(learning_rate=1e-2, schedule="constant", name="muon")
    taught = Stage(
        "taught", shape(layers=3), 3, 8, steady, Growth("zero", depth="distance"), train="new", teacher=Teacher(steps=2)
    )
    recipe = recipe_of(
        data, Stage("first", shape(), 2, 8, steady), taught, Stage("last", shape(layers=3), 1, 8, steady)
    )
    run = dataclasses.replace(RUN, mesh=MeshConfig())
    report = training.train(recipe, run, tmp_path / "run")
    snapshot = trained(recipe)
    stage = resolve(dataclasses.replace(recipe, stages=tuple(placed(recipe, snapshot))))[-1]
    abstract = abstract_state(stage.lineage, make_mesh(), optimizer="muon")
    with Checkpoints(tmp_path / "run/checkpoints" / stage.directory, read_only=True) as store:
        theirs = jax.device_get(store.restore(abstract, stage.steps).state)
    for mine, other in zip(jax.tree.leaves(snapshot.state), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert [e["loss"] for e in snapshot.evals if e["step"]] == [e["loss"] for e in report["evals"] if e["step"]]
    extra = snapshot.evals[-1]["flops"] - report["stages"][-1]["total_flops"]
    assert extra == sum(s.steps * orthogonalisation_flops(s.cfg, 5) for s in resolve(recipe))


def placed(recipe, snapshot):
    """The stages of a recipe, with their layers where a run has placed them."""
    for number, stage in enumerate(recipe.stages):
        yield dataclasses.replace(stage, growth=snapshot.placed.get(number, stage.growth))


def test_replicas_are_the_runs_that_they_would_be_alone(data):
    """Seeds and rates are mapped over; nothing of one run reaches another."""
    steady = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    recipe = recipe_of(
        data,
        Stage("first", shape(), 3, 8, steady),
        Stage("grown", shape(layers=3), 3, 8, dataclasses.replace(steady, learning_rate=2e-2), Growth("zero")),
    )
    slow = tuple(
        dataclasses.replace(stage, optimizer=dataclasses.replace(stage.optimizer, learning_rate=4e-3))
        for stage in recipe.stages
    )
    recipes = [recipe, seeded(recipe, 1), dataclasses.replace(recipe, stages=slow)]
    together = [None] * 3
    for index in range(2):
        together = train_stage(recipes, index, together)
    assert len({snapshot.evals[-1]["loss"] for snapshot in together}) == 3
    for one, snapshot in list(zip(recipes, together, strict=True))[1:]:
        alone = trained(one)
        for mine, other in zip(jax.tree.leaves(snapshot.state), jax.tree.leaves(alone.state), strict=True):
            np.testing.assert_allclose(mine, other, rtol=2e-4, atol=2e-6)
        assert snapshot.position == alone.position
        assert [e["loss"] for e in snapshot.evals] == pytest.approx([e["loss"] for e in alone.evals], abs=2e-5)
    with pytest.raises(ValueError, match="equal but for their seeds and learning rates"):
        train_stage([recipe, dataclasses.replace(recipe, loss_chunks=2)], 0, [None, None])


@pytest.fixture(scope="module")
def study(data):
    """A study that takes seconds."""
    target = Target("tiny", shape(layers=2), data, 8, tokens_per_param=0.1, warmup_steps=1, eval_windows=8)
    return Study(
        target,
        grids={"when": PlanGrid({"1layer": {"layers": 1}}, [0.5], {"zero": Growth("zero"), "stack": Growth("stack")})},
        rates=(1e-3, 1e-1),
        budgets=(0.1,),
        schedules=("wsd",),
        seeds=2,
        second_text=data.corpus,
    )


def test_recipes_of_runs_share_stages_and_add_up(study):
    target, tuning = study.target, Tuning(1e-2)
    whole = run_recipe(target, target.model, tuning, 0.3, cuts=(0.1, 0.2))
    shorter = run_recipe(target, target.model, tuning, 0.2, cuts=(0.1,))
    assert whole.stages[:2] == shorter.stages[:2]
    for recipe, budget in ((whole, 0.3), (shorter, 0.2)):
        assert sum(stage.steps for stage in recipe.stages) == target.steps(budget)
        assert recipe.stages[-1].steps == round(0.2 * target.steps(budget))
        assert [stage.optimizer.warmup_steps for stage in recipe.stages] == [1] + [0] * (len(recipe.stages) - 1)
    linear = run_recipe(target, target.shape(layers=1), Tuning(1e-2, "linear"), 0.2, [GrowthPoint(0.5, Growth("zero"))])
    spans = [(s.optimizer.decay_passed, s.optimizer.decay_span) for s in linear.stages]
    assert spans == [(0, target.steps(0.2)), (linear.stages[0].steps, target.steps(0.2))]
    for points in ([GrowthPoint(0.85, Growth("zero"))], [GrowthPoint(0.5, Growth("zero"))] * 2):
        with pytest.raises(ValueError, match="Growths of a run must be"):
            run_recipe(target, target.shape(layers=1), tuning, 0.2, points)
    twice = [GrowthPoint(0.3, Growth("zero"), {"layers": 2}), GrowthPoint(0.5, Growth("zero"))]
    for frozen, what in ((0.25, "it grows again"), (0.4, "it grows again")):
        with pytest.raises(ValueError, match=rf"frozen={frozen} lets old entries rest until step \d+ .* {what}"):
            run_recipe(target, target.shape(layers=1), tuning, 0.2, twice, frozen=frozen)
    with pytest.raises(ValueError, match=r"frozen=0.0001 of \d+ steps is less than one: give a larger share"):
        run_recipe(target, target.shape(layers=1), tuning, 0.2, twice, frozen=1e-4)
    with pytest.raises(ValueError, match=r"frozen=0.4 lets old entries rest .* its decay begins: give a smaller"):
        run_recipe(target, target.shape(layers=1), tuning, 0.2, twice[1:], frozen=0.4)


def test_a_study_runs_to_its_end_keeps_what_it_found_and_does_nothing_twice(study, tmp_path, capsys):
    how = How(Snapshots(tmp_path / "snapshots"), replicas=4)
    found = run_steps(study, list(STEPS), tmp_path / "results", how)
    for step in STEPS.values():
        assert not missing(list(step(study, found)), found)
    assert set(study.all_plans) == {"when-1layer-0.5-zero", "when-1layer-0.5-stack"} <= set(found)
    for result in found.values():
        last = result.runs[0]["evals"][-1]
        if math.isfinite(last["loss"]):
            assert (last["tokens"], last["flops"]) == (result.tokens, result.flops)
    assert found["when-1layer-0.5-zero"].growths()[0][0] == pytest.approx(0, abs=1e-5)
    capsys.readouterr()
    before = sorted((tmp_path / "snapshots").iterdir())
    again = run_steps(study, list(STEPS), tmp_path / "results", dataclasses.replace(how, deadline=0.0))
    assert capsys.readouterr().out == ""
    assert [r.record() for r in again.values()] == [r.record() for r in dict(sorted(found.items())).values()]
    assert sorted((tmp_path / "snapshots").iterdir()) == before
    # The second text of this study is its first one.
    same = on_second_text(study, found)
    assert len(same) >= 3
    for name, result in same.items():
        assert result.losses == pytest.approx(found[name].losses, rel=1e-6)
    summary = summarise(study, found)
    assert [row.preserving for row in summary.rows] == [True, False]
    assert summary.noise > 0


def test_a_second_text_that_has_changed_is_measured_again(study, tmp_path, monkeypatch):
    write_corpus(tmp_path / "texts")
    study = dataclasses.replace(study, rates=(1e-3, 1e-2), second_text=TextFolder(str(tmp_path / "texts")))
    arm = next(iter(STEPS["tune"](study, {})))
    how = How(Snapshots(tmp_path / "snapshots"))
    train_all(arm.recipes, how)
    found = {arm.name: kept.collect(arm, how.snapshots)}
    once = measure(study, found, tmp_path / "results", how.snapshots)
    assert kept.read(tmp_path / "results") == once
    assert on_second_text(study, once)[arm.name].losses == [once[arm.name].runs[0]["second"]["loss"]]
    with monkeypatch.context() as patched:
        patched.setattr("flm_jax.savings.second_text._Loss.__call__", None)  # not called any more
        assert measure(study, once, tmp_path / "results", how.snapshots) == once
    joined = dataclasses.replace(study.target, data=dataclasses.replace(study.target.data, packing="joined"))
    assert _Loss(dataclasses.replace(study, target=joined), study.second_text).batches[0].segments_BT is None
    for path in (tmp_path / "texts").iterdir():
        path.write_text(path.read_text().upper())
    assert on_second_text(study, once) == {}
    assert measure(study, once, tmp_path / "results", Snapshots(tmp_path / "elsewhere")) == once
    again = measure(study, once, tmp_path / "results", how.snapshots)
    assert again[arm.name].runs[0]["second"]["loss"] > once[arm.name].runs[0]["second"]["loss"]
    with pytest.raises(ValueError, match=r"Study.second_text: .* have \d+ tokens, fewer than a window of 10000000"):
        windows(study.second_text, open_data(study.target.data).vocabulary, 10**7, 1)


def test_the_second_text_is_given_to_the_model_that_was_grown(study):
    """A growth in width keeps the number that norms divide by, which the recipe's model does not have."""
    plan = GrowthPoint(0.5, Growth("zero"))
    recipe = run_recipe(study.target, study.target.shape(embed=16), Tuning(1e-2), 0.1, [plan])
    kept_run = types.SimpleNamespace(state=types.SimpleNamespace(params=None))
    snapshots = types.SimpleNamespace(has=lambda *of: True, read=lambda *of: kept_run)
    given = []
    run = {"seed": 0, "evals": [{"loss": 1.0}]}
    _measured(run, Arm("wider", "plans", recipe, (0,)), "text", lambda cfg, _: given.append(cfg), snapshots)
    (cfg,) = given
    assert cfg == resolve(recipe)[-1].cfg and cfg.effective_norm_width == 16 < cfg.embed


def test_stages_that_several_recipes_begin_with_are_one_task(study, tmp_path):
    how = How(Snapshots(tmp_path))
    recipes = [
        run_recipe(study.target, study.target.shape(**plan.start), Tuning(1e-2), 0.1, plan.points)
        for plan in study.all_plans.values()
    ]
    tasks, left = tasks_of(recipes, how)
    assert (len(tasks), left) == (1, 5)
    perform(tasks[0], how.snapshots)
    tasks, left = tasks_of(recipes, how)
    assert (len(tasks), left) == (2, 4)
    assert not train_all(recipes, dataclasses.replace(how, deadline=0.0))
    lines = []
    bad = dataclasses.replace(
        recipes[0], stages=(dataclasses.replace(recipes[0].stages[0], batch_size=3), *recipes[0].stages[1:])
    )
    assert not train_all([bad, recipes[1]], how, lines.append)
    assert any("failed" in line for line in lines)
    assert how.snapshots.has(recipes[1], 2)


def test_what_failed_does_not_keep_back_the_runs_that_it_would_be_trained_with(study, tmp_path):
    how = How(Snapshots(tmp_path), replicas=2)
    pair = tuple(seeded(run_recipe(study.target, study.target.model, Tuning(1e-2), 0.1), seed) for seed in (0, 1))
    assert tasks_of(pair, how) == ([Task(pair, 0)], 4)
    assert tasks_of(pair, how, {how.snapshots.path(pair[0], 0)}) == ([Task(pair[1:], 0)], 4)


def test_a_study_with_a_run_that_failed_does_not_pass_for_one_that_ended(study, tmp_path, monkeypatch):
    monkeypatch.setattr("flm_jax.savings.run.train_all", lambda *_: False)
    with pytest.raises(ValueError, match="Step 'tune' lacks runs whose stages failed"):
        run_steps(study, ["tune"], tmp_path / "results", How(Snapshots(tmp_path)))
    assert run_steps(study, ["tune"], tmp_path / "results", How(Snapshots(tmp_path), deadline=0.0)) == {}


def test_a_process_that_the_system_ends_is_one_sentence(study, tmp_path, monkeypatch):
    class Broken(concurrent.futures.Executor):
        def submit(self, *_):
            future = concurrent.futures.Future()
            future.set_exception(concurrent.futures.BrokenExecutor("terminated abruptly"))
            return future

    monkeypatch.setattr("flm_jax.savings.execute._pool", lambda how: Broken())
    recipe = run_recipe(study.target, study.target.model, Tuning(1e-2), 0.1)
    with pytest.raises(ValueError, match=r"ended a process during stage 1 of 2, 2 x 24, .* a smaller --parallel"):
        train_all([recipe], How(Snapshots(tmp_path)))


def test_an_interrupted_study_does_not_wait_for_the_stages_that_it_trains(tmp_path):
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), execute._pool(How(Snapshots(tmp_path), cores=((0,),))) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
        pool.submit(time.sleep, 600)
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 300


def test_a_result_is_kept_as_soon_as_its_run_has_ended(study, tmp_path, monkeypatch):
    def stopped(recipes, how, show):
        for index in range(len(recipes[0].stages)):
            how.snapshots.directory.mkdir(exist_ok=True)
            about = json.dumps({"evals": [{"loss": 2.5}], "seconds": 1.0})
            np.savez(how.snapshots.path(recipes[0], index), about=np.frombuffer(about.encode(), np.uint8))
            show("a stage has ended")
            assert bool(kept.read(tmp_path / "results")) == (index == len(recipes[0].stages) - 1)
        raise KeyboardInterrupt

    monkeypatch.setattr("flm_jax.savings.run.train_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_steps(study, ["tune"], tmp_path / "results", How(Snapshots(tmp_path / "snapshots")))
    assert [result.losses for result in kept.read(tmp_path / "results").values()] == [[2.5]]


def test_runs_on_other_texts_or_from_another_teacher_are_not_taken_for_those_of_a_study(
    study, data, tmp_path, monkeypatch
):
    """Records of recipes leave out paths, and these decide what was learned."""
    monkeypatch.setattr("flm_jax.savings.run.train_all", lambda *_: False)
    write_corpus(tmp_path / "texts")
    next((tmp_path / "texts").iterdir()).write_text("another text " * 50)
    other = dataclasses.replace(data, corpus=TextFolder(str(tmp_path / "texts")), cache_dir=str(tmp_path / "cache"))
    late = How(Snapshots(tmp_path / "snapshots"), deadline=0.0)
    run_steps(study, ["tune"], tmp_path / "results", late)
    moved = dataclasses.replace(study, target=dataclasses.replace(study.target, data=other))
    for results in ("results", "elsewhere"):
        with pytest.raises(ValueError, match=r"holds runs on other data: digest: \w{12} there"):
            run_steps(moved, ["tune"], tmp_path / results, late)

    monkeypatch.setattr("flm_jax.savings.replicas._digest", lambda path: {"one": "1", "same": "1", "two": "2"}[path])
    point = GrowthPoint(0.5, Growth("zero"))
    taught = {
        path: run_recipe(
            study.target, study.target.shape(layers=1), Tuning(1e-2), 0.1, [point], teacher=Teacher(checkpoint=path)
        )
        for path in ("", "one", "same", "two")
    }
    snapshots = late.snapshots
    # A field that recipes gain later, at its default, does not lose what was trained before.
    before = snapshots.path(taught[""], 0)
    older = {name: value for name, value in stages_record(taught[""], 0).items() if name != "tolerance"}
    with monkeypatch.context() as patched:
        patched.setattr("flm_jax.savings.snapshots.stages_record", lambda recipe, index: older)
        assert snapshots.path(taught[""], 0) == before
    assert len({snapshots.path(recipe, 0) for recipe in taught.values()}) == 1
    assert len({snapshots.path(recipe, 1) for recipe in taught.values()}) == 3
    assert snapshots.path(taught["one"], 1) == snapshots.path(taught["same"], 1)
    result = kept.Result("a", "plans", recipe_record(taught["one"]), (), 1, 1, 1)
    assert [result.is_of(kept.Arm("a", "plans", recipe)) for recipe in taught.values()] == [False, True, True, False]
    assert [stage.teacher is not None for stage in result.stages] == [False, True, False]


def test_a_run_that_diverges_is_given_up_and_does_not_count(study, tmp_path, monkeypatch):
    monkeypatch.setattr("flm_jax.savings.replicas.MAX_LOSS", 0.1)
    recipe = run_recipe(study.target, study.target.model, Tuning(1e-2), 0.1)
    how = How(Snapshots(tmp_path))
    assert train_all([recipe], how, lambda line: None)
    result = kept.collect(kept.Arm("wild", "plans", recipe), how.snapshots)
    assert result is not None
    assert result.losses == [math.inf]
    kept.write(tmp_path / "results", result)
    assert kept.read(tmp_path / "results")["wild"].losses == [math.inf]
    (tmp_path / "results" / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json is not the result of an arm"):
        kept.read(tmp_path / "results")


def test_a_run_that_has_diverged_stays_given_up_beside_others_that_go_on(study, tmp_path, monkeypatch):
    """Whether it counts must not depend on which runs are trained as one program with it."""
    snapshots = Snapshots(tmp_path)
    first = run_recipe(study.target, study.target.model, Tuning(1e-2), 0.3, cuts=(0.1, 0.2))
    recipes = (first, seeded(first, 1))
    state = TrainState(np.zeros((), np.int32), {}, ())
    monkeypatch.setattr(Snapshots, "read", lambda self, recipe, index: recipe)

    def trained_stage(going, index, before):
        assert list(before) == list(going) == [recipes[1]]
        return [Snapshot(state, b"", {}, ({"stage": index, "step": 1, "tokens": 9, "flops": 9, "loss": 2.0},))]

    monkeypatch.setattr("flm_jax.savings.execute.train_stage", trained_stage)
    for recipe, loss in zip(recipes, (math.inf, 2.5), strict=True):
        evals = ({"stage": 0, "step": 1, "tokens": 5, "flops": 5, "loss": loss},)
        snapshots.write(recipe, 0, Snapshot(state, b"", {}, evals))
    for index in (1, 2):
        assert perform(Task(recipes, index), snapshots) == [math.inf, 2.0]
    assert [(e["stage"], e["step"]) for e in snapshots.about(first, 2)["evals"]] == [(0, 1), (1, 0), (2, 0)]
