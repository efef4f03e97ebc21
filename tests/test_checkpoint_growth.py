"""Checkpoints that are grown and verified outside a run, and runs that begin with them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from flm_jax import train as training
from flm_jax.checkpoint import CheckpointError, Checkpoints, DamagedError, NoCheckpointError
from flm_jax.checkpoint_growth import grow_checkpoint, verify_checkpoints
from flm_jax.checkpoint_growth.grow import free_memory, memory_warning
from flm_jax.checkpoint_growth.text import verification_lines
from flm_jax.growth import Growth
from flm_jax.optimizer import OptimizerConfig
from flm_jax.planning.text import dry_run
from flm_jax.recipe import Stage
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.source_checkpoint import read_source
from tests.runs import RUN, StopAfter, recipe_of
from tests.small import shape

pytestmark = pytest.mark.integration

FAST = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
TARGET = shape(embed=32, mlp=56, layers=3)
COPY = Growth("copy", methods={"layers": "zero"}, depth="distance", optimizer="exact")


@pytest.fixture(scope="module", autouse=True)
def without_a_sample():
    """Runs end without a text: it would be one more program for every shape, and test_train.py has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_sample", lambda *_: "a sample")
        yield


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A run of one stage."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    # The stages that go on from it decay weights; this one does not.
    training.train(recipe_of(data, Stage("first", shape(), 4, 8, OptimizerConfig(learning_rate=1e-2))), RUN, workdir)
    return workdir


@pytest.fixture(scope="module")
def copied(trained, data, tmp_path_factory) -> Path:
    """Grown from it, by copies."""
    workdir = tmp_path_factory.mktemp("copied") / "grown"
    grow_checkpoint(trained, workdir, TARGET, COPY, data=data)
    return workdir


PLANS = (
    Growth("zero"),
    Growth("mask", ramp_steps=4),
    Growth("mask", methods={"layers": "stack"}, ramp_steps=4),
)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_grown_checkpoint_verifies_and_one_that_promises_nothing_is_labelled(plan, trained, data, tmp_path):
    record = grow_checkpoint(trained, tmp_path / "grown", TARGET, plan, data=data)
    found = verify_checkpoints(trained, tmp_path / "grown", data=data)
    assert found["holds"]
    assert json.loads(json.dumps(found)) == json.loads((tmp_path / "grown" / "growth.json").read_text())["verification"]
    assert found["preserving"] == ("stack" not in plan.name)
    assert (found["logits"]["max_rel"] < 1e-5) == found["preserving"]
    assert found["method"] == plan.name
    assert found["dead"] == []
    assert found["axes"]["mlp"] == [40, 56]
    assert record["source_digest"] == read_source(trained).digest
    text = verification_lines(found)
    assert ("HOLDS" if found["preserving"] else "does NOT promise") in text


def test_depth_by_distance_is_measured_and_recorded(copied):
    record = json.loads((copied / "growth.json").read_text())
    assert len(record["distances"]) == 2
    copies = [0, 0]
    copies[int(np.argmin(record["distances"]))] = 1
    assert record["plan"]["depth"] == copies


def resaved(grown: Path, target: Path, change) -> Path:
    """The checkpoint with other values, saved as properly as the first."""
    source, mesh = read_source(grown), make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = change(source.restore(mesh))
        with Checkpoints(target / "checkpoints" / "0_grown") as store:
            store.save(0, state, signatures={}, meta=source.meta.record(), blobs={})
            store.wait()
    return target


def test_a_target_with_other_weights_does_not_hold_and_the_layer_is_named(trained, copied, data, tmp_path):
    def change(state):
        down = state.params["blocks"]["mlp"]["down"]
        down = down.at[1].add(0.05)
        blocks = {**state.params["blocks"], "mlp": {**state.params["blocks"]["mlp"], "down": down}}
        return state.replace(params={**state.params, "blocks": blocks})

    found = verify_checkpoints(trained, resaved(copied, tmp_path / "other", change), data=data)
    assert not found["holds"]
    assert "logits differ by" in found["failures"][0]
    assert "layer 1 of the grown model is the first that differs" in found["failures"][0]
    assert "DOES NOT HOLD" in verification_lines(found)


def test_damaged_foreign_and_trained_targets_are_refused(trained, copied, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(copied, broken)
    victim = max((f for f in broken.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(DamagedError):
        verify_checkpoints(trained, broken, data=data)
    with pytest.raises(CheckpointError, match="grew from a state with digest"):
        verify_checkpoints(trained / "checkpoints/0_first/0", copied, data=data)
    with pytest.raises(CheckpointError, match="has trained since it grew"):
        verify_checkpoints(trained, trained, data=data)
    with pytest.raises(CheckpointError, match="did not grow from anything"):
        verify_checkpoints(trained, trained / "checkpoints/0_first/0", data=data)
    with pytest.raises(NoCheckpointError, match="is no directory; give a step"):
        verify_checkpoints(tmp_path / "nowhere", copied, data=data)


def test_a_growth_into_a_used_directory_or_from_a_damaged_source_writes_nothing(trained, copied, tmp_path):
    with pytest.raises(ValueError, match="Nothing grows: the checkpoint has the target's shape already"):
        grow_checkpoint(trained, tmp_path / "same", shape(), COPY)
    with pytest.raises(ValueError, match="is not empty"):
        grow_checkpoint(trained, copied, TARGET, COPY)
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    victim = max(broken.glob("checkpoints/*/4/arrays/**/*"), key=lambda f: f.stat().st_size * f.is_file())
    victim.write_bytes(victim.read_bytes()[:-9])
    with pytest.raises(DamagedError):
        grow_checkpoint(next(broken.glob("checkpoints/*/4")), tmp_path / "grown", TARGET, COPY)
    assert not (tmp_path / "grown").exists()


def test_a_run_begins_with_a_grown_checkpoint_and_trains_as_the_small_model_would(trained, data, tmp_path):
    """Exact copies: the grown model's held-out losses are those of the small one, going on alike."""
    wide, big = tmp_path / "wide", shape(embed=32, mlp=56)
    grow_checkpoint(trained, wide, big, Growth("copy", optimizer="exact"), data=data)
    reports = [
        training.train(recipe_of(data, Stage("on", model, 6, 8, FAST), start=str(start)), RUN, tmp_path / name)
        for name, model, start in (("small run", shape(), trained), ("big run", big, wide))
    ]
    losses = [[e["loss"] for e in report["evals"]] for report in reports]
    assert losses[0][0] > losses[0][-1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)


def test_masks_are_still_to_ramp_after_a_growth_outside_and_a_kill_within_changes_nothing(
    trained, data, tmp_path, monkeypatch
):
    plan = Growth("mask", ramp_steps=3, depth="distance")
    grow_checkpoint(trained, tmp_path / "grown", TARGET, plan, data=data)
    recipe = recipe_of(data, Stage("on", TARGET, 5, 8, FAST), start=str(tmp_path / "grown"))
    whole = training.train(recipe, dataclasses.replace(RUN, keep=9), tmp_path / "whole")
    monkeypatch.setattr(training, "Interrupts", lambda: StopAfter(2))
    assert training.train(recipe, RUN, tmp_path / "cut") is None
    monkeypatch.undo()
    assert training.train(recipe, RUN, tmp_path / "cut") == whole
    with pytest.raises(ValueError, match="is at step 0, and its masks rise for 3 more steps: take a later"):
        grow_checkpoint(tmp_path / "grown", tmp_path / "twice", shape(embed=40, mlp=56, layers=3), Growth("zero"))
    with pytest.raises(ValueError, match="its masks ramp over 3 steps, delays included, of its 2"):
        short = dataclasses.replace(recipe, stages=(Stage("on", TARGET, 2, 8, FAST),))
        training.train(short, RUN, tmp_path / "short")


def test_a_run_goes_on_from_the_middle_of_a_ramp(trained, data, tmp_path, monkeypatch):
    """Masks rise on from where they were, over a kill too, and later programs read how far they are."""
    grow_checkpoint(trained, tmp_path / "grown", TARGET, Growth("mask", ramp_steps=4), data=data)
    recipe = recipe_of(data, Stage("on", TARGET, 6, 8, FAST), start=str(tmp_path / "grown"), eval_every=1)
    every = dataclasses.replace(RUN, keep=9, checkpoint_every=1)
    whole = training.train(recipe, every, tmp_path / "whole")
    within = dataclasses.replace(recipe, start=str(tmp_path / "whole/checkpoints/0_on/1"))
    tuned = training.train(within, every, tmp_path / "tuned")
    assert tuned["evals"][0]["loss"] == whole["evals"][1]["loss"]
    masks = {}
    for name in ("whole", "tuned"):
        records = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        masks[name] = [record["mask"] for record in records if "mask" in record]
    np.testing.assert_allclose(masks["whole"], [0, 0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(masks["tuned"], [0.25, 0.5, 0.75, 1, 1, 1])
    later = [read_source(tmp_path / f"tuned/checkpoints/0_on/{step}") for step in (0, 2, 3)]
    assert [None if (m := s.masks()) is None else float(m.mlp_F.min()) for s in later] == [0.25, 0.75, None]
    monkeypatch.setattr(training, "Interrupts", lambda: StopAfter(2))
    assert training.train(within, RUN, tmp_path / "cut") is None
    monkeypatch.undo()
    assert training.train(within, RUN, tmp_path / "cut") == tuned
    with pytest.raises(ValueError, match="is at step 2, and its masks rise for 1 more step: take a later"):
        later[1].check_settled()
    short = dataclasses.replace(within, stages=(Stage("on", TARGET, 2, 8, FAST),))
    with pytest.raises(ValueError, match="its masks ramp over 3 steps, delays included, of its 2"):
        training.train(short, RUN, tmp_path / "short")


def test_growing_by_distance_inside_a_run_survives_a_kill(data, tmp_path, monkeypatch):
    stages = (
        Stage("first", shape(), 3, 8, FAST),
        Stage("second", TARGET, 4, 8, FAST, Growth("mask", ramp_steps=3, depth="distance")),
    )
    recipe = recipe_of(data, *stages)
    whole = training.train(recipe, RUN, tmp_path / "whole")
    assert len(whole["growths"][0]["distances"]) == 2
    monkeypatch.setattr(training, "Interrupts", lambda: StopAfter(5))
    assert training.train(recipe, RUN, tmp_path / "cut") is None
    monkeypatch.undo()
    assert training.train(recipe, RUN, tmp_path / "cut") == whole


def test_new_entries_have_their_own_rate_in_a_run(data, tmp_path):
    """Asymmetric, with next to no rate for what is new: old entries take whole steps, new ones hardly move."""
    plan = Growth("copy", methods={"layers": "zero"}, optimizer="asymmetric", rewarm_steps=1, rewarm_to=1e-4)
    stages = (Stage("first", shape(), 2, 8, FAST), Stage("second", TARGET, 1, 8, FAST, plan))
    training.train(recipe_of(data, *stages), RUN, tmp_path / "run")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        before, after = (read_source(tmp_path / f"run/checkpoints/1_second/{n}").restore(mesh).params for n in (0, 1))
    gate = [np.asarray(p["blocks"]["mlp"]["gate"]) for p in (before, after)]
    moved = np.abs(gate[1] - gate[0])[0]
    assert moved[:24, :40].max() > 1e-3
    assert moved[24:].max() < 1e-5
    assert moved[:, 40:].max() < 1e-5


def test_another_model_or_another_start_is_refused(trained, data, tmp_path):
    other = recipe_of(data, Stage("on", shape(mlp=48), 2, 8, FAST), start=str(trained))
    with pytest.raises(ValueError, match=r"not that of the checkpoint: mlp: 40 there, 48 here.*give it a Growth"):
        training.train(other, RUN, tmp_path / "other")
    mine = recipe_of(data, Stage("on", shape(), 2, 8, FAST), start=str(trained))
    training.train(mine, RUN, tmp_path / "run")
    with pytest.raises(CheckpointError, match="goes on with a checkpoint of its own shape: nothing grew"):
        verify_checkpoints(trained, tmp_path / "run/checkpoints/0_on/0")
    elsewhere = dataclasses.replace(mine, start=str(trained / "checkpoints/0_first/0"))
    with pytest.raises(ValueError, match="was begun with other data or another start: the digest of the start"):
        training.train(elsewhere, RUN, tmp_path / "run")


@pytest.mark.slow
def test_a_dry_run_describes_a_recipe_that_starts_with_a_checkpoint(trained, data):
    on = Stage("on", shape(), 2, 8, FAST)
    grown = Stage("grown", TARGET, 2, 8, FAST, Growth("copy", methods={"layers": "zero"}, depth="distance"))
    for stages in ((on, grown), (grown,)):
        text = "\n".join(dry_run(recipe_of(data, *stages, start=str(trained)), RUN))
        assert ("no initialisation, the stage starts from a checkpoint" in text) == (len(stages) == 2)
        assert "lowered: growth, train step" in text


def test_on_the_command_line_status_says_whether_it_holds(trained, copied, tmp_path, capsys):
    import gin

    from flm_jax.cli import runs

    gin.clear_config()
    runs.run_verify(str(trained), str(copied), str(tmp_path / "found.json"), [], [])
    assert json.loads((tmp_path / "found.json").read_text())["holds"]
    other = resaved(
        copied, tmp_path / "other", lambda s: s.replace(params={**s.params, "head": s.params["head"] * 1.01})
    )
    gin.clear_config()
    with pytest.raises(SystemExit) as stop:
        runs.run_verify(str(trained), str(other), None, [], [])
    assert stop.value.code == 1
    assert "final norm, the head or the logit multiplier" in capsys.readouterr().out
    gin.clear_config()
    with pytest.raises(SystemExit):
        runs.run_grow(str(trained), str(tmp_path / "new"), ["gin_configs/growth/copy_small.gin"], [])
    gin.clear_config()
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "'copy' does not grow axis 'head_dim'" in error
    assert not (tmp_path / "new").exists()


def test_a_growth_that_may_not_fit_says_so_before_it_starts():
    """The growth of docs/smollm2.md, which took 5.9 GB, the program and its libraries included."""
    old = shape(embed=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536, vocab=49_152, tied=True)
    new = old.replace(embed=720, layers=36, heads=12, kv_heads=4, mlp=1920)
    said = memory_warning(old, new, False, 10**9)
    assert said is not None and said.startswith("Growing in memory takes about 5.295 GB, and 1 GB are free")
    assert memory_warning(old, new, False, 8 * 10**9) is memory_warning(old, new, True, None) is None
    assert memory_warning(old, new, True, 8 * 10**9), "moments count, too"
    assert free_memory() is None or 10**8 < free_memory() < 10**14
