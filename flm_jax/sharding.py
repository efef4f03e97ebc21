"""Where arrays live: one mesh, one ordered list of rules from axis names to mesh axes.

Shapes first, then shardings, then values: nothing is ever made on one device and moved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flm_jax.records import recorded
from flm_jax.signature import Signature

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# Every axis that a parameter or an activation names stands here; the first rule of a name applies. Widths that the
# residual stream never shares with the batch go to `tensor`; the residual width itself, in parameters, to `fsdp`.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp")),
    ("time", ("sequence",)),
    # Between the products of a block, where nothing mixes positions, the stream is split over `tensor` too: what the
    # products of one device sum to is scattered, not repeated (sequence parallelism of 2205.05198).
    ("stream", ("sequence", "tensor")),
    ("history", ()),
    ("layers", ()),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("head_dim", ()),
    ("mlp", ("tensor",)),
    ("embed", ("fsdp",)),
    ("residual", ()),
)


@recorded
@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, for all that are left.

    Attributes:
      data: replicas of the parameters, each with its own share of the batch.
      fsdp: shares of parameters, gradients and moments; the batch is split over these too.
      sequence: shares of each window's positions; keys and values are exchanged, parameters are repeated.
      tensor: shares of heads, MLP and vocabulary inside one layer.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def shape(self, devices: int) -> tuple[int, ...]:
        """Devices along each of `MESH_AXES`.

        Raises:
          ValueError: the sizes do not multiply to `devices`.
        """
        given = [getattr(self, axis) for axis in MESH_AXES]
        rest = math.prod(size for size in given if size != -1)
        if given.count(-1) > 1 or any(size == 0 or size < -1 for size in given):
            raise ValueError(f"{self}: sizes are positive, and at most one is -1 (all the devices that are left).")
        if -1 in given and devices % rest == 0:
            given[given.index(-1)] = devices // rest
        if math.prod(given) != devices:
            raise ValueError(
                f"{self} does not fit {devices} devices: {' x '.join(MESH_AXES)} must be {devices}, "
                f"and -1 stands for what the others leave. {self._advice(devices)}"
            )
        return tuple(given)

    def _advice(self, devices: int) -> str:
        """Which axis to change, and to what."""
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        largest = max(sizes, key=lambda axis: sizes[axis])
        rest = math.prod(size for axis, size in sizes.items() if axis != largest and size != -1)
        if rest > devices or devices % rest:
            return f"Without {largest}, the others ask for {rest} devices, which do not divide {devices}."
        fitting = [n for n in range(1, devices // rest + 1) if (devices // rest) % n == 0]
        if -1 not in sizes.values():
            fitting = fitting[-1:]
        below = [n for n in fitting if n <= sizes[largest]][-1:]
        above = [n for n in fitting if n > sizes[largest]][:1]
        near = " and ".join(str(n) for n in below + above)
        return f"The nearest that works for {largest}, now {sizes[largest]}, is {near}."


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `MESH_AXES` over `devices` (default: all).

    Over several TPU slices, whose links to each other are slow, `data` is split first.

    Raises:
      ValueError: the sizes do not fit the devices, or `data` does not fit the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (config or MeshConfig()).shape(len(devices))
    # Elsewhere a slice is something else: on GPUs as many as NVLink joins, and any axis may reach over it.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    # An axis of the mesh may take a part of a physical one: 4 of a torus's 16, say.
    if slices > 1:
        check_slices(shape[0], slices)
        inside, outside = (shape[0] // slices, *shape[1:]), (slices, *[1] * len(shape[1:]))
        placed = mesh_utils.create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Linen's transforms know nothing of explicitly sharded types.
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_slices(data: int, slices: int) -> None:
    """Checks that `data` can be split over slices first.

    Raises:
      ValueError: it cannot.
    """
    if data % slices:
        raise ValueError(
            f"MeshConfig.data={data} must be a multiple of the {slices} slices that it is split over, such as "
            f"{slices}, and another axis smaller."
        )


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that an array axis is split over.

    Raises:
      ValueError: no rule covers `axis`.
    """
    for name, mesh in RULES:
        if name == axis:
            return mesh
    raise ValueError(f"No sharding rule covers axis {axis!r}; add it to RULES (even as ()) in sharding.py.")


def spec(axes: Sequence[str]) -> PartitionSpec:
    """The partition spec of an array with these axes."""
    return PartitionSpec(*(mesh_axes(axis) or None for axis in axes))


def sharding(signature: Signature, mesh: Mesh, shape: tuple[int, ...], path: str = "") -> NamedSharding:
    """Where a parameter of this signature and shape lives on `mesh`.

    Raises:
      ValueError: an axis is not divisible by the devices it is split over; the message names sizes that are.
    """
    for axis, size in zip(signature.axes, shape, strict=True):
        parts = 1
        for name in mesh_axes(axis):
            parts *= mesh.shape[name]
        if size % parts:
            below = size - size % parts
            fits = f"{below} and {below + parts}" if below else f"{parts}"
            raise ValueError(
                f"{path or 'A parameter'} ({signature}): axis {axis!r} of size {size} cannot be split over "
                f"{'x'.join(mesh_axes(axis))}={parts} devices; the nearest sizes that work are {fits}."
            )
    return NamedSharding(mesh, spec(signature.axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(signatures: Any, shapes: Any, mesh: Mesh) -> Any:
    """Tree of shardings for a tree of signatures and the matching tree of `jax.ShapeDtypeStruct`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, sig, like: sharding(sig, mesh, like.shape, jax.tree_util.keystr(path, simple=True, separator="/")),
        signatures,
        shapes,
    )


def abstract(shapes: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct`s that know where they will live."""
    return jax.tree.map(
        lambda like, where: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=where), shapes, shardings
    )


def fitting_axes(shape: Sequence[int], axes: Sequence[str], mesh: Any) -> list[tuple[str, ...]]:
    """The mesh axes that each dimension of an activation is split over, as far as it divides.

    A single position, when text is generated, is not split at all.
    """
    split = []
    for axis, size in zip(axes, shape, strict=True):
        names = mesh_axes(axis)
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        split.append(names)
    return split


def fitting_spec(shape: Sequence[int], axes: Sequence[str]) -> PartitionSpec:
    """How an activation is split on the mesh of `jax.set_mesh`."""
    split = fitting_axes(shape, axes, jax.sharding.get_abstract_mesh())
    return PartitionSpec(*(names or None for names in split))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Tells the compiler how an activation is split, under `jax.set_mesh`; nothing elsewhere."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(x.shape, axes))


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
