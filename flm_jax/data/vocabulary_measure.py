"""What vocabularies make of text, by source: bytes per token, tokens per word, partial characters, exactness, speed."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flm_jax.data.corpora import Corpus, SeqioTask, TextCorpus
from flm_jax.data.mixture import Mixture
from flm_jax.data.sentencepiece_training import chunks, sample
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.records import counted

# A document of more characters is measured in parts: encoding takes many bytes of memory per character.
PART = 1 << 16
# A corpus that is no mixture is one source of this name.
ALONE = "text"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a vocabulary makes of some texts.

    Attributes:
      texts: their number.
      bytes: of their UTF-8.
      characters: Unicode code points.
      words: parts between white space; in a language without spaces these are no words.
      tokens: without the end of each document.
      partial: tokens that stand for no whole character, such as bytes of one without a token, or for an unknown one.
      exact: texts that decode to themselves.
      seconds: processor time of encoding.
    """

    texts: int
    bytes: int
    characters: int
    words: int
    tokens: int
    partial: int
    exact: int
    seconds: float

    @property
    def ratios(self) -> dict[str, float]:
        """What is shown of it, by name; see `ROWS`."""
        return {
            "bytes_per_token": self.bytes / self.tokens,
            "tokens_per_word": self.tokens / max(self.words, 1),
            "tokens_per_character": self.tokens / self.characters,
            "partial": self.partial / self.tokens,
            "exact": self.exact / self.texts,
            "megabytes_per_second": self.bytes / 1e6 / max(self.seconds, 1e-9),
        }

    def record(self) -> dict[str, Any]:
        """Counts and ratios, JSON-able."""
        return {**dataclasses.asdict(self), **self.ratios}


# The tables of `measurements_text`: name of the ratio, title, format.
ROWS = {
    "bytes_per_token": ("Bytes per token", "{:.3f}"),
    "tokens_per_word": ("Tokens per word (between white space)", "{:.3f}"),
    "tokens_per_character": ("Tokens per character", "{:.3f}"),
    "partial": ("Tokens that are parts of characters, or unknown", "{:.2%}"),
    "exact": ("Texts that come back exactly", "{:.1%}"),
    "megabytes_per_second": ("Encoding, MB per second of processor time", "{:.2f}"),
}


def sources(corpus: Corpus) -> dict[str, TextCorpus]:
    """The sources of a mixture by name; any other corpus is one.

    Raises:
      ValueError: one of them has its own vocabulary, so its texts are not known.
    """
    named = {s.name: s.corpus for s in corpus.sources} if isinstance(corpus, Mixture) else {ALONE: corpus}
    found: dict[str, TextCorpus] = {}
    for name, own in named.items():
        if isinstance(own, SeqioTask):
            raise ValueError(
                f"Source {name!r} is a SeqioTask, whose texts come as tokens of its own vocabulary: leave it out."
            )
        found[name] = own  # type: ignore[assignment]  # every other corpus has documents
    return found


def heldout_texts(name: str, corpus: TextCorpus, most: int, seed: int = 0) -> list[str]:
    """Held-out documents of a source, chosen by hash, in their order; long ones in parts.

    Args:
      name: of the source, for errors.
      corpus: the source.
      most: bytes of text in all; at least one text is taken.
      seed: of the choice.

    Raises:
      ValueError: the source has no held-out text.
    """
    found = sample(chunks(corpus.documents("heldout"), PART), most, seed)
    if not found:
        raise ValueError(
            f"Source {name!r} has no held-out text to measure on: give it at least two documents, or raise its "
            "heldout_percent."
        )
    return found


def measure(vocabulary: Vocabulary, texts: Sequence[str]) -> Measured:
    """Encodes and decodes some texts, of which there must be at least one that is not empty."""
    vocabulary.encode(texts[0][:100])  # what is loaded at the first use is not timed
    began = time.process_time()
    encoded = [vocabulary.encode(text) for text in texts]
    seconds = time.process_time() - began
    counts = collections.Counter(number for ids in encoded for number in ids)
    return Measured(
        texts=len(texts),
        bytes=sum(len(text.encode()) for text in texts),
        characters=sum(map(len, texts)),
        words=sum(len(text.split()) for text in texts),
        tokens=sum(counts.values()),
        partial=sum(count for number, count in counts.items() if vocabulary.is_partial(number)),
        exact=sum(vocabulary.decode(ids) == text for ids, text in zip(encoded, texts, strict=True)),
        seconds=seconds,
    )


def measure_all(
    vocabularies: Mapping[str, Vocabulary],
    corpus: Corpus,
    most: int,
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, dict[str, Measured]]:
    """What each vocabulary makes of held-out text of each source: by source, then by the vocabulary's name.

    Args:
      vocabularies: by name.
      corpus: a mixture or any other corpus.
      most: bytes of text of each source.
      say: called with a sentence before each source.

    Raises:
      ValueError, FileNotFoundError: a source cannot be read, or has no held-out text; the message names it.
    """
    found = {}
    for name, own in sources(corpus).items():
        try:
            texts = heldout_texts(name, own, most)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"Source {name!r}: {error}") from error
        say(f"{name}: {counted(len(texts), 'text')}, {counted(sum(len(t.encode()) for t in texts), 'byte')}")
        found[name] = {about: measure(vocabulary, texts) for about, vocabulary in vocabularies.items()}
    return found


def mean_by_weight(corpus: Corpus, ratios: Mapping[str, float]) -> float | None:
    """The mean of a ratio per token over the sources of a mixture, by their weights; None where it has none."""
    if not isinstance(corpus, Mixture) or corpus.sources[0].weight is None:
        return None
    weights = dict(zip(corpus.names, corpus.weights_by_size(()), strict=True))
    return sum(weights[name] * ratio for name, ratio in ratios.items()) / sum(weights.values())


def measurements_text(found: Mapping[str, Mapping[str, Measured]], corpus: Corpus) -> str:
    """The measurements of `measure_all` as tables: a row per source, a column per vocabulary, which are numbered."""
    names = list(next(iter(found.values())))
    lines = []
    for key, (title, form) in ROWS.items():
        rows = [[source, *(form.format(own[name].ratios[key]) for name in names)] for source, own in found.items()]
        if key == "bytes_per_token":
            means = [mean_by_weight(corpus, {s: own[name].ratios[key] for s, own in found.items()}) for name in names]
            if None not in means:
                rows.append(["by weight", *(form.format(mean) for mean in means)])
        lines += ["", title, *aligned([["", *(f"[{n}]" for n in range(1, len(names) + 1))], *rows])]
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines, the first column flush left, the others flush right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
