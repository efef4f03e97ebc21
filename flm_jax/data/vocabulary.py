"""Vocabularies: text to token ids and back, identical to seqio's, without TensorFlow.

Ids 0, 1 and 2 are padding, end of document and unknown in both kinds. `spec()` holds everything needed to
build the same vocabulary again (a SentencePiece model included), so a store or a checkpoint that records it
stands on its own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


class Vocabulary(Protocol):
    """What the project asks of a vocabulary."""

    @property
    def kind(self) -> str:
        """'bytes' or 'sentencepiece'."""
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
    def digest(self) -> str:
        """A sha256 (hex): equal digests mean equal ids for every text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end-of-document id."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids.

        Padding and end-of-document ids leave nothing behind; ids outside the vocabulary become U+FFFD.
        """
        ...

    def spec(self) -> dict[str, Any]:
        """A JSON-able record from which `from_spec` builds the same vocabulary."""
        ...


# Stands for an id that the vocabulary lacks: an embedding may be padded, and a young model samples such ids.
REPLACEMENT = "\ufffd"


def _runs(ids: Iterable[int], size: int) -> Iterator[tuple[bool, list[int]]]:
    """Runs of ids that lie in the vocabulary, and of ids that do not."""
    for known, run in itertools.groupby(map(int, ids), lambda i: 0 <= i < size):
        yield known, list(run)


class ByteVocabulary:
    """UTF-8 bytes shifted by the three special ids (ByT5, arXiv 2105.13626), as seqio.ByteVocabulary."""

    kind = "bytes"
    eos_id = EOS_ID

    def __init__(self, extra_ids: int = 0) -> None:
        """Builds the vocabulary.

        Args:
          extra_ids: ids above the bytes that no text uses (seqio's sentinels); they decode to nothing.
        """
        self.size = 3 + 256 + extra_ids
        self.digest = hashlib.sha256(f"bytes {self.size}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """One id a byte of the UTF-8 text."""
        return [byte + 3 for byte in text.encode("utf-8")]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are no UTF-8 are dropped, as a sample of a model may hold some."""
        return "".join(
            bytes(i - 3 for i in run if 3 <= i < 259).decode("utf-8", "ignore") if known else REPLACEMENT * len(run)
            for known, run in _runs(ids, self.size)
        )

    def spec(self) -> dict[str, Any]:
        """See Vocabulary.spec."""
        return {"kind": self.kind, "size": self.size, "eos_id": self.eos_id, "digest": self.digest}


class SentencePieceVocabulary:
    """A SentencePiece model.

    A model trained here gives every text back exactly, with one exception that lies in SentencePiece itself:
    U+2581, the character it writes for a space, comes back as a space.
    """

    kind = "sentencepiece"

    def __init__(self, model_path: str | Path | None = None, *, model: bytes | None = None) -> None:
        """Loads a model.

        Args:
          model_path: the model file; or
          model: its bytes.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not a SentencePiece model, or one without an end-of-document id.
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
        except RuntimeError as error:
            raise ValueError(f"{where} is not a SentencePiece model: {error}") from None
        self.size = int(self._processor.get_piece_size())
        self.eos_id = int(self._processor.eos_id())
        if self.eos_id < 0:
            raise ValueError(f"{where} has no end-of-document id: train it with eos_id=1")

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self.model)
        return processor

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; a character without a piece becomes its UTF-8 bytes."""
        return [int(i) for i in self._processor.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return "".join(
            str(self._processor.decode(run)) if known else REPLACEMENT * len(run)
            for known, run in _runs(ids, self.size)
        )

    def spec(self) -> dict[str, Any]:
        """See Vocabulary.spec; `model` is the model file, compressed, in base 64."""
        packed = base64.b64encode(zlib.compress(self.model, 9)).decode()
        return {
            "kind": self.kind,
            "size": self.size,
            "eos_id": self.eos_id,
            "digest": self.digest,
            "model": packed,
        }


def from_spec(spec: dict[str, Any]) -> Vocabulary:
    """The vocabulary that a `spec()` records.

    Raises:
      ValueError: an unknown kind, or a record whose content does not match its own digest.
    """
    vocabulary: Vocabulary
    if spec.get("kind") == "bytes":
        vocabulary = ByteVocabulary(extra_ids=int(spec["size"]) - 259)
    elif spec.get("kind") == "sentencepiece":
        try:
            model = zlib.decompress(base64.b64decode(spec["model"], validate=True))
        except (ValueError, zlib.error) as error:
            raise ValueError(f"the vocabulary's recorded model is damaged: {error}") from None
        vocabulary = SentencePieceVocabulary(model=model)
    else:
        raise ValueError(f"unknown vocabulary kind {spec.get('kind')!r}: known are 'bytes' and 'sentencepiece'")
    if vocabulary.digest != spec["digest"]:
        raise ValueError(f"the vocabulary's record says sha256 {spec['digest']}, its content has {vocabulary.digest}")
    return vocabulary


def spec_bytes(vocabulary: Vocabulary) -> bytes:
    """The spec as JSON bytes, the same for the same vocabulary."""
    return (json.dumps(vocabulary.spec(), indent=1, sort_keys=True) + "\n").encode()
