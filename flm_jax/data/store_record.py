"""The record of a token store, store.json: its fields, its seal, and the files that it lists with their sizes."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flm_jax.files import read_bounded, sha256_json
from flm_jax.records import counted
from flm_jax.records.foreign_json import check, field, parse_json

FORMAT, WEIGHTED = 1, 2
# A corpus of millions of files lists none of them; a shard takes 150 bytes.
MOST_BYTES = 1 << 28
# The fields of the record, of a split and of a shard, and their types.
_RECORD: dict[str, type] = {"vocabulary": dict, "corpus": str, "description": dict}
_SHARD: dict[str, type] = {"file": str, "tokens": int, "sha256": str}
_SPLIT: dict[str, type] = {"documents": int, "tokens": int, "text_bytes": int, "index_sha256": str, "shards": list}
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
STORE_FILE = "store.json"
VOCABULARY_FILE = "vocabulary.json"
# Sizes are asked for by this many threads: a network file system answers each question slowly, and many at once.
_THREADS, _FILES_PER_TURN = 16, 256
PREPARE_AGAIN = "delete the store and prepare it again"


class StoreFile(NamedTuple):
    """A file that a store's record lists.

    Attributes:
      name: in the store's folder.
      size: in bytes.
      sha256: of its content, hex.
      what: what it holds, such as "shard 3 of the split 'train'".
    """

    name: str
    size: int
    sha256: str
    what: str


def store_dtype(vocabulary_size: int) -> np.dtype:
    """The dtype of the tokens of a vocabulary of so many ids."""
    return np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")


def weights_file(shard: str) -> str:
    """The name of the file with the weights of a shard's tokens."""
    return f"{Path(shard).stem}.weights"


def data_digest(record: dict[str, Any]) -> str:
    """The sha256 that identifies a store's data: over everything but the corpus's description, which holds paths."""
    return sha256_json({key: record[key] for key in ("format", "dtype", "vocabulary", "corpus", "splits")})


def render(record: dict[str, Any]) -> bytes:
    """The bytes of a record's file."""
    return (json.dumps(record, indent=1) + "\n").encode()


def read_sealed(file: Path, advice: str) -> tuple[dict[str, Any], str]:
    """The record in a file that `render` has written, without its seal, and the seal: the sha256 of the record.

    Args:
      file: must exist.
      advice: what to do if it is damaged, for errors.

    Raises:
      ValueError: it is damaged or altered.
    """
    try:
        content = read_bounded(file, MOST_BYTES)
        record = parse_json(content, str(file))
    except (ValueError, OSError):
        raise ValueError(f"{file} is damaged: {advice}") from None
    whole = render(record) == content  # no byte more or less, even where JSON ignores it
    seal = record.pop("seal", None)
    if seal is None:
        raise ValueError(f"{file} has no seal: {advice}")
    if not whole or sha256_json(record) != seal:
        raise ValueError(f"{file} was altered (its seal does not match): {advice}")
    return record, seal


def read_record(path: Path) -> tuple[dict[str, Any], str]:
    """The checked record of the store in a folder, and its seal.

    Raises:
      FileNotFoundError: there is no store.
      ValueError: the record is damaged or altered, or has another format.
    """
    manifest = path / STORE_FILE
    if not manifest.is_file():
        raise FileNotFoundError(f"there is no token store at {path}: {manifest} is missing")
    record, seal = read_sealed(manifest, PREPARE_AGAIN)
    if record.get("format") not in (FORMAT, WEIGHTED):
        raise ValueError(
            f"{manifest} has format {record.get('format')!r}; this version reads formats {FORMAT} and {WEIGHTED}"
        )
    try:
        _check_record(record)
    except ValueError as error:
        raise ValueError(f"{manifest} is damaged: {error}; {PREPARE_AGAIN}") from None
    return record, seal


def _check_record(record: dict[str, Any]) -> None:
    """Checks that a record has the fields of a store, and names no files outside of it.

    Raises:
      ValueError: it has not; the message names the field.
    """
    if field(record, "dtype", str, "it") not in ("<u2", "<u4"):
        raise ValueError(f"its dtype is {record['dtype']!r}")
    for name, kind in _RECORD.items():
        field(record, name, kind, "it")
    weighted = record["format"] == WEIGHTED
    field(record["vocabulary"], "eos_id", int, "its vocabulary")
    size_and_sha256 = [type(part) for part in field(record, "vocabulary_file", list, "it")]
    if size_and_sha256 != [int, str]:
        raise ValueError("its field 'vocabulary_file' is not a size and a sha256")
    for split, info in field(record, "splits", dict, "it").items():
        for name, kind in _SPLIT.items():
            field(check(info, dict, f"its split {split!r}"), name, kind, f"its split {split!r}")
        if weighted:
            field(info, "weighted_tokens", int, f"its split {split!r}")
        for number, shard in enumerate(info["shards"]):
            where = f"shard {number} of its split {split!r}"
            for name, kind in {**_SHARD, **({"weights_sha256": str} if weighted else {})}.items():
                field(check(shard, dict, where), name, kind, where)
            if not _PLAIN.fullmatch(shard["file"]) or not _PLAIN.fullmatch(split):
                raise ValueError(f"{where} is the file {shard['file']!r}, which is no plain name")
        if sum(shard["tokens"] for shard in info["shards"]) != info["tokens"]:
            raise ValueError(f"the shards of its split {split!r} do not add up to {counted(info['tokens'], 'token')}")


def vocabulary_of(record: dict[str, Any]) -> StoreFile:
    """The file with the vocabulary's spec."""
    size, sha256 = record["vocabulary_file"]
    return StoreFile(VOCABULARY_FILE, size, sha256, "the vocabulary")


def files_of(record: dict[str, Any]) -> list[StoreFile]:
    """The files of tokens, weights and indexes, in the order in which the checksums of their blocks are kept."""
    width, found = np.dtype(record["dtype"]).itemsize, []
    for split, info in sorted(record["splits"].items()):
        index = f"the index of the split {split!r}"
        found.append(StoreFile(f"{split}.idx", 8 * (info["documents"] + 1), info["index_sha256"], index))
        for number, shard in enumerate(info["shards"]):
            what = f"shard {number} of the split {split!r}"
            found.append(StoreFile(shard["file"], shard["tokens"] * width, shard["sha256"], what))
            if record["format"] == WEIGHTED:
                name = weights_file(shard["file"])
                found.append(StoreFile(name, shard["tokens"], shard["weights_sha256"], f"the weights of {what}"))
    return found


def check_sizes(folder: Path, files: Iterable[StoreFile]) -> None:
    """Checks that every file is there and has its size; reads nothing of them.

    Raises:
      FileNotFoundError, ValueError: one is missing, or has another size; the message names the first such file.
    """
    files = list(files)
    turns = [files[at : at + _FILES_PER_TURN] for at in range(0, len(files), _FILES_PER_TURN)]

    def look(turn: list[StoreFile]) -> None:
        for file in turn:
            _check_size(folder, file)

    if len(turns) == 1:
        return look(turns[0])
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(look, turns):
            pass
    return None


def _check_size(folder: Path, file: StoreFile) -> None:
    path = f"{folder}/{file.name}"  # a Path takes longer to make than to look at
    try:
        found = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        raise FileNotFoundError(
            f"the token store lacks {path}: delete the store's folder and prepare it again"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(f"{path} is no file: delete the store's folder and prepare it again")
    if found.st_size != file.size:
        raise ValueError(
            f"{path} is {counted(found.st_size, 'byte')} long and should be {file.size:,}: {PREPARE_AGAIN}"
        )


def size_fault(folder: Path, file: StoreFile) -> str:
    """What is wrong with a file's size, in a sentence; empty if nothing is."""
    try:
        _check_size(folder, file)
    except (OSError, ValueError) as error:
        return str(error)
    return ""
