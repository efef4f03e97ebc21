"""Work on parts as an Apache Beam pipeline, for more than one machine; the extra `beam` installs it.

Machines share a disk with the text and `DataConfig.cache_dir`, under the same paths, and have flm_jax installed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from flm_jax.data.parts import Part
from flm_jax.data.reading import MissingExtraError
from flm_jax.data.workers import Workers

DIRECT = "DirectRunner"
RUNNERS = (DIRECT, "DataflowRunner", "FlinkRunner", "SparkRunner")
# How often a pipeline is started for parts that are left; Beam's own runners try a bundle again, not the direct one.
_TRIES = 3
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Beam:
    """A runner of Beam.

    Attributes:
      name: one of RUNNERS.
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
          OSError: the pipeline has failed.
          ValueError: an option is wrong, or a file cannot be read.
        """
        if not parts:
            return
        beam, options = load_beam(), self._options()
        for last in (*(False,) * (_TRIES - 1), True):
            try:
                with beam.Pipeline(self.name, options=options) as pipeline:
                    # Without the reshuffle all parts would be one bundle, on one machine.
                    pipeline | beam.Create(list(parts)) | beam.Reshuffle() | beam.Map(function)
                break
            except (ValueError, OSError):  # of the text itself: it would come again
                raise
            except Exception as error:  # of the runner, of any class; finished parts are not done again
                if last:
                    said = f"the pipeline of {self.name} has failed {_TRIES} times: {_last_line(error)}"
                    raise OSError(said) from error
                _log.warning("The pipeline of %s failed, and is started again: %s", self.name, _last_line(error))
        for part in parts:
            done(part.size)

    def _options(self) -> Any:
        """The options of the pipeline."""
        from apache_beam.options.pipeline_options import PipelineOptions

        given = list(self.options)
        if self.name == DIRECT:
            named = {option.split("=")[0] for option in given}
            mode = "multi_processing" if self.workers > 1 else "in_memory"
            for option, value in (("--direct_num_workers", self.workers), ("--direct_running_mode", mode)):
                given += [] if option in named else [f"{option}={value}"]
        return PipelineOptions(given)


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


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1][:300]
