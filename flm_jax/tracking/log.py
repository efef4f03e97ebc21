"""The log of a stage: every measurement to the files of the work directory, and to the service, if there is one."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from flm_jax.distributed import is_primary
from flm_jax.tracking.background import Background
from flm_jax.tracking.files import Events, JsonLines
from flm_jax.tracking.reading import METRICS
from flm_jax.tracking.writer import Measurement, StageCost, Totals, Writer

log = logging.getLogger(__name__)


# Seconds that the start of a run waits for a service, to say where to look there.
OPENING = 20.0


def devices() -> dict[str, Any]:
    """What the program runs on: numbers of devices and processes, and the kind of device."""
    kind = jax.devices()[0].device_kind
    return {"devices": jax.device_count(), "device": kind, "processes": jax.process_count()}


def where_to_look(workdir: Path, service: Background | None) -> Iterator[str]:
    """Sentences on where the measurements of a run are while it trains."""
    yield f"Measurements: {workdir / METRICS}"
    yield f"Curves: {workdir / 'loss.png'}, or tensorboard --logdir {workdir / 'events'}"
    if service is not None:
        yield service.where(OPENING) or "The tracking service is not open; training does not wait for it."


class Session:
    """What the stages of one start of the program share: the service, and that the start is written once."""

    def __init__(self, service: Background | None = None, start: Mapping[str, Any] | None = None) -> None:
        """Takes the service that measurements are also sent to, and what the program runs on, for the log."""
        self.service = service
        self._start: Mapping[str, Any] | None = start or {}

    def start(self) -> Mapping[str, Any] | None:
        """What the program runs on, the first time; then None."""
        start, self._start = self._start, None
        return start


class MetricsLog:
    """The measurements of a stage, in metrics.jsonl, in TensorBoard events and at the service, in process 0.

    Steps, tokens and FLOPs count over all stages, so stages follow each other on every axis. Each line of metrics.jsonl
    is an object with `kind` (see `Measurement`), `stage`, `stage_step`, `step`, `tokens`, `flops`, `time` (seconds
    since 1970) and the measurements; a number that is not finite is null. What cannot be written, to a full disk for
    example, is given up with one line in the log, and training goes on.
    """

    def __init__(
        self,
        workdir: Path,
        directory: str,
        stage: str,
        before: Totals,
        cost: StageCost,
        session: Session | None = None,
    ) -> None:
        """Names the files; `open` begins to write.

        Args:
          workdir: the work directory.
          directory: of the stage, for its event files.
          stage: its name.
          before: totals of the stages before.
          cost: what the stage's steps cost.
          session: what the stages of this start of the program share.
        """
        self._lines, self._events = workdir / METRICS, workdir / "events" / directory
        self._stage, self._before, self.cost = stage, before, cost
        self._session = session or Session()
        self._writers: dict[Path, Writer] = {}
        self._opened = False

    def totals(self, step: int) -> Totals:
        """Totals after `step` steps of the stage."""
        return self._before.plus(step, self.cost)

    def open(self, start: int) -> bool:
        """Opens the files at a step of the stage, unless they are open; what was measured after it comes again.

        Returns:
          Whether it has opened them.
        """
        if self._opened or not is_primary():
            return False
        self._opened = True
        total = self._before.steps + start
        for path, opened in ((self._lines, JsonLines), (self._events, Events)):
            self._try(path, functools.partial(self._begin, path, opened, total))
        if (begun := self._session.start()) is not None:
            self.write("start", start, begun)
        return True

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes what was measured at a step of the stage; what comes before `open` is written nowhere."""
        if not self._opened:
            return
        measured = Measurement(kind, self._stage, step, self.totals(step), time.time(), values)
        for path, writer in list(self._writers.items()):
            self._try(path, functools.partial(writer.write, measured))
        if self._session.service is not None:
            self._session.service.write(measured)

    def close(self) -> None:
        """Closes the files; the service goes on with the next stage."""
        for path, writer in list(self._writers.items()):
            self._try(path, writer.close)
        self._writers.clear()
        self._opened = False

    def _begin(self, path: Path, opened: Callable[[Path, int], Writer], step: int) -> None:
        self._writers[path] = opened(path, step)

    def _try(self, path: Path, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            self._writers.pop(path, None)
            log.error("%s cannot be written (%s): training goes on without it.", path, error.strerror or error)
