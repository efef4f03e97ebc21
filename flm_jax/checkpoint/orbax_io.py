"""Saves and restores the leaves of a state through orbax, and checks them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from flm_jax.checkpoint import checksum, orbax_leaks
from flm_jax.checkpoint.manifest import (
    ARRAYS,
    CheckpointError,
    DamagedError,
    Manifest,
    check_dtype,
    describe,
)

orbax_leaks.avoid()

# Of a replicated array, orbax lets each device write a part. It compiles a program that cuts the part out, for every
# shape, device and part: for arrays whose parts are smaller than this, that takes longer than writing them.
SHARED_FROM_BYTES = 2**19


def handlers() -> ocp.type_handlers.TypeHandlerRegistry:
    """Orbax's handlers of what a checkpoint may hold, where small arrays are written by one of their devices."""
    known = ocp.type_handlers.get_type_handler(jax.Array)
    arrays = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=SHARED_FROM_BYTES,
        array_metadata_store=getattr(known, "_array_metadata_store", None),
    )
    return ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))


def as_array(path: str, leaf: Any) -> jax.Array:
    """A leaf as a JAX array that can be saved; NumPy arrays are copied, as their owner may change them meanwhile."""
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise CheckpointError(f"{path}: only arrays can be saved, not {type(leaf).__name__}; jnp.asarray makes one")
    check_dtype(path, leaf.dtype)
    if isinstance(leaf, jax.Array):
        return leaf
    array = jax.device_put(leaf.copy())
    if array.dtype != leaf.dtype:
        raise CheckpointError(f"{path}: {leaf.dtype} would be saved as {array.dtype}, as jax_enable_x64 is off")
    return array


def target(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding that a leaf is restored into; without a sharding, that of the default device."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise CheckpointError(f"{path}: a jax.ShapeDtypeStruct is needed to restore into, not {type(leaf).__name__}")
    sharding = getattr(leaf, "sharding", None) or jax.device_put(np.zeros((), np.int32)).sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries made from leaf paths; orbax stores them unchanged, unlike named tuples."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = (part.replace("%", "%25").replace(".", "%2E") for part in path.split("/"))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf  # orbax joins names with dots, so one within a name would be ambiguous
    return tree


def read(
    orbax: ocp.AsyncCheckpointer,
    step_dir: Path,
    manifest: Manifest,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Reads the wanted leaves; shapes, dtypes and shardings are always told to orbax, and checked afterwards."""
    stored = {path: leaf for path, leaf in wanted.items() if leaf.size}
    arrays = {
        path: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        for path, leaf in wanted.items()
        if not leaf.size
    }
    if stored:
        arguments = {
            path: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True)
            for path, leaf in stored.items()
        }
        try:
            restored = orbax.restore(
                step_dir / ARRAYS,
                args=ocp.args.PyTreeRestore(
                    item=nest(stored),
                    restore_args=nest(arguments),
                    partial_restore=len(stored) < sum(0 not in leaf.shape for leaf in manifest.leaves.values()),
                ),
            )
        except (MemoryError, jax.errors.JaxRuntimeError):  # not a fault of the checkpoint
            raise
        except Exception as error:
            what = str(error).partition("\n")[0] or repr(error)
            raise DamagedError(f"{step_dir / ARRAYS} cannot be read: {what}") from error
        # `stored` and the nested dictionaries have the same leaves, but not always in the same order.
        for path in stored:
            node = restored
            for part in path.split("/"):
                node = node[part.replace("%", "%25").replace(".", "%2E")]
            arrays[path] = node
    for path, leaf in wanted.items():
        found = arrays[path]
        # If orbax's own metadata are damaged, it may return the description that it was given in place of an array.
        if not isinstance(found, jax.Array) or (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            what = type(found).__name__
            if hasattr(found, "shape") and hasattr(found, "dtype"):
                what += " " + describe(found.shape, found.dtype)
            raise DamagedError(f"{step_dir / ARRAYS}: {path} was read as {what}")
    return arrays


def wrong_leaves(manifest: Manifest, arrays: Mapping[str, jax.Array]) -> list[str]:
    """The paths of leaves whose values are not those that were saved."""
    known = {path: array for path, array in arrays.items() if manifest.leaves[path].checksum}
    with jax.transfer_guard("allow"):
        found = checksum.digests({path: checksum.of(array) for path, array in known.items()})
    return [path for path in known if found[path] != manifest.leaves[path].checksum]
