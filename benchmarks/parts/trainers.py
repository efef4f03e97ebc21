"""The train steps that are compared, each as a callable that does one step on a fixed batch and returns its loss.

python -m benchmarks.parts.trainers NAME SIZE              (prints the memory of one of them, in a process of its own)
python -m benchmarks.parts.trainers --serve NAME SIZE      (does a turn per line of standard input)
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import disk
from benchmarks.parts import ROOT
from benchmarks.plain_step import LEARNING_RATE, plain_state, plain_step
from flm_jax import costs
from flm_jax.config import ModelConfig
from flm_jax.data.batches import Batch
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Stage, resolve
from flm_jax.sharding import make_mesh
from flm_jax.step import StageProgram


class Size(NamedTuple):
    """A model and its batch; muP's base width is the model's width, so the logits' multiplier is 1, as in Llama."""

    embed: int
    layers: int
    heads: int
    mlp: int
    vocab: int
    rows: int
    context: int

    @property
    def cfg(self) -> ModelConfig:
        """The model, in float32."""
        return ModelConfig(*self[:5], base_width=self.embed, init_std_vector=0.02, compute_dtype="float32")

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.rows * self.context


SIZES = {
    "34 M": Size(512, 8, 8, 1376, 8192, 4, 512),
    "6.9 M": Size(256, 6, 4, 688, 4096, 8, 256),
    "3.4 M": Size(160, 9, 10, 432, 2048, 16, 128),
    "tiny": Size(32, 2, 2, 64, 256, 2, 16),
}
# The steps of a turn that are timed, after one that is not: while others took their turns, the system may have taken
# back, or given to them, the memory that a trainer's step frees and the next one asks for again. In training a step
# follows a step.
TIMED = 2
# A step returns this: () float32, or a float.
Step = Callable[[], Any]


def program_of(size: Size) -> StageProgram:
    """The programs of flm_jax for a model and its batch, on one device."""
    stage = Stage("bench", size.cfg, 1000, size.rows, OptimizerConfig(learning_rate=LEARNING_RATE))
    return StageProgram(resolve(Recipe(stages=(stage,)))[0], make_mesh(), 1)


def batch_of(size: Size) -> Batch:
    """A batch of random tokens, without document ends."""
    tokens = np.random.default_rng(0).integers(0, size.vocab, (size.rows, size.context + 1), dtype=np.int32)
    x, y = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    return Batch(x, y, jnp.ones(x.shape, jnp.float32), jnp.zeros_like(x))


def ours(size: Size, params: Any) -> Step:
    """The step of flm_jax, on a state of its own."""
    program, batch = program_of(size), batch_of(size)
    with jax.set_mesh(program.mesh):
        state = program.initialiser()(jax.random.key(0))
        state = state.replace(params=jax.tree.map(jnp.copy, params))
        step = program.stepper(masked=False)

    def once() -> Any:
        nonlocal state
        with jax.set_mesh(program.mesh):
            state, metrics = step(state, batch)
        jax.block_until_ready(state)
        return metrics.loss

    return once


def plain(size: Size, params: Any) -> Step:
    """The hand-written JAX step."""
    batch, state, step = batch_of(size), plain_state(params), plain_step(size.cfg)

    def once() -> Any:
        nonlocal state
        state, loss = step(state, (batch.inputs_BT, batch.targets_BT, batch.segments_BT))
        jax.block_until_ready(state)
        return loss

    return once


def torch_eager(size: Size, params: Any, compiled: bool = False) -> Step:
    """PyTorch's step, eager."""
    from benchmarks.torch_step import torch_model, torch_step

    batch = batch_of(size)
    model = torch_model(size.cfg, params, size.context)
    return torch_step(model, np.asarray(batch.inputs_BT), np.asarray(batch.targets_BT), compiled)


def torch_compiled(size: Size, params: Any) -> Step:
    """PyTorch's step, through torch.compile."""
    return torch_eager(size, params, compiled=True)


TRAINERS: dict[str, Callable[[Size, Any], Step]] = {
    "flm_jax": ours,
    "plain JAX": plain,
    "PyTorch": torch_eager,
    "torch.compile": torch_compiled,
}
# Also compared, in an environment of its own.
TUNIX = "tunix"


class Served:
    """A train step in a process of its own, as users have it: nothing of one trainer's memory or threads is another's.

    Attributes:
      loss: that of the first step; tunix starts from parameters of its own.
    """

    def __init__(self, trainer: str, size: str) -> None:
        command = [sys.executable, "-m", "benchmarks.parts.trainers", "--serve", trainer, size]
        environment = dict(os.environ)
        if trainer == TUNIX:
            python = ROOT / ".venv" / "tunix" / "bin" / "python"
            if not python.exists():
                raise FileNotFoundError("tunix is not installed; 'make .venv/tunix/installed' installs it")
            command = [
                str(python),
                str(ROOT / "benchmarks" / "tunix_step.py"),
                json.dumps({**SIZES[size]._asdict(), "timed": TIMED}),
            ]
            environment.pop("PYTHONPATH", None)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # Closed with the process.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            env=environment,
            text=True,
        )
        atexit.register(self.close)
        about = self._answer()
        if trainer == TUNIX and about != {"parameters": costs.param_count(SIZES[size].cfg), "dtypes": ["float32"]}:
            raise ValueError(f"tunix has {about} where the model has {SIZES[size]} in float32")
        self.loss = about["loss"] if "loss" in about else self._ask()["loss"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # What a library prints there is no answer.
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()]
        raise RuntimeError(f"its process ended with status {self._process.wait()}: {said[-1] if said else ''}")

    def _ask(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def __call__(self) -> float:
        """Does a turn; returns the seconds per step that it took there."""
        return float(self._ask()["seconds"])

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._errors.close()


def serve(trainer: str, size: str) -> None:
    """Does a turn per line of standard input, and prints its seconds per step; first the loss of a first step."""
    step = TRAINERS[trainer](SIZES[size], params_of(SIZES[size]))
    print(json.dumps({"loss": float(step())}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": turn(step)}), flush=True)


def turn(step: Callable[[], Any]) -> float:
    """Seconds per step of a turn: one step that is not timed, then `TIMED` that are."""
    step()
    since = time.perf_counter()
    for _ in range(TIMED):
        step()
    return (time.perf_counter() - since) / TIMED


def params_of(size: Size) -> Any:
    """The parameters from which all of them start."""
    program = program_of(size)
    with jax.set_mesh(program.mesh):
        return program.initialiser()(jax.random.key(0)).params


def main() -> None:
    """Serves one trainer's steps, or prints the memory of two of them, in bytes beyond a process with parameters."""
    if sys.argv[1] == "--serve":
        serve(*sys.argv[2:])
        return
    name, size = sys.argv[1], SIZES[sys.argv[2]]
    params = params_of(size)
    if name.startswith("torch") or name == "PyTorch":
        import torch  # noqa: F401  # Imported before memory is counted.
        import transformers  # noqa: F401

    def two_steps() -> None:
        step = TRAINERS[name](size, params)
        step()
        step()

    found = disk.measured(two_steps)[1]
    print(json.dumps({"peak": found["peak"], "beyond": found["peak"] - found["base"]}))


if __name__ == "__main__":
    main()
