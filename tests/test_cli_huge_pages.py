"""Programs that compute start again with huge pages where the kernel gives them to who asks, and only there."""

import os
import subprocess
import sys

import pytest

from flm_jax.cli import huge_pages
from tests.environment import as_user

MADVISE, ALWAYS = "always [madvise] never\n", "[always] madvise never\n"
ASKED = "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("given", "libc", "kernel", "expected"),
    [
        ("", "glibc 2.36", MADVISE, ASKED),
        ("glibc.malloc.check=1", "glibc 2.35", MADVISE, f"glibc.malloc.check=1:{ASKED}"),
        ("glibc.malloc.hugetlb=0", "glibc 2.36", MADVISE, None),
        ("", "glibc 2.36", ALWAYS, None),
        ("", "glibc 2.34", MADVISE, None),
        ("", "", MADVISE, None),
    ],
    ids=["asked", "beside another", "the user's choice", "given to all", "too old", "another C library"],
)
def test_the_tunable_is_set_where_it_does_something(given, libc, kernel, expected):
    assert huge_pages.tunables(given, libc, kernel) == expected


def test_a_process_that_has_imported_jax_goes_on(monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *given: pytest.fail("started again"))
    assert "jax" in sys.modules
    huge_pages.restart()


@pytest.mark.integration
def test_the_program_starts_again_once_with_its_arguments(tmp_path):
    kernel = tmp_path / "enabled"
    kernel.write_text(MADVISE)
    program = (
        "import os, pathlib, sys; from flm_jax.cli import huge_pages; print('start', sys.argv[1:], flush=True);"
        f"huge_pages.KERNEL = pathlib.Path({str(kernel)!r}); huge_pages.restart(); print(os.environ['GLIBC_TUNABLES'])"
    )
    environment = {k: v for k, v in as_user().items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", program, "--a=1 2"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["start ['--a=1 2']"] * 2 + [ASKED], done.stderr
