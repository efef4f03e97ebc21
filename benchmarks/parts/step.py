"""The train step compared with a plain JAX step and PyTorch; share of the matrix product, memory, compilation."""

from __future__ import annotations

import json
import math
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.parts import program, table
from benchmarks.parts.trainers import SIZES, TIMED, TRAINERS, TUNIX, Served, Size, batch_of, program_of, turn
from benchmarks.torch_step import REST
from benchmarks.turns import Quartiles, turns
from flm_jax import costs

TITLE = "The train step"
READING = (
    "A ratio above 1 says that the step of flm_jax is faster than the other one: it is the other step's time over "
    "ours, in the same round, each in a process of its own, which does a step that is not timed and then "
    f"{TIMED} that are. All but tunix start from the same parameters, and first losses must agree. The step of flm_jax "
    "also computes three norms and leaves out updates that are not finite. Share of the matrix product: GFLOP/s of our "
    "step over those of a jitted product of two 2,048 x 2,048 float32 matrices in the same round; FLOPs are counted by "
    "`flm_jax.costs.train_flops_per_token`, all of attention's positions included."
)
# Sizes; rounds at each, and seconds after which no other one starts; width of the matrix product; sizes whose memory is
# measured; depths that are compiled; where torch.compile is tried.
SETTINGS: dict[str, dict[str, Any]] = {
    "full": dict(
        sizes=("34 M", "6.9 M", "3.4 M"), rounds=12, most_seconds=360, product=2048, memory=("34 M", "6.9 M", "3.4 M")
    ),
    "quick": dict(
        sizes=("34 M", "6.9 M", "3.4 M"), rounds=3, most_seconds=30, product=2048, memory=(), depths=(2, 8), compiled=()
    ),
    "tiny": dict(sizes=("tiny",), rounds=2, most_seconds=60, product=64, memory=(), depths=(1, 2), compiled=()),
}
DEPTHS, COMPILED = (2, 8, 32), ("34 M", "6.9 M", "3.4 M")
# What else trains in JAX and was tried, on Python 3.11.
TRIED = """Other JAX trainers on the package index were tried, each in an environment of its own, with Python 3.11:

- tunix (google-tunix 0.1.7): installs; compared above where it is installed (`make .venv/tunix/installed`). It is made
  for tuning; the step is that of its `PeftTrainer` on all parameters, in a process of its own.
- easydel 0.3.0: installs, with JAX 0.9.2, and can be imported; it was not measured.
- maxtext 0.2.5: needs Python 3.12 or newer.
- levanter: pip had found no set of versions that fit together after 7 minutes; for levanter 1.1 from wheels alone it
  says that there is none, because of fsspec.
- nanodo, flaxformer: not on the index."""
# Losses of float32 programs that add in different orders.
SAME = 2e-4


def measure(effort: str) -> dict[str, Any]:
    """The figures of all sizes, the memory of the trainers and the times of compilation."""
    settings = SETTINGS[effort]
    compiled = settings.get("compiled", COMPILED)
    return {
        "sizes": [one_size(name, settings, name in compiled) for name in settings["sizes"]],
        "memory": [memory(name) for name in settings["memory"]],
        "compile": [compile_seconds(layers, effort) for layers in settings.get("depths", DEPTHS)],
    }


def one_size(name: str, settings: dict[str, Any], compiled: bool) -> dict[str, Any]:
    """The trainers in turns at one size, with the matrix product in the same rounds."""
    size = SIZES[name]
    steps: dict[str, Served] = {}
    failed: dict[str, str] = {}
    for trainer in (*TRAINERS, TUNIX):
        if trainer == "torch.compile" and not compiled:
            continue
        try:
            if trainer == "torch.compile" and not shutil.which("g++"):
                raise RuntimeError("there is no C++ compiler, which torch.compile needs on a CPU")
            steps[trainer] = Served(trainer, name)
        except Exception as error:
            if trainer == "flm_jax":
                raise
            failed[trainer] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    losses = {trainer: step.loss for trainer, step in steps.items()}
    for trainer, loss in losses.items():
        # That of tunix starts from parameters of its own.
        if abs(loss - losses["flm_jax"]) > (0.5 if trainer == "tunix" else SAME * math.log(size.vocab)):
            raise ValueError(f"{trainer} does not train the same model: first losses at {name} are {losses}")
    width = settings["product"]
    matrix, product = jnp.ones((width, width), jnp.float32), jax.jit(jnp.matmul)

    def multiply() -> float:
        return turn(lambda: product(matrix, matrix).block_until_ready())

    rest = {trainer: REST for trainer in steps if trainer.lower().startswith(("pytorch", "torch"))}
    calls: dict[str, Any] = {"product": multiply, **steps}
    limit = settings["most_seconds"]
    timings = turns(calls, settings["rounds"], warm_up=2, rest=rest, most_seconds=limit, rotating=True)
    for step in steps.values():
        step.close()
    flops = costs.train_flops_per_token(size.cfg, size.context) * size.tokens
    share = timings.ratio("product", "flm_jax")
    per_product = flops / (2 * width**3)
    return {
        "size": name,
        "shape": costs.shape_line(size.cfg),
        "parameters": costs.param_count(size.cfg),
        "batch": f"{size.rows} x {size.context}",
        "rounds": len(timings.seconds["flm_jax"]),
        "first_losses": losses,
        "tokens_per_s": {trainer: timings.rate(trainer, size.tokens) for trainer in steps},
        "ratios": {trainer: timings.ratio(trainer, "flm_jax") for trainer in steps if trainer != "flm_jax"},
        "gflops": timings.rate("flm_jax", flops / 1e9),
        "product_gflops": timings.rate("product", 2 * width**3 / 1e9),
        "share": [value * per_product for value in share],
        "failed": failed,
        "seconds": timings.record(),
    }


def memory(name: str) -> dict[str, Any]:
    """What XLA plans for our step's temporaries, and the peak of a process per trainer, in bytes."""
    size, found = SIZES[name], {}
    stepper = program_of(size)
    with jax.set_mesh(stepper.mesh):
        lowered = stepper.stepper(masked=False).lower(stepper.abstract_state, batch_of(size))
        planned = lowered.compile().memory_analysis()
    for trainer in TRAINERS:
        if trainer != "torch.compile":
            said = program(["-m", "benchmarks.parts.trainers", trainer, name])
            found[trainer] = json.loads(said.splitlines()[-1])
    return {"size": name, "state": 12 * costs.param_count(size.cfg), "temp": planned.temp_size_in_bytes, "peak": found}


def compile_seconds(layers: int, effort: str) -> dict[str, Any]:
    """Seconds to lower and to compile our step at a depth, once, without a cache of compiled programs."""
    size: Size = SIZES["tiny" if effort == "tiny" else "6.9 M"]._replace(layers=layers)
    stepper, batch = program_of(size), batch_of(size)
    with jax.set_mesh(stepper.mesh):
        since = time.perf_counter()
        lowered = stepper.stepper(masked=False).lower(stepper.abstract_state, batch)
        between = time.perf_counter()
        lowered.compile()
    return {"layers": layers, "lower": between - since, "compile": time.perf_counter() - between}


def tables(found: dict[str, Any]) -> list[str]:
    """The tables in Markdown."""
    names = [name for name in (*TRAINERS, TUNIX) if any(name in row["tokens_per_s"] for row in found["sizes"])]
    speeds, ratios = [], []
    for row in found["sizes"]:
        label = [f"{row['size']}, {row['batch']} tokens, {row['rounds']} rounds"]
        cells = [Quartiles(*row["tokens_per_s"][n]).text(",.0f") if n in row["tokens_per_s"] else "" for n in names]
        speeds.append(label + cells)
        cells = [Quartiles(*row["ratios"][n]).text() if n in row["ratios"] else "" for n in names[1:]]
        floor = [Quartiles(*row[n]).text(".0f") for n in ("gflops", "product_gflops")]
        ratios.append([*label, *cells, *floor, Quartiles(*row["share"]).text(".0f", 100) + " %"])
    out = [
        "Tokens per second:",
        table(["size", *names], speeds),
        "Ratios in the same round:",
        table(
            ["size", *(f"times {n}" for n in names[1:]), "GFLOP/s", "GFLOP/s of the product", "share"],
            ratios,
        ),
    ]
    failed = {f"{name}: {why}" for row in found["sizes"] for name, why in row["failed"].items()}
    out += [f"Failed: {line}" for line in sorted(failed)]
    if found["memory"]:
        peaks = found["memory"][0]["peak"]
        rows = [
            [row["size"], costs.size(row["state"]), costs.size(row["temp"])]
            + [costs.size(row["peak"][name]["beyond"]) for name in peaks]
            for row in found["memory"]
        ]
        head = [
            "size",
            "parameters and moments",
            "temporaries of our step, as XLA plans",
            *(f"peak, {n}" for n in peaks),
        ]
        out += [
            "Memory: peaks are those of a process per trainer in two steps, compilation included (VmHWM), beyond what "
            "it had with its modules and the parameters.",
            table(head, rows),
        ]
    depth = [[row["layers"], f"{row['lower']:.2f} s", f"{row['compile']:.2f} s"] for row in found["compile"]]
    out += ["Compilation of our step, the shape of 6.9 M at other depths, measured once each:"]
    return [*out, table(["layers", "tracing and lowering", "compilation"], depth), TRIED]
