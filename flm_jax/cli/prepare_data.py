"""Prepare the data of a recipe before it is trained: tokenise, leave out duplicates, and write token stores.

  python experiments/prepare_data.py --gin_file=gin_configs/recipes/demo.gin

All cores of this machine work, or --workers of them; what is written does not depend on their number, and train.py
with the same gin files opens it. If the command is killed, the same command goes on. Beyond one machine the work is an
Apache Beam pipeline, by --runner and --beam_option: see docs/prepare.md.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from flm_jax.cli.flags import define_gin, define_json, launch, refuse

LOCAL = "local"
RUNNERS = (LOCAL, "DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")


def define() -> None:
    """Defines the flags."""
    define_gin("DataConfig.dedup = @Dedup()")
    define_json()
    flags.DEFINE_string(
        "runner", LOCAL, f"What does the work: processes of this machine (local), or Beam: {', '.join(RUNNERS[1:])}."
    )
    flags.DEFINE_integer(
        "workers",
        0,
        "Processes on this machine, and of Beam's DirectRunner; 0: one per core. Other runners have options for it.",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "part_bytes", 1 << 24, "How much text, about, a process takes at a time, in bytes.", lower_bound=1
    )
    flags.DEFINE_multi_string(
        "beam_option", [], "An option of Beam's pipeline, key=value without dashes, such as region=europe-west4"
    )


def run(values: Any) -> None:
    """Prepares the data that the flags describe."""
    if not values.gin_file and not values.gin_bindings:
        refuse("give a recipe with --gin_file")
    if values.runner not in RUNNERS:
        from flm_jax.records import meant

        refuse(f"--runner={values.runner}: it is one of {', '.join(RUNNERS)}{meant(values.runner, RUNNERS)}")
    if values.beam_option and values.runner == LOCAL:
        refuse("--beam_option is for a runner of Beam; give --runner too")
    if wrong := [option for option in values.beam_option if option.startswith("-") or not option.split("=")[0]]:
        refuse(f"--beam_option={wrong[0]}: write key=value, without dashes")
    from flm_jax.cli import preparing  # Imported here, so that --help is fast.

    how = preparing.How(values.runner, values.workers, values.part_bytes, tuple(values.beam_option))
    preparing.run_prepare(values.gin_file, values.gin_bindings, how, values.json)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run)


if __name__ == "__main__":
    main()
