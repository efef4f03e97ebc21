"""The corpus of conversations to tune on: read, held out, written as tokens by a template, packed into windows."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np

from flm_jax.chat.conversation import (
    ASSISTANT,
    SYSTEM,
    Conversation,
    ConversationError,
    Message,
    read_conversations,
)
from flm_jax.chat.packing import Packer
from flm_jax.chat.template import ANSWERS, ChatEncoder, find_template, passed_over
from flm_jax.data.corpora import Document
from flm_jax.data.json_lines import Skipped, files
from flm_jax.data.left_out import record_of
from flm_jax.data.text import SPLITS, Percent, border_within, check_split, describe_fields, hash_range, name_hash
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.files import sha256_file
from flm_jax.records import counted, recorded
from flm_jax.records.fields import Count, one_of

_ADVICE = " by Conversations.most_faulty"


@dataclasses.dataclass(frozen=True)
@recorded
class Conversations:
    """Conversations to tune on: JSON lines in the formats of OpenAI, ShareGPT or Alpaca, also .gz and .zst.

    Answers are trained on, and what ends them; questions and the template's own text are only read. A conversation
    longer than the context loses its last turns. Equal conversations are held out together.

    Attributes:
      path: a file, or a folder of such files.
      template: tele_flm, telechat, chatml, tokenizer (the vocabulary's own), or a jinja2 file.
      answers: which answers of a conversation are trained on: all, or the last.
      system: a system turn for conversations that have none; empty: none.
      most_faulty: how many lines may be left out because they are no conversation, or do not fit; more are an error.
      heldout_percent: share of the conversations that is held out.
    """

    path: str = dataclasses.field(metadata={"identity": False})
    template: str = "tele_flm"
    answers: Annotated[str, one_of(ANSWERS)] = "all"
    system: str = ""
    most_faulty: Count = 0
    heldout_percent: Percent = 5.0

    def digest(self) -> str:
        """The sha256 over the fields, and names and contents of the files; where they lie does not count.

        Nor does the template's name, as a store is also identified by the template itself (`describe`).
        """
        fields = {key: value for key, value in describe_fields(self).items() if key not in ("path", "template")}
        content = [[name, sha256_file(path)] for name, path in files(self.path)]
        return hashlib.sha256(json.dumps([fields, content]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The kind and fields of the corpus."""
        return describe_fields(self)

    def conversations(self, skipped: Skipped) -> Iterator[tuple[str, Conversation]]:
        """Yields split and turns of each conversation in order, with a system turn if there is to be one.

        Raises:
          FileNotFoundError: there is no such file.
          LineError: more lines are faulty than `skipped` allows.
          ValueError: there are fewer than two different conversations.
        """
        border = self._border
        for found in read_conversations(self.path, skipped):
            split = "heldout" if name_hash(_content(found)) < border else "train"
            if self.system and found.messages[0].role != SYSTEM:
                found = dataclasses.replace(found, messages=(Message(SYSTEM, self.system), *found.messages))
            yield split, found

    @functools.cached_property
    def _border(self) -> int:
        skipped = Skipped(self.most_faulty, advice=_ADVICE, quiet=True)  # reading a split tells of them
        hashes = hash_range(_content(found) for found in read_conversations(self.path, skipped))
        if hashes is None:
            raise ValueError(f"Conversations: {self.path} holds no conversation")
        if hashes[0] == hashes[1]:
            raise ValueError(
                f"Conversations: {self.path} holds one conversation only, copies not counted; it takes two, one to "
                "train on and one to hold out"
            )
        return border_within(hashes, self.heldout_percent)

    def documents(self, split: str) -> Iterator[str]:
        """Yields the text of each conversation of one split, message after message, without a template."""
        check_split(split)
        for side, found in self.conversations(Skipped(self.most_faulty, advice=_ADVICE)):
            if side == split:
                yield "\n".join(message.content for message in found.messages) + "\n"

    def tokenised(self, vocabulary: Vocabulary, context: int) -> TokenisedConversations:
        """The corpus with a vocabulary, for windows of `context` tokens.

        Raises:
          TemplateError: there is no such template, or it cannot be used.
        """
        return TokenisedConversations(self, ChatEncoder(find_template(self.template, vocabulary), vocabulary), context)


def _content(found: Conversation) -> str:
    """What two conversations have in common if they are the same."""
    return json.dumps([[message.role, " ".join(message.content.split())] for message in found.messages])


class TokenisedConversations:
    """`Conversations` with a vocabulary and a length of windows.

    Attributes:
      skipped: what was left out.
      cut: how many conversations lost their last turns.
    """

    def __init__(self, corpus: Conversations, encoder: ChatEncoder, context: int) -> None:
        self._corpus, self._encoder, self._context = corpus, encoder, context
        self.skipped, self.cut = Skipped(corpus.most_faulty, advice=_ADVICE), 0

    def describe(self) -> dict[str, Any]:
        """The template itself, in the place of its name, and the length of windows."""
        return {"template": self._encoder.template.record(), "context": self._context}

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yields split and tokens of each conversation, those of a split in the order of its packed windows.

        Both splits come from one pass over the files: to read and to parse them takes longer than anything else here.

        Raises:
          LineError: more lines are left out than `most_faulty`.
        """
        pad = self._encoder.vocabulary.special.pad_id
        pad = self._encoder.vocabulary.eos_id if pad is None else pad
        packers = {split: Packer(self._context, pad) for split in SPLITS}
        for split, found in self._corpus.conversations(self.skipped):
            try:
                document = self._document(found)
            except ConversationError as error:
                self.skipped.add(error)
                continue
            for packed in packers[split].add(document):
                yield split, packed
        for split, packer in packers.items():
            for packed in packer.close():
                yield split, packed

    def left_out(self) -> dict[str, Any]:
        """The record of the lines that were left out: their number, reasons, and the first of each kind."""
        return record_of(self.skipped)

    def notes(self) -> list[str]:
        """What was left out, how many conversations were cut, and whether the vocabulary's own template is not used."""
        other = passed_over(self._encoder.template, self._encoder.vocabulary, "Conversations.template")
        long = counted(self.cut, "conversation was", "conversations were")
        cut = f"{long} longer than {self._context} tokens, and lost the turns at the end."
        return [note for note in (self.skipped.summary(), cut if self.cut else "", other) if note]

    def _document(self, found: Conversation) -> Document:
        messages, where = found.messages, found.where
        encoded = self._encoder.encode(messages, self._corpus.answers, where)
        whole = len(encoded.ids)
        while len(encoded.ids) > self._context:
            ends = [i for i, m in enumerate(messages) if m.role == ASSISTANT]
            if len(ends) < 2:
                raise ConversationError(
                    where,
                    "longer than the context",
                    f"up to its first answer it has {counted(len(encoded.ids), 'token')}, and the context "
                    f"{self._context}",
                )
            messages = messages[: ends[-2] + 1]
            encoded = self._encoder.encode(messages, self._corpus.answers, where)
        self.cut += len(encoded.ids) < whole
        weights = encoded.weights.copy()
        weights[0] = 0  # nothing precedes it
        if not weights.any():
            raise ConversationError(where, "nothing to train on", "no token of its answers has weight")
        return Document(np.asarray(encoded.ids, np.int32), weights, encoded.text_bytes)
