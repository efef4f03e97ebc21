"""Keeps snapshots on disk by what determines them, so that runs share their first stages and a study can be resumed."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flm_jax.files import atomic_write, sha256_json
from flm_jax.recipe import Recipe, resolve
from flm_jax.records import as_dict, from_dict, reduced
from flm_jax.savings.replicas import Snapshot, stages_record
from flm_jax.sharding import make_mesh
from flm_jax.state import abstract_state

# Counts changes of what a recipe computes, which its record does not show.
VERSION = 1


@dataclass(frozen=True)
class Snapshots:
    """A directory of snapshots.

    Attributes:
      directory: where they are.
    """

    directory: Path

    def path(self, recipe: Recipe, index: int) -> Path:
        """The file of a recipe's snapshot at the end of stage `index`; fields that recipes gain do not change it."""
        return self.directory / f"{sha256_json([VERSION, reduced(stages_record(recipe, index))])[:32]}.npz"

    def has(self, recipe: Recipe, index: int) -> bool:
        """Whether it is there."""
        return self.path(recipe, index).exists()

    def write(self, recipe: Recipe, index: int, snapshot: Snapshot) -> None:
        """Keeps a snapshot."""
        about = {
            "position": snapshot.position.decode("latin-1"),
            "placed": {str(number): as_dict(growth) for number, growth in snapshot.placed.items()},
            "evals": list(snapshot.evals),
            "seconds": snapshot.seconds,
        }
        self._write(recipe, index, about, jax.tree.leaves(snapshot.state))

    def give_up(self, recipe: Recipe, index: int) -> None:
        """Keeps of a run that diverged in an earlier stage that it did; such a snapshot has no state to `read`."""
        about = self.about(recipe, index - 1)
        last = {**about["evals"][-1], "stage": index, "step": 0, "loss": math.inf}
        self._write(recipe, index, {**about, "evals": [*about["evals"], last]}, ())

    def _write(self, recipe: Recipe, index: int, about: Mapping[str, Any], leaves: Sequence[Any]) -> None:
        named: dict[str, Any] = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        content = io.BytesIO()
        np.savez(content, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **named)
        self.directory.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path(recipe, index), content.getvalue())

    def diverged(self, recipe: Recipe, index: int) -> bool:
        """Whether a run whose snapshot at the end of stage `index` is there had diverged by then."""
        return not math.isfinite(self.about(recipe, index)["evals"][-1]["loss"])

    def about(self, recipe: Recipe, index: int) -> dict[str, Any]:
        """What a snapshot holds besides its state: position, placed, evals, seconds.

        Raises:
          OSError: it is not there.
        """
        with np.load(self.path(recipe, index), allow_pickle=False) as found:
            about: dict[str, Any] = json.loads(found["about"].tobytes())
            return about

    def read(self, recipe: Recipe, index: int) -> Snapshot:
        """The snapshot.

        Raises:
          OSError: it is not there.
        """
        stage = resolve(recipe)[index]
        mesh = make_mesh(None, jax.devices()[:1])
        state = abstract_state(stage.lineage, mesh, optimizer=stage.optimizer.name, train=stage.train)
        outline = jax.tree.structure(state)
        with np.load(self.path(recipe, index), allow_pickle=False) as found:
            about = json.loads(found["about"].tobytes())
            state = jax.tree.unflatten(outline, [found[f"leaf{i}"] for i in range(len(found.files) - 1)])
        placed = {int(number): from_dict(growth) for number, growth in about["placed"].items()}
        return Snapshot(
            state, about["position"].encode("latin-1"), placed, tuple(about["evals"]), float(about["seconds"])
        )
