"""Several processes that train as one: how they meet, which of them speaks, and how they agree.

All processes run the same program, and what they read off global arrays is the same in each, so they take the same
decisions without a word. What only one of them can know, such as a file, a signal or an error, it says here, through
the coordination service of `jax.distributed`: no accelerator is waited for. With one process all of this is nothing.
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

# A process that has died ends the others within the heartbeat's timeout (100 s); one that tokenises may take its time.
_PATIENCE_MS = 24 * 3600 * 1000
_FAREWELL_MS = 10_000
_LISTEN_S = 1.0
_FAILED = "flm_jax/failed"
_LONGEST = 4_000  # characters of an error that the others are told
_over = threading.Event()  # The run is over, or this process is about to end.
_turns: collections.Counter[str] = collections.Counter()


class PeerError(RuntimeError):
    """Another process failed, and this one cannot go on without it; the message is its own."""


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, distributed: bool = False
) -> None:
    """Joins the other processes; before any other call of JAX. With nothing given this is a run of one process.

    Args:
      coordinator: host:port of process 0, where it listens and the others find it; default: the environment variable
        JAX_COORDINATOR_ADDRESS.
      processes: how many there are; default: JAX_NUM_PROCESSES.
      process: which this is, from 0; default: JAX_PROCESS_ID.
      distributed: JAX finds the others itself: on TPU pods, and under SLURM, Open MPI or Kubernetes.

    Raises:
      ValueError: these do not fit together, or the others cannot be found.
    """
    if not distributed:
        coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
        process = _number("JAX_PROCESS_ID") if process is None else process
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if distributed and len(missing) < len(given):
        raise ValueError("--distributed finds the processes itself: leave --coordinator, --processes, --process out.")
    if not distributed and len(missing) == len(given):
        return
    if not distributed:
        if missing:
            raise ValueError(
                f"{', '.join(f for f in given if f not in missing)} needs {' and '.join(missing)} as well: "
                "--coordinator=host:port --processes=N --process=i, i from 0 to N - 1, or the environment variables "
                "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
            )
        assert coordinator is not None and processes is not None and process is not None
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65_536:
            raise ValueError(
                f"--coordinator={coordinator} must be host:port, such as 10.0.0.1:8476, a port up to 65535."
            )
        if not 0 <= process < processes:
            raise ValueError(
                f"--process={process} with --processes={processes}: processes are numbered from 0 to {processes - 1}."
            )
    # A run stops by its own vote (`Vote`); this service would take SIGTERM away from it.
    jax.config.update("jax_enable_preemption_service", False)
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX gives them five minutes, and then ends the process from C++, where nothing can be said.
    patience = threading.Timer(20.0, _say_waiting, ["the others" if distributed else coordinator])
    patience.daemon = True
    patience.start()
    try:
        # What is said outright is not to be mixed with what an environment seems to say.
        method = None if distributed else "deactivate"
        jax.distributed.initialize(coordinator, processes, process, cluster_detection_method=method)
    except (ValueError, RuntimeError) as error:
        how = "JAX did not find them by itself" if distributed else f"coordinator {coordinator}, process {process}"
        raise ValueError(f"The processes did not meet ({how}): {error}") from error
    finally:
        patience.cancel()
    listener = threading.Thread(target=_listen, name="failures of others", daemon=True)
    listener.start()

    def end() -> None:
        _over.set()
        listener.join()

    atexit.register(end)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdigit():
        raise ValueError(f"{variable}={text} in the environment must be a number.")
    return None if text is None else int(text)


def _say_waiting(where: str) -> None:
    print(f"Waiting for {where}: every process must be started within five minutes.", file=sys.stderr, flush=True)


def check_joined() -> None:
    """Refuses several processes that cannot talk to each other.

    Raises:
      ValueError: JAX knows of others, but `join` was not called.
    """
    if jax.process_count() > 1 and not joined():
        raise ValueError(
            f"JAX sees {jax.process_count()} processes, but they were not joined: start each with --distributed, or "
            "call jax.distributed.initialize() first."
        )


def joined() -> bool:
    """Whether `join` has found others."""
    return bool(jax.distributed.is_initialized())


def is_primary() -> bool:
    """Whether this is the process that speaks and writes."""
    return bool(jax.process_index() == 0)


def print0(text: str) -> None:
    """Prints, once for all processes."""
    if is_primary():
        print(text, flush=True)


def all_gather_text(what: str, text: str = "") -> list[str]:
    """What every process says, in their order. Each must call it, with the same `what`s in the same order."""
    if jax.process_count() == 1:
        return [text]
    client = _client()
    _turns[what] += 1
    stem, turn, me = f"flm_jax/{what}", _turns[what], jax.process_index()
    client.key_value_set(f"{stem}/{turn}/{me}", json.dumps(text))
    if me == 0:
        # Gathered by one and told to all: 2 N messages, not N^2.
        said = [client.blocking_key_value_get(f"{stem}/{turn}/{i}", _PATIENCE_MS) for i in range(jax.process_count())]
        client.key_value_set(f"{stem}/{turn}/all", f"[{', '.join(said)}]")
        if turn > 1:  # Everybody has spoken, so everybody has heard what was said before.
            client.key_value_delete(f"{stem}/{turn - 1}/")
    found: list[str] = json.loads(client.blocking_key_value_get(f"{stem}/{turn}/all", _PATIENCE_MS))
    return found


def _client() -> Any:
    # JAX shows its key-value store nowhere else; orbax takes it from here too. Checked with jax 0.10.2 and 0.12.0.1.
    from jax._src import distributed

    return distributed.global_state.client


@contextlib.contextmanager
def together(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """A block that every process runs: none leaves it before all have, and what fails in one fails in all.

    Args:
      what: names it; used by one thread at a time.
      kinds: errors that are raised everywhere as what they are.

    Raises:
      PeerError: another process failed in it, by an error that is none of `kinds`.
    """
    if jax.process_count() == 1:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    told = all_gather_text(what, "" if mine is None else f"{type(mine).__name__}: {str(mine)[:_LONGEST]}")
    if mine is not None:
        raise mine
    for process, text in enumerate(told):
        if text:
            name, _, sentence = text.partition(": ")
            known = {kind.__name__: kind for kind in kinds}
            raise known.get(name, PeerError)(f"process {process}: {sentence or name}")


def from_primary(what: str, make: Callable[[], T]) -> T:
    """What the first process finds, JSON-able, for all of them."""
    if jax.process_count() == 1:
        return make()
    found = ""
    with together(what):
        if is_primary():
            found = json.dumps(make())
    told: T = json.loads(all_gather_text(what, found)[0])
    return told


def primary_then_others(what: str, make: Callable[[], T]) -> T:
    """Calls a function in the first process, then in the others, which so find what it has left on a shared disk."""
    made: list[T] = []
    for turn in (True, False):
        with together(what):
            if is_primary() is turn:
                made.append(make())
    return made[0]


def assert_equal(what: str, value: str, advice: str) -> None:
    """Checks that all processes have the same.

    Raises:
      ValueError: they have not; in every process.
    """
    if jax.process_count() == 1:
        return
    told = all_gather_text(what, value)
    for process, theirs in enumerate(told):
        if theirs != told[0]:
            raise ValueError(
                f"{what} differs between processes: process 0 has {told[0][:16]}, process {process} has {theirs[:16]}. "
                + advice
            )


def any_process(what: str, mine: bool) -> bool:
    """Whether it is so in any process."""
    return any(all_gather_text(what, "yes" if mine else ""))


class Vote:
    """Whether it is so in any process, asked once a step, at the cost of no wait.

    A byte a question and device is reduced on the devices, behind the step just dispatched, and read a step later,
    when that step is done and looked at anyway. So all processes hear of it at the same step: the one after that at
    which it was said.
    """

    def __init__(self, mesh: Mesh) -> None:
        """Votes over the devices of a mesh; every process must have some of them."""
        self._size = mesh.size
        self._where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._count = jax.jit(lambda votes: votes.max(axis=0), out_shardings=everywhere)
        self._asked: jax.Array | None = None

    def __call__(self, *mine: bool) -> tuple[bool, ...]:
        """Casts this process's votes; returns what the call before asked, of any process (with one process: this)."""
        if jax.process_count() == 1:
            return mine
        flags = np.asarray([mine], np.uint8)
        votes = jax.make_array_from_callback((self._size, len(mine)), self._where, lambda _: flags)
        asked, self._asked = self._asked, self._count(votes)
        return (False,) * len(mine) if asked is None else tuple(bool(x) for x in jax.device_get(asked))


def fetch(tree: Any) -> Any:
    """A tree of arrays as NumPy arrays, in every process, wherever their parts live; every process must call it."""

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        assert isinstance(x.sharding, NamedSharding)
        return jax.jit(_itself, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)

    return jax.device_get(jax.tree.map(whole, tree))


def _itself(x: jax.Array) -> jax.Array:
    return x


def fail_together(sentence: str) -> None:
    """After an error: tells the others, and ends this process unless all end together, by the same error.

    They may be waiting for it where nothing wakes them, in a collective: `_listen` does.
    """
    if not joined():
        return
    client = _client()
    _over.set()  # This process leaves by itself, in its own time.
    with contextlib.suppress(Exception):  # Somebody else was first.
        client.key_value_set(_FAILED, f"process {jax.process_index()} failed: {sentence[:_LONGEST]}")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        client.wait_at_barrier("flm_jax/leaving", _FAREWELL_MS)
    except Exception:
        # With the first process the coordination service ends, and by that the others, with a page of C++.
        time.sleep(2.0 if is_primary() else 0.0)
        os._exit(1)


def _listen() -> None:
    """Ends this process some time after another has said that it failed; until the run is over."""
    client = _client()
    # Asked again and again: a thread that waited in C++ as the interpreter ends would take it down with an abort.
    while not _over.wait(_LISTEN_S):
        try:
            sentence = client.key_value_try_get(_FAILED)
        except Exception:  # Nobody has.
            continue
        # This one may be about to leave by itself; and the first, with which the service ends, leaves last.
        if not _over.wait(_FAREWELL_MS / 1000 + (2.0 if is_primary() else 0.0)):
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            os._exit(1)
