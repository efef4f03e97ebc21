"""A work directory belongs to one run at a time, and to one recipe."""

import fcntl
import threading

import pytest

from flm_jax import train as training
from flm_jax.checkpoint import CheckpointError
from flm_jax.checkpoint.directory import take_lock
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run, Stage
from flm_jax.records import LOCK
from flm_jax.sweeps.execute import held
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
        fcntl.flock(looking, fcntl.LOCK_SH)  # as `held` does, for longer
        assert not held(tmp_path)
        threading.Timer(0.2, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with take_lock(tmp_path):
            assert held(tmp_path)
    assert not held(tmp_path)
