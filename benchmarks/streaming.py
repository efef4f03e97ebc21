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
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_SIZE = flags.DEFINE_float("size", 4.0, "GB of the target's state.")
_METHODS = flags.DEFINE_multi_string("method", ["zero", "copy"], "How all but the layers grow.")
_CHUNK = flags.DEFINE_integer("chunk_bytes", 0, "The largest block; 0: the default.")
_DIR = flags.DEFINE_string("dir", None, "Where the checkpoints go meanwhile; a temporary directory if not given.")
_WRITE = flags.DEFINE_string("write", None, "Write the page to this file.")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
_CHILD = flags.DEFINE_string("child", None, "Used by the program itself.")

PIECE = 64 << 20


def shapes(gigabytes: float) -> tuple[Any, Any]:
    """Source and target."""
    from flm_jax import plan
    from flm_jax.config import ModelConfig

    def model(width: int, layers: int) -> ModelConfig:
        return ModelConfig(embed=width, layers=layers, heads=width // 64, mlp=width * 8 // 3 // 64 * 64, vocab=16_384)

    def grown(layers: int) -> ModelConfig:
        return model(1536, layers + layers // 2)

    layers = 2
    while 12 * plan.param_count(grown(layers)) < gigabytes * 1e9:
        layers += 2
    return model(1024, layers), grown(layers)


def save_source(workdir: Path, gigabytes: float) -> None:
    """A checkpoint of random values, as a run would have saved it."""
    import jax
    import jax.numpy as jnp

    from flm_jax.checkpoint import Checkpoints
    from flm_jax.origin import lineage
    from flm_jax.recipe import ResolvedStage, Stage, as_dict
    from flm_jax.sharding import make_mesh
    from flm_jax.step import StageProgram

    cfg, _ = shapes(gigabytes)
    stage = ResolvedStage(0, Stage("first", cfg, 0, 0), None)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        program = StageProgram(stage, mesh, 1)
        state = program.initialiser()(jax.random.key(0))
        state = state.replace(
            opt_state=jax.tree.map(lambda x: x + jnp.asarray(1 + x.ndim / 7, x.dtype), state.opt_state)
        )
        meta = {"stage": "first", "model": as_dict(cfg), "lineage": lineage(stage), "ramp_steps": 0, "provenance": None}
        with Checkpoints(workdir / "checkpoints" / "0_first") as store:
            store.save(1, state, meta=meta)


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, what is resident now, or VmHWM, the most that was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def child(work: Path, gigabytes: float, method: str, chunk_bytes: int) -> dict[str, float]:
    """Grows, and measures its own time and memory."""
    import jax

    from flm_jax.growth import Growth
    from flm_jax.streamed import CHUNK_BYTES
    from flm_jax.transplant import grow_checkpoint

    jax.numpy.zeros(()).block_until_ready()  # the process itself, with its runtime
    growth = Growth(method, methods={"layers": "zero"})
    base = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    used = resource.getrusage(resource.RUSAGE_SELF)
    before, since = used.ru_utime + used.ru_stime, time.perf_counter()
    record = grow_checkpoint(
        work / "source",
        work / method,
        shapes(gigabytes)[1],
        growth,
        streamed=True,
        chunk_bytes=chunk_bytes or CHUNK_BYTES,
    )
    seconds = time.perf_counter() - since
    used = resource.getrusage(resource.RUSAGE_SELF)
    moved = record["verification"]["streamed"]
    read, written, cpu = moved["source"]["bytes"], moved["target"]["bytes"], used.ru_utime + used.ru_stime - before
    return {"seconds": seconds, "base": base, "peak": memory("VmHWM"), "read": read, "written": written, "cpu": cpu}


def forget(folder: Path) -> list[Path]:
    """Drops the files of a folder from the page cache; returns them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return files


def floor(work: Path, read: int, written: int) -> tuple[float, float]:
    """Seconds to read the source's files, and to write and sync as many bytes as the target has."""
    buffer = memoryview(bytearray(os.urandom(1 << 20) * (PIECE >> 20)))
    files = forget(work / "source")
    since, done = time.perf_counter(), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                done += got
    reading = (time.perf_counter() - since) * read / done
    since = time.perf_counter()
    with (work / "floor").open("wb", buffering=0) as file:
        for at in range(0, written, PIECE):
            file.write(buffer[: min(PIECE, written - at)])
        os.fsync(file.fileno())
    writing = time.perf_counter() - since
    (work / "floor").unlink()
    return reading, writing


def measure(work: Path, method: str) -> dict[str, float]:
    """One growth, and the floor before and after it."""
    source, target = shapes(_SIZE.value)
    from flm_jax import plan

    read, written = 12 * plan.param_count(source), 12 * plan.param_count(target)
    floors = [floor(work, read, written)]
    forget(work / "source")
    arguments = ["--child", method, f"--dir={work}", f"--size={_SIZE.value}", f"--chunk_bytes={_CHUNK.value}"]
    found = call(arguments)
    shutil.rmtree(work / method)
    floors.append(floor(work, read, written))
    lowest = statistics.mean(map(sum, floors))
    print(f"{method}: {found['seconds']:.1f} s, floor {' '.join(f'{a:.1f}+{b:.1f}' for a, b in floors)} s", flush=True)
    return {
        "method": method,  # type: ignore[dict-item]
        "seconds": found["seconds"],
        "floor": lowest,
        "floors": floors,  # type: ignore[dict-item]
        "cpu_seconds": found["cpu"],
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
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
