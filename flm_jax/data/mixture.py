"""A mixture of corpora as a configuration: named sources with weights, and limits of how often each is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from flm_jax.data.corpora import Corpus, SeqioTask, TextCorpus
from flm_jax.files import sha256_json
from flm_jax.records import as_dict, meant, recorded
from flm_jax.records.fields import Limit, NonNegative, Positive

STREAMED = "A Mixture is read from token stores: set DataConfig.streamed = False."
# Part of the names of measurements, such as heldout/web/loss.
SourceName = Annotated[
    str,
    Limit("letters, digits and any of _ . -", lambda name: re.fullmatch(r"[A-Za-z0-9_.-]+", name) is not None),
]


@dataclasses.dataclass(frozen=True)
@recorded
class Source:
    """One corpus of a `Mixture`.

    Attributes:
      name: for measurements, and for `Stage.source_weights`.
      corpus: where its documents come from; it holds out documents of its own.
      weight: how many windows are read of it, in proportion to the other sources; 0: none, unless a stage says so.
        None: it follows from the size of each source, if no source has a weight.
      epochs: how often it is read at most, in all stages together; then its weight goes to the other sources, in
        proportion to theirs. None: as often as its weight asks for.
    """

    name: SourceName
    corpus: Corpus
    weight: NonNegative | None = None
    epochs: Positive | None = None


@dataclasses.dataclass(frozen=True)
@recorded
class Mixture:
    """Several corpora in given proportions: each window of a batch is one of one source.

    Attributes:
      sources: the corpora; all have the vocabulary of `DataConfig`.
      temperature: without weights, a source of n training tokens has the weight n^(1 / temperature): 1 is in proportion
        to size, more raises small sources.
    """

    sources: tuple[Source, ...]
    temperature: Positive = 1.0

    def __post_init__(self) -> None:
        names = self.names
        if not names:
            raise ValueError("Mixture.sources is empty; a mixture has at least one Source.")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Mixture.sources has two sources named {twice[0]!r}: give each its own Source.name.")
        for source in self.sources:
            if isinstance(source.corpus, Mixture):
                raise ValueError(f"Source {source.name!r} is a Mixture; name its sources in the outer one.")
        without = [source.name for source in self.sources if source.weight is None]
        if without and len(without) < len(names):
            raise ValueError(
                f"Mixture.sources: {', '.join(without)} without a weight, and the others with one; give all of them a "
                "Source.weight, or none."
            )
        if not without and self.temperature != 1:
            raise ValueError(
                f"Mixture.temperature = {self.temperature} makes weights from the sizes of sources, and these have a "
                "Source.weight; leave out one of the two."
            )
        if not without:
            self.weights({source.name: source.weight or 0.0 for source in self.sources})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources, in order."""
        return tuple(source.name for source in self.sources)

    def weights(self, given: Mapping[str, float]) -> tuple[float, ...]:
        """The weight of each source, in order, from weights by name; one that is not named has 0.

        Raises:
          ValueError: there is no such source, or all weights are 0.
        """
        if unknown := sorted(set(given) - set(self.names)):
            near = meant(unknown[0], self.names)
            raise ValueError(f"there is no source {unknown[0]!r}; the mixture has {', '.join(self.names)}{near or '.'}")
        if not any(given.values()):
            raise ValueError("all weights of sources are 0; give at least one source a weight above 0.")
        return tuple(float(given.get(name, 0.0)) for name in self.names)

    def weights_by_size(self, tokens: Sequence[int]) -> tuple[float, ...]:
        """The weight of each source: as given, or by its number of training tokens where none is given."""
        if self.sources[0].weight is not None:
            return tuple(source.weight or 0.0 for source in self.sources)
        if self.temperature == 1:  # whole numbers, the same on every machine
            return tuple(float(count) for count in tokens)
        # Relative to the largest, so that no power overflows.
        return tuple((count / max(tokens)) ** (1 / self.temperature) for count in tokens)

    def documents(self, split: str) -> Iterator[str]:
        """Yields the documents of one split, source by source, whatever the weights.

        Raises:
          ValueError: a source has a vocabulary of its own.
        """
        for name in self.names:
            yield from self.source_documents(name, split)

    def source_documents(self, name: str, split: str) -> Iterator[str]:
        """The documents of one split of one source.

        Raises:
          ValueError: it has a vocabulary of its own, so its texts are not known.
        """
        found = self.sources[self.names.index(name)].corpus
        if isinstance(found, SeqioTask):
            raise ValueError(
                f"Source {name!r} is a SeqioTask, which has its own vocabulary: name the same one as "
                "DataConfig.vocabulary, with @Pretrained()."
            )
        corpus: TextCorpus = found  # type: ignore[assignment]  # every other corpus has documents
        return corpus.documents(split)

    def digest(self, of: Callable[[Corpus], str] | None = None) -> str:
        """The sha256 over the names and digests of the sources, without their weights.

        Args:
          of: gives the digest of a source's corpus; None: the corpus itself does.
        """
        of = of or (lambda corpus: corpus.digest())
        return sha256_json(["Mixture", {source.name: of(source.corpus) for source in self.sources}])

    def describe(self) -> dict[str, Any]:
        """The kind and fields of the mixture, with the description of each corpus."""
        sources = [{**as_dict(source), "corpus": source.corpus.describe()} for source in self.sources]
        return {"kind": "Mixture", "temperature": self.temperature, "sources": sources}
