"""Progress bars, and stopping by a signal."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any, Self

from flm_jax.distributed import is_primary
from flm_jax.tracking import MetricsLog, Waits, memory, utilisation
from flm_jax.tracking.waits import SHARE

log = logging.getLogger(__name__)


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

        self._metrics, self._name = metrics, name
        self._waits, self._said, self._share = Waits(start), False, 0.0
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
        cost = self._metrics.cost
        if self._compiling:
            # The first step after a start includes compilation, so it is not timed.
            self._compiling, self._since = False, (step, time.perf_counter())
            self._waits.begin(step)
        elif write or not self._rate:
            now = time.perf_counter()
            self._rate = (step - begun) * cost.tokens_per_step / (now - since)
            self._since = (step, now)
        self._look_at_data(step)
        waits = f", {self._share:.0%} of the time waiting for data" if self._share >= SHARE else ""
        shown = f"loss {values['loss']:.3f}{self._eval}, {self._rate:,.0f} tokens/s{waits}"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        if write:
            flops = self._rate * cost.at(step)
            rates = {"tokens_per_second": self._rate, "flops_per_second": flops, **utilisation(flops)}
            self._metrics.write("train", step, {**values, **rates, **self._waits.per_step(step), **memory()})

    def waiting(self, what: str) -> contextlib.AbstractContextManager[None]:
        """A context whose time the run spends on `what`, such as device, save or heldout."""
        return self._waits.on(what)

    def reading(self, running: Any) -> contextlib.AbstractContextManager[None]:
        """A context that reads the next batch; see `Waits.on_data`."""
        return self._waits.on_data(running)

    def _look_at_data(self, step: int) -> None:
        """Notes the share of time that the run waits for its data, and says it once if it is large."""
        share = self._waits.data_share(step)
        self._share = self._share if share is None else share
        if self._share >= SHARE and not self._said:
            self._said = True
            log.warning(
                "Stage %s waits for its data: %.0f %% of the time before step %d, in which the devices had nothing to "
                "do. Read it from a token store (DataConfig.streamed = False) on a local disk, and leave processor "
                "cores free.",
                *(self._name, 100 * self._share, step),
            )

    def rewound(self, step: int) -> None:
        """Goes back to a step."""
        self._since = (step, time.perf_counter())
        self._waits.begin(step)
        self._bar.update(step - self._bar.n)

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
