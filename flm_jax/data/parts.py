"""Parts of a corpus: documents that follow one another, which one process reads and turns into tokens or hashes.

What a store holds does not depend on how a corpus is divided: the documents of all parts in order are those of the
corpus in order.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flm_jax.data.json_lines import TooManyError
from flm_jax.data.left_out import LeftOut, kept
from flm_jax.data.rows import RowCorpus, Span
from flm_jax.data.text import FileCorpus, name_hash
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.duplicates import near, shingles

# Of text: seconds of work, so that little is lost when a process is killed, and few files lie beside each other.
PART_BYTES = 16 << 20
# Documents that are in memory at a time, beside the one that is read.
BATCH_BYTES, BATCH_DOCUMENTS = 1 << 20, 1024
TextFiles = FileCorpus | RowCorpus


class Piece(NamedTuple):
    """What a part reads of one file.

    Attributes:
      name: the file's name in the corpus.
      path: where it lies.
      span: the lines that are read; None: all of it.
    """

    name: str
    path: str
    span: Span | None


class Part(NamedTuple):
    """A part of a corpus.

    Attributes:
      number: its place among the parts, from 0.
      pieces: what it reads, in order; none: the whole corpus.
      size: in bytes, as it lies on disk.
    """

    number: int
    pieces: tuple[Piece, ...]
    size: int


def divide(corpus: TextFiles, most_bytes: int | None = PART_BYTES) -> list[Part]:
    """The parts of a corpus, in order.

    Files are put together up to `most_bytes`; a larger one is divided if it is plain JSON lines. A corpus that lists no
    files, such as a single text that is cut or a repository, is one part.

    Args:
      corpus: any corpus of files.
      most_bytes: the size of a part, about; None: one part.

    Raises:
      FileNotFoundError: there is no file.
    """
    listed = corpus.listed()
    if listed is None or most_bytes is None:
        whole = () if listed is None else tuple(Piece(name, str(path), None) for name, path in listed)
        return [Part(0, whole, sum(path.stat().st_size for _, path in listed or ()))]
    parts: list[Part] = []
    gathered: list[Piece] = []
    room = most_bytes

    def end() -> None:
        nonlocal gathered, room
        if gathered:
            parts.append(Part(len(parts), tuple(gathered), most_bytes - room))
        gathered, room = [], most_bytes

    for name, path in listed:
        size = path.stat().st_size
        spans: list[Span] | None = None
        if size > most_bytes and isinstance(corpus, RowCorpus):
            spans = corpus.spans(path, most_bytes)
        for span in spans if spans is not None else [None]:
            size = size if span is None else span.end - span.start
            if size > room:
                end()
            gathered.append(Piece(name, str(path), span))
            room -= size
    end()
    return parts


def left_out_of(corpus: TextFiles) -> LeftOut:
    """Counts what is left out of a corpus or a part of it; in a corpus of a document per file no row is faulty."""
    return corpus.left_out() if isinstance(corpus, RowCorpus) else LeftOut(0)


def documents(corpus: TextFiles, part: Part, left_out: LeftOut | None = None) -> Iterator[tuple[str, str]]:
    """Yields name and text of each document of a part that is not empty, in order.

    Args:
      corpus: what the part is of.
      part: one of `divide`.
      left_out: counts the faulty rows; None: they are counted, and nothing is told of them.

    Raises:
      TooManyError: the part has more faulty rows than are allowed.
      ValueError, OSError: as the corpus raises them, where a file cannot be read.
    """
    if isinstance(corpus, RowCorpus):
        left_out = left_out_of(corpus) if left_out is None else left_out
        if not part.pieces:
            yield from corpus.lines(left_out)
        for piece in part.pieces:
            for number, text in kept(corpus.texts(Path(piece.path), piece.span), left_out):
                yield f"{piece.name}:{number}", text
    elif part.pieces:
        for piece in part.pieces:
            if content := corpus.content(Path(piece.path)):
                yield piece.name, content.decode("utf-8")
    else:
        for name, _, content in corpus.contents():
            yield name, content.decode("utf-8")


def _batches(found: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, room = [], BATCH_BYTES
    for name, text in found:
        batch.append((name, text))
        room -= len(text)
        if room <= 0 or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, room = [], BATCH_BYTES
    if batch:
        yield batch


class Look(NamedTuple):
    """What is known of a document before it is tokenised.

    Attributes:
      hashed: the hash of its name, which decides whether it is held out.
      entry: what the corpus's digest covers of it.
    """

    hashed: int
    entry: bytes


def looks(corpus: TextFiles, part: Part, left_out: LeftOut | None = None) -> Iterator[Look]:
    """Yields a `Look` at each document of a part; see `documents`."""
    for name, text in documents(corpus, part, left_out):
        if isinstance(corpus, RowCorpus):
            yield Look(name_hash(name), corpus.digest_entry(name, text))
        else:
            yield Look(name_hash(name), corpus.digest_entry(name, text.encode()))


class Looked(NamedTuple):
    """A part that was looked at.

    Attributes:
      documents: their number.
      hashes: the lowest and the highest hash of a name; None: there is no document.
      entries: what the corpus's digest covers of them.
      left_out: the `LeftOut.record` of its faulty rows.
    """

    documents: int
    hashes: tuple[int, int] | None
    entries: bytes
    left_out: dict[str, Any]


def look(corpus: TextFiles, part: Part) -> Looked:
    """Looks at a part; the result is as large as its text, so a part of any size is looked at by `looks`.

    Where the part alone has too many faulty rows, it is not read to its end. To refuse it is left to the process that
    adds up all parts, in whose message the first faulty rows of the corpus stand.
    """
    found, left_out = [], left_out_of(corpus)
    with contextlib.suppress(TooManyError):
        for one in looks(corpus, part, left_out):
            found.append(one)
    hashes = [one.hashed for one in found]
    entries = b"".join(one.entry for one in found)
    return Looked(len(found), (min(hashes), max(hashes)) if hashes else None, entries, left_out.record())


class Block(NamedTuple):
    """Documents of one split as tokens.

    Attributes:
      split: train or heldout.
      tokens: of one document after the other, each with its end; integers (n,).
      lengths: tokens of each document, uint64 (documents,).
      text_bytes: of their texts in UTF-8.
    """

    split: str
    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int


def tokenised(
    corpus: TextFiles,
    part: Part,
    border: int,
    vocabulary: Vocabulary,
    dropped: np.ndarray | None = None,
    left_out: LeftOut | None = None,
) -> Iterator[Block]:
    """Yields the documents of a part as tokens, those of each split in order.

    Args:
      corpus: what the part is of.
      part: one of `divide`.
      border: the corpus's held-out border.
      vocabulary: what to tokenise with.
      dropped: for each document of the part whether it is left out; None: none is.
      left_out: see `documents`.

    Raises:
      ValueError: the part has more or fewer documents than `dropped` has entries, as if a file had changed.
    """
    keep = itertools.repeat(False) if dropped is None else iter(dropped.tolist())
    read = 0
    for batch in _batches(documents(corpus, part, left_out)):
        read += len(batch)
        splits: dict[str, list[list[int]]] = {}
        sizes: dict[str, int] = {}
        for name, text in batch:
            if next(keep, False):
                continue
            split = "heldout" if name_hash(name) < border else "train"
            splits.setdefault(split, []).append([*vocabulary.encode(text), vocabulary.eos_id])
            sizes[split] = sizes.get(split, 0) + len(text.encode())
        for split, found in splits.items():
            lengths = np.fromiter(map(len, found), np.uint64, len(found))
            tokens = np.fromiter(itertools.chain.from_iterable(found), np.int32, int(lengths.sum()))
            yield Block(split, tokens, lengths, sizes[split])
    if dropped is not None and read != len(dropped):
        raise ValueError(changed(part, read, len(dropped)))


def changed(part: Part, now: int, before: int) -> str:
    """The sentence about a part whose files were altered while they were prepared."""
    return (
        f"{part.pieces[0].path if part.pieces else 'the corpus'} was altered while it was prepared: part {part.number} "
        f"has {now} documents now and had {before}; run the same command again"
    )


class Hashes(NamedTuple):
    """Hashes of documents, by which duplicates are found.

    Attributes:
      texts: uint64 (documents,), of the whole texts.
      bands: uint64 (16, documents), of the bands of MinHash signatures; (16, 0) where they are not asked for.
      short: uint8 (documents, 128), short signatures; (0, 128) where they are not asked for.
    """

    texts: np.ndarray
    bands: np.ndarray
    short: np.ndarray


def hashed(corpus: TextFiles, part: Part, near_too: bool) -> Iterator[Hashes]:
    """Yields the hashes of the documents of a part, in order.

    Args:
      corpus: what the part is of.
      part: one of `divide`.
      near_too: whether near duplicates will be looked for.
    """
    for batch in _batches(documents(corpus, part)):
        texts = np.array([shingles.text_hash(text) for _, text in batch], np.uint64)
        signature = np.zeros((0, near.PERMUTATIONS), np.uint32)
        if near_too:
            found = [shingles.normalised(text[: 2 * shingles.LONGEST]) for _, text in batch]
            signature = near.signatures(shingles.shingles(shingles.tokens(found)))
        yield Hashes(texts, near.band_hashes(signature), near.short(signature))
