"""The checkpoint that a run, a growth, an export or an evaluation starts from: its record, its state, its lineage."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flm_jax.checkpoint import CheckpointError, Checkpoints, DamagedError, read_manifest
from flm_jax.checkpoint.find import step_directory
from flm_jax.checkpoint.manifest import META, Manifest, file_faults, read_blobs, read_meta
from flm_jax.config import ModelConfig
from flm_jax.costs import leaves
from flm_jax.data.train_vocabulary import checkpoint_vocabulary
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.data.vocabulary_files import FILES, VocabularyError, to_files
from flm_jax.growth.lineage import Lineage
from flm_jax.growth.rescaling import rescaled_optimizer
from flm_jax.growth.trained import TRAINED, Trained
from flm_jax.guards import MEMORY
from flm_jax.model import Masks, Params, declared
from flm_jax.optimizer import OPTIMIZERS, OptimizerConfig
from flm_jax.records import as_dict, counted
from flm_jax.records.foreign_json import check, field, parse_json
from flm_jax.state import TrainState, abstract_state, kept, shardings_of

# The file of a checkpoint with the position in its data; it concerns only the run that wrote it.
POSITION = "data"
# The original configuration of a converted model, and its fields that describe the vocabulary.
CONFIG, IDS = "config.json", ("bos_token_id", "eos_token_id", "pad_token_id")


@functools.cache
def versions_here() -> Mapping[str, str]:
    """The versions, by name, of what writes checkpoints in this process; 'unknown' for a package not installed."""
    found = {"python": platform.python_version()}
    for name in ("flm_jax", "jax", "orbax-checkpoint"):
        found[name] = "unknown"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint's meta.json records, whether a run, a growth or an import wrote it.

    Attributes:
      stage: the stage's name.
      lineage: the model and the growths that led to it.
      since_growth: steps between the lineage's last growth and the stage's first step, from which masks and the rate of
        new entries go on to rise; None if the stage continued a model in which they no longer rise.
      provenance: what led to step 0; only in step 0.
      data: the training data's description of itself; after a growth, that of the data before it.
      history: measurements, growths and skipped steps of the run so far.
      converted: the config.json that an imported model came with.
      optimizer: the name of the optimizer that its state belongs to, if it has optimizer state.
      train: what of the model trained, see `Stage.train`: parameters of which nothing did have no moments.
      versions: by name, of the programs that wrote it; empty if it is from before they were recorded.
    """

    stage: str
    lineage: Lineage
    since_growth: int | None = 0
    provenance: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    history: Mapping[str, Any] | None = None
    converted: Mapping[str, Any] | None = None
    optimizer: str = "adamw"
    train: str = "all"
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions_here)

    @property
    def ramp_steps(self) -> int:
        """Steps at the start of the stage that run with masks."""
        return 0 if self.since_growth is None else max(self.lineage.ramp_steps - self.since_growth, 0)

    def record(self) -> dict[str, Any]:
        """The fields as JSON-able data."""
        cfg = as_dict(self.lineage.cfg)
        lineage = self.lineage.record() + ([] if self.since_growth is not None else [{"model": cfg, "growth": None}])
        given = {"data": self.data, "history": self.history, "converted": self.converted}
        return {
            "stage": self.stage,
            "model": cfg,
            "lineage": lineage,
            "ramp_steps": self.ramp_steps,
            "provenance": self.provenance,
            **({"since_growth": self.since_growth} if self.since_growth else {}),
            **({"optimizer": self.optimizer} if self.optimizer != "adamw" else {}),
            **({"train": self.train} if self.train != "all" else {}),
            **({"versions": dict(self.versions)} if self.versions else {}),
            **{name: value for name, value in given.items() if value is not None},
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CheckpointMeta:
        """Reads what `record` returns.

        Raises:
          ValueError: the record has no lineage, a field of it has the wrong type, or it names what this version does
            not know.
        """
        if not record.get("lineage"):
            raise ValueError("it does not record its model and the growths that led to it")
        entries = field(record, "lineage", list, "it")
        lineage = Lineage.from_record(entries)
        rising = len(entries) == 1 or entries[-1]["growth"] is not None
        since = check(record.get("since_growth", 0), int, "its since_growth") if rising else None
        if since is not None and since < 0:
            raise ValueError(f"its since_growth is {since}: it counts steps")
        rest = {
            name: check(record.get(name), (dict, type(None)), f"its {name}")
            for name in ("provenance", "data", "history", "converted")
        }
        optimizer = check(record.get("optimizer", "adamw"), str, "its optimizer")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"its optimizer is {optimizer!r:.40}; this version knows {', '.join(OPTIMIZERS)}")
        train = check(record.get("train", "all"), str, "its train")
        if train not in TRAINED or (train != "all" and lineage.growth is None):
            raise ValueError(f"its train is {train!r}: use {' or '.join(TRAINED)}, the latter only after a growth")
        versions = check(record.get("versions", {}), dict, "its versions")
        about: dict[str, Any] = {
            "optimizer": optimizer,
            "train": train,
            "versions": {k: str(v) for k, v in versions.items()},
        }
        return cls(field(record, "stage", str, "it"), lineage, since, **rest, **about)


def signature_texts(cfg: ModelConfig) -> dict[str, str]:
    """The signatures of a model's parameters by leaf path, as a checkpoint's manifest records them."""
    return {f"params/{path}": str(signature) for path, _, signature in leaves(cfg)}


@dataclass(frozen=True, eq=False)
class SourceCheckpoint:
    """A checkpoint and its record. Its arrays are read, and checked, by `restore`.

    Attributes:
      directory: of the step.
      step: within its stage.
      digest: over its whole state.
      meta: its record.
      trained: whether it has optimizer state; a converted checkpoint has only weights.
    """

    directory: Path
    step: int
    digest: str
    meta: CheckpointMeta
    trained: bool

    @property
    def lineage(self) -> Lineage:
        """Its model and the growths that led to it."""
        return self.meta.lineage

    @property
    def cfg(self) -> ModelConfig:
        """Its model's configuration."""
        return self.meta.lineage.cfg

    @property
    def context(self) -> int | None:
        """The length of the windows that it was trained on, in tokens, if its record says so.

        Raises:
          ValueError: what the record says is no length.
        """
        said = (self.meta.data or {}).get("context")
        where = f"{self.directory / META}: the context of its data"
        return None if said is None else int(check(said, int, where))

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """Files that belong to the weights and are copied with them, by file name, such as a tokenizer.

        Raises:
          DamagedError: one is not as it was saved.
        """
        manifest = read_manifest(self.directory)
        if faults := file_faults(self.directory, manifest, contents=False):
            raise DamagedError("; ".join(faults[:3]))
        found = read_blobs(self.directory, manifest)
        return {name: found[name] for name in sorted(found) if name not in (POSITION, MEMORY)}

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that it was trained with, from its own files.

        Raises:
          VocabularyError: it has none that can be used; see `checkpoint_vocabulary`.
          DamagedError: a file is not as it was saved.
        """
        return checkpoint_vocabulary(self.files, self.meta.data, str(self.directory))

    @functools.cached_property
    def unknown_vocabulary(self) -> str:
        """Why `vocabulary` cannot be used, as a sentence; '' if it can."""
        try:
            self.vocabulary  # noqa: B018 - reads it
        except VocabularyError as error:
            return f"{error}."
        return ""

    def other_vocabulary(self, vocabulary: Vocabulary) -> str:
        """What there is to say, as text, if `vocabulary` is not known to be the checkpoint's; '' if it is."""
        text = f"{self.directory} is used with the {vocabulary.kind} vocabulary of sha256 {vocabulary.digest}"
        if self.unknown_vocabulary:
            return f"{text}. Its own is not known: {self.unknown_vocabulary}"
        own = self.vocabulary
        if own.digest == vocabulary.digest:
            return ""
        return f"{text}, but was trained with the {own.kind} vocabulary of sha256 {own.digest}: ids mean other text."

    def files_with(self, vocabulary: Vocabulary | None) -> dict[str, bytes]:
        """The files that belong to the weights if training goes on with `vocabulary`; None: with the checkpoint's own.

        With another one than the checkpoint's, its tokenizer's files and the ids of its special tokens would describe
        another model: they are left out.
        """
        own = None if self.unknown_vocabulary else self.vocabulary
        if vocabulary is None:
            return self.files if own is None else {**self.files, **to_files(own)}
        if own is not None and own.digest == vocabulary.digest:
            return {**self.files, **to_files(vocabulary)}
        kept = {name: content for name, content in self.files.items() if name not in FILES}
        if CONFIG in kept:
            config = parse_json(kept[CONFIG], f"{self.directory}: {CONFIG}")
            config = {name: value for name, value in config.items() if name not in IDS}
            kept[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
        return {**kept, **to_files(vocabulary)}

    def restore(self, mesh: Mesh, optimizer: str | None = "adamw") -> TrainState:
        """The state on a mesh, with every bit checked; a weights-only checkpoint gets fresh optimizer state.

        Args:
          mesh: where to place the state.
          optimizer: the optimizer whose fresh state a weights-only checkpoint gets; None: it gets none.

        Raises:
          DamagedError: it is not as it was saved.
        """
        form = {"optimizer": self.meta.optimizer, "train": self.meta.train}
        abstract = abstract_state(self.lineage, mesh, weights=not self.trained, **form)
        with Checkpoints(self.directory.parent, read_only=True) as checkpoints:
            found = checkpoints.restore(kept(abstract), self.directory.name).state
        if self.trained:
            state: TrainState = found
            return state
        if optimizer is None:
            return TrainState(found["step"], found["params"], ())
        trained = Trained(self.lineage, self.meta.train)
        tx = rescaled_optimizer(OptimizerConfig(name=optimizer), self.cfg, trained.part(declared(self.cfg)[1]))
        where = shardings_of(abstract_state(self.lineage, mesh, optimizer=optimizer, train=self.meta.train).opt_state)
        init = jax.jit(tx.init, out_shardings=where)
        return TrainState(found["step"], found["params"], init(trained.part(found["params"])))

    def restore_params(self, mesh: Mesh) -> Params:
        """The parameters alone on a mesh, with every bit checked.

        Raises:
          DamagedError: the checkpoint is not as it was saved.
        """
        abstract = {"params": abstract_state(self.lineage, mesh, weights=True).params}
        with Checkpoints(self.directory.parent, read_only=True) as checkpoints:
            return checkpoints.restore(abstract, self.directory.name, partial=True).state["params"]

    def masks(self) -> Masks | None:
        """The masks of its own growth if they are still rising: the model must be run with them. None otherwise."""
        if self.step >= self.meta.ramp_steps:
            return None
        return self.lineage.masks(self.step + (self.meta.since_growth or 0))

    @property
    def rising(self) -> dict[str, int]:
        """What of its own growth still rises, masks or the rate of new entries, and for how many steps from here."""
        growth, since = self.lineage.growth, self.meta.since_growth
        if growth is None or since is None:
            return {}
        ends = {"masks": self.lineage.ramp_steps, "new entries' rate": growth.rewarm_steps}
        return {what: end - since - self.step for what, end in ends.items() if end > since + self.step}

    def check_settled(self) -> None:
        """Checks that nothing of its own growth still rises, so that it may grow again.

        Raises:
          ValueError: something does.
        """
        for what, left in self.rising.items():
            raise ValueError(
                f"{self.directory} is at step {self.step}, and its {what} rise for "
                f"{counted(left, 'more step')}: take a later "
                "checkpoint."
            )


def model_of(checkpoint: str, changes: Mapping[str, Any] | None = None) -> ModelConfig:
    """The configuration of a checkpoint's model, so that a recipe need not repeat it.

    Args:
      checkpoint: a step, a stage's directory or a work directory.
      changes: fields that differ from it.

    Raises:
      ValueError: there is no such field.
      CheckpointError: as `read_source`.
    """
    return read_source(checkpoint).cfg.changed(changes or {})


def read_source(path: str | Path) -> SourceCheckpoint:
    """Reads the record of a checkpoint: of a step's directory, or of the newest step of a stage or of a work directory.

    Raises:
      NoCheckpointError: there is none.
      CheckpointError: it was not written by a run or a growth of this project.
    """
    directory = step_directory(path)
    manifest = read_manifest(directory)
    try:
        meta = CheckpointMeta.from_record(read_meta(directory, manifest))
        _check_sizes(meta.lineage, manifest)
    except ValueError as error:
        raise CheckpointError(f"{directory / META}: {error}.") from error
    trained = any(name.startswith("opt_state/") for name in manifest.leaves)
    return SourceCheckpoint(directory, manifest.step, manifest.state_digest, meta, trained)


def _check_sizes(lineage: Lineage, manifest: Manifest) -> None:
    """Checks that no model of a lineage is larger than the arrays, before anything of its size is built.

    Raises:
      ValueError: one is.
    """
    largest = max((size for leaf in manifest.leaves.values() for size in leaf.shape), default=0)
    ancestor: Lineage | None = lineage
    while ancestor is not None:
        for axis, size in ancestor.cfg.sizes.items():
            if size > largest:
                raise ValueError(
                    f"its model has {axis}={size}, but no array of the checkpoint is longer than {largest}"
                )
        ancestor = ancestor.parent
