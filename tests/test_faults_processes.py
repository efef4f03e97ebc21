"""kill -9 of one of two processes in every phase of whole runs: `make test-faults`.

FAULTS_SEED chooses the same places again; without it they are drawn, and the seed is printed.
"""

import dataclasses
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from flm_jax.distributed import LOST
from tests.environment import as_user_compiling_fast
from tests.faults import ROOT, Place, Point, Write, outcome, state_sha256
from tests.small import write_corpus
from tests.test_faults import SEED, say
from tests.test_processes import found, start
from tests.worker import POISONED

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

HEARTBEAT = 10
# Seconds in which the other process ends; it counts the heartbeat's timeout from the last sign of life.
PATIENCE = 3 * HEARTBEAT
RECIPE = f"""
train.recipe = @Recipe()
train.run = @Run()
Recipe.stages = [@a/Stage(), @b/Stage()]
Recipe.data = @DataConfig()
Recipe.eval_every = 4
Recipe.eval_windows = 8
Run.checkpoint_every = 2
Run.log_every = 1
Run.sample_tokens = 4
Stage.batch_size = 8
a/Stage.name = 'a'
a/Stage.model = @a/ModelConfig()
a/Stage.steps = 4
b/Stage.name = 'b'
b/Stage.model = @b/ModelConfig()
b/Stage.steps = 8
b/Stage.growth = @Growth()
Growth.method = 'mask'
Growth.ramp_steps = 4
ModelConfig.embed = 32
ModelConfig.heads = 4
ModelConfig.mlp = 64
ModelConfig.vocab = 320
a/ModelConfig.layers = 1
b/ModelConfig.layers = 2
DataConfig.context = 32
DataConfig.vocabulary = @Bytes()
DataConfig.corpus = @TextFolder()
TextFolder.path = '{sysconfig.get_path("stdlib")}/json'
TextFolder.pattern = '**/*.py'
"""
LAST = "{}/checkpoints/1_second/6"
# In the order of the run: what is being written, by which process, and up to how many seconds later that one is killed.
# Process 1 writes nothing but its part of the arrays.
PLACES = (
    ("preparation", "cache/textfolder-", 0, 0.0),
    ("first save", "work/0_a/0", 1, 0.0),
    ("save", "work/0_a/2", 0, 0.0),
    ("training", "work/0_a/2", 1, 2.0),
    ("border", "work/0_a/4", 1, 2.0),
    ("growth", "work/1_b/0", 0, 0.0),
    ("growth", "work/1_b/0", 1, 0.0),
    ("ramp", "work/1_b/2", 0, 2.0),
    ("save", "work/1_b/6", 1, 0.0),
    ("training", "work/1_b/6", 0, 2.0),
)


class Ended(NamedTuple):
    """How a process has ended: its status, when, what it said, and its writes."""

    status: int
    at: float
    said: str
    writes: list[Write]


@dataclasses.dataclass(frozen=True)
class Together(Place):
    """The folder of a run in two processes of two simulated devices each."""

    def prepare(self) -> None:
        """Writes the recipe."""
        self.folder.mkdir(parents=True)
        (self.folder / "recipe.gin").write_text(f"{RECIPE}DataConfig.cache_dir = '{self.cache}'\n")

    def end(self, point: Point | None = None, victim: int = 0) -> list[Ended]:
        """Starts both processes, and waits until they have ended; kills one of them at a point."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        env = as_user_compiling_fast()
        flags = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
        env |= {"JAX_PLATFORMS": "cpu", "NPROC": "32", "XLA_FLAGS": flags}
        processes = []
        for number in range(2):
            log = self.folder / f"writes.{number}.txt"
            log.write_text("")
            settings = {"roots": {"cache": str(self.cache), "work": str(self.workdir)}, "log": str(log)}
            settings |= point._asdict() if point is not None and number == victim else {}
            arguments = [f"--gin_file={self.folder}/recipe.gin", f"--workdir={self.workdir}"]
            arguments += [f"--coordinator={address}", "--processes=2", f"--process={number}"]
            arguments += [f"--heartbeat_timeout={HEARTBEAT}"]
            program = [sys.executable, ROOT / "tests/killed.py", json.dumps(settings), ROOT / "experiments/train.py"]
            with (self.folder / f"said.{number}.txt").open("w") as said:
                started = subprocess.Popen([*program, *arguments], env=env, stdout=said, stderr=subprocess.STDOUT)
            processes.append(started)
        try:
            return self._ended(processes)
        finally:
            for process in processes:
                process.kill()

    def _ended(self, processes: list[subprocess.Popen]) -> list[Ended]:
        ends: dict[int, float] = {}
        while len(ends) < len(processes):
            time.sleep(0.1)
            for number, process in enumerate(processes):
                if process.poll() is not None:
                    ends.setdefault(number, time.monotonic())
            waited = time.monotonic() - min(ends.values(), default=time.monotonic())
            assert waited < 10 * PATIENCE, f"one process has ended, and the other one has not after {waited:.0f} s"
        every = []
        for number, process in enumerate(processes):
            lines = (self.folder / f"writes.{number}.txt").read_text(errors="surrogateescape").splitlines()
            writes = [line.split("\t") for line in lines]
            said = (self.folder / f"said.{number}.txt").read_text()
            made = [Write(float(at), group, what) for at, group, what in writes]
            every.append(Ended(process.returncode, ends[number], said, made))
        return every


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The place of the runs, and what the run of two processes leaves of which none is killed, with its writes."""
    place = Together(tmp_path_factory.mktemp("processes") / "run")
    place.prepare()
    ended = place.end()
    assert [one.status for one in ended] == [0, 0], ended
    left = outcome(place.workdir)
    shutil.rmtree(place.folder)
    return place, left, [one.writes for one in ended]


def test_one_of_two_processes_killed_in_every_phase_and_all_run_again_equals_never_killed(whole):
    """The other one ends by itself in bounded time, with a sentence and a status after which one starts again."""
    place, expected, writes = whole
    rng = random.Random(SEED)
    place.prepare()
    for phase, of, victim, longest in PLACES:
        written = [write.group for write in writes[victim] if write.group.startswith(of)]
        point = Point(phase, written[0], rng.randint(1, len(written)), rng.uniform(0, longest))
        ended = place.end(point, victim)
        killed, other = ended[victim], ended[1 - victim]
        after = other.at - killed.at
        at = f"{point.delay:.1f} s after write {point.number} of {point.group}"
        say(f"process {victim} killed, {phase}: {at}; the other one ended {after:.1f} s later with {other.status}")
        assert killed.status == -signal.SIGKILL, killed.said
        assert 0 <= after < PATIENCE, other.said
        # JAX itself ends a process that waits for another one through the coordination service, from C++.
        if other.status == LOST:
            assert f"error: process {1 - victim} has lost another process" in other.said, other.said
            assert "Traceback" not in other.said, other.said
        else:
            assert other.status == -signal.SIGABRT, other.said
            assert "This most likely indicates that another task died" in other.said
    ended = place.end()
    assert [one.status for one in ended] == [0, 0], ended
    left = outcome(place.workdir)
    for name in expected:  # one by one, or the report of a difference is thousands of lines long
        assert left[name] == expected[name], name


def test_a_process_that_is_killed_before_the_first_collective(tmp_path):
    """It has joined: JAX ends the other one, which waits for its devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    join = f"from flm_jax import distributed; distributed.join({address!r}, 2, %d, heartbeat_timeout={HEARTBEAT})"
    waits = f"{join % 0}; import jax; jax.devices()"
    dies = f"{join % 1}; import os; os.kill(os.getpid(), 9)"
    env = {**as_user_compiling_fast(), "JAX_PLATFORMS": "cpu"}
    first, second = (
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        for program in (waits, dies)
    )
    try:
        assert second.wait(timeout=10 * PATIENCE) == -signal.SIGKILL
        said = first.communicate(timeout=PATIENCE)[1]
    finally:
        first.kill()
        second.kill()
    assert first.returncode == -signal.SIGABRT and "This most likely indicates that another task died" in said, said


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with text, a run in one process, and one that rewinds at a spike; both add up by gloo."""
    base = tmp_path_factory.mktemp("together")
    write_corpus(base / "corpus")
    acts = ("train", "reference"), ("spiked", "calm")
    printed = start(base, 1, 8, *({"do": do, "name": name, "with": {"work": name}} for do, name in acts))
    for _, name in acts:
        found(base, name, 1, printed)
    return base


@pytest.fixture(scope="module")
def two(folder):
    """What two processes print that fork, are stopped, go on, are refused another fork, and rewind at a spike."""
    old = "reference/checkpoints/1_second/3"
    acts = [
        ("train", "forked", {"work": "forked", "fork": old, "terminate": [1, 1]}, False),
        ("train", "again", {"work": "forked"}, False),
        ("train", "other", {"work": "reference", "fork": "forked"}, True),
        ("spiked", "spiked", {"work": "spiked"}, False),
    ]
    return start(folder, 2, 4, *({"do": do, "name": name, "with": given, "fails": f} for do, name, given, f in acts))


def test_a_fork_of_two_processes_ends_where_the_run_ends(two, folder):
    assert [one["result"]["report"] for one in found(folder, "forked", 2, two)] == [None, None]
    first, second = found(folder, "again", 2, two)
    (reference,) = found(folder, "reference", 1, two)
    assert first["result"]["report"] == second["result"]["report"]
    measured = [
        {(one["stage"], one["step"]): one["loss"] for one in evals}
        for evals in (first["result"]["report"]["evals"], reference["result"]["report"]["evals"])
    ]
    assert measured[0].pop(("second", 3)), "the fork measures where it begins, as that run has not"
    assert measured[0] == measured[1]
    assert state_sha256(folder / LAST.format("forked")) == state_sha256(folder / LAST.format("reference"))
    # Process 1 writes its part of the arrays, and nothing into the run that is forked from.
    for one in (*found(folder, "forked", 2, two), first, second):
        assert not [path for path in one["written"] if "/reference/" in path]
    assert not [path for path in found(folder, "forked", 2, two)[1]["written"] if "/arrays" not in path]
    first, second = found(folder, "other", 2, two)
    assert "holds a run that did not begin with --fork" in first["text"]
    assert second["text"] == f"process 0: {first['text']}"


def test_two_processes_rewind_at_the_same_step_though_one_alone_has_read_the_batch(two, folder):
    first, second = (one["result"] for one in found(folder, "spiked", 2, two))
    (calm,) = found(folder, "calm", 1, two)
    assert first == second == calm["result"]
    (rewind,) = first["rewinds"]
    assert (rewind["step"], rewind["since"], rewind["to"]) == (POISONED, POISONED, 12)
    last = "{}/checkpoints/0_first/24"
    assert state_sha256(folder / last.format("spiked")) == state_sha256(folder / last.format("calm"))
