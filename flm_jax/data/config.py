"""The configuration of training data: corpus, vocabulary, context."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from flm_jax.data.corpora import Corpus, StandardLibrary
from flm_jax.data.dedup import Dedup
from flm_jax.data.mixture import Mixture
from flm_jax.data.train_vocabulary import CACHE, SentencePiece, VocabularyConfig
from flm_jax.records import recorded
from flm_jax.records.fields import Seed, Size, one_of

# Whether attention crosses the borders of the documents in a window, and whether positions begin again at each.
PACKINGS = ("separate", "restarted", "joined")


@dataclasses.dataclass(frozen=True)
@recorded
class DataConfig:
    """What to train on.

    Attributes:
      corpus: where documents come from; a `Mixture` names several corpora, with weights.
      vocabulary: how they are tokenised; a SeqioTask has its own vocabulary instead. None: the vocabulary of
        `Recipe.start`, or without a start `SentencePiece`.
      context: tokens per row.
      packing: separate: attention stays within a document, and positions run over the window; restarted: the same, and
        positions begin at 0 in each document, which changes rounding at most; joined: attention crosses the borders of
        documents, as if a window were one.
      streamed: whether seqio reads and tokenises documents during training, without a token store. (`grow.streamed` is
        another thing: a growth from disk to disk.)
      seed: of the order.
      cache_dir: where stores and vocabularies are kept.
      dedup: which documents are left out because they repeat an earlier one of the same corpus; None: none. Each source
        of a mixture is a corpus of its own. A vocabulary is trained on all documents.
    """

    corpus: Corpus = dataclasses.field(default_factory=StandardLibrary)
    vocabulary: VocabularyConfig | None = None
    context: Size = 256
    packing: Annotated[str, one_of(PACKINGS)] = "separate"
    streamed: bool = False
    seed: Seed = 0
    # Not "identity": the same data in another folder is the same recipe.
    cache_dir: str = dataclasses.field(default=CACHE, metadata={"identity": False})
    dedup: Dedup | None = None

    def __post_init__(self) -> None:
        if self.dedup is not None and self.streamed:
            raise ValueError(
                "DataConfig.dedup leaves documents out while a token store is prepared: set DataConfig.streamed = "
                "False, or leave DataConfig.dedup out."
            )

    @property
    def tokenised_by(self) -> VocabularyConfig:
        """The vocabulary that is named, or the default one. A recipe with a start names that of its start."""
        return self.vocabulary or SentencePiece()

    @property
    def mixture(self) -> Mixture | None:
        """The corpus, if it is a mixture."""
        return self.corpus if isinstance(self.corpus, Mixture) else None
