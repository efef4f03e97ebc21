"""The first two steps: the index of the pool with the hashes of its conversations, and which of them are duplicates."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flm_jax.data.json_lines import Skipped
from flm_jax.data.workers import Workers
from flm_jax.duplicates import near
from flm_jax.progress import count_bar, phases
from flm_jax.records import counted
from flm_jax.selection.config import Duplicates
from flm_jax.selection.pool import PLACE, PoolFile, batches
from flm_jax.selection.steps import Step
from flm_jax.selection.work import hash_batch

# How many messages about faulty lines the report shows, per kind of fault.
EXAMPLES = 10
ADVICE = " by Selection.most_faulty"
STAYS, EXACT, NEAR = range(3)
_BANDS = tuple(f"band{number:02}" for number in range(near.BANDS))


def index(base: Path, pool: Sequence[PoolFile], near_too: bool, faulty: int | None, workers: Workers) -> Step:
    """The finished step with a place and hashes per conversation: about 300 bytes on disk, none in memory.

    Args:
      base: holds the folders of steps.
      pool: the files.
      near_too: whether near duplicates will be looked for.
      faulty: the most lines that may be faulty; None: any number.
      workers: what to compute with.

    Raises:
      LineError: there are more faulty lines, or a file is damaged.
      ValueError: no line of the pool is a conversation.
    """
    step = Step(base, "index", {"pool": [file.record() for file in pool], "near": near_too})
    if step.finished:
        _check_faults(step, faulty)
        return step
    step.clear()
    skipped, count = Skipped(faulty, EXAMPLES, ADVICE), 0
    with step.columns("places", "texts", "short", *_BANDS) as files, count_bar("reading", " lines") as bar:
        for batch, found in workers.map(functools.partial(hash_batch, near_too=near_too), batches(pool)):
            for fault in found.faults:
                skipped.add(fault)
            files["places"].write(batch.places[found.good].tobytes())
            files["texts"].write(found.texts.tobytes())
            files["short"].write(found.short.tobytes())
            for name, hashes in zip(_BANDS, found.bands, strict=True):
                files[name].write(hashes.tobytes())
            count += len(found.texts)
            bar.update(len(batch.lines))
    if not count:
        raise ValueError(f"no line of the pool is a conversation: {skipped.summary() or 'it is empty'}")
    faults = {reason: {"count": n, "examples": skipped.examples[reason]} for reason, n in skipped.counts.items()}
    step.finish({"conversations": count, "faults": faults})
    return step


def _check_faults(step: Step, faulty: int | None) -> None:
    """Refuses an index that was made with more faulty lines than are allowed now."""
    total = sum(fault["count"] for fault in step.facts()["faults"].values())
    if faulty is not None and total > faulty:
        raise ValueError(f"the pool has {counted(total, 'faulty line')}, more than the {faulty} allowed{ADVICE}")


def duplicates(base: Path, indexed: Step, config: Duplicates) -> Step:
    """The finished step with the arrays `kinds` (STAYS, EXACT or NEAR) and `stays`, the number that stays in its place.

    Args:
      base: holds the folders of steps.
      indexed: the index.
      config: what counts as a duplicate.
    """
    depends = {"index": indexed.digest, "near": config.near, "threshold": config.threshold}
    step = Step(base, "duplicates", depends)
    if step.finished:
        return step
    with phases("exact duplicates", "near duplicates") as begin:
        begin()
        stays = near.first_of_equal(indexed.column("texts", np.uint64))
        own = np.arange(len(stays))
        kinds = np.where(stays == own, STAYS, EXACT).astype(np.uint8)
        del own
        begin()
        if config.near:
            pairs = _near_pairs(indexed, np.flatnonzero(kinds == STAYS), config.threshold)
            into = near.drop(pairs, len(kinds))
            new = (kinds == STAYS) & (into != np.arange(len(kinds)))
            kinds[new], stays[new] = NEAR, into[new]
    step.save("kinds", kinds)
    step.save("stays", stays.astype(np.uint32))
    counts = np.bincount(kinds, minlength=3)
    step.finish({"exact": int(counts[EXACT]), "near": int(counts[NEAR])})
    return step


def _near_pairs(indexed: Step, left: np.ndarray, threshold: float) -> np.ndarray:
    """int64 (n, 2): the pairs of near duplicates, each once."""

    def signatures() -> np.ndarray:
        return indexed.column("short", np.uint8, mapped=True).reshape(-1, near.PERMUTATIONS)

    def bands(number: int) -> np.ndarray:
        return indexed.column(_BANDS[number], np.uint64)

    packed = np.zeros(0, np.uint64)  # bands find most pairs more than once
    for pairs in near.near_pairs(left, bands, near.comparison(signatures, threshold)):
        words = pairs.astype(np.uint64)
        packed = np.union1d(packed, (words[:, 0] << np.uint64(32)) | words[:, 1])
    return np.stack([packed >> np.uint64(32), packed & np.uint64(0xFFFFFFFF)], axis=1).astype(np.int64)


def places(indexed: Step) -> np.ndarray:
    """The places of all conversations, as a map of the file."""
    return indexed.column("places", PLACE, mapped=True)
