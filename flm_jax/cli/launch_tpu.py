r"""Launch a recipe on TPU VMs and keep it running until it is finished, or write it as a job for another launcher.

  python experiments/launch_tpu.py run --name=tele-flm --topology=v5p-2048 --zone=us-east5-a --spot \
      --gin_file=gin_configs/recipes/tele_flm_1t.gin --nfs=10.0.0.2:/vol1=/shared --workdir=/shared/tele-flm

The first argument says what to do: create (queue the machine), run (create it if there is none, install, start, start
again after a preemption, until the recipe is finished), status, logs, stop (with a save), delete, write (a manifest:
--format=slurm, jobset or skypilot). Before a machine is created, the plan of the recipe on it is shown. --dry_run
prints the commands and needs no gcloud. Flags can be kept in a file: --flagfile=FILE. See docs/launch.md.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags

from flm_jax.cli.flags import STOPPED, begun, define_assumptions, define_gin, launch, refuse

if TYPE_CHECKING:
    from flm_jax.launching.description import Launch

_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")  # in names of variables
MAKES = ("create", "run")  # actions that may create a machine
ACTIONS = (*MAKES, "status", "logs", "stop", "delete", "write")


def define() -> None:
    """Defines the flags."""
    flags.DEFINE_enum("action", None, ACTIONS, "What to do; or the first argument.")
    flags.DEFINE_string("name", None, "The launch: its queued resource and its nodes, or its job.")
    flags.DEFINE_string("topology", None, "A machine, such as v5p-2048, 2xv5e-256 or, for write, h100-64.")
    flags.DEFINE_integer("slices", None, "Number of slices of that topology.", lower_bound=1)
    flags.DEFINE_string("zone", None, "The zone of the TPU, such as us-east5-a.")
    flags.DEFINE_bool("any_zone", False, "Take a zone that is not known to have such TPUs.")
    flags.DEFINE_string("project", None, "The project of Google Cloud; by default gcloud's.")
    flags.DEFINE_bool("spot", False, "A machine that costs less and may be taken away at any time.")
    define_gin("Recipe.seed = 1")
    flags.DEFINE_string("workdir", None, "The work directory: an absolute path, on a file system that all hosts share.")
    flags.DEFINE_string("nfs", None, "What every host mounts, such as 10.0.0.2:/vol1=/shared.")
    flags.DEFINE_string(
        "release",
        None,
        "What is installed: flm_jax==VERSION, git+https://...@TAG_OR_COMMIT, or a wheel's absolute path; by default "
        "the commit of this checkout.",
    )
    flags.DEFINE_list("extras", ["data"], "Parts to install besides that of the chip; data prepares text.")
    flags.DEFINE_string("constraints", None, "A file such as requirements.txt, whose versions pip must take.")
    flags.DEFINE_multi_string("env", [], "NAME=VALUE for the training program")
    flags.DEFINE_string("runtime_version", None, "The TPU software version; by default the usual one of the chip.")
    flags.DEFINE_multi_string("create_arg", [], "A further flag of gcloud's create, such as --reserved")
    flags.DEFINE_multi_string("ssh_arg", [], "A further flag of gcloud's ssh and scp, such as --internal-ip")
    flags.DEFINE_bool("dry_run", False, "Print the commands, and do nothing.")
    flags.DEFINE_bool(
        "plan", True, "Show the plan before a machine is created, and create none on which it does not fit."
    )
    define_assumptions()
    flags.DEFINE_float("poll", 60.0, "run, stop: seconds between two looks of `run`.", lower_bound=0.01)
    flags.DEFINE_integer("max_failures", 10, "run: losses in a row after which it gives up.", lower_bound=0)
    flags.DEFINE_bool("delete_at_end", False, "run: delete the machine when the recipe is finished or failed.")
    flags.DEFINE_string("node", "0", "logs: the slice; or all.")
    flags.DEFINE_string("worker", "0", "logs: the host in the slice; or all. Worker 0 of slice 0 says most.")
    flags.DEFINE_integer("lines", 50, "logs: how many lines.", lower_bound=0)
    flags.DEFINE_bool("follow", False, "logs: go on with what is added.")
    flags.DEFINE_enum(
        "format", "jobset", ["slurm", "jobset", "skypilot", "host"], "write: which; host: what gcloud copies."
    )
    flags.DEFINE_string("output", None, "write: the file; by default stdout.")
    flags.DEFINE_string("image", "python:3.12", "write --format=jobset: the image of the containers.")
    flags.DEFINE_integer("hours", 24, "write --format=slurm: the time limit of a job.", lower_bound=1)


def described(values: Any) -> Launch:
    """The launch that the flags describe; wrong ones are refused."""
    from flm_jax.launching import description, release

    action = values.action
    if action is None:
        refuse(f"say what to do: {', '.join(ACTIONS)}")
    makes = action in (*MAKES, "write")
    needed = ["name", *(["zone"] if action != "write" else [])]
    needed += ["topology", "workdir"] if makes else []
    if missing := [f"--{name}" for name in needed if values[name].value is None]:
        refuse(f"{action} needs {' and '.join(missing)}")
    if makes and not values.gin_file and not values.gin_bindings:
        refuse("give a recipe with --gin_file")
    try:
        description.check_name(values.name)
        description.check_env(tuple(values.env))
        nfs = description.nfs_of(values.nfs)
        machine = None
        if values.topology is not None:
            machine = description.machine_of(values.topology, values.slices)
            if action != "write" and not description.is_tpu(machine):
                raise ValueError(
                    f"{action} is for TPUs; for {values.topology} there is write --format=slurm or skypilot."
                )
        if values.zone is not None:
            description.check_zone(values.zone, machine, values.any_zone)
        if not makes:
            return description.Launch(
                values.name, machine, values.zone, values.project, nfs=nfs, ssh_args=tuple(values.ssh_arg)
            )
        assert machine is not None
        description.check_workdir(values.workdir, nfs)
        description.check_create_args(tuple(values.create_arg), nfs)
        package = Path(release.__file__).resolve().parents[2]
        pinned = values.release or release.of_checkout(package)
        constraints = values.constraints
        if constraints is None and values.release is None:
            constraints = package / "requirements.txt"  # of the same commit
        tpu = description.is_tpu(machine)
        names, files = _gin_files(values.gin_file)
        return description.Launch(
            name=values.name,
            machine=machine,
            zone=values.zone or "",
            project=values.project,
            spot=values.spot,
            release=release.requirement(pinned, ("tpu" if tpu else "cuda", *filter(None, values.extras))),
            constraints=release.constraint_lines(Path(constraints).read_text()) if constraints else (),
            workdir=values.workdir,
            gin_files=names,
            gin_bindings=tuple(values.gin_bindings),
            files=files,
            nfs=nfs,
            env=tuple(values.env),
            runtime=values.runtime_version or description.RUNTIMES.get(description.kind_of(machine)),
            create_args=tuple(values.create_arg),
            ssh_args=tuple(values.ssh_arg),
        )
    except (ValueError, OSError) as error:
        refuse(str(error))


def _gin_files(names: list[str]) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """The recipe's files by their names for the hosts, and name and text of all files that they include."""
    from flm_jax.cli import gin_reader

    package = Path(gin_reader.__file__).resolve().parents[1]
    given, found = gin_reader.files_of(names, (package.parent, package))
    return tuple(given), tuple((name, path.read_text()) for name, path in found.items())


def check_recipe(launch: Launch, values: Any) -> None:
    """Reads the recipe as the hosts will; what is wrong in it ends the program, before anything is written or made."""
    from flm_jax.cli.plan import simulate

    assert launch.machine is not None
    simulate(launch.machine, "none")
    from flm_jax.cli import configure
    from flm_jax.cli.errors import started

    with started():
        configure.parse(values.gin_file, values.gin_bindings)
        configure.configured(configure.train)
        configure.check_used()


def show_plan(launch: Launch, values: Any) -> None:
    """Prints the plan of the recipe on the machine, and its cost; exits with status 1 if it does not fit."""
    from flm_jax.cli.plan import simulate

    assert launch.machine is not None
    simulate(launch.machine, "none")
    from flm_jax.cli import runs

    assumed = (values.utilisation, values.storage * 1e9)
    recipe = values.gin_file, values.gin_bindings
    if not runs.run_plan(launch.machine, "none", *assumed, None, *recipe, values.price_per_chip_hour, only=()):
        _fail("The recipe does not fit on this machine, so nothing was created; --noplan creates it all the same.")
    print(flush=True)


def run(values: Any) -> None:
    """Does what the flags say."""
    described_launch = described(values)
    begun()
    with _told():
        _act(described_launch, values)


def _act(launch: Launch, values: Any) -> None:
    from flm_jax.launching import gcloud, host, manifests, tpu

    action = values.action
    if action == "write":
        check_recipe(launch, values)
        text = manifests.manifest(launch, values.format, values.image, values.hours)
        if values.output is None or values.dry_run:
            print(text, end="")
            return
        from flm_jax.files import atomic_write

        atomic_write(Path(values.output), text)
        secrets = [name for name in (one.partition("=")[0] for one in launch.env) if _SECRET.search(name)]
        told = f" It holds {' and '.join(secrets)} as it is: share it with nobody." if secrets else ""
        print(f"Written to {values.output}.{told}")
        return
    if values.dry_run:
        if action in MAKES:
            (show_plan if values.plan else check_recipe)(launch, values)
        script = host.script_name(launch)
        if action == "run":
            print(f"# {script} is printed by: write --format=host. Commands are given again where they fail.")
        log = (values.lines, *(["follow"] if values.follow else []))
        for words in gcloud.smooth_commands(launch, action, script, values.node, values.worker, log):
            print(shlex.join(words))
        return
    pause = min(5.0, values.poll / 6)
    cloud = gcloud.Gcloud(functools.partial(print, flush=True), pause=pause)
    machine = tpu.Tpu(launch, cloud, tpu.Watch(poll=values.poll, failures=values.max_failures))
    if action in MAKES:
        shown = values.plan and (action == "create" or machine.state() is None)
        (show_plan if shown else check_recipe)(launch, values)
    if action == "create":
        machine.create()
        print("It costs from when it is there, whether anything runs on it or not: `run` starts the recipe there.")
    elif action == "run":
        _run(machine, values.delete_at_end)
    elif action == "status":
        verdict = machine.status()
        print(f"{launch.name}: {verdict.value}" if verdict else f"{launch.name}: not running")
    elif action == "logs":
        machine.logs(values.node, values.worker, values.lines, values.follow)
    elif action == "stop":
        machine.stop()
    else:
        machine.delete()


def _run(machine: Any, delete_at_end: bool) -> None:
    from flm_jax.launching.ending import settle
    from flm_jax.launching.running import run_to_end

    try:
        status = run_to_end(machine)
    except (ValueError, OSError):
        settle(machine, delete_at_end)
        raise
    if status == STOPPED:
        settle(machine, False, kept="what was stopped goes on there")
    elif not settle(machine, delete_at_end, ended=True):
        sys.exit(status or 1)
    if status:
        sys.exit(status)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A context manager that prints errors of what is outside this program as one sentence, and exits with status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        _fail(str(error))


def _fail(what: str) -> NoReturn:
    print(f"error: {' '.join(what.split())}", file=sys.stderr)
    sys.exit(1)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run, positional="action")


if __name__ == "__main__":
    main()
