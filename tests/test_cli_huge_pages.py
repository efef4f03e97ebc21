"""Programs that compute start again with huge pages where the kernel gives them to who asks, and only there."""

import importlib
import importlib.machinery
import multiprocessing
import os
import subprocess
import sys
import types
from pathlib import Path

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


def module(file, spec=None):
    made = types.ModuleType("__main__")
    made.__spec__ = spec and importlib.machinery.ModuleSpec(spec, None)
    if file is not None:
        made.__file__ = file
    return made


@pytest.mark.parametrize(
    ("main", "expected"),
    [
        (module("/checkout/experiments/train.py"), True),
        (module("/env/bin/flm-train"), True),
        (module("/checkout/flm_jax/cli/train.py", "flm_jax.cli.train"), True),
        (module("/home/me/my_own.py"), False),
        (module(None), False),
        (module("/usr/lib/python3/pdb.py", "pdb"), False),
        (module("/env/ipykernel_launcher.py", "ipykernel_launcher"), False),
    ],
    ids=["script", "installed", "python -m", "a caller", "stdin", "a debugger", "a notebook"],
)
def test_only_the_projects_own_programs_start_again(main, expected):
    assert huge_pages.is_program(main) == expected


def test_a_traced_program_and_a_child_process_do_not(monkeypatch):
    main = module("/checkout/experiments/train.py")
    assert not huge_pages.is_program(main, trace=print)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "a process")
    assert not huge_pages.is_program(main)


@pytest.mark.parametrize("name", ["train", "evaluate", "generate", "select_sft"])
def test_programs_that_run_a_model_ask_for_it(name, monkeypatch):
    program = importlib.import_module(f"flm_jax.cli.{name}")
    given = {}
    monkeypatch.setattr(program, "launch", lambda *_, **options: given.update(options))
    program.main()
    assert given == {"computes": True}


@pytest.mark.integration
def test_the_program_starts_again_once_with_its_arguments(tmp_path):
    kernel, program = tmp_path / "enabled", tmp_path / "experiments" / "program.py"
    kernel.write_text(MADVISE)
    program.parent.mkdir()
    program.write_text(
        "import os, pathlib, sys; from flm_jax.cli import huge_pages; print('start', sys.argv[1:], flush=True)\n"
        f"huge_pages.KERNEL = pathlib.Path({str(kernel)!r}); huge_pages.restart(); print(os.environ['GLIBC_TUNABLES'])"
    )
    environment = {k: v for k, v in as_user().items() if k not in ("GLIBC_TUNABLES", huge_pages.MARK)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program), "--a=1 2"],
        env={**environment, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["start ['--a=1 2']"] * 2 + [ASKED], done.stderr
