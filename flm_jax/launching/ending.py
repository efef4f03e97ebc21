"""What is left at the end of `run`: the machine is deleted, or it is said that it costs."""

from __future__ import annotations

from flm_jax.launching.described import GONE
from flm_jax.launching.messages import GcloudError
from flm_jax.launching.tpu import Tpu


def settle(machine: Tpu, delete: bool, ended: bool = False, kept: str = "without --delete_at_end it is kept") -> bool:
    """Deletes the machine, if no host runs anything, or says what still costs.

    Args:
      machine: of the launch.
      delete: whether to delete it at all.
      ended: whether it is known that no host runs anything.
      kept: why it is not deleted, if `delete` is false.

    Returns:
      Whether it was left as asked: false if it should be deleted, and may not be.
    """
    name, say = machine.launch.name, machine.cloud.say
    try:
        request = machine.request()
        if request is None:
            return True
        there = request.state == "ACTIVE"
        if delete and not (there and not ended and any(report.state == "running" for report in machine.reports())):
            machine.delete()
            return True
        if request.state in GONE:
            say(
                f"The request for {name} is {request.state}: it costs nothing, but counts against quotas: see `delete`."
            )
            return True
        if not there:
            say(
                f"The request for {name} is {request.state}: a machine costs from when it is there, although nothing "
                "runs on it: `stop` withdraws the request."
            )
            return True
        why = "its hosts are running" if delete else kept
    except GcloudError as error:
        why = str(error)
    say(f"The machine of {name} may still be there, and costs ({why}): see `delete`.")
    return not delete
