"""Progress bars, TensorBoard events, and stopping by a signal."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from flm_jax.distributed import is_primary


class Progress:
    """A progress bar with ETA, loss and tokens/s, and scalars in event files, for one stage, in the primary process."""

    def __init__(
        self, events: Path, name: str, steps: int, tokens_per_step: int, flops_per_token: int, start: int
    ) -> None:
        """Opens the bar and the event file at step `start`.

        Args:
          events: the stage's directory of event files.
          name: of the stage.
          steps: total number of steps of the stage.
          tokens_per_step: tokens of one batch.
          flops_per_token: training FLOPs per token.
          start: number of steps that are already done.
        """
        # Imported here, because using the library without a terminal needs neither.
        from tensorboardX import SummaryWriter
        from tqdm import tqdm

        self._tokens_per_step, self._flops_per_token = tokens_per_step, flops_per_token
        # Steps after the last checkpoint of a killed run are written again; purge_step hides their first version.
        self._writer = SummaryWriter(str(events), purge_step=start + 1) if is_primary() else None
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
        if self._writer is not None:
            self._writer.close()

    def step(self, step: int, metrics: Mapping[str, float], write: bool) -> None:
        """Shows one finished step, and writes its metrics to the event file if `write`."""
        begun, since = self._since
        if self._compiling:
            # The first step after a start includes compilation, so it is not timed.
            self._compiling, self._since = False, (step, time.perf_counter())
        elif write or not self._rate:
            now = time.perf_counter()
            self._rate = (step - begun) * self._tokens_per_step / (now - since)
            self._since = (step, now)
        self._bar.set_postfix_str(f"loss {metrics['loss']:.3f}{self._eval}, {self._rate:,.0f} tokens/s", refresh=False)
        self._bar.update(step - self._bar.n)
        if write and self._writer is not None:
            tokens = step * self._tokens_per_step
            extra = {
                "tokens": tokens,
                "tokens_per_second": self._rate,
                "flops": tokens * self._flops_per_token,
            }
            extra["flops_per_second"] = self._rate * self._flops_per_token
            for name, value in {**metrics, **extra}.items():
                self._writer.add_scalar(f"train/{name}", value, step)

    def evaluated(self, step: int, record: Mapping[str, Any]) -> None:
        """Shows and writes a held-out measurement; the time that it took does not count in tokens/s."""
        self._eval = f", held-out {record['loss']:.3f}"
        if self._writer is not None:
            for name in ("loss", "bits_per_byte"):
                self._writer.add_scalar(f"heldout/{name}", record[name], step)
        self._since = (step, time.perf_counter())


def byte_bar(total: int, done: int, what: str) -> Any:
    """A progress bar in bytes, `done` of `total`; a context manager with `update(nbytes)`."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=what, unit="B", unit_scale=True, mininterval=_interval(), smoothing=0.1)


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
