"""What differs between a run and the recipe that goes on from it: what is refused, and what there is to say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flm_jax.forking.old import OldRun
from flm_jax.growth.plan import NUMERICS
from flm_jax.optimizer import OptimizerConfig, schedule
from flm_jax.recipe import Recipe, ResolvedStage
from flm_jax.records import as_dict, counted, from_dict
from flm_jax.records.json import compared
from flm_jax.source_checkpoint import SourceCheckpoint
from flm_jax.tracking import Change, shown

# Of what identifies the data, what a recipe does not say by itself.
_IDENTITY = ("digest", "teachers")
_OVER = (
    "what was over there stays as it was; in gin, a scope such as second/OptimizerConfig.learning_rate changes one "
    "stage alone"
)
_ADVICE = {
    "over": _OVER,
    "model": "a model changes by a growth, at the beginning of a further stage",
    "growth": "a growth is applied at the beginning of its stage: fork from the last checkpoint of the stage before",
    "train": "what trains changes with a further stage",
    "optimizer": "another optimizer begins in a further stage whose growth has Growth.optimizer='fresh'",
}


class Difference(NamedTuple):
    """A setting that differs: the parts of its path, and both values, None where there is no such setting."""

    path: tuple[str, ...]
    old: Any
    new: Any

    def change(self) -> Change:
        """As it is recorded."""
        return Change(".".join(self.path), self.old, self.new)


def differences(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[Difference]:
    """Yields where two records differ; entries of a list that have a name are compared by it."""
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("class") == new.get("class"):
        for key in dict.fromkeys((*new, *old)):
            yield from differences(old.get(key), new.get(key), (*path, str(key)))
    elif _named(old) and _named(new):
        yield from differences({e["name"]: e for e in old}, {e["name"]: e for e in new}, path)
    elif old != new:
        yield Difference(path, old, new)


def _named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(e, Mapping) and "name" in e for e in value)


def recipe_differences(old: OldRun, recipe: Recipe) -> list[Difference]:
    """The settings of a recipe that differ from those of a run, without those that change no number."""
    return list(differences(compared(old.recipe), compared(as_dict(recipe))))


def data_differences(old: OldRun, identity: Mapping[str, Any]) -> list[Difference]:
    """What differs of the contents of the data and of the teachers."""
    return [
        difference
        for name in _IDENTITY
        for difference in differences(old.data.get(name), identity.get(name), ("data", name))
        if "model" not in difference.path  # a teacher's, which follows from its digest
    ]


def check_allowed(
    old: OldRun,
    stages: Sequence[ResolvedStage],
    source: SourceCheckpoint | None,
    found: Sequence[Difference],
) -> None:
    """Checks that a recipe can go on from a run's checkpoint.

    Raises:
      ValueError: it cannot; the message names each field with what was found there and in the recipe.
    """
    where, index, step = old.source.directory, old.index, old.step
    theirs, ours = ([stage["name"] for stage in old.stages[: index + 1]], [s.name for s in stages[: index + 1]])
    if theirs != ours:
        raise ValueError(
            f"This recipe cannot go on from {where}: the stages up to there are {', '.join(theirs)}, and here "
            f"{', '.join(ours)}. Begin the recipe with the same stages, and add others after them."
        )
    begun, starts = old.data.get("start"), None if source is None else source.digest
    if begun != starts:
        raise ValueError(
            f"This recipe cannot go on from {where}: Recipe.start was {_start(begun)} there, and is {_start(starts)} "
            "here. Give it as it was: it says what the first stage began with."
        )
    refused = [(why, one) for one in found if (why := _refusal(one, theirs))]
    if refused:
        shortly = [f"{'.'.join(d.path)} is {shown(d.old)} there and {shown(d.new)} here" for _, d in refused[:4]]
        more = f" (and {len(refused) - 4} more)" if len(refused) > 4 else ""
        advice = "; ".join(dict.fromkeys(_ADVICE[why] for why, _ in refused))
        raise ValueError(f"This recipe cannot go on from {where}: {'; '.join(shortly)}{more}. Note: {advice}.")
    stage = stages[index]
    if stage.steps < step:
        raise ValueError(
            f"This recipe cannot go on from {where}: it is at step {step}, and stages.{stage.name}.steps is "
            f"{stage.steps} here (there {old.stage['steps']}). Raise it, or fork from an earlier checkpoint: "
            f"{_listed(old, stage.steps)}."
        )
    if stage.steps == step and len(stages) == index + 1:
        raise ValueError(
            f"{where} is the end of this recipe: raise stages.{stage.name}.steps = {step}, add a stage, or fork from "
            f"an earlier checkpoint: {_listed(old, step - 1)}."
        )


def _start(digest: Any) -> str:
    return "none" if digest is None else f"a checkpoint of digest {str(digest)[:12]}"


def _refusal(one: Difference, stages: Sequence[str]) -> str | None:
    """Why a setting must be as it was, as a key of `_ADVICE`; None: it may change."""
    if one.path[0] != "stages" or len(one.path) < 2 or one.path[1] not in stages:
        return None
    if one.path[1] != stages[-1]:
        return "over"
    rest = one.path[2:]
    if not rest or (rest[0] == "model" and rest[-1] not in NUMERICS):
        return "model"
    if rest[0] in ("growth", "train"):
        return rest[0]
    return "optimizer" if rest == ("optimizer", "name") else None


def _listed(old: OldRun, last: int) -> str:
    """The checkpoints of the stage up to a step, as text."""
    steps = [str(step) for step in old.steps() if step <= last]
    return ", ".join(steps) if steps else "there is none"


def rate_notes(old: OldRun, stage: ResolvedStage) -> list[str]:
    """Sentences about the learning rate, where it is not the one that the old run would have gone on with."""
    config, steps, step = from_dict(old.stage["optimizer"]), int(old.stage["steps"]), old.step
    if not isinstance(config, OptimizerConfig):
        raise ValueError(f"{old.workdir}: its stage {stage.name!r} has no optimizer of flm_jax.")
    if stage.steps == step:
        return []
    # After its last step the old run has no rate: that of the last step is told.
    before, after = (
        float(schedule(config, steps)(min(step, steps - 1))),
        float(schedule(stage.optimizer, stage.steps)(step)),
    )
    if before == after:
        return []
    found = [f"The learning rate of stage {stage.name!r} goes from {before:.4g} to {after:.4g} at step {step}."]
    began = steps - config.decay_steps
    if config.schedule == "wsd" and config.decay_steps and step > began and after > before:
        found.append(
            f"Its decay began at step {began} there, so that the last {counted(step - began, 'step')} of this "
            f"checkpoint had falling rates; a fork from a checkpoint up to step {began} keeps the stable rate: "
            f"{_listed(old, began)}."
        )
    return found
