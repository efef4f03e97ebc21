"""Full disks, failed commits and killed writers: the last checkpoint stays whole, and saving goes on."""

import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from flm_jax.checkpoint import CheckpointError, Checkpoints, NoCheckpointError, manifest
from tests.checkpoints import ABSTRACT, abstract_of, assert_same, numpy_state, state_at

# Orbax leaves tasks behind when a read or a write fails, and Python complains when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).resolve().parent.parent


class FullDisk:
    """No file of this process may grow over a limit: writes fail as they do on a full disk."""

    def __enter__(self):
        self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, self.old[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.old)


@pytest.mark.parametrize("large", ["arrays", "blob"])
@pytest.mark.parametrize("seen_by", ["check", "save", "wait", "close"])
def test_full_disk_is_raised_and_the_last_checkpoint_is_intact(tmp_path, seen_by, large):
    big = {"w": jnp.ones((1 << 18,))} if large == "arrays" else {"w": jnp.ones(3)}
    blobs = {"large": bytes(1 << 18)} if large == "blob" else {}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, big, meta={})
    checkpoints.wait()
    with FullDisk():
        checkpoints.save(2, big, meta={}, blobs=blobs)
        with pytest.raises(CheckpointError, match="saving step 2 failed"):
            if seen_by == "check":
                for _ in range(1000):
                    checkpoints.check()
                    time.sleep(0.02)
            elif seen_by == "save":
                checkpoints.save(3, big, meta={})
            else:
                getattr(checkpoints, seen_by)()
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "1"]
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(abstract_of(big)).state, big)
        checkpoints.save(2, big, meta={})  # no save is skipped after a failure
        checkpoints.wait()
        assert checkpoints.steps()[-1] == 2


def test_a_failed_commit_is_raised_and_the_same_step_can_be_saved(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "dump_manifest", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
            checkpoints.save(1, state_at(1), meta={})
            with pytest.raises(CheckpointError, match="No space left"):
                checkpoints.wait()
        checkpoints.check()  # raised once
        checkpoints.save(1, state_at(1), meta={})
        assert checkpoints.restore(ABSTRACT).step == 1


def writer(directory: str) -> None:
    """Runs in a process of its own until it is killed."""
    with Checkpoints(directory, keep=2) as checkpoints:
        try:
            step = checkpoints.restore(ABSTRACT).step
        except NoCheckpointError:
            step = 0
        while True:
            step += 1
            checkpoints.save(step, state_at(step), meta={"step": step})
            print(step, flush=True)


@pytest.mark.integration
def test_kill_at_random_moments(tmp_path):
    rng = random.Random()
    command = [sys.executable, "-m", "tests.test_checkpoint_commit", str(tmp_path)]
    last = 0
    for _ in range(4):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        begun = int((process.stdout.read().split() or [first])[-1])
        process.wait()
        process.stdout.close()
        assert first == last + 1  # it went on from the last good step
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            if not checkpoints.steps():
                assert begun == 1
                continue
            latest = checkpoints.steps()[-1]
            # Each save waits for the one before it, so at most the newest is lost.
            assert latest >= begun - 1
            for step in checkpoints.steps():
                restored = checkpoints.restore(ABSTRACT, step)
                assert restored.meta == {"step": step}
                assert_same(restored.state, numpy_state(step))
            last = latest
    with Checkpoints(tmp_path):
        pass
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.deleted"))


if __name__ == "__main__":
    writer(sys.argv[1])
