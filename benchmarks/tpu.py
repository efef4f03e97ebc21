"""The full-size recipe compiled by the TPU compiler: all programs of all stages, and other layouts; writes docs/tpu.md.

  make test-tpu

runs: python benchmarks/tpu.py --write=docs/tpu.md, with libtpu installed beside the environment. It needs no TPU. It
fails unless every program fits, no whole parameter is gathered, and every train step contains the attention kernel.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gin  # noqa: E402

from flm_jax import costs  # noqa: E402
from flm_jax.cli import configure  # noqa: E402
from flm_jax.planning import compiled, stages  # noqa: E402
from flm_jax.planning.topology import Topology, topology  # noqa: E402
from flm_jax.recipe import Recipe, ResolvedStage, Run, resolve  # noqa: E402
from flm_jax.records import from_dict  # noqa: E402
from flm_jax.sharding import make_mesh  # noqa: E402
from flm_jax.step import StageProgram  # noqa: E402

RECIPE = "gin_configs/recipes/tele_flm_1t.gin"
MACHINE = "v5p-2048"
# Bound on the bytes that a growth may gather: it may gather the norms' scales, which are vectors.
VECTORS = 16 * 2**20
# The other layouts to compile, for one stage each: name, stage, changed bindings.
WEIGHED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("sequence 2 x tensor 8", "52b", ("MeshConfig.sequence = 2", "MeshConfig.tensor = 8")),
    ("tensor 16", "52b", ("MeshConfig.sequence = 1", "MeshConfig.tensor = 16")),
    ("fsdp 128 x tensor 8", "1t", ("large/MeshConfig.fsdp = 128", "large/MeshConfig.tensor = 8")),
    ("all recomputed (full)", "1t", ("tele_flm_1t.remat = 'full'",)),
    ("no compiler options", "1t", ("Run.compiler_options = {}",)),
)


def main() -> None:
    """Compiles and checks all programs, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", help="write the page to this file, such as docs/tpu.md")
    parser.add_argument("--stages", nargs="*", help="only these stages, without other layouts")
    options = parser.parse_args()
    machine = topology(MACHINE)
    start = time.perf_counter()
    recipe, run = configured(())
    devices = compiled.devices_of(machine, "tpu")
    rows: list[tuple[str, str, Mapping[str, Any]]] = []
    failures: list[str] = []
    records = []
    for record in stages.stages(recipe, run, devices, machine, "tpu", among=options.stages):
        records.append(record)
        for name, about in record["programs"].items():
            if "compile_seconds" in about:
                rows.append((record["name"], name, about))
                failures += faults(record, name, about)
                print(rows[-1][:2], f"{about['compile_seconds']:.0f} s", flush=True)
    last = resolve(recipe)[-1]
    if options.stages is None:
        about = decoding(last, run, recipe, devices, machine)
        rows.append((last.name, "decode", about))
        failures += [] if about["fits"] else [f"{last.name}, decode: {about['compiler_said']}"]
        print(rows[-1][:2], f"{about['compile_seconds']:.0f} s", flush=True)
    others = list(weighed(devices, machine)) if options.stages is None else []
    page = text(machine, records, rows, others, time.perf_counter() - start)
    print(page)
    if failures:
        sys.exit("\n".join(failures))
    if options.write:
        Path(options.write).write_text(page)


def configured(bindings: Sequence[str]) -> tuple[Recipe, Run]:
    """The recipe and the run, with additional bindings."""
    gin.clear_config()
    configure.parse([RECIPE], bindings)
    recipe, run = configure.train()
    gin.clear_config()
    return recipe, run


def faults(record: Mapping[str, Any], name: str, about: Mapping[str, Any]) -> list[str]:
    """The requirements that a program violates, as text."""
    where = f"{record['name']}, {name}"
    if not about["fits"]:
        return [f"{where} does not fit: {about['compiler_said']}"]
    found = []
    if about["unread"]:
        found.append(f"{where}: {about['unread']} loops or collectives of its text could not be read")
    if "train step" in name and not any("splash" in kernel for kernel in about["kernels"]):
        found.append(f"{where}: the attention kernel is not in the program")
    whole = matrices(record)
    found += [f"{where}: gathers {shape}, a whole parameter" for shape in about["gathers"] if extent(shape) in whole]
    if name == "growth" and (gather := about["largest_gather"]) is not None and gather["bytes"] > VECTORS:
        found.append(f"{where}: gathers {gather['shape']}")
    return found


def matrices(record: Mapping[str, Any]) -> set[tuple[int, ...]]:
    """The sorted shape of every parameter that is not a vector, and the sorted shape of one of its layers."""
    cfg = from_dict(record["model"])
    found: set[tuple[int, ...]] = set()
    for _, x, sig in costs.leaves(cfg):
        if not sig.gains:
            found |= {tuple(sorted(x.shape)), tuple(sorted(x.shape[1:] if sig.stacked else x.shape))}
    return found


def extent(shape: str) -> tuple[int, ...]:
    """The sorted sizes of an array's dimensions, without ones: f32[1,64,8] -> (8, 64)."""
    sizes = [int(n) for n in shape.split("[")[1].rstrip("]").split(",")]
    return tuple(sorted(n for n in sizes if n > 1))


def decoding(stage: ResolvedStage, run: Run, recipe: Recipe, devices: Any, machine: Topology) -> dict[str, Any]:
    """The record of the compiled generation by a stage's model, with one row per batch shard."""
    mesh = make_mesh(run.mesh_of(stage.stage), devices)
    program = StageProgram(stage, mesh, 1)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    return compiled.compiled(compiled.decoding(program, rows, recipe.data.context), machine, mesh)


def weighed(devices: Any, machine: Topology) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Stage, layout and compiled train step of each other layout."""
    for name, stage, bindings in WEIGHED:
        recipe, run = configured(bindings)
        (record,) = stages.stages(recipe, run, devices, machine, "tpu", only=("train step",), among=(stage,))
        print(stage, name, f"{record['programs']['train step']['compile_seconds']:.0f} s", flush=True)
        yield stage, name, record["programs"]["train step"]


def line(cells: Sequence[str]) -> str:
    """A table row in Markdown."""
    return f"| {' | '.join(cells)} |"


def cells(about: Mapping[str, Any]) -> list[str]:
    """The table cells of a program."""
    if not about["fits"]:
        return ["does not fit", *["-"] * 5, f"{about['compile_seconds']:.0f}"]
    size, predicted = about["bytes_per_device"], about.get("predicted", {})
    moved = ", ".join(
        f"{c['count']:.0f} {kind} ({costs.size(c['sent_bytes'])})" for kind, c in about["collectives"].items()
    )
    utilisation = f"{predicted['utilisation']:.1%}" if "utilisation" in predicted else "-"
    return [
        costs.size(size["peak"]),
        costs.size(size["arguments"]),
        moved or "none",
        f"{predicted['seconds']:.3g}" if predicted else "-",
        f"{predicted['collectives_waited_seconds']:.2g}" if predicted else "-",
        utilisation,
        f"{about['compile_seconds']:.0f}",
    ]


def sent_and_least(record: Mapping[str, Any]) -> list[str]:
    """The table cells of a stage: bytes that its train step sends per device, the least, the largest collectives."""
    step, least = record["programs"]["train step"], record["least_sent_bytes"]
    sent, total = sum(c["sent_bytes"] for c in step["collectives"].values()), sum(least.values())
    largest = (
        f"{c['count']} {c['kind']} of {c['shape'][:40]} over {c['devices']} ({costs.size(c['sent_bytes'])})"
        for c in step["most_sent"][:4]
    )
    parts = ", ".join(f"{what} {costs.size(number)}" for what, number in least.items() if number)
    return [record["name"], costs.size(sent), costs.size(total), f"{sent / total:.2f}", parts, "; ".join(largest)]


def text(
    machine: Topology,
    records: Sequence[Mapping[str, Any]],
    rows: Sequence[tuple[str, str, Mapping[str, Any]]],
    others: Sequence[tuple[str, str, Mapping[str, Any]]],
    seconds: float,
) -> str:
    """The page in Markdown."""
    head = [
        "peak per device",
        "arguments",
        "collectives per call (bytes sent per device)",
        "predicted s",
        "of these, waiting for collectives",
        "predicted utilisation",
        "compilation, s",
    ]
    layouts = [
        line(["stage", "parameters", "mesh", "batch, tokens", "accumulated in parts", "remat", "state per device"]),
        line(["---"] * 7),
    ]
    for r in records:
        mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1)
        state = r["bytes_per_device"]["parameters"] + r["bytes_per_device"]["moments"]
        layouts.append(
            line(
                [
                    r["name"],
                    costs.count(r["params"]),
                    mesh,
                    costs.count(r["batch_tokens"]),
                    str(r["accumulate"]),
                    r["model"]["remat"],
                    costs.size(state),
                ]
            )
        )
    programs = [line(["stage", "program", *head]), line(["---"] * 9)]
    programs += [line([stage, name, *cells(about)]) for stage, name, about in rows]
    traffic = [line(["stage", "sent", "least", "ratio", "the least is for", "most is sent by"]), line(["---"] * 6)]
    traffic += [line(sent_and_least(r)) for r in records if r["programs"]["train step"]["fits"]]
    alternatives = [line(["stage", "layout", *head]), line(["---"] * 9)]
    alternatives += [line([stage, name, *cells(about)]) for stage, name, about in others]
    return PAGE.format(
        machine=machine.name,
        devices=machine.devices,
        memory=costs.size(machine.chip.memory),
        layouts="\n".join(layouts),
        programs="\n".join(programs),
        traffic="\n".join(traffic),
        alternatives="\n".join(alternatives),
        minutes=f"{seconds / 60:.0f}",
    )


PAGE = """# The full-size recipe, compiled for TPUs

`make test-tpu` (`python benchmarks/tpu.py --write=docs/tpu.md`) wrote this page, in {minutes} minutes on two cores; no
TPU was used. Every program of `gin_configs/recipes/tele_flm_1t.gin` was compiled by the TPU compiler for
{machine}: {devices} chips of {memory} each. The command fails unless all programs fit, none gathers a whole
parameter, and the train steps contain the attention kernel.

{layouts}

## Every program

{programs}

*Peak* is the value that the compiler reports; a program that does not fit does not compile. **Seconds and utilisation
are predictions and were never measured.** They are the sum of three terms: the compiler's estimate of the cycles of
every operation, with loops counted in full; the collectives that the program waits for, at the bandwidth of the links
that they use; and the attention kernel, for which the compiler has no estimate, at half of the chip's peak. Collectives
that run at the same time as other work are assumed to be hidden by it. The utilisation counts model FLOPs
(`costs.train_flops_per_token`; recomputation does not count). The predictions can compare layouts; they cannot tell how
many days a run takes.

## Bytes sent, and the least that the layout needs

Per device and train step. The least is that of `flm_jax.planning.traffic`: parameters stay split over `fsdp` and
`tensor`, weights are gathered twice per part of the batch and their gradients scattered once, the stream is gathered
and scattered around attention and MLP, all on rings.

{traffic}

Where the rest goes: at 52B the compiler all-reduces the gradients of the MLP and of the attention's output over `fsdp`
where scattering them would do (127 GB, half of it needless), and the gradient of the values over `sequence` (34 GB,
half of it needless); at 102B the latter (53 GB, half of it needless) and 48 GB of gradients likewise. At 1T the
forward pass scatters the stream by permutes around the ring, both ways, while the product that it scatters is
computed: 33 pieces of 21 MB per scatter where 15 are the least, 1.06 TB more in all; nothing waits for them.

## Other layouts

The train step of one stage, with one change:

{alternatives}

The conclusions: `tensor` is as small as the state allows, because the bytes that the products of a layer exchange grow
with it. The published batch of 1,344 windows does not occupy all devices; `sequence` uses the rest. At 1T the state
needs all devices for `fsdp` and `tensor`. Saving the products of a block, and the stream between attention and MLP, so
that no product is computed again (`remat = 'products'`), needs more memory, which is available. Pipelining was not
needed to make any program fit, and is not implemented.
"""


if __name__ == "__main__":
    main()
