"""Safetensors files, read a run of rows at a time, so that no tensor has to fit in memory.

A file is the length of its header (8 bytes, little-endian), the header, and the tensors' bytes, row-major, one tensor
right after the other. The header is JSON: name -> dtype, shape and data_offsets, and `__metadata__`, texts by name. A
model is `model.safetensors`, or several such files and an index that says which tensor is in which. Headers and indices
come from elsewhere: everything that they say is checked before it is used.
"""

from __future__ import annotations

import collections
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from flm_jax.checkpoint import direct_io

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_SUB_BYTE = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I4": 4, "U4": 4}
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_HEADER = 100_000_000  # bytes; the format's own limit
_SHOWN = 4
_PIECE = 1 << 26  # bytes read at a time


class FormatError(ValueError):
    """Files that do not hold what the format says they must, or that cannot be read as safetensors."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, read by runs of rows.

    Attributes:
      name: the tensor's.
      dtype: its values'.
      shape: its own; empty for a scalar.
      file: the file that it is in.
      offset: where it begins in the file, in bytes.
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
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads a run of rows, and no other byte than theirs.

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
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        into, begin = out.reshape(-1).view(np.uint8), self.offset + start * self.row_bytes
        try:
            # In pieces, as a direct read keeps a buffer of the size of the largest.
            for at in range(0, len(into), _PIECE):
                direct_io.read(self.file, begin + at, into[at : at + _PIECE])
        except EOFError as error:
            raise FormatError(f"{error}: it became shorter while {self.name} was read") from error
        return out

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
      FormatError: the files are not there, or are not what the format says; names the file and what would be right.
      OSError: a file cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "is a file; name the directory that it is in" if directory.exists() else "does not exist"
        raise FormatError(f"{directory} {what}")
    index, single = directory / INDEX, directory / SINGLE
    if not index.is_file():
        return _open(single) if single.is_file() else _nothing(directory)
    weight_map = _weight_map(index)
    files = sorted(set(weight_map.values()))
    if single.is_file() and SINGLE not in files:
        raise FormatError(f"{directory} holds {SINGLE}, and {INDEX} that names other files: remove one of the two")
    if missing := [name for name in files if not (directory / name).is_file()]:
        raise FormatError(
            f"{index} names {len(files)} files, {len(missing)} of them missing: {few(missing)}; download them again"
        )
    held = {name: _open(directory / name) for name in files}
    for name, file in weight_map.items():
        if name not in held[file]:
            raise FormatError(
                f"{index} says that {name!r} is in {file}, which does not have it: they do not belong together"
            )
    for file, tensors in held.items():
        for name in tensors:
            if weight_map.get(name) != file:
                said = f"says that it is in {weight_map[name]}" if name in weight_map else "does not know it"
                raise FormatError(f"{directory / file} has {name!r}, and {INDEX} {said}: they do not belong together")
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


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _json(index, "it", index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(f"{index} has no 'weight_map', an object of file names by tensor name")
    for tensor, name in weight_map.items():
        # The index must not lead out of its directory.
        plain = isinstance(name, str) and name.endswith(".safetensors") and not any(c in name for c in "/\\\0")
        if not plain or ".." in name:
            raise FormatError(
                f"{index} says that {tensor!r} is in {name!r}: that must be a .safetensors file beside it, named "
                "without a directory or '..', such as 'model-00001-of-00002.safetensors'"
            )
    return weight_map


def _open(file: Path) -> dict[str, Stored]:
    """The tensors of one file, in the order of their bytes, which they fill without gap or overlap."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = stream.read(8)
        if length == b"version ":
            raise FormatError(
                f"{file} is a Git LFS pointer to the file, not the file itself; get it with 'git lfs pull'"
            )
        begin = 8 + int.from_bytes(length, "little")
        if len(length) < 8 or begin == 8:
            raise FormatError(f"{file} ({size} bytes) has no header: 8 bytes with its length, above 0, must come first")
        if begin - 8 > _HEADER:
            raise FormatError(f"{file} gives its header {begin - 8} bytes, the most are {_HEADER}: no safetensors file")
        if begin > size:
            raise FormatError(f"{file} was cut short: it has {size} bytes, its header alone goes to byte {begin}")
        header = _json(file, "its header", stream.read(begin - 8))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise FormatError(f"{file} has a '__metadata__' that is not an object of texts")
    tensors = [_entry(file, begin, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end, last = begin, "the header"
    for tensor in tensors:
        if tensor.offset != end:
            how = "overlaps" if tensor.offset < end else "leaves a hole after"
            raise FormatError(
                f"{file}: {tensor.name!r} {how} {last}: it begins at byte {tensor.offset - begin} of the data, and "
                f"should at {end - begin}"
            )
        end, last = end + tensor.nbytes, repr(tensor.name)
    if size < end:
        raise FormatError(f"{file} was cut short: it has {size} bytes and should have {end}; download or copy it again")
    if size > end:
        raise FormatError(f"{file} has {size} bytes and should have {end}: those after {last} belong to no tensor")
    return {tensor.name: tensor for tensor in tensors}


def _entry(file: Path, begin: int, name: str, entry: Any) -> Stored:
    where = f"{file}: {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise FormatError(f"{where} is described by {entry!r:.80}, not by an object of dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        bits = _SUB_BYTE.get(kind) if isinstance(kind, str) else None
        why = "is not known" if bits is None else f"packs values of {bits} bits, which is not supported"
        raise FormatError(f"{where} has dtype {kind!r}, which {why}; it must be one of {', '.join(DTYPES)}")
    # By type, as True is an int too.
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise FormatError(f"{where} has shape {shape!r:.80}; it must be a list of integers, 0 or more")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
        raise FormatError(f"{where} has data_offsets {offsets!r:.80}; they must be two integers, begin and end")
    first, stop = offsets
    if not 0 <= first <= stop:
        raise FormatError(f"{where} has data_offsets {offsets}; they must be 0 <= begin <= end")
    tensor = Stored(name, dtype, tuple(shape), file, begin + first)
    if stop - first != tensor.nbytes:
        raise FormatError(f"{where} has {stop - first} bytes by its data_offsets, {kind} {shape} takes {tensor.nbytes}")
    return tensor


def _json(file: Path, what: str, raw: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((twice, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"it has {twice!r} twice")
        return found

    try:
        value = json.loads(raw.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is damaged: {what} must be one JSON object, and cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file} is damaged: {what} must be one JSON object, and is a {type(value).__name__}")
    return value


def few(names: list[str]) -> str:
    """The first few of some names, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
