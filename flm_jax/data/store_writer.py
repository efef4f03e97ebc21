"""Writes a token store: into a hidden folder beside its final place, renamed once everything is on disk.

A killed run leaves no store, only the hidden folder, which nothing reads and the next preparation removes.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import glob
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from flm_jax.data.corpora import SPLITS
from flm_jax.data.store import TokenStore
from flm_jax.data.store_record import (
    FORMAT,
    STORE_FILE,
    VOCABULARY_FILE,
    WEIGHTED,
    files_of,
    render,
    store_dtype,
    weights_file,
)
from flm_jax.data.store_sums import Summing, write_sums
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.data.vocabulary_files import spec_bytes
from flm_jax.files import draft_of, naming, sha256_json, sync_write
from flm_jax.records import counted

# Tokens that are copied at a time where many documents come together.
_SLICE = 1 << 20
_log = logging.getLogger(__name__)


def check_ids(tokens: np.ndarray, vocabulary_size: int, what: str) -> None:
    """Refuses tokens that are not ids of a vocabulary; `what` names them.

    Raises:
      ValueError: one is negative, or too large.
    """
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocabulary_size):
        raise ValueError(f"{what} has ids from {tokens.min()} to {tokens.max()}; the vocabulary has {vocabulary_size}")


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed; None: another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_left(path: Path) -> None:
    """Removes what killed processes left of this store; what a living one writes is locked."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if left.is_dir() and (lock := _locked(left)) is not None:
            _log.warning("%s: removed, a process that was killed left it unfinished", left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


class _File:
    """A file that is being written, the sha256 of what it holds so far, and the checksums of its blocks."""

    def __init__(self, path: Path) -> None:
        self.path, self._sha, self.summing = path, hashlib.sha256(), Summing()
        self._stream: BinaryIO = path.open("wb")

    def write(self, content: bytes) -> None:
        with naming(self.path):
            self._stream.write(content)
        self._sha.update(content)
        self.summing.add(content)

    def end(self) -> str:
        """Closes the file; returns its sha256."""
        with naming(self.path):
            self._stream.flush()
            os.fsync(self._stream.fileno())  # a rename may reach the disk before the content does
            self._stream.close()
        return self._sha.hexdigest()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # a full disk does not take what is still to be written
            self._stream.close()


class _Split:
    """One split that is being written: the open shard, and the records of the full ones."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, limit: int, weighted: bool) -> None:
        self.folder, self.name, self.dtype, self.limit, self.weighted = folder, name, dtype, limit, weighted
        self.shards: list[dict[str, Any]] = []
        self.sums: dict[str, np.ndarray] = {}  # of the blocks of each file that is complete
        self.offsets = array.array("Q", [0])  # 8 bytes a document
        self.text_bytes = self.weighted_tokens = 0
        # Of the open shard, by the field of its record with their sha256: tokens, and weights if the store has them.
        self._files: dict[str, _File] = {}
        self._tokens = 0

    def append(self, tokens: np.ndarray, text_bytes: int, weights: np.ndarray) -> None:
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.text_bytes += text_bytes
        self.weighted_tokens += int(weights.sum())
        self._write(tokens, weights)

    def extend(self, tokens: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        self.offsets.frombytes((self.offsets[-1] + np.cumsum(lengths, dtype=np.uint64)).tobytes())
        self.text_bytes += text_bytes
        self._write(tokens, tokens[:0])

    def _write(self, tokens: np.ndarray, weights: np.ndarray) -> None:
        while len(tokens):
            if not self._files:
                shard = self.folder / f"{self.name}-{len(self.shards):05d}.bin"
                self._files, self._tokens = {"sha256": _File(shard)}, 0
                if self.weighted:
                    self._files["weights_sha256"] = _File(shard.with_name(weights_file(shard.name)))
            room = min(self.limit - self._tokens, _SLICE)
            now, tokens = tokens[:room], tokens[room:]
            of_now, weights = weights[:room], weights[room:]
            content = {"sha256": now.astype(self.dtype), "weights_sha256": of_now.astype(np.uint8)}
            for name, file in self._files.items():
                file.write(content[name].tobytes())
            self._tokens += len(now)
            if self._tokens == self.limit:
                self._end_shard()

    def _end_shard(self) -> None:
        if self._files:
            sums = {name: file.end() for name, file in self._files.items()}
            self.shards.append({"file": self._files["sha256"].path.name, "tokens": self._tokens, **sums})
            self.sums |= {file.path.name: file.summing.sums() for file in self._files.values()}
            self._files = {}

    def finish(self) -> dict[str, Any]:
        self._end_shard()
        file = _File(self.folder / f"{self.name}.idx")
        file.write(np.array(self.offsets, "<u8").tobytes())
        index_sha256 = file.end()
        self.sums[file.path.name] = file.summing.sums()
        return {
            "tokens": self.offsets[-1],
            "documents": len(self.offsets) - 1,
            "text_bytes": self.text_bytes,
            **({"weighted_tokens": self.weighted_tokens} if self.weighted else {}),
            "index_sha256": index_sha256,
            "shards": self.shards,
        }

    def abandon(self) -> None:
        for file in self._files.values():
            file.abandon()


class StoreWriter:
    """Writes one store; as a context manager it leaves nothing behind on an error."""

    def __init__(
        self,
        path: str | Path,
        vocabulary: Vocabulary,
        corpus_digest: str,
        description: dict[str, Any],
        max_shard_tokens: int = 2**27,
        weighted: bool = False,
    ) -> None:
        """Starts a store.

        Args:
          path: the folder that will hold it.
          vocabulary: of the tokens; its spec is written beside them.
          corpus_digest: identifies the documents.
          description: JSON-able, for people.
          max_shard_tokens: a shard is closed when it holds this many (2^27 tokens of 2 bytes are 256 MiB).
          weighted: whether each token has a weight.

        Raises:
          ValueError: max_shard_tokens is below 1.
        """
        if max_shard_tokens < 1:
            raise ValueError(f"max_shard_tokens is {max_shard_tokens}: a shard holds at least 1 token")
        self.path, self._weighted = Path(path).expanduser(), weighted
        self._vocabulary, self._corpus_digest, self._description = vocabulary, corpus_digest, description
        self._dtype = store_dtype(vocabulary.size)
        _remove_left(self.path)
        self._draft = draft_of(self.path)
        self._draft.mkdir(parents=True)
        self._lock = _locked(self._draft)
        self._splits = {name: _Split(self._draft, name, self._dtype, max_shard_tokens, weighted) for name in SPLITS}

    def append(self, split: str, tokens: np.ndarray, text_bytes: int, weights: np.ndarray | None = None) -> None:
        """Adds a document.

        Args:
          split: 'train' or 'heldout'.
          tokens: its ids, integers (n,); in a store without weights the end of document is added if it is missing.
          text_bytes: length of its text in UTF-8; with weights, of the text that they choose.
          weights: 0 or 1 (n,), in a weighted store; None: 1.

        Raises:
          ValueError: an unknown split, an id outside the vocabulary, weights in a store that has none, or weights that
            are not 0 or 1 for each token.
        """
        if split not in self._splits:
            raise ValueError(f"there is no split {split!r}: a store has {' and '.join(self._splits)}")
        tokens = np.asarray(tokens)
        number = len(self._splits[split].offsets) - 1
        check_ids(tokens, self._vocabulary.size, f"document {number} of {split!r}")
        if not self._weighted and (not tokens.size or tokens[-1] != self._vocabulary.eos_id):
            tokens = np.append(tokens, self._vocabulary.eos_id)
        if weights is None:
            weights = np.ones(len(tokens), np.uint8)
        elif not self._weighted:
            raise ValueError(f"a document of {split!r} has weights, and the store was begun without")
        elif weights.shape != tokens.shape or not np.isin(weights, (0, 1)).all():
            raise ValueError(
                f"a document of {split!r} must have a weight of 0 or 1 for each of its {counted(len(tokens), 'token')}"
            )
        self._splits[split].append(tokens, text_bytes, weights)

    def extend(self, split: str, tokens: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Adds documents to a store without weights; it holds the same as if each had been added by `append`.

        Args:
          split: 'train' or 'heldout'.
          tokens: ids of one document after the other, each with its end; integers (n,), perhaps a map of a file.
          lengths: tokens of each document, (documents,).
          text_bytes: length of their texts together in UTF-8.

        Raises:
          ValueError: an id outside the vocabulary, a document without its end, lengths that are not those of the
            tokens, or a store with weights.
        """
        if self._weighted:
            raise ValueError(f"documents of {split!r} come without weights, and the store was begun with weights")
        first, ends = len(self._splits[split].offsets) - 1, np.cumsum(lengths, dtype=np.int64)
        if int(ends[-1] if len(ends) else 0) != len(tokens) or (np.asarray(lengths) < 1).any():
            raise ValueError(f"the lengths of documents of {split!r} are not those of {counted(len(tokens), 'token')}")
        what = f"one of the documents {first} to {first + len(ends) - 1} of {split!r}"
        for start in range(0, len(tokens), _SLICE):
            check_ids(tokens[start : start + _SLICE], self._vocabulary.size, what)
        if (tokens[ends - 1] != self._vocabulary.eos_id).any():
            raise ValueError(f"{what} does not end with the id {self._vocabulary.eos_id}")
        self._splits[split].extend(tokens, lengths, text_bytes)

    def close(self, found: Mapping[str, Any] | None = None) -> TokenStore:
        """Moves the store to its place and opens it; if another process was first, opens the store of that process.

        Args:
          found: what the description gains that was found while documents were added.

        Raises:
          ValueError: one of the splits has no document.
        """
        splits = {name: split.finish() for name, split in self._splits.items()}
        for name, info in splits.items():
            if not info["documents"]:
                self.abandon()
                raise ValueError(f"the corpus has no document in its split {name!r}: {self._description}")
        spec = spec_bytes(self._vocabulary)
        sync_write(self._draft / VOCABULARY_FILE, spec)
        record: dict[str, Any] = {
            "format": WEIGHTED if self._weighted else FORMAT,
            "dtype": self._dtype.str,
            "vocabulary": {
                "kind": self._vocabulary.kind,
                "size": self._vocabulary.size,
                "eos_id": self._vocabulary.eos_id,
                "digest": self._vocabulary.digest,
            },
            "vocabulary_file": [len(spec), hashlib.sha256(spec).hexdigest()],
            "corpus": self._corpus_digest,
            "description": {**self._description, **(found or {})},
            "splits": splits,
        }
        record["seal"] = sha256_json(record)
        sync_write(self._draft / STORE_FILE, render(record))
        sums = {name: of for split in self._splits.values() for name, of in split.sums.items()}
        write_sums(self._draft, record["seal"], files_of(record), sums)
        try:
            self._draft.rename(self.path)
        except OSError:
            if not (self.path / STORE_FILE).is_file():
                raise
            self.abandon()
        self._unlock()
        return TokenStore.open(self.path)

    def abandon(self) -> None:
        """Removes what has been written so far."""
        for split in self._splits.values():
            split.abandon()
        shutil.rmtree(self._draft, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abandon()
