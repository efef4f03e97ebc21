"""The description of a launch: machine, place, release, recipe. Commands, host script and manifests derive from it.

What Google Cloud calls things is written down here, with the page that it was taken from:

- accelerator types: https://cloud.google.com/tpu/docs/v5p and its neighbours (``v5litepod-16`` is called v5e-16 here)
- runtime versions: https://cloud.google.com/tpu/docs/runtimes
- zones: https://cloud.google.com/tpu/docs/regions-zones
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from dataclasses import dataclass

from flm_jax.planning.topology import Topology, topology

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
ZONES = {
    "v4": ("us-central2-b",),
    "v5e": ("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a", "europe-west4-b"),
    "v5p": ("us-central1-a", "us-east5-a", "europe-west4-b"),
    "v6e": ("us-central1-b", "us-east1-d", "us-east5-a", "us-east5-b", "europe-west4-a", "asia-northeast1-b"),
}
# Chips of the only chips whose slices of up to 8 may lie on one host or on two.
_ON_ONE_HOST = 8


@dataclass(frozen=True)
class Nfs:
    """A network file system that every host mounts: ``server:export`` on ``mount``."""

    server: str
    export: str
    mount: str


@dataclass(frozen=True)
class Launch:
    """A launch; `checked` makes one from what a user gives.

    Attributes:
      name: of the queued resource, of its nodes, and of the job in manifests.
      machine: all slices together; None: a launch that is only looked at.
      zone: the zone of the TPU; empty: a manifest that names none.
      project: the project to bill; None: gcloud's default.
      spot: whether the machine may be taken away at any time, for a lower price.
      release: what pip installs on every host, pinned (`release.requirement`).
      constraints: lines of a constraints file for pip.
      workdir: the work directory, an absolute path that is the same on every host.
      gin_files: the recipe, as names relative to the folder that holds `files`.
      gin_bindings: gin statements, after the files.
      files: name and text of every gin file that the recipe reads.
      nfs: what every host mounts; None: the work directory is there already.
      env: variables of the environment of the training program, as NAME=VALUE.
      runtime: the TPU software version; None: the usual one of the chip.
      create_args: further flags of `gcloud compute tpus queued-resources create`.
      ssh_args: further flags of every `ssh` and `scp` command of gcloud.
    """

    name: str
    machine: Topology | None
    zone: str
    project: str | None = None
    spot: bool = False
    release: str = ""
    constraints: tuple[str, ...] = ()
    workdir: str = ""
    gin_files: tuple[str, ...] = ()
    gin_bindings: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    nfs: Nfs | None = None
    env: tuple[str, ...] = ()
    runtime: str | None = None
    create_args: tuple[str, ...] = ()
    ssh_args: tuple[str, ...] = ()

    @property
    def slices(self) -> int:
        """Number of slices."""
        return self._known.slices

    @property
    def kind(self) -> str:
        """The chip's name, such as ``v5p``."""
        return kind_of(self._known)

    @property
    def accelerator(self) -> str:
        """One slice by Google Cloud's name."""
        number = self._known.devices // self.slices * self._known.chip.counts
        return f"{'v5litepod' if self.kind == 'v5e' else self.kind}-{number}"

    @property
    def fewest_hosts(self) -> int:
        """The least number of hosts that the machine can have; slices of 8 v5e or v6e may lie on one host or on two."""
        if self.machine is None:
            return 1
        a_slice = self.machine.devices // self.slices
        flat = len(self.machine.bounds) == 2
        return self.slices if flat and a_slice <= _ON_ONE_HOST else self.machine.hosts

    @property
    def _known(self) -> Topology:
        assert self.machine is not None, "the machine of this launch was not given"
        return self.machine

    @property
    def train_arguments(self) -> tuple[str, ...]:
        """The arguments of the training program, the same on every host."""
        return (
            *(f"--gin_file={name}" for name in self.gin_files),
            *(f"--gin_bindings={binding}" for binding in self.gin_bindings),
            f"--workdir={self.workdir}",
            "--distributed",
        )

    @property
    def digest(self) -> str:
        """Sixteen hex digits that differ for launches that run something else."""
        what = (self.release, self.constraints, self.train_arguments, self.files, self.nfs, self.env)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def kind_of(machine: Topology) -> str:
    """The name of a machine's chip, such as ``v5p``."""
    return machine.name.lower().replace("v5litepod", "v5e").split("x", 1)[-1].split("-")[0]


def is_tpu(machine: Topology) -> bool:
    """Whether a machine consists of TPUs."""
    return kind_of(machine) in RUNTIMES


def machine_of(name: str, slices: int | None) -> Topology:
    """The machine of a topology's name and a number of slices.

    Raises:
      ValueError: there is no such topology, or name and number differ.
    """
    found = topology(name)
    if slices is None:
        return found
    if found.slices not in (1, slices):
        raise ValueError(f"--topology={name} has {found.slices} slices, and --slices={slices}: give one of them.")
    return topology(f"{slices}x{name.lower().split('x', 1)[-1] if found.slices > 1 else name}" if slices > 1 else name)


def check_name(name: str) -> None:
    """Refuses a name that gcloud or Kubernetes would refuse.

    Raises:
      ValueError: it is one.
    """
    # Nodes of several slices are named NAME-0 and so on, which must fit in 63 characters too.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,55}[a-z0-9])?", name):
        raise ValueError(
            f"--name={name}: give 1 to 57 lower-case letters, digits and hyphens, which begin with a letter and do not "
            "end with a hyphen, such as tele-flm-1t; Google Cloud takes no others."
        )


def check_zone(zone: str, machine: Topology | None, anywhere: bool = False) -> None:
    """Refuses what is not the name of a zone, and a zone that has no such TPUs.

    Args:
      zone: such as us-east5-a.
      machine: what is wanted there; of GPUs, or without it, only the form of the name is checked.
      anywhere: whether to take every zone with a possible name, because the list here may be old.

    Raises:
      ValueError: there is no such zone, or it does not have these TPUs.
    """
    known = ZONES.get(kind_of(machine), ()) if machine is not None else ()
    if not re.fullmatch(r"[a-z]+-[a-z]+[0-9]+-[a-z0-9]+", zone):
        right = (
            f"{kind_of(machine)} is in {', '.join(known)}" if machine is not None and known else "such as us-east5-a"
        )
        raise ValueError(f"--zone={zone} is not the name of a zone; {right}.")
    if machine is not None and known and zone not in known and not anywhere:
        raise ValueError(
            f"--zone={zone}: Google Cloud offers {kind_of(machine)} in {', '.join(known)}; --any_zone takes {zone} all "
            "the same, if it is newer than this list."
        )


def check_workdir(workdir: str, nfs: Nfs | None) -> None:
    """Refuses a work directory that several hosts cannot share.

    Raises:
      ValueError: it is a bucket, not an absolute path, or not on the file system that hosts mount.
    """
    if re.match(r"[a-z0-9]+:/", workdir):
        raise ValueError(
            f"--workdir={workdir}: a work directory must lie on a POSIX file system, because a save is committed by "
            "renaming a directory and protected by a file lock, and a bucket has neither, mounted or not: use "
            "Filestore or another NFS, for example --nfs=10.0.0.2:/vol1=/shared --workdir=/shared/run."
        )
    if not re.fullmatch(r"(/[\w.+-]+)+", workdir) or posixpath.normpath(workdir) != workdir:
        raise ValueError(
            f"--workdir={workdir} must be an absolute path that is the same on every host, of letters, digits and "
            "._+-: for example /shared/run."
        )
    if nfs is not None and not f"{workdir}/".startswith(f"{nfs.mount}/"):
        raise ValueError(f"--workdir={workdir} is not below {nfs.mount}, where --nfs is mounted.")


def nfs_of(text: str | None) -> Nfs | None:
    """The file system that ``SERVER:/EXPORT=/MOUNT`` describes.

    Raises:
      ValueError: it is written otherwise.
    """
    if not text:
        return None
    match = re.fullmatch(r"([A-Za-z0-9.-]+):(/[\w./-]*)=(/[\w./-]+)", text)
    if not match or match[3] == "/":
        raise ValueError(f"--nfs={text} must be SERVER:/EXPORT=/MOUNT, such as 10.0.0.2:/vol1=/shared.")
    return Nfs(match[1], match[2], match[3].rstrip("/"))


def check_create_args(create_args: tuple[str, ...], nfs: Nfs | None) -> None:
    """Refuses metadata that cannot be joined with that of a machine which mounts a file system.

    Raises:
      ValueError: it is not written as --metadata=KEY=VALUE,KEY=VALUE, or given twice.
    """
    given = [one for one in create_args if re.match(r"--metadata(=|$)", one)]
    if nfs is not None and (len(given) > 1 or not all(re.match(r"--metadata=[\w-]+=", one) for one in given)):
        raise ValueError(
            f"--create_arg={given[-1]}: with --nfs give one --create_arg=--metadata=KEY=VALUE,KEY=VALUE, to which "
            "enable-oslogin=TRUE can be added, or --metadata-from-file."
        )


def check_env(env: tuple[str, ...]) -> None:
    """Refuses variables that are not NAME=VALUE.

    Raises:
      ValueError: one is not.
    """
    for one in env:
        if not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", one):
            raise ValueError(f"--env={one} must be NAME=VALUE, such as NPROC=32.")
