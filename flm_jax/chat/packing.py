"""Packing: conversations into windows of a fixed length, first-fit, so that little of a window is padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from flm_jax.data.corpora import Document

# Windows that are open at the same time. More pack tighter; the order of documents changes less with fewer.
OPEN = 64


def pack(documents: Iterable[Document], context: int, pad_id: int, most_open: int = OPEN) -> Iterator[Document]:
    """Yields the documents in the order of the windows that they are put into; the last of a window is padded.

    Each document goes into the first open window that has room for it. Where none has and `most_open` are open, the
    fullest is closed. The last window is followed by one token of padding, as a window's last target is the first
    token of the next one.

    Args:
      documents: each of at most `context` tokens; the first token of each has no weight, since nothing precedes it.
      context: tokens per window.
      pad_id: what fills windows up, without weight.
      most_open: how many windows are open at the same time.

    Raises:
      ValueError: a document is empty or longer than a window, or its first token has weight.
    """
    windows: list[tuple[int, list[Document]]] = []  # tokens of room, content
    for document in documents:
        size = len(document.tokens)
        if not 0 < size <= context:
            raise ValueError(f"a document of {size} tokens does not fit into windows of {context}")
        if document.weights[0]:
            raise ValueError("the first token of a document has weight, and there is nothing to predict it from")
        place = next((i for i, (room, _) in enumerate(windows) if room >= size), None)
        if place is None:
            if len(windows) == most_open:
                fullest = min(range(len(windows)), key=lambda i: windows[i][0])
                yield from _closed(windows.pop(fullest), pad_id)
            windows.append((context, []))
            place = len(windows) - 1
        room, content = windows[place]
        windows[place] = (room - size, [*content, document])
    while windows:
        room, content = windows.pop(0)
        yield from _closed((room if windows else room + 1, content), pad_id)


def _closed(window: tuple[int, list[Document]], pad_id: int) -> Iterator[Document]:
    room, content = window
    yield from content[:-1]
    tokens, weights, text_bytes = content[-1]
    padding = np.full(room, pad_id, np.int32)
    yield Document(np.append(tokens, padding), np.append(weights, np.zeros(room, np.uint8)), text_bytes)
