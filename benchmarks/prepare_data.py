"""What preparing costs beside the tokenizer alone: MB of text per second of one core's processor time.

  python benchmarks/prepare_data.py

The text is a part of the standard library as JSON lines. Each row of the table is one vocabulary; all columns are
measured in turns, several times, and the median stands there. "Tokenizer" encodes texts that are in memory; "parts" is
what a process does with its parts, tokenizer included, and "share" its speed over the tokenizer's; "look" reads the
text for its digest; "hash" hashes it for near duplicates; "write" puts the parts together, in one process. Processor
time says what a core is worth, also where other programs run beside it.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags

from flm_jax.data.corpora import Jsonl, StandardLibrary
from flm_jax.data.part_files import PartFolder, PartResult, result_name
from flm_jax.data.part_work import TOKENS, Job, blocks, hash_part, tokenise_part
from flm_jax.data.parts import Part, divide, look
from flm_jax.data.store_record import VOCABULARY_FILE
from flm_jax.data.store_writer import StoreWriter
from flm_jax.data.train_vocabulary import Bytes, SentencePiece, build_vocabulary
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.data.vocabulary_files import spec_bytes

_MEGABYTES = flags.DEFINE_integer("megabytes", 4, "Text to prepare.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 5, "How often each is measured.", lower_bound=1)
PART_BYTES = 1 << 20


def seconds(run: Callable[[], object]) -> float:
    """Processor time of a call, of this process."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def each(function: Callable[[Part], object], parts: Sequence[Part]) -> None:
    """Calls a function for each part."""
    for part in parts:
        function(part)


def row(corpus: Jsonl, vocabulary: Vocabulary, folder: Path) -> dict[str, float]:
    """MB per second of processor time, by what is measured."""
    texts = [text for _, text in corpus.lines()]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    parts, border, turn = divide(corpus, PART_BYTES), corpus.border(), itertools.count()
    found: dict[str, list[float]] = {name: [] for name in ("tokenizer", "parts", "look", "hash", "write")}
    for _ in range(_TURNS.value):
        place = folder / f"{vocabulary.kind} {next(turn)}"
        with PartFolder(place, {}):
            (place / VOCABULARY_FILE).write_bytes(spec_bytes(vocabulary))
            job = Job(corpus, str(place), border, deduplicated=False, near=True)

            def write(place: Path = place) -> None:
                with StoreWriter(place / "store", vocabulary, "digest", {}) as writer:
                    for part in parts:
                        for block in blocks(PartResult(place / result_name(TOKENS, part.number)), vocabulary.size):
                            writer.extend(*block)
                    writer.close()

            measured: dict[str, Callable[[], object]] = {
                "tokenizer": lambda: [vocabulary.encode(text) for text in texts],
                "parts": functools.partial(each, functools.partial(tokenise_part, job), parts),
                "look": functools.partial(each, functools.partial(look, corpus), parts),
                "hash": functools.partial(each, functools.partial(hash_part, job), parts),
                "write": write,
            }
            for name, run in measured.items():
                found[name].append(seconds(run))
    return {name: megabytes / statistics.median(times) for name, times in found.items()}


def main(argv: Sequence[str]) -> None:
    """Prints a row per vocabulary."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        path, room = Path(folder, "text.jsonl"), _MEGABYTES.value * 10**6
        with path.open("w") as file:
            for text in StandardLibrary().documents("train"):
                file.write(json.dumps({"text": text}) + "\n")
                room -= len(text)
                if room <= 0:
                    break
        corpus = Jsonl(str(path))
        print("| vocabulary | tokenizer | parts | share | look | hash | write |\n|---|---|---|---|---|---|---|")
        for config in (SentencePiece(8000), Bytes()):
            vocabulary = build_vocabulary(config, corpus, folder)
            rates = row(corpus, vocabulary, Path(folder))
            share = rates["parts"] / rates["tokenizer"]
            print(
                f"| {vocabulary.kind}, {vocabulary.size} ids | {rates['tokenizer']:.3g} | {rates['parts']:.3g} | "
                f"{share:.0%} | {rates['look']:.3g} | {rates['hash']:.3g} | {rates['write']:.3g} |"
            )


if __name__ == "__main__":
    app.run(main)
