"""Progress bars, the files of measurements, and stopping by a signal."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

from flm_jax.distributed import is_primary

log = logging.getLogger(__name__)


class Totals(NamedTuple):
    """Steps, tokens and training FLOPs of a run so far, over all stages."""

    steps: int
    tokens: int
    flops: int

    def plus(self, steps: int, tokens_per_step: int, flops_per_token: int) -> Totals:
        """These and some more steps."""
        tokens = steps * tokens_per_step
        return Totals(self.steps + steps, self.tokens + tokens, self.flops + tokens * flops_per_token)


class MetricsLog:
    """The measurements of a run, in metrics.jsonl and in TensorBoard events, in process 0.

    Steps, tokens and FLOPs count over all stages, so stages follow each other on every axis. Each line of metrics.jsonl
    is an object with `kind` ("train", "heldout", "growth", "save" or "skip"), `stage`, `stage_step`, `step`, `tokens`,
    `flops`, `time` (seconds since 1970) and the measurements; a number that is not finite is null. What cannot be
    written, to a full disk for example, is given up with one line in the log, and training goes on.
    """

    def __init__(
        self, workdir: Path, directory: str, stage: str, before: Totals, tokens_per_step: int, flops_per_token: int
    ) -> None:
        """Names the files; `open` begins to write.

        Args:
          workdir: the work directory.
          directory: of the stage, for its event files.
          stage: its name.
          before: totals of the stages before.
          tokens_per_step: tokens of one batch of this stage.
          flops_per_token: training FLOPs per token.
        """
        self._lines, self._events = workdir / "metrics.jsonl", workdir / "events" / directory
        self._stage, self._before = stage, before
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self._sinks: dict[Path, Any] = {}

    def totals(self, step: int) -> Totals:
        """Totals after `step` steps of the stage."""
        return self._before.plus(step, self.tokens_per_step, self.flops_per_token)

    def open(self, start: int) -> None:
        """Opens the files at a step of the stage, unless they are open; what was measured after it comes again."""
        if self._sinks or not is_primary():
            return
        total = self._before.steps + start

        def events() -> Any:
            # Not its SummaryWriter: the writer's thread dies with the first error, and then the program waits for it.
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

            self._events.mkdir(parents=True, exist_ok=True)
            writer = EventsWriter(str(self._events / "events"), f".{time.time_ns()}")
            again = Event(wall_time=time.time(), step=total + 1, session_log=SessionLog(status=SessionLog.START))
            writer.write_event(again)  # TensorBoard drops earlier events from this step on
            return writer

        def lines() -> Any:
            return _reopened(self._lines, total)

        for path, opened in ((self._lines, lines), (self._events, events)):
            self._try(path, functools.partial(self._begin, path, opened))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes what was measured at a step of the stage; numbers also go to TensorBoard, as `kind/name`."""
        now, total = time.time(), self.totals(step)
        line = {"kind": kind, "stage": self._stage, "stage_step": step, **total._asdict()}
        line["step"] = line.pop("steps")
        line |= {"time": now, **{name: _finite(value) for name, value in values.items()}}
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}

        def events() -> None:
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.summary import scalar

            for name, value in {**numbers, "tokens": total.tokens, "flops": total.flops}.items():
                event = Event(wall_time=now, step=total.steps, summary=scalar(f"{kind}/{name}", value))
                self._sinks[self._events].write_event(event)
            self._sinks[self._events].flush()

        def lines() -> None:
            self._sinks[self._lines].write(json.dumps(line) + "\n")
            self._sinks[self._lines].flush()

        for path, written in ((self._lines, lines), (self._events, events)):
            if path in self._sinks:
                self._try(path, written)

    def close(self) -> None:
        """Closes the files."""
        for path, sink in list(self._sinks.items()):
            self._try(path, sink.close)
        self._sinks.clear()

    def _begin(self, path: Path, opened: Callable[[], Any]) -> None:
        self._sinks[path] = opened()

    def _try(self, path: Path, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            self._sinks.pop(path, None)
            log.error("%s cannot be written (%s): training goes on without it.", path, error.strerror or error)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reopened(path: Path, step: int) -> Any:
    """The file, opened to append, without its lines of steps after `step` and without a line that was cut off."""
    file = path.open("a+")
    file.seek(0)
    kept = 0
    while line := file.readline():
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept = file.tell()
    file.truncate(kept)
    return file


class Progress:
    """A progress bar with ETA, loss and tokens per second for one stage, in process 0."""

    def __init__(self, metrics: MetricsLog, name: str, steps: int, start: int) -> None:
        """Opens the bar at step `start`.

        Args:
          metrics: where measurements are written.
          name: of the stage.
          steps: total number of steps of the stage.
          start: number of steps that are already done.
        """
        # Imported here, because using the library without a terminal does not need it.
        from tqdm import tqdm

        self._metrics = metrics
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc=name,
            unit="step",
            mininterval=_interval(),
            smoothing=0.1,
            disable=not is_primary(),
        )
        self._since = (start, time.perf_counter())
        self._rate = 0.0
        self._compiling = True
        self._eval = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, step: int, values: Mapping[str, float], write: bool) -> None:
        """Shows one finished step, and writes its measurements if `write`."""
        begun, since = self._since
        tokens_per_step, flops_per_token = self._metrics.tokens_per_step, self._metrics.flops_per_token
        if self._compiling:
            # The first step after a start includes compilation, so it is not timed.
            self._compiling, self._since = False, (step, time.perf_counter())
        elif write or not self._rate:
            now = time.perf_counter()
            self._rate = (step - begun) * tokens_per_step / (now - since)
            self._since = (step, now)
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}{self._eval}, {self._rate:,.0f} tokens/s", refresh=False)
        self._bar.update(step - self._bar.n)
        if write:
            rates = {"tokens_per_second": self._rate, "flops_per_second": self._rate * flops_per_token}
            self._metrics.write("train", step, {**values, **rates})

    def evaluated(self, step: int, record: Mapping[str, Any]) -> None:
        """Shows and writes a held-out measurement; the time that it took does not count in tokens per second."""
        self._eval = f", held-out {record['loss']:.3f}"
        self._since = (step, time.perf_counter())


def byte_bar(total: int, done: int, what: str) -> Any:
    """A progress bar in bytes, `done` of `total`; a context manager with `update(nbytes)`."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=what, unit="B", unit_scale=True, mininterval=_interval(), smoothing=0.1)


@contextlib.contextmanager
def phases(*names: str) -> Iterator[Callable[[], None]]:
    """A context that shows, where there is a terminal, which of some phases is running and for how long.

    It yields a function to call at the beginning of each phase.
    """
    from tqdm import tqdm

    shown = "{desc} ({n_fmt} of {total_fmt}), {elapsed}"
    with tqdm(total=len(names), bar_format=shown, leave=False, disable=None if is_primary() else True) as bar:
        left = iter(names)

        def begin() -> None:
            bar.set_description_str(next(left), refresh=False)
            bar.update()
            bar.refresh()

        yield begin


def count_bar(what: str, unit: str, total: int | None = None) -> Any:
    """A progress bar that counts, hidden where there is no terminal; a context manager with `update(n)`."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, leave=False, disable=None if is_primary() else True)


def _interval() -> float:
    """Minimum seconds between two updates of a bar: long if stderr is a file, where each update is a new line."""
    return 0.2 if sys.stderr.isatty() else 20.0


class Interrupts:
    """A context manager in which SIGINT and SIGTERM request a stop; a second signal stops the program at once.

    Attributes:
      requested: the name of the signal that was received, or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # Not the main thread, as in some notebooks; only the main thread can set handlers.
                break
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = signal.Signals(number).name
        signal.signal(number, self._before[number])
        print(
            f"\n{self.requested}: stopping after this step, once its state is saved; send it again to stop at once.",
            file=sys.stderr,
            flush=True,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
