"""`run` and `stop` where there is no machine yet, or not any more; how many hosts must answer."""

import threading
import time

import pytest

from flm_jax.launching.described import node_of, request_of
from flm_jax.launching.description import machine_of
from flm_jax.launching.messages import GcloudError
from flm_jax.launching.running import run_to_end
from flm_jax.launching.tpu import GaveUpError
from flm_jax.launching.verdict import Verdict
from tests import fake_gcloud
from tests.launch_world import World

pytestmark = pytest.mark.integration

WAITING = "WAITING_FOR_RESOURCES"


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = World(tmp_path, monkeypatch)
    yield made
    fake_gcloud.take_away()


class Watcher:
    """A `run` in a thread of its own."""

    def __init__(self, machine):
        self.codes = []
        self.thread = threading.Thread(target=lambda: self.codes.append(run_to_end(machine)))
        self.thread.start()

    def code(self):
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.codes[0]


def counts(world, *verbs):
    return world.counts(*verbs)


def test_a_stop_ends_the_wait_for_a_machine_that_takes_the_place_of_a_preempted_one(world):
    launch = world.launch(env=("LAST=9000",))
    watching = Watcher(world.tpu(launch))
    world.wait_for(world.steps)
    fake_gcloud.store("queue.json", [WAITING])
    world.faults({"match": "status", "kind": "preempt"})
    world.wait_for(lambda: world.said.count(f"demo: {WAITING}, waiting.") == 2)
    assert world.tpu(launch).stop() is None
    assert watching.code() == 75
    assert fake_gcloud.load("state.json", None) is None
    assert counts(world, "create", "start 1") == [2, 1]
    assert world.said[-1] in (
        "demo: nothing is queued and nothing runs.",
        "demo: was deleted; nothing is queued again. The same command begins again.",
    )
    # Asked for, it begins again.
    (world.cloud / "queue.json").unlink()
    assert run_to_end(world.tpu(world.launch(env=("LAST=1",)))) == 0


@pytest.mark.parametrize("first", ["SUSPENDED", "DELETING"])
def test_a_request_that_run_queues_while_it_is_stopped_is_withdrawn_too(first, world):
    """As `run` does it between its deletion of what was taken away and its next request."""
    fake_gcloud.store("state.json", {"queue": [first]})

    def queue_again():
        if first == "DELETING":
            (world.cloud / "state.json").unlink()
        world.wait_for(lambda: any("looking for" in line for line in world.said))
        time.sleep(0.6)  # some looks later
        fake_gcloud.store("state.json", {"queue": [WAITING]})

    thread = threading.Thread(target=queue_again)
    thread.start()
    assert world.tpu(poll=1.0).stop() is None
    thread.join()
    assert fake_gcloud.load("state.json", None) is None
    assert counts(world, "delete") == [2 if first == "SUSPENDED" else 1], world.said


def test_a_stop_where_nothing_is_queued_looks_for_a_while_and_says_so(world):
    assert world.tpu(poll=0.2).stop() is None
    assert world.said == [
        "There is no queued resource demo in us-central2-b; looking for 0.4 s whether a `run` queues one.",
        "demo: nothing is queued and nothing runs.",
    ]
    assert counts(world, "delete", "create") == [0, 0]


def test_a_run_whose_machine_is_deleted_by_somebody_makes_no_other(world):
    watching = Watcher(world.tpu(world.launch(env=("LAST=9000",))))
    world.wait_for(world.steps)
    world.tpu().delete()
    assert watching.code() == 75 and counts(world, "create") == [1]


@pytest.mark.parametrize("tries", [2, 4])
def test_a_run_deletes_what_was_taken_away_although_the_answer_is_lost(tries, world):
    """With two tries the second one is told that there is nothing; four are all that are made."""
    fake_gcloud.store("state.json", {"queue": ["SUSPENDED"]})
    said = "ERROR: (gcloud.compute.tpus) UNAVAILABLE: the service is currently unavailable"
    later = {"match": "delete", "kind": "fail", "said": said}
    world.faults({"match": "delete", "kind": "after", "said": said}, *[later] * (tries - 1 if tries == 4 else 0))
    assert run_to_end(world.tpu()) == 0
    assert counts(world, "delete", "create") == [tries, 1]


def test_a_stop_reaches_a_run_that_is_being_installed(world):
    launch = world.launch(env=("LAST=9000",))
    world.faults({"match": ".sh install", "kind": "slow", "seconds": 3})
    watching = Watcher(world.tpu(launch))
    world.wait_for(lambda: "install" in world.verbs())
    assert world.tpu(launch).stop() is Verdict.STOPPED
    assert watching.code() == 75
    assert counts(world, "start 1") == [0] and not (world.workdir / "started").exists()
    assert run_to_end(world.tpu(world.launch(env=("LAST=1",)))) == 0


def test_a_stop_reaches_hosts_that_have_nothing_yet_and_a_run_that_waited_for_them(world):
    world.tpu().create()
    fake_gcloud.store("state.json", {"queue": ["PROVISIONING"]})
    watching = Watcher(world.tpu())
    world.wait_for(lambda: "demo: PROVISIONING, waiting." in world.said)
    # As if the machine came between two looks of `run`: what its hosts are told then, it finds.
    for host in ("host-0-0", "host-0-1"):
        (world.cloud / "hosts" / host / "flm_launch/demo").mkdir(parents=True)
        (world.cloud / "hosts" / host / "flm_launch/demo/stop_asked").touch()
    fake_gcloud.store("state.json", {"queue": ["ACTIVE"]})
    assert watching.code() == 75 and counts(world, "start 1") == [0]
    # Who asks for a run on such a machine gets one.
    assert world.tpu().stop() is Verdict.STOPPED
    assert run_to_end(world.tpu()) == 0


def test_hosts_whose_program_has_ended_are_not_started_again_after_a_stop(world):
    machine = world.tpu()
    assert run_to_end(machine) == 0
    assert all(report.asked and report.state == "ended" for report in machine.reports("stop"))
    assert [report.attempt for report in machine.reports("start", 2)] == [1, 1]
    assert not any(report.asked for report in machine.reports("forget"))
    assert [report.attempt for report in machine.reports("start", 2)] == [2, 2]
    world.wait_for(lambda: machine.status() is Verdict.FINISHED)


@pytest.mark.parametrize(("topology", "answer"), [("v4-8", "1"), ("v4-32", "4")])
def test_a_machine_that_has_other_hosts_than_the_topology_is_told(topology, answer, world):
    """It has two."""
    machine = world.tpu(world.launch(machine=machine_of(topology, None)), failures=0)
    if topology == "v4-8":
        assert run_to_end(machine) == 0
    else:
        with pytest.raises(GaveUpError, match="2 of 4 hosts of demo answered"):
            run_to_end(machine)
    said = f"demo has 2 hosts, and {machine.launch.machine.name} would have {answer}: give the --topology and --slices"
    assert [line.startswith(said) for line in world.said].count(True) == 1


def test_hosts_that_google_cloud_counts_must_answer_even_if_the_topology_may_have_fewer(world):
    launch = world.launch(machine=machine_of("v5e-8", None))  # on one host or on two
    assert launch.fewest_hosts == 1
    (world.cloud / "reachable.json").write_text("1")
    with pytest.raises(GaveUpError, match="1 of 2 hosts of demo answered"):
        run_to_end(world.tpu(launch, failures=0))
    assert not [line for line in world.said if "would have" in line]


def test_what_cannot_be_counted_is_checked_by_the_topology(world):
    world.faults({"match": "tpu-vm", "kind": "fail", "said": "ERROR: (gcloud) PERMISSION_DENIED: no"})
    assert run_to_end(world.tpu()) == 0
    assert "PERMISSION_DENIED: no That all hosts answer is checked by the number" in " ".join(world.said)
    two = '{"networkEndpoints": [{}, {}]'
    texts = ("", "null", "{}", two + "}", two + ', "networkConfigs": [{}, {}]}')
    assert [node_of("a", text).hosts for text in texts] == [0, 0, 0, 2, 1]
    assert [request_of(text).state for text in ("", "[]", '{"state": {"state": "ACTIVE"}}')] == [
        *["UNKNOWN"] * 2,
        "ACTIVE",
    ]


def test_a_deletion_that_is_refused_is_told(world):
    with pytest.raises(GcloudError, match="NOT_FOUND"):
        world.tpu().delete()
