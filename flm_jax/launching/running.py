"""`run`: brings the recipe of a launch to its end, through preemptions, lost hosts and lost connections.

What an earlier `run` has left, stopped or failed, is started again once; what this one sees stopped or failed is not.
"""

from __future__ import annotations

import contextlib
import time

from flm_jax.launching import gcloud
from flm_jax.launching.gcloud import LONG, GcloudError
from flm_jax.launching.host import Report
from flm_jax.launching.tpu import Tpu, script_file
from flm_jax.launching.verdict import STOPPED, Verdict, judge, states
from flm_jax.records.wording import counted


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
    return Keeper(machine).to_end()


def settle(machine: Tpu, delete: bool) -> None:
    """Deletes the machine after `run` raised an error, if no host runs anything; or says that it still costs.

    Args:
      machine: of the launch.
      delete: whether to delete it at all.
    """
    name = machine.launch.name
    try:
        state = machine.state()
        if state is None:
            return
        if delete and not (state == "ACTIVE" and any(report.state == "running" for report in machine.reports())):
            machine.delete()
            return
        why = "its hosts are running" if delete else "without --delete_at_end it is kept"
    except GcloudError as error:
        why = str(error)
    machine.cloud.say(f"The machine of {name} may still be there, and costs ({why}): see `delete`.")


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
            time.sleep(self.watch.poll)

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
        self.heeds = True
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
        try:
            return not error.transient and self.machine.state() in (None, "ACTIVE")
        except GcloudError as another:
            return not another.transient

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
        started = self.machine.reports("start", max(report.attempt for report in found) + 1)
        return any(report.state == "running" for report in started) or not any(report.asked for report in started)

    def _activate(self) -> bool:
        """Waits until there is a machine; makes it, if there is none or it was taken away.

        Returns:
          Whether there is one. If somebody has deleted it, or the request for it, none is made in its place.
        """
        said, missed = None, False
        while (state := self._state()) != "ACTIVE":
            if state is None and self.seen and not self.deleting:
                if missed:  # twice, because what was just made may not be shown at once
                    return False
                missed = True
            elif state is None:
                self._create()
            elif state in ("SUSPENDED", "FAILED"):
                if state == "FAILED" and said is not None:
                    raise GcloudError(f"The request for {self.name} failed; `gcloud ... describe` says why.")
                self.say(f"The machine is gone ({state}): deleting what is left, and queueing it again.")
                if not self._delete():
                    return False
                self._create()
            elif state != said:
                self.say(f"{self.name}: {state}, waiting.")
            missed = missed and state is None
            said = state
            time.sleep(self.watch.poll)
        if not self.counted:
            self.machine.count_hosts()
            self.counted = True
        return True

    def _state(self) -> str | None:
        state = self.machine.state()
        if self.heeds is None:  # on a machine that was not there yet nobody can have asked for a stop before
            self.heeds = state != "ACTIVE"
        self.seen = self.seen or state is not None
        return state

    def _create(self) -> None:
        self.machine.create()
        self.seen, self.deleting, self.counted = True, False, False

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
