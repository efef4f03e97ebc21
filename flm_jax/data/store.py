"""The token store: tokens on disk, read by number, with checksums over everything.

    store.json         format, dtype, vocabulary and corpus digests, splits, shards, and a sha256 over all of these
    vocabulary.json    the vocabulary's spec, self-contained
    train-00000.bin    tokens, little-endian uint16 (uint32 above 65,536 ids): documents, each ended by eos
    train.idx          little-endian uint64: where each document starts, and the end of the last
    train-00000.weights  of conversations only: a byte per token, 1 if it is trained on (format 2)
    blocks.json, blocks.crc32  checksums of the blocks of these files: see `store_sums`

Opening looks at the record and at the sizes of files. A block is compared with its checksum when it is first read.

Window i of a split is the context + 1 tokens from i * context on: neighbours share one token, so every token but the
first is predicted exactly once per epoch. Conversations are packed into windows: a document begins and ends within one.
Reading needs only NumPy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flm_jax.data.store_files import CheckedFile, Column
from flm_jax.data.store_record import (
    PREPARE_AGAIN,
    VOCABULARY_FILE,
    WEIGHTED,
    check_sizes,
    data_digest,
    files_of,
    read_record,
    vocabulary_of,
    weights_file,
)
from flm_jax.data.store_sums import BlockSums, read_sums
from flm_jax.data.store_verify import BackgroundVerification, verify_once
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.data.vocabulary_files import from_spec
from flm_jax.files import sha256_file
from flm_jax.records import counted
from flm_jax.records.foreign_json import read_json


class TokenStore:
    """A store opened for reading, by `open`."""

    def __init__(self, path: Path, record: dict[str, Any], sums: BlockSums | None) -> None:
        """Takes a record and checksums that `open` has checked."""
        self.path = path
        self._record, self._sums = record, sums
        self._found: dict[str, str] = {}  # 'damage': that a thread has found

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> TokenStore:
        """Opens a store after checking its record, its vocabulary, and the sizes of its files.

        Args:
          path: the store's folder.
          verify: whether a store without checksums of its blocks, as earlier versions wrote it, is compared as a whole
            with its sha256 sums; the checksums are written then. Without them what is read is compared with nothing.

        Raises:
          FileNotFoundError: there is no store, or a file of it is missing.
          ValueError: a file is truncated or altered, or the format is another one. Both name the file.
        """
        path = Path(path).expanduser()
        record, seal = read_record(path)
        files, vocabulary = files_of(record), vocabulary_of(record)
        check_sizes(path, [vocabulary, *files])
        if sha256_file(path / vocabulary.name) != vocabulary.sha256:
            raise ValueError(
                f"{path / vocabulary.name} was altered (its sha256 is not the recorded one): {PREPARE_AGAIN}"
            )
        sums = read_sums(path, seal, files)
        if sums is None and verify:
            sums = verify_once(path, seal, files)
        return cls(path, record, sums)

    def __reduce__(self) -> tuple[Callable[..., TokenStore], tuple[str, str]]:
        """Another process opens the store by its path, and checks that it is the same."""
        return _reopened, (str(self.path.absolute()), self.digest)

    @functools.cached_property
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
    def _files(self) -> dict[str, CheckedFile]:
        """By name, the files of tokens, weights and indexes."""
        return {file.name: CheckedFile(self.path, file, self._sums) for file in files_of(self._record)}

    @functools.cached_property
    def _tokens(self) -> dict[str, Column]:
        """By split, its tokens."""
        return {split: self._column(split, np.dtype(self._record["dtype"]), str) for split in self.splits}

    @functools.cached_property
    def _weights(self) -> dict[str, Column]:
        """By split, the weights of its tokens."""
        return {split: self._column(split, np.dtype(np.uint8), weights_file) for split in self.splits}

    def _column(self, split: str, dtype: np.dtype, file_of: Callable[[str], str]) -> Column:
        shards = self._record["splits"][split]["shards"]
        files = [self._files[file_of(shard["file"])] for shard in shards]
        return Column(files, [shard["tokens"] for shard in shards], dtype)

    def verify_behind(self, bytes_per_second: float, share: tuple[int, int] = (0, 1)) -> BackgroundVerification | None:
        """Starts a thread that verifies the store at a limited rate; damage is raised by the next read.

        Args:
          bytes_per_second: the most that it reads.
          share: (i, n): of every n files, the i-th, where n processes share the work.

        Returns:
          The thread; None if the store has no checksums of its blocks.
        """
        if self._sums is None:
            return None
        files = list(self._files.values())[share[0] :: share[1]]
        return BackgroundVerification(files, bytes_per_second, self._found, str(self.path))

    def check_found(self) -> None:
        """Raises a ValueError if a thread of `verify_behind` has found damage."""
        if self._found:
            raise ValueError(self._found["damage"])

    def _check_positions(self, split: str, positions: np.ndarray) -> None:
        self.check_found()
        total = self.num_tokens(split)
        if positions.size and not (positions.min() >= 0 and positions.max() < total):
            raise IndexError(
                f"positions {positions.min()} to {positions.max()} of {split!r}, which has {counted(total, 'token')}"
            )

    def tokens(self, split: str, positions: np.ndarray) -> np.ndarray:
        """The tokens at the given positions, int32, in the shape of `positions`.

        Raises:
          IndexError: a position outside [0, num_tokens).
          ValueError: a file has become shorter since the store was opened, or a block of it is damaged.
        """
        self._check_positions(split, positions)
        return self._tokens[split].at(positions).astype(np.int32)

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
        """The number of the document that each position lies in, int64, in the shape of `positions`.

        Raises:
          IndexError, ValueError: as `tokens`.
        """
        self._check_positions(split, positions)
        return np.searchsorted(self._index(split, 0, self.num_documents(split) + 1), positions, side="right") - 1

    def _index(self, split: str, first: int, last: int) -> np.ndarray:
        """Where the documents first..last start, int64."""
        # As signed numbers: NumPy compares unsigned ones with signed positions by converting all of them to floats.
        return self._files[f"{split}.idx"].bytes(8 * first, 8 * last).view("<i8")

    def document(self, split: str, number: int) -> np.ndarray:
        """The tokens of one document, int32, its end included.

        Raises:
          IndexError: there is no such document.
          ValueError: as `tokens`.
        """
        if not 0 <= number < self.num_documents(split):
            raise IndexError(f"document {number} of {split!r}, which has {self.num_documents(split)}")
        start, end = self._index(split, number, number + 2).tolist()
        self._check_positions(split, np.array([start, end - 1] if end > start else [], np.int64))
        return self._tokens[split].run(start, end).astype(np.int32)

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
          ValueError: as `tokens`.
        """
        total = self.num_windows(split, context)
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < total):
            raise IndexError(f"windows {indices.min()} to {indices.max()} of {split!r}, which has {total} of {context}")
        self.check_found()
        found = np.empty((len(indices), context + 1), np.int32)
        for row, index in enumerate(indices.tolist()):
            found[row] = self._tokens[split].run(index * context, index * context + context + 1)
        return found

    def window(self, split: str, index: int, context: int) -> np.ndarray:
        """One window, int32 (context + 1,)."""
        return self.windows(split, np.array([index]), context)[0]


def _reopened(path: str, digest: str) -> TokenStore:
    """The store at a path, opened again by another process.

    Raises:
      FileNotFoundError, ValueError: as `TokenStore.open`, or it is another store now.
    """
    store = TokenStore.open(path, verify=False)
    if store.digest != digest:
        raise ValueError(f"{path} holds another token store than the one that was opened there before")
    return store
