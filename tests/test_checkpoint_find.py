"""Which checkpoint a path means: a step, or the newest step of a stage or of a work directory."""

import json
import shutil

import jax.numpy as jnp
import pytest

from flm_jax.checkpoint import CheckpointError, Checkpoints, DamagedError, NoCheckpointError
from flm_jax.checkpoint.find import step_directory
from flm_jax.cli import errors


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoints of a run of two stages."""
    workdir = tmp_path_factory.mktemp("find") / "run"
    for stage in ("0_one", "1_two"):
        with Checkpoints(workdir / "checkpoints" / stage) as checkpoints:
            for step in (40, 60):
                checkpoints.save(step, {"x": jnp.arange(3.0)}, meta={})
    (workdir / "recipe.json").write_text(json.dumps({"stages": [{"name": "one"}, {"name": "two"}]}))
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_work_directory_means_the_newest_step_of_its_last_stage(run):
    stages = run / "checkpoints"
    assert step_directory(run) == stages / "1_two/60"
    assert step_directory(stages / "0_one") == stages / "0_one/60"
    assert step_directory(stages / "0_one/40") == stages / "0_one/40"


def test_stages_are_those_of_the_recipe_whatever_lies_beside_them(run):
    stages = run / "checkpoints"
    for other in ("1_two.bak", "2_old", "1_old", "0x_notes", "2_"):
        shutil.copytree(stages / "1_two", stages / other)
        shutil.rmtree(stages / other / "60")
    (stages / "9_file").write_text("")
    assert step_directory(run) == stages / "1_two/60"


def test_without_a_recipe_two_stages_are_not_guessed_between(run):
    (run / "recipe.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no recipe.json .* give one of .*/0_one, .*/1_two"):
        step_directory(run)
    shutil.rmtree(run / "checkpoints/1_two")
    (run / "checkpoints/1_notes").mkdir()
    assert step_directory(run) == run / "checkpoints/0_one/60"


def test_what_is_no_complete_step_is_passed_over_and_named(run, caplog):
    stage = run / "checkpoints/1_two"
    (stage / "99").mkdir()
    (stage / "100").mkdir()
    (stage / "100/arrays").mkdir()
    assert step_directory(run) == stage / "60"
    assert f"{stage}/99 is passed over: it is empty" in caplog.text
    assert f"{stage}/100 is passed over: {stage}/100/manifest.json is missing" in caplog.text
    (stage / "60/meta.json").unlink()
    assert step_directory(run) == stage / "40"
    assert f"{stage}/60 is damaged and passed over: {stage}/60/meta.json cannot be read" in caplog.text


def test_a_step_that_is_not_there_is_answered_with_those_that_are(run, tmp_path, caplog):
    with pytest.raises(NoCheckpointError, match=r"1_two/50 is no directory; .*1_two has the steps 40, 60\.$"):
        step_directory(run / "checkpoints/1_two/50")
    (tmp_path / "notes").mkdir()
    with pytest.raises(NoCheckpointError, match=r"holds no checkpoint: .*; in it are the work directories .*/run\.$"):
        step_directory(tmp_path)
    assert caplog.text == ""


def test_a_stage_without_a_complete_step_gives_way_to_the_one_before(run, capsys):
    for step in ("40", "60"):
        (run / "checkpoints/1_two" / step / "manifest.json").unlink()
    assert step_directory(run) == run / "checkpoints/0_one/60"
    with pytest.raises(
        DamagedError, match=r"no step is complete: .*1_two/40/manifest.json is missing; .*1_two/60/man.* is missing\.$"
    ):
        step_directory(run / "checkpoints/1_two")
    with pytest.raises(SystemExit), errors.started():
        step_directory(run / "checkpoints/1_two")
    assert capsys.readouterr().err.endswith("missing. Restore it from a copy, or give another step.\n")
    with pytest.raises(DamagedError, match=r"1_two/60 looks like a step, but its manifest.json is missing"):
        step_directory(run / "checkpoints/1_two/60")


@pytest.mark.parametrize("record", ["", "[]", '{"stages": 3}', '{"stages": [{}]}', '{"stages": ["one"]}'])
def test_a_damaged_recipe_is_one_sentence(run, record):
    (run / "recipe.json").write_text(record)
    with pytest.raises(CheckpointError, match=r"recipe.json is damaged"):
        step_directory(run)


def test_a_path_without_checkpoints_says_what_to_give(tmp_path):
    with pytest.raises(NoCheckpointError, match="is no directory"):
        step_directory(tmp_path / "none")
    with pytest.raises(NoCheckpointError, match="give a step, such as"):
        step_directory(tmp_path)


@pytest.mark.parametrize("name", ["br[1]", "back\\slash", "not \udce4 utf8"])
def test_a_path_that_checkpoints_cannot_be_read_back_from_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="use another directory"):
        Checkpoints(tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["a b", "50%", "[", "what?", "*", "a:b", "ü", "{x,y}", "#1", "~home"])
def test_any_other_path_holds_checkpoints(tmp_path, name):
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save(1, {"x": jnp.arange(3.0)}, meta={})
    assert step_directory(tmp_path / name) == tmp_path / name / "1"


def test_no_step_is_committed_whose_arrays_are_not_found_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr("flm_jax.checkpoint.directory.check_path", lambda directory: None)
    checkpoints = Checkpoints(tmp_path / "br[1]")
    with pytest.raises(CheckpointError, match=r"saving step 1 failed: .* x cannot be read"), checkpoints:
        checkpoints.save(1, {"x": jnp.arange(3.0)}, meta={})
    assert step_names(tmp_path / "br[1]") == []


def step_names(directory):
    return [entry.name for entry in directory.iterdir() if entry.is_dir()]
