"""What the reports of all hosts amount to: running, finished, to be started again, stopped, failed."""

from __future__ import annotations

import enum
from collections import Counter

from flm_jax.launching.host import NOTHING, Report
from flm_jax.records.wording import counted

STOPPED = 75  # the exit status of a run that saved its state and goes on when it is started again
STALLED = 79  # that of a process that hung, and that its watchdog ended
LOST = 80  # that of a process that ends because another one is gone
ABORTED = 134  # that of one that JAX has ended because another one is gone


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
    if len(started) == len(found) and all(report.status == 0 for report in found):
        return Verdict.FINISHED
    # Hosts may be asked before there is anything to stop; what was asked of another launch there does not count.
    if any(report.asked for report in found if report.launch in (digest, NOTHING)):
        return Verdict.STOPPED
    if not started:
        return Verdict.NEW
    # A host that was lost takes the others with it: they end with 1, and only the lost one tells why. Statuses from 128
    # on are those of signals.
    lost = any(report.state != "ended" for report in found)
    if lost or any(report.status in (STOPPED, STALLED, LOST) or (report.status or 0) >= 128 for report in found):
        return Verdict.AGAIN
    return Verdict.FAILED


def states(found: list[Report]) -> str:
    """How many hosts are in which state."""
    states = Counter(r.state if r.status is None else f"ended with exit status {r.status}" for r in found)
    return ", ".join(f"{counted(number, 'host')} {state}" for state, number in sorted(states.items()))
