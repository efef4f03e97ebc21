"""Verify a grown checkpoint against the one it grew from: exit status 0 only if what its method promises holds.

  python experiments/verify.py --source=runs/demo/checkpoints/0_52b_small --target=runs/copied [--json=FILE]

Every bit of both is checked first; then both models are run, on the held-out text that a gin file names as
`verify.data`, or that the source was trained with if its work directory records it; otherwise on random tokens.
A method that does not promise preservation is measured and labelled.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import processes

flags.adopt_module_key_flags(processes)
_SOURCE = flags.DEFINE_string("source", None, "The checkpoint before the growth.", required=True)
_TARGET = flags.DEFINE_string("target", None, "The grown one, at step 0 of its stage.", required=True)
_JSON = flags.DEFINE_string("json", None, "Write what was found to this file.")
_GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "A gin file; may be given several times, later ones win.")
_GIN_BINDINGS = flags.DEFINE_multi_string("gin_bindings", [], "A gin binding, such as 'verify.tolerance = 1e-4'.")


def main(argv: list[str]) -> None:
    """Parses flags and gin, and calls one function."""
    if len(argv) > 1:
        app.usage(shorthelp=True, detailed_error=f"unexpected argument {argv[1]!r}", exitcode=2)

    # Imported here, so that --help answers at once.
    from experiments import launch

    launch.join(processes.given())
    launch.run_verify(_SOURCE.value, _TARGET.value, _JSON.value, _GIN_FILE.value, _GIN_BINDINGS.value)


if __name__ == "__main__":
    app.run(main)
