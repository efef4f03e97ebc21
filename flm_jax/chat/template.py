"""Chat templates: how a conversation is written as tokens, and which of them are answers.

A template is a jinja2 source in the form that Hugging Face tokenizers carry (`chat_template`). It is code of whoever
published the model, so it is rendered in a sandbox. It is rendered twice, once with placeholders for the messages, and
what stands between the placeholders is the template's own text, its markup. Markup is tokenised with special tokens,
messages without: a special token that a user writes out stays text. The pieces are tokenised one by one, as in a
conversation, where an answer begins after a prompt that is tokenised already.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from flm_jax.chat.conversation import ASSISTANT, SYSTEM, USER, ConversationError, Message
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.files import read_bounded
from flm_jax.records import meant, meant_beside

ANSWERS = ("all", "last")
MOST_BYTES = 1 << 20
# Private characters: no text that is rendered with placeholders contains a message.
_OPEN, _CLOSE, _EOS = "\ue000", "\ue001", "\ue002"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}|({_EOS})")


class TemplateError(ValueError):
    """A template cannot be used; the message says which, and why."""


@dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
      name: for errors and reports.
      source: the template, in jinja2.
      end: the text that ends an answer; '': the first special token after an answer.
      markers: what a message must not contain, besides special tokens, which are harmless there.
    """

    name: str
    source: str
    end: str = ""
    markers: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """JSON-able; `Template(**record)` with a tuple of markers is the same."""
        return {**dataclasses.asdict(self), "markers": list(self.markers)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Template:
        """Reads what `record` returns."""
        return cls(**{**record, "markers": tuple(record["markers"])})


# "<_user>" and "<_bot>" are those of Tele-FLM-1T's released code. That the end of document ends every answer is ours.
TELE_FLM = Template(
    "tele_flm",
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<_user>{% elif message['role'] == 'assistant' %}<_bot>{% endif %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<_bot>{% endif %}",
    markers=("<_user>", "<_bot>"),
)
# As TeleChat-52B's code describes it: "<_end>" after every answer, after the last one the end of document before it.
TELECHAT = Template(
    "telechat",
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<_user>{% elif message['role'] == 'assistant' %}<_bot>{% endif %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}"
    "{% if loop.last %}{{ eos_token }}{% endif %}<_end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<_bot>{% endif %}",
    end="<_end>",
    markers=("<_user>", "<_bot>", "<_end>"),
)
CHATML = Template(
    "chatml",
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    end="<|im_end|>",
    markers=("<|im_start|>", "<|im_end|>"),
)
BUILT_IN = {template.name: template for template in (TELE_FLM, TELECHAT, CHATML)}
# The name of the template that came with a tokenizer.
OWN = "tokenizer"


def find_template(name: str, vocabulary: Vocabulary) -> Template:
    """The template of a name.

    Args:
      name: 'tele_flm', 'telechat', 'chatml'; 'tokenizer' for the one that came with the vocabulary; or a file.
      vocabulary: what to tokenise with.

    Raises:
      TemplateError: there is no such template, or its file is not UTF-8 text.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name == OWN:
        source = vocabulary.special.chat_template
        if not source:
            raise TemplateError(
                f"the vocabulary has no chat template of its own; take one of {', '.join(BUILT_IN)}, or a jinja2 file"
            )
        return Template(OWN, source)
    path = Path(name).expanduser()
    if not path.is_file():
        near = meant(name, [*BUILT_IN, OWN]) or meant_beside(path)
        raise TemplateError(
            f"there is no template {name!r}: it must be {', '.join(BUILT_IN)}, {OWN} or a jinja2 file{near}"
        )
    try:
        return Template(path.name, read_bounded(path, MOST_BYTES).decode())
    except UnicodeDecodeError as error:
        raise TemplateError(f"the template {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def passed_over(template: Template, vocabulary: Vocabulary, setting: str) -> str:
    """A sentence about the template that came with a vocabulary, where another one is used; '' where there is none.

    Args:
      template: the one that is used.
      vocabulary: what to tokenise with.
      setting: what names the template, such as 'Conversations.template'.
    """
    own = vocabulary.special.chat_template
    if own in ("", template.source):
        return ""
    return (
        f"The vocabulary has a chat template of its own, and {template.name} is used in its place; "
        f"{setting} = {OWN!r} takes its own."
    )


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
      ids: int32 (n,).
      weights: uint8 (n,), 1 for the tokens of answers and of what ends them, which are trained on.
      text_bytes: UTF-8 bytes of the answers that have weight.
    """

    ids: np.ndarray
    weights: np.ndarray
    text_bytes: int


@dataclass(frozen=True)
class _Piece:
    """A run of a rendered conversation: the text of the message with this number, or markup."""

    text: str
    message: int | None = None


class ChatEncoder:
    """A template with a vocabulary: conversations to tokens.

    Attributes:
      template: the template.
      vocabulary: the vocabulary.
      stop_ids: each ends an answer.
      stop_texts: each ends an answer, where what ends it is not a single token.
    """

    def __init__(self, template: Template, vocabulary: Vocabulary) -> None:
        """Compiles the template, and tries it.

        Raises:
          TemplateError: it does not compile or render, or does not say where an answer ends.
        """
        self.template, self.vocabulary = template, vocabulary
        self._render_source = _compiled(template)
        probe = [Message(USER, "question"), Message(ASSISTANT, "answer")]
        try:
            encoded = self.encode(probe)
        except ConversationError as error:
            raise TemplateError(f"the template {template.name} cannot be used: {error}") from error
        end = int(encoded.ids[encoded.weights > 0][-1])
        stops, texts = {vocabulary.eos_id}, []
        if template.end and len(whole := vocabulary.encode(template.end)) > 1:
            texts.append(template.end)
        else:
            stops.add(whole[0] if template.end else end)
        self.stop_ids, self.stop_texts = tuple(sorted(stops)), tuple(texts)

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The conversation as text, as transformers' `apply_chat_template` writes it.

        Args:
          messages: in order.
          prompt: whether what stands before an answer is added at the end.

        Raises:
          ConversationError: the template refuses the conversation.
        """
        return self._render(messages, self.vocabulary.special.eos or _EOS, prompt).replace(_EOS, "</s>")

    def encode(self, messages: Sequence[Message], answers: str = "all", where: str = "the conversation") -> Encoded:
        """The conversation as tokens.

        Args:
          messages: in order, an answer last.
          answers: which of them are trained on: 'all' or 'last'.
          where: for errors.

        Raises:
          ConversationError: a message contains a marker, or the template refuses or changes a message.
        """
        last = max(i for i, m in enumerate(messages) if m.role == ASSISTANT)
        ids: list[int] = []
        weights: list[int] = []
        text_bytes, answering = 0, False
        for piece in [*self._pieces(messages, False, where), _Piece("")]:
            if piece.message is None:
                found = self._encode_markup(piece.text)
                counted = self._length_of_end(piece.text, found, where) if answering else 0
                answering = False
            else:
                role = messages[piece.message].role
                answering = role == ASSISTANT and (answers == "all" or piece.message == last)
                found = self._encode_message(piece.text, where)
                counted = len(found) if answering else 0
                text_bytes += len(piece.text.encode()) if answering else 0
            ids += found
            weights += [1] * counted + [0] * (len(found) - counted)
        return Encoded(np.array(ids, np.int32), np.array(weights, np.uint8), text_bytes)

    def prompt(self, messages: Sequence[Message], where: str = "the conversation") -> list[int]:
        """The tokens after which the model answers; the last message is the user's.

        Raises:
          ConversationError: as `encode`.
        """
        ids: list[int] = []
        for piece in self._pieces(messages, True, where):
            markup = piece.message is None
            ids += self._encode_markup(piece.text) if markup else self._encode_message(piece.text, where)
        return ids

    def _pieces(self, messages: Sequence[Message], prompt: bool, where: str) -> list[_Piece]:
        """The rendered conversation, cut at the borders of its messages."""
        places = [Message(m.role, f"{_OPEN}{i}{_CLOSE}") for i, m in enumerate(messages)]
        eos = self.vocabulary.special.eos or _EOS
        outline, real = self._render(places, eos, prompt), self._render(messages, eos, prompt, where)
        pieces, start = [], 0
        for match in _PLACEHOLDER.finditer(outline):
            if match[1] is not None:
                pieces += [_Piece(outline[start : match.start()]), _Piece("", int(match[1]))]
                start = match.end()
        pieces = [piece for piece in (*pieces, _Piece(outline[start:])) if piece.text or piece.message is not None]
        for change in (str, str.strip):
            filled = [
                p if p.message is None else _Piece(change(messages[p.message].content), p.message) for p in pieces
            ]
            if real == "".join(p.text for p in filled):
                missing = set(range(len(messages))) - {p.message for p in pieces}
                if any(messages[i].role == ASSISTANT for i in missing):
                    raise ConversationError(where, "the template leaves an answer out", self.template.name)
                return filled
        raise ConversationError(
            where, "the template changes a message", f"{self.template.name} does more than write the messages in order"
        )

    def _render(self, messages: Sequence[Message], eos: str, prompt: bool, where: str = "the conversation") -> str:
        import jinja2

        special = self.vocabulary.special
        try:
            text: str = self._render_source.render(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                bos_token="" if special.prefix == special.eos else special.prefix,
                eos_token=eos,
                add_generation_prompt=prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ConversationError(where, "the template refuses it", f"{self.template.name}: {error}") from error
        return text

    def _encode_message(self, text: str, where: str) -> list[int]:
        for marker in self._markers:
            if marker in text:
                raise ConversationError(where, "contains a marker", f"{marker!r}, which the template itself writes")
        return self.vocabulary.encode_plain(text)

    def _encode_markup(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(text.split(_EOS)):
            ids += [self.vocabulary.eos_id] * (number > 0)
            ids += self.vocabulary.encode(part) if part else []
        return ids

    def _length_of_end(self, text: str, ids: list[int], where: str) -> int:
        """How many of the tokens of the markup after an answer belong to it, because they end it."""
        if self.template.end and (at := text.find(self.template.end)) >= 0:
            return len(self._encode_markup(text[: at + len(self.template.end)]))
        for number, token in enumerate(ids):
            if token == self.vocabulary.eos_id or self.vocabulary.is_special(token):
                return number + 1
        raise ConversationError(
            where, "the template ends no answer", f"no special token follows an answer in {self.template.name}"
        )

    @functools.cached_property
    def _markers(self) -> tuple[str, ...]:
        """Markup that no special token is part of, and that a user could therefore write."""
        known = [m for m in self.template.markers if not self._is_token(m)]
        if self.template == BUILT_IN.get(self.template.name):  # a file may have such a name too
            return tuple(known)
        probe = [Message(role, "x") for role in (SYSTEM, USER, ASSISTANT, USER)]
        try:
            pieces = self._pieces(probe, True, "")
        except ConversationError:  # some templates have no system turn
            pieces = self._pieces(probe[1:], True, "")
        texts = {p.text.strip() for p in pieces if p.message is None and _EOS not in p.text}
        plain = {t for t in texts if not any(self.vocabulary.is_special(i) for i in self.vocabulary.encode(t))}
        return tuple(sorted({*known, *(t for t in plain if len(t) > 2)}))

    def _is_token(self, text: str) -> bool:
        """Whether a text is one special token, which is then no token where a user writes it."""
        ids = self.vocabulary.encode(text)
        return len(ids) == 1 and self.vocabulary.is_special(ids[0]) and self.vocabulary.encode_plain(text) != ids


@functools.lru_cache(16)
def _compiled(template: Template) -> Any:
    """The compiled template, in the sandbox and with the settings that transformers renders with.

    Raises:
      TemplateError: it is no jinja2; the message names the line.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The tag `{% generation %}`, which marks answers for other programs and writes nothing."""

        tags = {"generation"}  # noqa: RUF012 - as the base class declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template.source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the template {template.name}, line {error.lineno}: {error.message}") from error
