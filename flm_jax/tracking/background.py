"""A tracking service behind a thread: a step never waits for it, and a service that fails stops no run."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flm_jax.distributed import is_primary
from flm_jax.files import write_json
from flm_jax.records.foreign_json import field, read_json
from flm_jax.tracking.services import About, Tracker
from flm_jax.tracking.writer import Measurement

log = logging.getLogger(__name__)

# In a work directory: what a resumed run is found by at a service.
KEY = "tracker.json"
# Measurements that wait for a slow service; more are left out.
WAITING = 10_000
# Seconds that the end of a run waits for what is still to be sent, and for a service that is not yet open.
PATIENCE, MOMENT = 60.0, 5.0


class Background:
    """A service that measurements are sent to by a thread of its own; a context manager.

    The first failure is said in one line of the log. If the service does not open, nothing is sent in this start of
    the program; a measurement that it does not take is left out, and the next one tried.
    """

    def __init__(self, tracker: Tracker, about: About, patience: float = PATIENCE) -> None:
        """Begins to open the service."""
        self._tracker, self._about, self._patience = tracker, about, patience
        self._waiting: queue.Queue[Measurement | None] = queue.Queue(WAITING)
        self._opened = threading.Event()
        self._where: str | None = None
        self._warned, self._failed, self._closed = False, False, False
        self._thread = threading.Thread(target=self._work, name=type(tracker).__name__, daemon=True)
        self._thread.start()

    def where(self, seconds: float) -> str | None:
        """A sentence on where to look, once the service is open; None if it is not within some seconds."""
        self._opened.wait(seconds)
        return self._where

    def write(self, measured: Measurement) -> None:
        """Takes a measurement to send, and returns at once."""
        if not self._thread.is_alive():
            return
        try:
            self._waiting.put_nowait(measured)
        except queue.Full:
            self._warn(f"{WAITING:,} measurements wait to be sent")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits until everything is sent, for some time."""
        self._failed = error is not None
        if self._waiting.full():  # the end takes the place of the oldest
            with contextlib.suppress(queue.Empty):
                self._waiting.get_nowait()
        self._waiting.put_nowait(None)
        # A service that has not opened during the whole run is given a moment, not the time to send everything.
        patience = self._patience if self._opened.is_set() else min(self._patience, MOMENT)
        self._thread.join(patience)
        if self._thread.is_alive():
            self._warn(f"it has not taken everything within {patience:g} s")
        self._closed = True

    def _work(self) -> None:
        try:
            service, self._where = self._tracker.begin(self._about)
        except Exception as error:  # whatever libraries and networks raise
            self._warn(_told(error))
            return
        finally:
            self._opened.set()
        while (measured := self._waiting.get()) is not None:
            try:
                service.write(measured)
            except Exception as error:
                self._warn(_told(error))
        try:
            service.close(self._failed)
        except Exception as error:
            self._warn(_told(error))

    def _warn(self, why: str) -> None:
        if not self._warned and not self._closed:
            self._warned = True
            name = type(self._tracker).__name__
            log.warning("%s: %s. Training goes on; metrics.jsonl has every measurement.", name, why.rstrip("."))


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextlib.contextmanager
def tracked(tracker: Tracker | None, workdir: Path, settings: Mapping[str, Any]) -> Iterator[Background | None]:
    """A context with the service that a run's measurements are sent to; None without one, or outside process 0.

    Args:
      tracker: which service, and what the run is called there.
      workdir: keeps the key that a resumed run is found by.
      settings: of the run, JSON-able, for the service to show.
    """
    if tracker is None or not is_primary():
        yield None
        return
    about = About(workdir.absolute().name, _key(workdir), workdir.absolute(), settings)
    with Background(tracker, about) as service:
        yield service


def _key(workdir: Path) -> str:
    """Eight hex digits that a work directory keeps; a copy of it gets its own, so that two runs are never one there."""
    path, here = workdir / KEY, str(workdir.resolve())
    with contextlib.suppress(OSError, ValueError):  # a file that cannot be read only costs the way back to that run
        kept = read_json(path)
        found: str = field(kept, "key", str, str(path))
        if "workdir" not in kept:  # of an earlier version
            write_json(path, {"key": found, "workdir": here})
            return found
        there = field(kept, "workdir", str, str(path))
        if there == here:
            return found
        log.warning(
            "%s is of %s, so %s begins a new run at the tracking service. If it was moved, not copied, stop, and "
            'write {"key": "%s"} into that file to go on in the old run.',
            path,
            there,
            workdir,
            found,
        )
    key = uuid.uuid4().hex[:8]
    write_json(path, {"key": key, "workdir": here})
    return key
