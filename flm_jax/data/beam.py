"""Work on parts as an Apache Beam pipeline, for more than one machine; the extra `beam` installs it.

Machines share a disk with the text and `DataConfig.cache_dir`, under the same paths, and have flm_jax installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from flm_jax.data.parts import Part
from flm_jax.data.reading import MissingExtraError
from flm_jax.data.workers import Workers

DIRECT = "DirectRunner"
# How often a pipeline is started for parts that are left. Runners of clusters also try a part again themselves.
_TRIES = 3
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Beam:
    """A runner of Beam.

    Attributes:
      name: DirectRunner, DataflowRunner, FlinkRunner or SparkRunner.
      workers: processes of the direct runner; other runners take theirs from the options.
      options: of the pipeline, such as '--region=europe-west4'.
      here: the processes of this machine, for what must pass through it.
    """

    name: str
    workers: int
    options: tuple[str, ...] = ()
    here: Workers = dataclasses.field(default_factory=Workers)

    @property
    def part_bytes(self) -> int:
        """See `workers.Runner`."""
        return self.here.part_bytes

    def run(self, function: Callable[[Part], int], parts: Sequence[Part], done: Callable[[int], Any]) -> None:
        """See `workers.Runner`; `done` is called at the end.

        Raises:
          MissingExtraError: Beam is not installed.
          OSError: the pipeline has failed several times.
        """
        if not parts:
            return
        load_beam()
        for trial in range(1, _TRIES + 1):
            if not (said := self.attempt(function, parts)):
                break
            if trial == _TRIES:
                raise OSError(f"the pipeline of {self.name} has failed {_TRIES} times: {said}")
            _log.warning("The pipeline of %s failed, and is started again for what is left: %s", self.name, said)
        for part in parts:
            done(part.size)

    def attempt(self, function: Callable[[Part], int], parts: Sequence[Part]) -> str:
        """Runs a pipeline for some parts; returns why it failed, '' if it did not."""
        if self.name != DIRECT:
            return _run(self.name, self.options, function, parts)
        named = {option.split("=")[0] for option in self.options}
        mode = "multi_processing" if self.workers > 1 else "in_memory"
        own = {"--direct_num_workers": self.workers, "--direct_running_mode": mode}
        options = (*self.options, *(f"{key}={value}" for key, value in own.items() if key not in named))
        return _run_apart(options, function, parts)


def load_beam() -> Any:
    """Apache Beam.

    Raises:
      MissingExtraError: it is not installed.
    """
    try:
        import apache_beam
    except ImportError as error:
        raise MissingExtraError(
            f"this runner needs Apache Beam, which cannot be imported ({error}): pip install -e '.[beam]' in a "
            "checkout, into an environment of its own; or take --runner=local"
        ) from error
    return apache_beam


def _run(name: str, options: Sequence[str], function: Callable[[Part], int], parts: Sequence[Part]) -> str:
    """Runs a pipeline; returns why it failed, '' if it did not."""
    beam = load_beam()
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        with beam.Pipeline(name, options=PipelineOptions(list(options))) as pipeline:
            # Without the reshuffle all parts would be one bundle, on one machine.
            pipeline | beam.Create(list(parts)) | beam.Reshuffle() | beam.Map(function)
    except Exception as error:  # of the runner, of any class
        return _last_line(error)
    return ""


def _run_apart(options: Sequence[str], function: Callable[[Part], int], parts: Sequence[Part]) -> str:
    """As `_run`, with the direct runner in processes that can be ended.

    If one of its workers is killed, the direct runner waits for it without end.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_pipeline_process, args=(theirs, tuple(options), function, list(parts))
    )
    process.start()
    theirs.close()
    try:
        wait([ours, process.sentinel])
        try:
            found: str = ours.recv() if ours.poll() else "its process was killed"
        except EOFError:
            found = "its process was killed"
        return found
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # the workers too
        process.kill()  # it may not have begun its group yet
        process.join()


def _pipeline_process(
    connection: Connection, options: Sequence[str], function: Callable[[Part], int], parts: Sequence[Part]
) -> None:
    os.setsid()  # a group of its own: it ends with all of its workers
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os.killpg(0, signal.SIGKILL)

    def failed(args: threading.ExceptHookArgs) -> None:
        connection.send(_last_line(args.exc_value))  # of the thread that watches a worker

    threading.Thread(target=follow, daemon=True).start()
    threading.excepthook = failed
    connection.send(_run(DIRECT, options, function, parts))


def _last_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1][:300] or repr(error)
