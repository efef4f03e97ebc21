"""Commands of gcloud as lists of words, and running them: time limits, and retries where that can help.

The commands and their flags: https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create and its
neighbours `describe`, `delete`, `ssh` and `scp`; states: https://cloud.google.com/tpu/docs/queued-resources; several
slices: https://cloud.google.com/tpu/docs/multislice-introduction; a node, which has a network endpoint per host:
https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from flm_jax.launching import host, messages
from flm_jax.launching.description import Launch
from flm_jax.launching.messages import GcloudError

_TPUS = ("gcloud", "compute", "tpus")
_GROUP = (*_TPUS, "queued-resources")
# Seconds. A deletion takes minutes, and so does an installation on a fresh host.
QUICK, LONG, LONGEST = 120.0, 600.0, 2400.0


def _where(launch: Launch) -> list[str]:
    return [f"--zone={launch.zone}", *([f"--project={launch.project}"] if launch.project else [])]


def create(launch: Launch) -> list[str]:
    """The command that queues the machine."""
    several = [f"--node-count={launch.slices}", f"--node-prefix={launch.name}"]
    made: list[str] = []
    others = list(launch.create_args)
    if launch.nfs is not None:  # Without OS Login a user has another id on each host, and NFS goes by ids.
        # gcloud takes the last --metadata alone, so the one that was given is joined with ours.
        given = [word for word in others if word.startswith("--metadata=")]
        others = [word for word in others if word not in given]
        made.append(",".join(["--metadata=enable-oslogin=TRUE", *(word.partition("=")[2] for word in given)]))
    return [
        *(*_GROUP, "create", launch.name, *_where(launch)),
        f"--accelerator-type={launch.accelerator}",
        f"--runtime-version={launch.runtime}",
        *(several if launch.slices > 1 else [f"--node-id={launch.name}"]),
        *(["--spot"] if launch.spot else []),
        *made,
        "--async",
        "--quiet",
        *others,
    ]


def describe(launch: Launch) -> list[str]:
    """The command that prints the state of the queued resource, as JSON."""
    return [*_GROUP, "describe", launch.name, *_where(launch), "--format=json(state)"]


def node_names(launch: Launch) -> list[str]:
    """The names of the slices; none where the number of slices is not known."""
    if launch.machine is None:
        return []
    return [launch.name] if launch.slices == 1 else [f"{launch.name}-{number}" for number in range(launch.slices)]


def describe_node(launch: Launch, name: str) -> list[str]:
    """The command that prints state and hosts of a slice, as JSON."""
    shown = "--format=json(state,health,networkEndpoints,networkConfigs)"
    return [*_TPUS, "tpu-vm", "describe", name, *_where(launch), shown]


def delete(launch: Launch) -> list[str]:
    """The command that deletes the machine, and all that is on its disks."""
    return [*_GROUP, "delete", launch.name, *_where(launch), "--force", "--quiet"]


def ssh(launch: Launch, *words: object, node: str = "all", worker: str = "all") -> list[str]:
    """The command that calls the hosts' script on hosts: `worker` of the slice `node`, or all."""
    called = f"--command={host.command(launch, *words)}"
    who = [f"--node={node}", f"--worker={worker}"]
    return [*_GROUP, "ssh", launch.name, *_where(launch), *who, "--quiet", *launch.ssh_args, called]


def copy(launch: Launch, script: str) -> list[str]:
    """The command that copies the hosts' script, a file here, to the home directory of every host."""
    who = ["--node=all", "--worker=all"]
    return [*_GROUP, "scp", script, f"{launch.name}:", *_where(launch), *who, "--quiet", *launch.ssh_args]


def smooth_commands(
    launch: Launch, action: str, script: str, node: str, worker: str, log: tuple[object, ...]
) -> list[list[str]]:
    """The commands that an action gives if nothing goes wrong and nothing was there before, in their order.

    Args:
      launch: what is launched.
      action: what is done.
      script: the name of the file with the hosts' script.
      node: the slice whose log is printed, or all.
      worker: the host in the slice.
      log: how many lines of it, and follow, if it is followed.
    """
    there = [describe(launch), *(describe_node(launch, name) for name in node_names(launch))]
    ask = ssh(launch, "status")
    if action == "create":
        return [create(launch)]
    if action == "run":
        begin = [ssh(launch, "forget"), ssh(launch, "install"), ssh(launch, "start", 1)]
        return [describe(launch), create(launch), *there, ask, copy(launch, script), *begin, ask]
    if action == "status":
        return [*there, ask]
    if action == "logs":
        return [ssh(launch, "log", *log, node=node, worker=worker)]
    if action == "stop":
        return [*there, ssh(launch, "stop"), ask]
    return [delete(launch)]


@dataclass(frozen=True)
class Gcloud:
    """Runs commands of gcloud.

    Attributes:
      say: prints a line.
      pause: seconds before the first retry; each one waits twice as long as the one before.
      attempts: how often a command is given that fails for a reason that may pass.
      patience: what time limits are multiplied by.
    """

    say: Callable[[str], None]
    pause: float = 5.0
    attempts: int = 4
    patience: float = 1.0

    def call(self, words: list[str], limit: float = QUICK, attempts: int | None = None) -> str:
        """What a command prints; arguments and errors as those of `both`."""
        return self.both(words, limit, attempts)[0]

    def both(self, words: list[str], limit: float = QUICK, attempts: int | None = None) -> tuple[str, str]:
        """What a command prints to stdout and to stderr.

        Args:
          words: the command.
          limit: seconds after which it is ended.
          attempts: instead of the usual number.

        Raises:
          GcloudError: it failed, the last time if it was given several times.
        """
        attempts = attempts or self.attempts
        for attempt in range(1, attempts + 1):
            try:
                return self._once(words, limit * self.patience)
            except GcloudError as error:
                if not error.transient or attempt == attempts:
                    raise
                self._wait(error, attempt, attempts)
        raise AssertionError

    def give(self, words: list[str], limit: float, arrived: Callable[[GcloudError], bool]) -> None:
        """Gives a command that is refused where it was obeyed before, and does not mind that of a further try.

        Of a command that failed on the way one cannot know whether it arrived.

        Args:
          words: the command.
          limit: seconds after which it is ended.
          arrived: whether an error is that of a command which was obeyed before.

        Raises:
          GcloudError: it failed, or the first try is refused.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                self.call(words, limit, attempts=1)
                return
            except GcloudError as error:
                if attempt > 1 and arrived(error):
                    return
                if not error.transient or attempt == self.attempts:
                    raise
                self._wait(error, attempt, self.attempts)

    def _wait(self, error: GcloudError, attempt: int, attempts: int) -> None:
        self.say(f"{error} Trying again ({attempt} of {attempts - 1}).")
        time.sleep(self.pause * 2 ** (attempt - 1))

    def _once(self, words: list[str], limit: float) -> tuple[str, str]:
        with _started(words, subprocess.PIPE) as process:
            try:
                output, errors = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                _end(process)
                raise GcloudError(f"{_short(words)} did not end within {limit:.0f} s.", transient=True) from None
            except BaseException:
                _end(process)
                raise
        if process.returncode:
            said = " ".join(messages.telling(errors).split()) or f"exit status {process.returncode}"
            # 255 is the status of ssh itself, where the connection failed.
            transient = process.returncode == 255 or messages.is_transient(errors)
            raise GcloudError(f"{_short(words)}: {said}", transient, output)
        return output, errors

    def follow(self, words: list[str]) -> int:
        """The exit status of a command that prints by itself until it ends."""
        with _started(words) as process:
            try:
                return process.wait()
            except BaseException:
                _end(process)
                raise


def _started(words: list[str], output: int | None = None) -> subprocess.Popen[str]:
    try:
        # A group of its own, because gcloud starts ssh, which would outlive it.
        return subprocess.Popen(
            words, text=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    except FileNotFoundError:
        raise GcloudError(
            "gcloud is not on the PATH: install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), or "
            "see the commands with --dry_run."
        ) from None


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _short(words: list[str]) -> str:
    return "gcloud " + shlex.join([word for word in words[1:6] if not word.startswith("--")])
