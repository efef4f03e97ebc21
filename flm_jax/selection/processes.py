"""Work over several processes, in order: results do not depend on how many there are."""

from __future__ import annotations

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")
# Pieces of work per process that are on their way: enough to keep it busy, few enough to fit in memory.
_AHEAD = 4


def _begin() -> None:
    """Prepares a process: Ctrl-C is the parent's to handle, and without its parent the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Processes:
    """A number of processes, as a context manager; one means this process alone."""

    def __init__(self, count: int = 0) -> None:
        """Names the number of processes; they start with the first work.

        Args:
          count: their number; 0: one per core that this process may use.
        """
        self.count = count or len(os.sched_getaffinity(0))
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.count > 1:
            # JAX has threads, with which a fork may hang: processes come from a server that has none.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["flm_jax.selection.work"])
            self._executor = ProcessPoolExecutor(self.count, context, _begin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Yields each item with its result, in order; items are taken a few at a time.

        Args:
          function: of a module, not a local one, where there is more than one process.
          items: the work.

        Raises:
          OSError: a process was killed, for example because memory ran out.
        """
        if self._executor is None:
            for item in items:
                yield item, function(item)
            return
        waiting: collections.deque[tuple[T, Future[Any]]] = collections.deque()
        try:
            for item in items:
                waiting.append((item, self._executor.submit(function, item)))
                if len(waiting) > _AHEAD * self.count:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        except BrokenProcessPool as error:
            raise OSError("a process that reads the pool was killed; is there enough memory?") from error
        finally:
            for _, result in waiting:
                result.cancel()
