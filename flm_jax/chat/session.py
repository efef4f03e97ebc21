"""A conversation in the terminal: turns, their history within the model's context, and the commands."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flm_jax.chat.conversation import ASSISTANT, SYSTEM, USER, Conversation, ConversationError, Message, check_order
from flm_jax.chat.template import ChatEncoder
from flm_jax.files import naming
from flm_jax.records import counted

HELP = """/reset          forget the conversation (the system turn stays)
/system TEXT    set the system turn and forget the conversation; without TEXT: no system turn
/retry          answer the last question again
/save FILE      append the conversation to FILE, as a line of JSON
/help           this list
/quit           end (or Ctrl-D); Ctrl-C stops an answer
A line that ends with \\ goes on in the next one. A message that begins with / is written with //."""


class Session:
    """A conversation with a model.

    Attributes:
      messages: the turns so far, a system turn first if there is one.
      dropped: how many turns no longer fit into the context, and are not read by the model.
      kept: whether the last messages are the last question and its answer.
    """

    def __init__(
        self,
        encoder: ChatEncoder,
        answer: Callable[[list[int]], Iterator[str]],
        context: int,
        max_tokens: int,
        system: str = "",
    ) -> None:
        """Begins a conversation.

        Args:
          encoder: writes it as tokens.
          answer: yields the text of an answer to a prompt, piece by piece.
          context: the longest sequence that the model reads, in tokens.
          max_tokens: the longest answer.
          system: the system turn; empty: none.
        """
        if max_tokens >= context:
            raise ValueError(
                f"answers of {counted(max_tokens, 'token')} leave no room in a context of {context}: take fewer"
            )
        self._encoder, self._answer, self._room = encoder, answer, context - max_tokens
        self.messages: list[Message] = []
        self.dropped = 0
        self._question: str | None = None  # the last one, also where its answer was empty
        self.kept = False
        self.begin(system)

    def begin(self, system: str | None = None) -> None:
        """Forgets all turns; `system` replaces the system turn, unless it is None."""
        kept = self.messages[:1] if self.messages and self.messages[0].role == SYSTEM else []
        if system is not None:
            kept = [Message(SYSTEM, system)] if system.strip() else []
        self.messages, self.dropped, self._question, self.kept = kept, 0, None, False

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer to a message, piece by piece, and keeps both; what was yielded is kept if it is stopped.

        An exchange whose answer has no text, or spaces only, is not kept, since no conversation may contain it; but
        `again` returns its question.

        Raises:
          ConversationError: the message contains a marker of the template, or is longer than the context.
        """
        asked = [*self.messages, Message(USER, text)]
        prompt, dropped = self._prompt(asked)
        self.dropped, self._question, self.kept = dropped, text, False
        said: list[str] = []
        try:
            for piece in self._answer(prompt):
                said.append(piece)
                yield piece
        finally:
            if (answer := "".join(said)).strip():
                self.messages, self.kept = [*asked, Message(ASSISTANT, answer)], True

    def again(self) -> str | None:
        """Takes the last exchange back, and returns its question; None: there is none."""
        if self.kept:
            self.messages, self.kept = self.messages[:-2], False
        return self._question

    def _prompt(self, messages: list[Message]) -> tuple[list[int], int]:
        """The tokens of the turns that fit, the newest last, and how many older ones do not."""
        system = [m for m in messages[:1] if m.role == SYSTEM]
        turns = messages[len(system) :]
        for first in range(0, len(turns), 2):
            ids = self._encoder.prompt([*system, *turns[first:]], "the conversation")
            if len(ids) <= self._room:
                return ids, first
        raise ConversationError(
            "the message",
            "longer than the context",
            f"{counted(len(ids), 'token')}, and the model reads {self._room} at most",
        )

    def save(self, path: Path) -> None:
        """Appends the conversation to a file, as a line of JSON in OpenAI's format that can be tuned on.

        Raises:
          ConversationError: it could not be tuned on, for example because an answer contains a marker of the template.
          OSError: the file cannot be written.
        """
        check_order(self.messages, "the conversation")
        self._encoder.encode(self.messages)
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(Conversation(tuple(self.messages)).line())


def talk(session: Session, lines: Iterable[str], write: Callable[[str], None], after: Callable[[], str]) -> None:
    """Reads messages and commands until they end, and writes the answers as they come.

    Args:
      session: the conversation.
      lines: what the user types, line by line.
      write: shows text at once.
      after: what is shown after an answer, such as its speed.
    """
    for text in _joined(lines):
        if not text.strip():
            continue
        question: str | None = text.removeprefix("/") if text.startswith("//") else text
        if text.startswith("/") and not text.startswith("//"):
            command, _, rest = text.partition(" ")
            if command in ("/quit", "/exit"):
                return
            question = _command(session, command, rest.strip(), write)
        if question is not None:
            _exchange(session, question, write, after)


def _exchange(session: Session, question: str, write: Callable[[str], None], after: Callable[[], str]) -> None:
    dropped = session.dropped
    answer = session.ask(question)
    try:
        for piece in answer:
            write(piece)
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]  # a generator: what was said so far is kept
        write(" [stopped]")
    except ConversationError as error:
        write(f"[{error}]\n")
        return
    write(f"\n{after()}")
    if not session.kept:
        write("[an answer without text is not kept; /retry asks again]\n")
    if session.dropped > dropped:
        write(f"[the first {session.dropped} turns do not fit into the context any more]\n")


def _command(session: Session, command: str, rest: str, write: Callable[[str], None]) -> str | None:
    """Runs a command; returns a question to ask, if it has one."""
    if command == "/reset":
        session.begin()
        write("[a new conversation]\n")
    elif command == "/system":
        session.begin(rest)
        write("[a new conversation" + (", with this system turn" if rest else ", without a system turn") + "]\n")
    elif command == "/retry":
        question = session.again()
        if question is None:
            write("[there is no question yet]\n")
        return question
    elif command == "/save":
        if not rest:
            write("[/save needs the name of a file]\n")
        elif not any(m.role == ASSISTANT for m in session.messages):
            write("[there is no answer yet]\n")
        else:
            try:
                session.save(Path(rest).expanduser())
                write(f"[saved to {rest}]\n")
            except ConversationError as error:
                write(f"[not saved, as nothing could be tuned on it: {error}]\n")
            except OSError as error:
                write(f"[{rest} cannot be written: {error.strerror}]\n")
    elif command == "/help":
        write(HELP + "\n")
    else:
        write(f"[there is no command {command}]\n{HELP}\n")
    return None


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Yields messages: lines, with those that end in a backslash joined with the next."""
    found = iter(lines)
    for line in found:
        parts = [line.rstrip("\n")]
        while parts[-1].endswith("\\"):
            parts[-1] = parts[-1][:-1]
            parts += [after.rstrip("\n") for after in itertools.islice(found, 1)] or [""]
        yield "\n".join(parts)
