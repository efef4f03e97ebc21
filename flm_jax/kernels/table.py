"""Rows of a table whose rows may be split over devices."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flm_jax.sharding import fitting_spec, mesh_axes


def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The rows of a table for token ids, (B, T, D).

    If the vocabulary is split over devices, every device looks up the rows that it holds, and the results are summed.
    The sum is exact, because all devices but one add zeros. Without this, the compiler gathers the whole table, and its
    whole gradient too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = mesh_axes("vocab")
    if mesh.empty or math.prod(mesh.shape[name] for name in names) == 1:
        return table_VD[tokens_BT]

    def local(table_vD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        row_BT = tokens_BT - jax.lax.axis_index(names) * table_vD.shape[0]
        mine_BT = (row_BT >= 0) & (row_BT < table_vD.shape[0])
        found_BTD = table_vD[jnp.where(mine_BT, row_BT, 0)]
        return jax.lax.psum(jnp.where(mine_BT[..., None], found_BTD, jnp.zeros((), found_BTD.dtype)), names)

    # The specs keep the table's width whole on each device (it is gathered), so the result is split like the batch.
    rows = fitting_spec(tokens_BT.shape, ("batch", "time"))
    split = jax.shard_map(local, in_specs=(PartitionSpec(names), rows), out_specs=rows)
    return split(table_VD, tokens_BT)
