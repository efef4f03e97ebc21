"""The manifest of a checkpoint step: its leaves with their checksums, its files, and the checks against them.

Orbax keeps no checksum over the values of an array, so a flipped bit restores silently wrong. Here every leaf has one
(see `checksum`); every file has its size and every small file its sha256; and all of this stands in one manifest per
step, which carries the sha256 of itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

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
