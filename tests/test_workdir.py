"""A work directory belongs to one run at a time, and to one recipe."""

import dataclasses
import fcntl
import os
import socket
import threading

import pytest

from flm_jax import train as training
from flm_jax.checkpoint import CheckpointError
from flm_jax.checkpoint.directory import holder, locked, take_lock
from flm_jax.data.corpora import TextFolder
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run, Stage
from flm_jax.records import LOCK
from tests import small


def test_a_second_run_is_refused_before_it_prepares_data(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "open_data", lambda config: pytest.fail("data was prepared"))
    recipe = Recipe(stages=(Stage("one", small.shape(), 2, 8, OptimizerConfig()),), data=data)
    with (
        take_lock(tmp_path / "run"),
        pytest.raises(CheckpointError, match=r"run is being written by another run \(process \d+ on .*\)"),
    ):
        training.train(recipe, Run(), tmp_path / "run")


def test_a_look_at_who_trains_there_keeps_nobody_from_training(tmp_path):
    take_lock(tmp_path).close()
    with (tmp_path / LOCK).open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)  # as `holder` does, for longer
        assert holder(tmp_path) is None
        threading.Timer(0.2, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with take_lock(tmp_path):
            assert holder(tmp_path) == f"{os.getpid()} on {socket.gethostname()}"
    assert holder(tmp_path) is None


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_wrote_nothing_leaves_no_lock_and_no_folder_that_it_made(there, tmp_path):
    folder = tmp_path / "runs" / "one"
    if there:
        folder.mkdir(parents=True)
    with pytest.raises(RuntimeError), locked(folder):
        assert holder(folder) is not None
        raise RuntimeError
    assert list(tmp_path.rglob("*")) == ([folder.parent, folder] if there else [])


def test_a_run_that_wrote_something_keeps_its_lock(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "one"):
        (tmp_path / "one" / "recipe.json").touch()
        raise RuntimeError
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [LOCK, "recipe.json"]


def test_a_folder_that_somebody_else_uses_meanwhile_stays(tmp_path):
    with locked(tmp_path / "runs" / "one"):
        (tmp_path / "runs" / "two").mkdir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]


def test_a_lock_that_was_removed_by_its_holder_is_taken_in_no_hands(tmp_path, monkeypatch):
    """Who opened the file before its holder removed it, and locks it afterwards, would share the name with a third."""
    real, removed = fcntl.flock, []

    def flock(file, how):
        real(file, how)
        if not removed:
            removed.append((tmp_path / LOCK).unlink())

    monkeypatch.setattr(fcntl, "flock", flock)
    with take_lock(tmp_path) as lock:
        monkeypatch.undo()
        assert os.path.samestat(os.fstat(lock.fileno()), (tmp_path / LOCK).stat())
        with pytest.raises(CheckpointError, match="is being written by another run"):
            take_lock(tmp_path)


def test_nothing_is_left_of_a_run_whose_text_is_missing(data, tmp_path, monkeypatch):
    lacking = dataclasses.replace(data, corpus=TextFolder(str(tmp_path / "nowhere")), cache_dir=str(tmp_path / "cache"))
    recipe = Recipe(stages=(Stage("one", small.shape(), 2, 8, OptimizerConfig()),), data=lacking)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        training.train(recipe, Run(), tmp_path / "runs" / "one")
    assert list(tmp_path.iterdir()) == []
