"""The flags that programs share, and their start. It imports only light modules, so that --help is fast."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from absl import app, flags

from flm_jax.cli import huge_pages

FLAGS = flags.FLAGS
# Exit statuses besides 0 (done), 1 (it failed, or what was asked does not hold) and 2 (wrong flags): EX_TEMPFAIL of
# sysexits.h for a run that saved its state and goes on when it is started again, and a shell's for SIGINT; for SIGTERM
# it is 143.
STOPPED, INTERRUPTED = 75, 130
# Flags that name what is written, or what a run begins with. An empty path would be the current directory, or no fork.
NAMED = ("workdir", "output", "json", "plot", "to_hf", "results", "write", "fork")
_PROCESS_FLAGS = ("coordinator", "processes", "process", "distributed", "join_timeout", "heartbeat_timeout")
_starting = True
_interrupted: int | None = None  # the number of the signal
_stderr = 2  # as it was when the program started: it is held back while TensorFlow is imported


def begun() -> None:
    """Ends the start: from now on SIGINT and SIGTERM raise KeyboardInterrupt, so that drafts are removed."""
    global _starting
    _starting = False


def was_interrupted() -> bool:
    """Whether a signal has interrupted this program; libraries may turn the KeyboardInterrupt into another error."""
    return _interrupted is not None


def exit_interrupted() -> NoReturn:
    """Says in one line that the program was interrupted, and ends it at once with a shell's status for that."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(_stderr, b"Interrupted.\n")
    os._exit(128 + (_interrupted or signal.SIGINT))


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    del frame
    # While modules are imported there is nothing to clean up, and callbacks of the import would swallow an exception.
    again, _interrupted = _interrupted is not None, number
    if _starting or again:
        exit_interrupted()
    raise KeyboardInterrupt


def _unraisable(what: Any) -> None:
    """Ends the program where an interrupt came while a callback ran that cannot raise it; else as Python does."""
    if _interrupted is not None:
        exit_interrupted()
    sys.__unraisablehook__(what)


def launch(
    document: str,
    define: Callable[[], None],
    run: Callable[[Any], None],
    computes: bool = False,
    positional: str | None = None,
) -> None:
    """Starts a program, whether as a script or as an installed command.

    Args:
      document: the text of --help.
      define: defines the program's flags.
      run: the program, called with the values of all flags.
      computes: whether it runs a model, on a CPU too, where memory in huge pages makes that faster.
      positional: the flag that an argument without a name sets, or all of them if it may be repeated; None: there is
        none.
    """
    global _stderr
    if computes:
        huge_pages.restart()
    with contextlib.suppress(OSError):
        _stderr = os.dup(2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    sys.unraisablehook = _unraisable
    sys.modules["__main__"].__doc__ = document  # absl reads the text of --help from there
    known = set(FLAGS)
    define()
    for name in set(FLAGS) - known:
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])  # otherwise --help does not list it

    def main(argv: list[str]) -> None:
        if positional is not None and len(argv) > 1:
            taken = argv[1:] if isinstance(FLAGS[positional], flags.MultiFlag) else argv[1:2]
            try:
                FLAGS[positional].parse(taken if len(taken) > 1 else taken[0])
            except flags.Error as error:
                refuse(str(error).replace(f"flag --{positional}=", f"{positional} "))
            del argv[1 : 1 + len(taken)]
        if len(argv) > 1:
            refuse(f"unexpected argument {argv[1]!r}")
        try:
            run(FLAGS)
        except (Exception, KeyboardInterrupt):
            if _interrupted is None:
                raise
            exit_interrupted()

    app.run(main, flags_parser=parse)


def parse(argv: list[str]) -> list[str]:
    """The arguments that are not flags, after all flags have been set; wrong flags are refused.

    Absl's own parser would exit with 1, also after --help.
    """
    try:
        rest: list[str] = FLAGS(argv)
    except flags.Error as error:
        missing = r"flag --(\w+)=None: Flag --\1 must have a value other than None\."
        said = "; ".join(re.sub(missing, r"give --\1", str(error)).splitlines())
        if found := re.fullmatch(r"flag --\w+=(.*): value should be one of <(.*)>", said):
            from flm_jax.records import meant  # Imported here, so that --help is fast.

            said += meant(found[1], found[2].split("|"))
        refuse(said)
    except SystemExit:  # --help has printed its text
        sys.exit(0)
    for name in NAMED:
        if name in FLAGS and FLAGS[name].value is not None and not str(FLAGS[name].value).strip():
            refuse(f"--{name} is empty: give a path, or leave the flag out")
    return rest


def refuse(what: str) -> NoReturn:
    """Prints what is wrong with the flags, and exits with status 2."""
    print(f"error: {what}\n--help lists the flags.", file=sys.stderr)
    sys.exit(2)


def define_gin(example: str) -> None:
    """Defines --gin_file and --gin_bindings."""
    # Absl goes on in the text of --help with: "; repeat this option to specify a list of values".
    flags.DEFINE_multi_string("gin_file", [], "A gin file; later ones override earlier ones")
    flags.DEFINE_multi_string("gin_bindings", [], f"A gin binding, such as {example!r}")


def define_json() -> None:
    """Defines --json."""
    flags.DEFINE_string("json", None, "Write the results to this file, as JSON.")


def define_assumptions() -> None:
    """Defines what a plan assumes of the machine and of its price."""
    flags.DEFINE_float(
        "utilisation",
        0.5,
        "Model FLOPs over peak FLOPs, for the estimate of days.",
        lower_bound=0.01,
        upper_bound=1.0,
    )
    flags.DEFINE_float(
        "storage", 1.0, "GB/s at which one host reads or writes checkpoints, for estimates.", lower_bound=0.001
    )
    flags.DEFINE_float(
        "price_per_chip_hour", None, "What one chip costs per hour, in your currency, for the cost.", lower_bound=0.0
    )


def define_model(rows: str, batch_size: int) -> None:
    """Defines the flags that say how a checkpoint's model is opened, and how many `rows` it computes at a time."""
    flags.DEFINE_string(
        "tokenizer",
        None,
        "The vocabulary to use instead of the checkpoint's own: another checkpoint, a directory with tokenizer.json, "
        "a SentencePiece model file, or a repository of the Hugging Face hub (org/name or org/name@revision).",
    )
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16", "float16"], "What to compute in; by default the dtype of the checkpoint."
    )
    flags.DEFINE_integer("batch_size", batch_size, f"{rows} per batch, on all devices together.", lower_bound=1)
    flags.DEFINE_integer(
        "max_length",
        None,
        "Longest sequence that the model reads, in tokens; by default what it was made for, at most 4096.",
        lower_bound=2,
    )


def define_processes() -> None:
    """Defines the flags with which several processes find each other."""
    flags.DEFINE_string("coordinator", None, "With several processes: host:port of process 0.")
    flags.DEFINE_integer("processes", None, "With several processes: their number.")
    flags.DEFINE_integer("process", None, "With several processes: the index of this one, from 0.")
    flags.DEFINE_bool(
        "distributed",
        False,
        "With several processes that JAX detects itself: on a TPU pod, or under SLURM, Open MPI, Kubernetes.",
    )
    flags.DEFINE_integer(
        "join_timeout", 300, "With several processes: seconds within which all must have joined.", lower_bound=1
    )
    flags.DEFINE_integer(
        "heartbeat_timeout",
        100,
        "With several processes: seconds without a sign of life after which a process is lost, and the others end.",
        lower_bound=5,
    )


def process_flags(values: Any) -> dict[str, Any]:
    """The values of the flags of `define_processes`, as arguments of `flm_jax.distributed.join`."""
    return {name: values[name].value for name in _PROCESS_FLAGS}
