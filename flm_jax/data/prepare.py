"""Prepares the token store of a corpus, once, with seqio; later runs read only the store, without TensorFlow.

Where TensorFlow and seqio are not installed, files of text and JSON lines are read in Python, to the same store, bit
for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import SPLITS, Corpus, FileCorpus, Jsonl, RowCorpus, SeqioTask, TokenCorpus, TokenisedCorpus
from flm_jax.data.known import digest_of
from flm_jax.data.reading import MissingExtraError, load_tensorflow
from flm_jax.data.store import TokenStore
from flm_jax.data.store_record import FORMAT, PREPARE_AGAIN, STORE_FILE, WEIGHTED
from flm_jax.data.store_writer import StoreWriter
from flm_jax.data.train_vocabulary import VocabularyConfig, build_vocabulary, identity
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.distributed import print0
from flm_jax.files import check_writable, sha256_json
from flm_jax.records import counted

_log = logging.getLogger(__name__)


def store_path(corpus: Corpus, vocabulary_config: VocabularyConfig, cache_dir: str | Path) -> Path:
    """The folder of the store of this corpus and vocabulary; its name changes whenever its content would."""
    return _store_path(corpus, corpus.digest(), vocabulary_config, cache_dir)


def _store_path(corpus: Corpus, digest: str, vocabulary_config: VocabularyConfig, cache_dir: str | Path) -> Path:
    # A seqio task has its own vocabulary.
    vocabulary = [] if isinstance(corpus, SeqioTask) else identity(vocabulary_config)
    key = hashlib.sha256(json.dumps([FORMAT, digest, vocabulary]).encode()).hexdigest()
    return Path(cache_dir).expanduser() / f"{type(corpus).__name__.lower()}-{key[:16]}"


def token_store_path(
    corpus: TokenCorpus, vocabulary: Vocabulary, tokenised: TokenisedCorpus, cache_dir: str | Path
) -> Path:
    """As `store_path`, for a corpus that writes its own tokens."""
    return _token_store_path(corpus, corpus.digest(), vocabulary, tokenised, cache_dir)


def _token_store_path(
    corpus: TokenCorpus, digest: str, vocabulary: Vocabulary, tokenised: TokenisedCorpus, cache_dir: str | Path
) -> Path:
    key = sha256_json([WEIGHTED, digest, vocabulary.digest, tokenised.describe()])
    return Path(cache_dir).expanduser() / f"{type(corpus).__name__.lower()}-{key[:16]}"


def prepare(
    corpus: Corpus,
    vocabulary_config: VocabularyConfig,
    cache_dir: str | Path,
    progress: bool = True,
    context: int = DataConfig.context,
    max_shard_tokens: int = 2**27,
) -> TokenStore:
    """Opens the store of a corpus; makes it first if it does not exist.

    Every document is read once, in a fixed order. For a seqio mixture the store holds each task's documents once:
    mixing rates apply only with `DataConfig.streamed`.

    Args:
      corpus: any of `corpora`.
      vocabulary_config: what to tokenise with; a SeqioTask has its own vocabulary instead.
      cache_dir: where stores and vocabularies are kept.
      progress: show a progress bar on a terminal.
      context: tokens per window; only the stores of a TokenCorpus depend on it.
      max_shard_tokens: see StoreWriter.

    Returns:
      The store, opened: what is read of it is compared with its checksums.

    Raises:
      ValueError, FileNotFoundError: the corpus cannot be read, the vocabulary cannot be trained, a split is empty, or
        the existing store is damaged; the message names the file.
    """
    if isinstance(corpus, TokenCorpus):
        vocabulary = build_vocabulary(vocabulary_config, corpus, cache_dir)
        return _prepare_tokens(corpus, vocabulary, cache_dir, context, progress, max_shard_tokens)
    digest = digest_of(corpus, cache_dir)
    path = _store_path(corpus, digest, vocabulary_config, cache_dir)
    if (store := _existing(path, digest)) is not None:
        return store
    from tqdm import tqdm

    began = time.monotonic()
    if progress:
        for note in corpus.notes() if isinstance(corpus, FileCorpus) else ():
            print0(note)
    source = _source(corpus, vocabulary_config, cache_dir)
    with StoreWriter(path, source.vocabulary, digest, corpus.describe(), max_shard_tokens) as writer:
        for split in SPLITS:
            hidden = None if progress else True  # None: hidden where there is no terminal
            with tqdm(desc=f"tokenising {split}", unit="B", unit_scale=True, disable=hidden) as bar:
                for tokens, text_bytes in source.documents(split):
                    writer.append(split, tokens, text_bytes)
                    bar.update(text_bytes)
        store = writer.close()
    if progress:
        _say(store, began)
    return store


def _source(corpus: Corpus, vocabulary_config: VocabularyConfig, cache_dir: str | Path) -> _Source:
    """What yields the documents of a corpus as tokens: seqio or, where it is not installed, Python, if that can.

    Raises:
      MissingExtraError: the corpus needs what is not installed; nothing was computed before.
    """
    if isinstance(corpus, RowCorpus) and (corpus.compressed if isinstance(corpus, Jsonl) else True):
        # tf.data reads only plain lines.
        return _PlainSource(corpus, build_vocabulary(vocabulary_config, corpus, cache_dir))
    try:
        load_tensorflow()
    except MissingExtraError:
        if not isinstance(corpus, FileCorpus | RowCorpus):
            raise
        return _PlainSource(corpus, build_vocabulary(vocabulary_config, corpus, cache_dir))
    from flm_jax.data import tasks

    source = tasks.resolve(corpus, build_vocabulary(vocabulary_config, corpus, cache_dir))
    if source.is_mixture:
        _log.warning("the store holds each task of a mixture once; its rates act only with DataConfig.streamed = True")
    return source


class _Source(Protocol):
    """What `tasks.Source` and `_PlainSource` have in common."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def documents(self, split: str) -> Iterator[tuple[np.ndarray, int]]: ...


@dataclasses.dataclass(frozen=True)
class _PlainSource:
    """A corpus of text, tokenised in Python."""

    corpus: FileCorpus | RowCorpus
    vocabulary: Vocabulary

    def documents(self, split: str) -> Iterator[tuple[np.ndarray, int]]:
        """As `tasks.Source.documents`."""
        for text in self.corpus.documents(split):
            yield np.asarray([*self.vocabulary.encode(text), self.vocabulary.eos_id], np.int32), len(text.encode())


def _prepare_tokens(
    corpus: TokenCorpus, vocabulary: Vocabulary, cache_dir: str | Path, context: int, progress: bool, shard: int
) -> TokenStore:
    """As `prepare`, for a corpus that writes its own tokens; without TensorFlow."""
    found, digest = corpus.tokenised(vocabulary, context), corpus.digest()
    path = _token_store_path(corpus, digest, vocabulary, found, cache_dir)
    if (store := _existing(path, digest, vocabulary.digest)) is not None:
        return store
    from tqdm import tqdm

    began, hidden = time.monotonic(), None if progress else True
    about = {**corpus.describe(), **found.describe()}
    with StoreWriter(path, vocabulary, digest, about, shard, weighted=True) as writer:
        with tqdm(desc="tokenising", unit=" documents", disable=hidden) as bar:
            for split, document in found.documents():
                writer.append(split, document.tokens, document.text_bytes, document.weights)
                bar.update()
        store = writer.close()
    if progress:
        for note in found.notes():
            print0(note)
        _say(store, began)
    return store


def _existing(path: Path, corpus: str, vocabulary: str | None = None) -> TokenStore | None:
    """The store at a path, checked; None if there is none, and one can be made.

    Args:
      path: of `store_path` or `token_store_path`.
      corpus: the digest of what it must hold.
      vocabulary: the digest of the vocabulary; None: that is not known yet.

    Raises:
      ValueError: it is damaged, or holds something else, as a folder that was copied to a wrong name does.
    """
    if (path / STORE_FILE).exists():
        store = TokenStore.open(path)
        found = store.describe()
        if found["corpus"]["digest"] != corpus:
            raise ValueError(f"{path} holds the tokens of another corpus: {PREPARE_AGAIN}")
        if vocabulary is not None and found["vocabulary"]["digest"] != vocabulary:
            raise ValueError(f"{path} holds tokens of another vocabulary: {PREPARE_AGAIN}")
        return store
    if path.exists():
        raise FileNotFoundError(f"{path} holds no {STORE_FILE}: delete the folder to prepare the store again")
    check_writable(path.parent, f"DataConfig.cache_dir = {str(path.parent)!r}")
    return None


def _say(store: TokenStore, began: float) -> None:
    counts = store.describe()["splits"]
    parts = [
        f"{split}: {counted(n['documents'], 'document')}, {counted(n['text_bytes'], 'byte')}, "
        f"{counted(n['tokens'], 'token')}"
        + (f", {n['weighted_tokens']:,} of them trained on" if store.weighted else "")
        for split, n in counts.items()
    ]
    print0(f"Prepared the text in {time.monotonic() - began:.1f} s. {'; '.join(parts)}. Kept in {store.path}.")
