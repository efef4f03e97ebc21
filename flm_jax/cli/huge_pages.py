"""Large buffers in huge pages on Linux, where the kernel gives them only to programs that ask (madvise).

XLA allocates the temporary memory of a step anew for every step. In pages of 4 kB, the first access to each page and
the misses of the address cache take about a tenth of a step on a CPU. glibc asks for huge pages if a tunable says so,
which it reads when a process starts: so the program starts itself again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import sys
from pathlib import Path
from types import ModuleType

TUNABLE = "glibc.malloc.hugetlb"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# The first version of glibc that has the tunable.
FIRST = (2, 35)
# In the environment of a program that was started again, so that no wrapper of Python makes it start for ever.
MARK = "FLM_JAX_HUGE_PAGES"


def tunables(given: str, libc: str, kernel: str) -> str | None:
    """The value of GLIBC_TUNABLES that makes malloc ask for huge pages; None: there is nothing to ask for.

    Args:
      given: the present value; a user's own choice of this tunable stays.
      libc: the C library and its version, such as "glibc 2.36".
      kernel: the kernel's setting, such as "always [madvise] never".
    """
    version = re.fullmatch(r"glibc (\d+)\.(\d+).*", libc)
    if version is None or (int(version[1]), int(version[2])) < FIRST:
        return None
    if TUNABLE in given or "[madvise]" not in kernel:
        return None
    return ":".join([*filter(None, [given]), f"{TUNABLE}=1"])


def asked() -> str | None:
    """`tunables` of this process and machine."""
    try:
        libc, kernel = os.confstr("CS_GNU_LIBC_VERSION") or "", KERNEL.read_text()
    except (ValueError, OSError):
        return None
    return tunables(os.environ.get("GLIBC_TUNABLES", ""), libc, kernel)


def is_program(main: ModuleType, trace: object = None) -> bool:
    """Whether `main` is one of this project's programs, started as such, and so can be started again.

    Notebooks, debuggers, profilers, children of multiprocessing, and programs that call a `main` of this package are
    not: they hold state that would be lost, or have read what they run from a stream.

    Args:
      main: the module `__main__`.
      trace: the function that traces or profiles this process, if one does.
    """
    module, file = getattr(main.__spec__, "name", ""), Path(getattr(main, "__file__", None) or "")
    ours = (
        module.startswith("flm_jax.cli.") or file.resolve().parent.name == "experiments" or file.name.startswith("flm-")
    )
    return ours and trace is None and multiprocessing.parent_process() is None and not hasattr(sys, "ps1")


def restart() -> None:
    """Starts this program again with huge pages, if they are there to be asked for; otherwise it returns.

    It must come before anything has been computed: the process keeps its number, arguments and streams, and nothing
    else. GLIBC_TUNABLES=glibc.malloc.hugetlb=0 in the environment turns it off.
    """
    trace = sys.gettrace() or sys.getprofile()
    if sys.platform != "linux" or "jax" in sys.modules or MARK in os.environ:
        return
    if not is_program(sys.modules["__main__"], trace):
        return
    value = asked()
    if value is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, "GLIBC_TUNABLES": value, MARK: "1"}
    with contextlib.suppress(OSError):  # without it the program is only slower
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
