"""Decoding speed compared with transformers and with the bandwidth of memory, on a real model; the page docs/decode.md.

  make test-smollm2                                              (once: it installs the weights)
  python benchmarks/decode.py --write=docs/decode.md [--json=FILE] [--dir=DIR]

SmolLM2-135M-Instruct in float32, greedy, with as many threads for each program as there are cores. Every round times
the two programs, in processes of their own, and the floor one after the other. The results are the fastest round of
each, which other load on the machine disturbs least, and the medians of the rounds' ratios. Times are those of the
steps after the first token of each answer. The floor is the time to read the parameters and the filled part of the
cache once per step, at the rate at which NumPy reads the same parameters, in the same round. The exit status is 1 if
the two programs do not write the same tokens.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from absl import app, flags, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.turns import turns

_WRITE = flags.DEFINE_string("write", None, "Write the page to this file.")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
_DIR = flags.DEFINE_string("dir", None, "Directory for model and checkpoint; by default a temporary directory.")
_ROUNDS = flags.DEFINE_integer("rounds", 25, "Number of rounds.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 17, "Tokens per answer.", lower_bound=2)

TEXT = "The capital of France is"
# Rows of the batch, and tokens of each prompt.
CASES = ((1, 5), (16, 5), (1, 500))
# Reads of all parameters per round.
READS = 4
# What the speed on a CPU is held to, at batch 1: times the speed of transformers, and fraction of the floor's speed.
AIMS = (1.5, 0.6)


def prepared(base: Path) -> None:
    """Writes the model into `base` as transformers reads it, and as a checkpoint that is imported from that."""
    from benchmarks.real_model import unpack
    from flm_jax.convert.importing import import_model

    if not (base / "smollm2").exists():
        unpack(base / "smollm2")
    if not (base / "checkpoint").exists():
        import_model(base / "smollm2", base / "checkpoint")


def cores() -> int:
    """The number of cores that this process may use; XLA has as many threads."""
    return len(os.sched_getaffinity(0))


class Clock:
    """A logits processor of transformers that notes when each step of `generate` has its logits."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: Any, scores: Any) -> Any:
        """Returns the logits as they are."""
        del ids
        self.times.append(time.perf_counter())
        return scores


@functools.cache
def their_model(folder: str) -> Any:
    """The model of transformers."""
    import torch
    import transformers

    torch.set_num_threads(cores())
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def their_steps(folder: str, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds per step after the first, and the new tokens; called in a process of its own."""
    import torch
    from transformers import LogitsProcessorList

    clock, ids = Clock(), torch.tensor(prompts)
    given: Any = dict(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=tokens)
    with torch.no_grad():
        out = their_model(folder).generate(
            ids, attention_mask=torch.ones_like(ids), logits_processor=LogitsProcessorList([clock]), **given
        )
    return (clock.times[-1] - clock.times[0]) / (tokens - 1), out[:, ids.shape[1] :].tolist()


def our_steps(generator: Any, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds per step after the first, and the new tokens."""
    answers = generator.generate(prompts, max_tokens=tokens, ends=())
    return generator.speed.seconds / (tokens - 1), [answer.ids for answer in answers]


def streamed_steps(generator: Any, prompt: list[int], tokens: int) -> float:
    """Seconds per step after the first, one call of the program per token."""
    for _ in generator.stream(prompt, max_tokens=tokens, ends=()):
        pass
    return float(generator.speed.seconds / (tokens - 1))


def reading_seconds(arrays: list[Any]) -> float:
    """Seconds to read the arrays once with as many threads as there are cores, by NumPy's dot product."""
    count = cores()

    def part(thread: int) -> None:
        for x in arrays:
            mine = x[thread * len(x) // count : (thread + 1) * len(x) // count]
            mine.dot(mine)

    threads = [threading.Thread(target=part, args=(i,)) for i in range(count)]
    since = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - since


def measured(theirs: Callable[..., Any], ours: Any, rows: int, length: int, rounds: int, tokens: int) -> dict[str, Any]:
    """The figures of one case; ours are those of answers that are long enough for layers apart, and of the loop."""
    import jax
    import numpy as np

    generator, looping = (ours.generator(rows, apart=apart) for apart in (True, False))
    ids = generator.prompt_ids(TEXT)
    prompts = [(ids * length)[-length:] for _ in range(rows)]
    arrays = [np.asarray(x).reshape(-1) for x in jax.tree.leaves(ours.params)]
    param_bytes, cfg = sum(x.nbytes for x in arrays), ours.cfg
    cache_bytes = rows * (length + tokens / 2) * 2 * cfg.layers * cfg.k_heads * cfg.h_dim * cfg.compute.itemsize
    looping.generate(prompts, max_tokens=1, ends=())  # compiles what reads the prompts, for both

    def begun(each: Any) -> float:
        our_steps(each, prompts, tokens)
        return float(each.speed.begin_seconds)

    compiling = {"loop": begun(looping), "apart": begun(generator)}
    same = True
    ours_now: list[list[int]] = []
    seconds_now = 0.0

    def floor() -> float:
        # A mean over as many reads as it takes a fair share of other load to show.
        return statistics.mean(reading_seconds(arrays) for _ in range(READS)) * (1 + cache_bytes / param_bytes)

    def mine() -> float:
        nonlocal ours_now, seconds_now
        seconds_now, ours_now = our_steps(generator, prompts, tokens)
        return seconds_now

    def loop() -> float:
        return our_steps(looping, prompts, tokens)[0]

    def other() -> float:
        nonlocal same
        seconds, ids = theirs(prompts, tokens)
        same &= ours_now == ids
        return float(seconds)

    def streamed() -> float:
        return streamed_steps(generator, prompts[0], tokens) if rows == 1 else seconds_now

    timings = turns({"floor": floor, "ours": mine, "theirs": other, "streamed": streamed, "loop": loop}, rounds)
    pairs = {"times_theirs": ("theirs", "ours"), "times_loop": ("loop", "ours")}
    pairs |= {"of_floor": ("floor", "ours"), "streamed": ("ours", "streamed")}
    ratios = {name: timings.ratio(*pair) for name, pair in pairs.items()}
    return {
        "rows": rows,
        "prompt_tokens": length,
        "tokens": tokens,
        "rounds": rounds,
        "compile_seconds": compiling,
        "bytes_per_step": param_bytes + cache_bytes,
        "fastest": {name: min(seconds) for name, seconds in timings.seconds.items()},
        "median": {name: timings.of(name).median for name in timings.seconds},
        **{name: ratio.median for name, ratio in ratios.items()},
        "quartiles": ratios,
        "same_tokens": same,
    }


PAGE = """# Decoding

How fast `flm-generate` writes text, compared with `generate` of transformers and with the bandwidth of memory. This
page was written by

    make test-smollm2 && .venv/bin/python benchmarks/decode.py --write=docs/decode.md

{hardware}. SmolLM2-135M-Instruct ({params}), float32, {threads} threads each, greedy, {tokens} tokens per
answer. Each of {rounds} rounds times the floor, flm_jax and transformers one after the other. Only the steps after an
answer's first token are timed: neither compilation nor the prompts. {same}
{load}

The fastest round of each, which other load disturbs least:

{rows}

Medians of the rounds' ratios:

{medians}

The floor is the time in which NumPy, with as many threads, reads the bytes that a step must read: every parameter, and
the filled part of the cache. "Of the floor" is the floor's time divided by that of flm_jax. "Streamed" is the speed of
one call per token, as where text is shown while it is made, relative to several tokens per call. Where another program
wants a core, the threads of a step wait for each other: with one such program a step at batch 1 took up to three times
as long, while reading took little longer.

{verdict}

## What decides the speed

- The cache is carried through the layers and written in place, and both products of attention read it in the order in
  which it lies: keys as (head_dim, positions), values as (positions, head_dim). As input and output of a scan over
  layers, XLA would copy all of it in every step.
- At batch 1 the products are matrix times vector, which XLA's CPU backend divides among threads if they are large.
- A loop over layers copies each layer's part of every stacked array before it multiplies. "Times the loop" is what is
  gained without it, by parameters of each layer as arrays of their own, in the memory of the stacked ones. Such a
  program takes {apart:.1f} s to compile, one with the loop {loop:.1f} s (batch 1, 5 tokens), and every number of rows
  and size of the cache has its own. So a call of a `Generator` leaves the loop only if its answers may be long enough:
  if the bytes of a layer times the tokens come to 3 GiB, for this model {steps} tokens (`generation/layers.py`). The
  figures above are those of such answers. Prompts are read with the loop, as what is copied serves many tokens there.
  Accelerators and several devices have the loop.
- Axes that a product sums over are paired in their order in memory (`kernels/products.py`). `jnp.einsum` pairs them
  backwards, and XLA then transposes attention's output weight for every token. A tied head is multiplied as it lies.
- At batch 16 a step is bound mostly by arithmetic, not by memory.
- Sampling finds the border of top-k and top-p bit by bit, in 32 passes over the logits each, instead of sorting them.
"""


def _table(*columns: str) -> tuple[str, str]:
    return f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"


def _fastest(case: dict[str, Any]) -> str:
    seconds = case["fastest"]
    speed = {name: f"{case['rows'] / each:.1f} tokens/s" for name, each in seconds.items()}
    return (
        f"| {case['rows']} | {case['prompt_tokens']} tokens | {speed['ours']} | {speed['theirs']} "
        f"| {seconds['theirs'] / seconds['ours']:.2f} | {speed['floor']} | {seconds['floor'] / seconds['ours']:.2f} |"
    )


def page(found: list[dict[str, Any]], ours: Any, hardware: str) -> str:
    """The page in Markdown; `ours` is the loaded model."""
    import jax

    from flm_jax import costs
    from flm_jax.generation.layers import WORTH_BYTES

    params = sum(x.size for x in jax.tree.leaves(ours.params))
    layer = sum(x.nbytes for x in jax.tree.leaves(ours.params["blocks"])) / ours.cfg.layers
    compiling = found[0]["compile_seconds"]

    rows = [
        *_table("batch", "prompt", "flm_jax", "transformers", "times transformers", "floor", "of the floor"),
        *(_fastest(case) for case in found),
    ]
    medians = [
        *_table("batch", "prompt", "times transformers", "of the floor", "times the loop", "streamed"),
        *(
            f"| {case['rows']} | {case['prompt_tokens']} tokens | {case['times_theirs']:.2f} | {case['of_floor']:.2f} "
            f"| {case['times_loop']:.2f} | {format(case['streamed'], '.2f') if case['rows'] == 1 else ''} |"
            for case in found
        ),
    ]
    first = found[0]
    same = all(case["same_tokens"] for case in found)
    return PAGE.format(
        hardware=hardware,
        params=costs.count(params) + " parameters",
        threads=cores(),
        tokens=first["tokens"],
        rounds=first["rounds"],
        same="Both write the same tokens." if same else "The two do not write the same tokens in every case.",
        load=f"The machine's load was {os.getloadavg()[1]:.1f} on average over the last five minutes.",
        rows="\n".join(rows),
        medians="\n".join(medians),
        verdict=verdict(first),
        **compiling,
        steps=math.ceil(WORTH_BYTES / layer),
    )


def verdict(case: dict[str, Any]) -> str:
    """Whether the aims hold at batch 1, by the medians, as sentences; the fastest rounds are named beside them."""
    seconds = case["fastest"]
    medians = case["times_theirs"], case["of_floor"]
    fastest = seconds["theirs"] / seconds["ours"], seconds["floor"] / seconds["ours"]
    lines = []
    for aim, what, median, best in zip(AIMS, ("times transformers", "of the floor"), medians, fastest, strict=True):
        met = "met" if median >= aim else "**not met**"
        lines.append(f"- At least {aim} {what}: {met} by the median, {median:.2f}; the fastest rounds give {best:.2f}.")
    return "The aims at batch 1:\n\n" + "\n".join(lines)


def main(argv: list[str]) -> None:
    """Measures, and writes the page."""
    if len(argv) > 1:
        app.usage(shorthelp=True, detailed_error=f"unexpected argument {argv[1]!r}", exitcode=2)
    from benchmarks.disk import machine

    logging.set_verbosity(logging.ERROR)  # orbax logs a lot
    from flm_jax.evaluation.loaded import load_model

    # Two processes, since threads of one program that wait actively would slow the other one down.
    own = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as temporary, own as process:
        base = Path(_DIR.value or temporary)
        base.mkdir(parents=True, exist_ok=True)
        prepared(base)
        ours = load_model(base / "checkpoint")

        def theirs(*given: Any) -> Any:
            return process.submit(their_steps, str(base / "smollm2"), *given).result()

        found = []
        for rows, length in CASES:
            found.append(measured(theirs, ours, rows, length, _ROUNDS.value, _TOKENS.value))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n")
    text = page(found, ours, machine())
    if _WRITE.value:
        Path(_WRITE.value).write_text(text)
    else:
        print(text)
    if not all(case["same_tokens"] for case in found):
        raise SystemExit("the two programs do not write the same tokens")


if __name__ == "__main__":
    app.run(main)
