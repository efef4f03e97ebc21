"""The subcommands of `flm-checkpoint`: calls the library, prints the results, sets the exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flm_jax.checkpoint import CheckpointError, read_manifest, verify
from flm_jax.checkpoint.find import step_directory
from flm_jax.checkpoint.manifest import ARRAYS, MANIFEST
from flm_jax.checkpoint.verify import array_bytes
from flm_jax.checkpoint_care import copy_checkpoint, describe, difference, list_checkpoints, prune, text
from flm_jax.checkpoint_care.copying import bytes_to_copy
from flm_jax.checkpoint_care.differences import bytes_to_read
from flm_jax.checkpoint_care.listing import COMPLETE, DAMAGED
from flm_jax.cli.errors import started
from flm_jax.cli.runs import check_json_file, chosen
from flm_jax.files import write_json
from flm_jax.progress import byte_bar
from flm_jax.records import counted


def run_list(path: str, json_file: str | None) -> None:
    """Prints the checkpoints of a work directory or a stage."""
    with started():
        _check(json_file, path)
        found = list_checkpoints(path)
        print(text.listing_text(found))
        _write(json_file, found.record())


def run_show(path: str, json_file: str | None) -> None:
    """Prints what a checkpoint is."""
    with started():
        _check(json_file, path)
        found = describe(chosen(path))
        print(text.description_text(found))
        _write(json_file, found.record())


def run_verify(paths: Sequence[str], json_file: str | None) -> None:
    """Checks every bit of checkpoints; exits with status 1 if one is damaged, or not there in full."""
    with started():
        _check(json_file, *paths)
        steps = [step for path in paths for step in _steps_of(path)]
        reports = []
        with byte_bar(sum(_bytes(step) for step in steps), 0, "verifying") as bar:
            for step in steps:
                reports.append(verify(step, bar.update))
                with bar.external_write_mode(file=sys.stdout):
                    print(reports[-1], flush=True)
        damaged = sum(not report.ok for report in reports)
        if len(reports) > 1:
            count = counted(len(reports), "checkpoint")
            print(f"{count} verified, {damaged} damaged." if damaged else f"{count} verified, none damaged.")
        _write(json_file, [report.record() for report in reports])
    if damaged:
        sys.exit(1)


def run_diff(a: str, b: str, json_file: str | None) -> None:
    """Prints what differs between two checkpoints."""
    with started():
        _check(json_file, a, b)
        first, second = chosen(a), chosen(b)
        total = bytes_to_read(Path(first), Path(second))
        with byte_bar(total, 0, "comparing") as bar:
            found = difference(first, second, bar.update)
        print(text.difference_text(found))
        _write(json_file, found.record())


def run_prune(workdir: str, every: int | None, best: int | None, delete: bool, json_file: str | None) -> None:
    """Deletes checkpoints, or says which ones it would delete."""
    with started():
        _check(json_file, workdir)
        found = prune(
            workdir,
            every,
            best,
            delete=delete,
            before=lambda planned: print(text.pruning_text(planned, delete), flush=True),
        )
        if delete:
            print("Deleted.")
        _write(json_file, {**found.record(), "dry_run": not delete})


def run_copy(source: str, target: str, json_file: str | None) -> None:
    """Copies a checkpoint."""
    with started():
        _check(json_file, source, target)
        step = chosen(source)
        with byte_bar(bytes_to_copy(Path(step)), 0, "copying") as bar:
            found = copy_checkpoint(step, target, bar.update)
        print(f"Copied {found.source}:\n{found.report}")
        _write(json_file, {"source": str(found.source), **found.report.record()})


def _check(json_file: str | None, *paths: str) -> None:
    """Refuses a --json that cannot be written, and paths that are no files of this machine.

    Raises:
      ValueError: one is refused.
    """
    check_json_file(json_file)
    for path in paths:
        if "://" in path:
            raise ValueError(
                f"{path} lies in an object store, and checkpoints are read and written on file systems alone: fetch or "
                "send a step's directory with `gcloud storage cp -r` or `aws s3 cp --recursive`, then `verify` what "
                "has arrived."
            )


def _write(json_file: str | None, found: Any) -> None:
    if json_file is not None:
        write_json(Path(json_file), found)


def _steps_of(path: str) -> list[Path]:
    """The steps that a path means: itself, or all of a stage or of a work directory, also incomplete ones.

    Raises:
      CheckpointError: there is none.
    """
    where = Path(path).expanduser().absolute()
    if not where.is_dir() or (where / MANIFEST).exists() or (where / ARRAYS).is_dir():
        return [step_directory(where)]
    return [entry.directory for entry in list_checkpoints(where).entries if entry.state in (COMPLETE, DAMAGED)]


def _bytes(step: Path) -> int:
    """How many bytes of arrays are read of a step; 0 if its manifest does not say."""
    try:
        return array_bytes(read_manifest(step))
    except CheckpointError:
        return 0
