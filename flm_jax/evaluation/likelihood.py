"""Likelihoods that a checkpoint gives: of each choice after a question, of an answer to a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flm_jax.chat.conversation import ASSISTANT, ConversationError, Message
from flm_jax.chat.template import ChatEncoder
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.evaluation.scoring import Scorer, Window


def choice_log_probs(
    scorer: Scorer, vocabulary: Vocabulary, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[str]]
) -> list[list[float]]:
    """The log-probability (nats) of each choice's text after its prompt, without what would end the answer.

    Args:
      scorer: the model.
      vocabulary: its vocabulary.
      prompts: token ids of questions, up to where the answer begins; too long ones lose their beginning.
      choices: the texts of each question's choices.
    """
    windows = [
        Window(prompt, vocabulary.encode_plain(text))
        for prompt, texts in zip(prompts, choices, strict=True)
        for text in texts
    ]
    scores = iter(scorer.score(windows))
    return [[next(scores).log_prob for _ in texts] for texts in choices]


def mean_log_probs(
    scorer: Scorer,
    encoder: ChatEncoder,
    answered: Sequence[tuple[Sequence[Message], str]],
    told: Callable[[int], object] = lambda _: None,
) -> list[float | str]:
    """The mean log-probability (nats) per token of each answer and of what ends it, or why there is none.

    Args:
      scorer: the model that judges.
      encoder: its template and vocabulary.
      answered: questions as conversations, and an answer to each.
      told: called with numbers of answers, once they are scored.
    """
    windows: list[Window] = []
    found: list[float | str] = []
    for messages, answer in answered:
        try:
            encoded = encoder.encode([*messages, Message(ASSISTANT, answer)], "last")
        except ConversationError as error:
            found.append(error.reason)
            continue
        begin = int(np.argmax(encoded.weights))
        end = begin + int(encoded.weights.sum())
        if end - 1 > scorer.context:
            found.append("longer than the judge reads")
            continue
        found.append(float("nan"))
        windows.append(Window(encoded.ids[:begin].tolist(), encoded.ids[begin:end].tolist()))
    scores = iter(scorer.score(windows, told))
    lengths = iter(len(window.continuation) for window in windows)
    return [x if isinstance(x, str) else next(scores).log_prob / next(lengths) for x in found]
