"""Files of a token store, memory-mapped: each block is compared with its checksum before it is first read."""

from __future__ import annotations

import bisect
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flm_jax.data.store_record import StoreFile
from flm_jax.data.store_sums import BlockSums, blocks_of, damage


class CheckedFile:
    """A file of a store; several threads may use it."""

    def __init__(self, folder: Path, file: StoreFile, sums: BlockSums | None) -> None:
        """Opens nothing yet: a store has up to many thousands of files.

        Args:
          folder: the store's.
          file: one of its files, of the recorded size.
          sums: the checksums of the store's blocks; None: nothing is compared.
        """
        self._folder, self._file, self._sums = folder, file, sums
        self._path = f"{folder}/{file.name}"
        self._mapped: np.ndarray | None = None
        self._block = sums.block_bytes if sums is not None else max(file.size, 1)
        self.blocks = blocks_of(file.size, self._block)
        self._seen = bytearray()  # from the first reading on, a byte per block: 1 if it was compared

    def bytes(self, start: int, end: int) -> np.ndarray:
        """The bytes start..end, uint8, as the file has them: compared, and not copied.

        Raises:
          ValueError: the file has become shorter, or a block that holds some of these bytes is damaged.
        """
        content = self._content()
        if self._sums is not None and end > start:
            first, last = start // self._block, blocks_of(end, self._block)
            if 0 in self._seen[first:last]:
                self._compare(content, range(first, last))
        return content[start:end]

    def entries(self, dtype: np.dtype, places: np.ndarray) -> np.ndarray:
        """The entries of a dtype at some places, in their shape and any order; a copy.

        Raises:
          ValueError: as `bytes`.
        """
        content = self._content()
        if self._sums is not None:
            touched = np.zeros(self.blocks, bool)
            touched[places // (self._block // dtype.itemsize)] = True
            self._compare(content, np.flatnonzero(touched).tolist())
        return content.view(dtype)[places]

    def compare(self, first: int, last: int) -> int:
        """Compares the blocks first..last with their checksums unless that was done; returns the bytes compared.

        Raises:
          ValueError: as `bytes`.
        """
        return self._compare(self._content(), range(first, min(last, self.blocks)))

    def _compare(self, content: np.ndarray, blocks: Sequence[int]) -> int:
        assert self._sums is not None
        compared = 0
        for block in blocks:
            if not self._seen[block]:
                part = content[block * self._block : (block + 1) * self._block]
                if zlib.crc32(part.data) != self._sums.of(self._file.name, block, block + 1)[0]:
                    raise ValueError(damage(self._folder, self._file, np.array([block]), self._block)[0])
                self._seen[block] = 1
                compared += part.nbytes
        return compared

    def _content(self) -> np.ndarray:
        """The file as uint8, which still has its length: beyond the end of a shorter one, reading ends the program."""
        if not self._file.size:
            return np.zeros(0, np.uint8)  # an empty file cannot be mapped
        if (size := os.stat(self._path).st_size) < self._file.size:  # noqa: PTH116
            raise ValueError(
                f"{self._path} had {self._file.size} bytes when it was opened and has {size} now: something has "
                "truncated it. Delete the store; the next start prepares it again."
            )
        if self._mapped is None:
            self._seen = bytearray(self.blocks)
            # Without the class np.memmap, slicing is several times faster.
            self._mapped = np.memmap(self._path, np.uint8, mode="r", shape=(self._file.size,)).view(np.ndarray)
        return self._mapped


class Column:
    """The entries of a split, its tokens or their weights, as one array over the files of its shards."""

    def __init__(self, files: Sequence[CheckedFile], counts: Sequence[int], dtype: np.dtype) -> None:
        """Takes the files of the shards, the number of entries of each, and their dtype."""
        self._files, self._dtype = files, dtype
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)
        self._ends: list[int] = self._starts[1:].tolist()

    def run(self, start: int, end: int) -> np.ndarray:
        """The entries start..end, which exist; a copy.

        Raises:
          ValueError: as `CheckedFile.bytes`.
        """
        found, width = np.empty(end - start, self._dtype), self._dtype.itemsize
        number, at = bisect.bisect_right(self._ends, start), start
        while at < end:
            here, last = self._ends[number - 1] if number else 0, min(end, self._ends[number])
            content = self._files[number].bytes((at - here) * width, (last - here) * width)
            found[at - start : last - start] = content.view(self._dtype)
            number, at = number + 1, last
        return found

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The entries at the given positions, which exist, in their shape.

        Raises:
          ValueError: as `CheckedFile.bytes`.
        """
        flat = positions.ravel()
        shard_of = np.searchsorted(self._starts, flat, side="right") - 1
        found = np.empty(flat.shape, self._dtype)
        for number in np.unique(shard_of):
            chosen = shard_of == number
            found[chosen] = self._files[number].entries(self._dtype, flat[chosen] - self._starts[number])
        return found.reshape(positions.shape)
