"""What one does with the machine of a launch on TPU VMs: create, status, logs, stop, delete.

Nothing is remembered here between two commands. What there is to know is asked: Google Cloud knows the machine, and
each host knows its last attempt. So `run` (in `running`) may be interrupted and given again, from anywhere.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flm_jax.files import atomic_write
from flm_jax.launching import gcloud, host, messages
from flm_jax.launching.described import Node, Request, node_of, request_of
from flm_jax.launching.description import Launch
from flm_jax.launching.gcloud import LONG, LONGEST, Gcloud
from flm_jax.launching.host import Report
from flm_jax.launching.messages import GcloudError
from flm_jax.launching.verdict import Verdict, judge
from flm_jax.records.wording import counted


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


@contextlib.contextmanager
def script_file(launch: Launch) -> Iterator[str]:
    """A context manager that gives the name of a file with the hosts' script."""
    with tempfile.TemporaryDirectory(prefix="flm_launch_") as folder:
        path = Path(folder) / host.script_name(launch)
        atomic_write(path, host.script(launch))
        yield str(path)


@dataclass
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
    _fewest: int = field(default=0, init=False)  # hosts that must answer, as Google Cloud counts them; 0: not asked yet

    def request(self) -> Request | None:
        """The queued resource; None: there is none."""
        try:
            return request_of(self.cloud.call(gcloud.describe(self.launch)))
        except GcloudError as error:
            if error.missing:
                return None
            raise

    def state(self) -> str | None:
        """The state of the queued resource; None: there is none."""
        request = self.request()
        return None if request is None else request.state

    def nodes(self) -> list[Node]:
        """All slices, also those that are missing; none where their number is not known.

        Raises:
          GcloudError: gcloud failed.
        """
        found = []
        for name in gcloud.node_names(self.launch):
            try:
                found.append(node_of(name, self.cloud.call(gcloud.describe_node(self.launch, name))))
            except GcloudError as error:
                if not error.missing:
                    raise
                found.append(Node(name, "MISSING"))
        return found

    def create(self) -> None:
        """Queues the machine; the request waits until there is one.

        Raises:
          GcloudError: it is refused, or exists already.
        """
        self.cloud.give(gcloud.create(self.launch), gcloud.QUICK, lambda error: error.exists)
        self.cloud.say(f"Queued {self.launch.name}: {self._machine()}.")

    def _machine(self) -> str:
        launch = self.launch
        several = f"{counted(launch.slices, 'slice')} of " if launch.slices > 1 else ""
        return f"{several}{launch.accelerator}{', spot' if launch.spot else ''}, in {launch.zone}"

    def delete(self) -> None:
        """Deletes the machine and everything on its disks, or the request for it.

        Raises:
          GcloudError: it is refused, or there is none.
        """
        self.cloud.give(gcloud.delete(self.launch), LONG, lambda error: error.missing)
        self.cloud.say(f"Deleted {self.launch.name}.")

    def count_hosts(self) -> None:
        """Asks Google Cloud how many hosts there are, all of which must answer from then on.

        Says in a sentence if the topology has another number, or a slice cannot be used. If it cannot be asked, the
        topology's number holds.
        """
        launch = self.launch
        if launch.machine is None:
            return
        try:
            nodes = self.nodes()
        except GcloudError as error:
            self.cloud.say(f"{error} That all hosts answer is checked by the number that the topology has.")
            return
        if unusable := [str(node) for node in nodes if not node.ready]:
            self.cloud.say(f"Not all of {launch.name} can be used: {'; '.join(unusable)}.")
        if not all(node.hosts for node in nodes):
            self.cloud.say(
                "Google Cloud does not say how many hosts there are: the number that the topology has holds."
            )
            return
        counted_there = sum(node.hosts for node in nodes)
        self._fewest = max(counted_there, launch.fewest_hosts)
        if not launch.fewest_hosts <= counted_there <= launch.machine.hosts:
            self.cloud.say(
                f"{launch.name} has {counted(counted_there, 'host')}, and {launch.machine.name} would have "
                f"{launch.machine.hosts}: give the --topology and --slices that the machine was made with; the plan "
                "was for another one."
            )

    def reports(self, *words: object) -> list[Report]:
        """What all hosts report, after the command of the hosts' script that `words` are, or without one.

        Raises:
          GcloudError: a command failed on a host, or hosts did not answer.
        """
        found, errors = self._answers(*(words or ("status",)))
        self._check_all(found, errors)
        return found

    def _answers(self, *words: object) -> tuple[list[Report], str]:
        """The reports of the hosts that answer, and what gcloud printed to stderr."""
        limit = LONGEST if words == ("install",) else LONG
        output, errors = self.cloud.both(gcloud.ssh(self.launch, *words), limit, attempts=2)
        return host.reports(output), errors

    def _check_all(self, found: list[Report], errors: str) -> None:
        # gcloud leaves out slices that it cannot reach, and all hosts if the ssh agent lacks the key, and exits with 0.
        fewest = self._fewest or self.launch.fewest_hosts
        if len(found) < fewest:
            why = f": {said}" if (said := messages.warnings(errors)) else "."
            raise GcloudError(
                f"{len(found)} of {counted(fewest, 'host')} of {self.launch.name} answered{why}",
                transient=not messages.lacks_key(errors),
            )

    def status(self) -> Verdict | None:
        """Prints the state of the machine and of every host; what that amounts to, if there is a machine.

        Raises:
          GcloudError: gcloud failed, or hosts did not answer; what the others report is printed before.
        """
        request = self.request()
        if request is None:
            self.cloud.say(f"There is no queued resource {self.launch.name} in {self.launch.zone}.")
            return None
        self.cloud.say(f"{self.launch.name}: {request.state}{f': {request.why}' if request.why else ''}")
        if request.state != "ACTIVE":
            return None
        self.count_hosts()
        found, errors = self._answers("status")
        for report in found:
            ended = f" with exit status {report.status}" if report.status is not None else ""
            asked = ", asked to stop" if report.asked else ""
            self.cloud.say(f"  {report.host}: {report.state}{ended}, attempt {report.attempt}{asked}")
        self._check_all(found, errors)
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
            self.give_up_after(lost, f"The log of {self.launch.name} cannot be followed.")
            if self.state() != "ACTIVE":
                raise GcloudError(f"The machine of {self.launch.name} is not active any more.")
            self.cloud.say("The connection was lost; following again, from the end of the log.")
            time.sleep(self.watch.poll / 10)
            lines = 0

    def give_up_after(self, failures: int, why: str) -> None:
        """Raises GaveUpError after more failures in a row than the watch allows; `why` is the last one."""
        if failures > self.watch.failures:
            raise GaveUpError(f"Giving up after {counted(failures, 'failure')} in a row. {why}")

    def stop(self) -> Verdict | None:
        """Asks the run to save and to stop, and waits until it has; where the machine is queued, deletes the request.

        Returns:
          What the hosts' reports amount to; None if there is no machine, and none is queued any more.

        Raises:
          GcloudError: gcloud refuses, or the hosts do not answer.
        """
        while self._there_or_withdrawn():
            try:
                return self._stopped()
            except GcloudError:
                if self.state() == "ACTIVE":  # otherwise it was just taken away, and `run` may queue it again
                    raise
        self.cloud.say(f"{self.launch.name}: nothing is queued and nothing runs.")
        return None

    def _stopped(self) -> Verdict:
        """Asks the hosts to stop, and waits until they have."""
        self.count_hosts()
        found = self.reports("stop")
        if not any(report.state == "running" for report in found):
            self.cloud.say(f"{self.launch.name} is not running; a `run` that was about to start it does not.")
        while any(report.state == "running" for report in found):
            time.sleep(self.watch.poll / 10)
            found = self.reports()
        verdict = self._judged(found)
        self.cloud.say(
            f"{self.launch.name}: {verdict.value}. The machine is still there, and costs: delete it if not needed."
        )
        return verdict

    def _there_or_withdrawn(self) -> bool:
        """Whether there is a machine; if not, its request is deleted, so that none comes later."""
        gone: float | None = None  # since when there is nothing
        patience = 2 * self.watch.poll  # a `run` may be between deleting what was taken away and queueing it again
        while (state := self.state()) != "ACTIVE":
            if state is not None:
                gone = None
            elif gone is None:
                gone = time.monotonic()
                self.cloud.say(
                    f"There is no queued resource {self.launch.name} in {self.launch.zone}; looking for "
                    f"{patience:g} s whether a `run` queues one."
                )
            elif time.monotonic() - gone > patience:
                return False
            if state not in (None, "DELETING", "SUSPENDING"):
                self.cloud.say(f"{self.launch.name}: {state}, without a machine: withdrawing the request for one.")
                try:
                    self.delete()
                except GcloudError as error:
                    if not error.missing:  # a `run` has deleted it, and queues it again
                        raise
            time.sleep(self.watch.poll / 10)
        return True
