"""Runs points as processes of their own, some at a time, each on its share of the cores."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flm_jax.checkpoint.directory import holder
from flm_jax.files import atomic_write
from flm_jax.progress import Interrupts
from flm_jax.records import counted
from flm_jax.records.kept import KeptLines
from flm_jax.sweeps import pinned
from flm_jax.sweeps.results import FAILED, RUNNING, STOPPED, WAITING, Outcome, finished, read_outcome
from flm_jax.sweeps.space import Point

PERIOD = 0.2  # seconds between two looks at the processes
PATIENCE = 20.0  # seconds that a process gets to end before it is killed


@dataclass(frozen=True)
class Places:
    """Where the files of a sweep are.

    Attributes:
      workdir: of the sweep.
    """

    workdir: Path

    def run(self, point: Point) -> Path:
        """The work directory of a point."""
        return self.workdir / "points" / point.name

    def gin(self, point: Point) -> Path:
        """The gin file of a point."""
        return self.workdir / "gin" / f"{point.name}.gin"

    def log(self, point: Point) -> Path:
        """What the runs of a point print."""
        return self.workdir / "logs" / f"{point.name}.log"

    def script(self, point: Point) -> Path:
        """The shell script that starts a point."""
        return self.workdir / "launch" / f"{point.name}.sh"


def command(places: Places, point: Point) -> list[str]:
    """The command that trains a point; it is `experiments/train.py`."""
    train = [sys.executable, "-m", "flm_jax.cli.train"]
    return [*train, f"--gin_file={places.gin(point)}", f"--workdir={places.run(point)}"]


def shares(parallel: int) -> list[tuple[int, ...]]:
    """The cores that this process may use, divided among so many runs.

    Raises:
      ValueError: there are fewer cores than that.
    """
    able = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if parallel > len(able):
        raise ValueError(
            f"--parallel={parallel}, but this process may use {counted(len(able), 'core')}: take {len(able)} at most."
        )
    return [tuple(able[i * len(able) // parallel : (i + 1) * len(able) // parallel]) for i in range(parallel)]


class Runner:
    """Runs points, and knows what became of each that it was asked for.

    Attributes:
      outcomes: by name, in the order in which they were asked for.
      processes: the running processes, by the point's name.
      stopped: whether a signal has ended the runs.
    """

    def __init__(
        self,
        places: Places,
        measure: str,
        cores: Sequence[tuple[int, ...]],
        environment: Mapping[str, str],
        record: KeptLines,
        show: Callable[[Runner], None],
    ) -> None:
        """Starts nothing yet.

        Args:
          places: where files are.
          measure: what is read from reports.
          cores: for each run that may run at the same time, its cores.
          environment: of the runs.
          record: where the seconds of each run are kept, by `point`.
          show: called at every look at the processes.
        """
        self.places, self._measure, self._cores = places, measure, list(cores)
        self._environment, self._record, self._show = dict(environment), record, show
        self.outcomes: dict[str, Outcome] = {}
        self.processes: dict[str, _Running] = {}
        self.stopped = False

    def ask(self, points: Sequence[Point]) -> None:
        """Adds points, with what earlier starts have left of them."""
        for point in points:
            seconds = float(self._record.records.get(point.name, {}).get("seconds", 0.0))
            done = finished(self.places.run(point))
            found = read_outcome(point, self.places.run(point), self._measure, seconds) if done else None
            self.outcomes[point.name] = found or Outcome(point, WAITING, seconds=seconds)

    def run(self, points: Sequence[Point]) -> None:
        """Runs those points that have not come to their end, and returns when all have, or a signal has come."""
        self.ask(points)
        queue = [point for point in points if self.outcomes[point.name].state == WAITING]
        free = list(self._cores)
        try:
            with Interrupts() as interrupts:
                while queue or self.processes:
                    if interrupts.requested and not self.stopped:
                        self.stopped = True
                        queue.clear()
                        for running in self.processes.values():
                            running.process.send_signal(signal.SIGTERM)
                    while free and (point := next((p for p in queue if holder(self.places.run(p)) is None), None)):
                        queue.remove(point)
                        if finished(self.places.run(point)):  # by another process, whose lock it waited for
                            self.ask([point])
                        else:
                            self._begin(point, free.pop(0))
                    for name in [name for name, each in self.processes.items() if each.process.poll() is not None]:
                        free.append(self._end(name))
                    self._show(self)
                    if queue or self.processes:
                        time.sleep(PERIOD)
        finally:
            self._kill()

    def _begin(self, point: Point, cores: tuple[int, ...]) -> None:
        log = self.places.log(point)
        log.parent.mkdir(parents=True, exist_ok=True)
        start = [sys.executable, pinned.__file__, ",".join(map(str, cores)), str(os.getpid())]
        # Libraries that count cores by another way than the affinity would start a thread for each of the machine's.
        threads = {name: str(len(cores)) for name in ("NPROC", "OMP_NUM_THREADS") if name not in self._environment}
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*start, *command(self.places, point)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**self._environment, **threads},
                start_new_session=True,  # Ctrl-C in the terminal is for the sweep, which passes it on
            )
            self.processes[point.name] = _Running(point, process, cores, file.tell(), time.monotonic())
        before = self.outcomes[point.name]
        self.outcomes[point.name] = Outcome(point, RUNNING, seconds=before.seconds)

    def _end(self, name: str) -> tuple[int, ...]:
        """Notes what became of a run that has ended, and returns its cores."""
        running = self.processes.pop(name)
        point, code = running.point, running.process.returncode
        seconds = self.outcomes[name].seconds + time.monotonic() - running.since
        directory = self.places.run(point)
        if code == 0 and finished(directory):
            found = read_outcome(point, directory, self._measure, seconds)
        elif self.stopped:
            found = Outcome(point, STOPPED, seconds=seconds)
        else:
            found = Outcome(point, FAILED, seconds=seconds, reason=reason(self.places.log(point), running.offset, code))
        self.outcomes[name] = found
        self._record.append({"point": name, "seconds": seconds, "state": found.state, "reason": found.reason})
        return running.cores

    def _kill(self) -> None:
        """Ends what still runs, after an error or a second signal."""
        for running in self.processes.values():
            running.process.send_signal(signal.SIGTERM)
        for running in self.processes.values():
            try:
                running.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()


@dataclass(frozen=True)
class _Running:
    """A process, with the point that it trains, its cores, where its output begins in the log, and when it started."""

    point: Point
    process: subprocess.Popen[bytes]
    cores: tuple[int, ...]
    offset: int
    since: float


def reason(log: Path, offset: int, code: int) -> str:
    """Why a run ended with an exit status: the error that it printed, or else its last line."""
    with log.open("rb") as file:
        file.seek(offset)
        lines = [line.strip() for line in re.split(r"[\r\n]+", file.read().decode("utf-8", "replace")) if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = (errors or lines or ["it printed nothing"])[-1]
    ended = f"signal {-code}" if code < 0 else f"exit status {code}"
    return said if errors else f"{ended}: {said[:300]}"


def write_scripts(places: Places, points: Sequence[Point], cwd: Path) -> Path:
    """Writes a shell script per point, and one that starts them all, whose path it returns."""
    for point in points:
        lines = ["#!/bin/sh", f"# Trains the point {point.name}; more flags, such as --distributed, are passed on."]
        lines += [f"cd {shlex.quote(str(cwd))} || exit 1", f'exec {shlex.join(command(places, point))} "$@"']
        _write_script(places.script(point), lines)
    every = places.workdir / "launch" / "all.sh"
    names = " \\\n  ".join(shlex.quote(f"{point.name}.sh") for point in points)
    lines = ["#!/bin/sh", "# Starts every point, one after the other; one that fails does not stop the rest."]
    lines += ["# LAUNCH is what starts a script, sh by default: LAUNCH='sbatch --gpus=1' hands all of them to a queue."]
    lines += ['cd "$(dirname "$0")" || exit 1', "status=0", f"for script in \\\n  {names}", "do"]
    lines += ['  ${LAUNCH:-sh} "./$script" || { echo "failed: $script" >&2; status=1; }', "done", "exit $status"]
    _write_script(every, lines)
    return every


def _write_script(path: Path, lines: Sequence[str]) -> None:
    atomic_write(path, "\n".join([*lines, ""]))
    path.chmod(0o755)
