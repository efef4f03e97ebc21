"""Safetensors files, written a run of rows at a time, in any order, and renamed once everything is on the disk."""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from flm_jax.convert.safetensors import DTYPES, INDEX, SINGLE, FormatError, Stored

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 1 << 26  # bytes written at a time
_UNSYNCED = 1 << 28  # bytes of a file that may wait in memory for the disk


class Writer:
    """Writes a model as `model.safetensors`, or as several files and an index, the way transformers does.

    Tensors go to files whole, in the order given; within a file those of wider dtypes come first, so that each begins
    at a multiple of its own width. Until `close` has seen every row, files are called `NAME.partial`; the index gets
    its name last. A `with` block closes at its end, or, where it ends in an exception, removes what was written.

    Threads may write at the same time.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, jax.ShapeDtypeStruct | Stored | tuple[tuple[int, ...], Any]],
        shard_bytes: int = 5 * 10**9,
        metadata: Mapping[str, str] = {"format": "pt"},
    ) -> None:
        """Plans the files and writes their headers.

        Args:
          directory: made where it is missing; holds no model yet. What a killed writer left in it is removed.
          tensors: by name: anything with a shape and a dtype, or the two as a tuple.
          shard_bytes: the most bytes of tensors that a file holds, unless one tensor alone has more.
          metadata: goes into the header of every file; transformers wants the format.

        Raises:
          FormatError: there is a model in the directory, or safetensors has no such dtype.
          OSError: the files cannot be written.
        """
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be 1 or more, not {shard_bytes}")
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        if there := sorted(self._directory.glob("model*.safetensors")) + sorted(self._directory.glob(INDEX)):
            raise FormatError(f"{there[0]} exists already: remove it, or write to another directory")
        for left in self._directory.glob("model*.safetensors*.partial"):
            left.unlink()
        shards = _shards([_planned(name, tensor) for name, tensor in tensors.items()], shard_bytes)
        total = len(shards)
        names = [SINGLE] if total == 1 else [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
        self._tensors: dict[str, Stored] = {}
        self._written: dict[str, list[tuple[int, int]]] = {
            name: [] for name in tensors
        }  # sorted, apart from each other
        self._unsynced = {self._directory / name: 0 for name in names}
        self._final = list(self._unsynced)  # in the order in which they get their names
        self._named: list[Path] = []
        self._lock = threading.Lock()
        self._busy = 0
        self._failed: BaseException | None = None
        self._closed = False
        try:
            for file, shard in zip(self._unsynced, shards, strict=True):
                self._begin(file, shard, metadata)
            if total > 1:
                index = {
                    "metadata": {"total_size": sum(tensor.nbytes for tensor in self._tensors.values())},
                    "weight_map": {name: tensor.file.name for name, tensor in self._tensors.items()},
                }
                self._final.append(self._directory / INDEX)
                _partial(self._final[-1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        except BaseException:
            self._discard()
            raise

    def _begin(self, file: Path, shard: list[Stored], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        shard = sorted(shard, key=lambda tensor: -tensor.dtype.itemsize)
        end = 0
        for t in shard:
            offsets = [end, end + t.nbytes]
            header[t.name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
            end = offsets[1]
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        for t in shard:
            offset = 8 + len(raw) + header[t.name]["data_offsets"][0]
            self._tensors[t.name] = Stored(t.name, t.dtype, t.shape, file, offset)
        with _partial(file).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Writes a run of rows to its place.

        Args:
          name: of the tensor.
          start: the first row, an index of the leading dimension.
          rows: (rows, *shape[1:]) of the tensor's dtype, of any strides; a scalar as () or (1,).

        Raises:
          ValueError: there is no such tensor, these are no rows of it, one of them was written before, or the writer is
            closed.
          OSError: they cannot be written; the writer cannot be closed then.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ValueError(f"{name!r} is none of the tensors that this writer was made for")
        rows = np.asarray(rows)
        rows = rows.reshape(1) if rows.ndim == 0 else rows
        stop = start + len(rows)
        if rows.dtype != tensor.dtype or rows.shape[1:] != tensor.shape[1:] or not 0 <= start <= stop <= tensor.count:
            raise ValueError(
                f"{name!r} is {tensor.dtype}{list(tensor.shape)}: {rows.dtype}{list(rows.shape)} at row {start} is no "
                "run of rows of it"
            )
        with self._claimed(tensor, start, stop):
            step = max(1, _PIECE // max(1, tensor.row_bytes))
            for at in range(0, len(rows) if tensor.row_bytes else 0, step):
                piece = np.ascontiguousarray(rows[at : at + step])
                self._put(tensor.file, tensor.offset + (start + at) * tensor.row_bytes, piece)

    @contextlib.contextmanager
    def _claimed(self, tensor: Stored, start: int, stop: int) -> Iterator[None]:
        """Takes note of rows before they are written, so that two threads cannot both write one."""
        with self._lock:
            if self._closed:
                raise ValueError(f"{tensor.name!r} is written after the writer was closed")
            spans = self._written[tensor.name]
            at = bisect.bisect_left(spans, (start, stop))
            for a, b in spans[max(0, at - 1) : at + 1]:
                if max(a, start) < min(b, stop):
                    raise ValueError(f"{tensor.name!r} has rows {max(a, start)}:{min(b, stop)} already")
            low = at - 1 if at and spans[at - 1][1] == start else at
            high = at + 1 if at < len(spans) and spans[at][0] == stop else at
            if start < stop:
                joined = [*spans[low:at], (start, stop), *spans[at:high]]
                spans[low:high] = [(joined[0][0], joined[-1][1])]
            self._busy += 1
        try:
            yield
        except BaseException as error:
            self._failed = error
            raise
        finally:
            with self._lock:
                self._busy -= 1

    def _put(self, file: Path, offset: int, piece: np.ndarray) -> None:
        data = piece.reshape(-1).view(np.uint8).data
        descriptor = os.open(_partial(file), os.O_WRONLY)  # each time: there may be more files than a process may open
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
            with self._lock:
                self._unsynced[file] += done
                if due := self._unsynced[file] >= _UNSYNCED:
                    self._unsynced[file] = 0
            if due:
                _sync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Waits for the disk and gives the files their names.

        Raises:
          RuntimeError: rows are missing, or a write failed or has not ended; nothing is kept then.
          OSError: the disk refused; nothing is kept then.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            if self._failed or self._busy:
                why = "a write failed" if self._failed else "a thread is still writing"
                raise RuntimeError(f"{self._directory}: {why}, so nothing is kept") from self._failed
            if missing := [gap for tensor in self._tensors.values() if (gap := self._gap(tensor))]:
                more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
                raise RuntimeError(f"{self._directory}: never written: {', '.join(missing[:4])}{more}; nothing is kept")
            for file in self._final:
                _sync_path(_partial(file))
            for file in self._final:
                _partial(file).rename(file)
                self._named.append(file)
            _sync_path(self._directory)
        except BaseException:
            self._discard()
            raise

    def _gap(self, tensor: Stored) -> str:
        """The first rows that are missing, in words; empty where none is."""
        spans = self._written[tensor.name]
        if tensor.nbytes == 0 or spans == [(0, tensor.count)]:
            return ""
        start = spans[0][1] if spans and spans[0][0] == 0 else 0
        stop = next((a for a, _ in spans if a > start), tensor.count)
        return f"{tensor.name!r} rows {start}:{stop} of {tensor.count}"

    def _discard(self) -> None:
        self._closed = True
        for file in [*map(_partial, self._final), *self._named]:
            file.unlink(missing_ok=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif not self._closed:
            self._discard()


def _planned(name: str, tensor: Any) -> Stored:
    shape, dtype = tensor if isinstance(tensor, tuple) else (tensor.shape, tensor.dtype)
    dtype = np.dtype(dtype)
    if dtype not in _NAMES:
        raise FormatError(
            f"{name!r} has dtype {dtype}; safetensors files are written with {', '.join(map(str, _NAMES))}"
        )
    if name == "__metadata__":
        raise FormatError("no tensor can be called '__metadata__': the format has another use for it")
    return Stored(name, dtype, tuple(map(int, shape)), Path(), 0)


def _shards(tensors: list[Stored], most: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return shards


def _partial(file: Path) -> Path:
    return file.with_name(f"{file.name}.partial")


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):  # what is on the disk need not stay in the cache
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
