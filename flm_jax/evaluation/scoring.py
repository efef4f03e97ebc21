"""Log-probabilities of text: windows of tokens, in batches of a few shapes, and bits a byte of any text."""

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
from flm_jax.sharding import put_batch, replicated

# Logits that are whole in memory at once, on all devices; half a gigabyte of them.
LOGITS_AT_ONCE = 2**27
# A batch's rows have the length of the next bucket: so many positions, times a power of two.
SHORTEST, SHORTEST_IN_BLOCKS = 16, 128


class Window(NamedTuple):
    """Tokens to predict, and those that they follow, at least one; both int."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """The log-probability of a continuation, in nats, and whether each of its tokens is the likeliest."""

    log_prob: float
    greedy: bool


class Scorer:
    """Scores windows with one model on one mesh; also what generates for `flm_jax.evaluation.lm_eval_model`.

    Attributes:
      context: the most tokens that the model reads at once.
      rows: of a batch: what was asked for, made a multiple of what the mesh splits batches over.
    """

    def __init__(
        self, cfg: ModelConfig, params: Params, mesh: Mesh, context: int, rows: int = 8, masks: Masks | None = None
    ) -> None:
        """Takes a model.

        Args:
          cfg: the model.
          params: its parameters, where they live on `mesh`.
          mesh: of devices.
          context: the most tokens that the model reads at once; of longer windows, the last.
          rows: of a batch, about.
          masks: growth masks, during their ramp.

        Raises:
          ValueError: a context or rows below 1.
        """
        if context < 1 or rows < 1:
            raise ValueError(f"context={context} and rows={rows}: a window has at least 1 token, a batch 1 row.")
        self.cfg, self.params, self.mesh, self.context, self.masks = cfg, params, mesh, context, masks
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.rows = -(-rows // shards) * shards
        # Kernels that cut the window up want blocks; a mesh that splits positions wants its share of each.
        self._unit = (SHORTEST_IN_BLOCKS if cfg.attention in ("splash", "auto") else SHORTEST) * mesh.shape["sequence"]
        self._program = jax.jit(
            functools.partial(_score, cfg), static_argnames="chunks", out_shardings=replicated(mesh)
        )

    def bucket(self, length: int) -> int:
        """The length that rows of so many tokens are filled up to; few lengths mean few programs."""
        size = self._unit
        while size < length:
            size *= 2
        return min(size, -(-max(self.context, length) // self._unit) * self._unit)

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of rows, batch by batch, the longest first."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self.rows):
            yield order[start : start + self.rows]

    def score(self, windows: Sequence[Window], told: Callable[[int], object] = lambda _: None) -> list[Score]:
        """The score of each window, in their order. Of a context that is too long, the beginning is left out.

        Args:
          windows: what to score.
          told: is called with the number of windows that each batch has scored.

        Raises:
          ValueError: a window without context, or without continuation or with one longer than the model reads.
        """
        for context, continuation in windows:
            if not context or not 0 < len(continuation) <= self.context:
                raise ValueError(
                    f"a window has {len(context)} tokens of context and {len(continuation)} to predict: it needs 1 or "
                    f"more of both, and predicts at most the {self.context} that the model reads at once."
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
    """Log-probabilities, (B,), of the targets whose weight is 1, and whether all of these are likeliest, (B,) bool."""
    model = Transformer(cfg)
    # Rows are filled up at their ends, which nothing before them sees.
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
    """Checks that the model has a row for every id.

    Raises:
      ValueError: it has not.
    """
    if vocabulary.size > vocab:
        raise ValueError(
            f"The tokenizer has {vocabulary.size} ids, and the model only {vocab}: it is not this model's."
        )


def rolling_windows(tokens: Sequence[int], prefix_id: int, context: int) -> list[Window]:
    """Windows that predict every token exactly once, `context` at a time, as lm-eval's rolling log-likelihood has them.

    The first token follows the prefix alone; each window then follows the last token of the one before, and the last
    window, which predicts the rest, all that fits.
    """
    windows = []
    for start in range(0, len(tokens), context):
        end = min(start + context, len(tokens))
        before = tokens[max(0, end - context - 1) : start] if start else [prefix_id]
        windows.append(Window(before, tokens[start:end]))
    return windows


class TextScore(NamedTuple):
    """What a model makes of texts.

    Attributes:
      documents: how many.
      tokens: how many were predicted.
      bytes: of UTF-8.
      nats: minus the log-probability of them all.
    """

    documents: int
    tokens: int
    bytes: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of UTF-8: the same measure for every tokenizer."""
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
) -> TextScore:
    """Scores whole documents: each by itself, after the vocabulary's prefix token, in windows `context` apart.

    Every token of the text is predicted once, and nothing else is: no end of the document, and no token that the
    tokenizer would put before a text. Where it puts one, lm-eval's `loglikelihood_rolling` predicts that too, after the
    prefix; everywhere else the two sums are the same.

    Args:
      cfg: the model.
      params: its parameters, where they live on `mesh`.
      vocabulary: what tokenises.
      texts: one document each; empty ones are left out.
      context: the most tokens that the model reads at once.
      mesh: of devices.
      rows: of a batch, about.
      masks: growth masks, during their ramp.

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
            waiting = []
    nats -= sum(score.log_prob for score in scorer.score(waiting))
    if not tokens:
        raise ValueError("there is no text to take bits a byte of: every document is empty.")
    return TextScore(documents, tokens, text_bytes, nats)
