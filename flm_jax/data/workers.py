"""Processes of this machine that share work, in order; what a killed one did not finish is done again."""

from __future__ import annotations

import collections
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from flm_jax.data.parts import PART_BYTES, Part
from flm_jax.records import counted

T = TypeVar("T")
R = TypeVar("R")
# Parts per process that are on their way where results come back: enough to keep it busy, few enough for memory.
_AHEAD = 2
# So many deaths without a part finished in between are no accident.
_DEATHS = 3
_log = logging.getLogger(__name__)


class Runner(Protocol):
    """Where the work on parts is done."""

    @property
    def here(self) -> Workers:
        """The processes of this machine, for what must pass through it."""
        ...

    @property
    def part_bytes(self) -> int:
        """The size of a part in bytes, about."""
        ...

    def run(self, function: Callable[[Part], int], parts: Sequence[Part], done: Callable[[int], Any]) -> None:
        """Calls a function for every part, on any machine and in any order, perhaps more than once.

        Args:
          function: can be pickled; it leaves its result on a disk that all machines share.
          parts: all of them.
          done: is called with the size of each part that is finished.
        """
        ...


def _begin() -> None:
    """Prepares a process: Ctrl-C is the parent's to handle, and without its parent the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Workers:
    """A number of processes, as a context manager; one means this process alone."""

    def __init__(self, count: int = 0, part_bytes: int = PART_BYTES, setting: str = "their number") -> None:
        """Names the number of processes; they start with the first work.

        Args:
          count: their number; 0: one per core that this process may use.
          part_bytes: the size of a part, about.
          setting: the flag or binding that sets `count`, for an error's message.
        """
        self._setting = setting
        self.count, self.part_bytes = count or len(os.sched_getaffinity(0)), part_bytes
        self._executor: ProcessPoolExecutor | None = None
        self._deaths = 0

    @property
    def here(self) -> Workers:
        """See Runner."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(at_once=error is not None)

    def _end(self, at_once: bool) -> None:
        if self._executor is not None:
            if at_once:  # what they are doing is not needed, and may take long
                for process in list((self._executor._processes or {}).values()):
                    process.terminate()
            # Waiting also releases semaphores, of which Python would tell when an interrupted program ends.
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def run(self, function: Callable[[Part], int], parts: Sequence[Part], done: Callable[[int], Any]) -> None:
        """See Runner.

        Raises:
          OSError: as `map`.
        """
        for _, size in self.map(function, parts, len(parts)):
            done(size)

    def map(self, function: Callable[[T], R], items: Iterable[T], ahead: int = 0) -> Iterator[tuple[T, R]]:
        """Yields each item with its result, in order.

        Args:
          function: of a module, not a local one, where there is more than one process.
          items: the work; they are taken a few at a time.
          ahead: how many are on their way at once; 0: a few per process, as memory holds their results.

        Raises:
          OSError: processes are killed again and again, for example because memory runs out.
        """
        if self.count == 1:
            for item in items:
                yield item, function(item)
            return
        left, waiting = iter(items), collections.deque[tuple[T, Future[R]]]()
        ahead = ahead or _AHEAD * self.count
        while True:
            while len(waiting) < ahead:
                try:
                    item = next(left)
                except StopIteration:
                    break
                waiting.append((item, self._submit(function, item)))
            if not waiting:
                return
            item, future = waiting[0]
            try:
                found = future.result()
            except BrokenProcessPool as error:
                self._again(error)
                for number, (other, future) in enumerate(waiting):
                    if not future.done() or isinstance(future.exception(), BrokenProcessPool):
                        waiting[number] = other, self._submit(function, other)
                continue
            waiting.popleft()
            self._deaths = 0
            yield item, found

    def _submit(self, function: Callable[[T], R], item: T) -> Future[R]:
        if self._executor is None:
            # A fork of a process with JAX's threads may hang.
            self._executor = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), _begin)
        try:
            return self._executor.submit(function, item)
        except BrokenProcessPool as error:
            failed: Future[R] = Future()
            failed.set_exception(error)
            return failed

    def _again(self, error: BrokenProcessPool) -> None:
        self._end(at_once=False)
        self._deaths += 1
        if self._deaths == _DEATHS:
            raise OSError(
                f"processes were killed {_DEATHS} times before one had finished a piece of its work: is there enough "
                f"memory for {counted(self.count, 'process', 'processes')}? Set {self._setting} to fewer."
            ) from error
        _log.warning("A process was killed; what it had not finished is done again.")
