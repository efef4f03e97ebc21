"""Faults of machines and of gcloud in a launch: lost slices, refused requests, broken copies, a name that is taken."""

import threading
from types import SimpleNamespace

import pytest

from flm_jax.cli import launch_tpu
from flm_jax.launching import gcloud, host, running
from flm_jax.launching.description import machine_of
from flm_jax.launching.ending import settle
from flm_jax.launching.messages import GcloudError, RequestFailedError
from flm_jax.launching.running import Keeper, run_to_end
from flm_jax.launching.tpu import GaveUpError, Tpu, script_file
from tests import fake_gcloud
from tests.launch_world import World

pytestmark = pytest.mark.integration


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = World(tmp_path, monkeypatch)
    yield made
    fake_gcloud.take_away()


@pytest.mark.parametrize("state", ["PREEMPTED", "MISSING"])
def test_a_machine_whose_request_is_active_but_lacks_a_slice_is_made_again(state, world, monkeypatch):
    monkeypatch.setenv("FAKE_WORKERS", "1")
    launch = world.launch(machine=machine_of("v4-8", 2))
    world.there(launch)
    fake_gcloud.store("nodes.json", {"1": state})
    assert run_to_end(world.tpu(launch)) == 0
    assert world.counts("delete", "create") == [1, 1]
    assert f"Not all of demo can be used: demo-1 is {state}" in " ".join(world.said)
    assert "The machine is gone (a slice is lost): deleting what is left, and queueing it again." in world.said


def test_an_installation_that_fails_on_a_slice_that_is_being_taken_away_is_not_final(world):
    world.faults({"match": "install", "kind": "lose", "said": "ERROR: pip was killed"})
    assert run_to_end(world.tpu()) == 0
    assert world.counts("delete", "create") == [1, 2]


def failed(code, message):
    return [{"state": "FAILED", "failedData": {"error": {"code": code, "message": message}}}]


def test_a_request_that_is_refused_ends_a_run_with_the_reason(world):
    why = "Quota limit 'TPUsPerProject' has been exceeded. Limit: 0 in region r."
    fake_gcloud.store("queue.json", failed(8, why))
    machine = world.tpu()
    with pytest.raises(RequestFailedError, match="The request for demo failed: Quota limit 'TPUs"):
        launch_tpu._run(machine, False)
    assert world.counts("create", "delete") == [1, 0]
    assert world.said[-1].startswith("The request for demo is FAILED: it costs nothing, but counts against quotas")
    assert machine.status() is None and world.said[-1] == f"demo: FAILED: {why}"
    assert settle(machine, True) and fake_gcloud.load("state.json", None) is None


def test_a_request_that_fails_inside_google_cloud_is_made_again_and_not_for_ever(world):
    fake_gcloud.store("queue.json", failed(13, "an internal error"))
    with pytest.raises(
        GaveUpError, match=r"after 3 failures in a row\. The request for demo failed: an internal error"
    ):
        run_to_end(world.tpu(failures=2))
    assert world.counts("create", "delete") == [3, 2]


def test_a_machine_that_a_user_suspends_is_not_made_again(world):
    def suspend():
        world.wait_for(world.steps)
        fake_gcloud.store("state.json", {"queue": [{"state": "SUSPENDED", "stateInitiator": "USER"}]})

    thread = threading.Thread(target=suspend)
    thread.start()
    assert run_to_end(world.tpu(world.launch(env=("LAST=9000",)))) == 75
    thread.join()
    assert world.counts("create", "delete") == [1, 0]
    # Who asks for a run then gets one.
    fake_gcloud.take_away()
    assert run_to_end(world.tpu(world.launch(env=("LAST=1",)))) == 0


def test_a_key_that_the_agent_lacks_is_named_at_once_although_gcloud_exits_with_0(world):
    (world.cloud / "no_key").touch()
    with pytest.raises(GcloudError, match=r"0 of 2 hosts of demo answered: SSH Key is not present .* run \"ssh-add"):
        run_to_end(world.tpu())
    assert world.counts("create") == [1] and not [line for line in world.said if "Trying again" in line]


def test_a_copy_of_the_script_that_was_interrupted_counts_as_none(world):
    launch = world.launch()
    world.there(launch)
    text = host.script(launch)
    for home in (world.cloud / "hosts").iterdir():
        (home / host.script_name(launch)).write_text(text[: len(text) // 2])
    assert run_to_end(world.tpu(launch)) == 0


def test_two_launches_of_one_name_do_not_install_over_each_other(world):
    launch = world.launch(env=("LAST=9000",))
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_to_end(world.tpu(launch))))
    thread.start()
    world.wait_for(world.steps)
    other = world.tpu(world.launch(release="flm_jax[tpu]==0.2.0"))
    with script_file(other.launch) as script:
        other.cloud.call(gcloud.copy(other.launch, script))
    with pytest.raises(GcloudError, match=f"host-0-0: launch {launch.digest} runs under this name; stop it, or take"):
        other.reports("install")
    assert len((world.cloud / "hosts/host-0-0/pip").read_text().splitlines()) == 1
    world.last(8)
    thread.join()
    assert codes == [0]


def test_a_run_that_had_finished_when_its_machine_was_taken_away_trains_nothing_again(world):
    assert run_to_end(world.tpu()) == 0
    fake_gcloud.take_away()
    fake_gcloud.store("state.json", {"queue": ["SUSPENDED"]})
    assert run_to_end(world.tpu()) == 0
    assert (world.workdir / "saved-host-0-0").read_text() == "8\n" and len(world.started()) == 4
    logs = (world.cloud / "hosts").glob("*/flm_launch/demo/log")
    assert not any("step" in log.read_text() for log in logs)


def test_status_shows_the_hosts_that_answer_before_it_says_that_others_do_not(world):
    world.there()
    (world.cloud / "reachable.json").write_text("1")
    with pytest.raises(GcloudError, match="1 of 2 hosts of demo answered"):
        world.tpu().status()
    assert "  host-0-0: new, attempt 0" in world.said


def test_a_log_that_is_not_there_yet_is_said(world):
    world.there()
    with pytest.raises(GcloudError, match="error: host-0-0: nothing was installed yet, so there is no log"):
        world.tpu().logs("0", "0", 5, False)


def test_what_is_left_at_the_end_is_said_or_deleted(world, monkeypatch):
    def ended(status, delete):
        monkeypatch.setattr(running, "run_to_end", lambda machine: status)
        world.said.clear()
        try:
            launch_tpu._run(world.tpu(), delete)
        except SystemExit as error:
            return error.code
        return 0

    world.there()
    assert ended(0, False) == 0 and world.said[-1].endswith("costs (without --delete_at_end it is kept): see `delete`.")
    assert ended(75, True) == 75 and "costs (what was stopped goes on there)" in world.said[-1]
    world.faults({"match": "delete", "kind": "fail", "said": "ERROR: (gcloud.x) PERMISSION_DENIED: no"})
    assert ended(0, True) == 1 and "may still be there, and costs (gcloud compute tpus" in world.said[-1]
    assert ended(1, True) == 1 and world.said == ["Deleted demo."]
    fake_gcloud.store("state.json", {"queue": ["WAITING_FOR_RESOURCES"]})
    assert ended(1, False) == 1 and "`stop` withdraws the request" in world.said[-1]


def test_who_interrupts_a_run_is_told_what_goes_on_and_costs(world, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tpu, "create", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(world.tpu())
    assert world.said[-1].startswith("The request for demo stays, and a machine costs from when it is there")
    keeper = Keeper(world.tpu())
    assert keeper.left() == "Interrupted before anything was done for demo."
    keeper.counted = True
    assert "costs, though nothing runs on it yet" in keeper.left()
    keeper.started = True
    assert keeper.left().startswith("The hosts go on")


def test_a_run_outlives_an_outage_of_the_network_here(world, monkeypatch):
    def state(self):
        raise GcloudError("UNAVAILABLE", transient=True)

    waits = []
    monkeypatch.setattr(Tpu, "request", state)
    monkeypatch.setattr(running, "time", SimpleNamespace(sleep=waits.append))
    with pytest.raises(GaveUpError):
        run_to_end(world.tpu(poll=60))
    assert waits == [60 * times for times in (1, 1, 1, 2, 4, 8, 16, 30, 30, 30)]
