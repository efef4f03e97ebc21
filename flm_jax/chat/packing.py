"""Packing: conversations into windows of a fixed length, first-fit, so that little of a window is padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flm_jax.data.corpora import Document

# Windows that are open at the same time. More pack tighter; the order of documents changes less with fewer.
OPEN = 64


class Packer:
    """Puts documents into windows, and returns them window by window; it holds the open windows only.

    Each document goes into the first open window that has room for it. Where none has and as many are open as may be,
    the fullest is closed.
    """

    def __init__(self, context: int, pad_id: int, most_open: int = OPEN) -> None:
        """Begins without windows.

        Args:
          context: tokens per window.
          pad_id: what fills windows up, without weight.
          most_open: how many windows are open at the same time.
        """
        self._context, self._pad_id, self._most_open = context, pad_id, most_open
        self._windows: list[tuple[int, list[Document]]] = []  # tokens of room, content

    def add(self, document: Document) -> list[Document]:
        """Adds a document; returns those of the window that is closed for it, if one is, the last of them padded.

        Args:
          document: of at most `context` tokens; the first has no weight, since nothing precedes it.

        Raises:
          ValueError: the document is empty or longer than a window, or its first token has weight.
        """
        size = len(document.tokens)
        if not 0 < size <= self._context:
            raise ValueError(f"a document of {size} tokens does not fit into windows of {self._context}")
        if document.weights[0]:
            raise ValueError("the first token of a document has weight, and there is nothing to predict it from")
        place = next((i for i, (room, _) in enumerate(self._windows) if room >= size), None)
        closed: list[Document] = []
        if place is None:
            if len(self._windows) == self._most_open:
                fullest = min(range(len(self._windows)), key=lambda i: self._windows[i][0])
                closed = list(self._closed(self._windows.pop(fullest)))
            self._windows.append((self._context, []))
            place = len(self._windows) - 1
        room, content = self._windows[place]
        self._windows[place] = (room - size, [*content, document])
        return closed

    def close(self) -> Iterator[Document]:
        """Yields the documents of the windows that are open.

        The last window is followed by one token of padding, as a window's last target is the first token of the next.
        """
        while self._windows:
            room, content = self._windows.pop(0)
            yield from self._closed((room if self._windows else room + 1, content))

    def _closed(self, window: tuple[int, list[Document]]) -> Iterator[Document]:
        room, content = window
        yield from content[:-1]
        tokens, weights, text_bytes = content[-1]
        padding = np.full(room, self._pad_id, np.int32)
        yield Document(np.append(tokens, padding), np.append(weights, np.zeros(room, np.uint8)), text_bytes)
