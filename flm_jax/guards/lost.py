"""What a process does that has lost another one: it says so and ends, so that all can be started again."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator

import jax

from flm_jax import distributed

# How gloo, NCCL and the coordination service say that the process at the other end is gone.
_GONE = re.compile(
    r"gloo .{1,40}failed|remote process exited|RPC to coordination service|heartbeat timeout", re.IGNORECASE
)
# For so long a process waits for the others to hear of it; process 0, without which they cannot hear, twice as long.
_TELLING_S = 3.0


@contextlib.contextmanager
def ending_if_lost() -> Iterator[None]:
    """A context that ends this process, with status `LOST`, where it fails because another process is gone.

    It ends at once: what is done after an error otherwise, such as completing a save that all processes write, would
    wait for the lost one. If that one has said why it ends, its sentence is printed, and the status is 1.
    """
    try:
        yield
    except Exception as error:
        if distributed.joined() and jax.process_count() > 1 and _GONE.search(str(error)):
            _end(error)
        raise


def _end(error: Exception) -> None:
    reason = " ".join(str(error).split())[:300]
    mine = (
        f"process {jax.process_index()} has lost another process, which was killed, or whose host is gone ({reason}). "
        "Start all processes again: what is saved is whole."
    )
    status, sentence = distributed.tell(mine, distributed.LOST)
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    time.sleep(_TELLING_S * (2 if distributed.is_primary() else 1))
    os._exit(status)
