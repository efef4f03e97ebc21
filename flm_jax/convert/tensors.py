"""The safetensors files of a model: opened with their tensors listed, read by runs of rows, written in shards.

A model is `model.safetensors`, or several such files and an index that says which tensor is in which. The safetensors
library checks every header, of files that are read and of files that were written. Rows are read here, at the offsets
of a header that it has accepted, for three reasons (safetensors 0.8.0): a slice of its mapped file counts as memory of
the process until the file is closed, its other backend reads the whole tensor for every slice, and neither has the
8-bit floats in NumPy. Files are written here tensor by tensor (see `_Writer`).
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from flm_jax.convert import companions
from flm_jax.convert.companions import FormatError, check_place
from flm_jax.files import naming, sync_write
from flm_jax.records import counted
from flm_jax.records.foreign_json import JsonError, parse_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 10**9

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_SHOWN = 4
# Bytes written between two requests to the disk.
_PIECE = 64 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, read by runs of rows.

    Attributes:
      name: its name in the file.
      dtype: of its values.
      shape: its shape; empty for a scalar.
      file: the file that holds it.
      offset: where its values begin in the file, in bytes.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.count * self.row_bytes

    @property
    def count(self) -> int:
        """Number of rows; a scalar is one."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads a run of rows.

        Args:
          start: the first row, an index of the leading dimension. A scalar is one row.
          stop: the row after the last.

        Returns:
          (stop - start, *shape[1:]).

        Raises:
          FormatError: the file became shorter after it was opened.
          IndexError: there are no such rows.
          OSError: the file cannot be read.
        """
        if not 0 <= start <= stop <= self.count:
            raise IndexError(f"{self.name} has rows 0:{self.count}, not {start}:{stop}")
        shape = (stop - start, *self.shape[1:])
        values = np.fromfile(self.file, self.dtype, math.prod(shape), offset=self.offset + start * self.row_bytes)
        if len(values) < math.prod(shape):
            raise FormatError(f"{self.file} became shorter while {self.name!r} was read")
        return values.reshape(shape)

    def read(self) -> np.ndarray:
        """Reads the whole tensor; raises what `rows` does."""
        return self.rows(0, self.count).reshape(self.shape)


def open_shards(directory: Path) -> dict[str, Stored]:
    """Finds every tensor of a model, reading headers only.

    Args:
      directory: holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names.

    Returns:
      The tensors by name, in the order of the index, or in that of the bytes of a single file.

    Raises:
      FormatError: the files are missing or damaged; names the file, and what was found in it.
      OSError: a file cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "is a file; name the directory that it is in" if directory.exists() else "does not exist"
        raise FormatError(f"{directory} {what}")
    index, single = directory / INDEX, directory / SINGLE
    if not index.is_file():
        return _open(single) if single.is_file() else _nothing(directory)
    weight_map = read_index(index)
    files = sorted(set(weight_map.values()))
    if single.is_file() and SINGLE not in files:
        raise FormatError(f"{directory} holds {SINGLE}, and {INDEX} that names other files: remove one of the two")
    if missing := [name for name in files if not (directory / name).is_file()]:
        raise FormatError(
            f"{index} names {counted(len(files), 'file')}, {len(missing)} of them missing: {few(missing)}; "
            "download them again"
        )
    held = {name: _open(directory / name) for name in files}
    said, found = set(weight_map.items()), {(name, file) for file, tensors in held.items() for name in tensors}
    for name, file in sorted(said ^ found):
        what, how = ("lacks", "places") if (name, file) in said else ("has", "does not place")
        raise FormatError(f"{directory / file} {what} {name!r}, which {INDEX} {how} there: they do not belong together")
    return {name: held[file][name] for name, file in weight_map.items()}


def _nothing(directory: Path) -> NoReturn:
    found = sorted(file.name for file in directory.glob("*.safetensors"))
    pickles = sorted({file.name for pattern in _PICKLES for file in directory.glob(pattern)})
    if pickles and not found:
        raise FormatError(
            f"{directory} holds only pickles, {few(pickles)}; a pickle can run code when it is loaded, so none is. "
            "Where you trust it, convert it with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained(OUT, safe_serialization=True)"
        )
    but = f"; it has {few(found)}, which no index names" if found else ""
    raise FormatError(f"{directory} holds no model: neither {SINGLE} nor {INDEX}{but}")


def read_index(index: Path) -> dict[str, str]:
    """The file that each tensor is in, by the tensor's name, as an index says.

    Raises:
      FormatError: it is damaged, or names a file that does not lie beside it.
    """
    weight_map = _json(index, "it", companions.read(index)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(f"{index} has no 'weight_map', an object of file names by tensor name")
    for tensor, name in weight_map.items():
        # The index must not lead out of its directory.
        plain = isinstance(name, str) and name.endswith(".safetensors") and not any(c in name for c in "/\\\0")
        # File systems allow 255 bytes, and half of a surrogate pair is not printable, nor a name.
        if not plain or ".." in name or not name.isprintable() or len(name.encode()) > 255:
            raise FormatError(
                f"{index} says that {tensor!r} is in {name!r}: that must be a .safetensors file beside it, named "
                "without a directory or '..', such as 'model-00001-of-00002.safetensors'"
            )
    return weight_map


def _open(file: Path) -> dict[str, Stored]:
    """The tensors of one file, in the order of their bytes."""
    check_place(file)
    with file.open("rb") as stream:
        length = stream.read(8)
        if length == b"version ":
            raise FormatError(f"{file} is a Git LFS pointer to the file, not the file; get it with 'git lfs pull'")
        try:
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as error:
            found = " ".join(f"{error!s:.300}".split())
            raise FormatError(
                f"{file} ({counted(file.stat().st_size, 'byte')}) is damaged, cut short or no safetensors "
                "file; download or copy "
                f"it again: {found}"
            ) from error
        # The library lets a name stand twice and takes the last; this parser does not.
        header = _json(file, "its header", stream.read(int.from_bytes(length, "little")))
        begin = stream.tell()
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise FormatError(
                f"{file}: {name!r} has dtype {entry['dtype']}, which is not supported; it must be one of "
                f"{', '.join(DTYPES)}"
            )
        first, _ = entry["data_offsets"]
        tensors.append(Stored(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), file, begin + first))
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))}


def _json(file: Path, what: str, raw: bytes) -> dict[str, Any]:
    try:
        value = parse_json(raw, "it", None)
    except JsonError as error:
        raise FormatError(f"{file} is damaged: {what} must be one JSON object, and cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file} is damaged: {what} must be one JSON object, and is a {type(value).__name__}")
    return value


def save(
    directory: Path, likes: Mapping[str, Any], fill: Callable[[str, np.ndarray], None], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a model as `model.safetensors`, or as several files and an index, the way transformers does.

    Memory holds two tensors: one is filled while the disk takes the other. Files lie in `model.partial` until all of
    them are on the disk; the index is moved last. Where anything fails, nothing is left.

    Args:
      directory: made where it is missing; holds no model yet. What a killed process left in it is removed.
      likes: anything with a shape and a dtype, by tensor name, in the order in which the tensors go to files.
      fill: writes the tensor of a name into an array; called once per name, in that order.
      shard_bytes: the most bytes of tensors in a file, unless one tensor alone has more.

    Raises:
      FormatError: there is a model in the directory.
      OSError: the files cannot be written.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be 1 or more, not {shard_bytes}")
    directory.mkdir(parents=True, exist_ok=True)
    if there := sorted(directory.glob("model*.safetensors")) + sorted(directory.glob(INDEX)):
        raise FormatError(f"{there[0]} exists already: remove it, or write to another directory")
    shards = _shards(likes, shard_bytes)
    total = len(shards)
    names = [SINGLE] if total == 1 else [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    index = {
        "metadata": {"total_size": sum(map(_nbytes, likes.values()))},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    drafts = directory / "model.partial"
    shutil.rmtree(drafts, ignore_errors=True)
    drafts.mkdir()
    try:
        with _Writer(fill, max(map(_nbytes, likes.values()), default=0)) as writer:
            for name, shard in zip(names, shards, strict=True):
                writer.write(drafts / name, shard)
        if total > 1:
            names.append(INDEX)
            sync_write(drafts / INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        for name in names:
            (drafts / name).rename(directory / name)
        drafts.rmdir()
        _sync(directory)
    except BaseException:
        for name in names:
            (directory / name).unlink(missing_ok=True)
        shutil.rmtree(drafts, ignore_errors=True)
        raise


class _Writer:
    """Writes files tensor by tensor: a thread writes and syncs one while the next is filled.

    The library (0.8.0) writes a file from arrays that are all in memory. Written with it, a model of 1.25 GB took 6.3 s
    and 1.8 GB of memory, and one of 4.08 GB took 14.7 s of processor time; in docs/convert_benchmark.md are the figures
    of this writer. The library then checks what was written, and the tests compare the files with its own.
    """

    def __init__(self, fill: Callable[[str, np.ndarray], None], largest: int) -> None:
        """Takes memory for two tensors of `largest` bytes: finding and clearing it takes as long as filling it."""
        self._fill = fill
        self._buffers = [np.empty(largest, np.uint8) for _ in range(2)]
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def write(self, file: Path, shard: Mapping[str, Any]) -> None:
        """Fills and writes the tensors of one file."""
        header, offsets = _header(shard)
        with file.open("wb", buffering=0) as stream:
            _put(stream, np.frombuffer(header, np.uint8), 0)
            pending: concurrent.futures.Future[None] | None = None
            try:
                for name, like in shard.items():
                    values = self._buffers[0][: _nbytes(like)]
                    self._fill(name, values.view(like.dtype).reshape(like.shape))
                    if pending is not None:  # the other buffer is still being written
                        pending.result()
                    pending = self._thread.submit(_put, stream, values, len(header) + offsets[name])
                    self._buffers.reverse()
            finally:  # nothing writes to a file that is closed
                if pending is not None:
                    pending.result()
        _sync(file)
        try:
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as error:
            raise OSError(f"{file} was not written as it should be: {error}") from error

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()


def _header(shard: Mapping[str, Any]) -> tuple[bytes, dict[str, int]]:
    """The header of a file, and where the values of each tensor begin after it.

    Wider dtypes come first, so that all values are aligned.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants to know the format
    offsets, at = {}, 0
    for name, like in sorted(shard.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize):
        offsets[name], at = at, at + _nbytes(like)
        place = [offsets[name], at]
        entries[name] = {"dtype": kinds[np.dtype(like.dtype)], "shape": list(like.shape), "data_offsets": place}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _put(stream: FileIO, values: np.ndarray, offset: int) -> None:
    """Writes bytes to a place of a file, piece by piece; large ones are sent to the disk at once."""
    with naming(Path(str(stream.name))):
        for start in range(0, len(values), _PIECE):
            left = values[start : start + _PIECE].data
            while left:
                written = os.pwrite(stream.fileno(), left, offset)
                left, offset = left[written:], offset + written
            if len(values) >= _PIECE:
                os.fdatasync(stream.fileno())


def _shards(likes: Mapping[str, Any], most: int) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = [{}]
    held = 0
    for name, like in likes.items():
        if shards[-1] and held + _nbytes(like) > most:
            shards.append({})
            held = 0
        shards[-1][name] = like
        held += _nbytes(like)
    return shards


def _nbytes(like: Any) -> int:
    return math.prod(like.shape) * np.dtype(like.dtype).itemsize


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):  # what is on the disk need not stay in the page cache
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def few(names: list[str]) -> str:
    """The first few of some names, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
