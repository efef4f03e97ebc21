"""Files that are damaged for real: what verifying names, and what restoring refuses and falls back to."""

import json
import logging
import os
import random
from pathlib import Path

import pytest

from flm_jax.checkpoint import CheckpointError, Checkpoints, DamagedError, NoCheckpointError, verify
from flm_jax.cli import runs
from tests.checkpoints import ABSTRACT, LOGGER, assert_same, flip, flip_value, numpy_state, state_at

# Orbax leaves tasks behind when a read or a write fails, and Python complains when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


DAMAGE = {
    "flip": flip,
    "truncate": truncate,
    "empty": lambda path, _: os.truncate(path, 0),
    "delete": lambda path, _: path.unlink(),
}


def test_verify(two_steps):
    report = verify(two_steps / "1")
    assert report.ok and report.leaves == 7 and "bytes are as they were saved" in str(report)
    with pytest.raises(NoCheckpointError, match="/5 is no directory"):
        verify(two_steps / "5")


def test_the_program_checks_one_checkpoint(damaged, tmp_path, capsys):
    """Of a stage or a work directory, the newest step."""
    runs.run_verify_checkpoint(str(damaged), None)
    assert f"its newest step is {damaged}/2\n{damaged}/2: 7 leaves and " in capsys.readouterr().out
    flip_value(damaged / "2")
    with pytest.raises(SystemExit) as stop:
        runs.run_verify_checkpoint(str(damaged / "2"), str(tmp_path / "found.json"))
    assert stop.value.code == 1
    said = f"{damaged}/2: the values of params/w have changed"
    assert capsys.readouterr().out.startswith(f"{damaged}/2 is DAMAGED:\n  {said}; chunk 0.0 in arrays/")
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["ok"], found["leaves"], len(found["problems"])) == (False, 7, 1)


@pytest.mark.battery
@pytest.mark.parametrize("kind", DAMAGE)
def test_every_file_damaged(damaged, kind, caplog):
    caplog.set_level(logging.WARNING)
    rng = random.Random(kind)
    files = sorted(path for path in (damaged / "2").rglob("*") if path.is_file())
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        caplog.clear()
        DAMAGE[kind](path, rng)
        with Checkpoints(damaged, read_only=True) as checkpoints:
            with pytest.raises(CheckpointError, match=r"/2") as caught:
                checkpoints.restore(ABSTRACT, 2)
            assert path.name in str(caught.value)
            restored = checkpoints.restore(ABSTRACT)
        assert restored.step == 1
        assert_same(restored.state, numpy_state(1))
        assert restored.blobs == {"vocab.model": bytes([1] * 9)}
        told = [record for record in caplog.records if record.name == LOGGER]
        assert len(told) == 1 and path.name in told[0].getMessage(), (path, told)
        assert not verify(damaged / "2").ok
        path.write_bytes(content)
    assert verify(damaged / "2").ok


def test_a_changed_value_names_the_leaf_and_the_step_can_be_saved_again(damaged, caplog):
    flip_value(damaged / "2")
    (problem,) = verify(damaged / "2").problems
    assert problem.startswith(f"{damaged / '2'}: the values of params/w have changed; chunk 0.0 in arrays/")
    with Checkpoints(damaged, keep=1) as checkpoints:
        with pytest.raises(DamagedError, match="params/w"):
            checkpoints.restore(ABSTRACT, 2)
        assert checkpoints.restore(ABSTRACT).step == 1
        assert "step 2 is REFUSED" in caplog.text and "params/w" in caplog.text
        checkpoints.save(2, state_at(2), meta={})
        assert_same(checkpoints.restore(ABSTRACT).state, numpy_state(2))
        assert checkpoints.steps() == [2]
    assert (damaged / "2.damaged-1").is_dir()  # set aside, not deleted


def test_all_damaged_is_not_the_same_as_none(damaged):
    flip_value(damaged / "2")
    (damaged / "1" / "meta.json").unlink()
    with Checkpoints(damaged) as checkpoints, pytest.raises(DamagedError, match=r"damaged: \[1, 2\]"):
        checkpoints.restore(ABSTRACT)
