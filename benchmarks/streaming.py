"""Growing a checkpoint from disk to disk: time against what the disk allows, and memory beyond the process itself.

  python benchmarks/streaming.py --size=4 [--method=zero] [--write=docs/streaming.md] [--json=FILE]

A model 1,024 wide grows to 1,536, layers by half as many again, parameters and Adam's moments in float32, until the
target's state has `size` GB. The growth runs in a process of its own. The floor is the time of moving as many bytes on
the same file system without computing anything: the source's files read in order, one file of the target's size written
and synced, 64 MiB at a time, both before and after the growth; the source is dropped from the page cache before each.
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
_METHODS = flags.DEFINE_multi_string("method", ["zero", "copy"], "How all but the layers grow.")
_CHUNK = flags.DEFINE_integer("chunk_bytes", 0, "The largest block; 0: the default.")
_DIR = flags.DEFINE_string("dir", None, "Where the checkpoints go meanwhile; a temporary directory if not given.")
_WRITE = flags.DEFINE_string("write", None, "Write the page to this file.")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
_CHILD = flags.DEFINE_string("child", None, "Used by the program itself.")


def shapes(gigabytes: float) -> tuple[Any, Any]:
    """Source and target."""
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
    """A checkpoint of random values, as a run would have saved it."""
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
    """Grows, and measures its own time and memory."""
    import jax

    from flm_jax.checkpoint_growth.grow import grow_checkpoint
    from flm_jax.checkpoint_growth.streaming import CHUNK_BYTES
    from flm_jax.growth import Growth

    jax.numpy.zeros(()).block_until_ready()  # the process itself, with its runtime
    growth = Growth(method, methods={"layers": "zero"})
    target, chunk_bytes = shapes(gigabytes)[1], chunk_bytes or CHUNK_BYTES
    record, found = disk.measured(
        lambda: grow_checkpoint(work / "source", work / method, target, growth, streamed=True, chunk_bytes=chunk_bytes)
    )
    moved = record["verification"]["streamed"]
    return {**found, "read": moved["source"]["bytes"], "written": moved["target"]["bytes"]}


def measure(work: Path, method: str) -> dict[str, Any]:
    """One growth, and the floor before and after it."""
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
    """Runs this program anew; what it prints last is JSON."""
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

grows parameters and Adam's moments from disk to disk, block by block: a block is a run of rows of one layer of one
leaf, at most `grow.chunk_bytes` ({chunk_mib} MiB), or one row where that is more. The result is that of a growth in
memory, bit for bit: every leaf, the manifest's checksums, the state's digest.

- Killed and run again, it goes on where it was: `0.growing.jsonl` beside the target says which blocks are on disk, with
  their checksums. It belongs to one source, plan, seed and block size; of another it keeps nothing. The target has its
  name only when all of it is on disk.
- Every leaf that is read is checked against the source's manifest as it passes by. If one is wrong, the growth ends
  with its name, and what there was of the target is deleted. Moments that start anew (`optimizer = 'fresh'`) are not read.
- Rows with copies in other blocks are read once for each of these, and where entries are copied from the layer above
  (`aki`), that layer is read again. Everything else is read once.
- Noise that copies cancel, and a new row that is the mean of the others, need all rows: where they act on a leaf's first
  axis after layers, its blocks are whole layers.
- The models are not run, so nothing is compared but checksums, `growth.json` says so, and distances cannot be measured:
  give `Growth.depth` as a place, or as the copies that follow each layer. Where both models fit in memory,
  `python experiments/verify.py` compares them.

## What it costs

    {command}

A model 1,024 wide with {layers} layers grows to 1,536 wide with {grown_layers}, in float32 with both moments, in a
process of its own. The floor is the time that this file system takes for the same bytes in plain order: the source's files read, and
one file of the target's size written and synced; the mean of a measurement before the growth and one after it. The source
is dropped from the page cache before each. Memory is the process's own at its highest, less what it was before the
growth (VmHWM and VmRSS; the page cache is not in it).

| growth | read | written | time | floor | time / floor | floor past the cache | processor time | memory |
|---|---|---|---|---|---|---|---|---|
{rows}

{machine}, shared with others, under a load of {load:.1f} when it was measured: read the ratio with that in mind. The
floor wants the disk and, to fill the page cache, the processors; the growth goes past the cache (O_DIRECT) and wants the
processors for its own work, {per_gb:.1f} s of one for a GB written, some of it once, on compiling. The floor past the cache
is what this disk does for whoever has nothing to compute.
"""  # noqa: E501


def write_page(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the figures, and what they are of."""
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
    logging.set_verbosity(logging.ERROR)  # orbax has much to say
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
