"""A run on text of this machine in processes that are killed at random writes, and what is left of it."""

import dataclasses
import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from flm_jax.data.known import FOLDER
from flm_jax.sharding import make_mesh
from flm_jax.source_checkpoint import POSITION, read_source
from tests.environment import as_user_compiling_fast
from tests.runs import measurements

ROOT = Path(__file__).resolve().parent.parent
STEPS, RAMP = {"0_a": 6, "1_b": 10, "2_c": 4}, 6
# In the order in which a run comes to them.
PHASES = ("preparation", "save", "border", "growth", "ramp")
RECIPE = f"""
train.recipe = @Recipe()
train.run = @Run()
Recipe.stages = [@a/Stage(), @b/Stage(), @c/Stage()]
Recipe.data = @DataConfig()
Recipe.eval_every = 4
Recipe.eval_windows = 8
Run.checkpoint_every = 2
Run.log_every = 1
Run.sample_tokens = 4
Stage.batch_size = 8
a/Stage.name = 'a'
a/Stage.model = @small_52b()
a/Stage.steps = {STEPS["0_a"]}
b/Stage.name = 'b'
b/Stage.model = @small_102b()
b/Stage.steps = {STEPS["1_b"]}
b/Stage.growth = @b/Growth()
b/Growth.method = 'mask'
b/Growth.ramp_steps = {RAMP}
c/Stage.name = 'c'
c/Stage.model = @small_1t()
c/Stage.steps = {STEPS["2_c"]}
c/Stage.growth = @c/Growth()
small_52b.vocab = 512
small_102b.vocab = 512
small_1t.vocab = 512
DataConfig.context = 32
DataConfig.vocabulary = @SentencePiece()
SentencePiece.size = 512
DataConfig.corpus = @Mixture()
Mixture.sources = [@python/Source(), @types/Source(), @lines/Source()]
python/Source.name = 'python'
python/Source.corpus = @TextFolder()
python/Source.weight = 2
TextFolder.path = '{sysconfig.get_path("stdlib")}/asyncio'
TextFolder.pattern = '**/*.py'
types/Source.name = 'types'
types/Source.corpus = @SitePackages()
types/Source.weight = 1
SitePackages.pattern = 'numpy/lib/**/*.pyi'
lines/Source.name = 'lines'
lines/Source.corpus = @Jsonl()
lines/Source.weight = 1
lines/Source.epochs = 3
"""


class Write(NamedTuple):
    """A write of a run: when, in seconds, of what (see `killed.py`), and which."""

    time: float
    group: str
    what: str


class Point(NamedTuple):
    """Where a process is killed: seconds after the write of a number, from 1, in a group."""

    phase: str
    group: str
    number: int
    delay: float


@dataclasses.dataclass(frozen=True)
class Place:
    """The folder of a run: text, recipe, cache, work directory. Runs that are compared have the same path in turn."""

    folder: Path

    @property
    def workdir(self) -> Path:
        """The work directory."""
        return self.folder / "work"

    @property
    def cache(self) -> Path:
        """Where its stores are."""
        return self.folder / "cache"

    def prepare(self) -> None:
        """Writes the recipe and the text that is not on this machine in such a form."""
        self.folder.mkdir(parents=True)
        texts = sorted(Path(sysconfig.get_path("stdlib"), "email").glob("*.py"))
        lines = [json.dumps({"text": path.read_text()}) + "\n" for path in texts]
        (self.folder / "email.jsonl").write_text("".join(lines))
        more = f"Jsonl.path = '{self.folder}/email.jsonl'\nDataConfig.cache_dir = '{self.cache}'\n"
        (self.folder / "recipe.gin").write_text(RECIPE + more)

    def start(self, point: Point | None, timeout: float = 3600) -> tuple[int, str, list[Write]]:
        """Runs the recipe until it ends or is killed: its exit status, what it said, and its writes."""
        log = self.folder / "writes.txt"
        settings = {"roots": {"cache": str(self.cache), "work": str(self.workdir)}, "log": str(log)}
        settings |= {} if point is None else point._asdict()
        program = [ROOT / "experiments/train.py", f"--gin_file={self.folder}/recipe.gin", f"--workdir={self.workdir}"]
        done = subprocess.run(
            [sys.executable, ROOT / "tests/killed.py", json.dumps(settings), *program],
            env=as_user_compiling_fast(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        writes = [line.split("\t") for line in log.read_text(errors="surrogateescape").splitlines()]
        return done.returncode, done.stdout, [Write(float(at), group, what) for at, group, what in writes]

    def started(self, point: Point | None) -> list[Write]:
        """The writes of a start that ends as it must: killed at the point, or finished where there is none."""
        status, said, writes = self.start(point)
        assert status == (0 if point is None else -signal.SIGKILL), f"{point}: status {status}\n{said}"
        return writes


def phase_of(group: str) -> str | None:
    """The phase of a run that writes a group of files; None: files that are written throughout."""
    if group.startswith("cache/"):
        # Whether the cache can be written to is tried at every start, and digests are remembered when texts are old.
        return None if group in ("cache/draft", f"cache/{FOLDER}") else "preparation"
    found = re.fullmatch(r"work/(\w+)/(\d+)", group)
    if found is None:
        return None
    stage, step = found[1], int(found[2])
    if step == 0:
        return "growth" if stage != "0_a" else "save"
    if step == STEPS[stage]:
        return "border"
    return "ramp" if stage == "1_b" and step <= RAMP else "save"


def points(writes: list[Write], rng: random.Random) -> list[Point]:
    """A random point in each phase of a run, in the order of the run: a random write, or a random time.

    Args:
      writes: those of the whole run.
      rng: chooses.
    """
    groups = list(dict.fromkeys(write.group for write in writes if phase_of(write.group)))
    chosen = []
    for phase in PHASES:
        of_phase = [group for group in groups if phase_of(group) == phase]
        group = rng.choice([g for g in of_phase if g != groups[-1]])  # after the last one there may be no time
        times = [write.time for write in writes if write.group == group]
        number, delay = rng.randint(1, len(times)), 0.0
        if rng.random() < 0.5:  # most of the time passes between the last write of a group and the next group
            following = groups[groups.index(group) + 1]
            at = rng.uniform(times[0], next(write.time for write in writes if write.group == following))
            number = sum(time <= at for time in times)
            delay = at - times[number - 1]
        chosen.append(Point(phase, group, number, delay))
    return sorted(chosen, key=lambda point: groups.index(point.group))


def flip(path: Path, bit: int) -> None:
    """Flips one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def state_sha256(step: Path) -> str:
    """The sha256 over every array of a checkpoint, and the position in its data."""
    source = read_source(step)
    state = source.restore(make_mesh(devices=jax.devices()[:1]))
    whole = hashlib.sha256((step / "blobs" / POSITION).read_bytes())
    for leaf in jax.tree.leaves(jax.device_get(state)):
        whole.update(np.ascontiguousarray(leaf).tobytes())
    return whole.hexdigest()


def outcome(workdir: Path) -> dict:
    """What a run leaves: the sha256 of its steps' states, the record of the last, its report and its log."""
    steps = sorted(
        (path for path in workdir.glob("checkpoints/*/*") if path.name.isdigit()),
        key=lambda path: (path.parent.name, int(path.name)),
    )
    return {
        "log": [line for line in measurements(workdir) if line["kind"] != "start"],
        "states": {f"{step.parent.name}/{step.name}": state_sha256(step) for step in steps},
        "meta": json.loads((steps[-1] / "meta.json").read_text()),
        "report": json.loads((workdir / "report.json").read_text()),
        "left": sorted(path.name for path in workdir.glob("checkpoints/*/*") if not path.name.isdigit()),
    }


def wait_for_steps(log: Path, step: int, process: subprocess.Popen, timeout: float) -> None:
    """Returns once metrics.jsonl has a line of the step or a later one, or the process has ended."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        if any(json.loads(line)["step"] >= step for line in lines if line.endswith(b"\n")):
            return
        time.sleep(0.05)
