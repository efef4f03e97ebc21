"""SentencePiece vocabularies: the sample of text that one is trained on, and the training.

Everything here is deterministic: the sample of chunks is chosen by hash, not at random; the trainer runs on one thread
(the model file records the number of threads, and one is enough: 8 MB take two seconds).
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from flm_jax.data.corpora import Corpus, TextCorpus
from flm_jax.data.mixture import Mixture
from flm_jax.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from flm_jax.records import counted, recorded
from flm_jax.records.fields import NonNegative, Seed, Size, at_least

CHUNK = 2048  # characters given to the trainer at once: several lines, so that it sees newlines


@dataclasses.dataclass(frozen=True)
@recorded
class SentencePiece:
    """A BPE vocabulary trained on the training split.

    Attributes:
      size: number of ids, including the 3 special ones and the 256 bytes.
      sample_bytes: how many bytes of text the trainer sees at most; 8 MB take about 2 s on one core.
      source_weights: of a `Mixture`, how many bytes the sample holds of each source by name, in proportion; a source
        that is not named has none. None: the weights of the mixture.
      seed: of the sample.
    """

    size: Annotated[int, at_least(260)] = 2048
    sample_bytes: Size = 8_000_000
    source_weights: Mapping[str, NonNegative] | None = None
    seed: Seed = 0

    def check(self, corpus: Corpus) -> None:
        """Refuses weights of sources that the corpus does not have.

        Raises:
          ValueError: so it is.
        """
        if self.source_weights is None:
            return
        if not isinstance(corpus, Mixture):
            raise ValueError(
                f"SentencePiece.source_weights are those of a Mixture, and the corpus is a {type(corpus).__name__}; "
                "leave them out."
            )
        _weights(self, corpus)

    @property
    def decides(self) -> dict[str, Any]:
        """The fields that a vocabulary follows from, JSON-able; without those that have what was once the only value.

        The weights of sources stand in `shares`.
        """
        return {"size": self.size, "sample_bytes": self.sample_bytes, **({"seed": self.seed} if self.seed else {})}

    def shares(self, mixture: Mixture) -> dict[str, float] | float:
        """The share of each source of a mixture in the sample, or its temperature, if shares follow from sizes.

        Raises:
          ValueError: `source_weights` name another source, or are all 0.
        """
        if self.source_weights is not None:
            weights = _weights(self, mixture)
        elif mixture.sources[0].weight is None:
            return mixture.temperature
        else:
            weights = mixture.weights_by_size(())
        return {name: weight / sum(weights) for name, weight in zip(mixture.names, weights, strict=True)}


def _weights(config: SentencePiece, mixture: Mixture) -> tuple[float, ...]:
    try:
        return mixture.weights(config.source_weights or {})
    except ValueError as error:
        raise ValueError(f"SentencePiece.source_weights: {error}") from None


def chunks(documents: Iterable[str], limit: int = CHUNK) -> Iterator[str]:
    """Cuts documents into pieces of at most `limit` characters, at line ends if possible."""
    for document in documents:
        start = 0
        while start < len(document):
            end = min(start + limit, len(document))
            if end < len(document):
                end = document.rfind("\n", start, end) + 1 or end
            yield document[start:end]
            start = end


def sample(pieces: Iterable[str], sample_bytes: int, seed: int = 0) -> list[str]:
    """Whole pieces chosen by the hash of their number, up to `sample_bytes` of UTF-8 in all, in their order.

    At least one is chosen, if there is any. It takes one pass, with no more than the sample in memory: when the heap is
    full, it drops the largest hash.
    """
    heap: list[tuple[int, int, str, int]] = []
    total, salt = 0, seed.to_bytes(8, "little", signed=True)
    for number, piece in enumerate(pieces):
        hashed = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8, salt=salt).digest()
        length = len(piece.encode())
        heapq.heappush(heap, (-int.from_bytes(hashed, "little"), number, piece, length))
        total += length
        while total > sample_bytes and len(heap) > 1:
            total -= heapq.heappop(heap)[3]
    return [piece for _, _, piece, _ in sorted(heap, key=lambda entry: entry[1])]


def draw(config: SentencePiece, corpus: TextCorpus) -> tuple[list[str], dict[str, dict[str, int]]]:
    """The pieces of training text to train on, and of each source of a mixture how many bytes it has, and gave.

    Of a mixture, each source gives bytes in proportion to its weight (weights are shares of windows, so of tokens: this
    is nearly the same), at least one piece if it has a weight. One that has less than its part gives all that it has,
    once, and the rest of its part goes to the others, in proportion to their weights. Texts are read twice.

    Raises:
      ValueError: a source has its own vocabulary.
    """
    if not isinstance(corpus, Mixture):
        return sample(chunks(corpus.documents("train")), config.sample_bytes, config.seed), {}
    sizes = [sum(len(text.encode()) for text in corpus.source_documents(name, "train")) for name in corpus.names]
    weights = corpus.weights_by_size(sizes) if config.source_weights is None else _weights(config, corpus)
    pieces, drawn = [], {}
    for name, size, most in zip(corpus.names, sizes, parts(sizes, weights, config.sample_bytes), strict=True):
        own = sample(chunks(corpus.source_documents(name, "train")), most, config.seed) if most else []
        pieces += own
        drawn[name] = {"bytes": size, "drawn": sum(len(piece.encode()) for piece in own)}
    return pieces, drawn


def parts(sizes: Sequence[int], weights: Sequence[float], most: int) -> list[int]:
    """How many bytes each source gives: `most` in all, in proportion to weights, and of none more than its size."""
    left, given = most, [0] * len(sizes)
    hungry = {k for k, weight in enumerate(weights) if weight > 0 and sizes[k]}
    while hungry:
        total = sum(weights[k] for k in hungry)
        asked = {k: left * weights[k] / total for k in hungry}
        small = {k for k in hungry if sizes[k] <= asked[k]}
        for k in small or hungry:
            given[k] = sizes[k] if small else max(int(asked[k]), 1)
        if not small:
            break
        left -= sum(sizes[k] for k in small)
        hungry -= small
    return given


def train(config: SentencePiece, documents: Iterable[str]) -> bytes:
    """Trains SentencePiece BPE; the same documents and config give the same bytes.

    Text is taken as it is: there is no normalisation, no spaces are added or removed, runs of spaces (indentation) may
    become one piece, and digits stay separate. Newlines merge with the punctuation before them; a tab, which no piece
    may contain, is encoded as its byte.

    Args:
      config: its size.
      documents: all the text to train on, such as the pieces of `draw`.

    Returns:
      The model file.

    Raises:
      ValueError: there is no text, or the size is too large for the text or too small for the bytes.
    """
    import sentencepiece

    pieces = list(chunks(documents))
    if not any(map(str.strip, pieces)):
        raise ValueError("there is no training text to train a vocabulary on")
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=writer,
            model_type="bpe",
            vocab_size=config.size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            max_sentence_length=8 * CHUNK,  # bytes: a chunk of 4-byte characters is not skipped
            input_sentence_size=0,  # all of it: the sample was chosen above
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        said = f"no SentencePiece vocabulary of {config.size} ids from {counted(sum(map(len, pieces)), 'character')}"
        if most := re.search(r"set it to a value <= (\d+)", str(error)):
            raise ValueError(
                f"{said}: this sample supports at most {most[1]}; lower SentencePiece.size, or give more text "
                f"(SentencePiece.sample_bytes is {config.sample_bytes:,})"
            ) from None
        if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise ValueError(
                f"{said}: it holds 3 special ids, 256 bytes and the characters first, which are {least[1]} together; "
                "raise SentencePiece.size to at least that"
            ) from None
        raise ValueError(f"{said}: {error}") from None
    return writer.getvalue()
