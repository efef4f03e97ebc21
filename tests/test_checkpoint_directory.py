"""The directory of steps: what else lies in it is passed over aloud, and it has one writer."""

import os
import shutil

import pytest

from flm_jax.checkpoint import CheckpointError, Checkpoints
from tests.checkpoints import ABSTRACT, LOGGER

# Orbax leaves tasks behind when a read or a write fails, and Python complains when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_foreign_empty_and_half_copied_directories_are_passed_over_aloud(damaged, caplog):
    (damaged / "900").mkdir()
    (damaged / "901").mkdir()
    (damaged / "901" / "data.bin").write_bytes(b"x")
    (damaged / "tensorboard").mkdir()
    (damaged / "007").mkdir()
    shutil.copytree(damaged / "2", damaged / "902", ignore=shutil.ignore_patterns("d"))
    shutil.copytree(damaged / "2", damaged / "903")  # whole, but its name lies
    shutil.copytree(damaged / "2", damaged / "904.partial")
    (damaged / "905.partial.old").mkdir()
    with Checkpoints(damaged, read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] == 2
        assert checkpoints.restore(ABSTRACT).step == 2
    told = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    for name in ("900", "901", "tensorboard", "007", "902", "903", "904.partial", "905.partial.old"):
        assert sum(line.startswith(f"{damaged / name} is ") and "passed over: " in line for line in told) == 1, (
            name,
            told,
        )
    with Checkpoints(damaged) as checkpoints:  # a writer clears its own leftovers and nothing else
        assert checkpoints.steps()[-1] == 2
    assert not (damaged / "904.partial").exists() and (damaged / "905.partial.old").exists()
    assert (damaged / "901" / "data.bin").exists()


def test_two_writers(tmp_path):
    first = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path} is being written .*{os.getpid()}"):
        Checkpoints(tmp_path)
    Checkpoints(tmp_path, read_only=True).close()
    first.close()
    first.close()
    Checkpoints(tmp_path).close()
