"""The input pipeline: tokens per second from a token store to batches on the device, over what the step consumes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.parts import table
from benchmarks.parts.trainers import SIZES, Size, ours, params_of, program_of
from benchmarks.turns import Quartiles, turns
from flm_jax.data.batches import StoreBatches
from flm_jax.data.store import TokenStore
from flm_jax.data.store_writer import StoreWriter
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.sharding import put_batch

TITLE = "Input pipeline"
READING = (
    "Batches are read from a token store of random documents in shuffled order, and placed on the device; the step "
    "is the one that consumes most tokens per second, 3.4 M parameters. Below 1 % of a step's time, input does not "
    "matter; it runs on the same processors as the step here."
)
# Tokens of the store, batches per round, rounds.
SETTINGS = {"full": (20_000_000, 50, 12), "quick": (4_000_000, 30, 5), "tiny": (20_000, 3, 2)}
DOCUMENT = 2000


def write_store(folder: Path, vocab: int, tokens: int) -> TokenStore:
    """A store of random documents of DOCUMENT tokens each."""
    rng, vocabulary = np.random.default_rng(0), ByteVocabulary(max(vocab - 259, 0))
    with StoreWriter(folder / "store", vocabulary, "random", {"kind": "random"}) as writer:
        for number in range(max(tokens // DOCUMENT, 2)):
            ids = rng.integers(3, 250, DOCUMENT, dtype=np.int32)
            writer.append("heldout" if number == 0 else "train", ids, DOCUMENT)
        return writer.close()


def measure(effort: str) -> dict[str, Any]:
    """Batches and steps in turns."""
    tokens, batches, rounds = SETTINGS[effort]
    name = "tiny" if effort == "tiny" else "3.4 M"
    size: Size = SIZES[name]
    mesh = program_of(size).mesh
    step = ours(size, params_of(size))
    with tempfile.TemporaryDirectory() as folder:
        source = StoreBatches(write_store(Path(folder), size.vocab, tokens), "train", size.context, 0)

        def read() -> None:
            for _ in range(batches):
                source.next(size.rows)

        def read_and_put() -> None:
            for _ in range(batches):
                jax.block_until_ready(put_batch(source.next(size.rows), mesh))

        def train() -> None:
            step()

        timings = turns({"read": read, "placed": read_and_put, "step": train}, rounds)
    per_batch = [seconds / batches for seconds in timings.seconds["placed"]]
    share = [batch / step for batch, step in zip(per_batch, timings.seconds["step"], strict=True)]
    return {
        "size": name,
        "tokens": tokens,
        "batch": f"{size.rows} x {size.context}",
        "read": timings.rate("read", size.tokens * batches),
        "placed": timings.rate("placed", size.tokens * batches),
        "step": timings.rate("step", size.tokens),
        "share": [float(value) for value in np.percentile(share, (25, 50, 75))],
        "seconds": timings.record(),
    }


def tables(found: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    rates = [Quartiles(*found[name]).text(",.0f") for name in ("read", "placed", "step")]
    share = Quartiles(*found["share"]).text(".2f", 100) + " %"
    head = ["tokens in the store", "batch", "read", "read and placed", "the step consumes", "input over step"]
    return ["Tokens per second:", table(head, [[f"{found['tokens']:,}", found["batch"], *rates, share]])]
