"""Conversations, read from JSON lines in the three formats that instruction data comes in.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    {"instruction": "...", "input": "...", "output": "..."}

These are those of OpenAI, ShareGPT and Alpaca. Each line is recognised by itself, so that a file may mix them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flm_jax.data.json_lines import LineError, Skipped, is_text, parse_object, read_lines

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT)
# What other programs call the three roles.
_ALIASES = {
    **{name: SYSTEM for name in ("system", "developer")},
    **{name: USER for name in ("user", "human")},
    **{name: ASSISTANT for name in ("assistant", "gpt", "chatgpt", "bot", "model")},
}


class ConversationError(LineError):
    """A line is no conversation that can be trained on; the message names file and line."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
      role: 'system', 'user' or 'assistant'.
      content: its text.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages in order: perhaps one of the system, then those of user and assistant in turn, an answer last.

    Attributes:
      messages: at least a question and its answer.
      where: file:line.
      fields: the line's other fields, such as 'id' or 'domain'.
    """

    messages: tuple[Message, ...]
    where: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def answers(self) -> tuple[str, ...]:
        """What the assistant says, turn by turn."""
        return tuple(m.content for m in self.messages if m.role == ASSISTANT)

    def record(self) -> dict[str, Any]:
        """The conversation in OpenAI's format, with its other fields; `parse` reads it back."""
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
        return {**self.fields, "messages": messages}

    def line(self) -> str:
        """The record as a line of JSON, line end included."""
        return json.dumps(self.record(), ensure_ascii=False) + "\n"


def parse(record: Mapping[str, Any], where: str) -> Conversation:
    """The conversation in a record of any of the three formats.

    Args:
      record: the JSON object of a line.
      where: file:line.

    Raises:
      ConversationError: it is none of the formats, or has no answer, an empty turn, or roles out of order.
    """
    if "messages" in record:
        key, turns = "messages", _turns(record, "messages", "role", "content", where)
    elif "conversations" in record:
        key, turns = "conversations", _turns(record, "conversations", "from", "value", where)
    elif "instruction" in record and "output" in record:
        key, turns = "", _alpaca(record, where)
    else:
        raise ConversationError(
            where,
            "no conversation",
            f"the fields are {sorted(map(str, record))}; known are messages (role, content), conversations (from, "
            "value) and instruction, input, output",
        )
    if key == "conversations" and isinstance(system := record.get("system"), str) and system.strip():
        turns = [Message(SYSTEM, system), *turns]
    check_order(turns, where)
    used = {"messages"} if key == "messages" else {"conversations", "system"} if key else _ALPACA
    return Conversation(tuple(turns), where, {name: value for name, value in record.items() if name not in used})


def check_order(messages: Sequence[Message], where: str) -> None:
    """Checks the order of the roles, and that no turn is empty.

    Raises:
      ConversationError: names the turn.
    """
    if not any(m.role == ASSISTANT for m in messages):
        raise ConversationError(where, "no answer", "no turn is the assistant's")
    turns = messages[1:] if messages[0].role == SYSTEM else messages
    for number, message in enumerate(turns):
        wanted = (USER, ASSISTANT)[number % 2]
        if message.role != wanted:
            raise ConversationError(
                where, "roles out of order", f"turn {number + 1} is the {message.role}'s and should be the {wanted}'s"
            )
    for number, message in enumerate(messages):
        if not message.content.strip():
            raise ConversationError(where, "empty turn", f"message {number + 1}, the {message.role}'s, has no text")
    if messages[-1].role != ASSISTANT:
        raise ConversationError(where, "no answer", "the last turn is the user's")


def _turns(record: Mapping[str, Any], key: str, role: str, content: str, where: str) -> list[Message]:
    entries = record[key]
    if not isinstance(entries, list) or not entries:
        raise ConversationError(where, "no conversation", f"{key!r} must be a list of turns, and is {entries!r:.40}")
    found = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or role not in entry or content not in entry:
            raise ConversationError(
                where, "no conversation", f"turn {number} of {key!r} must have {role!r} and {content!r}"
            )
        name = entry[role]
        if not isinstance(name, str) or name.lower() not in _ALIASES:
            raise ConversationError(where, "unknown role", f"turn {number} is of {name!r:.40}; known: {ROLES}")
        found.append(Message(_ALIASES[name.lower()], _text(entry[content], f"turn {number}", where)))
    return found


_ALPACA = {"instruction", "input", "output", "system", "history"}


def _alpaca(record: Mapping[str, Any], where: str) -> list[Message]:
    text = {key: _text(record.get(key) or "", key, where) for key in ("system", "instruction", "input", "output")}
    turns = [Message(SYSTEM, text["system"])] if text["system"].strip() else []
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ConversationError(where, "no conversation", "'history' must be a list of pairs of question and answer")
    for question, answer in history:
        turns += [Message(USER, _text(question, "history", where)), Message(ASSISTANT, _text(answer, "history", where))]
    question = "\n\n".join(part for part in (text["instruction"], text["input"]) if part.strip())
    return [*turns, Message(USER, question), Message(ASSISTANT, text["output"])]


def _text(value: Any, what: str, where: str) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ConversationError(where, "no text", f"{what} is {type(value).__name__}, and only text is read")
    if not is_text(value):
        raise ConversationError(where, "no text", f"{what} holds half of a surrogate pair")
    return value


def parse_line(line: bytes, where: str) -> Conversation:
    """The conversation on a line.

    Raises:
      LineError: the line is no JSON object, or as `parse`.
    """
    return parse(parse_object(line, where), where)


def read_conversations(path: str | Path, skipped: Skipped) -> Iterator[Conversation]:
    """Yields the conversations of a file or folder in order; faulty lines are counted in `skipped`.

    Raises:
      FileNotFoundError: there is no such file or folder, or the folder holds no JSON lines.
      LineError: more lines are faulty than `skipped` allows, or a file is damaged.
    """
    for where, line in read_lines(path):
        try:
            found = parse_line(line, where)
        except LineError as error:
            skipped.add(error)
            continue
        yield found
