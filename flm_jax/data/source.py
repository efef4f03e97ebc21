"""Opens the data that a `DataConfig` describes, for training and for held-out evaluation.

data = open_data(DataConfig(corpus=StandardLibrary(), context=512))
batches = data.train()
batch = batches.next(64)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from flm_jax.data.batches import Batch, StageNeed, StoreBatches, TokenBatches, heldout_batches
from flm_jax.data.config import PACKINGS, DataConfig
from flm_jax.data.corpora import Corpus, TokenCorpus
from flm_jax.data.mixture_data import open_mixture, recorded_mixture
from flm_jax.data.packing import PackedBatches, laid_out
from flm_jax.data.prepare import prepare
from flm_jax.data.store import TokenStore
from flm_jax.data.train_vocabulary import build_vocabulary
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.distributed import assert_equal, is_primary, primary_then_others, print0
from flm_jax.files import sha256_json
from flm_jax.records.foreign_json import field


class Data(Protocol):
    """Data that is ready to be read."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the token ids."""
        ...

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of held-out text per token: bits per byte = nats per token / ln 2 / this."""
        ...

    @property
    def digest(self) -> str:
        """A sha256 (hex) that identifies the documents, their split and their tokens."""
        ...

    @property
    def sources(self) -> dict[str, float]:
        """Of a mixture, `bytes_per_token` of each source by its name; empty: it is one corpus."""
        ...

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        """The token stores that it is read from; none where seqio reads it."""
        ...

    def train(self, weights: Mapping[str, float] | None = None) -> TokenBatches:
        """A new stream of training batches, at its start.

        Args:
          weights: of the sources of a mixture by name, from where the stream starts or is restored; None: its own.
        """
        ...

    def supply(self, stages: Sequence[StageNeed], begun: bytes | None = None) -> list[str]:
        """Sentences about sources of a mixture that run out in a run of such stages.

        Args:
          stages: what they read.
          begun: the position at which they begin, from `TokenBatches.state`; None: the start.

        Raises:
          ValueError: the sources together do not suffice; the message names the stage and the step.
        """
        ...

    def heldout(self, batch_size: int, windows: int) -> Iterator[Batch]:
        """The same held-out windows each time, at most `windows`, the last batch filled up with rows of weight 0."""
        ...

    def describe(self) -> dict[str, Any]:
        """A JSON-able description, for the record of a checkpoint or a report."""
        ...


class StoreData:
    """Data in a token store."""

    def __init__(self, store: TokenStore, context: int, seed: int) -> None:
        """Wraps an open store; see DataConfig for context and seed."""
        self.store, self._context, self._seed = store, context, seed

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """See Data."""
        return self.store.vocabulary

    @property
    def bytes_per_token(self) -> float:
        """See Data; over the whole held-out split."""
        return self.store.text_bytes_per_token("heldout")

    @property
    def digest(self) -> str:
        """See Data; the store's."""
        return self.store.digest

    @property
    def sources(self) -> dict[str, float]:
        """See Data; none."""
        return {}

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        """See Data."""
        return (self.store,)

    def train(self, weights: Mapping[str, float] | None = None) -> StoreBatches:
        """See Data."""
        del weights  # a recipe that gives a single corpus any is refused
        return StoreBatches(self.store, "train", self._context, self._seed)

    def supply(self, stages: Sequence[StageNeed], begun: bytes | None = None) -> list[str]:
        """See Data; a single corpus is read as often as it takes."""
        del stages, begun
        return []

    def heldout(self, batch_size: int, windows: int) -> Iterator[Batch]:
        """See Data; spread evenly over the held-out split."""
        return heldout_batches(self.store, self._context, batch_size, windows)

    def describe(self) -> dict[str, Any]:
        """See Data."""
        about = {"read": "store", "store": str(self.store.path.absolute())}
        return {**about, "context": self._context, "seed": self._seed, **self.store.describe()}


class StreamData:
    """Data read by seqio during training."""

    stores: tuple[TokenStore, ...] = ()

    def __init__(self, corpus: Corpus, vocabulary: Vocabulary, context: int, seed: int) -> None:
        """Loads TensorFlow and resolves the task; see DataConfig."""
        from flm_jax.data import tasks

        self._corpus, self._context, self._seed = corpus, context, seed
        self.vocabulary = vocabulary
        self._source = tasks.resolve(corpus, vocabulary)

    @functools.cached_property
    def bytes_per_token(self) -> float:
        """See Data; over the first million held-out tokens."""
        from flm_jax.data import streaming

        return streaming.heldout_bytes_per_token(self._source)

    @functools.cached_property
    def digest(self) -> str:
        """See Data; of corpus and vocabulary, because the tokens are never all read."""
        return sha256_json({"corpus": self._corpus.digest(), "vocabulary": self.vocabulary.digest})

    @property
    def sources(self) -> dict[str, float]:
        """See Data; none."""
        return {}

    def train(self, weights: Mapping[str, float] | None = None) -> TokenBatches:
        """See Data."""
        del weights  # as above
        from flm_jax.data import streaming

        return streaming.SeqioBatches(self._corpus, self.vocabulary, "train", self._context, self._seed)

    def supply(self, stages: Sequence[StageNeed], begun: bytes | None = None) -> list[str]:
        """See Data; a single corpus is read as often as it takes."""
        del stages, begun
        return []

    def heldout(self, batch_size: int, windows: int) -> Iterator[Batch]:
        """See Data; the first windows of the held-out documents."""
        from flm_jax.data import streaming

        return streaming.heldout_stream(self._source, self._context, batch_size, windows)

    def describe(self) -> dict[str, Any]:
        """See Data."""
        vocabulary = {key: value for key, value in self.vocabulary.spec().items() if key != "model"}
        return {
            "read": "stream",
            "context": self._context,
            "seed": self._seed,
            "digest": self.digest,
            "vocabulary": vocabulary,
            "corpus": {**self._corpus.describe(), "digest": self._corpus.digest()},
        }


class PackedData:
    """Data whose batches are laid out as `DataConfig.packing` asks for it; the rest is that of other data."""

    def __init__(self, data: Data, packing: str) -> None:
        """Wraps data; see `DataConfig` for `packing`."""
        self._data, self._packing = data, packing

    @property
    def vocabulary(self) -> Vocabulary:
        """See Data."""
        return self._data.vocabulary

    @property
    def bytes_per_token(self) -> float:
        """See Data."""
        return self._data.bytes_per_token

    @property
    def digest(self) -> str:
        """See Data."""
        return self._data.digest

    @property
    def sources(self) -> dict[str, float]:
        """See Data."""
        return self._data.sources

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        """See Data."""
        return self._data.stores

    def train(self, weights: Mapping[str, float] | None = None) -> PackedBatches:
        """See Data."""
        return PackedBatches(self._data.train(weights), self._packing)

    def supply(self, stages: Sequence[StageNeed], begun: bytes | None = None) -> list[str]:
        """See Data."""
        return self._data.supply(stages, begun)

    def heldout(self, batch_size: int, windows: int) -> Iterator[Batch]:
        """See Data."""
        return (laid_out(batch, self._packing) for batch in self._data.heldout(batch_size, windows))

    def describe(self) -> dict[str, Any]:
        """See Data."""
        return {**self._data.describe(), "packing": self._packing}


def packed(data: Data, packing: str) -> Data:
    """The data with another packing; the data itself if that is how it is read anyway."""
    return data if packing == PACKINGS[0] else PackedData(data, packing)


def open_data(config: DataConfig, progress: bool = True) -> Data:
    """Opens the data of a config; prepares it first if necessary.

    All processes must call this. Process 0 prepares what is missing; then the others find it on a shared disk, or, if
    they do not share that of process 0, prepare their own.

    Args:
      config: what to train on.
      progress: show a progress bar on a terminal while preparing.

    Returns:
      Data in a store, opened without TensorFlow if the store exists; or, with `DataConfig.streamed`, data
      that seqio reads during training.

    Raises:
      ValueError, FileNotFoundError: as `prepare` and `build_vocabulary` raise them.
      ValueError: processes have prepared different data.
      PeerError: another process could not open it.
    """
    data = primary_then_others("data", lambda: packed(_open(config, progress and is_primary()), config.packing))
    advice = "Let all share one DataConfig.cache_dir, or copy that of one process to the others."
    assert_equal("The data's digest", data.digest, advice)
    assert_equal("The vocabulary's digest", data.vocabulary.digest, advice)
    return data


def _open(config: DataConfig, progress: bool) -> Data:
    if config.mixture is not None:
        return open_mixture(config, config.mixture, progress)
    if config.streamed:
        if isinstance(config.corpus, TokenCorpus):
            raise ValueError(
                f"{type(config.corpus).__name__} is read from a token store: set DataConfig.streamed = False."
            )
        vocabulary = build_vocabulary(config.tokenised_by, config.corpus, config.cache_dir)
        return StreamData(config.corpus, vocabulary, config.context, config.seed)
    store = prepare(config.corpus, config.tokenised_by, config.cache_dir, progress, config.context, dedup=config.dedup)
    return StoreData(store, config.context, config.seed)


@contextlib.contextmanager
def verified_behind(data: Data, megabytes_per_second: float) -> Iterator[None]:
    """A context in which threads verify the token stores of some data; damage is raised by the next batch.

    Several processes share the files between them.

    Args:
      data: what is read in the context.
      megabytes_per_second: the most that each process reads for it; 0: there are no threads.

    Raises:
      ValueError: there is no token store to verify; or, at the end of the context, damage that no batch has met.
    """
    share, threads = (jax.process_index(), jax.process_count()), []
    if megabytes_per_second:
        if not data.stores:
            raise ValueError(
                f"Run.verify_data is {megabytes_per_second:g}, and the data is not in a token store: leave it out, or "
                "set DataConfig.streamed = False."
            )
        behind = [store.verify_behind(1e6 * megabytes_per_second / len(data.stores), share) for store in data.stores]
        threads = [thread for thread in behind if thread is not None]
    try:
        yield
    finally:
        for thread in threads:
            print0(thread.close())
    for store in data.stores:
        store.check_found()


def recorded_data(record: Mapping[str, Any] | None) -> Data:
    """The data that a checkpoint records with `Data.describe`, from its token store or stores, without the texts.

    Raises:
      LookupError: a store is not there any more, or the data was not in a store; the message is for people.
    """
    if record is None:
        raise LookupError("the checkpoint records no data")
    packing = record.get("packing", PACKINGS[0])
    if packing not in PACKINGS:
        raise LookupError(f"the checkpoint records an unknown packing, {packing!r:.40}")
    return packed(_recorded(record), packing)


def _recorded(record: Mapping[str, Any]) -> Data:
    if "sources" in record:
        try:
            return recorded_mixture(record)
        except (ValueError, OSError) as error:
            raise LookupError(str(error)) from error
    if "store" not in record:
        raise LookupError("the checkpoint records no token store")
    try:
        path = field(dict(record), "store", str, "the record")
        context = field(dict(record), "context", int, "the record")
        store = TokenStore.open(path, verify=False)  # writes nothing: whoever trains verifies
    except (ValueError, OSError) as error:
        raise LookupError(str(error)) from error
    if store.digest != record.get("digest"):
        raise LookupError(f"{path} holds other data than the checkpoint records")
    return StoreData(store, context, seed=0)
