"""What describes a launch: machines, names, zones, work directories, releases; taken, or refused with a sentence."""

import subprocess

import pytest

from flm_jax.launching import description, gcloud, messages, release
from flm_jax.launching.description import Launch, Nfs, machine_of


def launch(topology, slices=None, **more):
    machine = machine_of(topology, slices)
    return Launch("n", machine, "z", runtime=description.RUNTIMES[description.kind_of(machine)], **more)


@pytest.mark.parametrize(
    ("topology", "slices", "accelerator", "hosts"),
    [
        ("v5p-2048", None, "v5p-2048", 256),
        ("v4-8", None, "v4-8", 1),
        ("2xv5e-256", None, "v5litepod-256", 128),
        ("v5litepod-16", 2, "v5litepod-16", 8),
        ("2xv5e-16", 2, "v5litepod-16", 8),
        ("v6e-8", None, "v6e-8", 1),  # one host of 8 chips, or two of 4
        ("v6e-8", 3, "v6e-8", 3),
    ],
)
def test_machines_by_google_clouds_names(topology, slices, accelerator, hosts):
    found = launch(topology, slices)
    assert (found.accelerator, found.fewest_hosts) == (accelerator, hosts)


def test_the_command_that_queues_a_machine_names_all_of_it():
    words = gcloud.create(
        launch("v5e-16", 2, project="p", spot=True, nfs=Nfs("s", "/e", "/m"), create_args=("--reserved",))
    )
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "n"]
    assert words[6:] == [
        *("--zone=z", "--project=p", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"),
        *(
            "--node-count=2",
            "--node-prefix=n",
            "--spot",
            "--metadata=enable-oslogin=TRUE",
            "--async",
            "--quiet",
            "--reserved",
        ),
    ]
    assert "--node-id=n" in gcloud.create(launch("v4-8"))


def test_metadata_that_is_given_is_joined_with_that_of_the_file_system():
    given = ("--metadata=startup-script-url=gs://a/b,c=d", "--metadata-from-file=e=f")
    description.check_create_args(given, NFS)
    words = gcloud.create(launch("v4-8", nfs=NFS, create_args=given))
    assert [word for word in words if "metadata" in word] == [
        "--metadata=enable-oslogin=TRUE,startup-script-url=gs://a/b,c=d",
        "--metadata-from-file=e=f",
    ]
    assert given[0] in gcloud.create(launch("v4-8", create_args=given))


@pytest.mark.parametrize(
    ("errors", "transient"),
    [
        ("ERROR: (gcloud.compute.tpus) UNAVAILABLE: the service is currently unavailable", True),
        ("##### worker 0\nERROR: (gcloud.x.ssh) ResponseError: code=503,\nmessage=try later", True),
        ("ERROR: gcloud crashed (ConnectionError): Connection reset by peer", True),
        ("ssh: connect to host 10.0.0.3 port 22: Connection timed out", True),
        ("ERROR: (gcloud.x.ssh) [/usr/bin/ssh] exited with return code [255].", True),
        ("WARNING: a temporary version of pip\nERROR: No matching distribution for flm_jax==500", False),
        ("ERROR: (gcloud.x.ssh) status 1\nERROR: Failed building wheel: INTERNAL", False),
        ("ERROR: (gcloud.x.create) HttpError 429: Maximum number of CreateNode requests per minute", True),
        ("ERROR: (gcloud.x.create) HttpError 429: Quota limit 'TPUsPerProject' has been exceeded. Limit: 0", False),
        ("ERROR: (gcloud.x.create) RESOURCE_EXHAUSTED: Quota 'TPUsPerProject' exhausted. Limit 500 in region r", False),
        ("ERROR: (gcloud.x.describe) PERMISSION_DENIED: for 'queuedResources/run-503'", False),
        ("error: host: cannot write to /shared: Connection timed out", False),
    ],
)
def test_only_gcloud_and_ssh_say_that_an_error_may_pass(errors, transient):
    assert messages.is_transient(errors) is transient


def test_numbers_in_names_are_no_statuses():
    denied = messages.GcloudError("gcloud describe: ERROR: (gcloud.x) PERMISSION_DENIED: queuedResources/run-404-409")
    assert not denied.missing and not denied.exists
    assert messages.GcloudError("ERROR: (gcloud.x) HTTPError 404: no").missing
    assert messages.GcloudError("ERROR: (gcloud.x) ResponseError: code=409, message=no").exists


def test_launches_that_run_something_else_have_another_digest():
    one = launch("v4-8", release="flm_jax==1", workdir="/a/b")
    digests = {
        one.digest,
        launch("v4-8", release="flm_jax==2", workdir="/a/b").digest,
        launch("v4-8", release="flm_jax==1", workdir="/a/c").digest,
        launch("v4-8", release="flm_jax==1", workdir="/a/b", files=(("f", "x = 1"),)).digest,
        launch("v4-8", release="flm_jax==1", workdir="/a/b", env=("A=1",)).digest,
    }
    assert len(digests) == 5
    assert launch("v4-16", release="flm_jax==1", workdir="/a/b", spot=True).digest == one.digest


NFS = Nfs("10.0.0.2", "/vol1", "/shared")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: machine_of("2xv5e-16", 4), "has 2 slices, and --slices=4"),
        (lambda: machine_of("v5p-2000", 2), "nearest sizes are v5p-1920 and v5p-2048"),
        (lambda: description.check_name("Tele_FLM"), "lower-case letters, digits and hyphens"),
        (lambda: description.check_name("a" * 58), "1 to 57"),
        (lambda: description.check_name("a-"), "do not end with a hyphen"),
        (
            lambda: description.check_zone("here", machine_of("v4-8", None)),
            "not the name of a zone; v4 is in us-central2-b",
        ),
        (lambda: description.check_zone("us-east5", machine_of("v5p-8", None)), "not the name of a zone"),
        (lambda: description.check_zone("us-east5-c", machine_of("v5p-8", None)), "--any_zone takes us-east5-c"),
        (lambda: description.check_workdir("gs://bucket/run", None), "must lie on a POSIX file system.*use Filestore"),
        (lambda: description.check_workdir("runs/demo", None), "must be an absolute path"),
        (lambda: description.check_workdir("/shared/../run", None), "must be an absolute path"),
        (lambda: description.check_workdir("/shared/$(rm)", None), "must be an absolute path"),
        (lambda: description.check_workdir("/sharedrun", NFS), "is not below /shared"),
        (lambda: description.nfs_of("10.0.0.2:/vol1"), "must be SERVER:/EXPORT=/MOUNT"),
        (lambda: description.nfs_of("10.0.0.2:/vol1=/"), "must be SERVER:/EXPORT=/MOUNT"),
        (lambda: description.check_env(("A=1", "B")), "--env=B must be NAME=VALUE"),
        (lambda: description.check_zone("mars", machine_of("h100-8", None)), "not the name of a zone; such as"),
        (lambda: description.check_create_args(("--metadata", "a=b"), NFS), "--create_arg=--metadata: with --nfs give"),
        (lambda: description.check_create_args(("--metadata=^:^a=b:c=d",), NFS), "give one --create_arg=--metadata="),
        (lambda: description.check_create_args(("--metadata=a=b", "--metadata=c=d"), NFS), "with --nfs give one"),
        (lambda: release.requirement("flm_jax", ("tpu",)), "is not pinned: give flm_jax==VERSION"),
        (lambda: release.requirement("flm_jax>=1", ()), "is not pinned"),
        (lambda: release.requirement("git+https://h/o/flm_jax@main", ()), "main may be a branch"),
        (lambda: release.requirement("dist/flm.whl", ()), "is not pinned"),
        (
            lambda: release.requirement("git+https://me:pw@h/o/f@v1.0", ()),
            r"^--release=git\+https://\.\.\. names a user",
        ),
        (lambda: release.requirement("git+ssh://git:pw@h/o/f@v1.0", ()), r"^--release=git\+ssh://\.\.\. names a user"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_works_is_taken():
    description.check_name("a" * 57)
    description.check_zone("us-new1-ai1a", machine_of("v5p-8", None), anywhere=True)
    description.check_workdir("/shared/run", NFS)
    assert description.nfs_of("10.0.0.2:/vol1=/shared") == NFS and description.nfs_of(None) is None
    assert release.requirement("flm_jax==0.1.0", ("tpu", "data")) == "flm_jax[tpu,data]==0.1.0"
    assert release.requirement("git+https://h/o/f@v0.1.0", ()) == "flm_jax @ git+https://h/o/f@v0.1.0"
    assert release.requirement("git+ssh://git@h/o/f@v0.1.0", ()) == "flm_jax @ git+ssh://git@h/o/f@v0.1.0"
    commit = "git+https://h/o/f@" + "0a" * 20
    assert release.requirement(commit, ("tpu",)) == f"flm_jax[tpu] @ {commit}"
    assert release.requirement("/shared/f.whl", ("tpu",)) == "flm_jax[tpu] @ file:///shared/f.whl"
    assert release.constraint_lines("# a\njax==1; python_version < '3'\n\nnumpy==2 # why\n") == (
        "jax==1; python_version < '3'",
        "numpy==2",
    )


def test_the_commit_of_a_checkout_is_a_release_if_hosts_can_fetch_it(tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    def refused(message):
        with pytest.raises(ValueError, match=message):
            release.of_checkout(tmp_path)

    refused("no git checkout with a remote")
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "x")
    refused("no git checkout with a remote")
    git("remote", "add", "origin", "https://me:secret@example.org/flm")
    refused("cannot clone .* without a password")
    git("remote", "set-url", "origin", "https://example.org/flm")
    refused("is at a commit that is not pushed")
    git("update-ref", "refs/remotes/mine/main", "HEAD")
    refused("is at a commit that is not pushed")
    git("update-ref", "refs/remotes/origin/main", "HEAD")
    head = subprocess.run(
        ["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert release.of_checkout(tmp_path) == f"git+https://example.org/flm@{head}"
    (tmp_path / "a").write_text("2")
    refused("has changes that are not committed")
