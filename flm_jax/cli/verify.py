"""Verify a grown checkpoint against its source: exit status 0 only if all promises of its growth method hold.

  python experiments/verify.py --source=runs/demo/checkpoints/0_52b_small --target=runs/copied [--json=FILE]

The checksums of both are verified first. Then both models are run on held-out text: that of `verify.data` in gin, or
that of the token store of the source's run if it is still there; otherwise on random tokens. What was read is said. A
method that does not promise preservation is measured and labelled.
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
    flags.DEFINE_string("target", None, "The grown checkpoint, at step 0 of its stage.", required=True)


def run(values: Any) -> None:
    """Verifies the checkpoint that the flags describe."""
    from flm_jax.cli import runs  # Imported here, so that --help is fast.

    runs.join(process_flags(values))
    runs.run_verify(values.source, values.target, values.json, values.gin_file, values.gin_bindings)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run)


if __name__ == "__main__":
    main()
