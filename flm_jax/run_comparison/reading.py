"""Reading a work directory: the recipe, and the losses from metrics.jsonl, report.json or the newest checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flm_jax import costs
from flm_jax.checkpoint import CheckpointError, read_manifest
from flm_jax.checkpoint.find import step_directory
from flm_jax.checkpoint.manifest import read_meta
from flm_jax.config import ModelConfig
from flm_jax.growth import Growth
from flm_jax.records import DATA, RECIPE, completed, counted, flattened, from_dict
from flm_jax.records.foreign_json import check, field, read_json
from flm_jax.run_comparison.curves import Point, RunCurves, StageCurve
from flm_jax.tracking import METRICS, ForkRecord, StageCost, Totals, read_fork, read_log

_EVAL = {"stage": str, "step": int, "loss": float, "bits_per_byte": float}


def stage_costs(workdir: Path, count: int) -> dict[str, StageCost]:
    """What the steps of the first `count` stages of a run cost, by the stages' names.

    Raises:
      ValueError, OSError: as `read_run_curves`, of the recipe and the data.
    """
    recipe = completed(read_json(workdir / RECIPE, finite=False))
    return {stage.name: stage.cost for stage in _planned(workdir, recipe, _data(workdir))[:count]}


def _data(workdir: Path) -> Mapping[str, Any]:
    data: Mapping[str, Any] = completed(read_json(workdir / DATA, finite=False)) if (workdir / DATA).is_file() else {}
    return data


def _planned(workdir: Path, recipe: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[StageCurve, ...]:
    """The stages of a run, as its records say."""
    about = str(workdir / RECIPE)
    context = field(field(recipe, "data", dict, about), "context", int, f"{about}: data")
    teachers = field(data, "teachers", dict, str(workdir / DATA)) if "teachers" in data else {}
    return tuple(_stages(recipe, teachers, context, about, read_fork(workdir)))


def read_run_curves(workdir: str | Path, name: str = "") -> RunCurves:
    """What a work directory says about its run, also while it trains.

    Args:
      workdir: the work directory.
      name: what to call the run; empty: as its directory.

    Raises:
      ValueError: it is no work directory, has no losses, or a file in it is not what it should be.
      OSError: a file cannot be read.
    """
    where = Path(workdir).expanduser()
    if not where.is_dir():
        raise ValueError(f"{workdir} is no directory; give the work directory of a run.")
    if not (where / RECIPE).is_file():
        raise ValueError(f"{workdir} holds no {RECIPE}, so it is no work directory of train.py; give one that is.")
    recipe = completed(read_json(where / RECIPE, finite=False))
    data, fork = _data(where), read_fork(where)
    stages, teachers = _planned(where, recipe, data), data.get("teachers", {})
    name, device = name or where.absolute().name, None
    notes: list[str] = []
    if (where / METRICS).is_file():
        heldout, train, device, notes = _from_log(where / METRICS, stages)
    else:
        source, evals = _recorded(where)
        heldout, train = _from_evals(source, evals, stages), ()
        notes.append(f"It has no {METRICS}: held-out losses are those of {source}, without wall clock.")
    if not heldout and not train:
        raise ValueError(f"{workdir} holds no losses yet: compare it once it has measured some.")
    if fork is not None:
        notes.append(
            f"{fork.sentence()} Its curve begins there; tokens and FLOPs count from the start of that run, wall clock "
            "from the fork."
        )
    if "start" in data:
        notes.append("It began with a checkpoint of another run: what that one cost is not counted.")
    notes += [
        f"Stage {stage.name} has a teacher for {counted(stage.cost.teacher_steps, 'step')}: its forward passes count."
        for stage in stages
        if stage.cost.teacher_steps
    ]
    measured_on = {key: data.get(key) for key in ("digest", "vocabulary", "context")}
    measured_on["eval_windows"] = recipe.get("eval_windows")
    about_data = {key: data[key] for key in sorted(data) if key not in recipe["data"] and key != "teachers"}
    settings = {**flattened(recipe), **{f"data.{key}": value for key, value in about_data.items()}}
    settings |= {
        f"data.teachers.{stage}": check(record, dict, f"the teacher of {stage}").get("digest")
        for stage, record in teachers.items()
    }
    return RunCurves(name, where, stages, heldout, train, settings, measured_on, device, tuple(notes))


def names_of(workdirs: Sequence[str]) -> list[str]:
    """What to call runs: by their directories, with as many of the folders above as it takes to tell them apart."""
    places = [Path(workdir).expanduser().resolve() for workdir in workdirs]  # one may be named by a link, too
    if twice := next((name for n, name in enumerate(workdirs) if places.index(places[n]) < n), None):
        raise ValueError(f"{twice} is named twice; name each run once.")
    parts = [Path(workdir).expanduser().absolute().parts for workdir in workdirs]
    longest = max(map(len, parts))
    names: list[str] = []
    for count in range(1, longest + 1):
        names = ["/".join(part[-count:]).replace("//", "/") for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _stages(
    recipe: Mapping[str, Any], teachers: Mapping[str, Any], context: int, about: str, fork: ForkRecord | None
) -> Iterable[StageCurve]:
    before = Totals(0, 0, 0)
    for number, entry in enumerate(field(recipe, "stages", list, about)):
        where = f"{about}: stage {number}"
        stage = check(entry, dict, where)
        name, steps, batch = (
            field(stage, key, kind, where) for key, kind in (("name", str), ("steps", int), ("batch_size", int))
        )
        model, growth = from_dict(field(stage, "model", dict, where)), from_dict(stage.get("growth"))
        if not isinstance(model, ModelConfig) or not (growth is None or isinstance(growth, Growth)):
            raise ValueError(f"{where} has no model or growth of flm_jax.")
        # Counted here, so that logs of different versions are counted alike.
        cost = StageCost(batch * context, costs.train_flops_per_token(model, context))
        if name in teachers:
            teacher = from_dict(field(check(teachers[name], dict, where), "model", dict, where))
            if not isinstance(teacher, ModelConfig):
                raise ValueError(f"{where} has a teacher that is no model of flm_jax.")
            taught = check(field(stage, "teacher", dict, where).get("steps"), (int, type(None)), where)
            forward = costs.forward_flops_per_token(teacher, context)
            cost = cost._replace(teacher_flops_per_token=forward, teacher_steps=steps if taught is None else taught)
        cost = cost if fork is None else fork.cost(name, cost)
        grown = None if growth is None else growth.name
        yield StageCurve(name, model, costs.param_count(model), steps, cost, before, grown)
        before = before.plus(steps, cost)


def _from_log(
    path: Path, stages: Sequence[StageCurve]
) -> tuple[tuple[Point, ...], tuple[Point, ...], str | None, list[str]]:
    """Held-out and training losses, the device, and notes."""
    heldout: list[Point] = []
    train: list[Point] = []
    seconds, before, device, starts = 0.0, None, None, 0
    for number, line in enumerate(read_log(path), 1):
        where = f"{path}, line {number},"
        if line["kind"] == "start":
            starts += 1
            if "devices" in line and "device" in line:
                device = f"{line['devices']} x {line['device']}"
        elif before is not None:  # what lies before a start is a pause, or steps that were lost
            seconds += max(line["time"] - before, 0.0)
        before = line["time"]
        if line["kind"] in ("train", "heldout") and line.get("loss") is not None:
            loss = field(line, "loss", float, where)
            bits = line.get("bits_per_byte") if line["kind"] == "heldout" else None
            point = _point(stages, line["stage"], line["stage_step"], seconds, loss, bits, where)
            (heldout if line["kind"] == "heldout" else train).append(point)
    notes = [] if starts else ["Its log does not say where it was stopped: pauses count in its wall clock."]
    return tuple(heldout), tuple(train), device, notes


def _point(
    stages: Sequence[StageCurve], name: str, step: int, seconds: float | None, loss: float, bits: Any, where: str
) -> Point:
    stage = next((stage for stage in stages if stage.name == name), None)
    if stage is None:
        raise ValueError(f"{where} names the stage {name!r}, and the recipe has {', '.join(s.name for s in stages)}.")
    return Point(name, step, *stage.totals(step), seconds, loss, bits)


def _recorded(workdir: Path) -> tuple[str, list[Any]]:
    """Held-out losses of a run without a log: where they were found, and their records."""
    report = workdir / "report.json"
    if report.is_file():
        return report.name, field(read_json(report, finite=False), "evals", list, str(report))
    try:
        step = step_directory(workdir)
        history = field(read_meta(step, read_manifest(step)), "history", dict, f"{step}/meta.json")
    except CheckpointError as error:
        raise ValueError(f"{workdir} has neither {METRICS} nor report.json, and no checkpoint: {error}") from error
    return f"checkpoint {step.parent.name}/{step.name}", field(history, "evals", list, f"{step}/meta.json: history")


def _from_evals(source: str, evals: Sequence[Any], stages: Sequence[StageCurve]) -> tuple[Point, ...]:
    found = []
    for number, entry in enumerate(evals):
        where = f"{source}, measurement {number}"
        stage, step, loss, bits = (field(check(entry, dict, where), key, kind, where) for key, kind in _EVAL.items())
        if math.isfinite(loss):
            found.append(_point(stages, stage, step, None, loss, bits, where))
    return tuple(found)
