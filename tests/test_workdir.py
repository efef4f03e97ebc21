"""A work directory belongs to one run at a time, and to one recipe."""

import pytest

from flm_jax import train as training
from flm_jax.checkpoint import CheckpointError
from flm_jax.checkpoint.directory import take_lock
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run, Stage
from tests import small


def test_a_second_run_is_refused_before_it_prepares_data(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "open_data", lambda config: pytest.fail("data was prepared"))
    recipe = Recipe(stages=(Stage("one", small.shape(), 2, 8, OptimizerConfig()),), data=data)
    with (
        take_lock(tmp_path / "run"),
        pytest.raises(CheckpointError, match=r"run is being written by another run \(process \d+ on .*\)"),
    ):
        training.train(recipe, Run(), tmp_path / "run")
