"""What one does with a launch on TPU VMs: create, run until it is finished, status, logs, stop, delete.

Nothing is remembered here between two commands. What there is to know is asked: Google Cloud knows the machine, and
each host knows its last attempt. So `run` may be interrupted and given again, from anywhere.
"""

from __future__ import annotations

import contextlib
import enum
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flm_jax.files import atomic_write
from flm_jax.launching import gcloud, host
from flm_jax.launching.description import Launch
from flm_jax.launching.gcloud import LONG, LONGEST, Gcloud, GcloudError
from flm_jax.launching.host import Report
from flm_jax.records.wording import counted

STOPPED = 75  # the exit status of a run that saved its state and goes on when it is started again


@dataclass(frozen=True)
class Watch:
    """How `run` waits.

    Attributes:
      poll: seconds between two looks.
      failures: how often in a row hosts may be lost or out of reach before `run` gives up.
      straggling: looks after which hosts that still run, while others have ended, are killed.
      steady: looks at a running launch after which earlier failures are forgotten.
    """

    poll: float = 60.0
    failures: int = 10
    straggling: int = 10
    steady: int = 10


class GaveUpError(ValueError):
    """Hosts were lost or out of reach too often in a row."""


class Verdict(enum.Enum):
    """What the reports of all hosts amount to."""

    NEW = "not started"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped, as asked"
    AGAIN = "to be started again"
    FAILED = "failed"


def judge(found: list[Report], digest: str) -> Verdict:
    """What the reports of all hosts amount to for the launch with this digest.

    Raises:
      ValueError: the hosts run another launch.
    """
    if any(report.state == "running" for report in found):
        if any(report.state == "running" and report.launch != digest for report in found):
            raise ValueError(
                "The hosts run something else under this name (another release, recipe or work directory) than this "
                f"launch, {digest}: take what it was started with, stop it first, or take another --name."
            )
        return Verdict.RUNNING
    started = [report for report in found if report.attempt > 0 and report.launch == digest]
    if not started:
        return Verdict.NEW
    if len(started) == len(found) and all(report.status == 0 for report in found):
        return Verdict.FINISHED
    if any(report.asked for report in started):
        return Verdict.STOPPED
    # A host that was lost takes the others with it: they end with 1, and only the lost one tells why. Statuses from 128
    # on are those of signals.
    lost = any(report.state != "ended" for report in found)
    if lost or any(report.status == STOPPED or (report.status or 0) >= 128 for report in found):
        return Verdict.AGAIN
    return Verdict.FAILED


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
    ask = gcloud.ssh(launch, "status")
    if action == "create":
        return [gcloud.create(launch)]
    if action == "run":
        return [
            gcloud.describe(launch),
            gcloud.create(launch),
            gcloud.describe(launch),
            ask,
            gcloud.copy(launch, script),
            gcloud.ssh(launch, "install"),
            gcloud.ssh(launch, "start", 1),
            ask,
        ]
    if action == "status":
        return [gcloud.describe(launch), ask]
    if action == "logs":
        return [gcloud.ssh(launch, "log", *log, node=node, worker=worker)]
    if action == "stop":
        return [gcloud.ssh(launch, "stop"), ask]
    return [gcloud.delete(launch)]


@contextlib.contextmanager
def script_file(launch: Launch) -> Iterator[str]:
    """A context manager that gives the name of a file with the hosts' script."""
    with tempfile.TemporaryDirectory(prefix="flm_launch_") as folder:
        path = Path(folder) / host.script_name(launch)
        atomic_write(path, host.script(launch))
        yield str(path)


@dataclass(frozen=True)
class Tpu:
    """The machine of a launch, and the hosts of it.

    Attributes:
      launch: what is launched.
      cloud: runs the commands, and prints.
      watch: how `run` waits.
    """

    launch: Launch
    cloud: Gcloud
    watch: Watch = Watch()

    def state(self) -> str | None:
        """The state of the queued resource; None: there is none."""
        try:
            return self.cloud.call(gcloud.describe(self.launch)).strip() or "UNKNOWN"
        except GcloudError as error:
            if error.missing:
                return None
            raise

    def create(self) -> None:
        """Queues the machine; the request waits until there is one.

        Raises:
          GcloudError: it is refused, or exists already.
        """
        attempts = self.cloud.attempts
        for attempt in range(1, attempts + 1):
            try:
                self.cloud.call(gcloud.create(self.launch), attempts=1)
                break
            except GcloudError as error:
                # Of a command that failed on the way one cannot know whether it arrived.
                if attempt > 1 and error.exists:
                    break
                if not error.transient or attempt == attempts:
                    raise
                self.cloud.say(f"{error} Trying again ({attempt} of {attempts - 1}).")
                time.sleep(self.cloud.pause * 2 ** (attempt - 1))
        self.cloud.say(f"Queued {self.launch.name}: {self._machine()}.")

    def _machine(self) -> str:
        launch = self.launch
        several = f"{counted(launch.slices, 'slice')} of " if launch.slices > 1 else ""
        return f"{several}{launch.accelerator}{', spot' if launch.spot else ''}, in {launch.zone}"

    def delete(self) -> None:
        """Deletes the machine and everything on its disks."""
        self.cloud.call(gcloud.delete(self.launch), LONG)
        self.cloud.say(f"Deleted {self.launch.name}.")

    def reports(self, *words: object) -> list[Report]:
        """What all hosts report, after the command of the hosts' script that `words` are, or without one.

        Raises:
          GcloudError: a command failed on a host, or hosts did not answer.
        """
        limit = LONGEST if words == ("install",) else LONG
        output = self.cloud.call(gcloud.ssh(self.launch, *(words or ("status",))), limit, attempts=2)
        found = host.reports(output)
        # gcloud leaves out slices that it cannot reach, with a warning, and exits with 0.
        if len(found) < self.launch.fewest_hosts:
            raise GcloudError(
                f"{len(found)} of {self.launch.fewest_hosts} hosts of {self.launch.name} answered.", transient=True
            )
        return found

    def status(self) -> Verdict | None:
        """Prints the state of the machine and of every host; what that amounts to, if there is a machine."""
        state = self.state()
        if state is None:
            self.cloud.say(f"There is no queued resource {self.launch.name} in {self.launch.zone}.")
            return None
        self.cloud.say(f"{self.launch.name}: {state}")
        if state != "ACTIVE":
            return None
        found = self.reports()
        for report in found:
            ended = f" with exit status {report.status}" if report.status is not None else ""
            asked = ", asked to stop" if report.asked else ""
            self.cloud.say(f"  {report.host}: {report.state}{ended}, attempt {report.attempt}{asked}")
        return self._judged(found)

    def _judged(self, found: list[Report]) -> Verdict:
        """What reports amount to for the launch that the hosts have: `status` and `stop` are not told the recipe."""
        if self.launch.machine is None:
            answered = f"{counted(len(found), 'host')} of {self.launch.name} answered"
            self.cloud.say(f"{answered}; with --topology (and --slices) it is checked that these are all.")
        # A host that is new has none, and one that was left behind has an older one.
        latest = max(found, key=lambda report: (report.state == "running", report.attempt))
        return judge(found, latest.launch)

    def logs(self, node: str, worker: str, lines: int, follow: bool) -> None:
        """Prints the end of the log of one host, or of all; goes on with what is added to it, if `follow`.

        Raises:
          GcloudError: gcloud failed.
          GaveUpError: the connection is lost again and again.
        """
        if not follow:
            print(self.cloud.call(gcloud.ssh(self.launch, "log", lines, node=node, worker=worker), LONG), end="")
            return
        lost = 0
        while True:
            began = time.monotonic()
            self.cloud.follow(gcloud.ssh(self.launch, "log", lines, "follow", node=node, worker=worker))
            lost = 1 if time.monotonic() - began > self.watch.poll else lost + 1
            self._give_up_after(lost, f"The log of {self.launch.name} cannot be followed.")
            if self.state() != "ACTIVE":
                raise GcloudError(f"The machine of {self.launch.name} is not active any more.")
            self.cloud.say("The connection was lost; following again, from the end of the log.")
            time.sleep(self.watch.poll / 10)
            lines = 0

    def stop(self) -> Verdict:
        """Asks the run to save and to stop, and waits until it has.

        Raises:
          GcloudError: the hosts do not answer.
        """
        found = self.reports("stop")
        if not any(report.state == "running" for report in found):
            self.cloud.say(f"{self.launch.name} is not running.")
        while any(report.state == "running" for report in found):
            time.sleep(self.watch.poll / 10)
            found = self.reports()
        verdict = self._judged(found)
        self.cloud.say(
            f"{self.launch.name}: {verdict.value}. The machine is still there, and costs: delete it if not needed."
        )
        return verdict

    def run(self) -> int:
        """Brings the recipe to its end: makes the machine, installs, starts, and starts again after every loss.

        Returns:
          The exit status: 0 if the recipe is finished, 75 if it was stopped on purpose, 1 if it failed.

        Raises:
          GcloudError: gcloud refuses.
          GaveUpError: hosts are lost or out of reach too often in a row.
          ValueError: the hosts run something else.
        """
        self.cloud.say(f"{self.launch.name}: {self.launch.release}, launch {self.launch.digest}.")
        failures = looks = mixed = 0
        first = True  # What an earlier `run` left stopped or failed is started again, what this one sees is not.
        while True:
            try:
                self._activate()
                found = self.reports()
                verdict = judge(found, self.launch.digest)
                if verdict is Verdict.RUNNING:
                    looks += 1
                    if looks == 1:
                        attempts = max(report.attempt for report in found)
                        self.cloud.say(f"{counted(len(found), 'host')} running, attempt {attempts}.")
                    failures = 0 if looks >= self.watch.steady else failures
                    mixed = mixed + 1 if any(report.state != "running" for report in found) else 0
                    if mixed > self.watch.straggling:
                        self.cloud.say("Some hosts have ended and the others go on without them: killing those.")
                        self.reports("kill_all")
                        mixed = 0
                elif verdict is Verdict.FINISHED:
                    self.cloud.say(f"{self.launch.name}: finished.")
                    return 0
                elif verdict is Verdict.NEW or verdict is Verdict.AGAIN or first:
                    if verdict is Verdict.AGAIN and not any(report.status == STOPPED for report in found):
                        failures += 1
                        self._give_up_after(failures, f"Hosts were lost or killed: {_states(found)}.")
                    if not self._start(found, verdict, even_if_stopped=first):
                        return self._stopped()
                    looks = mixed = 0
                elif verdict is Verdict.STOPPED:
                    return self._stopped()
                else:
                    self.cloud.say(f"{self.launch.name}: failed: {_states(found)}.")
                    self._last_words()
                    return 1
                first = False
            except GcloudError as error:
                # On a host that is being taken away, everything fails; whether it was is asked at the next turn.
                # Before anything was started, an error such as no quota, or a release that pip does not find, is final.
                if first and self._is_final(error):
                    raise
                failures += 1
                self._give_up_after(failures, str(error))
                self.cloud.say(str(error))
                looks = 0
            time.sleep(self.watch.poll)

    def _stopped(self) -> int:
        self.cloud.say(f"{self.launch.name}: stopped, as asked; the same command goes on.")
        return STOPPED

    def _is_final(self, error: GcloudError) -> bool:
        """Whether an error will not pass, and is not one of a machine that is being taken away."""
        try:
            return not error.transient and self.state() in (None, "ACTIVE")
        except GcloudError as another:
            return not another.transient

    def settle(self, delete: bool) -> None:
        """Deletes the machine after `run` raised an error, if no host runs anything; or says that it still costs.

        Args:
          delete: whether to delete it at all.
        """
        try:
            state = self.state()
            if state is None:
                return
            if delete and not (state == "ACTIVE" and any(report.state == "running" for report in self.reports())):
                self.delete()
                return
            why = "its hosts are running" if delete else "without --delete_at_end it is kept"
        except GcloudError as error:
            why = str(error)
        self.cloud.say(f"The machine of {self.launch.name} may still be there, and costs ({why}): see `delete`.")

    def _give_up_after(self, failures: int, why: str) -> None:
        if failures > self.watch.failures:
            raise GaveUpError(f"Giving up after {counted(failures, 'failure')} in a row. {why}")

    def _start(self, found: list[Report], verdict: Verdict, even_if_stopped: bool) -> bool:
        """Installs and starts; returns False, and starts nothing, if a stop was asked for on a machine that is gone."""
        again = "" if verdict is Verdict.NEW else f" (it was: {_states(found)})"
        self.cloud.say(f"Installing and starting on {counted(len(found), 'host')}{again}.")
        with script_file(self.launch) as script:
            self.cloud.call(gcloud.copy(self.launch, script), LONG)
        installed = self.reports("install")
        if not even_if_stopped and any(report.asked for report in installed):
            return False
        self.reports("start", max(report.attempt for report in found) + 1)
        return True

    def _activate(self) -> None:
        """Waits until there is a machine; makes it, if there is none or it was taken away."""
        said = None
        while (state := self.state()) != "ACTIVE":
            if state is None:
                self.create()
            elif state in ("SUSPENDED", "FAILED"):
                if state == "FAILED" and said is not None:
                    raise GcloudError(f"The request for {self.launch.name} failed; `gcloud ... describe` says why.")
                self.cloud.say(f"The machine is gone ({state}): deleting what is left, and queueing it again.")
                self.delete()
                self.create()
            elif state != said:
                self.cloud.say(f"{self.launch.name}: {state}, waiting.")
            said = state
            time.sleep(self.watch.poll)

    def _last_words(self) -> None:
        with contextlib.suppress(GcloudError):
            print(self.cloud.call(gcloud.ssh(self.launch, "log", 20, node="0", worker="0"), LONG), end="")


def _states(found: list[Report]) -> str:
    """How many hosts are in which state."""
    states = Counter(r.state if r.status is None else f"ended with exit status {r.status}" for r in found)
    return ", ".join(f"{counted(number, 'host')} {state}" for state, number in sorted(states.items()))
