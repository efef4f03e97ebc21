"""Vocabularies as data: a JSON record in a token store; a record and the files that it is read from in a checkpoint."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

from flm_jax.data.special import CHAT_TEMPLATE, CONFIGS, Special
from flm_jax.data.vocabulary import (
    TOKENIZER,
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    Vocabulary,
)
from flm_jax.records.foreign_json import parse_json

# The record of a checkpoint's vocabulary: kind, size, special ids, and the digest that its content must have.
RECORD = "vocabulary.json"
# By kind, the file with the model.
MODELS = {"sentencepiece": "tokenizer.model", "tokenizer": TOKENIZER}
# Every file of a checkpoint that describes a vocabulary: with another vocabulary it would describe another model.
FILES = (
    RECORD,
    TOKENIZER,
    *CONFIGS[:3],
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
    "chat_template.json",
    "tekken.json",
)


class VocabularyError(ValueError):
    """A checkpoint does not say what its token ids mean."""


def from_spec(spec: Mapping[str, Any], model: bytes | None = None) -> Vocabulary:
    """The vocabulary that a `spec()` records.

    Args:
      spec: the record.
      model: the content of the model file, if the record is without it.

    Raises:
      ValueError: an unknown kind, or a record whose content does not match its own digest.
    """
    vocabulary: Vocabulary
    if spec.get("kind") == "bytes":
        vocabulary = ByteVocabulary(extra_ids=int(spec["size"]) - 259)
    elif spec.get("kind") in MODELS:
        try:
            model = zlib.decompress(base64.b64decode(spec["model"], validate=True)) if model is None else model
        except (ValueError, zlib.error) as error:
            raise ValueError(f"the vocabulary's recorded model is damaged: {error}") from None
        if spec["kind"] == "sentencepiece":
            vocabulary = SentencePieceVocabulary(model=model)
        else:
            recorded: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in spec["special"].items()
            }
            vocabulary = TokenizerVocabulary(model, Special(**recorded))
    else:
        raise ValueError(
            f"unknown vocabulary kind {spec.get('kind')!r}: known are 'bytes', 'sentencepiece' and 'tokenizer'"
        )
    if vocabulary.digest != spec["digest"]:
        raise ValueError(f"the vocabulary's record says sha256 {spec['digest']}, its content has {vocabulary.digest}")
    return vocabulary


def spec_bytes(vocabulary: Vocabulary) -> bytes:
    """The spec as JSON bytes, the same for the same vocabulary."""
    return _bytes(vocabulary.spec())


def _bytes(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def to_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """The files, by name, that a checkpoint keeps of a vocabulary: its record, and its model file if it has one."""
    spec = vocabulary.spec()
    packed = spec.pop("model", None)
    files = {RECORD: _bytes(spec)}
    if packed is not None:
        files[MODELS[vocabulary.kind]] = zlib.decompress(base64.b64decode(packed))
    return files


def from_files(files: Mapping[str, bytes], where: str) -> Vocabulary | None:
    """The vocabulary in the files of a checkpoint, by name; None if they hold none.

    A checkpoint that was imported by version 0.1.0 has a tokenizer's files without a record.

    Raises:
      VocabularyError: the files do not fit each other; `where` names their directory.
    """
    try:
        if RECORD in files:
            spec = parse_json(files[RECORD], RECORD)
            return from_spec(spec, files[MODELS[spec["kind"]]] if spec.get("kind") in MODELS else None)
        return TokenizerVocabulary.from_files(files, where) if TOKENIZER in files else None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise VocabularyError(f"the vocabulary in {where} cannot be read: {error}") from error
