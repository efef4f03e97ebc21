"""Verify a grown checkpoint against its source: exit status 0 only if all promises of its growth method hold.

  python experiments/verify.py --source=runs/demo/checkpoints/0_52b_small --target=runs/copied [--json=FILE]
  python experiments/verify.py --checkpoint=runs/demo [--json=FILE]
  python experiments/verify.py --store=cache/textfolder-0123456789abcdef [--json=FILE]

The checksums of both are verified first. Then both models are run on held-out text: that of `verify.data` in gin, or
that of the token store of the source's run if it is still there; otherwise on random tokens. What was read is said. A
method that does not promise preservation is measured and labelled.

The second command checks every byte of one checkpoint against its checksums, without running a model; the third, every
byte of a token store.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from flm_jax.cli.flags import define_gin, define_json, define_processes, launch, process_flags, refuse


def define() -> None:
    """Defines the flags."""
    define_processes()
    define_gin("verify.tolerance = 1e-4")
    define_json()
    flags.DEFINE_string("source", None, "The checkpoint before the growth.")
    flags.DEFINE_string("target", None, "The grown checkpoint, at step 0 of its stage.")
    flags.DEFINE_string(
        "checkpoint", None, "Alone: check every byte of this step, or of the newest one in a directory."
    )
    flags.DEFINE_string("store", None, "Alone: check every byte of the token store in this folder.")


def run(values: Any) -> None:
    """Verifies the checkpoint or the token store that the flags describe."""
    pair = values.source is not None, values.target is not None
    alone = [name for name in ("checkpoint", "store") if getattr(values, name) is not None]
    if alone and (len(alone) == 2 or any(pair) or values.gin_file or values.gin_bindings):
        refuse(f"--{alone[0]} stands alone, or with --json")
    if not alone and not all(pair):
        refuse("give --source and --target, or --checkpoint, or --store")
    from flm_jax.cli import runs  # Imported here, so that --help is fast.

    runs.join(process_flags(values))
    if values.checkpoint is not None:
        runs.run_verify_checkpoint(values.checkpoint, values.json)
        return
    if values.store is not None:
        runs.run_verify_store(values.store, values.json)
        return
    runs.run_verify(values.source, values.target, values.json, values.gin_file, values.gin_bindings)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run)


if __name__ == "__main__":
    main()
