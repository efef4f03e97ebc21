"""Steps, growths and held-out losses that compute next to nothing: for tests of what a run does around them.

A step depends on everything that it is given: state, batch, step, rate and masks. Runs that end in the same state have
therefore been given the same.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from flm_jax import stage_run
from flm_jax import train as training
from flm_jax.state import TrainState
from flm_jax.step import Metrics, StageProgram
from flm_jax.step.metrics import PartNorms

FOUND = {
    "holds": True,
    "preserving": True,
    "logits": {"max_abs": 0.0, "max_rel": 0.0},
    "hidden": {"max_rel_by_layer": [0.0]},
    "eval_loss": {"before": 2.0, "after": 2.0},
}


def stepper(program: StageProgram, masked: bool) -> Any:
    """In place of `StageProgram.stepper`."""

    def step(state: TrainState, batch: Any, teacher: Any = None) -> tuple[TrainState, Metrics]:
        with jax.transfer_guard("allow"):
            here, tokens = jax.device_get((state, batch.inputs_BT))
            rate = float(program.rate(int(here.step)))
            seen = np.dot(tokens.ravel() % 97, np.arange(tokens.size) % 89) % 1009 / 1009
            by = np.float32(rate * (1 + seen + 0.1 * masked + 0.2 * (teacher is not None)))

            def moved(x: Any) -> Any:
                return x + np.ones_like(x) if np.issubdtype(x.dtype, np.integer) else (x * 0.9 + by).astype(x.dtype)

            new = jax.device_put(jax.tree.map(moved, here), program.shardings)
        one = np.float32(1)
        values = {"grad_norm": one, "update_norm": one, "param_norm": one, "mask": one, "bad": np.float32(0)}
        none = np.zeros(0, np.float32)
        values["parts"] = PartNorms(none, none, none, ())
        found = Metrics(loss=np.float32(1 + seen), learning_rate=np.float32(rate), **values)
        with jax.transfer_guard("allow"):
            return new, jax.device_put(found)

    return step


def initialiser(program: StageProgram) -> Any:
    """In place of `StageProgram.initialiser`: zeros."""
    return lambda key: _placed(program, lambda like: np.zeros(like.shape, like.dtype))


def grower(program: StageProgram, donate: bool = False) -> Any:
    """In place of `StageProgram.grower`: what is new is 0."""
    del donate

    def larger(like: Any, old: Any) -> np.ndarray:
        found = np.zeros(like.shape, like.dtype)
        found[tuple(map(slice, old.shape))] = old
        return found

    def grow(state: TrainState, key: Any) -> Any:
        grown = _placed(program, larger, jax.device_get(state))
        return grown.replace(step=jax.device_put(np.zeros((), np.int32), program.shardings.step))

    return grow


def heldout_sums(cfg: Any, mesh: Any, chunks: int = 1) -> Any:
    """In place of `make_heldout_sums`: a loss that depends on parameters and text."""
    del cfg, mesh, chunks

    def evaluate(params: Any, batches: Any, masks: Any = None) -> tuple[np.ndarray, np.ndarray]:
        del masks
        read = list(batches)
        count = 1 if read[0].sources is None else read[0].sources.count
        loss = 2 + float(np.tanh(np.mean(jax.device_get(params["embedding"])))) + read[0].inputs_BT.sum() % 101 / 1010
        total = loss + np.arange(count) / 10
        return (total, np.ones(count)) if read[0].sources is not None else (total[0], np.ones(()))

    return evaluate


def _placed(program: StageProgram, make: Any, *trees: Any) -> Any:
    return jax.device_put(jax.tree.map(make, program.abstract_state, *trees), program.shardings)


def pretending() -> Iterator[None]:
    """A generator for a fixture: while it is used, runs compute next to nothing, and leave no plots and no samples."""
    with pytest.MonkeyPatch.context() as patch:
        for name, made in (("stepper", stepper), ("initialiser", initialiser), ("grower", grower)):
            patch.setattr(StageProgram, name, made)
        patch.setattr(stage_run, "make_heldout_sums", heldout_sums)
        patch.setattr(stage_run, "observe_before", lambda *given: None)
        patch.setattr(stage_run, "verify_growth", lambda *given, **form: FOUND)
        patch.setattr(stage_run, "growth_lines", lambda record: "")
        patch.setattr(stage_run.report, "plot", lambda *given: None)
        patch.setattr(training, "_sample", lambda *given: "")
        yield
