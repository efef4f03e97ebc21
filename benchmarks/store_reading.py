"""What comparing blocks with their checksums costs: processor time per token read from a token store in memory.

  python benchmarks/store_reading.py

Windows are read at random. "First" is the first reading by a process, where every block is compared; "later" the same
windows again. A store of 40 million tokens is written into a temporary folder.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app

from flm_jax.data.store import TokenStore
from flm_jax.data.store_writer import StoreWriter
from flm_jax.data.vocabulary import ByteVocabulary

DOCUMENTS, DOCUMENT, REPEATS = 400, 100_000, 5
CONTEXTS, TOKENS = (256, 4096), 1 << 18  # tokens per window, and read per repeat


def nanoseconds(store: TokenStore, indices: np.ndarray, context: int) -> float:
    """Processor time per token of reading windows."""
    begun = time.process_time()
    store.windows("train", indices, context)
    return (time.process_time() - begun) / (len(indices) * context) * 1e9


def main(argv: Sequence[str]) -> None:
    """Prints a row per length of windows: the least of some repeats."""
    del argv
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "store")
        with StoreWriter(path, ByteVocabulary(), "random", {"kind": "random"}) as writer:
            for number in range(DOCUMENTS):
                ids = rng.integers(3, 250, DOCUMENT, dtype=np.int32)
                writer.append("heldout" if number == 0 else "train", ids, DOCUMENT)
            writer.close()
        print("| tokens per window | first reading, compared | later readings |\n|---|---|---|")
        for context in CONTEXTS:
            first, later = [], []
            for _ in range(REPEATS):
                store = TokenStore.open(path)
                indices = rng.integers(0, store.num_windows("train", context), TOKENS // context)
                first.append(nanoseconds(store, indices, context))
                later.append(nanoseconds(store, indices, context))
            print(f"| {context:,} | {min(first):.2g} | {min(later):.2g} |")


if __name__ == "__main__":
    app.run(main)
