"""What `prepare_data` calls: parses gin, prepares the data of the recipe, prints the counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flm_jax.cli import configure
from flm_jax.cli.configure import configured, parse
from flm_jax.cli.errors import started
from flm_jax.cli.runs import check_json_file
from flm_jax.data.beam import Beam, load_beam
from flm_jax.data.preparation import prepare_data, report, sentence
from flm_jax.data.workers import Runner, Workers
from flm_jax.files import write_json

LOCAL = "local"


class How(NamedTuple):
    """What does the work.

    Attributes:
      runner: local, or the name of a runner of Beam.
      workers: number of processes; 0: one per core.
      part_bytes: the size of a part.
      options: of Beam, key=value.
    """

    runner: str
    workers: int
    part_bytes: int
    options: tuple[str, ...]


def run_prepare(gin_files: Sequence[str], gin_bindings: Sequence[str], how: How, json_file: str | None) -> None:
    """Prepares the data of a recipe, and prints what each source holds and what was left out of it."""
    with started():
        check_json_file(json_file)
        parse(gin_files, gin_bindings)
        recipe, _ = configured(configure.train)
        configure.check_used()
        here, records = Workers(how.workers, how.part_bytes, setting="--workers"), []
        runner: Runner = here
        if how.runner != LOCAL:
            load_beam()  # before anything is read
            options = tuple(f"--{option}" for option in how.options)
            runner = Beam(how.runner, here.count, options, here)
        with here:
            for name, found in prepare_data(recipe.data, runner):
                records.append(report(name, found))
                print(sentence(records[-1]), flush=True)
        if json_file:
            write_json(Path(json_file), {"runner": how.runner, "workers": here.count, "sources": records})
