"""Start and failure of a program: logging, joining other processes, errors printed as one sentence."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from flm_jax import distributed
from flm_jax.checkpoint import CheckpointError, DamagedError
from flm_jax.cli.flags import begun, exit_interrupted, refuse, was_interrupted
from flm_jax.data.reading import MissingExtraError
from flm_jax.growth import GrowthError
from flm_jax.guards import NonFiniteError, SpikeError, ending_if_lost

# Errors that a user's input can cause; they are printed as one sentence. Others are bugs and keep their traceback.
EXPECTED = (
    ValueError,
    OSError,
    GrowthError,
    CheckpointError,
    NonFiniteError,
    SpikeError,
    distributed.PeerError,
    MissingExtraError,
)


def join(flags: Mapping[str, Any]) -> None:
    """Joins the other processes of a run, if flags or environment specify any; see `flm_jax.distributed.join`.

    Flags that do not fit together exit with status 2, as all wrong flags do.
    """
    _log_from(logging.WARNING)
    try:
        distributed.join(**flags)
    except distributed.ProcessFlagsError as error:
        refuse(str(error))
    except ValueError as error:
        fail(error)


def _log_from(level: int) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level, force=True)


@contextlib.contextmanager
def started() -> Iterator[None]:
    """A context manager that prints expected errors as one sentence and exits with status 1."""
    _log_from(logging.WARNING)  # before JAX looks for devices, because it logs every platform that it does not find
    if not distributed.is_primary():
        _log_from(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8, and are printed
    begun()
    try:
        with ending_if_lost():
            yield
    except EXPECTED as error:
        fail(error)
    except KeyboardInterrupt:
        distributed.fail_together("interrupted by SIGINT")
        raise
    except Exception as error:
        if was_interrupted():
            distributed.fail_together("interrupted by SIGINT")
        elif distributed.joined():
            traceback.print_exc()
            distributed.fail_together(repr(error))
        raise


def fail(error: BaseException) -> NoReturn:
    """Prints an error as one sentence and exits with status 1; as interrupted, if that is what caused it."""
    if was_interrupted():
        distributed.fail_together("interrupted by SIGINT")
        exit_interrupted()
    # gin appends the calls that it was in to the message; only the text before them is printed.
    text = " ".join(str(error).split("\n  In call to configurable")[0].split())
    if isinstance(error, DamagedError):
        text = f"{text.rstrip('.')}. Restore it from a copy, or give another step."
    print(f"error: {text}", file=sys.stderr)
    distributed.fail_together(text)
    sys.exit(1)
