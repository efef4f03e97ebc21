"""kill -9 at random writes of whole runs, and flipped bits in files of every kind: `make test-faults`.

FAULTS_SEED chooses the same places again; without it they are drawn, and the seed is printed.
"""

import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from flm_jax.checkpoint import CheckpointError, verify
from flm_jax.data.known import FOLDER
from flm_jax.data.store import TokenStore
from flm_jax.data.store_verify import verify_store
from flm_jax.sharding import make_mesh
from flm_jax.source_checkpoint import POSITION, read_source
from tests.environment import as_user_compiling_fast
from tests.faults import PHASES, ROOT, Place, flip, outcome, points, wait_for_steps

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

SEED = int(os.environ.get("FAULTS_SEED") or random.SystemRandom().randrange(2**32))
# Each is killed once in each of PHASES: 20 kills.
RUNS, FLIPS, KILLS = 4, 200, 5
MINUTES = float(os.environ.get("FAULTS_MINUTES") or 0)


def say(text: str) -> None:
    """Prints a line; `make test-faults` runs pytest such that it is seen at once."""
    print(f"FAULTS_SEED={SEED}: {text}", flush=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The place of the runs, the folder that the run that was never killed has been moved to, and its writes."""
    place = Place(tmp_path_factory.mktemp("faults") / "run")
    place.prepare()
    began = time.monotonic()
    writes = place.started(None)
    say(f"the run that is not killed took {time.monotonic() - began:.0f} s and wrote {len(writes)} times")
    place.folder.rename(place.folder.with_name("whole"))
    return place, Place(place.folder.with_name("whole")), writes


@pytest.fixture(scope="module")
def expected(whole):
    """What it has left."""
    return outcome(whole[1].workdir)


def stores(place: Place) -> dict[str, str]:
    """The sha256 of each file of a cache, but hidden ones that a killed process leaves, and remembered digests."""
    files = {str(path.relative_to(place.cache)): path for path in place.cache.rglob("*") if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(files.items())
        if not name.startswith((".", f"{FOLDER}/"))
    }


@pytest.mark.parametrize("number", range(RUNS))
def test_killed_in_every_phase_and_run_again_equals_never_killed(whole, expected, number):
    place, untouched, writes = whole
    shutil.rmtree(place.folder, ignore_errors=True)
    place.prepare()
    for point in points(writes, random.Random(f"{SEED} {number}")):
        last = place.started(point)[-1].what
        at = f"{point.delay:.3f} s after write {point.number} of {point.group}, {last}"
        say(f"run {number} killed, {point.phase}: {at}")
    place.started(None)
    found = outcome(place.workdir)
    for name in expected:  # one by one, or the report of a difference is thousands of lines long
        assert found[name] == expected[name], name
    assert stores(place) == stores(untouched)


def test_every_phase_is_hit(whole):
    """Whatever the seed, each run is killed once in each phase, at a write that exists."""
    for seed in range(50):
        chosen = points(whole[2], random.Random(seed))
        assert sorted(point.phase for point in chosen) == sorted(PHASES)
        assert len({point.group for point in chosen}) == len(PHASES)


def kinds(step: Path, store: Path) -> dict[str, list[Path]]:
    """The files of a checkpoint and of a token store, by kind."""
    files = [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]
    arrays = [path for path in files if path.relative_to(step).parts[0] == "arrays"]
    blobs = [path for path in files if path.relative_to(step).parts[0] == "blobs" and path.name != POSITION]
    found = {
        "arrays": arrays,
        "manifest": [step / "manifest.json"],
        "meta": [step / "meta.json"],
        "data position": [step / "blobs" / POSITION],
        "vocabulary": blobs,
        "token store": [path for path in sorted(store.iterdir()) if path.stat().st_size],
    }
    of_step = [path for name, paths in found.items() if name != "token store" for path in paths]
    assert sorted(of_step) == files, "a kind of file is not damaged"
    return found


def read_all(store: Path) -> None:
    """Reads all that training reads of a token store."""
    opened = TokenStore.open(store)
    for split in opened.splits:
        opened.tokens(split, np.arange(opened.num_tokens(split)))
        for number in range(opened.num_documents(split)):
            opened.document(split, number)


def test_no_flipped_bit_is_unseen(whole, tmp_path):
    """Each is found by verification, which names the file, and by reading, which names it or the array in it."""
    _, place, _ = whole
    step, store = tmp_path / "checkpoints" / "1_b" / "10", tmp_path / "store"
    shutil.copytree(place.workdir / "checkpoints" / "1_b" / "10", step)
    shutil.copytree(next(place.cache.glob("textfolder-*")), store)
    rng, mesh = random.Random(SEED), make_mesh(devices=jax.devices()[:1])
    found, flipped = kinds(step, store), dict.fromkeys(kinds(step, store), 0)
    for kind, _ in zip(itertools.cycle(found), range(FLIPS), strict=False):
        file = rng.choice(found[kind])
        bit = rng.randrange(8 * file.stat().st_size)
        flip(file, bit)
        where = f"bit {bit} of {file}"
        if kind == "token store":
            report = verify_store(store, progress=False)
            with pytest.raises(ValueError, match=file.name):
                read_all(store)
        else:
            report = verify(step)
            with pytest.raises(CheckpointError, match=r"/10\b") as refused:
                read_source(step).restore(mesh)
            assert file.name in str(refused.value) or "the values of" in str(refused.value), f"{where}: {refused.value}"
        assert not report.ok and any(file.name in problem for problem in report.problems), where
        flip(file, bit)
        flipped[kind] += 1
    say(f"{FLIPS} bits flipped, none unseen: {', '.join(f'{n} of {kind}' for kind, n in flipped.items())}")
    assert verify(step).ok and verify_store(store, progress=False).ok
    read_source(step).restore(mesh)
    read_all(store)


def long_run(folder: Path) -> tuple[list[str], int]:
    """The command of the demo on a mixture of what is installed, as long as is asked for, and its number of steps."""
    # On two idle cores the demo has 1,190 steps in 7 minutes.
    steps = [max(round(MINUTES / 7 * count), 12) for count in (800, 300, 90)]
    stages = zip(("first", "second", "third"), steps, strict=True)
    bindings = [f"{stage}/Stage.steps = {count}" for stage, count in stages]
    bindings += [f"{stage}/OptimizerConfig.warmup_steps = 5" for stage in ("first", "second")]
    bindings += [f"second/Growth.ramp_steps = {steps[1] // 2}", "third/OptimizerConfig.decay_steps = 5"]
    bindings += [f"Run.checkpoint_every = {max(sum(steps) // 40, 3)}", "Run.log_every = 1", "Recipe.eval_every = 25"]
    bindings += [f"DataConfig.cache_dir = '{folder}/cache'"]
    recipes = [f"--gin_file={ROOT}/gin_configs/{name}.gin" for name in ("recipes/demo", "data/small_mixture")]
    program = [sys.executable, f"{ROOT}/experiments/train.py", *recipes, f"--workdir={folder}/work"]
    return [*program, *(f"--gin_bindings={binding}" for binding in bindings)], sum(steps)


def finish(command: list[str]) -> None:
    """Runs a command that must succeed."""
    done = subprocess.run(command, cwd=ROOT, env=as_user_compiling_fast(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not MINUTES, reason="FAULTS_MINUTES is not set")
def test_a_long_run_on_a_mixture_killed_five_times_has_the_same_log(tmp_path):
    rng, work, env = random.Random(SEED), tmp_path / "work", as_user_compiling_fast()
    command, steps = long_run(tmp_path)
    began = time.monotonic()
    finish(command)
    say(f"{steps} steps on three sources took {time.monotonic() - began:.0f} s")
    expected = outcome(work)
    work.rename(tmp_path / "whole")
    for step in sorted(rng.sample(range(1, int(0.9 * steps)), KILLS)):
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_steps(work / "metrics.jsonl", step, process, timeout=600 + 120 * MINUTES)
        time.sleep(rng.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended before step {step}"
        say(f"killed after step {step}")
    finish(command)
    found = outcome(work)
    assert {line["kind"] for line in found["log"]} >= {"train", "heldout", "growth", "save"}
    assert sum("sources" in str(record) for record in found["report"]["evals"]) > 5
    for name in expected:
        assert found[name] == expected[name], name
