"""Opens the data of a `Mixture`: the token store of each source, and what together they allow."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flm_jax.data.batches import Batch, StageNeed
from flm_jax.data.config import DataConfig
from flm_jax.data.known import digest_of
from flm_jax.data.left_out import LEFT_OUT
from flm_jax.data.mixture import STREAMED, Mixture
from flm_jax.data.mixture_batches import MixtureBatches, Part, heldout_rows
from flm_jax.data.prepare import prepare
from flm_jax.data.store import TokenStore
from flm_jax.data.supply import limit_of, supply, weights_of
from flm_jax.data.train_vocabulary import Pretrained, SentencePiece, VocabularyConfig, build_vocabulary, model_file
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.distributed import print0
from flm_jax.files import sha256_json
from flm_jax.records.foreign_json import check, field


class MixtureData:
    """A mixture in token stores, one for each source."""

    def __init__(self, parts: Sequence[Part], context: int, seed: int, description: Mapping[str, Any]) -> None:
        """Wraps open stores of one vocabulary.

        Args:
          parts: the sources.
          context: tokens per window.
          seed: of the order of windows.
          description: of the mixture, as `Mixture.describe`.
        """
        self.parts, self._context, self._seed, self._description = tuple(parts), context, seed, description

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """See Data."""
        return self.parts[0].store.vocabulary

    @property
    def sources(self) -> dict[str, float]:
        """See Data; over the held-out split of each source."""
        return {part.name: part.store.text_bytes_per_token("heldout") for part in self.parts}

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        """See Data; one per source."""
        return tuple(part.store for part in self.parts)

    @property
    def _shares(self) -> list[float]:
        total = sum(part.weight for part in self.parts)
        return [part.weight / total for part in self.parts]

    @property
    def bytes_per_token(self) -> float:
        """See Data; the mean of the sources in proportion to their weights, as that of the held-out loss."""
        return sum(share * n for share, n in zip(self._shares, self.sources.values(), strict=True))

    @property
    def digest(self) -> str:
        """See Data; of the sources' stores and weights, on which the held-out loss depends, and limits."""
        return sha256_json(["mixture", [(p.name, p.store.digest, p.weight, p.limit) for p in self.parts]])

    def train(self, weights: Mapping[str, float] | None = None) -> MixtureBatches:
        """See Data."""
        return MixtureBatches(self.parts, self._context, self._seed, self._weights(weights))

    def heldout(self, batch_size: int, windows: int) -> Iterator[Batch]:
        """See Data; about as many windows of each source, weighted such that their mean is that of the mixture."""
        return heldout_rows(self.parts, self._context, batch_size, windows)

    def describe(self) -> dict[str, Any]:
        """See Data."""
        first = self.parts[0].store.describe()
        splits = {name: dict.fromkeys(("tokens", "documents", "text_bytes"), 0) for name in first["splits"]}
        sources, templates = {}, []
        for part in self.parts:
            about = part.store.describe()
            for split, counts in about["splits"].items():
                for name in splits[split]:
                    splits[split][name] += counts[name]
            own = {name: about[name] for name in ("digest", "splits")}
            own |= {LEFT_OUT: about["corpus"][LEFT_OUT]} if LEFT_OUT in about["corpus"] else {}
            place = str(part.store.path.absolute())
            if (template := about["corpus"].get("template")) is not None and template not in templates:
                templates.append(template)
            sources[part.name] = {"weight": part.weight, "limit": part.limit, "store": place, **own}
        return {
            "read": "mixture",
            "context": self._context,
            "seed": self._seed,
            "digest": self.digest,
            "splits": splits,
            "vocabulary": first["vocabulary"],
            # Of conversations among the sources; where these have several, none of them is that of the model.
            "corpus": {**self._description, **({"template": templates[0]} if len(templates) == 1 else {})},
            "sources": sources,
        }

    def supply(self, stages: Sequence[StageNeed], begun: bytes | None = None) -> list[str]:
        """See Data."""
        batches = self.train(stages[0].weights)
        if begun is not None:
            batches.restore(begun)
        names, limits = tuple(part.name for part in self.parts), tuple(part.limit for part in self.parts)
        return supply(names, self._weights(None), limits, stages, batches.order, batches.position)

    def _weights(self, given: Mapping[str, float] | None) -> tuple[float, ...]:
        own = tuple(part.weight for part in self.parts)
        return weights_of(tuple(part.name for part in self.parts), own, given)


def open_mixture(config: DataConfig, mixture: Mixture, progress: bool) -> MixtureData:
    """The data of a mixture; prepares the stores of its sources that do not exist.

    Stores do not depend on the mixture: others, and runs on a source alone, use them too, if their vocabulary is the
    same.

    Raises:
      ValueError, FileNotFoundError: as `prepare` for one of the sources, which the message names; or sources have
        different vocabularies.
    """
    if config.streamed:
        raise ValueError(STREAMED)
    trained = _file_of_training(config, mixture)
    trained_now = trained is not None and not trained.is_file()
    vocabulary = mixture_vocabulary(config, mixture)
    stores = []
    for source in mixture.sources:
        try:
            store = prepare(source.corpus, vocabulary, config.cache_dir, progress, config.context, dedup=config.dedup)
            for split in store.splits:
                store.num_windows(split, config.context)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"Source {source.name!r}: {error}") from error
        except ValueError as error:
            raise ValueError(f"Source {source.name!r}: {error}") from error
        stores.append(store)
    _check_vocabularies(mixture.names, stores)
    parts = []
    weights = mixture.weights_by_size([store.num_tokens("train") for store in stores])
    for source, store, weight in zip(mixture.sources, stores, weights, strict=True):
        windows = store.num_windows("train", config.context)
        parts.append(Part(source.name, store, weight, limit_of(source, windows)))
    description = {**mixture.describe(), "digest": digest_of(mixture, config.cache_dir)}
    data = MixtureData(parts, config.context, config.seed, description)
    if trained_now and progress:
        said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in data.sources.items())
        print0(f"A vocabulary of {data.vocabulary.size} ids was trained. Bytes per token of held-out text: {said}.")
    return data


def mixture_vocabulary(config: DataConfig, mixture: Mixture) -> VocabularyConfig:
    """The vocabulary of every source: one that is trained is trained once, on a sample of all of them."""
    file = _file_of_training(config, mixture)
    if file is None:
        return config.tokenised_by
    build_vocabulary(config.tokenised_by, mixture, config.cache_dir)
    # By its content it gives stores their names: other mixtures with this vocabulary share them.
    return Pretrained(str(file))


def _file_of_training(config: DataConfig, mixture: Mixture) -> Path | None:
    """Where the vocabulary that is trained on a mixture is kept; None: it is not trained."""
    named = config.tokenised_by
    return model_file(named, mixture, config.cache_dir) if isinstance(named, SentencePiece) else None


def _check_vocabularies(names: Sequence[str], stores: Sequence[TokenStore]) -> None:
    for name, store in zip(names, stores, strict=True):
        ours, theirs = stores[0].describe()["vocabulary"], store.describe()["vocabulary"]
        if ours["digest"] != theirs["digest"]:
            raise ValueError(
                f"Source {names[0]!r} is tokenised by a {ours['kind']} vocabulary of {ours['size']} ids, {name!r} by "
                f"another, {theirs['kind']} of {theirs['size']}; a mixture has one: name that of the seqio task as "
                "DataConfig.vocabulary, with @Pretrained()."
            )


def recorded_mixture(record: Mapping[str, Any]) -> MixtureData:
    """The data that `MixtureData.describe` recorded, from its token stores, without the texts.

    Raises:
      ValueError, OSError: a store is not there any more or holds other data, or the record is damaged.
    """
    known = dict(record)
    context, parts = field(known, "context", int, "the record"), []
    for name, about in field(known, "sources", dict, "the record").items():
        where = f"the record of the source {name!r}"
        source = check(about, dict, where)
        path, digest = (field(source, key, str, where) for key in ("store", "digest"))
        weight = field(source, "weight", float, where)
        limit = check(source.get("limit"), (int, type(None)), where)
        store = TokenStore.open(path, verify=False)
        if store.digest != digest:
            raise ValueError(f"{path} holds other data than the checkpoint records")
        parts.append(Part(name, store, weight, limit))
    if not parts:
        raise ValueError("the record names no source")
    return MixtureData(parts, context, 0, field(known, "corpus", dict, "the record"))
