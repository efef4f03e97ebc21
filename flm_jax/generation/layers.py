"""The parameters of each layer as arrays of their own, with which a CPU decodes faster.

A loop over layers copies each layer's part of every stacked array before it multiplies. Without the loop, and with an
array per layer, nothing is copied, and the program takes longer to compile.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flm_jax.model import Layers, Params

# What has to be copied less for the compilation to be worth it. On two cores compiling takes 0.1 s longer per layer,
# the time in which 3 GiB are copied; `benchmarks/decode.py` measures both.
WORTH_BYTES = 3 * 2**30
# JAX takes memory over, and does not copy it, that begins at a multiple of so many bytes.
ALIGNED = 64


def worth_apart(params: Params, mesh: Mesh, steps: int) -> bool:
    """Whether layers apart save more time in `steps` steps of decoding than they take to compile.

    Args:
      params: the parameters of a model, the blocks' stacked.
      mesh: where they lie. One CPU; accelerators were not measured, and of several devices none holds a layer whole.
      steps: how many tokens each row gets at most.
    """
    if not _one_cpu(mesh):
        return False
    blocks = jax.tree.leaves(params["blocks"])
    copied = sum(x.nbytes // len(x) for x in blocks if len(x))
    shared = all(x.nbytes // len(x) % ALIGNED == 0 for x in blocks if len(x))
    return shared and copied * steps >= WORTH_BYTES


def _one_cpu(mesh: Mesh) -> bool:
    return bool(mesh.size == 1 and mesh.devices.flat[0].platform == "cpu")


def layers_apart(params: Params, mesh: Mesh) -> Layers:
    """The parameters of each block, on a mesh of one CPU.

    They share the memory of `params` where a layer's part of an array has a multiple of 64 bytes. While they exist,
    that memory is not freed, and a program that `params` are donated to has to take other memory.

    Raises:
      ValueError: the mesh is another one.
    """
    if not _one_cpu(mesh):
        raise ValueError(
            f"Layers apart need a mesh of one CPU, and this one has devices of the platform "
            f"{mesh.devices.flat[0].platform!r}, {mesh.size} in number; leave apart=None, or set it to False."
        )
    on_mesh = NamedSharding(mesh, PartitionSpec())
    views = jax.tree.map(np.asarray, params["blocks"])

    def layer(index: int) -> Params:
        return jax.tree.map(lambda x: jax.device_put(x[index], on_mesh, may_alias=True), views)

    return tuple(layer(index) for index in range(len(jax.tree.leaves(views)[0])))
