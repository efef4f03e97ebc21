"""Going back at a spike: the checkpoint that a run goes back to, and the batches that it then leaves out."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from flm_jax import distributed
from flm_jax.checkpoint import Checkpoints, DamagedError, NoCheckpointError, Restored
from flm_jax.data.batches import TokenBatches
from flm_jax.guards.config import SpikeGuard
from flm_jax.guards.spikes import Spike
from flm_jax.guards.steps import SpikeError, batch_record, batch_text, spike_text

log = logging.getLogger(__name__)


def restore_before(spike: Spike, guard: SpikeGuard, store: Checkpoints, abstract: Any, begins: int = 0) -> Restored:
    """The checkpoint of a stage that a run goes back to; an older one where it is damaged.

    Args:
      spike: because of which.
      guard: says how far before it.
      store: the checkpoints of the stage.
      abstract: shapes and shardings of the state.
      begins: the first of them.

    Raises:
      SpikeError: there is none.
    """
    faults = []
    for step in reversed(guard.points(1, guard.rewind_to(spike.since, begins), begins)):
        try:
            return store.restore(abstract, step)
        except (DamagedError, NoCheckpointError) as error:
            faults.append(str(error))
            if distributed.is_primary():
                log.error("The run cannot go back to step %d, and goes back to an older one: %s", step, error)
    raise SpikeError(
        f"Step {spike.step}: {spike_text(spike)}, and there is no checkpoint to go back to: {faults[0]}. Start a new "
        "work directory from one of an earlier stage."
    )


def skip_behind(spike: Spike, first: int, guard: SpikeGuard, batches: TokenBatches, batch_size: int) -> dict[str, Any]:
    """Moves the data from where it is to behind a spike; returns which windows are left out, as `batch_record`.

    Args:
      spike: the spike.
      first: the first window of the batch that it was seen at.
      guard: says how many more batches are left out.
      batches: the data, at the position of the checkpoint that the run goes back to.
      batch_size: windows per batch of the stage.

    Raises:
      SpikeError: the data ends before.
    """
    begins, ends = batches.position, first + (1 + guard.skip_batches) * batch_size
    nobody = np.zeros(0, np.int64)  # the rows that are read
    try:
        while batches.position < ends:
            batches.next(batch_size, nobody)
    except ValueError as error:
        left_out = batch_text({"windows": [begins, ends - 1]})
        raise SpikeError(
            f"Step {spike.step}: {spike_text(spike)}, and the data does not suffice to leave out {left_out}: {error}."
        ) from error
    return batch_record(batches, begins, ends - begins)
