"""The tokens of a corpus of files, part by part: in this process, by several, or by a pipeline; the same whichever.

First the corpus is looked at, for its digest and the border of its held-out split. Where duplicates are dropped,
documents are hashed, and this process decides. Then they are tokenised, and put together in the order of the corpus.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flm_jax.data.dedup import EXACT, NEAR, Dedup, decide
from flm_jax.data.left_out import LEFT_OUT, LeftOut
from flm_jax.data.part_files import DROPPED, STARTS, PartFolder, PartResult, is_done, result_name
from flm_jax.data.part_work import BANDS, HASHES, TOKENS, Job, blocks, hash_part, tokenise_part
from flm_jax.data.parts import Block, Part, TextFiles, changed, divide, left_out_of, look, looks, tokenised
from flm_jax.data.rows import RowCorpus
from flm_jax.data.store_record import VOCABULARY_FILE
from flm_jax.data.text import FileCorpus, border_within
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.data.vocabulary_files import spec_bytes
from flm_jax.data.workers import Runner
from flm_jax.duplicates import near
from flm_jax.files import atomic_write, sha256_json

# A part of more bytes, such as a compressed file, is looked at without keeping all that its digest covers.
_LARGE = 4
Bar = Callable[[int, str], Any]


@dataclasses.dataclass(frozen=True)
class Texts:
    """A corpus that was looked at.

    Attributes:
      corpus: what it is.
      parts: all of it, in order.
      digest: of the corpus.
      left_out: its faulty rows, as far as reading it for the digest has told of them.
      hashes: the lowest and the highest hash of a name; None: it was not asked for.
      documents: of each part; empty: they were not counted.
    """

    corpus: TextFiles
    parts: list[Part]
    digest: str
    left_out: LeftOut
    hashes: tuple[int, int] | None = None
    documents: tuple[int, ...] = ()

    @functools.cached_property
    def border(self) -> int:
        """The border below which the hash of a name puts a document into the held-out split.

        Raises:
          ValueError: there is no document.
        """
        return self.corpus.border() if self.hashes is None else border_within(self.hashes, self.corpus.heldout_percent)


def open_texts(corpus: TextFiles, runner: Runner | None, bar: Bar) -> Texts:
    """Looks at a corpus: reads all of it, with the runner's processes on this machine.

    Args:
      corpus: any corpus of files.
      runner: None: this process reads it, in one part.
      bar: makes a progress bar, of a number of bytes and a label.

    Raises:
      TooManyError: more rows are faulty than are allowed; the message does not depend on the runner.
      ValueError, OSError: as the corpus raises them, where a file cannot be read.
    """
    left_out = left_out_of(corpus)
    if runner is None:
        if isinstance(corpus, RowCorpus) and type(corpus).digest is RowCorpus.digest:
            return Texts(corpus, divide(corpus, None), corpus.digest(left_out), left_out)
        return Texts(corpus, divide(corpus, None), corpus.digest(), left_out)
    parts = divide(corpus, runner.part_bytes)
    if type(corpus).digest not in (FileCorpus.digest, RowCorpus.digest):
        return Texts(corpus, parts, corpus.digest(), left_out)
    whole, counts, seen = hashlib.sha256(corpus.digest_head()), [], []
    small = [part for part in parts if not _is_large(part, runner)]
    with bar(sum(part.size for part in parts), "reading") as shown:
        results = runner.here.map(functools.partial(look, corpus), small)
        for part in parts:
            if _is_large(part, runner):
                count, low, high = 0, 2**64, -1
                for one in looks(corpus, part, left_out):
                    whole.update(one.entry)
                    count, low, high = count + 1, min(low, one.hashed), max(high, one.hashed)
                hashes = (low, high) if count else None
            else:
                _, found = next(results)
                left_out.add_all(found.left_out)
                whole.update(found.entries)
                count, hashes = found.documents, found.hashes
            counts.append(count)
            seen += [] if hashes is None else [hashes]
            shown.update(part.size)
    span = (min(low for low, _ in seen), max(high for _, high in seen)) if seen else None
    return Texts(corpus, parts, whole.hexdigest(), left_out, span, tuple(counts))


def _is_large(part: Part, runner: Runner) -> bool:
    return not part.pieces or part.size > _LARGE * runner.part_bytes


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a corpus, to be written.

    Attributes:
      blocks: all documents that stay, those of each split in order.
      description: what was dropped, JSON-able; empty where nothing is.
      left_out: the faulty rows of the parts whose blocks were read; after the last block, of all.
    """

    blocks: Iterator[Block]
    description: dict[str, Any]
    left_out: LeftOut


@contextlib.contextmanager
def tokens_of(
    texts: Texts, vocabulary: Vocabulary, store: Path, dedup: Dedup | None, runner: Runner | None, bar: Bar
) -> Iterator[Tokens]:
    """A context with the tokens of a corpus; an error that ends it leaves the results of parts for the next call.

    Args:
      texts: the corpus.
      vocabulary: what to tokenise with.
      store: where the store will be; results of parts are kept beside it.
      dedup: which duplicates are dropped; None: none.
      runner: what works on the parts; None: this process tokenises them while they are written, and drops none.
      bar: makes a progress bar, of a number of bytes and a label.

    Raises:
      ValueError: another process prepares the same text; or a file cannot be read or has changed.
    """
    left_out = left_out_of(texts.corpus)
    if runner is None:
        assert dedup is None
        with bar(sum(part.size for part in texts.parts), "tokenising") as shown:
            yield Tokens(_here(texts, vocabulary, left_out, shown), {}, left_out)
        return
    plan = sha256_json([[part.size, [[piece.name, piece.span] for piece in part.pieces]] for part in texts.parts])
    about = {"parts": plan, "digest": texts.digest, "border": texts.border, "vocabulary": vocabulary.digest}
    about |= {"dedup": None if dedup is None else dedup.identity()}
    with PartFolder(parts_folder(store), about) as folder:
        atomic_write(folder.path / VOCABULARY_FILE, spec_bytes(vocabulary))
        near_too = dedup is not None and dedup.near is not None
        job = Job(texts.corpus, str(folder.path.absolute()), texts.border, dedup is not None, near_too)
        description: dict[str, Any] = {}
        stay = list(texts.documents)
        if dedup is not None:
            _work(runner, functools.partial(hash_part, job), HASHES, folder.path, texts.parts, bar)
            description, stay = _decided(folder.path, texts, dedup)
        _work(runner, functools.partial(tokenise_part, job), TOKENS, folder.path, texts.parts, bar)
        blocks_of_all = _written(folder.path, texts.parts, stay, vocabulary.size, left_out, bar)
        yield Tokens(blocks_of_all, description, left_out)
        folder.remove()


def parts_folder(store: Path) -> Path:
    """The hidden folder beside a store in which the results of its parts are kept until it is written."""
    return store.with_name(f".{store.name}.parts")


def _here(texts: Texts, vocabulary: Vocabulary, left_out: LeftOut, shown: Any) -> Iterator[Block]:
    for part in texts.parts:
        for block in tokenised(texts.corpus, part, texts.border, vocabulary, None, left_out):
            yield block
            shown.update(block.text_bytes)


def _work(
    runner: Runner, function: Callable[[Part], int], kind: str, folder: Path, parts: Sequence[Part], bar: Bar
) -> None:
    """Has the runner work on the parts whose results are not there."""
    left = [part for part in parts if not is_done(folder, kind, part.number)]
    with bar(sum(part.size for part in parts), {HASHES: "hashing", TOKENS: "tokenising"}[kind]) as shown:
        shown.update(sum(part.size for part in parts) - sum(part.size for part in left))
        runner.run(function, left, shown.update)
    if missing := [part for part in left if not is_done(folder, kind, part.number)]:
        raise OSError(
            f"{folder / result_name(kind, missing[0].number)} was not written: do the machines share the disk of "
            "DataConfig.cache_dir, under the same path?"
        )


def _decided(folder: Path, texts: Texts, dedup: Dedup) -> tuple[dict[str, Any], list[int]]:
    """What is dropped, for the store's description, and how many documents of each part stay."""
    found = [_result(folder, HASHES, part) for part in texts.parts]
    counts = [int(one.facts["documents"]) for one in found]
    for part, now, before in zip(texts.parts, counts, texts.documents or counts, strict=True):
        if now != before:
            raise ValueError(changed(part, now, before))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if (folder / DROPPED).is_file():
        kinds = np.load(folder / DROPPED, allow_pickle=False)
    else:
        kinds = _kinds(folder, found, dedup)
        for name, array in ((STARTS, starts), (DROPPED, kinds)):  # this one last: it says that both are there
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            atomic_write(folder / name, content.getvalue())
    about = {"exact": dedup.exact, "near": dedup.near, "documents": len(kinds)}
    about |= {"dropped_exact": int((kinds == EXACT).sum()), "dropped_near": int((kinds == NEAR).sum())}
    stay = [int((kinds[start:end] == 0).sum()) for start, end in itertools.pairwise(starts.tolist())]
    return {"dedup": about}, stay


def _kinds(folder: Path, found: Sequence[PartResult], dedup: Dedup) -> np.ndarray:
    def column(name: str) -> np.ndarray:
        return np.concatenate([one.array(name, "<u8") for one in found])

    short = folder / "short.bin"
    if dedup.near is not None:
        with short.open("wb") as file:
            for one in found:
                file.write(one.array("short", np.uint8).data)
    try:
        return decide(
            dedup,
            column("texts"),
            lambda number: column(BANDS[number]),
            lambda: np.memmap(short, np.uint8, "r").reshape(-1, near.PERMUTATIONS),
        )
    finally:
        short.unlink(missing_ok=True)


def _result(folder: Path, kind: str, part: Part) -> PartResult:
    return PartResult(folder / result_name(kind, part.number))


def _written(
    folder: Path, parts: Sequence[Part], stay: Sequence[int], size: int, left_out: LeftOut, bar: Bar
) -> Iterator[Block]:
    """The tokens of all parts, as they lie in a folder.

    Args:
      folder: with their results.
      parts: all of them.
      stay: how many documents each has; empty: that is not known.
      size: of the vocabulary.
      left_out: counts their faulty rows.
      bar: makes a progress bar.
    """
    with bar(sum(part.size for part in parts), "writing the store") as shown:
        for part in parts:
            found = _result(folder, TOKENS, part)
            if stay and found.facts["documents"] != stay[part.number]:
                raise ValueError(changed(part, found.facts["documents"], stay[part.number]))
            if LEFT_OUT in found.facts:  # an earlier version allowed none
                left_out.add_all(found.facts[LEFT_OUT])
            yield from blocks(found, size)
            shown.update(part.size)
