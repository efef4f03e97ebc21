"""Forks that change nothing, with the real programs: bit for bit the run that was never left."""

import pytest

from flm_jax import stage_run
from flm_jax import train as training
from flm_jax.checkpoint import read_manifest
from flm_jax.growth import Growth
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Run, Stage
from flm_jax.sharding import MeshConfig
from tests.mixtures import write
from tests.runs import recipe_of
from tests.small import shape

pytestmark = [pytest.mark.integration, pytest.mark.slow]
HOW = Run(mesh=MeshConfig(), checkpoint_every=1, keep=99, sample_tokens=2)
DECAYS = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, decay_steps=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A recipe on three sources, with a growth by masks, and the work directory of its run."""
    first = Stage("first", shape(layers=1), 4, 8, DECAYS)
    second = Stage("second", shape(layers=2), 6, 8, DECAYS, Growth("mask", ramp_steps=4), source_weights={"prose": 1.0})
    recipe = recipe_of(write(tmp_path_factory.mktemp("mixture")), first, second)
    workdir = tmp_path_factory.mktemp("old") / "old"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_sample", lambda *given: "")
        patch.setattr(stage_run.report, "plot", lambda *given: None)
        training.train(recipe, HOW, workdir)
        yield recipe, workdir


def digest(workdir):
    return read_manifest(workdir / "checkpoints/1_second/6").state_digest


@pytest.mark.parametrize("step", ["0_first/2", "0_first/4", "1_second/0", "1_second/2"])
def test_a_fork_that_changes_nothing_goes_on_bit_for_bit(runs, tmp_path, step):
    """In a stage, at its end, after a growth and in the middle of its ramp."""
    recipe, old = runs
    training.train(recipe, HOW, tmp_path / "new", fork=old / "checkpoints" / step)
    assert digest(tmp_path / "new") == digest(old)
