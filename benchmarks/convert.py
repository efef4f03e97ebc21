"""Import and export of models larger than memory: time compared with the disk's floor, and memory of the process.

  python benchmarks/convert.py --size=4 [--small=1] [--write=docs/convert_benchmark.md] [--json=FILE] [--dir=DIR]

Two Llamas of width 4,096 with random bfloat16 weights are made, with as many layers as give `size` and `small` GB. Each
is imported in its own dtype, imported as float32, and the first import is exported again. The exported tensors must be
equal to the original ones bit for bit, otherwise the exit status is 1. Each conversion runs in a process of its own.
The floor is the time to read and write the same number of bytes on the same file system without computing anything
(`disk.floor`), measured before and after the conversion. The files that are read are dropped from the page cache before
each measurement.
"""

from __future__ import annotations

import hashlib
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

_SIZE = flags.DEFINE_float("size", 4.0, "GB of the model's files.", lower_bound=0.0)
_SMALL = flags.DEFINE_float("small", 1.0, "GB of the smaller model's files; ignored unless smaller than --size.")
_DIR = flags.DEFINE_string("dir", None, "Directory for the models; by default a temporary directory.")
_WRITE = flags.DEFINE_string("write", None, "Write the page to this file.")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
_CHILD = flags.DEFINE_string("child", None, "Used by the program itself.")

# For each conversion, in the order of measurement: the folder that is read and the folder that is written.
CASES = {
    "import": ("model", "checkpoint"),
    "import as float32": ("model", "widened"),
    "export": ("checkpoint", "exported"),
}
SHARDS = 4


def shape(gigabytes: float) -> Any:
    """The model, with the smallest number of layers that gives files of `gigabytes` GB."""
    from flm_jax import costs
    from flm_jax.config import ModelConfig

    def model(layers: int) -> ModelConfig:
        return ModelConfig(
            embed=4096,
            layers=layers,
            heads=32,
            kv_heads=8,
            mlp=11_008,
            vocab=32_768,
            tied=False,
            base_width=4096,
            param_dtype="bfloat16",
        )

    layers = 1
    while 2 * costs.param_count(model(layers)) < gigabytes * 1e9:
        layers += 1
    return model(layers)


def make_model(folder: Path, gigabytes: float) -> dict[str, Any]:
    """Writes a directory in the form of a downloaded model; returns its layers and bytes."""
    import ml_dtypes
    import numpy as np

    from flm_jax.convert import families
    from flm_jax.convert.layout import tensors
    from flm_jax.convert.tensors import save

    cfg = shape(gigabytes)
    planned = tensors(cfg, np.dtype(ml_dtypes.bfloat16))
    sizes = [int(np.prod(like.shape)) * 2 for like in planned.values()]
    rng = np.random.default_rng(0)

    def fill(name: str, tensor: Any) -> None:
        del name
        flat = tensor.reshape(-1).view(np.uint16)
        for start in range(0, len(flat), disk.PIECE):
            piece = flat[start : start + disk.PIECE]
            piece[...] = np.frombuffer(rng.bytes(piece.nbytes), np.uint16) & 0xBFFF  # below 2, so finite

    save(folder, planned, fill, max(-(-sum(sizes) // SHARDS), max(sizes)))
    config = families.config_json(cfg, families.FAMILIES["LlamaForCausalLM"], "bfloat16", 4096, {})
    (folder / families.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return {"layers": cfg.layers, "bytes": sum(sizes), "largest": max(sizes)}


def convert(work: Path, case: str) -> dict[str, Any]:
    """Runs one conversion in this process; returns its time and memory."""
    import jax

    from flm_jax.convert.exporting import export_model
    from flm_jax.convert.importing import import_model

    jax.numpy.zeros(()).block_until_ready()  # starts JAX's runtime, so that its memory is not counted
    source, target = (work / name for name in CASES[case])
    if case == "export":
        return disk.measured(lambda: export_model(source, target))[1]
    dtype = "float32" if "float32" in case else None
    return disk.measured(lambda: import_model(source, target, dtype))[1]


def digests(folder: Path) -> dict[str, str]:
    """The digest of every tensor's name, dtype, shape and bytes."""
    from flm_jax.convert.tensors import open_shards

    found = {}
    for name, tensor in open_shards(folder).items():
        digest = hashlib.blake2b(f"{tensor.dtype.name} {tensor.shape}".encode())
        step = max(disk.PIECE // max(tensor.row_bytes, 1), 1)
        for start in range(0, tensor.count, step):
            digest.update(tensor.rows(start, min(start + step, tensor.count)).tobytes())
        found[name] = digest.hexdigest()
    return found


def child(work: Path, task: str) -> dict[str, Any]:
    """The result of one task, run in a process of its own."""
    if task == "make":
        return make_model(work / "model", _SIZE.value)
    if task == "compare":
        before, after = (digests(work / name) for name in ("model", "exported"))
        names = before.keys() | after.keys()
        return {"tensors": len(before), "differ": sum(before.get(name) != after.get(name) for name in names)}
    return convert(work, task)


def measure(work: Path, case: str, read: int) -> dict[str, Any]:
    """The measurements of one conversion, and of the floor before and after it."""
    source, target = (work / name for name in CASES[case])
    written = read * (2 if "float32" in case else 1)
    floors = [disk.floor(source, read, written)]
    disk.forget(source)
    found = call(["--child", case, f"--dir={work}"])
    load = os.getloadavg()[0]
    held = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    floors.append(disk.floor(source, read, written))
    past = sum(disk.floor(source, read, written, past_cache=True))
    lowest = statistics.mean(map(sum, floors))
    print(f"{case}: {found['seconds']:.1f} s, floor {' '.join(f'{a:.1f}+{b:.1f}' for a, b in floors)} s", flush=True)
    return {
        "case": case,
        "seconds": found["seconds"],
        "floor": lowest,
        "floors": floors,
        "floor_past_cache": past,
        "ratio": found["seconds"] / lowest,
        "cpu_seconds": found["cpu"],
        "load": load,
        "read_gb": read / 1e9,
        "written_gb": held / 1e9,
        "base_gb": found["base"] / 1e9,
        "beyond_base_gb": (found["peak"] - found["base"]) / 1e9,
    }


def measure_all(work: Path, gigabytes: float) -> list[dict[str, Any]]:
    """The measurements of all conversions of a model of `gigabytes` GB."""
    work.mkdir()
    made = call(["--child", "make", f"--dir={work}", f"--size={gigabytes}"])
    rows = []
    for case in CASES:
        row = measure(work, case, int(made["bytes"]))
        rows.append({**row, "layers": made["layers"], "largest_gb": made["largest"] / 1e9})
        if case == "import as float32":
            shutil.rmtree(work / "widened")
    compared = call(["--child", "compare", f"--dir={work}"])
    shutil.rmtree(work)
    return [{**row, **compared} for row in rows]


def call(arguments: list[str]) -> dict[str, Any]:
    """Runs this program in a new process; returns the JSON object that it prints last."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    found: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    return found


PAGE = """# What converting a model costs

    {command}

The model is a Llama of width 4,096 with a vocabulary of 32,768, in bfloat16, in several safetensors files:
{sizes}.
Its largest tensors have {largest:.2f} GB. It is imported in its own dtype (import), imported as float32, and the first
import is exported again (export). All exported tensors must be equal to the original ones, bit for bit. {same}

| conversion | read | written | time | floor | time / floor | floor past the cache | processor time | memory |
|---|---|---|---|---|---|---|---|---|
{rows}

- Memory is the peak of the process during the conversion, minus its memory before it, with all modules imported (VmHWM
  minus VmRSS; without the page cache). From the smaller to the larger model:
  {peaks}.
- The floor is the time that this file system takes to read the same files in order, and to write and sync one file of
  the written size: the mean of a measurement before the conversion and one after it. The files that are read are
  dropped from the page cache before each measurement.
- An import reads and writes past the page cache (O_DIRECT); an export reads past it and writes through it. The floor
  past the cache is the floor measured with O_DIRECT.
- Processor time is the sum over all threads. It is spent on transposing matrices, which are stored transposed in the
  files, and on the checksums of all values. Some of it is spent once, on compilation.

{machine}, shared with other work, under a load of {load:.1f} during the measurement, which affects the ratios.
"""


def page(rows: list[dict[str, Any]]) -> str:
    """The page in Markdown: the measurements and their explanation."""
    table = "\n".join(
        f"| {row['case']} | {row['read_gb']:.2f} GB | {row['written_gb']:.2f} GB | {row['seconds']:.1f} s | "
        f"{row['floor']:.1f} s | {row['ratio']:.2f} | {row['floor_past_cache']:.1f} s | {row['cpu_seconds']:.1f} s | "
        f"{row['beyond_base_gb']:.2f} GB |"
        for row in rows
    )
    sizes = sorted({(row["read_gb"], row["layers"]) for row in rows})
    peaks = []
    for case in CASES:
        found = [f"{row['beyond_base_gb']:.2f} GB" for row in sorted(rows, key=_size) if row["case"] == case]
        peaks.append(f"{case} took {', then '.join(found)}")
    differ = sum(row["differ"] for row in rows)
    asked = f"--size={_SIZE.value:g} --small={_SMALL.value:g}"
    return PAGE.format(
        command=f"python benchmarks/convert.py {asked} --write=docs/convert_benchmark.md",
        sizes=" and ".join(f"{size:.2f} GB ({layers} layers)" for size, layers in sizes),
        largest=rows[0]["largest_gb"],
        same=f"{differ} of them are not." if differ else "They are.",
        rows=table,
        peaks="; ".join(peaks),
        machine=disk.machine(),
        load=statistics.mean(row["load"] for row in rows),
    )


def _size(row: dict[str, Any]) -> float:
    return float(row["read_gb"])


def main(argv: list[str]) -> None:
    """Makes the models, converts each, and compares the exported tensors with the original ones."""
    del argv
    logging.set_verbosity(logging.ERROR)  # orbax logs a lot
    if _CHILD.value:
        print(json.dumps(child(Path(_DIR.value or "."), _CHILD.value)))
        return
    work = Path(tempfile.mkdtemp(prefix="convert_", dir=_DIR.value))
    rows = []
    try:
        for size in sorted({min(_SMALL.value, _SIZE.value), _SIZE.value}):
            rows += measure_all(work / f"{size:g}", size)
    finally:
        shutil.rmtree(work)
    for row in rows:
        print(json.dumps(row))
    if _WRITE.value:
        Path(_WRITE.value).write_text(page(rows))
    else:
        print(page(rows))
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")
    if any(row["differ"] for row in rows):
        raise SystemExit("Some exported tensors differ from the original ones.")


if __name__ == "__main__":
    app.run(main)
