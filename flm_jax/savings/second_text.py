"""What the runs of a study reach on a second text: one that neither their rates nor anything else was chosen by."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flm_jax.config import ModelConfig
from flm_jax.data.batches import Batch, in_batches
from flm_jax.data.packing import laid_out
from flm_jax.data.source import open_data
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.loss import make_heldout_loss
from flm_jax.model import Params
from flm_jax.recipe import resolve
from flm_jax.records import counted
from flm_jax.savings import results as kept
from flm_jax.savings.results import Arm, Result
from flm_jax.savings.snapshots import Snapshots
from flm_jax.savings.study import STEPS, SecondText, Study
from flm_jax.savings.target import seeded
from flm_jax.sharding import make_mesh


def windows(corpus: SecondText, vocabulary: Vocabulary, context: int, count: int) -> list[np.ndarray]:
    """At most `count` windows of the held-out documents of a corpus, int32 (context + 1,), spread evenly over them.

    Raises:
      ValueError: the documents are shorter than one window.
    """
    documents = (
        np.asarray([*vocabulary.encode(text), vocabulary.eos_id], np.int32) for text in corpus.documents("heldout")
    )
    tokens = np.concatenate([np.zeros(0, np.int32), *documents])
    total = (len(tokens) - 1) // context
    if total < 1:
        raise ValueError(
            f"Study.second_text: its held-out documents have {counted(len(tokens), 'token')}, fewer than a window of "
            f"{context}."
        )
    wanted = min(count, total)
    starts = np.arange(wanted) * total // wanted * context
    return [tokens[start : start + context + 1] for start in starts]


def measure(study: Study, results: Mapping[str, Result], directory: Path, snapshots: Snapshots) -> dict[str, Result]:
    """The results, with the loss on the second text of every run that is still kept and did not diverge.

    What was measured before on the same text is not measured again. Results that gain something are written.

    Args:
      study: the study; without a second text nothing is measured.
      results: by name.
      directory: of the results.
      snapshots: the last models of the runs.
    """
    found = dict(results)
    if study.second_text is None:
        return found
    text, loss_on = study.second_text.digest(), _Loss(study, study.second_text)
    arms: dict[str, Arm] = {}
    for step in STEPS.values():
        with contextlib.suppress(ValueError):  # its rates are not known yet
            arms |= {arm.name: arm for arm in step(study, results)}
    for name, arm in arms.items():
        if name in found and found[name].is_of(arm):
            result = found[name]
            runs = tuple(_measured(run, arm, text, loss_on, snapshots) for run in result.runs)
            if runs != result.runs:
                found[name] = dataclasses.replace(result, runs=runs)
                kept.write(directory, found[name])
                print(f"  {name} on the second text: {', '.join(_loss_of(run, text) for run in runs)}", flush=True)
    return found


class _Loss:
    """The loss of models on the second text; the text is tokenised, and each shape compiled, when first needed."""

    def __init__(self, study: Study, corpus: SecondText) -> None:
        self.target, self.corpus, self.mesh = study.target, corpus, make_mesh(None, jax.devices()[:1])
        self.of_shape: dict[ModelConfig, Any] = {}

    @functools.cached_property
    def batches(self) -> list[Batch]:
        target, vocabulary = self.target, open_data(self.target.data).vocabulary
        found = windows(self.corpus, vocabulary, target.data.context, target.eval_windows)
        batches = in_batches(found, target.batch_size, vocabulary.eos_id)
        return [laid_out(batch, target.data.packing) for batch in batches]

    def __call__(self, cfg: ModelConfig, params: Params) -> float:
        if cfg not in self.of_shape:
            self.of_shape[cfg] = make_heldout_loss(cfg, self.mesh)
        return float(self.of_shape[cfg](params, self.batches))


def _measured(run: Mapping[str, Any], arm: Arm, text: str, loss_on: _Loss, snapshots: Snapshots) -> Mapping[str, Any]:
    """A run with its loss on the second text, if it lacks it and its last model is kept."""
    recipe, last = seeded(arm.recipe, run["seed"]), len(arm.recipe.stages) - 1
    done = run.get("second", {}).get("text") == text
    if done or not math.isfinite(run["evals"][-1]["loss"]) or not snapshots.has(recipe, last):
        return run
    params = snapshots.read(recipe, last).state.params
    cfg = resolve(recipe)[last].cfg  # a growth in width keeps what its norms divide by: more than the recipe says
    return {**run, "second": {"text": text, "loss": loss_on(cfg, params)}}


def _loss_of(run: Mapping[str, Any], text: str) -> str:
    own = run.get("second", {})
    return f"{own['loss']:.4f}" if own.get("text") == text else "-"


def on_second_text(study: Study, results: Mapping[str, Result]) -> dict[str, Result]:
    """The results whose runs were all measured on the study's second text, with that loss as the one at their end."""
    if study.second_text is None:
        return {}
    text, found = study.second_text.digest(), {}
    for name, result in results.items():
        if all(run.get("second", {}).get("text") == text for run in result.runs):
            runs = tuple(
                {**run, "evals": [*run["evals"][:-1], {**run["evals"][-1], "loss": run["second"]["loss"]}]}
                for run in result.runs
            )
            found[name] = dataclasses.replace(result, runs=runs)
    return found
