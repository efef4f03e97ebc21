"""A work directory written once and kept: later versions of the code must read it, and go on to the same numbers.

`tests/golden/run` was written by version 0.1.0: stage `first` at its end (step 4), stage `second` grown by a mask and
stopped in its ramp (steps 0 and 1 of 6). What restoring, resuming and growing it must give stands in
`tests/golden/run.json`. A refactor keeps all of it; nothing here is rewritten to make a test pass. Where the
train step is made to round differently on purpose, which CHANGELOG.md then says, `resumed` and `started` are recorded
anew, and their losses still agree with the old ones to 1e-6; what was saved and what is grown keeps its digests.

`python -m tests.golden_run` shows what the present code gives, as JSON, and changes nothing.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

from tests import conftest  # noqa: F401  # The tests' environment, before JAX starts.

# isort: split
import jax

from flm_jax import train as training
from flm_jax.checkpoint import read_manifest
from flm_jax.checkpoint_growth import grow_checkpoint
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import TextFolder
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.growth import Growth
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run, Stage
from flm_jax.sharding import MeshConfig
from tests import small

HERE = Path(__file__).resolve().parent / "golden"
RUN, EXPECTED = HERE / "run", HERE / "run.json"
MESH = MeshConfig(fsdp=2, tensor=2)
FAST = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)
HOW = Run(mesh=MESH, checkpoint_every=2, keep=1, log_every=1, sample_tokens=8)


def shape(**changes):
    """A model of 5,000 parameters whose axes the mesh divides."""
    return small.config(**{**dict(vocab=264, embed=8, heads=2, head_dim=4, mlp=12), **changes})


TARGET = dict(embed=12, layers=3, heads=4, mlp=20)
# By name: how `first` is grown outside of a run.
GROWTHS = {
    "zero": Growth("zero"),
    "mask": Growth("mask", ramp_steps=4, depth="top"),
    "copy, exact": Growth("copy", methods={"layers": "zero"}, optimizer="exact", depth=(0, 1)),
    "uneven, asymmetric": Growth("uneven", methods={"layers": "stack"}, optimizer="asymmetric", rewarm_steps=2),
    "noise, fresh": Growth("noise", methods={"layers": "mask"}, ramp_steps=4, optimizer="fresh"),
}


def recipe(base: Path) -> Recipe:
    """The recipe of the golden run; `base` is where its corpus is written and its data cached."""
    if not (base / "corpus").exists():
        small.write_corpus(base / "corpus")
    data = DataConfig(TextFolder(str(base / "corpus")), Bytes(), context=16, cache_dir=str(base / "cache"))
    second = shape(**TARGET)
    stages = (
        Stage("first", shape(), 4, 8, FAST),
        Stage("second", second, 6, 8, FAST, Growth("mask", ramp_steps=3), accumulate=2),
    )
    return Recipe(stages=stages, data=data, eval_windows=16, eval_every=4)


def digest(step: Path) -> str:
    """The digest of the state of a step."""
    return read_manifest(step).state_digest


def machine() -> str:
    """Names the processor's instructions: on others, sums are rounded in another order."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(kinds).encode()).hexdigest()[:12]


def resumed(base: Path) -> dict:
    """What the golden run gives when it is run to its end."""
    shutil.copytree(RUN, base / "run")
    report = training.train(recipe(base), HOW, base / "run")
    return {
        "second/6": digest(base / "run/checkpoints/1_second/6"),
        "losses": [(e["stage"], e["step"], e["loss"]) for e in report["evals"]],
    }


def grown(base: Path) -> dict:
    """By growth: the digests of `first`, grown in memory and block by block."""
    found = {}
    for name, growth in GROWTHS.items():
        found[name] = []
        for streamed in (False, True):
            where = base / f"{name}-{streamed}"
            options = dict(streamed=True, chunk_bytes=1000) if streamed else dict(mesh=MESH)
            grow_checkpoint(RUN / "checkpoints/0_first", where, shape(**TARGET), growth, seed=3, **options)
            found[name].append(digest(where / "checkpoints/0_grown/0"))
    return found


def started(base: Path) -> dict:
    """By growth: the digest after a few steps of a run that begins with the grown checkpoint, and its last loss."""
    found = {}
    for name in ("copy, exact", "uneven, asymmetric"):
        stages = (
            Stage("on", shape(**TARGET), 3, 8, FAST),
            Stage(
                "larger", shape(**{**TARGET, "embed": 16}), 3, 8, FAST, dataclasses.replace(GROWTHS[name], depth="top")
            ),
        )
        mine = dataclasses.replace(recipe(base), stages=stages, start=str(base / f"{name}-False"))
        report = training.train(mine, HOW, base / f"on {name}")
        ends = [digest(base / f"on {name}/checkpoints/{step}") for step in ("0_on/3", "1_larger/3")]
        found[name] = {"digests": ends, "losses": [(e["stage"], e["step"], e["loss"]) for e in report["evals"]]}
    return found


def found(base: Path) -> dict:
    """All that `run.json` records."""
    saved = {f"{p.parent.name}/{p.name}": digest(p) for p in sorted(RUN.glob("checkpoints/*/[0-9]*"))}
    about = {"machine": machine(), "jax": jax.__version__}
    result = {**about, "saved": saved, "resumed": resumed(base), "grown": grown(base)}
    return json.loads(json.dumps({**result, "started": started(base)}))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        result = json.dumps(found(Path(folder)), indent=1)
    print(result)
