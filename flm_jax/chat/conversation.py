"""Conversations, read from JSON lines in the three formats that instruction data comes in.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    {"instruction": "...", "input": "...", "output": "..."}

These are those of OpenAI, ShareGPT and Alpaca. Each line is recognised by itself, so that a file may mix them.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flm_jax.records.foreign_json import JsonError, parse_json

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT)
# What other programs call the three roles.
_ALIASES = {
    **{name: SYSTEM for name in ("system", "developer")},
    **{name: USER for name in ("user", "human")},
    **{name: ASSISTANT for name in ("assistant", "gpt", "chatgpt", "bot", "model")},
}
# The endings of files that hold JSON lines, in the order in which compressed ones are recognised.
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# The largest line that is read; a conversation of a million words has 8 MB.
LINE_BYTES = 32 << 20
_log = logging.getLogger(__name__)


class ConversationError(ValueError):
    """A line is no conversation that can be trained on; the message names file and line.

    Attributes:
      where: file:line.
      reason: the kind of fault, in a few words; faults are counted by it.
      detail: what was found, and what would be right.
    """

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{where}: {reason}{f': {detail}' if detail else ''}")
        self.where, self.reason, self.detail = where, reason, detail

    def __reduce__(self) -> tuple[Any, ...]:  # so that it can pass between processes
        return type(self), (self.where, self.reason, self.detail)


class TooManyError(ConversationError):
    """More lines are faulty than are allowed; the message holds the last fault."""

    def __init__(self, message: str, reason: str) -> None:
        ValueError.__init__(self, message)
        self.reason = reason


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
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud800" is valid JSON, but not text
        raise ConversationError(where, "no text", f"{what} holds half of a surrogate pair") from None
    return value


class Skipped:
    """Counts the lines that are left out, by reason, and stops where they are too many.

    Attributes:
      limit: the most faulty lines; None: any number.
      counts: how many there were of each kind.
      examples: the first few messages of each kind.
    """

    def __init__(self, limit: int | None = 0, examples: int = 3, advice: str = "", quiet: bool = False) -> None:
        """Nothing is left out yet; `advice` says at the limit how to allow more; `quiet`: without log messages."""
        self.limit, self._advice, self._quiet = limit, advice, quiet
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self._kept = examples

    def add(self, error: ConversationError) -> None:
        """Counts a fault; the first of each kind is also logged, unless this is quiet.

        Raises:
          ConversationError: there are more faults than the limit.
        """
        self.counts[error.reason] += 1
        shown = self.examples.setdefault(error.reason, [])
        if len(shown) < self._kept:
            shown.append(str(error))
        total = sum(self.counts.values())
        if self.limit is not None and total > self.limit:
            said = f"{error}; none may be left out{self._advice}"
            if total > 1:
                said = (
                    f"{total} lines are left out, more than the {self.limit} allowed{self._advice}; the last: {error}"
                )
            raise TooManyError(said, error.reason) from error
        if self.counts[error.reason] == 1 and not self._quiet:
            _log.warning("Left out: %s.", error)

    def summary(self) -> str:
        """The counts in words, such as '3 lines left out: 2 empty turn, 1 no answer'; '' without a fault."""
        if not self.counts:
            return ""
        parts = ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common())
        return f"{sum(self.counts.values())} lines left out: {parts}"


def files(path: str | Path) -> list[tuple[str, Path]]:
    """(name, path) of a file of JSON lines, or of each in a folder and its subfolders, sorted by name.

    Raises:
      FileNotFoundError: there is no such file or folder, or the folder holds none.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise FileNotFoundError(f"there is no file or folder {root}")
    found = sorted(p for p in root.rglob("*") if p.is_file() and p.name.endswith(ENDINGS))
    if not found:
        raise FileNotFoundError(f"{root} holds no file that ends with {', '.join(ENDINGS)}")
    return [(p.relative_to(root).as_posix(), p) for p in found]


def open_lines(path: Path) -> BinaryIO:
    """A file of lines, open for reading; .gz and .zst are decompressed."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstd(path), 1 << 16)
    return path.open("rb")


class _Zstd(io.RawIOBase):
    """A file that is compressed by zstd; unlike the library's own reader it says where the file is cut short."""

    PIECE = 1 << 10  # of at most 32 MB of content: a block of 4 bytes can stand for 128 KB

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{path} is compressed by zstd: pip install zstandard, to read it") from error
        self._begin = zstandard.ZstdDecompressor().decompressobj
        self._file, self._frame, self._content = path.open("rb"), self._begin(), memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            piece = (self._frame.unused_data if self._frame.eof else b"") or self._file.read(self.PIECE)
            if not piece:
                if not self._frame.eof and self._file.tell():
                    raise EOFError("it ends within a frame")
                return 0
            if self._frame.eof:
                self._frame = self._begin()
            self._content = memoryview(self._frame.decompress(piece))
        count = min(len(buffer), len(self._content))
        buffer[:count], self._content = self._content[:count], self._content[count:]
        return count


class Line(NamedTuple):
    """A line of a file.

    Attributes:
      number: of the line, from 1.
      offset: bytes of the file's content, decompressed, before it.
      content: its bytes, line end included.
    """

    number: int
    offset: int
    content: bytes


def file_lines(file: Path) -> Iterator[Line]:
    """Yields the lines of a file that are not blank.

    Raises:
      FileNotFoundError: there is no such file.
      ConversationError: a compressed file is damaged or cut short, or a line is longer than LINE_BYTES.
    """
    number = offset = 0
    try:
        with open_lines(file) as stream:
            while line := stream.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:
                    raise ConversationError(f"{file}:{number}", "a line too long", f"over {LINE_BYTES} bytes")
                if line.strip():
                    yield Line(number, offset, line)
                offset += len(line)
    except (EOFError, OSError, _zstd_error()) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, such as a missing permission
            raise
        raise ConversationError(f"{file}:{number + 1}", "the file is damaged or cut short", str(error)) from error


def read_lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yields file:line and the bytes of each line that is not blank.

    Raises:
      FileNotFoundError: as `files`.
      ConversationError: as `file_lines`.
    """
    for _, file in files(path):
        for line in file_lines(file):
            yield f"{file}:{line.number}", line.content


def _zstd_error() -> type[BaseException]:
    try:
        import zstandard
    except ModuleNotFoundError:
        return EOFError
    error: type[BaseException] = zstandard.ZstdError
    return error


def parse_line(line: bytes, where: str) -> Conversation:
    """The conversation on a line.

    Raises:
      ConversationError: the line is no JSON object, or as `parse`.
    """
    try:
        record = parse_json(line, where, finite=False)
    except JsonError as error:
        raise ConversationError(where, "a broken line", str(error).removeprefix(f"{where} ")) from error
    return parse(record, where)


def read_conversations(path: str | Path, skipped: Skipped) -> Iterator[Conversation]:
    """Yields the conversations of a file or folder in order; faulty lines are counted in `skipped`.

    Raises:
      FileNotFoundError: as `files`.
      ConversationError: more lines are faulty than `skipped` allows, or a file is damaged.
    """
    for where, line in read_lines(path):
        try:
            found = parse_line(line, where)
        except ConversationError as error:
            skipped.add(error)
            continue
        yield found
