"""The writers of files: a line per measurement as JSON, and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flm_jax.files import atomic_write
from flm_jax.tracking.writer import Measurement


class JsonLines:
    """The lines of a file, one JSON object per measurement."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens the file to append, without its lines of steps after `step` and without a last line that was cut off.

        A damaged line stays: it is no reason to lose the measurements after it.
        """
        with path.open("ab+") as file:
            file.seek(0)
            whole, later = 0, []  # bytes before the first line that goes, and the lines after it that stay
            goes = False
            while line := file.readline():
                if not line.endswith(b"\n") or _after(line, step):
                    goes = True
                elif goes:
                    later.append(line)
                else:
                    whole = file.tell()
            if later:
                file.seek(0)
                atomic_write(path, b"".join([file.read(whole), *later]))
            elif goes:
                file.truncate(whole)
        self._file: Any = path.open("a")

    def write(self, measured: Measurement) -> None:
        """See Writer."""
        self._file.write(json.dumps(measured.line()) + "\n")
        self._file.flush()

    def close(self) -> None:
        """See Writer."""
        self._file.close()


def _after(line: bytes, step: int) -> bool:
    """Whether a line is a measurement of a step after `step`; of one that cannot be read nobody knows."""
    try:
        return bool(json.loads(line)["step"] > step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Imports within find no PyTorch, unless it is there already: tensorboardX imports it, for seconds, as a type."""
    if "torch" in sys.modules:
        yield
        return
    hidden: Any = None
    sys.modules["torch"] = hidden
    try:
        yield
    finally:
        del sys.modules["torch"]


class Events:
    """TensorBoard's event files of one stage, a new one for every start of the program."""

    def __init__(self, directory: Path, step: int) -> None:
        """Opens a new file; TensorBoard drops what earlier files hold of steps after `step`."""
        # Not its SummaryWriter: the writer's thread dies with the first error, and then the program waits for it.
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        self._writer: Any = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
        again = Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._writer.write_event(again)

    def write(self, measured: Measurement) -> None:
        """See Writer; numbers are named `kind/name`. Where the program started is no curve, and left out."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        if measured.kind == "start":
            return
        for name, value in measured.numbers().items():
            event = Event(wall_time=measured.time, step=measured.total.steps, summary=scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """See Writer."""
        self._writer.close()
