"""What processes do with a part: hash its documents, turn them into tokens; results go to a `PartFolder`.

A process that only does this imports neither JAX nor TensorFlow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flm_jax.data.left_out import LEFT_OUT
from flm_jax.data.part_files import DROPPED, STARTS, PartResult, is_done, result, result_name
from flm_jax.data.parts import Block, Part, TextFiles, hashed, left_out_of, tokenised
from flm_jax.data.store_record import VOCABULARY_FILE, store_dtype
from flm_jax.data.text import SPLITS
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.data.vocabulary_files import from_spec
from flm_jax.duplicates import near
from flm_jax.records.foreign_json import read_json

TOKENS, HASHES = "tokens", "hashes"
BANDS = tuple(f"band{number:02}" for number in range(near.BANDS))
# A vocabulary's spec holds its model.
_MOST_SPEC = 1 << 28


@dataclasses.dataclass(frozen=True)
class Job:
    """What processes need to know; it is sent to them with every part.

    Attributes:
      corpus: what the parts are of.
      folder: of the results, a `PartFolder`.
      border: the held-out border of the corpus.
      deduplicated: whether some documents are dropped, as the folder says.
      near: whether near duplicates are looked for.
    """

    corpus: TextFiles
    folder: str
    border: int
    deduplicated: bool
    near: bool


@functools.lru_cache(1)
def vocabulary_at(path: str) -> Vocabulary:
    """The vocabulary whose spec lies in a file; the last one is kept."""
    return from_spec(read_json(Path(path), most=_MOST_SPEC))


def hash_part(job: Job, part: Part) -> int:
    """Writes the hashes of a part unless they are there; returns its size."""
    folder = Path(job.folder)
    if is_done(folder, HASHES, part.number):
        return part.size
    with result(folder, result_name(HASHES, part.number)) as writer:
        count = 0
        for found in hashed(job.corpus, part, job.near):
            writer.add("texts", found.texts)
            writer.add("short", found.short)
            for name, band in zip(BANDS, found.bands, strict=True):
                writer.add(name, band)
            count += len(found.texts)
        writer.facts["documents"] = count
    return part.size


def dropped_of(folder: Path, part: Part) -> np.ndarray:
    """Which documents of a part are dropped, bool (documents,)."""
    starts = np.load(folder / STARTS, allow_pickle=False)
    kinds = np.load(folder / DROPPED, mmap_mode="r", allow_pickle=False)
    found: np.ndarray = kinds[starts[part.number] : starts[part.number + 1]] != 0
    return found


def tokenise_part(job: Job, part: Part) -> int:
    """Writes the tokens of a part unless they are there; returns its size."""
    folder = Path(job.folder)
    if is_done(folder, TOKENS, part.number):
        return part.size
    vocabulary = vocabulary_at(str(folder / VOCABULARY_FILE))
    dropped = dropped_of(folder, part) if job.deduplicated else None
    with result(folder, result_name(TOKENS, part.number)) as writer:
        sizes = dict.fromkeys(SPLITS, 0)
        documents, left_out = 0, left_out_of(job.corpus)
        for block in tokenised(job.corpus, part, job.border, vocabulary, dropped, left_out):
            writer.add(f"{block.split}.tokens", block.tokens.astype(store_dtype(vocabulary.size)))
            writer.add(f"{block.split}.lengths", block.lengths.astype("<u8"))
            sizes[block.split] += block.text_bytes
            documents += len(block.lengths)
        writer.facts |= {"text_bytes": sizes, "documents": documents, LEFT_OUT: left_out.record()}
    return part.size


def blocks(found: PartResult, size: int) -> Iterator[Block]:
    """The tokens of a part, as it has written them, one block per split.

    Args:
      found: the result of `tokenise_part`.
      size: of the vocabulary.

    Raises:
      ValueError: a file is damaged.
    """
    for split in SPLITS:
        lengths = found.array(f"{split}.lengths", "<u8")
        if len(lengths):
            tokens = found.array(f"{split}.tokens", store_dtype(size))
            yield Block(split, tokens, lengths, int(found.facts["text_bytes"][split]))
