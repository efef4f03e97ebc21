"""The token store: tokens on disk, read by number, with a checksum over everything.

    store.json         format, dtype, vocabulary and corpus digests, splits, shards, and a sha256 over all of these
    vocabulary.json    the vocabulary's spec, self-contained
    train-00000.bin    tokens, little-endian uint16 (uint32 above 65,536 ids): documents, each ended by eos
    train.idx          little-endian uint64: where each document starts, and the end of the last
    train-00000.weights  of conversations only: a byte per token, 1 if it is trained on (format 2)

Window i of a split is the context + 1 tokens from i * context on: neighbours share one token, so every token but the
first is predicted exactly once per epoch. Conversations are packed into windows: a document begins and ends within one.
Reading needs only NumPy.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from flm_jax.data.vocabulary import Vocabulary
from flm_jax.data.vocabulary_files import from_spec
from flm_jax.files import read_bounded, sha256_file, sha256_json
from flm_jax.records import counted
from flm_jax.records.foreign_json import check, field, parse_json, read_json

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


def weights_file(shard: str) -> str:
    """The name of the file with the weights of a shard's tokens."""
    return f"{Path(shard).stem}.weights"


def data_digest(record: dict[str, Any]) -> str:
    """The sha256 that identifies a store's data: over everything but the corpus's description, which holds paths."""
    return sha256_json({key: record[key] for key in ("format", "dtype", "vocabulary", "corpus", "splits")})


def render(record: dict[str, Any]) -> bytes:
    """The bytes of store.json."""
    return (json.dumps(record, indent=1) + "\n").encode()


def _check_file(path: Path, size: int, sha256: str, verify: bool) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"the token store lacks {path}: delete the store's folder and prepare it again")
    found = path.stat().st_size
    if found != size:
        raise ValueError(
            f"{path} is {counted(found, 'byte')} long and should be {size:,}: delete the store and prepare it again"
        )
    if verify and sha256_file(path) != sha256:
        raise ValueError(
            f"{path} was altered (its sha256 is not the recorded one): delete the store and prepare it again"
        )


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


def _check_length(mapped: np.memmap) -> None:
    """Checks that a mapped file still has its length: beyond the end of a shorter one, reading ends the program.

    Raises:
      ValueError: it has not.
    """
    file = Path(str(mapped.filename))
    if (size := file.stat().st_size) < mapped.nbytes:
        raise ValueError(
            f"{file} had {mapped.nbytes} bytes when it was opened and has {size} now: something has truncated it. "
            "Delete the store; the next start prepares it again."
        )


class _Mapped:
    """The shards of a split as one array, memory-mapped."""

    def __init__(self, files: list[Path], dtype: np.dtype) -> None:
        self._shards = [np.memmap(file, dtype=dtype, mode="r") for file in files]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards], dtype=np.int64)
        self._dtype = dtype

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The entries at the given positions, in their shape."""
        flat = positions.ravel()
        shard_of = np.searchsorted(self._starts, flat, side="right") - 1
        found = np.empty(flat.shape, self._dtype)
        for number in np.unique(shard_of):
            _check_length(self._shards[number])
            chosen = shard_of == number
            found[chosen] = self._shards[number][flat[chosen] - self._starts[number]]
        return found.reshape(positions.shape)


class TokenStore:
    """A store opened for reading, by `open`."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        """Takes a record that `open` has checked."""
        self.path = path
        self._record = record

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> TokenStore:
        """Opens a store after checking it.

        Args:
          path: the store's folder.
          verify: also compare every file with its sha256 (1.7 GB/s); sizes are checked in any case.

        Raises:
          FileNotFoundError: there is no store, or a file of it is missing.
          ValueError: a file is truncated or altered, or the format is another one. Both name the file.
        """
        path = Path(path).expanduser()
        manifest = path / STORE_FILE
        if not manifest.is_file():
            raise FileNotFoundError(f"there is no token store at {path}: {manifest} is missing")
        try:
            content = read_bounded(manifest, MOST_BYTES)
            record = parse_json(content, str(manifest))
        except (ValueError, OSError):
            raise ValueError(f"{manifest} is damaged: delete the store and prepare it again") from None
        whole = render(record) == content  # no byte more or less, even where JSON ignores it
        seal = record.pop("seal", None)
        if not whole or sha256_json(record) != seal:
            raise ValueError(f"{manifest} was altered (its seal does not match): delete the store and prepare it again")
        if record.get("format") not in (FORMAT, WEIGHTED):
            raise ValueError(
                f"{manifest} has format {record.get('format')!r}; this version reads formats {FORMAT} and {WEIGHTED}"
            )
        try:
            _check_record(record)
        except ValueError as error:
            raise ValueError(f"{manifest} is damaged: {error}; delete the store and prepare it again") from None
        size, sha256 = record["vocabulary_file"]
        _check_file(path / VOCABULARY_FILE, size, sha256, verify)
        width = np.dtype(record["dtype"]).itemsize
        for split, info in record["splits"].items():
            _check_file(path / f"{split}.idx", 8 * (info["documents"] + 1), info["index_sha256"], verify)
            for shard in info["shards"]:
                _check_file(path / shard["file"], shard["tokens"] * width, shard["sha256"], verify)
                if record["format"] == WEIGHTED:
                    weights = path / weights_file(shard["file"])
                    _check_file(weights, shard["tokens"], shard["weights_sha256"], verify)
        return cls(path, record)

    @property
    def digest(self) -> str:
        """A sha256 (hex), equal for two stores only if they hold the same tokens, vocabulary and splits."""
        return data_digest(self._record)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that the tokens were made with."""
        return from_spec(read_json(self.path / VOCABULARY_FILE))

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""
        return int(self._record["vocabulary"]["eos_id"])

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._record["splits"])

    def describe(self) -> dict[str, Any]:
        """A JSON-able description of the content: counts per split, vocabulary, corpus, digest."""
        counts = {
            split: {key: info[key] for key in ("tokens", "documents", "text_bytes", "weighted_tokens") if key in info}
            for split, info in self._record["splits"].items()
        }
        return {
            "digest": self.digest,
            "splits": counts,
            "vocabulary": self._record["vocabulary"],
            "corpus": {**self._record["description"], "digest": self._record["corpus"]},
        }

    def _split_record(self, split: str) -> dict[str, Any]:
        if split not in self._record["splits"]:
            raise ValueError(f"{self.path} has no split {split!r}: it has {', '.join(self.splits)}")
        return self._record["splits"][split]

    def num_tokens(self, split: str) -> int:
        """Tokens of a split, document ends included."""
        return int(self._split_record(split)["tokens"])

    def num_documents(self, split: str) -> int:
        """Documents of a split."""
        return int(self._split_record(split)["documents"])

    def text_bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text per token, with document ends counted as tokens: bits per byte = bits per token / this.

        Of a weighted store only tokens with weight count, and the text that they are.

        Raises:
          ValueError: the split is empty.
        """
        info = self._split_record(split)
        tokens = info["weighted_tokens"] if self.weighted else info["tokens"]
        if not tokens:
            raise ValueError(f"the split {split!r} of {self.path} holds no token that is trained on")
        return float(info["text_bytes"] / tokens)

    @property
    def weighted(self) -> bool:
        """Whether each token has a weight, as in conversations, of which only answers are trained on."""
        return bool(self._record["format"] == WEIGHTED)

    @functools.cached_property
    def _shards(self) -> dict[str, _Mapped]:
        """By split, its tokens, memory-mapped."""
        dtype = np.dtype(self._record["dtype"])
        return {split: _Mapped(self._files(split), dtype) for split in self.splits}

    @functools.cached_property
    def _weights(self) -> dict[str, _Mapped]:
        """By split, the weights of its tokens, memory-mapped."""
        return {
            split: _Mapped([path.with_name(weights_file(path.name)) for path in self._files(split)], np.dtype(np.uint8))
            for split in self.splits
        }

    def _files(self, split: str) -> list[Path]:
        return [self.path / shard["file"] for shard in self._record["splits"][split]["shards"]]

    def _check_positions(self, split: str, positions: np.ndarray) -> None:
        total = self.num_tokens(split)
        if positions.size and not (positions.min() >= 0 and positions.max() < total):
            raise IndexError(
                f"positions {positions.min()} to {positions.max()} of {split!r}, which has {counted(total, 'token')}"
            )

    def tokens(self, split: str, positions: np.ndarray) -> np.ndarray:
        """The tokens at the given positions, int32, in the shape of `positions`.

        Raises:
          IndexError: a position outside [0, num_tokens).
          ValueError: a file has become shorter since the store was opened.
        """
        self._check_positions(split, positions)
        return self._shards[split].at(positions).astype(np.int32)

    def weights(self, split: str, positions: np.ndarray) -> np.ndarray:
        """The weights of the tokens at the given positions, float32; all 1 if the store has none.

        Raises:
          IndexError, ValueError: as `tokens`.
        """
        self._check_positions(split, positions)
        if not self.weighted:
            return np.ones(positions.shape, np.float32)
        return self._weights[split].at(positions).astype(np.float32)

    def document_numbers(self, split: str, positions: np.ndarray) -> np.ndarray:
        """The number of the document that each position lies in, int64, in the shape of `positions`."""
        self._check_positions(split, positions)
        return np.searchsorted(self._indexes[split], positions, side="right") - 1

    @functools.cached_property
    def _indexes(self) -> dict[str, np.ndarray]:
        return {split: np.memmap(self.path / f"{split}.idx", dtype="<u8", mode="r") for split in self.splits}

    def document(self, split: str, number: int) -> np.ndarray:
        """The tokens of one document, int32, its end included.

        Raises:
          IndexError: there is no such document.
        """
        if not 0 <= number < self.num_documents(split):
            raise IndexError(f"document {number} of {split!r}, which has {self.num_documents(split)}")
        start, end = (int(offset) for offset in self._indexes[split][number : number + 2])
        return self.tokens(split, np.arange(start, end))

    def num_windows(self, split: str, context: int) -> int:
        """The number of windows of context + 1 tokens in the split, `context` apart.

        Raises:
          ValueError: there is not a single one, or the context is below 1.
        """
        if context < 1:
            raise ValueError(f"context is {context}: a window predicts at least 1 token")
        windows = (self.num_tokens(split) - 1) // context
        if windows < 1:
            raise ValueError(
                f"the split {split!r} of {self.path} holds {counted(self.num_tokens(split), 'token')}: fewer than "
                f"context + 1 = {context + 1}; choose a shorter context or a larger corpus"
            )
        return windows

    def windows(self, split: str, indices: np.ndarray, context: int) -> np.ndarray:
        """Windows by number, int32 (n, context + 1).

        Raises:
          IndexError: an index outside [0, num_windows).
        """
        total = self.num_windows(split, context)
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < total):
            raise IndexError(f"windows {indices.min()} to {indices.max()} of {split!r}, which has {total} of {context}")
        return self.tokens(split, indices[:, None] * context + np.arange(context + 1))

    def window(self, split: str, index: int, context: int) -> np.ndarray:
        """One window, int32 (context + 1,)."""
        return self.windows(split, np.array([index]), context)[0]
