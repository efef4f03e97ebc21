"""Manifests: their texts as reviewed, shell that shellcheck passes and bash runs, YAML that says what it should.

`python -m tests.test_launching_manifests` writes the reviewed texts.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flm_jax.launching import host, manifests
from flm_jax.launching.description import RUNTIMES, Launch, Nfs, kind_of, machine_of
from tests import fake_hosts

GOLDEN = Path(__file__).resolve().parent / "golden/launch"


NFS = Nfs("10.0.0.2", "/vol1", "/shared")


def launch(topology, slices=None, nfs=NFS, **changes):
    machine = machine_of(topology, slices)
    fields = {
        "name": "tele-flm",
        "machine": machine,
        "zone": "us-east5-a",
        "release": "flm_jax[tpu,data] @ git+https://example.org/flm_jax@v0.1.0",
        "workdir": "/shared/tele-flm",
        "gin_files": ("my.gin",),
        "gin_bindings": ("TextFolder.path = '/shared/my texts'",),
        "files": (("my.gin", "include 'base/first.gin'\n"), ("base/first.gin", 'Recipe.seed = 1  # "$HOME" `x`\n')),
        "env": ("LIBTPU_INIT_ARGS=--a=1 --b=2",),
        "runtime": RUNTIMES.get(kind_of(machine)),
        "nfs": nfs,
    }
    return Launch(**fields | changes)


TEXTS = {
    "host.sh": lambda: manifests.manifest(launch("v5p-2048", constraints=("jax==0.12.0.1",)), "host"),
    "slurm.sbatch": lambda: manifests.manifest(launch("h100-64", nfs=None, zone=""), "slurm"),
    "jobset.yaml": lambda: manifests.manifest(launch("v5e-256", 2, spot=True), "jobset"),
    "skypilot_tpu.yaml": lambda: manifests.manifest(launch("v5p-2048", spot=True), "skypilot"),
    "skypilot_gpu.yaml": lambda: manifests.manifest(launch("h100-64", nfs=None, zone=""), "skypilot"),
}


def shells(name):
    """The shell programs in a manifest."""
    text = TEXTS[name]()
    if not name.endswith(".yaml"):
        return [text]
    found = yaml.safe_load(text)
    if name == "jobset.yaml":
        (container,) = job(found)["template"]["spec"]["containers"]
        assert container["command"][:2] == ["bash", "-c"]
        return [expanded(container["command"][2])]
    return [found["setup"], found["run"]]


def expanded(command, **variables):
    """What Kubernetes makes of a command: ``$$`` is ``$``, and ``$(NAME)`` the value of a variable, if there is one."""

    def one(match):
        return "$" if match[1] is None else variables.get(match[1], match[0])

    return re.sub(r"\$(?:\$|\(([^)]*)\))", one, command)


def job(found):
    (one,) = found["spec"]["replicatedJobs"]
    return one["template"]["spec"]


@pytest.mark.parametrize("name", TEXTS)
def test_the_texts_are_as_reviewed(name):
    assert TEXTS[name]() == (GOLDEN / name).read_text()


@pytest.mark.parametrize("name", TEXTS)
def test_shellcheck_finds_nothing(name):
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program is not None, "shellcheck is not installed; the extra `dev` brings it"
    for text in shells(name):
        # Setting variables that only one of two programs uses is fine.
        done = subprocess.run(
            [program, "--shell=bash", "--exclude=SC2034", "-"], input=text, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_a_jobset_has_a_job_per_slice_and_a_pod_per_host():
    found = yaml.safe_load(TEXTS["jobset.yaml"]())
    assert (found["kind"], found["metadata"]["name"]) == ("JobSet", "tele-flm")
    assert found["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert job(found)["parallelism"] == job(found)["completions"] == 64
    pod = job(found)["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["volumeMounts"][0]["mountPath"] == "/shared"
    # The definition of JobSet wants a name, although its server would add one.
    assert all(rule["name"] for rule in found["spec"]["failurePolicy"]["rules"])
    assert pod["volumes"][0]["nfs"] == {"server": "10.0.0.2", "path": "/vol1"}


@pytest.mark.parametrize(
    ("topology", "pods", "chips"), [("v6e-8", 1, 8), ("v5e-8", 2, 4), ("v6e-16", 4, 4), ("v5e-1", 1, 1)]
)
def test_pods_ask_for_all_chips_of_the_hosts_that_gke_has(topology, pods, chips):
    spec = job(yaml.safe_load(manifests.manifest(launch(topology), "jobset")))
    (container,) = spec["template"]["spec"]["containers"]
    assert (spec["parallelism"], container["resources"]["limits"]["google.com/tpu"]) == (pods, chips)


def test_kubernetes_changes_nothing_in_the_shell_of_a_jobset():
    described = launch("v5p-8", env=("A=$(POD)", "B=$$", "C=$$(POD)", "D=${POD}"))
    (container,) = job(yaml.safe_load(manifests.manifest(described, "jobset")))["template"]["spec"]["containers"]
    read = expanded(container["command"][2], POD="replaced")
    assert host.preamble(dataclasses.replace(described, nfs=None)).rstrip("\n") in read


def test_a_task_for_skypilot_goes_on_after_a_stop_a_hang_and_a_lost_process():
    tpu, gpu = (yaml.safe_load(TEXTS[f"skypilot_{kind}.yaml"]()) for kind in ("tpu", "gpu"))
    for found in (tpu, gpu):
        assert found["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 79, 80, 134]
    assert "num_nodes" not in tpu and gpu["num_nodes"] == 8
    assert tpu["resources"]["accelerators"] == "tpu-v5p-2048" and gpu["resources"]["accelerators"] == "H100:8"
    assert tpu["resources"]["infra"] == "gcp/us-east5/us-east5-a" and tpu["resources"]["use_spot"] is True


@pytest.mark.parametrize(
    ("form", "described", "message"),
    [
        ("slurm", launch("v5p-8"), "is for GPU nodes"),
        ("slurm", launch("h100-8"), "--nfs is for hosts that are new"),
        ("jobset", launch("h100-8"), "is for TPUs"),
        ("host", launch("h100-8"), "is for TPUs"),
        ("jobset", launch("v5p-8", nfs=None), "needs --nfs"),
        (
            "jobset",
            launch("v5e-256", 2, name="a" * 47),
            "give at most 46 letters, because pods are named a+-slice-1-63",
        ),
        ("skypilot", launch("v5e-16", 2), "SkyPilot starts one TPU slice, not 2"),
    ],
)
def test_launchers_that_have_no_such_machine_are_refused(form, described, message):
    with pytest.raises(ValueError, match=message):
        manifests.manifest(described, form)


@pytest.fixture
def machine(tmp_path):
    """The environment of a machine with a stand-in for Python; `run` executes shell there."""
    fake_hosts.make(tmp_path)
    bin_, home = tmp_path / "cloud/bin", tmp_path / "home"
    home.mkdir()
    env = {"HOME": str(home), "PATH": f"{bin_}:{os.environ['PATH']}", "FAKE_HOSTNAME": "here"}

    def run(text, **more):
        return subprocess.run(["bash", "-c", text], env=env | more, cwd=tmp_path, capture_output=True, text=True)

    fake_hosts.write(bin_ / "sleep", f"#!/usr/bin/env bash\nexec {shutil.which('sleep')} 0.05\n")
    run.bin, run.workdir = bin_, tmp_path / "shared/run"
    return run


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["jobset", "skypilot"])
def test_the_shell_of_manifests_installs_and_trains(machine, kind):
    nfs = Nfs("10.0.0.2", "/vol1", str(machine.workdir.parent))
    described = launch("v4-8", workdir=str(machine.workdir), nfs=nfs if kind == "jobset" else None)
    found = yaml.safe_load(manifests.manifest(described, kind))
    parts = (
        [found["setup"], found["run"]]
        if kind == "skypilot"
        else [expanded(job(found)["template"]["spec"]["containers"][0]["command"][2])]
    )
    for text in parts:
        done = machine(text)
        assert done.returncode == 0, done.stderr
    assert "step 8" in done.stdout
    wanted = f"here --gin_file=my.gin --gin_bindings=TextFolder.path = '/shared/my texts' --workdir={machine.workdir}"
    assert (machine.workdir / "started").read_text() == f"{wanted} --distributed\n"


@pytest.mark.integration
def test_gpu_nodes_of_skypilot_find_each_other(machine):
    described = launch("h100-16", workdir=str(machine.workdir), nfs=None, zone="")
    found = yaml.safe_load(manifests.manifest(described, "skypilot"))
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    for text in (found["setup"], found["run"]):
        assert machine(text, **nodes).returncode == 0
    arguments = (machine.workdir / "started").read_text()
    assert (
        arguments.endswith(" --coordinator=10.0.0.1:8476 --processes=2 --process=1\n")
        and "--distributed" not in arguments
    )


@pytest.mark.integration
@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (1, False)])
def test_a_job_of_slurm_that_saved_and_stopped_is_queued_again(machine, status, requeued):
    fake_hosts.write(machine.bin / "srun", '#!/usr/bin/env bash\necho "srun $*"\nexit "$STATUS"\n')
    fake_hosts.write(machine.bin / "scontrol", '#!/usr/bin/env bash\necho "scontrol $*"\n')
    text = manifests.manifest(launch("h100-64", workdir=str(machine.workdir), nfs=None), "slurm")
    done = machine(text, STATUS=str(status), SLURM_JOB_ID="17")
    assert done.returncode == status, done.stderr
    assert ("scontrol requeue 17" in done.stdout) == requeued
    assert f"--workdir={machine.workdir} --distributed" in done.stdout


@pytest.mark.integration
def test_the_hosts_script_mounts_the_file_system_once(machine):
    for name in ("mount.nfs", "mountpoint"):
        fake_hosts.write(machine.bin / name, '#!/usr/bin/env bash\n[ -e "$HOME/mounted" ]\n')
    fake_hosts.write(
        machine.bin / "sudo",
        '#!/usr/bin/env bash\necho "$*" >>"$HOME/sudo"\n[ "$1" != mount ] || touch "$HOME/mounted"\n',
    )
    described = launch("v4-8", workdir=str(machine.workdir), nfs=Nfs("10.0.0.2", "/vol1", str(machine.workdir.parent)))
    script = machine.bin.parent / host.script_name(described)
    script.write_text(host.script(described))
    for _ in range(2):
        done = machine(f"bash {script} install")
        assert done.returncode == 0, done.stderr
        (found,) = host.reports(done.stdout)
        assert (found.host, found.state, found.launch) == ("here", "installed", described.digest)
    asked = (machine.bin.parents[1] / "home/sudo").read_text().splitlines()
    assert asked == [
        f"mkdir -p {machine.workdir.parent}",
        f"mount -t nfs -o rw,hard 10.0.0.2:/vol1 {machine.workdir.parent}",
    ]
    gin = machine.bin.parents[1] / "home/flm_launch/tele-flm/gin"
    assert {name: (gin / name).read_text() for name, _ in described.files} == dict(described.files)


@pytest.mark.integration
def test_a_package_is_installed_although_apt_is_locked_at_first(machine):
    tools, mount = machine.bin, machine.workdir.parent
    fake_hosts.write(tools / "mountpoint", "#!/usr/bin/env bash\nexit 1\n")
    # The third call of apt-get installs.
    fake_hosts.write(
        tools / "sudo",
        f"""#!/usr/bin/env bash
echo "$*" >>"$HOME/sudo"
case "$1" in apt-get) ;; *) exit ;; esac
[ "$(grep -c apt-get "$HOME/sudo")" -gt 1 ] || exit 100
[ "$3" != install ] || {{ cp "$0" {tools}/mount.nfs; }}
""",
    )
    described = launch("v4-8", workdir=str(machine.workdir), nfs=Nfs("10.0.0.2", "/vol1", str(mount)))
    script = tools.parent / host.script_name(described)
    script.write_text(host.script(described))
    done = machine(f"PATH={tools}:/usr/bin:/bin bash {script} install")
    assert done.returncode == 0, done.stderr
    asked = (tools.parents[1] / "home/sudo").read_text().splitlines()
    assert asked[:3] == ["apt-get -q update", "apt-get -q update", "apt-get -q install -y nfs-common"]
    assert asked[4].startswith("mount -t nfs")


@pytest.mark.integration
def test_an_installation_is_tried_twice(machine):
    fake_hosts.write(
        machine.bin / "python3.13",
        fake_hosts.PYTHON.replace("    cp", '    [ "$(wc -l <"$HOME/pip")" -gt 1 ] || exit 1\n    cp'),
    )
    described = launch("v4-8", workdir=str(machine.workdir), nfs=None)
    script = machine.bin.parent / host.script_name(described)
    script.write_text(host.script(described))
    assert machine(f"bash {script} install").returncode == 0
    assert len((machine.bin.parents[1] / "home/pip").read_text().splitlines()) == 2


@pytest.mark.integration
def test_a_work_directory_that_cannot_be_written_to_is_told(machine):
    machine.workdir.parent.write_text("a file")
    described = launch("v4-8", workdir=str(machine.workdir), nfs=None)
    script = machine.bin.parent / host.script_name(described)
    script.write_text(host.script(described))
    done = machine(f"bash {script} install")
    assert done.returncode == 1 and f"cannot write to {machine.workdir}" in done.stderr
    assert machine(f"bash {script} dance").returncode == 2


@pytest.mark.integration
def test_an_installation_that_fails_ends_what_another_launch_had_installed(machine):
    """Otherwise the first launch, started again, would take the environment that was deleted for its own."""
    first, second = (
        launch("v4-8", workdir=str(machine.workdir), nfs=None, release=f"flm_jax=={version}") for version in "12"
    )
    script = machine.bin.parent / host.script_name(first)

    def install(described):
        script.write_text(host.script(described))
        return machine(f"bash {script} install")

    assert install(first).returncode == 0
    program = machine.bin.parents[1] / "home/flm_launch/tele-flm/venv/bin/flm-train"
    train = machine.bin / "train"
    train.rename(machine.bin / "away")  # so pip fails
    assert install(second).returncode != 0 and not program.exists()
    (machine.bin / "away").rename(train)
    assert install(first).returncode == 0 and program.exists()
    assert script.stat().st_mode & 0o777 == 0o600


def test_a_gin_file_cannot_leave_its_place_in_a_script(machine):
    text = "a = 1\nEND_OF_GIN_FILE\ntouch left\nEND_OF_GIN_FILE_\n\x0cb = '$HOME'\u2028\n"
    described = launch("v4-8", files=(("my.gin", text),))
    shell = host._gin_files_function(described)
    done = machine(f"{shell}\ngin_files")
    assert done.returncode == 0 and not list(machine.bin.parents[1].glob("**/left"))
    assert (machine.bin.parents[1] / "gin/my.gin").read_text() == text


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, text in TEXTS.items():
        (GOLDEN / name).write_text(text())
