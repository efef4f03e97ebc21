"""The manifest of a checkpoint step: its leaves with their checksums, its files, and the checks against them.

Orbax stores no checksum of an array's values, so a flipped bit would be restored without notice. Here every leaf has
one (see `checksum`); every file has its size and every small file its sha256. All of this is recorded in one manifest
per step, which also holds the sha256 of its own content.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax.files import read_bounded, sha256_file
from flm_jax.records import counted
from flm_jax.records.foreign_json import JsonError, check, field, parse_json

PyTree = Any

FORMAT = 1
MANIFEST, META, ARRAYS, BLOBS = "manifest.json", "meta.json", "arrays", "blobs"
# Larger files of arrays have no sha256: the leaf checksums cover them, and hashing them too would read them twice.
HASHED_BYTES = 1 << 20
# A step of a streamed growth has a file per block: a million of them need this much.
MOST_BYTES = 1 << 30
BLOB = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# The dtypes whose elements are whole bytes, so that the bits read can be compared with the bits written.
_DTYPES = re.compile(r"bool|u?int(8|16|32|64)|bfloat16|float(16|32|64)|float8_\w+")
_SHOWN = 10
# No array has as many entries; NumPy and JAX count them in 64 bits.
_MOST_ENTRIES = 1 << 56


class CheckpointError(Exception):
    """A checkpoint cannot be saved or used as asked; the message names the file, leaf or directory."""


class DamagedError(CheckpointError):
    """The bytes on disk are not those that were saved, or not all of them are there."""


class NoCheckpointError(CheckpointError):
    """There is nothing to restore: no such step, or no step at all."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array, as the manifest describes it.

    Attributes:
      shape: the global shape.
      dtype: the name of the dtype, such as 'bfloat16'.
      signature: the parameter's signature ('embed -> mlp'), or '' if it has none.
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
    """One file of a step: its size in bytes, and its sha256 unless it is large array data.

    Checkpoints of version 0.1.0 have no sha256 of other large files either, such as a tokenizer.json above 1 MiB.
    """

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
        """A sha256 (hex) of the leaves: equal for equal states, whatever the layout of their files."""
        return hashlib.sha256(_canonical({p: dataclasses.asdict(leaf) for p, leaf in self.leaves.items()})).hexdigest()


def describe(shape: tuple[int, ...], dtype: Any) -> str:
    """Writes a shape and dtype as 'float32[8, 64]'."""
    return f"{jnp.dtype(dtype).name}[{', '.join(map(str, shape))}]"


def leaf_paths(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, such as 'params/blocks/attention/query'.

    Args:
      tree: any pytree: dictionaries, named tuples, dataclasses and sequences give keys, fields, attributes, indices.

    Returns:
      The leaves by path, in the order of `jax.tree.leaves`.

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
    """Compares the leaves of a checkpoint with the requested ones, before anything is read.

    Args:
      saved: the manifest's leaves.
      wanted: by leaf path, anything with a shape and a dtype.
      where: names the checkpoint in the message.
      partial: whether the checkpoint may hold leaves that are not requested.

    Raises:
      CheckpointError: a leaf is missing or extra, or has another shape or dtype; the message lists the leaves.
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
        raise CheckpointError(
            f"{where} does not fit the model, {counted(len(faults), 'leaf differs', 'leaves differ')}:\n  {lines}"
        )


def describe_file(path: Path, *, hashed: bool = True) -> File:
    """The size and sha256 of a file, as the manifest records them; `hashed=False` leaves a large one's sha256 out."""
    size = path.stat().st_size
    return File(size, sha256_file(path) if hashed or size <= HASHED_BYTES else None)


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of a manifest in its one canonical form, with the sha256 of its content."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    return _canonical({"content": content, "sha256": hashlib.sha256(_canonical(content)).hexdigest()})


def _canonical(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(step_dir: str | Path) -> Manifest:
    """Reads the manifest of a step and checks it against its own sha256.

    Raises:
      DamagedError: it is missing or cannot be read, a bit of it has changed, it does not say what a manifest says, or
        it belongs to another step.
      CheckpointError: a newer version of this program wrote it.
    """
    path = Path(step_dir) / MANIFEST
    try:
        raw = read_bounded(path, MOST_BYTES, links=False)
        # There is only one canonical form: a file that differs from the canonical form of its own content was changed.
        document = parse_json(raw, str(path))
        content = field(document, "content", dict, str(path))
        whole = raw == _canonical(document) and document.get("sha256") == _sha256(_canonical(content))
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from error
    except JsonError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if not whole:
        raise DamagedError(f"{path} is damaged: it does not match its own sha256")
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {content.get('format')!r}, this program reads format {FORMAT}")
    try:
        found = _manifest(content)
    except JsonError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    name = path.parent.resolve().name
    if name.isdigit() and name != str(found.step):  # a copy may have any name, but not that of another step
        raise DamagedError(f"{path} is the manifest of step {found.step}: the directory was renamed or copied")
    return found


def _manifest(content: dict[str, Any]) -> Manifest:
    """The manifest that a JSON object describes.

    Raises:
      JsonError: a field is missing or of the wrong type, or a name leads out of the step's directory.
    """
    leaves, files = {}, {}
    for name, leaf in field(content, "leaves", dict, "it").items():
        where = f"leaf {name!r}"
        shape = field(check(leaf, dict, where), "shape", list, where)
        fits = all(0 <= check(size, int, where) < _MOST_ENTRIES for size in shape)
        if not fits or math.prod(shape) >= _MOST_ENTRIES or not all(name.split("/")):
            raise JsonError(f"{where} has the shape {shape!s:.80}, or an empty part of its name")
        texts = [field(leaf, key, str, where) for key in ("dtype", "signature", "checksum")]
        if not _DTYPES.fullmatch(texts[0]):
            raise JsonError(f"{where} has the dtype {texts[0]!r}, which no checkpoint has")
        try:
            jnp.dtype(texts[0])  # float8 has several forms, and not every name that looks like one is one
        except TypeError as error:
            raise JsonError(f"{where}: {error}") from error
        leaves[name] = Leaf(tuple(shape), *texts)
    for name, file in field(content, "files", dict, "it").items():
        where = f"file {name!r}"
        size = field(check(file, dict, where), "size", int, where)
        sha256 = field(file, "sha256", (str, type(None)), where)
        parts = name.split("/")
        # Half of a surrogate pair and 0 are in no name; neither is printable.
        plain = all(part not in ("", ".", "..") for part in parts) and "\\" not in name and name.isprintable()
        if not plain or size < 0 or (parts[0] == BLOBS and (len(parts) != 2 or not BLOB.fullmatch(parts[1]))):
            raise JsonError(f"{where} of {size} bytes: names must be those of files inside the step's directory")
        files[name] = File(size, sha256)
    return Manifest(field(content, "step", int, "it"), leaves, files)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_file(step_dir: Path, manifest: Manifest, name: str) -> bytes:
    """The content of a small file of a step, once it has been found to be what was saved.

    Raises:
      DamagedError: it is not, or the manifest does not know the file.
    """
    path, file = step_dir / name, manifest.files.get(name)
    if file is None:
        raise DamagedError(f"{step_dir / MANIFEST} knows no file {name!r}")
    try:
        _check_folders(step_dir, name)
        content = read_bounded(path, file.size, links=False)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) != file.size:
        raise DamagedError(f"{path} has {counted(len(content), 'byte')}, {file.size:,} were written")
    if file.sha256 is not None and _sha256(content) != file.sha256:
        raise DamagedError(f"{path} is damaged: it does not match its sha256")
    return content


def read_meta(step_dir: Path, manifest: Manifest) -> dict[str, Any]:
    """The object in meta.json, which is parsed only if it is what was saved; empty if the step has none.

    Raises:
      DamagedError: it is not what was saved, or no JSON object.
    """
    if META not in manifest.files:
        return {}
    try:
        # A run's measurements may hold NaN, for example the loss of a model that has diverged.
        found: dict[str, Any] = parse_json(read_file(step_dir, manifest, META), str(step_dir / META), finite=False)
    except JsonError as error:
        raise DamagedError(str(error)) from error
    return found


def read_blobs(step_dir: Path, manifest: Manifest) -> dict[str, bytes]:
    """The contents of a step's blobs, by name, each found to be what was saved.

    Raises:
      DamagedError: one is not.
    """
    names = [name for name in manifest.files if name.startswith(f"{BLOBS}/")]
    return {name.removeprefix(f"{BLOBS}/"): read_file(step_dir, manifest, name) for name in names}


def _check_folders(step_dir: Path, name: str) -> None:
    """Checks that the folders of a file are real ones, since a link would lead out of the step's directory.

    Raises:
      OSError: one is not.
    """
    for folder in list(Path(name).parents)[:-1]:
        if not stat.S_ISDIR((step_dir / folder).lstat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a link, or no folder", str(step_dir / folder))


def file_faults(step_dir: Path, manifest: Manifest, *, contents: bool) -> list[str]:
    """Compares the files of a step with its manifest.

    Args:
      step_dir: the step's directory.
      manifest: its manifest.
      contents: also compares sha256 where the manifest has one, not only sizes.

    Returns:
      One sentence per file that is missing or changed, is no regular file, or lies among the arrays or blobs and is
      not in the manifest.
    """
    faults = []
    folders: set[Path] = set()
    for name, file in manifest.files.items():
        path = step_dir / name
        try:
            if path.parent not in folders:
                _check_folders(step_dir, name)
                folders.add(path.parent)
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode):
                what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a regular file"
                faults.append(f"{path} is {what}: a file of {file.size} bytes was written")
            elif found.st_size != file.size:
                faults.append(f"{path} has {counted(found.st_size, 'byte')}, {file.size:,} were written")
            elif contents and file.sha256 and sha256_file(path) != file.sha256:
                faults.append(f"{path} is damaged: it does not match its sha256")
        except OSError as error:
            faults.append(f"{path} cannot be read: {error.strerror}")
    return faults + [f"{step_dir / name} was not saved with the step" for name in _unknown(step_dir, manifest)]


def _unknown(step_dir: Path, manifest: Manifest) -> list[str]:
    """Entries of the folders of arrays and blobs that the manifest lacks; their readers would take them for ours."""
    found, folders = [], [ARRAYS, BLOBS]
    while folders:
        folder = folders.pop()
        # A missing folder is no fault by itself; and of one that is a link, its files have been named already.
        inside = os.scandir(step_dir / folder) if stat.S_ISDIR(_mode(step_dir / folder)) else ()
        for entry in inside:
            name = f"{folder}/{entry.name}"
            if entry.is_dir(follow_symlinks=False) and folder != BLOBS:
                folders.append(name)
            elif name not in manifest.files:
                found.append(name)
    return sorted(found)


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return 0
