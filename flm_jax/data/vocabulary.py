"""Vocabularies: text to token ids and back, without TensorFlow.

Bytes and SentencePiece have the same ids as in seqio; 0, 1 and 2 are padding, end of document and unknown in both. A
Hugging Face tokenizer has its own special ids. `spec()` holds everything needed to build the same vocabulary again (a
SentencePiece model or a tokenizer.json included), so a store that records it is self-contained; `vocabulary_files`
reads it, and keeps the same in the files of a checkpoint.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from flm_jax.data.special import CHAT_TEMPLATE, CONFIGS, EOS_ID, Special, chat_template, special_of
from flm_jax.data.tokenizer_file import guarded
from flm_jax.data.tokenizer_file import load as _load
from flm_jax.files import read_bounded
from flm_jax.records.foreign_json import parse_json

PAD_ID, UNK_ID = 0, 2


class Vocabulary(Protocol):
    """The interface of a vocabulary."""

    @property
    def kind(self) -> str:
        """'bytes', 'sentencepiece' or 'tokenizer'."""
        ...

    @property
    def size(self) -> int:
        """Number of ids; every id lies in [0, size)."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        ...

    @property
    def special(self) -> Special:
        """The special ids around a text."""
        ...

    @property
    def digest(self) -> str:
        """A sha256 (hex): equal digests mean equal ids for every text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end-of-document id."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which a special token that is written out is text, as where users write."""
        ...

    def is_special(self, number: int) -> bool:
        """Whether an id is a special token, which no plain text contains."""
        ...

    def is_partial(self, number: int) -> bool:
        """Whether an id stands for no whole character: for bytes of one without a token, or for an unknown one."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids.

        Padding and end-of-document ids are dropped; ids outside the vocabulary become U+FFFD.
        """
        ...

    def spec(self) -> dict[str, Any]:
        """A JSON-able record from which `vocabulary_files.from_spec` builds the same vocabulary."""
        ...


# Stands for an id that is not in the vocabulary: an embedding may be padded, and a model in early training samples such
# ids.
REPLACEMENT = "\ufffd"


def _runs(ids: Iterable[int], size: int) -> Iterator[tuple[bool, list[int]]]:
    """Yields runs of ids that are in the vocabulary (True) and of ids that are not (False)."""
    for known, run in itertools.groupby(map(int, ids), lambda i: 0 <= i < size):
        yield known, list(run)


class ByteVocabulary:
    """UTF-8 bytes shifted by the three special ids (ByT5, arXiv 2105.13626), the same as seqio.ByteVocabulary."""

    kind = "bytes"
    eos_id = EOS_ID
    special = Special(pad_id=PAD_ID)

    def __init__(self, extra_ids: int = 0) -> None:
        """Builds the vocabulary.

        Args:
          extra_ids: ids above the bytes that no text uses (seqio's sentinels); they decode to nothing.
        """
        self.size = 3 + 256 + extra_ids
        self.digest = hashlib.sha256(f"bytes {self.size}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """One id per byte of the UTF-8 text."""
        return [byte + 3 for byte in text.encode("utf-8")]

    encode_plain = encode

    def is_special(self, number: int) -> bool:
        """Whether an id is not a byte."""
        return not 3 <= number < 259

    def is_partial(self, number: int) -> bool:
        """Whether an id is a byte of a character that takes several."""
        return 3 + 0x80 <= number < 259

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 are dropped, as a model's sample may hold some."""
        return "".join(
            bytes(i - 3 for i in run if 3 <= i < 259).decode("utf-8", "ignore") if known else REPLACEMENT * len(run)
            for known, run in _runs(ids, self.size)
        )

    def spec(self) -> dict[str, Any]:
        """See Vocabulary.spec."""
        return {"kind": self.kind, "size": self.size, "eos_id": self.eos_id, "digest": self.digest}


class SentencePieceVocabulary:
    """A SentencePiece model.

    A model trained here reproduces every text exactly, with one exception that lies in SentencePiece itself: U+2581,
    the character that it writes for a space, is decoded as a space.
    """

    kind = "sentencepiece"

    def __init__(self, model_path: str | Path | None = None, *, model: bytes | None = None) -> None:
        """Loads a model.

        Args:
          model_path: the model file; or
          model: its bytes.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is not a SentencePiece model, or has no end-of-document id.
        """
        where = str(model_path) if model_path is not None else "the model given"
        if model is None:
            if model_path is None:
                raise ValueError("SentencePieceVocabulary needs model_path or model")
            if not Path(model_path).is_file():
                raise FileNotFoundError(f"there is no SentencePiece model {model_path}")
            model = Path(model_path).read_bytes()
        self.model = model
        self.digest = hashlib.sha256(model).hexdigest()
        try:
            if not model:  # the library would load an empty file and fail at its first use
                raise RuntimeError("it is empty")
            self._processor  # noqa: B018 - loads, and so checks
        except RuntimeError:
            why = "it is empty" if not model else "the library sentencepiece cannot read it"
            raise ValueError(
                f"{where} is not a SentencePiece model ({why}); of Hugging Face, give tokenizer.json or its directory"
            ) from None
        self.size = int(self._processor.get_piece_size())
        self.eos_id = int(self._processor.eos_id())
        if self.eos_id < 0:
            raise ValueError(f"{where} has no end-of-document id: train it with eos_id=1")
        pad = int(self._processor.pad_id())
        self.special = Special(self.eos_id, (self.eos_id,), pad_id=None if pad < 0 else pad)

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self.model)
        return processor

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; a character without a piece becomes its UTF-8 bytes."""
        return [int(i) for i in self._processor.encode(text)]

    encode_plain = encode  # control symbols never come from text

    def is_special(self, number: int) -> bool:
        """Whether an id is a control symbol."""
        return bool(0 <= number < self.size and self._processor.is_control(number))

    def is_partial(self, number: int) -> bool:
        """Whether an id is the unknown one, or a byte of a character that takes several."""
        if self._processor.is_byte(number):
            return int(self._processor.id_to_piece(number)[1:-1], 16) >= 0x80  # '<0xE4>'
        return bool(self._processor.is_unknown(number))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return "".join(
            str(self._processor.decode(run)) if known else REPLACEMENT * len(run)
            for known, run in _runs(ids, self.size)
        )

    def spec(self) -> dict[str, Any]:
        """See Vocabulary.spec; `model` is the model file, compressed, in base64."""
        packed = base64.b64encode(zlib.compress(self.model, 9)).decode()
        return {
            "kind": self.kind,
            "size": self.size,
            "eos_id": self.eos_id,
            "digest": self.digest,
            "model": packed,
        }


TOKENIZER = "tokenizer.json"
# The largest tokenizers in use have 35 MB.
MOST_BYTES = 1 << 28


class TokenizerVocabulary:
    """A Hugging Face tokenizer.json.

    As in Hugging Face's library, a special token that is written out in a text is that token. Decoding follows the
    file's own decoder: it is exact with byte-level BPE, and up to spaces at the beginning with some others.
    """

    kind = "tokenizer"

    def __init__(self, model: bytes, special: Special, where: str = "the tokenizer") -> None:
        """Loads a tokenizer; `from_directory` loads one from files.

        Args:
          model: the bytes of tokenizer.json.
          special: its special ids; the first of `stop_ids` ends a document.
          where: for errors.

        Raises:
          ValueError: it is not a tokenizer, or has no such ids; or the library that reads it is not installed.
        """
        self.model, self.special, self.eos_id = model, special, special.stop_ids[0]
        self._processor, self._where = _load(model, where), where
        with guarded(where):
            self.size = 1 + max(self._processor.get_vocab(with_added_tokens=True).values(), default=-1)
        for number in (self.eos_id, special.prefix_id):
            if not self._is_known(number):
                raise ValueError(
                    f"{where} has no token {number} to begin or end a document with: its ids are below {self.size}"
                )
        # A store's tokens include the end of a document, but no other special id.
        self.digest = hashlib.sha256(
            f"tokenizer {self.eos_id} {hashlib.sha256(model).hexdigest()}".encode()
        ).hexdigest()

    @classmethod
    def from_directory(cls, path: str | Path, eos_id: int | None = None) -> TokenizerVocabulary:
        """The tokenizer in a directory, such as a Hugging Face model's or the blobs of a checkpoint step.

        Args:
          path: holds tokenizer.json, and the files that say how its special tokens are used: tokenizer_config.json,
            special_tokens_map.json, generation_config.json or config.json.
          eos_id: the id that ends a document; None: as those files say, in this order.

        Raises:
          FileNotFoundError: there is no tokenizer.json.
          ValueError: a file is damaged, or none says what ends a document.
        """
        root = Path(path).expanduser()
        if not (root / TOKENIZER).is_file():
            raise FileNotFoundError(f"there is no {TOKENIZER} in {root}; give the directory that a tokenizer lies in")
        names = [name for name in (TOKENIZER, *CONFIGS, CHAT_TEMPLATE) if (root / name).is_file()]
        files = {name: read_bounded(root / name, MOST_BYTES) for name in names}
        return cls.from_files(files, str(root), eos_id)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], root: str, eos_id: int | None = None) -> TokenizerVocabulary:
        """As `from_directory`, from the contents of the files by name; `root` names their directory in errors."""
        where, model = f"{root}/{TOKENIZER}", files[TOKENIZER]
        configs: dict[str, dict[str, Any]] = {}
        for name in CONFIGS:
            if name in files:
                try:
                    configs[name] = parse_json(files[name], name)
                except ValueError as error:
                    raise ValueError(f"{root}/{name} is damaged: {error}") from None
        special = special_of(_load(model, where), configs, eos_id, where)
        template = chat_template(files.get(CHAT_TEMPLATE), configs.get(CONFIGS[0], {}), root)
        return cls(model, dataclasses.replace(special, chat_template=template), where)

    def _is_known(self, number: int) -> bool:
        return 0 <= number < self.size and self._processor.id_to_token(number) is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the special ones that the tokenizer would add."""
        with guarded(self._where):
            return [int(i) for i in self._processor.encode(text, add_special_tokens=False).ids]

    @functools.cached_property
    def _plain_processor(self) -> Any:
        processor = _load(self.model, self._where)
        processor.encode_special_tokens = True  # they are encoded as the text that they are
        return processor

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens are not recognised."""
        with guarded(self._where):
            return [int(i) for i in self._plain_processor.encode(text, add_special_tokens=False).ids]

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._processor.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def is_special(self, number: int) -> bool:
        """Whether an id is a special token of tokenizer.json, or ends a document."""
        return number in self._special_ids or number in self.special.stop_ids

    @functools.cached_property
    def _unknown_id(self) -> int | None:
        token = getattr(self._processor.model, "unk_token", None)
        found = None if token is None else self._processor.token_to_id(token)
        return found if found is None else int(found)

    def is_partial(self, number: int) -> bool:
        """Whether an id is the unknown one, or its own text is no whole characters."""
        with guarded(self._where):
            return number == self._unknown_id or REPLACEMENT in self._processor.decode([number])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens are dropped."""
        with guarded(self._where):
            return "".join(
                str(self._processor.decode(list(run), skip_special_tokens=True))
                if known
                else REPLACEMENT * len(list(run))
                for known, run in itertools.groupby(map(int, ids), self._is_known)
            )

    def spec(self) -> dict[str, Any]:
        """See Vocabulary.spec; `model` is tokenizer.json, compressed, in base64."""
        packed = base64.b64encode(zlib.compress(self.model, 9)).decode()
        return {
            "kind": self.kind,
            "size": self.size,
            "eos_id": self.eos_id,
            "digest": self.digest,
            "special": json.loads(json.dumps(dataclasses.asdict(self.special))),
            "model": packed,
        }
