"""Batches streamed by seqio during training, for data that is too large for a token store or mixed on the fly.

Documents are concatenated and cut into windows of context + 1 tokens, `context` apart, exactly as in the store. seqio's
packing would pad every row and cut every document off at the row's length; this way no token is lost or wasted, the two
ways of reading are interchangeable, and between two batches only the rest of one document has to be kept.
"""

from __future__ import annotations

import base64
import itertools
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flm_jax.data.batches import Batch, check_rows, in_batches, make_batch, pack_state, unpack_state
from flm_jax.data.corpora import Corpus
from flm_jax.data.reading import load_tensorflow
from flm_jax.data.tasks import Source, resolve
from flm_jax.data.vocabulary import Vocabulary


class SeqioBatches:
    """Endless batches of a seqio task or mixture, read during training, that resume exactly.

    With several processes, each reads the whole stream and keeps the rows that it needs, so the order of the documents
    and a saved position are the same for any number of processes.
    """

    def __init__(
        self,
        corpus: Corpus,
        vocabulary: Vocabulary | None,
        split: str,
        context: int,
        seed: int,
        shuffle_buffer: int | None = None,
    ) -> None:
        """Starts reading.

        Args:
          corpus: any of `corpora`.
          vocabulary: what to tokenise with; None for a SeqioTask, which has its own.
          split: 'train' or 'heldout'.
          context: tokens per row.
          seed: of the order of documents, and of a mixture's draws.
          shuffle_buffer: number of documents that seqio shuffles among; they are part of every saved position. None:
            the default of `tasks.register_task`; a SeqioTask keeps its own.

        Raises:
          ValueError: no such split or task.
        """
        if context < 1:
            raise ValueError(f"context is {context}: a window predicts at least 1 token")
        self._source = resolve(corpus, vocabulary, shuffle_buffer)
        self._context = context
        self._eos_id = self._source.vocabulary.eos_id
        self._identity = {
            "kind": "stream",
            "corpus": corpus.digest(),
            "vocabulary": self._source.vocabulary.digest,
            "split": split,
            "context": context,
            "seed": seed,
            "shuffle_buffer": shuffle_buffer,
            "host": "0 of 1",  # positions that were saved by version 0.1.0 hold it
        }
        self._dataset = self._source.dataset(split, shuffle=True, seed=seed, num_epochs=None)
        self._iterator: Any = iter(self._dataset)
        self._rest = np.zeros(0, np.int32)
        self._seen = 0  # crc32 of all tokens so far
        self.position = 0

    def next(self, batch_size: int, rows: np.ndarray | None = None) -> Batch:
        """The next global batch, (batch_size, context) each, or the given rows of it.

        Args:
          batch_size: windows of the global batch, which are all read.
          rows: int (n,), the rows of the global batch to return; None: all.

        Raises:
          ValueError: batch_size is below 1, the batch has no such rows, or there is no document to read.
        """
        rows = check_rows(batch_size, rows)
        parts, length = [self._rest], len(self._rest)
        while length < batch_size * self._context + 1:
            example = next(self._iterator, None)
            if example is None:
                raise ValueError(f"{self._source.task.name} has no document to train on")
            parts.append(ended(example[self._source.feature].numpy(), self._eos_id))
            length += len(parts[-1])
        tokens = np.concatenate(parts)
        self._seen = zlib.crc32(tokens[: batch_size * self._context].tobytes(), self._seen)
        self._rest = tokens[batch_size * self._context :]
        self.position += batch_size
        return make_batch(cut(tokens, batch_size, self._context)[rows], self._eos_id)

    def state(self) -> bytes:
        """The position as JSON bytes: tf.data's own checkpoint, and the rest of the document that is being cut.

        tf.data saves what it has read ahead and its shuffle buffer, so a state takes up to a few MB; restoring it takes
        no longer late in the data than early.
        """
        tf, _ = load_tensorflow()
        with tempfile.TemporaryDirectory() as folder:
            tf.train.Checkpoint(iterator=self._iterator).write(f"{folder}/position")
            files = {path.name: _pack(path.read_bytes()) for path in sorted(Path(folder).iterdir())}
        rest = _pack(self._rest.astype("<i4").tobytes())
        return pack_state(self._identity, position=self.position, rest=rest, seen=self._seen, iterator=files)

    def rows_by_source(self, first: int, count: int) -> dict[str, int]:
        """See TokenBatches; none."""
        del first, count
        return {}

    def mark(self) -> str:
        """The position, and a crc32 of all tokens so far: the position alone does not determine what tf.data yields."""
        return f"{self.position}:{self._seen:08x}"

    def restore(self, state: bytes) -> None:
        """Continues at a saved position.

        Raises:
          ValueError: the state belongs to other data, another seed or context, or is not a state.
        """
        record = unpack_state(state, self._identity)
        tf, _ = load_tensorflow()
        try:
            position, seen = int(record["position"]), int(record["seen"])
            rest = np.frombuffer(_unpack(record["rest"]), "<i4").astype(np.int32)
            files = {Path(name).name: _unpack(content) for name, content in record["iterator"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
            raise ValueError(f"the saved data position is damaged: {error!r}") from None
        iterator = iter(self._dataset)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            try:
                tf.train.Checkpoint(iterator=iterator).read(f"{folder}/position").assert_consumed()
            except (tf.errors.OpError, AssertionError) as error:
                raise ValueError(f"the saved data position cannot be read back: {error}") from None
        self.position, self._seen, self._rest, self._iterator = position, seen, rest, iterator


def _pack(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 1)).decode()


def _unpack(content: str) -> bytes:
    return zlib.decompress(base64.b64decode(content, validate=True))


def ended(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """A document's tokens, int32 (n,), with its end added if it is missing."""
    tokens = np.asarray(tokens, np.int32).ravel()
    return tokens if tokens.size and tokens[-1] == eos_id else np.append(tokens, np.int32(eos_id))


def cut(tokens: np.ndarray, number: int, context: int) -> np.ndarray:
    """The first `number` windows of a run of tokens, (number, context + 1), `context` apart."""
    return tokens[np.arange(number)[:, None] * context + np.arange(context + 1)]


def heldout_windows(source: Source, context: int, windows: int) -> Iterator[np.ndarray]:
    """Yields the first windows of the held-out documents in their fixed order, each (context + 1,)."""
    rest = np.zeros(0, np.int32)
    left = windows
    for tokens, _ in source.documents("heldout"):
        rest = np.concatenate([rest, ended(tokens, source.vocabulary.eos_id)])
        number = min(left, (len(rest) - 1) // context)
        yield from cut(rest, number, context)
        rest, left = rest[number * context :], left - number
        if left == 0:
            return


def heldout_stream(source: Source, context: int, batch_size: int, windows: int) -> Iterator[Batch]:
    """The first `windows` held-out windows in fixed order, the last batch filled up with rows of weight 0.

    Raises:
      ValueError: the held-out documents do not fill one window, or windows or batch_size is below 1.
    """
    if windows < 1 or batch_size < 1:
        raise ValueError(f"{windows} held-out windows in batches of {batch_size}: both must be at least 1")
    found = heldout_windows(source, context, windows)
    first = next(found, None)
    if first is None:
        raise ValueError(f"the held-out documents of {source.task.name} hold fewer than {context + 1} tokens")
    return in_batches(itertools.chain([first], found), batch_size, source.vocabulary.eos_id)


def heldout_bytes_per_token(source: Source, most_tokens: int = 1_000_000) -> float:
    """UTF-8 bytes of text per token over the first held-out documents, with document ends counted as tokens."""
    tokens_read = bytes_read = 0
    for tokens, text_bytes in source.documents("heldout"):
        tokens_read += len(ended(tokens, source.vocabulary.eos_id))
        bytes_read += text_bytes
        if tokens_read >= most_tokens:
            break
    if not tokens_read:
        raise ValueError(f"{source.task.name} has no held-out document")
    return bytes_read / tokens_read
