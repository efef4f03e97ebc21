"""Streamed growth of a checkpoint: time compared with the disk's floor, and memory of the process.

  python benchmarks/streaming.py --size=4 [--method=zero] [--write=docs/streaming.md] [--json=FILE]

A model of width 1,024 grows to width 1,536 and 1.5 times as many layers, with parameters and Adam's moments in float32.
The number of layers is chosen so that the target's state has `size` GB. The growth runs in a process of its own. The
floor is the time to read the source's files in order, and to write and sync one file of the target's size, 64 MiB at a
time, on the same file system without computing anything (`disk.floor`), measured before and after the growth. The
source is dropped from the page cache before each measurement.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import disk

_SIZE = flags.DEFINE_float("size", 4.0, "GB of the target's state.")
_METHODS = flags.DEFINE_multi_string("method", ["zero", "copy"], "Operator for all axes except layers.")
_CHUNK = flags.DEFINE_integer("chunk_bytes", 0, "Bytes of the largest block; 0: the default.")
_DIR = flags.DEFINE_string("dir", None, "Directory for the checkpoints; by default a temporary directory.")
_WRITE = flags.DEFINE_string("write", None, "Write the page to this file.")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
_CHILD = flags.DEFINE_string("child", None, "Used by the program itself.")


def shapes(gigabytes: float) -> tuple[Any, Any]:
    """The configurations of source and target, for a target state of `gigabytes` GB."""
    from flm_jax import costs
    from flm_jax.config import ModelConfig

    def model(width: int, layers: int) -> ModelConfig:
        return ModelConfig(embed=width, layers=layers, heads=width // 64, mlp=width * 8 // 3 // 64 * 64, vocab=16_384)

    def grown(layers: int) -> ModelConfig:
        return model(1536, layers + layers // 2)

    layers = 2
    while 12 * costs.param_count(grown(layers)) < gigabytes * 1e9:
        layers += 2
    return model(1024, layers), grown(layers)


def save_source(workdir: Path, gigabytes: float) -> None:
    """Saves a checkpoint with random parameters in the form in which a run saves it."""
    import jax
    import jax.numpy as jnp

    from flm_jax.checkpoint import Checkpoints
    from flm_jax.growth import Lineage
    from flm_jax.model import init_params
    from flm_jax.sharding import make_mesh
    from flm_jax.source_checkpoint import CheckpointMeta
    from flm_jax.state import TrainState, abstract_state

    cfg, _ = shapes(gigabytes)
    lineage, mesh = Lineage(cfg), make_mesh()
    with jax.set_mesh(mesh):
        params = init_params(cfg, jax.random.key(0))
        moments = abstract_state(lineage, mesh).opt_state
        moments = jax.tree.map(lambda like: jnp.full(like.shape, 1 + len(like.shape) / 7, like.dtype), moments)
        state = TrainState(jnp.zeros((), jnp.int32), params, moments)
        meta = CheckpointMeta("first", lineage).record()
        with Checkpoints(workdir / "checkpoints" / "0_first") as store:
            store.save(1, state, meta=meta)


def child(work: Path, gigabytes: float, method: str, chunk_bytes: int) -> dict[str, float]:
    """Runs one growth in this process; returns its time, memory and bytes."""
    import jax

    from flm_jax.checkpoint_growth.grow import grow_checkpoint
    from flm_jax.checkpoint_growth.streaming import CHUNK_BYTES
    from flm_jax.growth import Growth

    jax.numpy.zeros(()).block_until_ready()  # starts JAX's runtime, so that its memory is not counted
    growth = Growth(method, methods={"layers": "zero"}, ramp_steps=1 if method == "mask" else 0)
    target, chunk_bytes = shapes(gigabytes)[1], chunk_bytes or CHUNK_BYTES
    record, found = disk.measured(
        lambda: grow_checkpoint(work / "source", work / method, target, growth, streamed=True, chunk_bytes=chunk_bytes)
    )
    moved = record["verification"]["streamed"]
    return {**found, "read": moved["source"]["bytes"], "written": moved["target"]["bytes"]}


def measure(work: Path, method: str) -> dict[str, Any]:
    """The measurements of one growth, and of the floor before and after it."""
    source, target = shapes(_SIZE.value)
    from flm_jax import costs

    read, written = 12 * costs.param_count(source), 12 * costs.param_count(target)
    floors = [disk.floor(work / "source", read, written)]
    disk.forget(work / "source")
    arguments = ["--child", method, f"--dir={work}", f"--size={_SIZE.value}", f"--chunk_bytes={_CHUNK.value}"]
    found = call(arguments)
    load = os.getloadavg()[0]
    shutil.rmtree(work / method)
    floors.append(disk.floor(work / "source", read, written))
    past = sum(disk.floor(work / "source", read, written, past_cache=True))
    lowest = statistics.mean(map(sum, floors))
    print(f"{method}: {found['seconds']:.1f} s, floor {' '.join(f'{a:.1f}+{b:.1f}' for a, b in floors)} s", flush=True)
    return {
        "method": method,
        "seconds": found["seconds"],
        "floor": lowest,
        "floors": floors,
        "cpu_seconds": found["cpu"],
        "load": load,
        "floor_past_cache": past,
        "ratio": found["seconds"] / lowest,
        "read_gb": found["read"] / 1e9,
        "written_gb": found["written"] / 1e9,
        "base_gb": found["base"] / 1e9,
        "beyond_base_gb": (found["peak"] - found["base"]) / 1e9,
    }


def call(arguments: list[str]) -> dict[str, float]:
    """Runs this program in a new process; returns the JSON object that it prints last."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    found: dict[str, float] = json.loads(done.stdout.decode().splitlines()[-1])
    return found


PAGE = """# Growing a checkpoint larger than memory

    python experiments/grow.py --source=runs/first --workdir=runs/grown --gin_file=... \\
        --gin_bindings='grow.streamed = True'

grows parameters and Adam's moments from disk to disk, block by block. A block is a range of rows of one layer of one
leaf, of at most `grow.chunk_bytes` ({chunk_mib} MiB), or one row if a row is larger. The result is equal to that of a
growth in memory, bit for bit: every leaf, the manifest's checksums, the state's digest.

(`DataConfig.streamed` is another thing: seqio reads the texts during training, without a token store.)

- If the growth is killed, the same command resumes it. The file `0.growing.jsonl` beside the target lists the blocks
  that are on disk, with their checksums. It is valid for one source, plan, seed and block size; if any of them changes,
  the growth starts again. The target gets its final name only when it is complete on disk.
- The checksum of every leaf is verified against the source's manifest while it is read. If one is wrong, the growth
  stops with an error that names the leaf, and the unfinished target is deleted. Moments that start at 0
  (`optimizer = 'fresh'`) are not read.
- A row with copies in several blocks is read once per block. If entries are copied from the layer above (`aki`), that
  layer is read once more. Everything else is read once.
- Two operators need all rows at once: `noise`, whose noise must cancel over the copies, and `mean`, whose new row is the
  mean of the others. Where they act on a leaf's first axis after layers, the blocks of this leaf are whole layers.
- The models are not run. So only checksums are compared, which `growth.json` says, and distances cannot be measured: set
  `Growth.depth` to a place, or to the number of copies that follow each layer. If both models fit in memory,
  `python experiments/verify.py` compares them.

## Cost

    {command}

A model of width 1,024 with {layers} layers grows to width 1,536 and {grown_layers} layers, in float32 with both moments,
in a process of its own. The floor is the time that this file system takes to read the source's files in order, and to
write and sync one file of the target's size: the mean of a measurement before the growth and one after it. The source is
dropped from the page cache before each measurement. Memory is the peak of the process during the growth, minus its
memory before it (VmHWM minus VmRSS; without the page cache).

| growth | read | written | time | floor | time / floor | floor past the cache | processor time | memory |
|---|---|---|---|---|---|---|---|---|
{rows}

{machine}, shared with other work, under a load of {load:.1f} during the measurement, which affects the ratio. The
floor uses the disk, and the processors to fill the page cache. The growth reads and writes past the cache (O_DIRECT) and
uses the processors for its own work: {per_gb:.1f} s of one processor per GB written, some of it once, on compilation.
The floor past the cache is the floor measured with O_DIRECT.
"""  # noqa: E501


def write_page(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the page: the measurements and their explanation."""
    from flm_jax.checkpoint_growth.streaming import CHUNK_BYTES

    source, target = shapes(_SIZE.value)
    table = "\n".join(
        f"| {row['method']} | {row['read_gb']:.2f} GB | {row['written_gb']:.2f} GB | {row['seconds']:.1f} s | "
        f"{row['floor']:.1f} s | {row['ratio']:.2f} | {row['floor_past_cache']:.1f} s | "
        f"{row['cpu_seconds']:.1f} s | {row['beyond_base_gb']:.2f} GB |"
        for row in rows
    )
    text = PAGE.format(
        chunk_mib=CHUNK_BYTES >> 20,
        command=f"python benchmarks/streaming.py --size={_SIZE.value:g} --write=docs/streaming.md",
        layers=source.layers,
        grown_layers=target.layers,
        rows=table,
        machine=disk.machine(),
        load=statistics.mean(row["load"] for row in rows),
        per_gb=statistics.mean(row["cpu_seconds"] / row["written_gb"] for row in rows),
    )
    path.write_text(text)


def main(argv: list[str]) -> None:
    """Makes the source, and grows it by each method."""
    del argv
    logging.set_verbosity(logging.ERROR)  # orbax logs a lot
    if _CHILD.value == "source":
        save_source(Path(_DIR.value or ".") / "source", _SIZE.value)
        print("{}")
        return
    if _CHILD.value:
        print(json.dumps(child(Path(_DIR.value or "."), _SIZE.value, _CHILD.value, _CHUNK.value)))
        return
    work = Path(tempfile.mkdtemp(prefix="streaming_", dir=_DIR.value))
    try:
        call(["--child", "source", f"--dir={work}", f"--size={_SIZE.value}"])
        rows = [measure(work, method) for method in _METHODS.value]
    finally:
        shutil.rmtree(work)
    for row in rows:
        print(json.dumps(row))
    if _WRITE.value:
        write_page(Path(_WRITE.value), rows)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
