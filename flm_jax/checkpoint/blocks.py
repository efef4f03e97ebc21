"""Block I/O on the leaves of a checkpoint: reads and writes a run of rows of one layer without the rest.

Checkpoints hold each leaf as an uncompressed zarr array: a grid of chunks, each row-major, so the rows that a block
needs from a chunk are one run of bytes. Orbax reads and writes whole chunks, and one chunk may hold all layers of a
leaf. This module asks tensorstore where each value is stored and reads only the bytes it needs. It writes one file per
chunk, beside metadata that orbax wrote for the same tree, so that the result restores like any other checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from flm_jax.checkpoint import direct_io
from flm_jax.checkpoint.manifest import DamagedError
from flm_jax.checkpoint.orbax_io import nest

_ZARR = ".zarray"


@dataclass(frozen=True)
class Run:
    """Where a value is stored: a range of bytes of a file, or the bytes themselves."""

    file: Path
    offset: int
    length: int
    inline: bytes | None = None


@dataclass(frozen=True, eq=False)
class StoredLeaf:
    """A leaf of a checkpoint on disk, read by runs of rows.

    Attributes:
      path: its path in the state.
      shape: of the leaf.
      dtype: of the leaf.
      chunks: shape of a chunk.
      runs: where each chunk is stored, by its name, such as '0.3.0'.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]
    runs: Mapping[str, Run]

    def read(self, lead: tuple[int, ...], start: int, out: np.ndarray) -> None:
        """Reads rows into an array; each of their bytes is read once, and no others.

        Args:
          lead: the layer, if the leaf is stacked; empty otherwise.
          start: the first row.
          out: (rows, ...), contiguous.

        Raises:
          DamagedError: the rows are not there in full.
        """
        dim, trailing = len(lead), self.chunks[len(lead) + 1 :]
        rows, stop = self.chunks[dim], start + len(out)
        row_bytes = math.prod(trailing) * self.dtype.itemsize
        grid = [range(-(-size // c)) for size, c in zip(self.shape[dim + 1 :], trailing, strict=True)]
        for chunk in range(start // rows, -(-stop // rows)):
            a, b = max(start, chunk * rows), min(stop, (chunk + 1) * rows)
            below = (lead[0] % self.chunks[0]) * rows if lead else 0  # a chunk may hold several layers
            begin = (below + a - chunk * rows) * row_bytes
            for at in itertools.product(*grid):
                index = (*(i // c for i, c in zip(lead, self.chunks[:dim], strict=True)), chunk, *at)
                wanted = out[a - start : b - start]
                if all(len(g) == 1 for g in grid) and trailing == self.shape[dim + 1 :]:
                    self._fetch(index, begin, wanted.reshape(-1).view(np.uint8))
                    continue
                piece = np.empty((b - a, *trailing), self.dtype)
                self._fetch(index, begin, piece.reshape(-1).view(np.uint8))
                box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, trailing, strict=True))
                held = wanted[(slice(None), *box)]
                held[...] = piece[tuple(slice(0, n) for n in held.shape)]

    def value(self) -> np.ndarray:
        """The value of a leaf without dimensions."""
        out = np.empty((), self.dtype)
        self._fetch((0,), 0, out.reshape(1).view(np.uint8))
        return out

    def _fetch(self, index: tuple[int, ...], begin: int, out: np.ndarray) -> None:
        name = ".".join(map(str, index))
        run = self.runs.get(name)
        if run is None or begin + len(out) > run.length:
            raise DamagedError(f"{self.path}: its chunk {name} is not there in full")
        if run.inline is not None:
            out[:] = np.frombuffer(run.inline, np.uint8)[begin : begin + len(out)]
            return
        try:
            direct_io.read(run.file, run.offset + begin, out)
        except (OSError, EOFError) as error:
            raise DamagedError(f"{self.path}: {run.file} cannot be read: {error}") from error


def open_leaves(arrays: Path, wanted: Mapping[str, Any]) -> dict[str, StoredLeaf]:
    """Finds leaves of a checkpoint on disk.

    Args:
      arrays: the directory of a step's arrays.
      wanted: by leaf path, anything with a shape and a dtype.

    Raises:
      DamagedError: a leaf is missing, or not stored the way checkpoints store it.
    """
    try:
        values = dict(_ocdbt_values(arrays)) if (arrays / "manifest.ocdbt").exists() else dict(_files(arrays))
    except (ValueError, KeyError, OSError) as error:
        raise DamagedError(f"{arrays} cannot be read: {str(error).partition(chr(10))[0]}") from error
    chunks: dict[str, dict[str, Run]] = {}
    for key, run in values.items():
        name, _, last = key.rpartition("/")
        chunks.setdefault(name, {})[last] = run
    return {path: _open(arrays, path, leaf, chunks.get(key_of(path), {})) for path, leaf in wanted.items()}


def _open(arrays: Path, path: str, leaf: Any, runs: dict[str, Run]) -> StoredLeaf:
    try:
        described = runs.pop(_ZARR)
        text = described.file.read_bytes() if described.inline is None else described.inline
        if described.inline is None:
            text = text[described.offset : described.offset + described.length]
        zarr = json.loads(text)
        plain = zarr["compressor"] is None and zarr["filters"] is None and zarr["order"] == "C"
        shape, chunks = tuple(zarr["shape"]), tuple(zarr["chunks"])
    except (OSError, ValueError, KeyError) as error:
        raise DamagedError(f"{arrays}: {path} cannot be read: its description is missing or damaged") from error
    if shape != tuple(leaf.shape) or not plain or zarr["dtype"] != zarr_dtype(leaf.dtype):
        raise DamagedError(f"{arrays}: {path} is not stored as an uncompressed array of the shape and dtype it has")
    return StoredLeaf(path, shape, np.dtype(leaf.dtype), chunks, runs)


def zarr_dtype(dtype: Any) -> str:
    """The name of a dtype in zarr's metadata."""
    found = jnp.dtype(dtype)
    return found.name if found.kind == "V" else found.newbyteorder("<").str


def key_of(path: str) -> str:
    """The name of a leaf on disk."""
    return ".".join(part.replace("%", "%25").replace(".", "%2E") for part in path.split("/"))


def _files(arrays: Path) -> Iterator[tuple[str, Run]]:
    for folder in arrays.iterdir():
        if (folder / _ZARR).is_file():
            for file in folder.iterdir():
                yield f"{folder.name}/{file.name}", Run(file, 0, file.stat().st_size)


def _ocdbt_values(arrays: Path) -> Iterator[tuple[str, Run]]:
    """Yields every key of an OCDBT database with the place where its value is stored."""
    base = ts.KvStore.open(f"file://{arrays}/").result()

    def walk(node: str, prefix: bytes) -> Iterator[tuple[str, Run]]:
        for entry in ts.ocdbt.dump(base, node).result()["entries"]:
            key = prefix + bytes(entry["key"])
            if "location" in entry:
                yield from walk(entry["location"], prefix + bytes(entry["subtree_common_prefix"]))
            elif "inline_value" in entry:
                value = bytes(entry["inline_value"])
                yield key.decode(), Run(arrays, 0, len(value), value)
            else:
                # "value:" and, each escaped: the base path, the path relative to it, the offset, the length.
                _, folder, file, offset, length = entry["indirect_value"].split(":")
                yield key.decode(), Run(arrays / (unquote(folder) + unquote(file)), int(offset), int(length))

    root = ts.ocdbt.dump(base).result()["versions"][-1]["root"]
    if "location" in root:
        yield from walk(root["location"], b"")


def write_skeleton(arrays: Path, leaves: Mapping[str, Any], chunks: Mapping[str, tuple[int, ...]]) -> None:
    """Writes the arrays of a checkpoint without their content, which `write_block` and `write_chunk` fill in.

    Orbax writes the tree with an array of one element for each leaf that has chunks here; then the metadata of that
    array are given the real shape.

    Args:
      arrays: a directory that does not exist yet.
      leaves: by path: an array, which is written, or the shape and dtype of a leaf that is written in chunks later.
      chunks: shape of a chunk, by the paths of the latter.
    """
    tree = {
        path: jnp.zeros((1,) * len(leaf.shape), leaf.dtype) if path in chunks else leaf for path, leaf in leaves.items()
    }
    with (
        _quietly(),
        contextlib.closing(
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False))
        ) as orbax,
    ):
        orbax.save(arrays, args=ocp.args.PyTreeSave(nest(tree)))
    # Redundant: the arrays' own metadata say the same, and reading does not need it.
    shutil.rmtree(arrays / "array_metadatas", ignore_errors=True)
    whole = json.loads((arrays / "_METADATA").read_text())
    shapes = {tuple(key_of(path).split(".")): shape for path, shape in chunks.items()}
    for entry in whole["tree_metadata"].values():
        key = tuple(part["key"] for part in entry["key_metadata"])
        if key in shapes:
            entry["value_metadata"]["write_shape"] = list(shapes[key])
    (arrays / "_METADATA").write_text(json.dumps(whole))
    for path, shape in chunks.items():
        folder = arrays / key_of(path)
        zarr = json.loads((folder / _ZARR).read_text())
        for file in folder.iterdir():
            file.unlink()
        described = {**zarr, "shape": list(leaves[path].shape), "chunks": list(shape)}
        (folder / _ZARR).write_text(json.dumps(described, sort_keys=True, separators=(",", ":")))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """A context in which orbax does not warn that there is nothing to merge: plain files are intended here."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def block_files(
    arrays: Path, path: str, shape: tuple[int, ...], chunks: tuple[int, ...], lead: tuple[int, ...], row: int
) -> Iterator[tuple[Path, tuple[slice, ...]]]:
    """Yields the files of a block that begins at `row`, each with the part of the trailing dimensions that it holds."""
    dim = len(lead)
    grid = [range(-(-size // c)) for size, c in zip(shape[dim + 1 :], chunks[dim + 1 :], strict=True)]
    for at in itertools.product(*grid):
        box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, chunks[dim + 1 :], strict=True))
        yield arrays / key_of(path) / ".".join(map(str, (*lead, row // chunks[dim], *at))), box


def write_block(
    arrays: Path,
    path: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    lead: tuple[int, ...],
    row: int,
    rows: np.ndarray,
) -> None:
    """Writes a block of a leaf, one file per chunk, and returns once it is on disk.

    Args:
      arrays: the directory that `write_skeleton` wrote.
      path: of the leaf.
      shape: of the leaf.
      chunks: shape of a chunk, which divides the trailing dimensions of the leaf.
      lead: the layer, if the leaf is stacked; empty otherwise.
      row: the first row of the block, a multiple of a chunk's rows.
      rows: (rows, ...); as many as a chunk has, or fewer at the end of the leaf.
    """
    size = math.prod(chunks) * rows.dtype.itemsize  # chunks at the edge are stored at full size
    for file, box in block_files(arrays, path, shape, chunks, lead, row):
        direct_io.write(file, rows[(slice(None), *box)], size)


def write_chunk(arrays: Path, path: str, chunks: tuple[int, ...], index: tuple[int, ...], values: np.ndarray) -> None:
    """Writes one chunk of a leaf, and returns once it is on disk.

    Args:
      arrays: the directory that `write_skeleton` wrote.
      path: of the leaf.
      chunks: shape of a chunk.
      index: of the chunk in the grid of chunks.
      values: its content, without leading dimensions of size 1; smaller than a chunk at the end of the leaf.
    """
    shape = chunks[len(chunks) - values.ndim :]
    if values.shape != shape:  # chunks at the edge are stored at full size
        whole = np.zeros(shape, values.dtype)
        whole[tuple(slice(0, size) for size in values.shape)] = values
        values = whole
    direct_io.write(arrays / key_of(path) / ".".join(map(str, index)), values, values.nbytes)
