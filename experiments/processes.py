"""The flags with which several processes find each other: the same in every launcher."""

from __future__ import annotations

from typing import Any

from absl import flags

_COORDINATOR = flags.DEFINE_string("coordinator", None, "Several processes: host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Several processes: how many.")
_PROCESS = flags.DEFINE_integer("process", None, "Several processes: which this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several processes that JAX finds itself: on a TPU pod, or under SLURM, Open MPI, Kubernetes."
)


def given() -> dict[str, Any]:
    """What the flags say, as arguments of `flm_jax.distributed.join`."""
    return {
        "coordinator": _COORDINATOR.value,
        "processes": _PROCESSES.value,
        "process": _PROCESS.value,
        "distributed": _DISTRIBUTED.value,
    }
