"""Runs of points as processes: several at a time, failures, stops, what goes on, cores, scripts."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flm_jax.records.kept import KeptLines
from flm_jax.sweeps import Sweep, execute, space
from flm_jax.sweeps.execute import Places, Runner
from flm_jax.sweeps.results import DONE, FAILED, STOPPED, WAITING

pytestmark = pytest.mark.integration
# In place of training: the loss is the seed, or what the point's own directory says is done.
PROGRAM = """
import json, os, signal, sys, time
workdir, seed = sys.argv[1], int(sys.argv[2])
print("cores", sorted(os.sched_getaffinity(0)), os.environ["NPROC"], flush=True)
if seed == 13:
    print("error: it diverged")
    sys.exit(1)
if seed == 14:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 15:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(60)
os.makedirs(workdir, exist_ok=True)
last = {"eval_loss": seed, "total_tokens": 1, "total_flops": 2, "params": 3}
json.dump({"stages": [last]}, open(workdir + "/report.json", "w"))
"""


@pytest.fixture
def program(monkeypatch):
    def command(places, point):
        return [sys.executable, "-c", PROGRAM, str(places.run(point)), str(point.seed)]

    monkeypatch.setattr(execute, "command", command)


def run(tmp_path, seeds, cores=((0,),), show=lambda runner: None):
    sweep = Sweep(seeds=seeds)
    points = space.points(sweep, space.candidates(sweep))
    environment = {name: value for name, value in os.environ.items() if name not in ("NPROC", "OMP_NUM_THREADS")}
    with KeptLines(tmp_path / "runs.jsonl", "point") as record:
        runner = Runner(Places(tmp_path), "stages.-1.eval_loss", cores, environment, record, show)
        runner.run(points)
    return runner


def test_a_failure_is_reported_and_the_others_go_on(tmp_path, program):
    runner = run(tmp_path, [1, 13, 14, 2])
    found = list(runner.outcomes.values())
    assert [outcome.state for outcome in found] == [DONE, FAILED, FAILED, DONE]
    assert [outcome.value for outcome in found] == [1.0, None, None, 2.0]
    assert found[1].reason == "it diverged"
    assert found[2].reason.startswith("signal 9: cores [0] 1")
    assert not runner.stopped and not runner.processes


def test_what_is_done_is_not_run_again_and_what_failed_is(tmp_path, program):
    run(tmp_path, [1, 13])
    report = tmp_path / "points/seed=1/report.json"
    report.write_text(report.read_text().replace('"eval_loss": 1', '"eval_loss": 1.5'))
    again = run(tmp_path, [1, 13, 2])
    assert [outcome.value for outcome in again.outcomes.values()] == [1.5, None, 2.0]
    assert (tmp_path / "logs/seed=13.log").read_text().count("error: it diverged") == 2
    kept = {line["point"]: line for line in map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())}
    assert kept["seed=13"]["state"] == "failed"
    # Seconds add up over starts.
    assert again.outcomes["seed=13"].seconds == kept["seed=13"]["seconds"] > 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two cores are divided")
def test_runs_at_the_same_time_have_cores_of_their_own(tmp_path, program):
    cores, most = execute.shares(2), []
    run(tmp_path, [1, 2, 3], cores, lambda runner: most.append(len(runner.processes)))
    assert max(most) == 2
    said = {(tmp_path / f"logs/seed={n}.log").read_text() for n in (1, 2, 3)}
    assert said == {f"cores {list(share)} {len(share)}\n" for share in cores}
    assert not set(cores[0]) & set(cores[1])
    with pytest.raises(ValueError, match="--parallel=4000, but this process may use"):
        execute.shares(4000)


def test_a_signal_stops_the_runs_with_a_save_and_starts_no_more(tmp_path, program):
    log = tmp_path / "logs/seed=15.log"

    def stop():
        while not (log.exists() and "ready" in log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    runner = run(tmp_path, [15, 2])
    assert runner.stopped
    assert [outcome.state for outcome in runner.outcomes.values()] == [STOPPED, WAITING]


def test_a_point_that_another_process_trains_is_waited_for(tmp_path, program):
    directory = tmp_path / "points/seed=1"
    directory.mkdir(parents=True)
    with (directory / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        seen = []

        def show(runner):
            seen.append(runner.outcomes["seed=1"].state)
            if runner.outcomes["seed=2"].state == DONE:  # which did not wait
                (directory / "report.json").write_text(
                    '{"stages": [{"eval_loss": 8, "total_tokens": 1, "total_flops": 2, "params": 3}]}'
                )
                fcntl.flock(lock, fcntl.LOCK_UN)

        runner = run(tmp_path, [1, 2], show=show)
    assert seen[0] == WAITING
    assert runner.outcomes["seed=1"].value == 8.0  # of the other process
    assert not (tmp_path / "logs/seed=1.log").exists()


def test_runs_end_when_the_sweep_is_killed(tmp_path):
    """SIGTERM reaches the program, as the kernel sends it when the starter dies."""
    inner = f"import subprocess, sys, os, time; subprocess.Popen([sys.executable, {execute.pinned.__file__!r}, '0', "
    inner += (
        "str(os.getpid()), sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(60)']); time.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", inner], stdout=subprocess.PIPE)
    assert starter.stdout.read(1) == b"1"
    starter.kill()
    since = time.monotonic()
    starter.stdout.read()  # to the end: the program holds the pipe until it is gone
    assert time.monotonic() - since < 20
    starter.wait()


def test_scripts_start_every_point_and_one_that_fails_does_not_stop_the_rest(tmp_path, program):
    sweep = Sweep(points={"it's": {}, "b": {}}, seeds=[13, 4])
    points = space.points(sweep, space.candidates(sweep))
    every = execute.write_scripts(Places(tmp_path), points, tmp_path)
    done = subprocess.run(["sh", every], env={**os.environ, "NPROC": "1"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("failed: ") == 2
    assert sorted(path.name for path in (tmp_path / "points").iterdir()) == ["b,seed=4", "it-s,seed=4"]
    listed = subprocess.run(["sh", every], env={**os.environ, "LAUNCH": "echo queued"}, capture_output=True, text=True)
    assert listed.returncode == 0
    assert listed.stdout.count("queued ./") == 4
