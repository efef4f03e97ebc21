"""Held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from flm_jax.config import ModelConfig
from flm_jax.loss import loss_sum
from flm_jax.model import Masks, Params
from flm_jax.sharding import spec


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """A host's rows of a batch, (b, T) arrays, as global arrays split over the batch axes of the mesh."""
    where = NamedSharding(mesh, spec(("batch", "time")))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), batch)


def few_rows(mesh: Mesh) -> int:
    """About eight windows, as many as the mesh can split evenly: what whole logits are looked at on."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return int(shards * max(1, 8 // shards))


def make_eval(cfg: ModelConfig, mesh: Mesh, chunks: int = 1) -> Callable[[Params, Iterable[Any], Masks | None], float]:
    """A function from parameters, batches and masks to the mean loss in nats a token.

    It is compiled once for the masked and once for the ordinary program; batches must all have one shape.
    """

    @jax.jit
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
