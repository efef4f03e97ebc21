"""Runs with a teacher: what they measure and count, stopped and resumed, and what identifies the teacher."""

import dataclasses
import gc
import json
import shutil
import weakref

import jax
import pytest

from flm_jax import costs, stage_run
from flm_jax import train as training
from flm_jax.checkpoint import CheckpointError, NoCheckpointError, read_manifest
from flm_jax.checkpoint.manifest import read_meta
from flm_jax.distillation import ResolvedTeacher, Teacher
from flm_jax.recipe import resolve
from flm_jax.run_comparison import read_run_curves
from flm_jax.sharding import MeshConfig
from tests.golden_run import RUN as GOLDEN
from tests.runs import RUN, grown_once

pytestmark = pytest.mark.integration

TAUGHT = 3
HOW = dataclasses.replace(RUN, mesh=MeshConfig(), keep=9)
GOLDEN_STEP = GOLDEN / "checkpoints/0_first/4"


def taught(data, first=GOLDEN_STEP):
    """The first stage learns from a checkpoint of another run, and the second, for half its steps, from the first."""
    return grown_once(data, Teacher(weight=0.6, steps=TAUGHT), first={"teacher": Teacher(str(first), temperature=2.0)})


def lines(workdir, kind):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def last_digest(workdir):
    return read_manifest(workdir / "checkpoints/1_second/6").state_digest


@pytest.fixture(scope="module", autouse=True)
def short():
    """Runs without plots and samples, which test_train.py looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_run.report, "plot", lambda *given: None)
        patch.setattr(training, "_sample", lambda *given: "")
        yield


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """A run that is never stopped."""
    workdir = tmp_path_factory.mktemp("taught") / "run"
    report = training.train(taught(data), HOW, workdir)
    return workdir, report


def test_a_run_measures_the_divergence_while_it_has_a_teacher_and_learns(reference):
    workdir, report = reference
    found = lines(workdir, "train")
    with_teacher = [line for line in found if "kl" in line]
    assert [line["step"] for line in with_teacher] == [1, 2, 3, 4, 5]
    # At the growth the model computes what its teacher does.
    assert with_teacher[0]["kl"] > 1e-3
    assert with_teacher[2]["kl"] == pytest.approx(0, abs=1e-5) and with_teacher[4]["kl"] > 1e-5
    assert [line["kl_weight"] for line in with_teacher] == pytest.approx([0.5, 0.25, 0.6, 0.4, 0.2])
    losses = [e["loss"] for e in report["evals"]]
    assert losses[-1] < losses[0] - 0.5
    assert "Until step 3, second also learns from a teacher of" in (workdir / "report.md").read_text()


def test_the_teachers_forward_passes_count_once_everywhere(reference, data):
    workdir, report = reference
    first, second = resolve(taught(data))
    tokens = 8 * 16
    of_golden = costs.forward_flops_per_token(first.teacher.cfg, 16)
    assert report["stages"][0]["flops"] == 2 * tokens * (costs.train_flops_per_token(first.cfg, 16) + of_golden)
    extra = TAUGHT * tokens * costs.forward_flops_per_token(first.cfg, 16)
    own = costs.train_flops_per_token(second.cfg, 16)
    row = report["stages"][1]
    assert row["flops"] == 6 * tokens * own + extra
    assert row["teacher"] == {"params": costs.param_count(first.cfg), "steps": TAUGHT, "flops": extra}
    evals = [e for e in report["evals"] if e["stage"] == "second"]
    assert [(e["step"], e["flops"]) for e in evals] == [
        (0, 0),
        (4, 4 * tokens * own + extra),
        (6, 6 * tokens * own + extra),
    ]
    logged = lines(workdir, "train")
    assert logged[-1]["flops"] == row["total_flops"]
    curves = read_run_curves(workdir)
    assert [point.flops for point in curves.train] == [line["flops"] for line in logged]
    assert "Stage second has a teacher for 3 steps: its forward passes count." in curves.notes
    rates = [line["flops_per_second"] / line["tokens_per_second"] for line in (logged[3], logged[6])]
    assert rates == pytest.approx([own + extra / TAUGHT / tokens, own])


def test_resumed_with_the_teacher_it_ends_the_same_and_frees_it(reference, data, tmp_path, monkeypatch):
    workdir = shutil.copytree(reference[0], tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(workdir / f"checkpoints/1_second/{step}")
    held, alive = [], {}
    restore, measure = ResolvedTeacher.restore, stage_run.StageRun._measure

    def restored(*given):
        found = restore(*given)
        held.extend(weakref.ref(x) for x in jax.tree.leaves(found))
        return found

    def measured(worker, step, state):
        gc.collect()
        alive[step] = sum(ref() is not None for ref in held)
        return measure(worker, step, state)

    monkeypatch.setattr(ResolvedTeacher, "restore", restored)
    monkeypatch.setattr(stage_run.StageRun, "_measure", measured)
    assert training.train(taught(data), HOW, workdir) == reference[1]
    assert last_digest(workdir) == last_digest(reference[0])
    assert held and alive == {4: 0, 6: 0}


def test_the_last_checkpoint_of_the_stage_before_is_needed_only_while_it_teaches(reference, data, tmp_path):
    how = taught(data)
    workdir = shutil.copytree(reference[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/1_second/6")
    shutil.rmtree(workdir / "checkpoints/0_first")
    assert training.train(how, HOW, workdir) == reference[1]
    assert last_digest(workdir) == last_digest(reference[0])
    for step in (4, 6):
        shutil.rmtree(workdir / f"checkpoints/1_second/{step}")
    with pytest.raises(NoCheckpointError, match="The teacher cannot be read: .*0_first/2 is no directory"):
        training.train(how, HOW, workdir)
    shutil.copytree(reference[0] / "checkpoints/0_first/0", workdir / "checkpoints/0_first/2")
    with pytest.raises(CheckpointError, match="The teacher cannot be read: .* the directory was renamed or copied"):
        training.train(how, HOW, workdir)


def test_a_teacher_by_its_path_is_the_one_of_that_digest_wherever_it_lies(reference, data, tmp_path):
    workdir, report = reference
    digest = read_manifest(GOLDEN_STEP).state_digest
    assert json.loads((workdir / "data.json").read_text())["teachers"]["first"]["digest"] == digest
    step = workdir / "checkpoints/0_first/0"
    assert read_meta(step, read_manifest(step))["provenance"]["teacher"] == digest
    copy = shutil.copytree(GOLDEN_STEP, tmp_path / "moved")
    assert training.train(taught(data, copy), HOW, workdir) == report
    with pytest.raises(ValueError, match=r"begun with another teacher, other data or another start: teachers.first."):
        training.train(taught(data, workdir / "checkpoints/0_first/0"), HOW, workdir)
