"""Launches on TPU VMs, against a stand-in for gcloud whose hosts run the real shell: run, restarts, stop, delete."""

import os
import subprocess
import sys
import threading
import time

import pytest

from flm_jax.launching import gcloud
from flm_jax.launching.description import machine_of
from flm_jax.launching.host import Report, reports
from flm_jax.launching.messages import GcloudError
from flm_jax.launching.running import run_to_end
from flm_jax.launching.tpu import GaveUpError
from flm_jax.launching.verdict import Verdict, judge
from tests import fake_gcloud
from tests.launch_world import MARK, World

pytestmark = pytest.mark.integration

UNAVAILABLE = "ERROR: (gcloud.compute.tpus) UNAVAILABLE: the service is currently unavailable"


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = World(tmp_path, monkeypatch)
    yield made
    fake_gcloud.take_away()


def test_run_gives_the_commands_that_a_dry_run_prints_and_finishes(world):
    assert run_to_end(world.tpu()) == 0
    printed = gcloud.smooth_commands(world.launch(), "run", "flm_launch_demo.sh", "0", "0", (50,))
    distinct = list(dict.fromkeys(map(tuple, world.calls())))
    assert distinct == list(dict.fromkeys(map(tuple, printed)))
    assert sorted(world.started()) == ["host-0-0", "host-0-1"]
    arguments = f"--gin_file=my.gin --workdir={world.workdir} --distributed"
    assert (world.workdir / "started").read_text().count(arguments) == 2
    assert "flm_jax[tpu]==0.1.0" in (world.cloud / "hosts/host-0-1/pip").read_text()
    assert world.said[0] == f"demo: flm_jax[tpu]==0.1.0, launch {world.launch().digest}."
    assert world.said[-1] == "demo: finished."


def test_a_preempted_machine_is_made_again_and_the_run_goes_on(world):
    world.faults({"match": "start 1", "kind": "preempt"}, {"match": "start 1", "kind": "preempt"})
    assert run_to_end(world.tpu()) == 0
    assert [verb for verb in world.verbs() if verb in ("create", "delete", "start 1")] == [
        *("create", "start 1", "delete", "create", "start 1", "delete", "create", "start 1"),
    ]


def test_a_machine_that_is_taken_away_while_it_trains_is_made_again(world):
    def preempt():
        world.wait_for(world.steps)
        world.faults({"match": "status", "kind": "preempt"})
        world.wait_for(lambda: "delete" in world.verbs())
        world.last(8)

    thread = threading.Thread(target=preempt)
    thread.start()
    assert run_to_end(world.tpu(world.launch(env=("LAST=9000",)))) == 0
    thread.join()
    assert len(world.started()) == 4
    assert "The machine is gone (SUSPENDED): deleting what is left, and queueing it again." in world.said


def test_a_run_that_saved_and_stopped_by_itself_is_started_again(world):
    world.workdir.mkdir()
    (world.workdir / "behave").write_text("75")
    assert run_to_end(world.tpu()) == 0
    assert world.verbs().count("start 2") == 1 and len(world.started()) in (3, 4)


def test_a_run_that_fails_is_not_started_again_and_its_log_is_shown(world, capsys):
    launch = world.launch(files=())  # the training program ends with 2 where it does not find its recipe
    assert run_to_end(world.tpu(launch)) == 1
    assert len(world.started()) == 2
    assert "ended with exit status 2" in capsys.readouterr().out
    assert "demo: failed: 2 hosts ended with exit status 2." in world.said
    # The same command again starts again, because the cause may have been removed.
    assert run_to_end(world.tpu(world.launch())) == 0


def test_stop_saves_and_a_watching_run_does_not_start_again(world):
    launch, codes = world.launch(env=("LAST=9000",)), []
    thread = threading.Thread(target=lambda: codes.append(run_to_end(world.tpu(launch))))
    thread.start()
    world.wait_for(world.steps)
    assert world.tpu(launch).stop() is Verdict.STOPPED
    thread.join()
    assert codes == [75]
    assert (world.workdir / MARK).exists()  # on the disks of the hosts alone it would be lost with the machine
    saved = int((world.workdir / "saved-host-0-0").read_text())
    assert 0 < saved < 9000
    # It goes on from what was saved, if it is asked to.
    assert run_to_end(world.tpu(world.launch(env=(f"LAST={saved + 3}",)))) == 0
    assert int((world.workdir / "saved-host-0-0").read_text()) == saved + 3
    assert not (world.workdir / MARK).exists()


def test_what_one_cannot_know_to_have_arrived_is_done_once(world):
    said = {"kind": "after", "said": UNAVAILABLE}
    world.faults({"match": "create", **said}, {"match": "start 1", **said}, {"match": "install", **said})
    launch = world.launch(env=("LAST=9000",))
    thread = threading.Thread(target=run_to_end, args=(world.tpu(launch),))
    thread.start()
    world.wait_for(world.steps)
    world.faults({"match": ".sh stop", **said})
    assert world.tpu(launch).stop() is Verdict.STOPPED
    thread.join()
    assert sorted(world.started()) == [
        "host-0-0",
        "host-0-1",
    ]  # not twice, and a second signal would have cost the save
    assert len((world.cloud / "hosts/host-0-0/pip").read_text().splitlines()) == 1
    assert (world.workdir / "saved-host-0-0").exists()


def test_a_machine_that_was_queued_although_the_answer_was_lost_is_taken(world):
    world.faults({"match": "create", "kind": "after", "said": UNAVAILABLE})
    world.tpu().create()
    with pytest.raises(GcloudError, match="already exists"):
        world.tpu().create()


def test_a_run_that_was_started_is_watched_and_not_installed_again(world):
    launch = world.launch(env=("LAST=9000",))
    threads = [threading.Thread(target=run_to_end, args=(world.tpu(launch),)) for _ in range(2)]
    threads[0].start()
    world.wait_for(world.steps)
    threads[1].start()
    world.wait_for(lambda: world.said.count("2 hosts running, attempt 1.") == 2)
    world.last(8)
    for thread in threads:
        thread.join()
    assert world.said.count("demo: finished.") == 2
    assert world.verbs().count("install") == 1
    with pytest.raises(ValueError, match="run something else"):
        judge([Report("a", "running", 1, None, False, "0")], "1")


def test_a_host_that_is_killed_is_started_again_with_the_others(world):
    def kill():
        world.wait_for(world.steps)
        os.killpg(int((world.cloud / "hosts/host-0-1/flm_launch/demo/group").read_text()), 9)
        world.wait_for(lambda: "kill_all" in world.verbs())
        world.last(8)

    launch = world.launch(env=("LAST=9000",))
    thread = threading.Thread(target=kill)
    thread.start()
    # The other host does not notice, as one that hangs: it is killed after some looks, and all begin again.
    assert run_to_end(world.tpu(launch, straggling=2)) == 0
    thread.join()
    assert world.verbs().count("kill_all") >= 1 and world.verbs().count("start 2") == 1


def test_losses_in_a_row_end_the_run(world):
    world.faults(*[{"match": " ssh ", "kind": "fail", "said": "Could not SSH into the node", "status": 255}] * 20)
    with pytest.raises(GaveUpError, match="Giving up after 3 failures in a row"):
        run_to_end(world.tpu(failures=2))


def test_hosts_that_do_not_answer_are_noticed_although_gcloud_exits_with_0(world):
    (world.cloud / "reachable.json").write_text("1")
    with pytest.raises(GaveUpError, match="1 of 2 hosts of demo answered"):
        run_to_end(world.tpu(failures=0))


def test_slices_are_nodes_of_one_queued_resource(world, monkeypatch):
    monkeypatch.setenv("FAKE_WORKERS", "1")
    launch = world.launch(machine=machine_of("v4-8", 2))
    assert run_to_end(world.tpu(launch)) == 0
    assert sorted(world.started()) == ["host-0-0", "host-1-0"]
    create = next(call for call in world.calls() if call[4] == "create")
    assert "--node-count=2" in create and "--node-prefix=demo" in create


def test_commands_that_take_too_long_are_ended_and_given_again(world):
    world.faults({"match": "describe", "kind": "slow", "seconds": 300})
    began = time.monotonic()
    assert world.tpu(patience=0.04).state() is None  # 4.8 s instead of 120
    assert time.monotonic() - began < 200 and "did not end within 5 s. Trying again (1 of 3)." in world.said[0]


def test_what_may_pass_is_tried_again_and_what_will_not_is_told(world):
    world.faults({"match": "describe", "kind": "fail", "said": UNAVAILABLE})
    assert world.tpu().state() is None
    denied = "ERROR: (gcloud) PERMISSION_DENIED: no permission\n- code: 403"
    world.faults({"match": "create", "kind": "fail", "said": denied})
    with pytest.raises(
        GcloudError, match="gcloud compute tpus queued-resources create demo: ERROR.*no permission - code"
    ):
        run_to_end(world.tpu())
    assert world.verbs().count("create") == 1


def test_status_logs_and_delete(world, capsys):
    machine = world.tpu()
    assert machine.status() is None
    assert world.said == ["There is no queued resource demo in us-central2-b."]
    assert run_to_end(machine) == 0
    world.said.clear()
    assert machine.status() is Verdict.FINISHED
    assert "  host-0-1: ended with exit status 0, attempt 1" in world.said
    machine.logs("0", "1", 3, False)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["step 7", "step 8"] and "attempt 1 on host-0-1 ended with exit status 0" in shown[2]
    machine.delete()
    assert machine.state() is None


def test_a_log_is_followed_beyond_a_lost_connection(world, capfd):
    run_to_end(world.tpu())
    world.faults({"match": "follow", "kind": "fail", "said": "Connection reset", "status": 255})
    tail = [sys.executable, "-c", "import time; time.sleep(0.3)"]
    machine = world.tpu(failures=1, poll=0.1)
    real, seen = gcloud.ssh, []

    def ssh(launch, *words, **where):
        seen.append(words)
        return tail if words[0] == "log" and len(seen) > 1 else real(launch, *words, **where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gcloud, "ssh", ssh)
        fake_gcloud.store("state.json", {"queue": ["ACTIVE", "SUSPENDED"]})
        with pytest.raises(GcloudError, match="not active any more"):
            machine.logs("0", "0", 5, True)
    assert seen == [("log", 5, "follow"), ("log", 0, "follow")]


HOSTS = "flm_launch: host={} state={} attempt={} status={} asked={} launch=d"


@pytest.mark.parametrize(
    ("hosts", "verdict"),
    [
        ([("new", 0, "-", 0)] * 2, Verdict.NEW),
        ([("ended", 1, 0, 0)] * 2, Verdict.FINISHED),
        ([("ended", 1, 0, 0), ("running", 1, "-", 0)], Verdict.RUNNING),
        ([("ended", 1, 75, 0)] * 2, Verdict.AGAIN),
        ([("ended", 1, 1, 0), ("ended", 1, 80, 0)], Verdict.AGAIN),
        ([("ended", 1, 75, 1)] * 2, Verdict.STOPPED),
        ([("ended", 1, 1, 0)] * 2, Verdict.FAILED),
        ([("ended", 1, 1, 0), ("lost", 1, "-", 0)], Verdict.AGAIN),
        ([("ended", 1, 1, 0), ("ended", 1, 137, 0)], Verdict.AGAIN),
        ([("ended", 1, 1, 0), ("ended", 1, 79, 0)], Verdict.AGAIN),
        ([("ended", 1, 1, 0), ("new", 0, "-", 0)], Verdict.AGAIN),
    ],
)
def test_what_reports_amount_to(hosts, verdict):
    printed = "\n".join(HOSTS.format(f"h{n}", *host) for n, host in enumerate(hosts))
    assert judge(reports(f"Warning: x\n{printed}\n"), "d") is verdict
    if verdict is not Verdict.RUNNING:
        assert judge(reports(printed), "another") is Verdict.NEW


def test_the_release_is_really_installed_and_its_program_started(world):
    """With a real pip and a wheel, on one host."""
    wheel = world.workdir.parent / "flm_jax-9.9-py3-none-any.whl"
    build_wheel(wheel)
    (world.cloud / "bin/python3.13").unlink()
    (world.cloud / "bin/python3.12").symlink_to(sys.executable)
    launch = world.launch(
        machine=machine_of("v4-8", None), release=f"flm_jax[tpu] @ file://{wheel}", constraints=("flm_jax==9.9",)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_WORKERS", "1")
        patch.setenv("PIP_NO_INDEX", "1")
        assert run_to_end(world.tpu(launch)) == 0
    arguments = (world.workdir / "trained").read_text()
    assert arguments == f"--gin_file=my.gin --workdir={world.workdir} --distributed"


def build_wheel(path):
    """A wheel of a flm_jax whose training program writes its arguments into the work directory."""
    import zipfile

    code = "import pathlib, sys\ndef main():\n    (pathlib.Path(sys.argv[2].partition('=')[2]) / 'trained').write_text("
    code += "' '.join(sys.argv[1:]))\n"
    about = "Metadata-Version: 2.1\nName: flm_jax\nVersion: 9.9\nProvides-Extra: tpu\n"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("fake_flm.py", code)
        info = "flm_jax-9.9.dist-info"
        file.writestr(f"{info}/METADATA", about)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/entry_points.txt", "[console_scripts]\nflm-train = fake_flm:main\n")
        file.writestr(f"{info}/RECORD", "")


def test_the_stand_in_is_what_is_called(world):
    assert subprocess.run(["bash", "-c", "command -v gcloud"], capture_output=True, text=True).stdout.startswith(
        str(world.cloud.parent)
    )
