"""XLA's options of the train step: what a run gives, and what overlaps communication with computation on GPUs.

They are options of one compilation, not of the process: nothing has to be set before JAX starts, and other programs
keep their defaults. What XLA_FLAGS or the run sets is never changed.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flm_jax import costs
from flm_jax.config import ModelConfig

# What an option of these compilers begins with.
PREFIXES = {"tpu": "xla_tpu_", "gpu": "xla_gpu_"}
# XLA combines collectives up to its own default size in any case.
SMALLEST_COMBINED = 32 * 2**20


def for_step(mesh: Mesh, cfg: ModelConfig, given: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """XLA's options of a train step on `mesh`; None: there are none.

    Args:
      mesh: the mesh.
      cfg: the model.
      given: the run's options. On TPUs all are taken. On GPUs those whose names begin with xla_gpu_, which replace the
        defaults; the rest is for TPUs. On other devices none.
    """
    device = mesh.devices.flat[0]
    options: dict[str, Any] = {}
    if device.platform == "gpu" and "NVIDIA" in device.device_kind and mesh.size > 1:
        taken = flags_of(os.environ.get("XLA_FLAGS", ""))
        options = {name: value for name, value in overlap(cfg).items() if name not in taken and known(name, value)}
    for name, value in (given or {}).items():
        if device.platform == "tpu" or (device.platform == "gpu" and name.startswith(PREFIXES["gpu"])):
            # As XLA_FLAGS has them; JAX takes no other texts than "True" and "False".
            options[name] = value.capitalize() if value in ("true", "false") else value
    return options or None


def overlap(cfg: ModelConfig) -> dict[str, Any]:
    """Options with which the collectives of a step on several GPUs run while it computes.

    The scheduler that starts collectives early and waits for them late, and combining up to what JAX's page about GPU
    performance advises: at least the parameters of one layer, which are gathered, and whose gradients are reduced, in
    one step of the scan over layers.
    """
    layer = sum(like.size // max(cfg.layers, 1) * 4 for _, like, sig in costs.leaves(cfg) if "layers" in sig.axes)
    combined = max(SMALLEST_COMBINED, layer)
    return {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_all_gather_combine_threshold_bytes": combined,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": combined,
        "xla_gpu_all_reduce_combine_threshold_bytes": combined,
    }


def flags_of(text: str) -> set[str]:
    """The names of the flags in a value of XLA_FLAGS, which are the flags or the name of a file that has them."""
    if text.strip() and not text.lstrip().startswith("-"):
        try:
            text = Path(text.strip()).read_text()
        except (OSError, ValueError):
            return set()
    return set(re.findall(r"(?:^|\s)--(?:no)?(\w+)", text))


@functools.lru_cache(maxsize=64)
def known(name: str, value: Any) -> bool:
    """Whether this jaxlib has such an option: a trivial program is compiled with it, on this process's first device.

    All compilers read the same record of options, so a CPU answers for GPUs. A name that is not known would end the
    compilation of the train step with an error.
    """
    # Where a step is traced, or under a mesh, this is a program of its own.
    try:
        one = jax.ShapeDtypeStruct((), "float32", sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
        jax.jit(lambda x: x, compiler_options={name: value}).lower(one).compile()
    except jax.errors.JaxRuntimeError as error:
        if "compile option" not in str(error):
            raise
        return False
    return True
