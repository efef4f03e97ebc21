"""Which checkpoint a path means: the step itself, or the newest step of a stage or of a work directory."""

from __future__ import annotations

import re
from pathlib import Path

from flm_jax.checkpoint.directory import Steps, structure_faults
from flm_jax.checkpoint.manifest import MANIFEST, CheckpointError, DamagedError, NoCheckpointError
from flm_jax.records import RECIPE, meant_beside
from flm_jax.records.foreign_json import check, field, read_json

STAGES = "checkpoints"
_STAGE = re.compile(r"(0|[1-9][0-9]*)_.+")


def stage_directory(index: int, name: str) -> str:
    """Name of the directory with the checkpoints of a stage."""
    return f"{index}_{name}"


def step_directory(path: str | Path) -> Path:
    """The directory of a step: the path itself, if it is one, or the newest step of a stage or of a work directory.

    As in a run that is resumed, entries that are no complete step are passed over, and named in the log. The stages
    of a work directory are those of its recipe, whatever else lies beside them.

    Raises:
      NoCheckpointError: there is none.
      DamagedError: there are steps, and none is complete.
      CheckpointError: it cannot be told which stage is meant.
    """
    path = Path(path).expanduser().absolute()
    if not path.is_dir():
        near = "" if path.exists() else _steps_beside(path) or meant_beside(path)
        raise NoCheckpointError(
            f"{path} is no directory; give a step, a stage's directory or a work directory{near or '.'}"
        )
    # Whatever has that name: if it is no file, `read_manifest` says so.
    if (path / MANIFEST).exists() or (path / MANIFEST).is_symlink():
        return path
    if (path / "arrays").is_dir():
        raise DamagedError(f"{path} looks like a step, but its {MANIFEST} is missing.")
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir())
    names = [path.parent.name, *(entry.name for entry in inside)]
    if STAGES not in names and not any(name[0].isdigit() for name in names[1:]):
        # Neither a work directory nor a stage: what lies in it is not passed over aloud, but searched for runs.
        runs = [str(entry) for entry in inside if (entry / STAGES).is_dir()]
        raise _no_checkpoint(path, f"; in it are the work directories {', '.join(runs[:3])}." if runs else ".")
    damaged: list[Path] = []
    for folder in reversed(_stages(path) if (path / STAGES).is_dir() else [path]):
        good, bad = Steps(folder).scan()
        if good:
            return folder / str(good[-1])
        damaged += [folder / str(step) for step in bad]
    if damaged:
        found = [structure_faults(step)[0] for step in damaged[:3]] + ["..."] * (len(damaged) > 3)
        raise DamagedError(f"{path}: no step is complete: {'; '.join(found)}.")
    raise _no_checkpoint(path, ".")


def _no_checkpoint(path: Path, end: str) -> NoCheckpointError:
    return NoCheckpointError(
        f"{path} holds no checkpoint: give a step, such as .../{STAGES}/0_first/800, a stage's directory, or a work "
        f"directory{end}"
    )


def _steps_beside(path: Path) -> str:
    """The end of a sentence about a step that is not there: the complete ones of its stage; empty if it is no step."""
    if not (path.name.isdecimal() and path.parent.parent.name == STAGES and path.parent.is_dir()):
        return ""
    steps = Steps(path.parent).scan()[0]
    return f"; {path.parent} has the step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}." if steps else ""


def every_stage(workdir: Path) -> list[Path]:
    """The directories of stages in a work directory, in order, also those that its recipe does not name."""
    found = [entry for entry in (workdir / STAGES).iterdir() if entry.is_dir() and _STAGE.fullmatch(entry.name)]
    return sorted(found, key=lambda entry: (int(entry.name.partition("_")[0]), entry.name))


def _stages(workdir: Path) -> list[Path]:
    """The directories of a work directory's stages, in order."""
    record, inside = workdir / RECIPE, workdir / STAGES
    if record.is_file():
        try:
            stages = field(read_json(record, finite=False), "stages", list, "it")
            names = [field(check(stage, dict, "a stage"), "name", str, "a stage") for stage in stages]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{record} is damaged ({error}): give a step or a stage's directory.") from error
        names = [stage_directory(i, name) for i, name in enumerate(names) if name.isprintable() and "/" not in name]
        return [inside / name for name in names if (inside / name).is_dir()]
    # A growth or an import writes one stage and no recipe.
    found = sorted(entry for entry in inside.iterdir() if entry.is_dir() and _STAGE.fullmatch(entry.name))
    holding = [entry for entry in found if any(Steps(entry).scan())]
    if len(holding) > 1:
        raise CheckpointError(
            f"{workdir} has no {RECIPE} that says which of its stages is the last: give one of "
            f"{', '.join(map(str, holding))}."
        )
    return holding or found
