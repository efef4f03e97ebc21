"""Calls into the library that reads tokenizer.json, with whatever it raises as a ValueError that names the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def guarded(where: str) -> Iterator[None]:
    """A context for calls of the library `tokenizers`.

    Raises:
      ValueError: the library raised something; the message begins with `where`.
    """
    try:
        yield
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{where} is not a tokenizer that the package tokenizers can read: {error}") from None
    except BaseException as error:
        # A failed assertion of the library (Rust) comes as a PanicException, which is no Exception, and whose class
        # cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{where} makes the package tokenizers fail: {error}") from None


def load(model: bytes, where: str) -> Any:
    """The tokenizer in the bytes of a tokenizer.json, without truncation and padding, which a file may ask for.

    Raises:
      ValueError: it is no tokenizer, or the library that reads it is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"{where} is read by the package tokenizers: pip install -r requirements.txt") from None
    with guarded(where):
        processor = tokenizers.Tokenizer.from_str(model.decode())
        processor.no_truncation()
        processor.no_padding()
    return processor


def token_count(model: bytes, where: str) -> int:
    """The number of ids of a tokenizer.json, which is one more than the largest.

    Raises:
      ValueError: as `load`.
    """
    processor = load(model, where)
    with guarded(where):
        return 1 + max(processor.get_vocab(with_added_tokens=True).values(), default=-1)
