"""Trains what a list of recipes needs, stage by stage, in some processes at a time, and keeps every snapshot.

Stages that several recipes begin with are trained once. What is kept is not trained again, so that a study goes on
where it was stopped.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from flm_jax.files import sha256_json
from flm_jax.recipe import Recipe
from flm_jax.savings.replicas import alike, train_stage
from flm_jax.savings.snapshots import Snapshots


@dataclass(frozen=True)
class How:
    """How recipes are trained.

    Attributes:
      snapshots: where what is trained is kept.
      cores: for each process that may run at the same time, its cores; empty: all in this process.
      replicas: the most runs that are trained as one program.
      programs: where compiled programs are kept, so that each is compiled once by all processes; None: nowhere.
      deadline: `time.monotonic()` after which no stage begins any more; None: none.
    """

    snapshots: Snapshots
    cores: Sequence[tuple[int, ...]] = ()
    replicas: int = 1
    programs: Path | None = None
    deadline: float | None = None

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline


@dataclass(frozen=True)
class Task:
    """One stage of recipes that are trained as replicas."""

    recipes: tuple[Recipe, ...]
    index: int


def perform(task: Task, snapshots: Snapshots) -> list[float]:
    """Trains a task's stage, keeps the snapshots, and returns their held-out losses.

    A run that has diverged is given up, whichever runs it would be trained with.
    """
    before = task.index - 1
    over = [recipe for recipe in task.recipes if task.index and snapshots.diverged(recipe, before)]
    going = [recipe for recipe in task.recipes if recipe not in over]
    for recipe in over:
        snapshots.give_up(recipe, task.index)
    if going:
        begun = [snapshots.read(recipe, before) if task.index else None for recipe in going]
        for recipe, snapshot in zip(going, train_stage(going, task.index, begun), strict=True):
            snapshots.write(recipe, task.index, snapshot)
    return [float(snapshots.about(recipe, task.index)["evals"][-1]["loss"]) for recipe in task.recipes]


def tasks_of(recipes: Sequence[Recipe], how: How, without: Collection[Path] = ()) -> tuple[list[Task], int]:
    """The tasks that can begin now, and how many stages are left in all, these included.

    Args:
      recipes: what is to be trained.
      how: how to train.
      without: snapshots that no task is to make, because another one makes them, or failed to.
    """
    left: dict[Path, tuple[Recipe, int]] = {}
    for recipe in recipes:
        for index in range(len(recipe.stages)):
            if not how.snapshots.has(recipe, index):
                left.setdefault(how.snapshots.path(recipe, index), (recipe, index))
    groups: dict[str, list[tuple[Recipe, int]]] = collections.defaultdict(list)
    for path, (recipe, index) in left.items():
        if path not in without and (not index or how.snapshots.has(recipe, index - 1)):
            groups[sha256_json([index, alike(recipe, index)])].append((recipe, index))
    tasks = [
        Task(tuple(recipe for recipe, _ in group[start : start + how.replicas]), group[0][1])
        for group in groups.values()
        for start in range(0, len(group), how.replicas)
    ]
    return tasks, len(left)


def train_all(recipes: Sequence[Recipe], how: How, show: Callable[[str], None] = print) -> bool:
    """Trains all stages of all recipes that are not kept yet; whether all are kept afterwards.

    A stage that fails is reported, and what would follow it is left; the others go on.

    Raises:
      ValueError: the system has ended a process.
    """
    failed: set[Path] = set()
    running: dict[concurrent.futures.Future[list[float]], Task] = {}
    with _pool(how) as pool:
        while True:
            busy = {how.snapshots.path(r, task.index) for task in running.values() for r in task.recipes}
            tasks, left = tasks_of(recipes, how, busy | failed)
            # No more than the processes can begin at once: later tasks may be grouped better.
            room = max(len(how.cores), 1) - len(running)
            for task in () if how.late else tasks[:room]:
                running[pool.submit(perform, task, how.snapshots)] = task
            if not running:
                return left == 0
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                names = ", ".join(f"seed {r.seed}" for r in task.recipes)
                what = f"stage {task.index + 1} of {len(task.recipes[0].stages)}, {_shape(task)}, {names}"
                error = future.exception()
                if isinstance(error, concurrent.futures.BrokenExecutor):
                    raise ValueError(
                        f"The system has ended a process during {what}, as it does if memory runs out: take a smaller "
                        "--parallel, or fewer --replicas. What is done is kept, and the same command goes on."
                    ) from error
                if error is not None:
                    failed |= {how.snapshots.path(r, task.index) for r in task.recipes}
                    show(f"{what} failed: {error}")
                else:
                    losses = ", ".join(f"{loss:.4f}" for loss in future.result())
                    show(f"{left - len(task.recipes)} stages left; {what}: held-out loss {losses}")


def _shape(task: Task) -> str:
    stage = task.recipes[0].stages[task.index]
    return f"{stage.model.layers} x {stage.model.embed}, {stage.steps} steps at {stage.optimizer.learning_rate:g}"


class _Here(concurrent.futures.Executor):
    """An executor that runs what it is given at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def _pool(how: How) -> Iterator[concurrent.futures.Executor]:
    """The processes that train. An exception in the context ends them at once, not after the stages they are in."""
    if not how.cores:
        yield _Here()
        return
    context = multiprocessing.get_context("spawn")
    shares = context.SimpleQueue()
    for cores in how.cores:
        shares.put(cores)
    theirs, ours = context.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(len(how.cores), context, _begin, (shares, how.programs, theirs))
    with pool, ours:
        yield pool
        pool.shutdown()


def _begin(shares: Any, programs: Path | None, pipe: Any) -> None:
    """Restricts a new process to its share of the cores, before JAX counts them, and keeps compiled programs."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, shares.get())
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    keep_programs(programs)


def _end_with(pipe: Any) -> None:
    """Waits until the other end of a pipe is closed, by its process or because that was killed; ends this process."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os._exit(1)


def keep_programs(directory: Path | None) -> None:
    """Lets JAX keep this process's compiled programs in a directory, and take them from there."""
    if directory is not None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
