"""The watchdog: a thread that says what a process waits for, when that takes far longer than usual."""

from __future__ import annotations

import collections
import contextlib
import datetime
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from flm_jax import distributed
from flm_jax.guards.config import Watchdog
from flm_jax.guards.spikes import median

# The exit status of a process that the watchdog ends; sysexits.h ends with 78.
STALLED = 79
# Times of one kind that make a usual time, and that it is taken over.
_KNOWN, _LAST = 5, 64
# Longest time between two looks, and the time that writing to the work directory may take before the process ends.
_POLL_S, _WRITING_S = 5.0, 10.0


# What a process may be doing.
DATA, STEP, VOTE = "reading the batch", "computing the step", "the vote to stop"
# The step of a program that was not used before: it is compiled.
FIRST_STEP = "compiling and computing the step"
EVAL, SAVE = "measuring the held-out loss", "saving"
START, REWIND = "starting the stage", "going back"


class _Wait(NamedTuple):
    """What the process is doing, at which step, and since when."""

    what: str
    step: int
    since: float


class Watch:
    """What one process is doing, told by `at`, and the verdict whether that takes too long, asked by `check`.

    `at` costs a microsecond and reads nothing from the devices.
    """

    def __init__(
        self,
        settings: Watchdog | None,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[str], None] | None = None,
    ) -> None:
        """Watches nothing yet.

        Args:
          settings: what is too long; None: nothing is.
          folder: where stacks are written, to `stalls.N.txt` of process N; it need not exist before.
          clock: in seconds.
          end: ends the process; None: `end_stalled`.
        """
        self._settings, self._clock, self._end = settings, clock, end or end_stalled
        self.file = folder / f"stalls.{jax.process_index()}.txt"
        self._took: dict[str, collections.deque[float]] = {}
        self._now: _Wait | None = None
        self._told: tuple[_Wait, float] | None = None

    def at(self, what: str, step: int) -> None:
        """Says that what was done before is done, and that the process now does `what`."""
        if self._settings is not None:
            self._over()
            self._now = _Wait(what, step, self._clock())

    def pause(self) -> None:
        """Says that what was done before is done, and that what follows is not watched."""
        self._over()
        self._now = None

    def _over(self) -> None:
        if (done := self._now) is not None:
            took = self._took.setdefault(done.what, collections.deque(maxlen=_LAST))
            took.append(self._clock() - done.since)

    def usual(self, what: str) -> float | None:
        """The usual time of something, in seconds; None: it is not known."""
        took = tuple(self._took.get(what, ()))
        return median(took) if len(took) >= _KNOWN else None

    def limit(self, what: str) -> float:
        """The seconds from which on something takes too long."""
        assert self._settings is not None
        usual = self.usual(what)
        if usual is None:
            return max(self._settings.first_seconds, self._settings.at_least_seconds)
        return max(self._settings.times * usual, self._settings.at_least_seconds)

    def check(self) -> str | None:
        """The sentence about what takes too long, if anything does; told once, and again when the time has doubled."""
        wait = self._now
        if self._settings is None or wait is None:
            return None
        waited = self._clock() - wait.since
        told, again = self._told or (None, 0.0)
        if waited <= (again if told == wait else self.limit(wait.what)):
            return None
        self._told = (wait, 2 * waited)
        usual = self.usual(wait.what)
        known = f"usually it takes {usual:.3g} s" if usual is not None else "how long it usually takes is not known yet"
        sentence = (
            f"Process {jax.process_index()}, step {wait.step}: {wait.what} has taken {waited:.3g} s so far; {known}."
        )
        self._dump(f"{sentence} The stacks of its threads follow, and are in {self.file}.")
        if self._settings.end:
            self._end(f"{sentence} Watchdog.end = True ends the run.")
        return sentence

    def _dump(self, sentence: str) -> None:
        # Where a file system hangs, so does writing to it: stderr comes first, and nothing waits long for the file.
        print(f"\nWATCHDOG: {sentence}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, AttributeError, ValueError):  # stderr may be no file
            faulthandler.dump_traceback(all_threads=True)
        writer = threading.Thread(target=self._write, args=(sentence,), name="watchdog's file", daemon=True)
        writer.start()
        writer.join(_WRITING_S)

    def _write(self, sentence: str) -> None:
        with contextlib.suppress(OSError), self.file.open("a") as file:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            file.write(f"{now} {sentence}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n")

    def run(self, over: threading.Event) -> None:
        """Checks until `over` is set; the body of the watchdog's thread.

        Where no Python code runs any more, because the waiting thread holds the interpreter's lock (a page of a
        memory-mapped file that does not come, for example), a timer of faulthandler tells; each look sets it again.
        """
        assert self._settings is not None
        poll = min(_POLL_S, self._settings.at_least_seconds / 4)
        stderr = sys.__stderr__ if sys.__stderr__ is not None and _is_file(sys.__stderr__) else None
        while not over.wait(poll):
            self.check()
            if stderr is not None:
                wait = self._now
                limit = max(self._settings.first_seconds, 1.0) if wait is None else self.limit(wait.what)
                faulthandler.dump_traceback_later(limit + 2 * poll, file=stderr, exit=self._settings.end)
        faulthandler.cancel_dump_traceback_later()


def _is_file(stream: object) -> bool:
    try:
        return isinstance(stream.fileno(), int)  # type: ignore[attr-defined]
    except (OSError, AttributeError, ValueError):
        return False


def end_stalled(sentence: str) -> None:
    """Tells the other processes that this one is stalled, and ends it with status 79."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    distributed.fail_together(sentence, STALLED)
    os._exit(STALLED)


@contextlib.contextmanager
def watching(settings: Watchdog | None, folder: Path) -> Iterator[Watch]:
    """A context with a watch, which a thread checks; without settings there is no thread, and nothing is too long."""
    watch, over = Watch(settings, folder), threading.Event()
    if settings is None:
        yield watch
        return
    thread = threading.Thread(target=watch.run, args=(over,), name="watchdog", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.pause()
        over.set()
        thread.join()
