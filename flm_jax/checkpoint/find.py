"""Finds the step that a path means: a step itself, or the newest of a stage or a work directory."""

from __future__ import annotations

from pathlib import Path

from flm_jax.checkpoint.manifest import MANIFEST, NoCheckpointError


def step_directory(path: str | Path) -> Path:
    """The directory of a checkpoint's step: of this one, or the newest of a stage or of a work directory.

    Raises:
      NoCheckpointError: there is none.
    """
    path = Path(path).expanduser().absolute()
    if not path.is_dir():
        raise NoCheckpointError(f"{path} is no directory; give a step, a stage's directory or a work directory.")

    def steps(folder: Path) -> list[Path]:
        return sorted((p for p in folder.glob("[0-9]*") if p.name.isdigit()), key=lambda p: int(p.name))

    if (path / MANIFEST).is_file():
        return path
    stages = sorted((path / "checkpoints").glob("[0-9]*_*"), key=lambda p: int(p.name.split("_")[0])) or [path]
    for folder in reversed(stages):
        if found := steps(folder):
            return found[-1]
    raise NoCheckpointError(
        f"{path} holds no checkpoint: give a step, such as .../checkpoints/0_first/800, a stage's directory, or a work "
        "directory."
    )
