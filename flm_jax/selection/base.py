"""The checkpoint of a selection: losses of answers with and without their prompts, and mean hidden states."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.chat.conversation import Conversation, ConversationError
from flm_jax.chat.template import ChatEncoder, Encoded, find_template
from flm_jax.config import ModelConfig
from flm_jax.data.train_vocabulary import load_vocabulary
from flm_jax.data.vocabulary_files import VocabularyError
from flm_jax.evaluation.loaded import find_length, load_model
from flm_jax.evaluation.scoring import Scorer, Window, check_vocabulary
from flm_jax.model import Masks, Params, Transformer
from flm_jax.selection.config import ScoringBase
from flm_jax.sharding import put_batch, replicated
from flm_jax.source_checkpoint import read_source


class Losses(NamedTuple):
    """Losses of answers, float64 (n,), in nats per token; NaN where the template or the length leaves no answer.

    Attributes:
      after_prompt: after what stands before the answer in the conversation.
      alone: after the token that begins a text; NaN if it was not asked for.
    """

    after_prompt: np.ndarray
    alone: np.ndarray


class Base:
    """A checkpoint that reads conversations.

    Attributes:
      digest: of its state and its vocabulary.
      scorer: its model, on a mesh.
    """

    def __init__(self, config: ScoringBase) -> None:
        """Reads the checkpoint's record; the weights are read when they are first used.

        Raises:
          ValueError: its vocabulary is not known or does not fit the model.
          CheckpointError: there is no checkpoint.
          TemplateError: the template cannot be used.
        """
        source, self._config = read_source(config.checkpoint), config
        try:
            vocabulary = load_vocabulary(config.tokenizer) if config.tokenizer else source.vocabulary
        except VocabularyError as error:
            raise VocabularyError(f"{error}, for a selection by ScoringBase.tokenizer") from error
        check_vocabulary(vocabulary, source.cfg.vocab)
        self.encoder = ChatEncoder(find_template(config.template, vocabulary), vocabulary)
        self.context = config.max_length or find_length(source)
        self.digest = f"{source.digest} {vocabulary.digest}"

    @functools.cached_property
    def scorer(self) -> Scorer:
        """The model with its weights.

        Raises:
          DamagedError: they are not as they were saved.
        """
        c = self._config
        return load_model(c.checkpoint, c.tokenizer or None, self.context, c.dtype or None, c.mesh).scorer(c.rows)

    def encode(self, conversation: Conversation) -> Encoded | None:
        """A conversation as tokens, cut to what the model reads; None if the template refuses it."""
        try:
            found = self.encoder.encode(conversation.messages, where=conversation.where)
        except ConversationError:
            return None
        length = self.context + 1
        return Encoded(found.ids[:length], found.weights[:length], found.text_bytes)

    def losses(self, conversations: Sequence[Conversation], alone: bool = True) -> Losses:
        """The losses of answers, each turn's with all turns before it.

        Args:
          conversations: what to score.
          alone: whether the answers are scored without their prompts too.
        """
        prefix = self.encoder.vocabulary.special.prefix_id
        windows: list[Window] = []
        owners: list[int] = []
        for number, conversation in enumerate(conversations):
            encoded = self.encode(conversation)
            for start, end in () if encoded is None else _runs(encoded.weights):
                assert encoded is not None
                ids = encoded.ids.tolist()
                windows.append(Window(ids[:start] or [prefix], ids[start:end]))
                owners.append(number)
        if alone:
            windows += [Window([prefix], window.continuation) for window in windows]
        nats = np.array([-score.log_prob for score in self.scorer.score(windows)])
        tokens = np.bincount(owners, [len(w.continuation) for w in windows[: len(owners)]], len(conversations))

        def mean(part: np.ndarray) -> np.ndarray:
            with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: there is no answer
                found: np.ndarray = np.bincount(owners, part, len(conversations)) / tokens
            return found

        count = len(owners)
        return Losses(mean(nats[:count]), mean(nats[count:]) if alone else np.full(len(conversations), np.nan))

    def hidden(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """float32 (n, D): the mean over positions of the last hidden states; NaN where the template refuses."""
        scorer = self.scorer
        program = _hidden_program(scorer.cfg, replicated(scorer.mesh))
        encoded = [self.encode(conversation) for conversation in conversations]
        rows = [[] if one is None else one.ids[: self.context].tolist() for one in encoded]
        found = np.full((len(rows), scorer.cfg.embed), np.nan, np.float32)
        for numbers in scorer.batches([len(row) for row in rows]):
            shape = (scorer.rows, scorer.bucket(max(len(rows[numbers[0]]), 1)))
            tokens_BT, real_BT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
            for place, number in enumerate(numbers):
                tokens_BT[place, : len(rows[number])], real_BT[place, : len(rows[number])] = rows[number], 1
            batch = put_batch((tokens_BT, real_BT), scorer.mesh)
            with jax.set_mesh(scorer.mesh):
                mean_BD = jax.device_get(program(scorer.params, *batch, scorer.masks))
            for place, number in enumerate(numbers):
                if rows[number]:
                    found[number] = mean_BD[place]
        return found


def _runs(weights: np.ndarray) -> list[tuple[int, int]]:
    """Where runs of tokens with weight begin and end."""
    steps = np.diff(np.concatenate([[0], weights.astype(np.int8), [0]]))
    return list(zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True))


@functools.lru_cache(4)
def _hidden_program(cfg: ModelConfig, sharding: jax.sharding.Sharding) -> jax.stages.Wrapped:
    """The jitted mean of hidden states over real positions, (B, D) in float32."""

    def mean(params: Params, tokens_BT: jax.Array, real_BT: jax.Array, masks: Masks | None) -> jax.Array:
        x_BTD, _ = Transformer(cfg).apply({"params": params}, tokens_BT, None, masks, method="hidden")
        sums_BD = jnp.einsum("BTD,BT->BD", x_BTD.astype(jnp.float32), real_BT)
        return sums_BD / jnp.maximum(jnp.sum(real_BT, axis=1, keepdims=True), 1)

    return jax.jit(mean, out_shardings=sharding)
