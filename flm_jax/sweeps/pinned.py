"""Starts a program on some cores: `python pinned.py CORES PARENT COMMAND...`; it imports nothing of the package.

CORES is such as 0,1. If PARENT, the process that starts it, dies, the program gets SIGTERM: a run then saves its state
and ends, rather than going on with nobody to see it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>; it stays over exec


def main(cores: str, parent: str, command: list[str]) -> None:
    """Becomes the command."""
    with contextlib.suppress(OSError, AttributeError):  # not on every system; the cores are then shared
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it died before that
            sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
