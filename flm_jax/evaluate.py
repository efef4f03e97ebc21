"""Held-out loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from flm_jax.config import ModelConfig
from flm_jax.loss import loss_sum
from flm_jax.model import Masks, Params
from flm_jax.sharding import replicated, spec


@functools.lru_cache(maxsize=64)
def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that this process's devices hold, in order, int64.

    The mesh decides: where `tensor` reaches over several processes, these hold the same rows.
    """
    where = NamedSharding(mesh, spec(("batch",))).addressable_devices_indices_map((batch_size,))
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in where.values() if index is not None]))


def put_batch(batch: Any, mesh: Mesh, batch_size: int | None = None) -> Any:
    """A batch of (B, T) arrays as global arrays, split as the mesh splits them.

    Args:
      batch: the whole batch, the same in every process; or, with `batch_size`, its `own_rows`.
      mesh: where to.
      batch_size: B, where the arrays hold this process's rows alone.
    """
    where = NamedSharding(mesh, spec(("batch", "time")))

    def put(x: np.ndarray) -> jax.Array:
        whole = len(x) if batch_size is None else batch_size
        own = np.arange(whole) if batch_size is None else own_rows(mesh, batch_size)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(whole)
            first = int(np.searchsorted(own, start))
            return x[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((whole, *x.shape[1:]), where, part)

    return jax.tree.map(put, batch)


def few_rows(mesh: Mesh) -> int:
    """About eight windows, as many as the mesh can split evenly: what whole logits are looked at on."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return int(shards * max(1, 8 // shards))


def make_eval(cfg: ModelConfig, mesh: Mesh, chunks: int = 1) -> Callable[[Params, Iterable[Any], Masks | None], float]:
    """A function from parameters, batches and masks to the mean loss in nats a token.

    It is compiled once for the masked and once for the ordinary program; batches must all have one shape.
    """

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def sums(params: Params, batch: Any, masks: Masks | None) -> tuple[jax.Array, jax.Array]:
        total = loss_sum(
            cfg, params, batch.inputs_BT, batch.targets_BT, batch.weights_BT, batch.segments_BT, masks, chunks
        )
        return total, jnp.sum(batch.weights_BT)

    def evaluate(params: Params, batches: Iterable[Any], masks: Masks | None = None) -> float:
        with jax.set_mesh(mesh):
            pairs = [sums(params, put_batch(batch, mesh), masks) for batch in batches]
        total, weight = (sum(float(x) for x in side) for side in zip(*jax.device_get(pairs), strict=True))
        return total / weight

    return evaluate
