"""Log-probabilities of token windows, in batches of a few shapes, and bits per byte of any text."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flm_jax.config import ModelConfig
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.loss import cross_entropy
from flm_jax.model import Masks, Params, Transformer
from flm_jax.records import counted
from flm_jax.sharding import put_batch, replicated

# Bound on the number of logits in memory at a time, on all devices together; in float32, half a gigabyte.
LOGITS_AT_ONCE = 2**27
# The rows of a batch are padded to a bucket length: this number of positions times a power of two. The second number is
# for kernels that work on blocks of positions.
SHORTEST, SHORTEST_IN_BLOCKS = 16, 128


class Window(NamedTuple):
    """Token ids: a context of at least one token, and the continuation to predict."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """The log-probability of a continuation, in nats, and whether greedy decoding would produce it."""

    log_prob: float
    greedy: bool


class Scorer:
    """A model on a mesh that scores windows of tokens; `flm_jax.generation` generates.

    Attributes:
      context: the longest sequence that the model reads, in tokens.
      rows: rows per batch: the number that was asked for, rounded up to a multiple of data x fsdp.
    """

    def __init__(
        self, cfg: ModelConfig, params: Params, mesh: Mesh, context: int, rows: int = 8, masks: Masks | None = None
    ) -> None:
        """Wraps a model.

        Args:
          cfg: the model.
          params: its parameters, on `mesh`.
          mesh: the mesh.
          context: the longest sequence that the model reads, in tokens; longer windows keep their last tokens.
          rows: rows per batch; see the attribute.
          masks: growth masks, during their ramp.

        Raises:
          ValueError: `context` or `rows` is below 1.
        """
        if context < 1 or rows < 1:
            raise ValueError(f"context={context} and rows={rows}: both must be at least 1.")
        self.cfg, self.params, self.mesh, self.context, self.masks = cfg, params, mesh, context, masks
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.rows = -(-rows // shards) * shards
        # Splash attention works on blocks of positions, and each device has its own part of the positions.
        self._unit = (SHORTEST_IN_BLOCKS if cfg.attention in ("splash", "auto") else SHORTEST) * mesh.shape["sequence"]
        self._program = jax.jit(
            functools.partial(_score, cfg), static_argnames="chunks", out_shardings=replicated(mesh)
        )

    def bucket(self, length: int) -> int:
        """The length that rows of `length` tokens are padded to; few lengths mean few compiled programs."""
        size = self._unit
        while size < length:
            size *= 2
        return min(size, -(-max(self.context, length) // self._unit) * self._unit)

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """The indices of rows, grouped into batches, the longest rows first."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self.rows):
            yield order[start : start + self.rows]

    def score(self, windows: Sequence[Window], told: Callable[[int], object] = lambda _: None) -> list[Score]:
        """The score of each window, in the given order. A context that is too long loses its beginning.

        Args:
          windows: the windows to score.
          told: called after each batch with its number of windows.

        Raises:
          ValueError: a window has no context, no continuation, or a continuation longer than `context`.
        """
        for context, continuation in windows:
            if not context or not 0 < len(continuation) <= self.context:
                raise ValueError(
                    f"A window has {counted(len(context), 'token')} of context and {len(continuation)} to "
                    "predict: it needs at "
                    f"least 1 of both, and at most {self.context} to predict, the longest sequence that the model "
                    "reads."
                )
        scores: list[Score | None] = [None] * len(windows)
        tails = [list(w.context[-(self.context + 1 - len(w.continuation)) :]) + list(w.continuation) for w in windows]
        for numbers in self.batches([len(tail) for tail in tails]):
            shape = (self.rows, self.bucket(len(tails[numbers[0]]) - 1))
            inputs_BT, targets_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            weights_BT = np.zeros(shape, np.float32)
            for row, number in enumerate(numbers):
                tail, end = tails[number], len(tails[number]) - 1
                inputs_BT[row, :end], targets_BT[row, :end] = tail[:-1], tail[1:]
                weights_BT[row, end - len(windows[number].continuation) : end] = 1
            chunks = next((c for c in (1, 2, 4, 8) if math.prod(shape) * self.cfg.vocab <= LOGITS_AT_ONCE * c), 16)
            batch = put_batch((inputs_BT, targets_BT, weights_BT), self.mesh)
            with jax.set_mesh(self.mesh):
                log_probs_B, greedy_B = jax.device_get(self._program(self.params, *batch, self.masks, chunks=chunks))
            for row, number in enumerate(numbers):
                scores[number] = Score(float(log_probs_B[row]), bool(greedy_B[row]))
            told(len(numbers))
        return [score for score in scores if score is not None]


def _score(
    cfg: ModelConfig,
    params: Params,
    inputs_BT: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    masks: Masks | None,
    *,
    chunks: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the targets whose weight is 1, (B,), and whether all of these are the argmax, (B,) bool."""
    model = Transformer(cfg)
    # Rows are padded at their ends; causal attention keeps earlier positions from seeing the padding.
    x_BTD, _ = model.apply({"params": params}, inputs_BT, None, masks, method="hidden")

    def of_chunk(x_BtD: jax.Array, targets_Bt: jax.Array, weights_Bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BtV: Any = model.apply({"params": params}, x_BtD, method="logits")
        likeliest_Bt = (jnp.argmax(logits_BtV, axis=-1) == targets_Bt) | (weights_Bt == 0)
        return -jnp.sum(cross_entropy(logits_BtV, targets_Bt) * weights_Bt, axis=1), jnp.all(likeliest_Bt, axis=1)

    # Position t goes to chunk t mod chunks, as in `loss_sum`.
    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // chunks, chunks, *x.shape[2:]), 2, 0)

    xs = (split(x_BTD), split(targets_BT), split(weights_BT))
    sums_CB, likeliest_CB = jax.lax.map(lambda parts: of_chunk(*parts), xs)
    return jnp.sum(sums_CB, axis=0), jnp.all(likeliest_CB, axis=0)


def check_vocabulary(vocabulary: Vocabulary, vocab: int) -> None:
    """Checks that the model has an embedding row for every id of the vocabulary.

    Raises:
      ValueError: it has not.
    """
    if vocabulary.size > vocab:
        raise ValueError(
            f"The tokenizer has {vocabulary.size} ids, and the model only {vocab}: it is not this model's tokenizer."
        )


def rolling_windows(tokens: Sequence[int], prefix_id: int, context: int) -> list[Window]:
    """Windows that together predict every token once, `context` tokens each, as in lm-eval's rolling log-likelihood.

    The context of the first window is the prefix token alone, and that of later windows the last token of the window
    before. The last window predicts the tokens that are left, with as much context as fits.
    """
    windows = []
    for start in range(0, len(tokens), context):
        end = min(start + context, len(tokens))
        before = tokens[max(0, end - context - 1) : start] if start else [prefix_id]
        windows.append(Window(before, tokens[start:end]))
    return windows


class TextScore(NamedTuple):
    """The total score of some texts.

    Attributes:
      documents: number of documents.
      tokens: number of tokens that were predicted.
      bytes: length of the texts in bytes of UTF-8.
      nats: minus the sum of the log-probabilities.
    """

    documents: int
    tokens: int
    bytes: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8, which can be compared across tokenizers."""
        return self.nats / math.log(2) / self.bytes


def bits_per_byte_of_text(
    cfg: ModelConfig,
    params: Params,
    vocabulary: Vocabulary,
    texts: Iterable[str],
    context: int,
    mesh: Mesh,
    rows: int = 8,
    masks: Masks | None = None,
    told: Callable[[int], object] = lambda _: None,
) -> TextScore:
    """The score of whole documents, each on its own, after the vocabulary's prefix token, in windows of `context`.

    Every token of the text is predicted once, and no other token: no end of the document, and no token that the
    tokenizer puts before a text. If the tokenizer puts one, lm-eval's `loglikelihood_rolling` predicts it too, after
    the prefix; with all other tokenizers the two sums are equal.

    Args:
      cfg: the model.
      params: its parameters, on `mesh`.
      vocabulary: its vocabulary.
      texts: one document each; empty documents are skipped.
      context: the longest sequence that the model reads, in tokens.
      mesh: the mesh.
      rows: rows per batch, about.
      masks: growth masks, during their ramp.
      told: called with numbers of tokens, once they are scored.

    Raises:
      ValueError: there is no text, or the vocabulary has more ids than the model.
    """
    check_vocabulary(vocabulary, cfg.vocab)
    scorer = Scorer(cfg, params, mesh, context, rows, masks)
    documents = tokens = text_bytes = 0
    nats, waiting = 0.0, []
    for text in texts:
        ids = vocabulary.encode(text)
        documents, tokens, text_bytes = documents + bool(ids), tokens + len(ids), text_bytes + len(text.encode())
        waiting += rolling_windows(ids, vocabulary.special.prefix_id, context)
        if len(waiting) >= 64 * scorer.rows:
            nats -= sum(score.log_prob for score in scorer.score(waiting))
            told(sum(len(window.continuation) for window in waiting))
            waiting = []
    nats -= sum(score.log_prob for score in scorer.score(waiting))
    if not tokens:
        raise ValueError("there is no text to compute bits per byte of: every document is empty.")
    return TextScore(documents, tokens, text_bytes, nats)
