"""Block I/O on the leaves of a checkpoint: reads and writes a run of rows of one layer without the rest.

Checkpoints hold each leaf as an uncompressed zarr array: a grid of chunks, each row-major, so the rows that a block
needs from a chunk are one run of bytes. Orbax reads and writes whole chunks, and one chunk may hold all layers of a
leaf. This module asks tensorstore for the bytes that it needs and no others. It writes one file per chunk, beside
metadata that orbax wrote for the same tree, so that the result restores like any other checkpoint.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from flm_jax.checkpoint import direct_io
from flm_jax.checkpoint.manifest import DamagedError
from flm_jax.checkpoint.orbax_io import nest
from flm_jax.records.foreign_json import check, field, parse_json

# Read past the page cache, where the file system allows it. Small pieces, so that the allocator reuses their memory,
# and a few at the same time, so that the disk does not wait for the copy of the one before.
_READING = {
    "file_io_mode": {"mode": "direct"},
    "file_io_concurrency": {"limit": 4},
    "cache_pool": {"total_bytes_limit": 16 << 20},  # nodes of the database; values are not cached
}
_PIECE_BYTES, _AHEAD = 1 << 20, 4


@dataclass(frozen=True, eq=False)
class StoredLeaf:
    """A leaf of a checkpoint on disk, read by runs of rows.

    Attributes:
      path: its path in the state.
      shape: of the leaf.
      dtype: of the leaf.
      chunks: shape of a chunk.
      store: what holds the chunks, by leaf and place in the grid, such as 'params.blocks.mlp.up/0.3.0'.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]
    store: ts.KvStore

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

    def blocks(self, most: int = 16 << 20) -> Iterator[tuple[tuple[int, ...], int, np.ndarray]]:
        """Yields the whole leaf, block by block: the layer, the first row, and the rows, each an array of its own.

        The layer is () for a leaf of fewer than three dimensions, which is read as one layer. A leaf without dimensions
        is one row of shape (1,).

        Args:
          most: bytes of a block; a row that is larger is a block by itself.

        Raises:
          DamagedError: a row is not there in full; the message names the leaf and the chunk.
        """
        if not self.shape:
            yield (), 0, self.value().reshape(1)
            return
        dim = 1 if len(self.shape) > 2 else 0
        total, row = self.shape[dim], self.shape[dim + 1 :]
        rows = max(most // (math.prod(row) * self.dtype.itemsize), 1)
        for lead in itertools.product(*(range(size) for size in self.shape[:dim])):
            for start in range(0, total, rows):
                out = np.empty((min(rows, total - start), *row), self.dtype)
                self.read(lead, start, out)
                yield lead, start, out

    def value(self) -> np.ndarray:
        """The value of a leaf without dimensions."""
        out = np.empty((), self.dtype)
        self._fetch((0,), 0, out.reshape(1).view(np.uint8))
        return out

    def _fetch(self, index: tuple[int, ...], begin: int, out: np.ndarray) -> None:
        name = ".".join(map(str, index))
        key = f"{key_of(self.path)}/{name}"
        ends = [(at, min(at + _PIECE_BYTES, len(out))) for at in range(0, len(out), _PIECE_BYTES)]
        reads = (self.store.read(key, byte_range=slice(begin + a, begin + b)) for a, b in ends)
        ahead = collections.deque(itertools.islice(reads, _AHEAD))
        for a, b in ends:
            try:
                found = ahead.popleft().result()
            except (ValueError, OSError) as error:
                what = str(error).partition(" [")[0]
                raise DamagedError(f"{self.path}: its chunk {name} cannot be read: {what}") from error
            # If a data file is missing, tensorstore returns an empty value and no error.
            if found.state != "value" or len(found.value) != b - a:
                raise DamagedError(f"{self.path}: its chunk {name} is not there in full")
            out[a:b] = np.frombuffer(found.value, np.uint8)
            ahead.extend(itertools.islice(reads, 1))


def open_leaves(arrays: Path, wanted: Mapping[str, Any]) -> dict[str, StoredLeaf]:
    """Finds leaves of a checkpoint on disk.

    Args:
      arrays: the directory of a step's arrays.
      wanted: by leaf path, anything with a shape and a dtype.

    Raises:
      DamagedError: a leaf is missing, or not stored the way checkpoints store it.
    """
    files = {"driver": "file", "path": f"{arrays}/"}
    spec = {"driver": "ocdbt", "base": files} if (arrays / "manifest.ocdbt").exists() else files
    try:
        store = ts.KvStore.open(spec, context=ts.Context(_READING)).result()
    except (ValueError, OSError) as error:
        raise DamagedError(f"{arrays} cannot be read: {str(error).partition(chr(10))[0]}") from error
    return {path: _open(arrays, store, path, leaf) for path, leaf in wanted.items()}


def _open(arrays: Path, store: ts.KvStore, path: str, leaf: Any) -> StoredLeaf:
    try:
        zarr = parse_json(bytes(store[f"{key_of(path)}/.zarray"]), path)
        plain = zarr["compressor"] is None and zarr["filters"] is None and zarr["order"] == "C"
        shape, chunks = (tuple(field(zarr, name, list, path)) for name in ("shape", "chunks"))
        whole = len(chunks) == len(shape) and all(check(size, int, path) > 0 for size in chunks)
    except (OSError, ValueError, KeyError) as error:
        raise DamagedError(f"{arrays}: {path} cannot be read: its description is missing or damaged") from error
    if shape != tuple(leaf.shape) or not plain or not whole or zarr["dtype"] != zarr_dtype(leaf.dtype):
        raise DamagedError(f"{arrays}: {path} is not stored as an uncompressed array of the shape and dtype it has")
    return StoredLeaf(path, shape, np.dtype(leaf.dtype), chunks, store)


def zarr_dtype(dtype: Any) -> str:
    """The name of a dtype in zarr's metadata."""
    found = jnp.dtype(dtype)
    return found.name if found.kind == "V" else found.newbyteorder("<").str


def key_of(path: str) -> str:
    """The name of a leaf on disk."""
    return ".".join(part.replace("%", "%25").replace(".", "%2E") for part in path.split("/"))


def write_skeleton(arrays: Path, leaves: Mapping[str, Any], chunks: Mapping[str, tuple[int, ...]]) -> None:
    """Writes the arrays of a checkpoint without their content, which `write_block` and `write_chunk` fill in.

    Orbax writes the tree with an array of one element for each leaf that has chunks here; then tensorstore puts an
    empty array of the real shape in its place.

    Args:
      arrays: a directory that does not exist yet.
      leaves: by path: an array, which is written, or the shape and dtype of a leaf that is written in chunks later.
      chunks: shape of a chunk, by the paths of the latter.
    """
    tree = {
        path: jnp.zeros((1,) * len(leaf.shape), leaf.dtype) if path in chunks else leaf for path, leaf in leaves.items()
    }
    # Without a store of array metadata, orbax records no shapes, which would be those of the single elements.
    handlers = ocp.type_handlers.create_type_handler_registry((jax.Array, ocp.type_handlers.ArrayHandler()))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=handlers)
    with _quietly(), contextlib.closing(ocp.Checkpointer(handler)) as orbax:
        orbax.save(arrays, args=ocp.args.PyTreeSave(nest(tree)))
    for path, shape in chunks.items():
        leaf = leaves[path]
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{arrays / key_of(path)}/"},
            "metadata": {"shape": leaf.shape, "chunks": shape, "dtype": zarr_dtype(leaf.dtype), "compressor": None},
        }
        ts.open(spec, create=True, delete_existing=True).result()


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
