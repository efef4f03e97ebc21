"""Checksums of the blocks of a token store's files: a store opens at once, and what is read of it is compared then.

    blocks.json    block size, the seal of the store's record, the crc32 of every piece of blocks.crc32, and a seal
    blocks.crc32   little-endian uint32: the crc32 of each block, file after file, in the order of `files_of`

A block is BLOCK_BYTES of a file, or what is left at its end; a piece is the same of blocks.crc32. crc32 always finds
one or two flipped bits in a block and damage within 32 neighbouring bits; other damage with a probability of 1 - 2^-32.
It is that of zlib, on the host: `checkpoint.checksum` is computed by JAX, on the devices, which train meanwhile.

These two files are beside the record, not in it: a store that was written before they existed gets them when it is
first opened, its digest stays what runs have recorded, and earlier versions read a store that has them.
"""

from __future__ import annotations

import array
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flm_jax.data.store_record import StoreFile, read_sealed, render
from flm_jax.files import atomic_write, sha256_json
from flm_jax.records import counted
from flm_jax.records.foreign_json import field

FORMAT = 1
# A window of 4,096 tokens of 2 bytes touches 1.5 blocks: larger blocks cost more the first time that a window is read,
# smaller ones more memory and disk. At 16 KiB the checksums take 0.02 % of the store.
BLOCK_BYTES = 1 << 14
LEAST_BLOCK, MOST_BLOCK = 1 << 6, 1 << 30
RECORD_FILE, SUMS_FILE = "blocks.json", "blocks.crc32"
_ADVICE = f"delete {RECORD_FILE}, and the next start compares the whole store with its sha256 sums and writes it again"


class Summing:
    """The crc32 of each block of a stream of bytes."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block, self._sums = block_bytes, array.array("I")
        self._crc = self._within = 0  # of the block that is not full yet

    def add(self, content: bytes | memoryview) -> None:
        """Takes the next bytes."""
        view, at = memoryview(content), 0
        while at < len(view):
            part = view[at : at + self._block - self._within]
            self._crc, at = zlib.crc32(part, self._crc), at + len(part)
            self._within += len(part)
            if self._within == self._block:
                self._end()

    def _end(self) -> None:
        self._sums.append(self._crc)
        self._crc = self._within = 0

    def sums(self) -> np.ndarray:
        """The checksums, uint32 (blocks,), the last of a block that may not be full; nothing can be added after."""
        if self._within:
            self._end()
        return np.array(self._sums, "<u4")


def blocks_of(size: int, block_bytes: int) -> int:
    """The number of blocks of a file of so many bytes."""
    return -(-size // block_bytes)


def write_sums(
    folder: Path, seal: str, files: Sequence[StoreFile], sums: Mapping[str, np.ndarray], block: int = BLOCK_BYTES
) -> None:
    """Writes the checksums of a store's blocks; the record last, so that no killed process leaves one without them.

    Args:
      folder: the store's.
      seal: of the store's record.
      files: of `files_of`.
      sums: by the name of a file, uint32 (blocks,).
      block: their size in bytes.
    """
    content = b"".join(sums[file.name].astype("<u4").tobytes() for file in files)
    pieces = Summing(block)
    pieces.add(content)
    record: dict[str, Any] = {
        "format": FORMAT,
        "store": seal,
        "block_bytes": block,
        "blocks": len(content) // 4,
        "pieces": pieces.sums().tobytes().hex(),
    }
    record["seal"] = sha256_json(record)
    atomic_write(folder / SUMS_FILE, content)
    atomic_write(folder / RECORD_FILE, render(record))


class BlockSums:
    """The recorded checksums of a store's blocks; what is read of them is compared with the record first."""

    def __init__(self, folder: Path, files: Sequence[StoreFile], record: dict[str, Any]) -> None:
        """Takes a record that `read_sums` has checked."""
        self.block_bytes: int = record["block_bytes"]
        self._pieces = np.frombuffer(bytes.fromhex(record["pieces"]), "<u4")
        self._seen = bytearray(len(self._pieces))
        self._path = f"{folder}/{SUMS_FILE}"
        self._sums: np.ndarray | None = None
        self._first: dict[str, int] = {}
        number = 0
        for file in files:
            self._first[file.name] = number
            number += blocks_of(file.size, self.block_bytes)

    def of(self, name: str, first: int, end: int) -> np.ndarray:
        """The checksums of the blocks first..end of a file, uint32.

        Raises:
          ValueError: blocks.crc32 is damaged there.
        """
        if self._sums is None:
            self._sums = np.memmap(self._path, "<u4", mode="r").view(np.ndarray)
        if os.stat(self._path).st_size < self._sums.nbytes:  # noqa: PTH116 (reading beyond the end ends the program)
            raise ValueError(f"{self._path} was truncated: {_ADVICE}")
        first, end = self._first[name] + first, self._first[name] + end
        per_piece = self.block_bytes // 4
        for piece in range(first // per_piece, blocks_of(end, per_piece)):
            if not self._seen[piece]:
                content = self._sums[piece * per_piece : (piece + 1) * per_piece]
                if zlib.crc32(content.data) != self._pieces[piece]:
                    start = piece * self.block_bytes
                    raise ValueError(f"{self._path} is damaged in {_span(start, start + content.nbytes)}: {_ADVICE}")
                self._seen[piece] = 1
        return self._sums[first:end]


def read_sums(folder: Path, seal: str, files: Sequence[StoreFile]) -> BlockSums | None:
    """The checksums of a store's blocks; None if it has none.

    Args:
      folder: the store's.
      seal: of the store's record.
      files: of `files_of`.

    Raises:
      ValueError, FileNotFoundError: they are damaged, or belong to another store.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    record, _ = read_sealed(path, _ADVICE)
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} has format {record.get('format')!r}; this version reads format {FORMAT}: {_ADVICE}")
    try:
        other = field(record, "store", str, "it") != seal
        block, blocks = (field(record, name, int, "it") for name in ("block_bytes", "blocks"))
        if not LEAST_BLOCK <= block <= MOST_BLOCK or block & (block - 1):
            raise ValueError(f"its blocks are of {counted(block, 'byte')}")
        pieces = len(bytes.fromhex(field(record, "pieces", str, "it")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {_ADVICE}") from None
    expected = sum(blocks_of(file.size, block) for file in files)
    if other or blocks != expected or pieces != 4 * blocks_of(4 * blocks, block):
        raise ValueError(f"{path} belongs to another store than {folder}: {_ADVICE}")
    sums = folder / SUMS_FILE
    if not sums.is_file():
        raise ValueError(f"{sums} is missing: {_ADVICE}")
    if (found := sums.stat().st_size) != 4 * blocks:
        raise ValueError(f"{sums} is {counted(found, 'byte')} long and should be {4 * blocks:,}: {_ADVICE}")
    return BlockSums(folder, files, record)


def _span(start: int, end: int) -> str:
    return f"bytes {start:,} to {end - 1:,}"


def damage(folder: Path, file: StoreFile, wrong: np.ndarray, block_bytes: int) -> list[str]:
    """Sentences about damaged blocks, one per run of neighbours, which name file, content and bytes.

    Args:
      folder: the store's.
      file: the damaged file.
      wrong: ascending numbers of its damaged blocks, int (n,).
      block_bytes: the size of a block.
    """
    runs = np.split(wrong, np.flatnonzero(np.diff(wrong) != 1) + 1) if len(wrong) else []
    return [
        f"{folder / file.name}, {file.what}, is damaged in "
        f"{_span(int(run[0]) * block_bytes, min((int(run[-1]) + 1) * block_bytes, file.size))} "
        "(not the recorded crc32): restore the file from a copy, or delete the store and prepare it again"
        for run in runs
    ]
