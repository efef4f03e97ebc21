"""How launches on TPU VMs end: a stop that outlives a machine, errors of `run`, hosts that another one locks."""

import fcntl
import threading

import pytest

from flm_jax.cli import launch_tpu
from flm_jax.launching.described import Request
from flm_jax.launching.description import machine_of
from flm_jax.launching.ending import settle
from flm_jax.launching.host import Report
from flm_jax.launching.messages import GcloudError
from flm_jax.launching.running import Keeper, run_to_end
from flm_jax.launching.tpu import Tpu
from flm_jax.launching.verdict import Verdict
from tests import fake_gcloud
from tests.launch_world import MARK, World

pytestmark = pytest.mark.integration


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = World(tmp_path, monkeypatch)
    yield made
    fake_gcloud.take_away()


def test_a_stop_outlives_a_machine_that_is_taken_away(world):
    def stop_and_preempt():
        world.wait_for(world.steps)
        (world.workdir / MARK).touch()
        world.faults({"match": "status", "kind": "preempt"})

    thread = threading.Thread(target=stop_and_preempt)
    thread.start()
    assert run_to_end(world.tpu(world.launch(env=("LAST=9000",)))) == 75
    thread.join()
    assert len(world.started()) == 2 and world.verbs().count("create") == 2
    # A new `run` was asked for, so it starts.
    assert run_to_end(world.tpu(world.launch(env=("LAST=1",)))) == 0


def test_a_host_is_probed_by_several_at_once_and_a_start_that_does_not_start_fails(world):
    launch = world.launch(machine=machine_of("v4-8", None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_WORKERS", "1")
        assert run_to_end(world.tpu(launch)) == 0
        lock = world.cloud / "hosts/host-0-0/flm_launch/demo/lock"
        machine = world.tpu(launch)
        with lock.open() as probe:
            fcntl.flock(probe, fcntl.LOCK_SH)
            assert machine.status() is Verdict.FINISHED
            threading.Timer(0.5, lambda: fcntl.flock(probe, fcntl.LOCK_UN)).start()
            (found,) = machine.reports("start", 2)  # waits for the probe
        assert found.attempt == 2
        world.wait_for(lambda: machine.reports()[0].state == "ended")
        with lock.open() as another:
            fcntl.flock(another, fcntl.LOCK_EX)
            with pytest.raises(GcloudError, match="host-0-0: attempt 3 was not started, because attempt 2 still runs"):
                machine.reports("start", 3)


@pytest.mark.parametrize("delete", [False, True])
def test_a_machine_is_deleted_at_the_end_or_said_to_cost_when_run_fails(world, delete):
    world.faults({"match": "install", "kind": "fail", "said": "ERROR: No matching distribution, temporarily"})
    with pytest.raises(GcloudError, match="No matching distribution"):
        launch_tpu._run(world.tpu(), delete)
    assert world.verbs().count("install") == 1
    assert ("delete" in world.verbs()) is delete
    assert world.said[-1] == (
        "Deleted demo."
        if delete
        else "The machine of demo may still be there, and costs (without --delete_at_end it is kept): see `delete`."
    )


def test_a_machine_whose_hosts_run_is_not_deleted_after_an_error(world, monkeypatch):
    monkeypatch.setattr(Tpu, "request", lambda self: Request("ACTIVE"))
    monkeypatch.setattr(Tpu, "reports", lambda self: [Report("a", "running", 1, None, False, "0")])
    settle(world.tpu(), True)
    assert "may still be there, and costs (its hosts are running)" in world.said[-1]


def test_status_goes_by_the_hosts_that_run_and_says_how_many_answered(world):
    new, old = Report("a", "new", 0, None, False, "-"), Report("b", "ended", 1, 0, False, "0")
    running = Report("c", "running", 2, None, False, "1")
    machine = world.tpu(world.launch(machine=None))
    assert machine._judged([new, old, running]) is Verdict.RUNNING
    assert machine._judged([new, old]) is Verdict.AGAIN
    assert world.said[0].startswith("3 hosts of demo answered; with --topology")


def test_an_error_while_asking_for_the_machine_does_not_end_a_run(world, monkeypatch):
    def state(self):
        raise errors.pop()

    monkeypatch.setattr(Tpu, "state", state)
    errors = [GcloudError("denied"), GcloudError("later", transient=True)]
    assert not Keeper(world.tpu()).is_final(GcloudError("pip"))
    assert Keeper(world.tpu()).is_final(GcloudError("pip"))
