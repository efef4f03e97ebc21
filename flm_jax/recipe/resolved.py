"""The stages of a recipe in their places, checked, each with the model that it really trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flm_jax import costs
from flm_jax.checkpoint.find import stage_directory
from flm_jax.config import ModelConfig
from flm_jax.data.config import DataConfig
from flm_jax.distillation import ResolvedTeacher, resolve_teacher
from flm_jax.growth.lineage import Lineage
from flm_jax.growth.plan import NUMERICS, Growth
from flm_jax.growth.rescaling import check_continues
from flm_jax.growth.trained import Trained
from flm_jax.optimizer import OptimizerConfig, schedule
from flm_jax.recipe.settings import Recipe, Stage
from flm_jax.records import as_dict, counted, differences
from flm_jax.source_checkpoint import SourceCheckpoint, read_source
from flm_jax.tracking import ForkRecord, StageCost


@dataclass(frozen=True)
class ResolvedStage:
    """A stage in its place, with the model that it really trains.

    Attributes:
      index: place in the recipe.
      stage: as the recipe gives it.
      lineage: its model, grown, and the growths that led to it.
      since_growth: steps between the lineage's last growth and the stage's first step: 0 if it begins with the growth,
        more if it continues a model whose masks or rate of new entries still rise; None if nothing rises any more.
      continues: whether its first state is the last one of the stage before, or of the checkpoint that the recipe
        starts with, rather than initialised or grown from it.
      optimizer_before: the name of the optimizer whose state it begins with.
      trained_before: `Stage.train` of that stage or checkpoint, which decides about the moments in its state.
      teacher: that of its first steps, if any.
      fork: where the run has forked from, if it has: until there, steps cost what they cost in the other run.
    """

    index: int
    stage: Stage
    lineage: Lineage
    since_growth: int | None = 0
    continues: bool = False
    optimizer_before: str = "adamw"
    trained_before: str = "all"
    teacher: ResolvedTeacher | None = None
    fork: ForkRecord | None = None

    @property
    def cfg(self) -> ModelConfig:
        """The model's configuration."""
        return self.lineage.cfg

    @property
    def growth(self) -> Growth | None:
        """The growth that the stage begins with, or whose masks or rate of new entries still rise in it, if any."""
        return None if self.since_growth is None else self.lineage.growth

    @property
    def grows(self) -> bool:
        """Whether the stage itself applies that growth."""
        return self.growth is not None and not self.continues

    @property
    def name(self) -> str:
        """For reports and directories."""
        return self.stage.name

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.stage.steps

    @property
    def batch_size(self) -> int:
        """Windows per step, in all processes together."""
        return self.stage.batch_size

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer's configuration."""
        return self.stage.optimizer

    @property
    def accumulate(self) -> int:
        """Parts that a batch is split into."""
        return self.stage.accumulate

    @property
    def source_weights(self) -> Mapping[str, float] | None:
        """Of the sources of a mixture by name; None: the mixture's own."""
        return self.stage.source_weights

    @property
    def train(self) -> str:
        """What of the model trains."""
        return self.stage.train

    @property
    def trained(self) -> Trained:
        """The entries of the model that train."""
        return Trained(self.lineage, self.stage.train)

    @property
    def directory(self) -> str:
        """Name of the stage's checkpoint directory."""
        return stage_directory(self.index, self.name)

    @property
    def begins(self) -> int:
        """Its first step in the work directory: 0, or that of the fork if the run has forked in this stage."""
        return self.fork.step if self.fork is not None and self.fork.stage == self.name else 0

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """Checkpoints that are kept: its first and its last."""
        return (self.begins, self.steps)

    @property
    def ramp_steps(self) -> int:
        """Steps at the start of the stage that run with masks."""
        return 0 if self.since_growth is None else max(self.lineage.ramp_steps - self.since_growth, 0)

    @property
    def teacher_steps(self) -> int:
        """Steps at the start of the stage that have a teacher."""
        return 0 if self.teacher is None else self.teacher.steps

    def cost(self, context: int) -> StageCost:
        """What its steps cost, with windows of `context` tokens."""
        lesson = 0 if self.teacher is None else costs.forward_flops_per_token(self.teacher.cfg, context)
        own = costs.train_flops_per_token(self.cfg, context)
        cost = StageCost(self.batch_size * context, own, lesson, self.teacher_steps)
        return cost if self.fork is None else self.fork.cost(self.name, cost)


def begin(recipe: Recipe) -> tuple[SourceCheckpoint | None, tuple[ResolvedStage, ...]]:
    """The checkpoint that a recipe starts with, if any, and the recipe's resolved stages.

    Raises:
      ValueError: as `resolve`, or the first stage grows from a checkpoint whose masks still rise.
      CheckpointError: as `read_source`.
    """
    if not recipe.start:
        return None, resolve(recipe)
    source = read_source(recipe.start)
    if recipe.stages and recipe.stages[0].growth is not None:
        source.check_settled()
    return source, resolve(recipe, source)


def resolve(
    recipe: Recipe, source: SourceCheckpoint | None = None, teachers: Mapping[str, SourceCheckpoint] | None = None
) -> tuple[ResolvedStage, ...]:
    """Checks a recipe and gives every stage the model that its growth leads to.

    Args:
      recipe: what to compute.
      source: the checkpoint that it starts with, if any.
      teachers: checkpoints of teachers that have been read already, by the stage's name.

    Raises:
      ValueError: the message names the stage, the field, and what would be right.
      CheckpointError: as `read_source`, of a teacher.
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
            _check_steps(stage)
            _check_weights(stage, recipe.data)
            if stage.growth is not None:
                before = resolved[-1].lineage if resolved else None if source is None else source.lineage
                found = ResolvedStage(index, stage, _grown(stage, before))
            elif resolved:
                # By the end of a stage, its masks and the rate of its new entries have risen: see `_check_rising`.
                found = _continued(stage, index, resolved[-1].lineage, None, f"stage {resolved[-1].name!r}")
            elif source is not None:
                found = _continued(stage, index, source.lineage, _risen_in(source), "the checkpoint")
            else:
                found = ResolvedStage(index, stage, Lineage(stage.model))
            optimizer = resolved[-1].optimizer.name if resolved else _optimizer_of(source)
            trained = resolved[-1].train if resolved else "all" if source is None else source.meta.train
            found = dataclasses.replace(
                found, optimizer_before=optimizer or stage.optimizer.name, trained_before=trained
            )
            _check_optimizer(found)
            _check_rising(found)
            found.trained.check()
            if stage.teacher is not None:
                before = found.lineage.parent if stage.growth is not None else None
                grown_from = None if resolved or stage.teacher.checkpoint else source
                known = (teachers or {}).get(stage.name, grown_from)
                teacher = resolve_teacher(stage.teacher, found.cfg, stage.steps, before, known)
                found = dataclasses.replace(found, teacher=teacher)
        except ValueError as error:
            raise ValueError(f"Stage {stage.name!r}: {error}") from error
        resolved.append(found)
    if len({s.name for s in resolved}) < len(resolved):
        raise ValueError(f"Stage names must differ: {', '.join(s.name for s in resolved)}.")
    return tuple(resolved)


def check_vocabulary(stages: Sequence[ResolvedStage], size: int) -> None:
    """Checks that the embedding of every stage has a row for every token of a vocabulary of `size` ids.

    Raises:
      ValueError: one has not.
    """
    for s in stages:
        if size > s.cfg.vocab:
            raise ValueError(
                f"Stage {s.name!r}: the vocabulary has {size} tokens, the model's embedding only {s.cfg.vocab}; set "
                f"its vocab to {size} or more."
            )
        if s.teacher is not None:
            s.teacher.check_ids(size, s.name)


def _continued(stage: Stage, index: int, before: Lineage, since: int | None, name: str) -> ResolvedStage:
    """A stage that continues a model, with the stage's own numerics.

    Args:
      stage: as the recipe gives it.
      index: its place in the recipe.
      before: the model.
      since: steps since the model's last growth, if its masks or rate of new entries still rise; otherwise None.
      name: what to call the model's owner in errors.
    """
    kept = {field: getattr(before.cfg, field) for field in ("norm_width", "head_width")}
    model = stage.model.replace(**kept)
    same = model.replace(**{field: getattr(before.cfg, field) for field in NUMERICS})
    if found := list(differences(as_dict(before.cfg), as_dict(same))):
        raise ValueError(f"its model is not that of {name}: {'; '.join(found)}. Take the same, or give it a Growth.")
    return ResolvedStage(index, stage, dataclasses.replace(before, cfg=model), since_growth=since, continues=True)


def _risen_in(source: SourceCheckpoint) -> int | None:
    """Steps since a checkpoint's last growth, if its masks or rate of new entries still rise; otherwise None."""
    # Of a checkpoint that has just grown, everything rises from here, even over no steps.
    begins = source.step == 0 and source.lineage.growth is not None
    since = source.meta.since_growth
    return since + source.step if since is not None and (source.rising or begins) else None


def _grown(stage: Stage, before: Lineage | None) -> Lineage:
    assert stage.growth is not None
    if before is None:
        raise ValueError("the first stage is initialised, so its growth must be None.")
    return before.grown(stage.model, stage.growth)


def _optimizer_of(source: SourceCheckpoint | None) -> str | None:
    """The optimizer whose state a checkpoint has; None: it has none, or there is no checkpoint."""
    return source.meta.optimizer if source is not None and source.trained else None


def _check_optimizer(found: ResolvedStage) -> None:
    """Checks that a stage can begin with the optimizer state that it is given.

    Raises:
      ValueError: it is that of another optimizer, and is not replaced by a fresh one.
    """
    name, before, growth = found.optimizer.name, found.optimizer_before, found.stage.growth
    if name != before and (growth is None or growth.optimizer != "fresh"):
        raise ValueError(
            f"OptimizerConfig.name={name!r}, but the optimizer state that it begins with is {before}'s: keep {before}, "
            "or change the optimizer at a growth with Growth.optimizer='fresh', which begins without moments."
        )


def _check_rising(found: ResolvedStage) -> None:
    check_continues(found.lineage, found.optimizer.name)
    since = found.since_growth or 0
    if found.growth is not None and found.growth.rewarm_steps - since > found.steps:
        passed = f", {since} of them passed," if since else ""
        raise ValueError(
            f"rewarm_steps={found.growth.rewarm_steps}{passed} is more than its {counted(found.steps, 'step')}."
        )
    if found.ramp_steps > found.steps:
        raise ValueError(
            f"its masks ramp over {counted(found.ramp_steps, 'step')}, delays included, of its "
            f"{found.steps}: the ramp must "
            "end within the stage."
        )


def _check_weights(stage: Stage, data: DataConfig) -> None:
    if stage.source_weights is None:
        return
    if data.mixture is None:
        corpus = type(data.corpus).__name__
        raise ValueError(f"source_weights are those of a Mixture, and DataConfig.corpus is a {corpus}; leave them out.")
    try:
        data.mixture.weights(stage.source_weights)
    except ValueError as error:
        raise ValueError(f"source_weights: {error}") from None


def _check_steps(stage: Stage) -> None:
    if stage.batch_size % stage.accumulate:
        near = -(-stage.batch_size // stage.accumulate) * stage.accumulate
        raise ValueError(
            f"accumulate={stage.accumulate} must divide batch_size={stage.batch_size}: take a batch of {near}, say."
        )
    schedule(stage.optimizer, stage.steps)
