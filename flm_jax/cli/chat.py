"""What `generate.py --chat` does: prompts as turns of a conversation, and a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flm_jax.chat.conversation import ASSISTANT, SYSTEM, USER, ConversationError, Message, parse
from flm_jax.chat.session import Session, talk
from flm_jax.chat.template import ChatEncoder
from flm_jax.generation import Generator, Sampling
from flm_jax.generation.prompts import Asking
from flm_jax.records import counted
from flm_jax.records.foreign_json import field

PROMPT = "> "
# Recalled of the chats of Tele-FLM, not confirmed; its sibling TeleChat-52B has 1.02 (docs/facts.md).
SAMPLING = Sampling(repetition_penalty=1.03)


def in_conversation(encoder: ChatEncoder, system: str, stops: Sequence[str]) -> Asking:
    """How a prompt is asked as a user's turn, or at the end of the turns in its field "messages".

    Args:
      encoder: the template and the vocabulary.
      system: the system turn where a prompt has none; '': none.
      stops: texts that end an answer, besides what ends it in the template.
    """

    def ids(record: Mapping[str, Any]) -> list[int]:
        where = "the conversation"
        if "messages" in record:
            given = field(record, "messages", list, where)
            if given and isinstance(given[-1], dict) and given[-1].get("role") == ASSISTANT:
                raise ConversationError(
                    where, "roles out of order", "the last turn is the assistant's and should be the user's"
                )
            # With an answer at its end it is a conversation, whose form is checked elsewhere.
            whole = parse({"messages": [*given, {"role": ASSISTANT, "content": "an answer"}]}, where)
            turns = list(whole.messages[:-1])
        else:
            turns = [Message(USER, record["prompt"])]
        if system and turns[0].role != SYSTEM:
            turns = [Message(SYSTEM, system), *turns]
        return encoder.prompt(turns, where)

    return Asking(ids, encoder.stop_ids, (*encoder.stop_texts, *stops), "\n")


def hold(
    generator: Generator,
    encoder: ChatEncoder,
    context: int,
    tokens: int,
    sampling: Sampling,
    stops: Sequence[str],
    system: str,
) -> None:
    """Holds a conversation on stdin and stdout until it ends; /help lists its commands.

    Answers as long as the context would leave no room for a question: they then get half of it, and stderr says so.
    """
    if tokens >= context:
        tokens = context // 2
        print(
            f"Answers end after {counted(tokens, 'token')}, half of the context; --max_tokens sets this.",
            file=sys.stderr,
        )
    asking = in_conversation(encoder, system, stops)
    answered = 0

    def answer(prompt: list[int]) -> Iterator[str]:
        nonlocal answered
        answered += 1  # another number, so that a question that is asked again may get another answer
        for piece in generator.stream(prompt, sampling, tokens, asking.stops, asking.ends, answered):
            yield piece.text

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    session = Session(encoder, answer, context, tokens, system)
    talk(session, _lines(), write, lambda: f"[{generator.speed}]\n")


def _lines() -> Iterator[str]:
    """Yields what is typed; in a terminal after a prompt, with the editing that the system's readline gives."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - `input` uses it once it is imported
    print("/help lists the commands, /quit ends.", file=sys.stderr)
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return
