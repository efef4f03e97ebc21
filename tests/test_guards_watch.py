"""The watchdog, on a clock that the test sets, and on threads that really hang."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flm_jax.guards import Watch, Watchdog, watching
from flm_jax.guards.watch import DATA, SAVE, STEP
from tests.test_processes import start

ROOT = Path(__file__).resolve().parent.parent


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def watch_of(folder, **settings):
    clock, ended = Clock(), []
    found = Watch(
        Watchdog(**{"at_least_seconds": 10.0, "first_seconds": 100.0, **settings}), folder, clock, ended.append
    )

    def goes(what, step, seconds):
        found.at(what, step)
        clock.now += seconds

    return found, clock, goes, ended


def test_each_kind_of_waiting_is_compared_with_its_own_usual_time(tmp_path, capfd):
    watch, clock, goes, ended = watch_of(tmp_path)
    for step in range(1, 11):
        goes(DATA, step, 0.1)
        goes(STEP, step, 2.0)
    watch.at(DATA, 11)
    assert watch.usual(DATA) == pytest.approx(0.1) and watch.usual(STEP) == pytest.approx(2.0)
    assert (watch.limit(DATA), watch.limit(STEP), watch.limit(SAVE)) == (10.0, 20.0, 100.0)
    clock.now += 9.9
    assert watch.check() is None
    clock.now += 0.2
    said = watch.check()
    assert said.endswith("step 11: reading the batch has taken 10.1 s so far; usually it takes 0.1 s.")
    printed = capfd.readouterr().err
    assert f"WATCHDOG: {said}" in printed and "test_each_kind_of_waiting" in printed, "the stack of this thread"
    assert "Thread" in watch.file.read_text() and said in watch.file.read_text()
    # Told once, and again when it has taken twice as long; then the next thing begins.
    assert watch.check() is None
    clock.now += 10.2
    assert "20.3 s so far" in watch.check()
    watch.at(STEP, 11)
    clock.now += 19.9
    assert watch.check() is None and not ended


def test_the_first_steps_compile_and_have_a_limit_of_their_own(tmp_path):
    watch, clock, goes, ended = watch_of(tmp_path, end=True)
    for step in range(1, 5):
        goes(STEP, step, 60.0)
    watch.at(STEP, 5)
    clock.now += 99.0
    assert watch.check() is None
    clock.now += 2.0
    assert "how long it usually takes is not known yet" in watch.check()
    assert len(ended) == 1 and ended[0].endswith("Watchdog.end = True ends the run.")
    watch.pause()
    clock.now += 1e6
    assert watch.check() is None


def test_without_settings_nothing_is_watched(tmp_path):
    before = threading.active_count()
    with watching(None, tmp_path) as watch:
        watch.at(STEP, 1)
        assert threading.active_count() == before and watch.check() is None
    with watching(Watchdog(), tmp_path):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_does_not_silence_it(tmp_path, capfd):
    watch, clock, _, _ = watch_of(tmp_path / "not there")
    watch.at(STEP, 1)
    clock.now += 101
    assert watch.check() is not None
    assert "WATCHDOG" in capfd.readouterr().err


@pytest.mark.integration
def test_a_thread_that_lets_no_python_code_run_is_told_by_faulthandler(tmp_path):
    """As one that waits for a page of a file; the watchdog's own thread cannot run then."""
    program = (
        "import ctypes, pathlib, time\n"
        "from flm_jax.guards import Watchdog, watching\n"
        "def stuck():\n"
        "    ctypes.PyDLL(None).sleep(60)\n"
        "dog = Watchdog(at_least_seconds=0.4, first_seconds=0.8, end=True)\n"
        f"with watching(dog, pathlib.Path({str(tmp_path)!r})) as watch:\n"
        "    watch.at('computing the step', 7)\n"
        "    time.sleep(0.3)\n"
        "    stuck()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and "in stuck" in done.stderr, done.stderr


@pytest.mark.integration
def test_of_two_processes_each_watches_itself_and_the_one_that_hangs_ends_both(tmp_path):
    printed = start(tmp_path, 2, 4, {"do": "stalled", "name": "stalled"})
    assert printed[1].endswith("exit status 79") and printed[0].endswith("exit status 1")
    # The one that hangs says what it does, the other one what it waits for, and why it ends.
    assert "error: Process 1, step 2: reading the batch has taken" in printed[1]
    assert "error: process 1 failed: Process 1, step 2: reading the batch has taken" in printed[0]
    stacks = [(tmp_path / f"stalls.{process}.txt").read_text() for process in range(2)]
    assert "Process 0, step 2: the vote to stop has taken" in stacks[0] and "in stalled" in stacks[0]
    assert "Process 1, step 2: reading the batch has taken" in stacks[1] and "in stalled" in stacks[1]
