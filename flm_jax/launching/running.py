"""`run`: brings the recipe of a launch to its end, through preemptions, lost hosts and lost connections.

What an earlier `run` has left, stopped or failed, is started again once; what this one sees stopped or failed is not.
"""

from __future__ import annotations

import contextlib
import time

from flm_jax.launching import gcloud
from flm_jax.launching.described import GONE, Request
from flm_jax.launching.gcloud import LONG
from flm_jax.launching.host import Report
from flm_jax.launching.messages import GcloudError, RequestFailedError, may_pass
from flm_jax.launching.tpu import Tpu, script_file
from flm_jax.launching.verdict import STOPPED, Verdict, judge, states
from flm_jax.records.wording import counted

_LOOKS_AT_LOST = 2  # in a row, at which a slice is lost though its request is active, before all is made again
# After some failures in a row `run` waits longer, up to so many times as long, so that it outlives an outage of hours
# of the network here, while the hosts go on.
_SOON, _LONGEST_WAIT = 3, 30


def run_to_end(machine: Tpu) -> int:
    """Brings the recipe to its end: makes the machine, installs, starts, and starts again after every loss.

    Returns:
      The exit status: 0 if the recipe is finished, 75 if it was stopped or the machine deleted on purpose, 1 if it
      failed.

    Raises:
      GcloudError: gcloud refuses.
      GaveUpError: hosts are lost or out of reach too often in a row.
      ValueError: the hosts run something else.
    """
    keeper = Keeper(machine)
    try:
        return keeper.to_end()
    except KeyboardInterrupt:
        machine.cloud.say(keeper.left())
        raise


class Keeper:
    """One call of `run`, and what it has seen so far."""

    def __init__(self, machine: Tpu) -> None:
        self.machine, self.launch, self.watch = machine, machine.launch, machine.watch
        self.name, self.say = machine.launch.name, machine.cloud.say
        self.failures = 0  # in a row
        self.looks = 0  # at a running launch, one after the other
        self.mixed = 0  # looks at which some hosts ran and others did not
        self.first = True  # nothing was started here, nor seen to run
        # Whether a stop that hosts report is one of this `run`; None: not known before the first look.
        self.heeds: bool | None = None
        self.forgotten = False  # what was asked for before this `run`
        self.seen = False  # a machine, or a request for one
        self.deleting = False  # it is this `run` that deletes it, to make another
        self.counted = False  # its hosts
        self.asked = False  # for a machine, by this `run`
        self.queued = False  # the present request was made here, and has not failed yet
        self.watched = False  # a machine was there since this `run` began
        self.started = False  # the training program, here, or it was seen to run
        self.lost = 0  # looks in a row at which a slice was lost

    def to_end(self) -> int:
        """As `run_to_end`."""
        self.say(f"{self.name}: {self.launch.release}, launch {self.launch.digest}.")
        while True:
            try:
                if not self._activate():
                    self.say(f"{self.name}: was deleted; nothing is queued again. The same command begins again.")
                    return STOPPED
                if (status := self._look()) is not None:
                    return status
                self.first = False
            except GcloudError as error:
                # On a host that is being taken away, everything fails; whether it was is asked at the next turn.
                # Before anything was started, an error such as no quota, or a release that pip does not find, is final.
                if self.first and self.is_final(error):
                    raise
                self._failed(str(error))
                self.say(str(error))
                self.looks = 0
                self._look_for_lost_slices()
                time.sleep(self.watch.poll * min(2 ** max(self.failures - _SOON, 0), _LONGEST_WAIT))
            else:
                time.sleep(self.watch.poll)

    def left(self) -> str:
        """What goes on, and costs, when this program ends here."""
        if self.started:
            return "The hosts go on without this program; the same command watches them again."
        if self.counted:
            return (
                f"The machine of {self.name} is there, and costs, though nothing runs on it yet: the same command goes "
                "on, `delete` deletes it."
            )
        if self.seen or self.asked:
            return (
                f"The request for {self.name} stays, and a machine costs from when it is there, although nothing runs "
                "on it: the same command goes on, `stop` withdraws the request."
            )
        return f"Interrupted before anything was done for {self.name}."

    def _look(self) -> int | None:
        """Does what the reports of all hosts call for; returns the exit status, if it is the end."""
        found = self.machine.reports()
        verdict = judge(found, self.launch.digest)
        if verdict is Verdict.RUNNING:
            self._watch(found)
        elif verdict is Verdict.FINISHED:
            self.say(f"{self.name}: finished.")
            return 0
        elif verdict is Verdict.STOPPED and self.heeds:
            return self._stopped()
        elif verdict is Verdict.NEW or verdict is Verdict.AGAIN or self.first:
            if verdict is Verdict.AGAIN and not any(report.status == STOPPED for report in found):
                self._failed(f"Hosts were lost or killed: {states(found)}.")
            if not self._start(found, verdict):
                return self._stopped()
            self.looks = self.mixed = 0
        else:
            self.say(f"{self.name}: failed: {states(found)}.")
            with contextlib.suppress(GcloudError):
                words = gcloud.ssh(self.launch, "log", 20, node="0", worker="0")
                print(self.machine.cloud.call(words, LONG), end="")
            return 1
        return None

    def _watch(self, found: list[Report]) -> None:
        self.heeds = self.started = True
        self.looks += 1
        if self.looks == 1:
            attempt = max(report.attempt for report in found)
            self.say(f"{counted(len(found), 'host')} running, attempt {attempt}.")
        self.failures = 0 if self.looks >= self.watch.steady else self.failures
        self.mixed = self.mixed + 1 if any(report.state != "running" for report in found) else 0
        if self.mixed > self.watch.straggling:
            self.say("Some hosts have ended and the others go on without them: killing those.")
            self.machine.reports("kill_all")
            self.mixed = 0

    def _stopped(self) -> int:
        self.say(f"{self.name}: stopped, as asked; the same command goes on.")
        return STOPPED

    def _failed(self, why: str) -> None:
        self.failures += 1
        self.machine.give_up_after(self.failures, why)

    def is_final(self, error: GcloudError) -> bool:
        """Whether an error will not pass, and is not one of a machine that is being taken away."""
        if isinstance(error, RequestFailedError) or error.transient:
            return not error.transient
        try:
            state = self.machine.state()
            # A slice may be lost before the request says so.
            return state is None or (state == "ACTIVE" and all(node.ready for node in self.machine.nodes()))
        except GcloudError as another:
            return not another.transient

    def _look_for_lost_slices(self) -> None:
        """Counts looks at which a slice cannot come back, though the request says that all are there."""
        lost: list[str] = []
        with contextlib.suppress(GcloudError):
            if self.machine.state() == "ACTIVE":
                lost = [str(node) for node in self.machine.nodes() if node.lost]
        self.lost = self.lost + 1 if lost else 0
        if lost:
            self.say(f"{'; '.join(lost)}.")

    def _start(self, found: list[Report], verdict: Verdict) -> bool:
        """Installs and starts; returns False, and starts nothing, if a stop was asked of this `run`."""
        again = "" if verdict is Verdict.NEW else f" (it was: {states(found)})"
        self.say(f"Installing and starting on {counted(len(found), 'host')}{again}.")
        with script_file(self.launch) as script:
            self.machine.cloud.call(gcloud.copy(self.launch, script), LONG)
        if self.first and not self.forgotten:
            self.machine.reports("forget")
            self.forgotten = self.heeds = True
        if any(report.asked for report in self.machine.reports("install")):
            return False
        self.started = True
        started = self.machine.reports("start", max(report.attempt for report in found) + 1)
        return any(report.state == "running" for report in started) or not any(report.asked for report in started)

    def _activate(self) -> bool:
        """Waits until there is a machine; makes it, if there is none or it was taken away.

        Returns:
          Whether there is one. If somebody has deleted it, or the request for it, none is made in its place.
        """
        said, missed = None, False
        while (request := self._request()) is None or request.state != "ACTIVE" or self.lost >= _LOOKS_AT_LOST:
            state = None if request is None else request.state
            if request is None and self.seen and not self.deleting:
                if missed:  # twice, because what was just made may not be shown at once
                    return False
                missed = True
            elif request is None:
                self._create()
            elif request.by_user and self.watched and state == "SUSPENDED":
                self.say(f"{self.name}: a user, and not Google Cloud, has suspended the machine.")
                return False
            elif request.state in (*GONE, "ACTIVE"):
                if state == "FAILED" and (said is not None or self.queued):
                    self.queued = False
                    raise self._refusal(request)
                gone = "a slice is lost" if state == "ACTIVE" else state
                self.say(f"The machine is gone ({gone}): deleting what is left, and queueing it again.")
                if not self._delete():
                    return False
                self._create()
            elif state != said:
                self.say(f"{self.name}: {state}, waiting.")
            missed = missed and state is None
            said = state
            time.sleep(self.watch.poll)
        self.watched = True
        if not self.counted:
            self.machine.count_hosts()
            self.counted = True
        return True

    def _refusal(self, request: Request) -> RequestFailedError:
        """The error of a request that failed while it was waited for."""
        why = request.why or "`gcloud compute tpus queued-resources describe` may say why"
        return RequestFailedError(f"The request for {self.name} failed: {why}", may_pass(request.code, request.why))

    def _request(self) -> Request | None:
        request = self.machine.request()
        if self.heeds is None:  # on a machine that was not there yet nobody can have asked for a stop before
            self.heeds = request is None or request.state != "ACTIVE"
        self.seen = self.seen or request is not None
        return request

    def _create(self) -> None:
        self.asked = True  # a command that fails, or is interrupted, may have arrived
        self.machine.create()
        self.seen, self.queued = True, True
        self.deleting, self.counted, self.lost = False, False, 0

    def _delete(self) -> bool:
        """Deletes what is left of a machine; returns False if somebody else has done so, who wants no other."""
        self.deleting = True
        try:
            self.machine.delete()
        except GcloudError as error:
            if not error.missing:
                raise
            return False
        return True
