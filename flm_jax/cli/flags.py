"""Flags that programs share, and how a program starts. Imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

FLAGS = flags.FLAGS


def launch(document: str, define: Callable[[], None], run: Callable[[Any], None]) -> None:
    """Starts a program, whether as a script or as an installed command.

    Args:
      document: what --help shows.
      define: defines the program's flags.
      run: the program, given the values of all flags.
    """
    sys.modules["__main__"].__doc__ = document  # where absl looks for it
    known = set(FLAGS)
    define()
    for name in set(FLAGS) - known:
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])  # or --help would leave it out

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            refuse(f"unexpected argument {argv[1]!r}")
        run(FLAGS)

    app.run(main)


def refuse(what: str) -> None:
    """Exits with status 2, after one line about the flags and the short help."""
    app.usage(shorthelp=True, detailed_error=what, exitcode=2)


def define_gin(example: str) -> None:
    """Defines --gin_file and --gin_bindings."""
    flags.DEFINE_multi_string("gin_file", [], "A gin file; may be given several times, later ones win.")
    flags.DEFINE_multi_string("gin_bindings", [], f"A gin binding, such as {example!r}; the last wins.")


def define_json() -> None:
    """Defines --json."""
    flags.DEFINE_string("json", None, "Write what was found to this file.")


def define_processes() -> None:
    """Defines the flags with which several processes find each other."""
    flags.DEFINE_string("coordinator", None, "Several processes: host:port of process 0.")
    flags.DEFINE_integer("processes", None, "Several processes: how many.")
    flags.DEFINE_integer("process", None, "Several processes: which this is, from 0.")
    flags.DEFINE_bool(
        "distributed",
        False,
        "Several processes that JAX finds itself: on a TPU pod, or under SLURM, Open MPI, Kubernetes.",
    )


def process_flags(values: Any) -> dict[str, Any]:
    """What the flags of `define_processes` say, as arguments of `flm_jax.distributed.join`."""
    return {name: values[name].value for name in ("coordinator", "processes", "process", "distributed")}
