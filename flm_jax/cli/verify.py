"""Verify a grown checkpoint against the one it grew from: exit status 0 only if what its method promises holds.

  python experiments/verify.py --source=runs/demo/checkpoints/0_52b_small --target=runs/copied [--json=FILE]

Every bit of both is checked first; then both models are run, on the held-out text that a gin file names as
`verify.data`, or that the source was trained with if its work directory records it; otherwise on random tokens.
A method that does not promise preservation is measured and labelled.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from flm_jax.cli.flags import define_gin, define_json, define_processes, launch, process_flags


def define() -> None:
    """Defines the flags."""
    define_processes()
    define_gin("verify.tolerance = 1e-4")
    define_json()
    flags.DEFINE_string("source", None, "The checkpoint before the growth.", required=True)
    flags.DEFINE_string("target", None, "The grown one, at step 0 of its stage.", required=True)


def run(values: Any) -> None:
    """Verifies what the flags say."""
    from flm_jax.cli import runs  # Imported here, so that --help answers at once.

    runs.join(process_flags(values))
    runs.run_verify(values.source, values.target, values.json, values.gin_file, values.gin_bindings)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run)


if __name__ == "__main__":
    main()
