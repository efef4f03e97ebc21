"""The device mesh, the rules from axis names to mesh axes, and the placing of parameters, activations and batches.

Shapes are computed first, then shardings, then values: no array is ever made on one device and then moved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flm_jax.records import counted, recorded
from flm_jax.records.fields import Limit
from flm_jax.signature import Signature

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
Devices = Annotated[int, Limit("positive, or -1 for all the devices that are left", lambda n: n >= 1 or n == -1)]

# Every axis name of a parameter or an activation, with the mesh axes that it is split over. The width of the residual
# stream has two names. `embed` is that of parameters, split over `fsdp`. `residual` is that of activations: their batch
# is already split over `fsdp`, and one array cannot be split over a mesh axis twice, so it stays whole. The axes inside
# a block (heads, MLP) and the vocabulary are split over `tensor`, in parameters and activations alike.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp")),
    ("time", ("sequence",)),
    # Positions of the residual stream between the products of a block, where no operation mixes positions: they are
    # split over `tensor` too, so the partial sums of the devices are reduce-scattered instead of all-reduced (sequence
    # parallelism, 2205.05198).
    ("stream", ("sequence", "tensor")),
    ("history", ()),
    ("layers", ()),
    # Layers while they are orthogonalised: a device needs whole rows or whole columns of a layer then.
    ("matrices", ("data", "fsdp", "sequence")),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("head_dim", ()),
    ("mlp", ("tensor",)),
    ("embed", ("fsdp",)),
    ("residual", ()),
)


@dataclass(frozen=True)
@recorded
class MeshConfig:
    """Number of devices along each mesh axis; one of them may be -1, for all the devices that are left.

    Attributes:
      data: copies of the parameters, each with its own part of the batch.
      fsdp: parts of parameters, gradients and moments; the batch is split over these too.
      sequence: parts of each window's positions; keys and values are exchanged, parameters are replicated.
      tensor: parts of heads, MLP and vocabulary.
    """

    data: Devices = -1
    fsdp: Devices = 1
    sequence: Devices = 1
    tensor: Devices = 1

    def shape(self, devices: int) -> tuple[int, ...]:
        """Number of devices along each of `MESH_AXES`.

        Raises:
          ValueError: the sizes do not multiply to `devices`.
        """
        given = [getattr(self, axis) for axis in MESH_AXES]
        rest = math.prod(size for size in given if size != -1)
        if given.count(-1) > 1:
            raise ValueError(f"{self}: at most one is -1 (all the devices that are left).")
        if -1 in given and devices % rest == 0:
            given[given.index(-1)] = devices // rest
        if math.prod(given) != devices:
            raise ValueError(
                f"{self} does not fit {counted(devices, 'device')}: {' x '.join(MESH_AXES)} must be {devices}, "
                f"where -1 means all the devices that are left. {self._advice(devices)}"
            )
        return tuple(given)

    def _advice(self, devices: int) -> str:
        """A sentence that says which axis to change, and to what size."""
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        largest = max(sizes, key=lambda axis: sizes[axis])
        rest = math.prod(size for axis, size in sizes.items() if axis != largest and size != -1)
        if rest > devices or devices % rest:
            return f"The axes other than {largest} need {counted(rest, 'device')}, which does not divide {devices}."
        fitting = [n for n in range(1, devices // rest + 1) if (devices // rest) % n == 0]
        if -1 not in sizes.values():
            fitting = fitting[-1:]
        below = [n for n in fitting if n <= sizes[largest]][-1:]
        above = [n for n in fitting if n > sizes[largest]][:1]
        near = " and ".join(str(n) for n in below + above)
        return f"The nearest that works for {largest}, now {sizes[largest]}, is {near}."


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with axes `MESH_AXES` over `devices` (default: all).

    With several TPU slices, `data` is the axis that crosses slices, since the links between slices are slow.

    Raises:
      ValueError: the sizes do not fit the devices, or `data` does not fit the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (config or MeshConfig()).shape(len(devices))
    # GPUs have a `slice_index` too, with another meaning (devices joined by NVLink); there any axis may cross slices.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    # allow_split_physical_axes: a mesh axis may take a part of a physical axis, for example 4 of 16 chips of a torus.
    if slices > 1:
        check_slices(shape[0], slices)
        inside, outside = (shape[0] // slices, *shape[1:]), (slices, *[1] * len(shape[1:]))
        placed = mesh_utils.create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Flax Linen's transforms do not support explicitly sharded types.
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_slices(data: int, slices: int) -> None:
    """Checks that the mesh axis `data` is a multiple of the number of slices.

    Raises:
      ValueError: it is not.
    """
    if data % slices:
        raise ValueError(
            f"MeshConfig.data={data} must be a multiple of the {slices} slices that it is split over: take "
            f"{slices}, and make another axis smaller."
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
    """The sharding on `mesh` of a parameter with this signature and shape.

    Raises:
      ValueError: the size of an axis is not divisible by the number of devices it is split over; the message names
        sizes that are.
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
    """The sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(signatures: Any, shapes: Any, mesh: Mesh) -> Any:
    """The tree of shardings for a tree of signatures and the matching tree of `jax.ShapeDtypeStruct`s."""
    return jax.tree_util.tree_map_with_path(
        lambda path, sig, like: sharding(sig, mesh, like.shape, jax.tree_util.keystr(path, simple=True, separator="/")),
        signatures,
        shapes,
    )


def abstract(shapes: Any, shardings: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct`s with their shardings."""
    return jax.tree.map(
        lambda like, where: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=where), shapes, shardings
    )


def fitting_axes(shape: Sequence[int], axes: Sequence[str], mesh: Any) -> list[tuple[str, ...]]:
    """The mesh axes that each dimension of an activation is split over.

    Mesh axes that do not divide the dimension are dropped, from the last: the single position of a generation step is
    not split at all.
    """
    split = []
    for axis, size in zip(axes, shape, strict=True):
        names = mesh_axes(axis)
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        split.append(names)
    return split


def fitting_spec(shape: Sequence[int], axes: Sequence[str]) -> PartitionSpec:
    """The partition spec of an activation on the mesh of `jax.set_mesh`."""
    split = fitting_axes(shape, axes, jax.sharding.get_abstract_mesh())
    return PartitionSpec(*(names or None for names in split))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """`x` with a sharding constraint under `jax.set_mesh`; `x` itself where no mesh is set, and inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(x.shape, axes))


@functools.lru_cache(maxsize=64)
def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The indices of the batch rows that this process's devices hold, ascending, int64.

    Processes that differ only along `tensor` or `sequence` hold the same rows.
    """
    where = NamedSharding(mesh, spec(("batch",))).addressable_devices_indices_map((batch_size,))
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in where.values() if index is not None]))


def put_batch(batch: Any, mesh: Mesh, batch_size: int | None = None) -> Any:
    """A batch of (B, T) or (B,) host arrays as global arrays, split over the mesh.

    Args:
      batch: the whole batch, the same in every process; or, with `batch_size`, only the rows `own_rows`.
      mesh: the mesh of the result.
      batch_size: B, if the arrays hold only this process's rows; None: they hold all rows.
    """

    def put(x: np.ndarray) -> jax.Array:
        where = NamedSharding(mesh, spec(("batch", "time")[: x.ndim]))
        whole = len(x) if batch_size is None else batch_size
        own = np.arange(whole) if batch_size is None else own_rows(mesh, batch_size)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(whole)
            first = int(np.searchsorted(own, start))
            return x[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((whole, *x.shape[1:]), where, part)

    return jax.tree.map(put, batch)


def few_rows(mesh: Mesh) -> int:
    """A number of windows near eight that the mesh splits evenly; comparisons of whole logits use so few."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return int(shards * max(1, 8 // shards))


def platform() -> str:
    """The platform that is being traced for: that of the mesh, of the default device, or of the default backend."""
    config: Any = jax.config
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or config.jax_default_device
    found = device if isinstance(device, str) else getattr(device, "platform", jax.default_backend())
    return "gpu" if found == "cuda" else str(found)
