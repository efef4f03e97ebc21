"""What is to be computed (`Recipe`, its `Stage`s) and how it is run (`Run`).

A work directory belongs to one recipe: every number in it follows from the recipe, and going on with another one is
refused. A run's settings, such as the mesh or how often to save, may change from one start to the next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flm_jax.config import ModelConfig
from flm_jax.data.config import DataConfig
from flm_jax.growth.exact_adamw import Rescaling, frame
from flm_jax.growth.plan import NUMERICS, Growth, grown_config, ramp_steps
from flm_jax.optimizer import OptimizerConfig, schedule
from flm_jax.records import as_dict, differences, recorded
from flm_jax.sharding import MeshConfig


@recorded
@dataclass(frozen=True)
class Stage:
    """One model, trained for some steps.

    Attributes:
      name: for reports and directories.
      model: its configuration.
      steps: optimizer steps.
      batch_size: windows a step, over all hosts.
      optimizer: how.
      growth: how it grows from the stage before; None for the first stage, which is initialised, or goes on with the
        model of `Recipe.start`.
      accumulate: parts that a batch is split into, one after the other.
    """

    name: str
    model: ModelConfig
    steps: int
    batch_size: int
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    growth: Growth | None = None
    accumulate: int = 1


@recorded
@dataclass(frozen=True)
class Recipe:
    """A run from the first stage to the last: what decides every number.

    Attributes:
      stages: in order; the first is initialised or begins with `start`, the others grow.
      data: corpus, vocabulary, context.
      seed: for initialisation and for what growth draws.
      loss_chunks: parts of a window that the head runs on, one at a time.
      tolerance: largest relative difference of logits that a preserving growth may show, in float32.
      eval_windows: held-out windows that the loss is measured on.
      eval_every: steps between measurements; each stage also measures at its start and end.
      start: a checkpoint that the first stage goes on with, or grows from, if it has a growth; empty: none. The data
        begins anew, what was spent before it is not in the report, and it must be there whenever the run is resumed.
    """

    stages: tuple[Stage, ...]
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    loss_chunks: int = 1
    tolerance: float = 1e-5
    eval_windows: int = 256
    eval_every: int = 50
    # Where it lies may change; which one it is, is recorded by its digest.
    start: str = field(default="", metadata={"identity": False})

    def __post_init__(self) -> None:
        # gin gives lists.
        object.__setattr__(self, "stages", tuple(self.stages))
        _check_at_least(self, 1, "loss_chunks", "eval_windows", "eval_every")


@recorded
@dataclass(frozen=True)
class Run:
    """How a recipe is run: nothing here changes what is computed, but for rounding on another mesh.

    Attributes:
      mesh: how devices are laid out.
      meshes: the same for stages that want another layout, by the stage's name.
      compiler_options: XLA's options for train steps on TPUs; elsewhere they are left out.
      checkpoint_every: steps between checkpoints; each stage also saves at its start and end.
      keep: checkpoints of a stage that are kept, besides its first and last.
      log_every: steps between lines in the event files.
      max_bad_steps: non-finite steps in a row, each skipped, before the run stops.
      prompt: beginning of the sample of text at the end.
      sample_tokens: length of that sample.
    """

    mesh: MeshConfig = field(default_factory=MeshConfig)
    meshes: Mapping[str, MeshConfig] = field(default_factory=dict)
    compiler_options: Mapping[str, str] = field(default_factory=dict)
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 10
    max_bad_steps: int = 3
    prompt: str = "def "
    sample_tokens: int = 120

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "checkpoint_every", "keep", "log_every", "max_bad_steps", "sample_tokens")

    def mesh_of(self, stage: Stage) -> MeshConfig:
        """How devices are laid out for a stage."""
        return self.meshes.get(stage.name, self.mesh)

    def check(self, recipe: Recipe) -> None:
        """Checks what names stages, and what gin may have given instead of a mesh.

        Raises:
            ValueError: a stage is named that the recipe does not have, or a mesh is none.
        """
        for mesh in (self.mesh, *self.meshes.values()):
            if not isinstance(mesh, MeshConfig):
                raise ValueError(f"Run.mesh or Run.meshes holds {mesh!r}; bind a MeshConfig, called: '@MeshConfig()'.")
        names = [stage.name for stage in recipe.stages]
        if unknown := sorted(set(self.meshes) - set(names)):
            raise ValueError(f"Run.meshes names {', '.join(unknown)}; the stages are {', '.join(names)}.")


@dataclass(frozen=True)
class ResolvedStage:
    """A stage in its place, with the configuration that its model really has.

    Attributes:
      index: place in the recipe.
      stage: as the recipe gives it, but for `stage.model`, which is the grown configuration.
      before: the stage before, or None.
      ready: whether its state is what the recipe starts with, rather than grown from that.
    """

    index: int
    stage: Stage
    before: ResolvedStage | None
    ready: bool = False

    @property
    def cfg(self) -> ModelConfig:
        """The model."""
        return self.stage.model

    @property
    def directory(self) -> str:
        """Name of its checkpoint directory."""
        return f"{self.index}_{self.stage.name}"

    @property
    def ramp_steps(self) -> int:
        """Steps at the start of the stage that run with masks."""
        if self.stage.growth is None or self.before is None:
            return 0
        return ramp_steps(self.before.cfg, self.cfg, self.stage.growth)

    @functools.cached_property
    def frame(self) -> Rescaling | None:
        """How the optimizer sees parameters and gradients, after growths that it goes on through exactly."""
        if self.before is None:
            return None
        if self.stage.growth is None:
            return self.before.frame
        return frame(self.before.cfg, self.cfg, self.stage.growth, self.before.frame)


def _check_at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{type(config).__name__}.{name}={getattr(config, name)} must be at least {least}.")


def resolve(recipe: Recipe, start: tuple[ResolvedStage, int] | None = None) -> tuple[ResolvedStage, ...]:
    """Checks a recipe and gives every stage the configuration that its growth leads to.

    Args:
        recipe: what to compute.
        start: the stage and the step of the checkpoint that it starts with, if any.

    Raises:
        ValueError: the sentence names the stage, the field, and what would be right.
    """
    if not recipe.stages:
        raise ValueError("Recipe.stages is empty; a recipe has at least one stage.")
    if recipe.data.context % recipe.loss_chunks:
        raise ValueError(
            f"Recipe.loss_chunks={recipe.loss_chunks} must divide DataConfig.context={recipe.data.context}."
        )
    resolved: list[ResolvedStage] = []
    for index, stage in enumerate(recipe.stages):
        try:
            if not resolved and start is not None and stage.growth is None:
                resolved.append(_going_on(stage, *start))
                continue
            before = resolved[-1] if resolved else start[0] if start is not None else None
            resolved.append(ResolvedStage(index, _resolve_model(stage, before), before))
        except ValueError as error:
            raise ValueError(f"Stage {stage.name!r}: {error}") from error
    if len({s.stage.name for s in resolved}) < len(resolved):
        raise ValueError(f"Stage names must differ: {', '.join(s.stage.name for s in resolved)}.")
    return tuple(resolved)


def _going_on(stage: Stage, origin: ResolvedStage, step: int) -> ResolvedStage:
    """The first stage, where it goes on with a checkpoint's model."""
    _check_steps(stage)
    kept = {name: getattr(origin.cfg, name) for name in ("norm_width", "head_width")}
    model = stage.model.replace(**kept)
    same = model.replace(**{name: getattr(origin.cfg, name) for name in NUMERICS})
    if found := list(differences(as_dict(origin.cfg), as_dict(same))):
        raise ValueError(
            f"its model is not that of the checkpoint: {'; '.join(found)}. Take the same, or give the stage a Growth."
        )
    if step or origin.stage.growth is None:
        return ResolvedStage(0, dataclasses.replace(stage, model=model), origin, ready=True)
    # It has just grown, and what follows a growth, masks or a rate of their own, is still to come.
    described = dataclasses.replace(stage, model=model, growth=origin.stage.growth)
    resolved = ResolvedStage(0, described, origin.before, ready=True)
    _check_rising(resolved.ramp_steps, described)
    return resolved


def _check_rising(ramp: int, stage: Stage) -> None:
    if stage.growth is not None and stage.growth.rewarm_steps > stage.steps:
        raise ValueError(f"rewarm_steps={stage.growth.rewarm_steps} is more than its {stage.steps} steps.")
    if ramp > stage.steps:
        raise ValueError(
            f"its masks ramp over {ramp} steps, delays included, of its {stage.steps}: they must be gone at its end."
        )


def _resolve_model(stage: Stage, before: ResolvedStage | None) -> Stage:
    _check_steps(stage)
    if before is None:
        if stage.growth is not None:
            raise ValueError("the first stage is initialised, so its growth must be None.")
        return stage
    if stage.growth is None:
        raise ValueError(f"it follows {before.stage.name!r} and must say how it grows: give it a Growth.")
    model = grown_config(before.cfg, stage.model, stage.growth)
    _check_rising(ramp_steps(before.cfg, model, stage.growth), stage)
    return dataclasses.replace(stage, model=model)


def _check_steps(stage: Stage) -> None:
    if stage.steps < 1 or stage.batch_size < 1 or stage.accumulate < 1:
        raise ValueError(
            f"steps={stage.steps}, batch_size={stage.batch_size} and accumulate={stage.accumulate} must be positive."
        )
    if stage.batch_size % stage.accumulate:
        near = -(-stage.batch_size // stage.accumulate) * stage.accumulate
        raise ValueError(
            f"accumulate={stage.accumulate} must divide batch_size={stage.batch_size}: take a batch of {near}, say."
        )
    schedule(stage.optimizer, stage.steps)
