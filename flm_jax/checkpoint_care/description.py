"""What one checkpoint is: its model, how that came to be, what it was trained on, who wrote it, and its bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flm_jax import costs
from flm_jax.checkpoint.manifest import BLOBS, MANIFEST, Leaf, Manifest, read_file, read_manifest
from flm_jax.checkpoint_care.losses import Heldout, at_or_before, losses_of_record
from flm_jax.growth.lineage import Lineage
from flm_jax.records import as_dict
from flm_jax.records.foreign_json import JsonError, check, parse_json
from flm_jax.source_checkpoint import POSITION, CheckpointMeta, SourceCheckpoint, read_source
from flm_jax.tracking import ForkRecord, recorded_forks

PARAMETERS, MOMENTS, OTHERS = "parameters", "moments", "others"


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds, as far as its manifest, its record and its data position say; no arrays are read.

    Attributes:
      source: the checkpoint and its record.
      written: when its manifest was written, in seconds since 1970.
      arrays: bytes of arrays: of parameters, of moments (what the optimizer keeps per parameter), of others.
      dtypes: of the parameters.
      files: by name, bytes of the files beside the arrays.
      stored: bytes of all files together.
      windows: how many windows of the training split the run had read; None if no run wrote it.
      heldout: the held-out measurement at its step or the last one before it, if its record has one.
      skipped: steps of the run that were skipped until then, as they were not finite.
      forks: from which runs its own has forked, the oldest first.
    """

    source: SourceCheckpoint
    written: float
    arrays: Mapping[str, int]
    dtypes: tuple[str, ...]
    files: Mapping[str, int]
    stored: int
    windows: int | None
    heldout: Heldout | None
    skipped: int
    forks: tuple[ForkRecord, ...] = ()

    @property
    def passes(self) -> float | None:
        """How often the run had read the training split; None if the record does not say how large that is."""
        data, context = self.source.meta.data or {}, self.source.context
        splits = data.get("splits")
        train = splits.get("train") if isinstance(splits, Mapping) else None
        tokens = train.get("tokens") if isinstance(train, Mapping) else None
        if self.windows is None or context is None or not isinstance(tokens, int) or tokens < 1:
            return None
        return self.windows * context / tokens

    def record(self) -> dict[str, Any]:
        """The description, JSON-able."""
        source, meta = self.source, self.source.meta
        return {
            "directory": str(source.directory),
            "stage": meta.stage,
            "step": source.step,
            "digest": source.digest,
            "written": self.written,
            "model": as_dict(source.cfg),
            "params": costs.param_count(source.cfg),
            "dtypes": list(self.dtypes),
            "optimizer": meta.optimizer if source.trained else None,
            "train": meta.train,
            "lineage": source.lineage.record(),
            "rising": source.rising,
            "data": meta.data,
            "windows": self.windows,
            "passes": self.passes,
            "heldout": None if self.heldout is None else self.heldout.record(),
            "skipped": self.skipped,
            "forks": [fork.record() for fork in self.forks],
            "versions": dict(meta.versions),
            "bytes": {**self.arrays, "files": dict(self.files), "stored": self.stored},
        }


def describe(path: str | Path) -> Description:
    """Describes a checkpoint: a step's directory, or the newest step of a stage or of a work directory.

    Raises:
      NoCheckpointError: there is none.
      DamagedError: what is read of it is not as it was saved.
      CheckpointError: it was not written by a run, a growth or an import of this project.
    """
    source = read_source(path)
    manifest = read_manifest(source.directory)
    sizes = dict.fromkeys((PARAMETERS, MOMENTS, OTHERS), 0)
    for name, leaf in manifest.leaves.items():
        sizes[_role(name, leaf)] += math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
    dtypes = {leaf.dtype for name, leaf in manifest.leaves.items() if _role(name, leaf) == PARAMETERS}
    about = (source.directory / MANIFEST).stat()
    beside = {name: file.size for name, file in manifest.files.items() if not name.startswith("arrays/")}
    where = str(source.directory)
    history = check(source.meta.history or {}, dict, f"{where}: history")
    return Description(
        source=source,
        written=about.st_mtime,
        arrays=sizes,
        dtypes=tuple(sorted(dtypes)),
        files=beside | {MANIFEST: about.st_size},
        stored=about.st_size + sum(file.size for file in manifest.files.values()),
        windows=_windows(source, manifest),
        heldout=at_or_before(losses_of_record({"history": history}, where), source.meta.stage, source.step),
        skipped=len(check(history.get("skipped", []), list, f"{where}: skipped")),
        forks=recorded_forks(history, where),
    )


def lineage_sentences(lineage: Lineage) -> list[str]:
    """A line for each model that led to this one, the oldest first: how it grew, its shape and size."""
    found: list[str] = []
    ancestor: Lineage | None = lineage
    while ancestor is not None:
        shape = f"{costs.shape_line(ancestor.cfg)}; {costs.count(costs.param_count(ancestor.cfg))} parameters"
        growth = ancestor.growth
        if growth is not None:
            ramp = f", masks over {ancestor.ramp_steps} steps" if ancestor.ramp_steps else ""
            moments = "" if growth.optimizer == "carry" else f", optimizer {growth.optimizer}"
            shape = f"grown by {growth.name}{ramp}{moments}: {shape}"
        found.append(shape)
        ancestor = ancestor.parent
    return found[::-1]


def settings(meta: CheckpointMeta, trained: bool) -> dict[str, Any]:
    """What of a record can differ between checkpoints and is no measurement, as nested data."""
    return {
        "stage": meta.stage,
        "model": as_dict(meta.lineage.cfg),
        "optimizer": meta.optimizer if trained else None,
        "train": meta.train,
        "data": dict(meta.data or {}),
        "versions": dict(meta.versions),
    }


def _role(path: str, leaf: Leaf) -> str:
    """What an array is: the state's field that it lies in says so; counts of an optimizer are no moments."""
    if path.startswith("params/"):
        return PARAMETERS
    return MOMENTS if path.startswith("opt_state/") and leaf.shape else OTHERS


def _windows(source: SourceCheckpoint, manifest: Manifest) -> int | None:
    """The position in the training data; None if there is none, or it is not written as runs write it."""
    name = f"{BLOBS}/{POSITION}"
    if name not in manifest.files:
        return None
    try:
        record = parse_json(read_file(source.directory, manifest, name), name)
        return int(check(record.get("position"), int, name))
    except JsonError:
        return None
