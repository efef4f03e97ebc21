"""Prepares the token store of a corpus, once; later runs read only the store.

Files of text and JSON lines, and other corpora of files, are tokenised in Python, by any number of processes. TFDS and
seqio tasks are read by seqio, with TensorFlow.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import SPLITS, Corpus, FileCorpus, RowCorpus, SeqioTask, TokenCorpus, TokenisedCorpus
from flm_jax.data.dedup import Dedup
from flm_jax.data.known import Known, digest_of
from flm_jax.data.left_out import description, sentence
from flm_jax.data.prepare_text import open_texts, parts_folder, tokens_of
from flm_jax.data.reading import load_tensorflow
from flm_jax.data.store import TokenStore
from flm_jax.data.store_record import FORMAT, PREPARE_AGAIN, STORE_FILE, WEIGHTED
from flm_jax.data.store_writer import StoreWriter
from flm_jax.data.train_vocabulary import VocabularyConfig, build_vocabulary, identity
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.data.workers import Runner, Workers
from flm_jax.distributed import print0
from flm_jax.files import check_writable, sha256_json
from flm_jax.progress import byte_bar
from flm_jax.records import counted

_log = logging.getLogger(__name__)


def store_path(
    corpus: Corpus, vocabulary_config: VocabularyConfig, cache_dir: str | Path, dedup: Dedup | None = None
) -> Path:
    """The folder of the store of this corpus and vocabulary; its name changes whenever its content would."""
    return _store_path(corpus, _identified(digest_of(corpus, cache_dir), dedup), vocabulary_config, cache_dir)


def _identified(digest: str, dedup: Dedup | None) -> str:
    """The digest of the documents that stay, of a corpus with a digest."""
    return digest if dedup is None else sha256_json(["dedup", digest, dedup.identity()])


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


class Prepared(NamedTuple):
    """A store that is ready.

    Attributes:
      store: opened.
      made: whether it was made now; otherwise it was there.
      seconds: how long it took.
    """

    store: TokenStore
    made: bool
    seconds: float


def prepare(
    corpus: Corpus,
    vocabulary_config: VocabularyConfig,
    cache_dir: str | Path,
    progress: bool = True,
    context: int = DataConfig.context,
    max_shard_tokens: int = 2**27,
    dedup: Dedup | None = None,
) -> TokenStore:
    """Opens the store of a corpus; makes it first, in this process, if it does not exist.

    Every document is read in a fixed order. For a seqio mixture the store holds each task's documents once: mixing
    rates apply only with `DataConfig.streamed`.

    Args:
      corpus: any of `corpora`.
      vocabulary_config: what to tokenise with; a SeqioTask has its own vocabulary instead.
      cache_dir: where stores and vocabularies are kept.
      progress: show a progress bar on a terminal.
      context: tokens per window; only the stores of a TokenCorpus depend on it.
      max_shard_tokens: see StoreWriter.
      dedup: which duplicates are left out; None: none.

    Returns:
      The store, opened: what is read of it is compared with its checksums.

    Raises:
      ValueError, FileNotFoundError: the corpus cannot be read, the vocabulary cannot be trained, a split is empty, or
        the existing store is damaged; the message names the file.
      MissingExtraError: the corpus needs what is not installed.
    """
    found = prepare_by(None, corpus, vocabulary_config, cache_dir, progress, context, max_shard_tokens, dedup)
    if found.made and progress:
        _say(found)
    return found.store


def prepare_by(
    runner: Runner | None,
    corpus: Corpus,
    vocabulary_config: VocabularyConfig,
    cache_dir: str | Path,
    progress: bool = True,
    context: int = DataConfig.context,
    max_shard_tokens: int = 2**27,
    dedup: Dedup | None = None,
) -> Prepared:
    """As `prepare`, where a runner does the work on a corpus of files; the store is the same.

    If it is killed, the next call with a runner goes on with the parts that are left.
    """
    began = time.monotonic()
    if dedup is not None and not isinstance(corpus, FileCorpus | RowCorpus):
        raise ValueError(
            f"DataConfig.dedup is for corpora of files (TextFolder, Jsonl, Parquet, Records and the like), and "
            f"{type(corpus).__name__} is none: leave it out"
            + ("; conversations without duplicates are chosen by select_sft.py." if _is_tokens(corpus) else ".")
        )
    if isinstance(corpus, TokenCorpus):
        vocabulary = build_vocabulary(vocabulary_config, corpus, cache_dir)
        store, made = _prepare_tokens(corpus, vocabulary, cache_dir, context, progress, max_shard_tokens)
        return Prepared(store, made, time.monotonic() - began)
    if not isinstance(corpus, FileCorpus | RowCorpus):
        store, made = _prepare_seqio(corpus, vocabulary_config, cache_dir, progress, max_shard_tokens)
        return Prepared(store, made, time.monotonic() - began)
    known = Known(corpus, cache_dir)
    if known.digest is not None:
        digest = _identified(known.digest, dedup)
        path = _store_path(corpus, digest, vocabulary_config, cache_dir)
        if path.exists() and (existing := _existing(path, digest)) is not None:
            shutil.rmtree(parts_folder(path), ignore_errors=True)
            return Prepared(existing, False, time.monotonic() - began)
    bar = functools.partial(_bar, progress, runner is not None)
    if dedup is not None and runner is None:
        runner = Workers(1)  # hashes are kept on disk
    texts = open_texts(corpus, runner, bar)
    digest = _identified(known.keep(texts.digest), dedup)
    path = _store_path(corpus, digest, vocabulary_config, cache_dir)
    if (existing := _existing(path, digest)) is not None:
        shutil.rmtree(parts_folder(path), ignore_errors=True)
        return Prepared(existing, False, time.monotonic() - began)
    if said := sentence(texts.left_out.record()):
        _log.warning("%s: %s.", corpus.path if isinstance(corpus, RowCorpus) else path, said)
    if progress:
        for note in corpus.notes() if isinstance(corpus, FileCorpus) else ():
            print0(note)
    vocabulary = build_vocabulary(vocabulary_config, corpus, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tokens_of(texts, vocabulary, path, dedup, runner, bar) as tokens:
        about = {**corpus.describe(), **tokens.description}
        with StoreWriter(path, vocabulary, digest, about, max_shard_tokens) as writer:
            for block in tokens.blocks:
                writer.extend(*block)
            store = writer.close(description(tokens.left_out.record()))
    return Prepared(store, True, time.monotonic() - began)


def _is_tokens(corpus: Corpus) -> bool:
    return isinstance(corpus, TokenCorpus)


def _bar(progress: bool, always: bool, total: int, what: str) -> Any:
    """A progress bar in bytes, `always` or where there is a terminal; a context manager with `update(nbytes)`."""
    if progress and always:
        return byte_bar(total, 0, what)
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None if progress else True)


def _prepare_seqio(
    corpus: Corpus, vocabulary_config: VocabularyConfig, cache_dir: str | Path, progress: bool, shard: int
) -> tuple[TokenStore, bool]:
    """The store of a corpus that seqio reads, and whether it was made."""
    digest = corpus.digest()
    path = _store_path(corpus, digest, vocabulary_config, cache_dir)
    if (existing := _existing(path, digest)) is not None:
        return existing, False
    load_tensorflow()  # before anything is computed
    from tqdm import tqdm

    from flm_jax.data import tasks

    source = tasks.resolve(corpus, build_vocabulary(vocabulary_config, corpus, cache_dir))
    if source.is_mixture:
        _log.warning("the store holds each task of a mixture once; its rates act only with DataConfig.streamed = True")
    with StoreWriter(path, source.vocabulary, digest, corpus.describe(), shard) as writer:
        for split in SPLITS:
            hidden = None if progress else True  # None: hidden where there is no terminal
            with tqdm(desc=f"tokenising {split}", unit="B", unit_scale=True, disable=hidden) as bar:
                for tokens, text_bytes in source.documents(split):
                    writer.append(split, tokens, text_bytes)
                    bar.update(text_bytes)
        return writer.close(), True


def _prepare_tokens(
    corpus: TokenCorpus, vocabulary: Vocabulary, cache_dir: str | Path, context: int, progress: bool, shard: int
) -> tuple[TokenStore, bool]:
    """The store of a corpus that writes its own tokens, and whether it was made; without TensorFlow."""
    found, digest = corpus.tokenised(vocabulary, context), corpus.digest()
    path = _token_store_path(corpus, digest, vocabulary, found, cache_dir)
    if (store := _existing(path, digest, vocabulary.digest)) is not None:
        return store, False
    from tqdm import tqdm

    hidden = None if progress else True
    about = {**corpus.describe(), **found.describe()}
    with StoreWriter(path, vocabulary, digest, about, shard, weighted=True) as writer:
        with tqdm(desc="tokenising", unit=" documents", disable=hidden) as bar:
            for split, document in found.documents():
                writer.append(split, document.tokens, document.text_bytes, document.weights)
                bar.update()
        store = writer.close(description(found.left_out()))
    if progress:
        for note in found.notes():
            print0(note)
    return store, True


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


def _say(found: Prepared) -> None:
    store = found.store
    counts = store.describe()["splits"]
    parts = [
        f"{split}: {counted(n['documents'], 'document')}, {counted(n['text_bytes'], 'byte')}, "
        f"{counted(n['tokens'], 'token')}"
        + (f", {n['weighted_tokens']:,} of them trained on" if store.weighted else "")
        for split, n in counts.items()
    ]
    print0(f"Prepared the text in {found.seconds:.1f} s. {'; '.join(parts)}. Kept in {store.path}.")
