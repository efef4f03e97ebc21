"""What a checkpoint promises about its bytes: leaf paths, checksums and the manifest.

Orbax keeps no checksum over the values of an array, so a flipped bit restores silently wrong. Here every leaf
has one, computed where the leaf lives; every file has its size and every small file its sha256; and all of
this stands in one manifest a step, which carries the sha256 of itself.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any

FORMAT = 1
MANIFEST = "manifest.json"
# Larger files hold array data, which the leaf checksums cover; hashing them too would read everything twice.
HASHED_BYTES = 1 << 20
# The dtypes whose bits are whole bytes, so that what is read back can be compared with what was written.
_DTYPES = re.compile(r"bool|u?int(8|16|32|64)|bfloat16|float(16|32|64)|float8_\w+")
_SHOWN = 10


class CheckpointError(Exception):
    """A checkpoint cannot be saved or used as asked; the message names the file, leaf or directory."""


class DamagedError(CheckpointError):
    """The bytes on disk are not those that were saved, or not all of them are there."""


class NoCheckpointError(CheckpointError):
    """There is nothing to restore: no such step, or no step at all."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array as the manifest describes it.

    Attributes:
        shape: the global shape.
        dtype: the name of the dtype, such as 'bfloat16'.
        signature: the parameter's signature ('embed -> mlp'), or '' where it has none.
        checksum: 16 hexadecimal digits, see `checksum`.
    """

    shape: tuple[int, ...]
    dtype: str
    signature: str
    checksum: str

    def __str__(self) -> str:
        return describe(self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a step: its size in bytes, and its sha256 unless it is large array data."""

    size: int
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What one step holds: `leaves` by leaf path, `files` by path relative to the step's directory."""

    step: int
    leaves: Mapping[str, Leaf]
    files: Mapping[str, File]

    @property
    def state_digest(self) -> str:
        """A sha256 (hex) of the leaves: equal for equal states, however their files are laid out."""
        return hashlib.sha256(_canonical({p: dataclasses.asdict(leaf) for p, leaf in self.leaves.items()})).hexdigest()


def describe(shape: tuple[int, ...], dtype: Any) -> str:
    """Writes a shape and dtype as 'float32[8, 64]'."""
    return f"{jnp.dtype(dtype).name}[{', '.join(map(str, shape))}]"


def leaf_paths(tree: PyTree) -> dict[str, Any]:
    """Names every leaf of a tree by where it stands, such as 'params/blocks/attention/query'.

    Args:
        tree: any pytree: dictionaries, named tuples, dataclasses and sequences give keys, fields, attributes,
            indices.

    Returns:
        The leaves by path, in the order in which `jax.tree.leaves` gives them.

    Raises:
        CheckpointError: a key is empty or holds '/', or two leaves would have the same path.
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [_key_name(key) for key in keys]
        path = "/".join(parts)
        if not parts or any(not part or "/" in part for part in parts):
            raise CheckpointError(f"the leaf at {jax.tree_util.keystr(keys)!r} needs non-empty keys without '/'")
        if path in leaves:
            raise CheckpointError(f"two leaves have the path {path!r}")
        leaves[path] = leaf
    return leaves


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):  # dictionaries; named tuples and dataclasses; sequences
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise CheckpointError(f"cannot name the tree key {key!r}")


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of 32-bit words under which every output bit depends on every input bit.

    Source: the finalizer of MurmurHash3 (A. Appleby, public domain): xor with a right shift of itself and the
    product with an odd number are each invertible mod 2**32.
    """
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _words(x: jax.Array) -> jax.Array:
    """The bits of x as uint32 words of at least one dimension; 8-byte dtypes have a last dimension of 2."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    x = x.reshape((1,)) if x.ndim == 0 else x
    if x.dtype.itemsize >= 4:
        return lax.bitcast_convert_type(x, jnp.uint32)
    unsigned = jnp.uint8 if x.dtype.itemsize == 1 else jnp.uint16
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _position(
    shape: tuple[int, ...], places: tuple[jax.Array, ...] = (), whole: tuple[int, ...] | None = None
) -> jax.Array:
    """A uint32 for every position; no two of one leading index share theirs (below 2**32 of them).

    The leading index is mixed, not multiplied by its stride: strides of stacked layers are multiples of large
    powers of two, and a plain linear index mod 2**32 would give layer 0 and layer 32 the same numbers.
    """

    def index(axis: int) -> jax.Array:
        if axis < len(places):
            along = tuple(-1 if i == axis else 1 for i in range(len(shape)))
            return jnp.broadcast_to(places[axis].reshape(along), shape)
        return lax.broadcasted_iota(jnp.uint32, shape, axis)

    position = _mix(index(0))
    stride = 1
    for axis in range(len(shape) - 1, 0, -1):
        position = position + index(axis) * np.uint32(stride % 2**32)
        stride *= (whole or shape)[axis]
    return position


def _lanes(
    x: jax.Array,
    places: tuple[jax.Array, ...] = (),
    counts: jax.Array | None = None,
    whole: tuple[int, ...] | None = None,
) -> jax.Array:
    words = _words(x)
    # Eight-byte dtypes have an axis more as words.
    position = _position(words.shape, places, None if whole is None else (*whole, *words.shape[len(whole) :]))
    first = _mix(words ^ (position * np.uint32(0x9E3779B1)))
    second = _mix(first + position)
    if counts is not None:
        along = tuple(-1 if i == len(places) - 1 else 1 for i in range(words.ndim))
        first, second = (jnp.where(counts.reshape(along), lane, np.uint32(0)) for lane in (first, second))
    # Both in one pass: each sum by itself would compute the words anew, and slowly.
    zero, every = np.uint32(0), tuple(range(words.ndim))
    return jnp.stack(lax.reduce((first, second), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), every))


@functools.lru_cache(maxsize=64)
def _jitted(replicated: NamedSharding | None) -> Any:
    # Every process must be able to read the two words, so on a mesh they are asked for on every device.
    return jax.jit(_lanes) if replicated is None else jax.jit(_lanes, out_shardings=replicated)


def checksum(x: jax.Array) -> jax.Array:
    """Starts the checksum of one array, on its own devices, without gathering it.

    With m the bijection `_mix`, w_i the i-th word of the array's bits, p_i a number made from the position i,
    and c odd:

        a_i = m(w_i xor c p_i),  b_i = m(a_i + p_i),  checksum = (sum_i a_i, sum_i b_i) mod 2**32.

    A change inside one word, so a single flipped bit, is always seen, by both lanes: with the other words as
    they were, w -> w xor c p_i, m, and a -> a + p_i are bijections of the 32-bit words, so a_i and b_i each
    become another number below 2**32, and a sum changes by a difference of two such numbers, which is not 0
    mod 2**32. The widening of 8- and 16-bit dtypes is injective. Several changed words go unseen with
    probability of about 2**-64, as a_i and b_i are pseudorandom in w_i. (A weighted sum of the words
    themselves would be weaker: with odd weights the difference that two flipped sign bits make is 2**31 (u +
    v), u + v even, which is always 0.)

    The sums are of integers that wrap, so neither their order nor the sharding matters. The function is
    compiled once for each shape, dtype and sharding: a parameter and its moments share one program, and so do
    a save and a restore.

    Args:
        x: an array of any shape, of a dtype whose bits are whole bytes.

    Returns:
        uint32[2], not waited for; `digests` makes text of it.
    """
    sharding = x.sharding
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return _jitted(replicated)(x)


_jitted_part = jax.jit(_lanes, static_argnames="whole")


def partial_checksum(
    x: jax.Array, places: tuple[Any, ...], counts: Any = None, whole: tuple[int, ...] | None = None
) -> jax.Array:
    """Starts the checksum of a block of an array: those of blocks that make it up add up to that of the whole.

    Args:
        x: the block.
        places: for its first axes, uint32 vectors: the index in the whole array of every entry along the axis; it is
            whole along the others.
        counts: bool, along the last of these axes: entries that are left out, as another block has them; None: none.
        whole: shape of the whole array, where the block is not whole along an axis after its second.

    Returns:
        uint32[2], not waited for; see `add`.
    """
    return _jitted_part(x, places, counts, whole=whole)


def add(total: tuple[int, int], lanes: Any) -> tuple[int, int]:
    """A sum of checksums of blocks, and one more; `digest` makes text of it."""
    return (total[0] + int(lanes[0])) % 2**32, (total[1] + int(lanes[1])) % 2**32


def digest(total: Any) -> str:
    """Writes a checksum as 16 hexadecimal digits."""
    return f"{int(total[0]):08x}{int(total[1]):08x}"


def digests(lanes: Mapping[str, jax.Array]) -> dict[str, str]:
    """Waits for checksums, one transfer for all of them, and writes each as 16 hexadecimal digits."""
    values = jax.device_get(dict(lanes))
    return {path: digest(value) for path, value in values.items()}


def check_dtype(path: str, dtype: Any) -> None:
    """Refuses a dtype that cannot be saved.

    Raises:
        CheckpointError: the dtype is not a boolean, integer or real floating-point one of whole bytes.
    """
    if not _DTYPES.fullmatch(getattr(dtype, "name", str(dtype))):
        hint = "; save jax.random.key_data of it" if jnp.issubdtype(dtype, jax.dtypes.prng_key) else ""
        raise CheckpointError(f"{path}: the dtype {dtype} cannot be saved{hint}")


def compare(saved: Mapping[str, Leaf], wanted: Mapping[str, Any], *, where: str, partial: bool = False) -> None:
    """Compares what a checkpoint holds with what is asked of it, before anything is read.

    Args:
        saved: the manifest's leaves.
        wanted: by leaf path, anything with a shape and a dtype.
        where: names the checkpoint in the message.
        partial: leaves of the checkpoint that are not wanted are no fault.

    Raises:
        CheckpointError: a leaf is missing or extra, or has another shape or dtype; the message lists the
            leaves.
    """
    faults = []
    for path, leaf in wanted.items():
        asked = describe(tuple(leaf.shape), leaf.dtype)
        if path not in saved:
            faults.append(f"{path}: the checkpoint lacks it, the model has {asked}")
        elif str(saved[path]) != asked:
            faults.append(f"{path}: the checkpoint has {saved[path]}, the model has {asked}")
    if not partial:
        faults += [f"{path}: the checkpoint has {saved[path]}, the model lacks it" for path in saved.keys() - wanted]
    if faults:
        faults.sort()
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        lines = "\n  ".join(faults[:_SHOWN] + more)
        raise CheckpointError(f"{where} does not fit the model, {len(faults)} leaves differ:\n  {lines}")


def describe_file(path: Path) -> File:
    """Measures a file as the manifest records it."""
    size = path.stat().st_size
    return File(size, hashlib.sha256(path.read_bytes()).hexdigest() if size <= HASHED_BYTES else None)


def dump_manifest(manifest: Manifest) -> bytes:
    """Writes a manifest in its one canonical form, with the sha256 of its content."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    return _canonical({"content": content, "sha256": hashlib.sha256(_canonical(content)).hexdigest()})


def _canonical(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(step_dir: str | Path) -> Manifest:
    """Reads the manifest of a step and checks it against its own sha256.

    Raises:
        DamagedError: it is missing or cannot be read, a bit of it has changed, or it is that of another step.
        CheckpointError: a newer version of this program wrote it.
    """
    path = Path(step_dir) / MANIFEST
    try:
        raw = path.read_bytes()
        # A file that differs at all from the canonical form of what it says has been changed: there is no
        # slack in it.
        document = json.loads(raw)
        content = document["content"]
        whole = raw == _canonical(document) and document["sha256"] == hashlib.sha256(_canonical(content)).hexdigest()
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged: {error!r}") from error
    if not whole:
        raise DamagedError(f"{path} is damaged: it does not match its own sha256")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}, this program reads format {FORMAT}")
    if str(content["step"]) != path.parent.resolve().name:
        raise DamagedError(f"{path} is the manifest of step {content['step']}: the directory was renamed or copied")
    leaves = {
        name: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["signature"], leaf["checksum"])
        for name, leaf in content["leaves"].items()
    }
    return Manifest(content["step"], leaves, {name: File(**file) for name, file in content["files"].items()})


def file_faults(step_dir: Path, manifest: Manifest, *, contents: bool) -> list[str]:
    """Compares the files of a step with its manifest.

    Args:
        step_dir: the step's directory.
        manifest: its manifest.
        contents: compares sha256 too, where the manifest has one, and not only sizes.

    Returns:
        One sentence for each file that is missing or changed, naming it.
    """
    faults = []
    for name, file in manifest.files.items():
        path = step_dir / name
        try:
            size = path.stat().st_size
            if size != file.size:
                faults.append(f"{path} has {size} bytes, {file.size} were written")
            elif contents and file.sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != file.sha256:
                faults.append(f"{path} is damaged: it does not match its sha256")
        except OSError as error:
            faults.append(f"{path} cannot be read: {error.strerror}")
    return faults
