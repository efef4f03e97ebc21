"""Multi-process coordination: joining, barriers that propagate errors, broadcast from process 0, and a vote to stop.

All processes run the same program, and what they read from global arrays is the same in each, so they take the same
decisions without communicating. What only one process can know, such as a file, a signal or an error, is exchanged here
through the coordination service of `jax.distributed`, without waiting for an accelerator. With one process nothing here
communicates.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

# The exit status of a process that ends because another one is gone; 79 is that of one whose watchdog ends it.
LOST = 80
# A dead process ends the others within the heartbeat's timeout; one that tokenises may take much longer.
_WAIT_MS = 24 * 3600 * 1000
_FAREWELL_MS = 10_000
_POLL_S = 1.0
# What JAX may add to `join`'s own time, after which it would end the process from C++, with no sentence.
_JOIN_MARGIN_S = 60
_FAILED = "flm_jax/failed"
_LONGEST = 4_000  # characters of an error message that are sent to the other processes
_over = threading.Event()  # The run is over, or this process is about to end.
_calls: collections.Counter[str] = collections.Counter()


class PeerError(RuntimeError):
    """Another process failed, and this one cannot continue without it; the message is that of the other process."""


class ProcessFlagsError(ValueError):
    """The flags and variables of the environment that say how processes find each other do not fit together."""


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    distributed: bool = False,
    join_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins the other processes; must come before any other call of JAX. Without arguments the run has one process.

    Args:
      coordinator: host:port of process 0, where it listens and the others find it; default: the environment variable
        JAX_COORDINATOR_ADDRESS.
      processes: the number of processes; default: JAX_NUM_PROCESSES.
      process: the number of this process, from 0; default: JAX_PROCESS_ID.
      distributed: JAX finds the other processes itself: on TPU pods, and under SLURM, Open MPI or Kubernetes.
      join_timeout: seconds within which all processes must have joined; this one ends otherwise, with status 1.
      heartbeat_timeout: seconds without a sign of life after which a process counts as lost, and ends the others.

    Raises:
      ProcessFlagsError: the arguments do not fit together.
      ValueError: the other processes cannot be found.
    """
    if not distributed:
        coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
        process = _number("JAX_PROCESS_ID") if process is None else process
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if distributed and len(missing) < len(given):
        raise ProcessFlagsError(
            "--distributed finds the processes itself: leave --coordinator, --processes, --process out."
        )
    if not distributed and len(missing) == len(given):
        return
    if not distributed:
        if missing:
            raise ProcessFlagsError(
                f"{', '.join(f for f in given if f not in missing)} needs {' and '.join(missing)} as well: "
                "--coordinator=host:port --processes=N --process=i, i from 0 to N - 1, or the environment variables "
                "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
            )
        assert coordinator is not None and processes is not None and process is not None
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65_536:
            raise ProcessFlagsError(
                f"--coordinator={coordinator} must be host:port, such as 10.0.0.1:8476, a port up to 65535."
            )
        if not 0 <= process < processes:
            raise ProcessFlagsError(
                f"--process={process} with --processes={processes}: processes are numbered from 0 to {processes - 1}."
            )
    # A run stops by its own vote (`Vote`); this service would intercept SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    awaited = "the others" if distributed else coordinator
    # Where they do not come, JAX ends the process from C++, where no sentence can be printed.
    notices = [
        threading.Timer(min(20.0, join_timeout / 2), _print_waiting, [awaited, join_timeout]),
        threading.Timer(join_timeout, _end_alone, [awaited, process, processes, join_timeout]),
    ]
    for notice in notices:
        notice.daemon = True
        notice.start()
    try:
        jax.distributed.initialize(
            *(coordinator, processes, process),
            # Explicit arguments must not be mixed with what JAX detects in the environment.
            cluster_detection_method=None if distributed else "deactivate",
            initialization_timeout=join_timeout + _JOIN_MARGIN_S,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        how = "JAX did not find them by itself" if distributed else f"coordinator {coordinator}, process {process}"
        raise ValueError(f"The processes did not meet ({how}): {error}") from error
    finally:
        for notice in notices:
            notice.cancel()
    listener = threading.Thread(target=_listen, name="failures of others", daemon=True)
    listener.start()

    def end() -> None:
        _over.set()
        listener.join()

    atexit.register(end)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdigit():
        raise ProcessFlagsError(f"{variable}={text} in the environment must be a number.")
    return None if text is None else int(text)


def _print_waiting(awaited: str, seconds: int) -> None:
    print(f"Waiting for {awaited}: every process must be started within {seconds} s.", file=sys.stderr, flush=True)


def _end_alone(awaited: str, process: int | None, processes: int | None, seconds: int) -> None:
    """Ends a process that has waited too long for the others to join."""
    all_of_them = "all processes" if processes is None else f"all {processes} processes"
    missing = "another one was not started, or ended at once" if process == 0 else f"{awaited} did not let it in"
    print(
        f"error: Within {seconds} s not {all_of_them} have joined the run: {missing}. See what each of them has "
        "printed, and start all again; --join_timeout sets the seconds.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def check_joined() -> None:
    """Refuses to run in several processes that were not joined.

    Raises:
      ValueError: JAX knows of other processes, but `join` was not called.
    """
    if jax.process_count() > 1 and not joined():
        raise ValueError(
            f"JAX sees {jax.process_count()} processes, but they were not joined: start each with --distributed, or "
            "call jax.distributed.initialize() first."
        )


def joined() -> bool:
    """Whether `join` has connected this process to others."""
    return bool(jax.distributed.is_initialized())


def is_primary() -> bool:
    """Whether this is process 0, the primary one, which prints and writes files."""
    return bool(jax.process_index() == 0)


def print0(text: str, end: str = "\n") -> None:
    """Prints a text in process 0 only."""
    if is_primary():
        print(text, end=end, flush=True)


def all_gather_text(what: str, text: str = "") -> list[str]:
    """The texts of all processes, in process order.

    Every process must call it, with the same values of `what` in the same order.
    """
    if jax.process_count() == 1:
        return [text]
    client = _client()
    _calls[what] += 1
    stem, call, me = f"flm_jax/{what}", _calls[what], jax.process_index()
    client.key_value_set(f"{stem}/{call}/{me}", json.dumps(text))
    if me == 0:
        # Process 0 gathers the texts and sends them to all: 2 N messages, not N^2.
        texts = [client.blocking_key_value_get(f"{stem}/{call}/{i}", _WAIT_MS) for i in range(jax.process_count())]
        client.key_value_set(f"{stem}/{call}/all", f"[{', '.join(texts)}]")
        if call > 1:  # Every process has made this call, so every process has the result of the call before.
            client.key_value_delete(f"{stem}/{call - 1}/")
    found: list[str] = json.loads(client.blocking_key_value_get(f"{stem}/{call}/all", _WAIT_MS))
    return found


def _client() -> Any:
    # JAX offers its key-value store nowhere else; orbax takes it from here too. Checked with jax 0.10.2 and 0.12.0.1.
    from jax._src import distributed

    return distributed.global_state.client


@contextlib.contextmanager
def together(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """A block that every process runs: none leaves it before all are done, and an error in one is raised in all.

    Args:
      what: names the block; used by one thread at a time.
      kinds: errors that keep their type in the other processes.

    Raises:
      PeerError: another process failed in the block, by an error that is none of `kinds`.
    """
    if jax.process_count() == 1:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    texts = all_gather_text(what, "" if mine is None else f"{type(mine).__name__}: {str(mine)[:_LONGEST]}")
    if mine is not None:
        raise mine
    for process, text in enumerate(texts):
        if text:
            name, _, sentence = text.partition(": ")
            known = {kind.__name__: kind for kind in kinds}
            raise known.get(name, PeerError)(f"process {process}: {sentence or name}")


def from_primary(what: str, make: Callable[[], T]) -> T:
    """Calls `make` in process 0 and returns its result, which must be JSON-able, in all processes."""
    if jax.process_count() == 1:
        return make()
    found = ""
    with together(what):
        if is_primary():
            found = json.dumps(make())
    result: T = json.loads(all_gather_text(what, found)[0])
    return result


def primary_then_others(what: str, make: Callable[[], T]) -> T:
    """Calls a function in process 0, then in the others, which can thus use what process 0 left on a shared disk."""
    made: list[T] = []
    for turn in (True, False):
        with together(what):
            if is_primary() is turn:
                made.append(make())
    return made[0]


def assert_equal(what: str, value: str, advice: str) -> None:
    """Checks that all processes have the same value.

    Raises:
      ValueError: they do not; raised in every process.
    """
    if jax.process_count() == 1:
        return
    values = all_gather_text(what, value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise ValueError(
                f"{what} differs between processes: process 0 has {values[0][:16]}, process {process} has "
                f"{other[:16]}. {advice}"
            )


def any_process(what: str, mine: bool) -> bool:
    """Whether `mine` is true in any process."""
    return any(all_gather_text(what, "yes" if mine else ""))


class Vote:
    """A vote of all processes, such as to stop: whether a flag is true in any of them, asked each step without waiting.

    One byte per flag and device is reduced on the devices, after the step that was just dispatched, and read one step
    later, when that step is done anyway. All processes therefore learn the result at the same step, the one after that
    in which the flag was set.
    """

    def __init__(self, mesh: Mesh) -> None:
        """Votes over the devices of a mesh; every process must have some of them."""
        self._size = mesh.size
        self._where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._count = jax.jit(lambda votes: votes.max(axis=0), out_shardings=everywhere)
        self._asked: jax.Array | None = None

    def __call__(self, *mine: bool) -> tuple[bool, ...]:
        """Casts this process's votes; returns the result of the previous call (with one process: of this call)."""
        if jax.process_count() == 1:
            return mine
        flags = np.asarray([mine], np.uint8)
        votes = jax.make_array_from_callback((self._size, len(mine)), self._where, lambda _: flags)
        asked, self._asked = self._asked, self._count(votes)
        return (False,) * len(mine) if asked is None else tuple(bool(x) for x in jax.device_get(asked))


def fetch(tree: Any) -> Any:
    """A tree of arrays as NumPy arrays, in every process, wherever their shards are; every process must call it."""

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        assert isinstance(x.sharding, NamedSharding)
        return jax.jit(_itself, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)

    return jax.device_get(jax.tree.map(whole, tree))


def _itself(x: jax.Array) -> jax.Array:
    return x


def fail_together(sentence: str, status: int = 1) -> None:
    """After an error: tells the other processes, and ends this one unless all of them end together, by the same error.

    The others may be waiting for this process in a collective, where nothing wakes them; `_listen` ends them.

    Args:
      sentence: what has happened.
      status: the exit status of this process, if it is ended here.
    """
    if not joined():
        return
    tell(f"process {jax.process_index()} failed: {sentence[:_LONGEST]}", 1)
    try:
        _client().wait_at_barrier("flm_jax/leaving", _FAREWELL_MS)
    except Exception:
        # The coordination service ends with process 0, and ends the others with a page of C++ output: process 0 waits.
        time.sleep(2.0 if is_primary() else 0.0)
        os._exit(status)


def tell(sentence: str, status: int) -> tuple[int, str]:
    """Tells the other processes with which status and sentence to end; returns what the first process has told them.

    This process must end by itself after that.
    """
    client = _client()
    _over.set()  # The listener must not end it.
    sys.stdout.flush()
    sys.stderr.flush()
    found = status, sentence
    with contextlib.suppress(Exception):  # Another process was first, or the coordination service is gone.
        client.key_value_set(_FAILED, json.dumps(found))
    with contextlib.suppress(Exception):
        found = _told(client)
    return found


def _told(client: Any) -> tuple[int, str]:
    status, sentence = json.loads(client.key_value_try_get(_FAILED))
    return status, sentence


def _listen() -> None:
    """Ends this process some time after another one has reported a failure; runs until the run is over."""
    client = _client()
    # It polls: a thread that waits in C++ while the interpreter ends would abort it.
    while not _over.wait(_POLL_S):
        try:
            status, sentence = _told(client)
        except Exception:  # No process has failed.
            continue
        # This process may be about to end by itself; and process 0, which runs the service, ends last.
        about_to = 0.0 if status == LOST else _FAREWELL_MS / 1000
        if not _over.wait(about_to + (2.0 if is_primary() else 0.0)):
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            os._exit(status)
