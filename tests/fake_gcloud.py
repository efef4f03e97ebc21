"""A stand-in for gcloud on the PATH: records calls, runs ssh's commands in folders that are hosts, fails on demand.

Its folder, $FAKE_GCLOUD, holds: `calls.jsonl`; `state.json`, the queued resource; `faults.json`, what goes wrong, each
once, at the first call that contains its `match`; `hosts/`, the home directory of every host; `bin/`, what hosts find
on their PATH; `reachable.json`, how many hosts answer; `queue.json`, the states of a request that is made, each a name
or an object; `nodes.json`, the state of slices by number, if it is not READY; `no_key`, as if the ssh agent were empty.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ.get("FAKE_GCLOUD", "."))
# The states that it goes through, one per `describe`.
QUEUE = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
NO_KEY = 'SSH Key is not present in the SSH agent. Please run "ssh-add ~/.ssh/google_compute_engine" to add it.'


def load(name, default):
    path = ROOT / name
    return json.loads(path.read_text()) if path.exists() else default


def store(name, value):
    draft = ROOT / f"{name}.{os.getpid()}"
    draft.write_text(json.dumps(value))
    draft.replace(ROOT / name)  # another call may read it meanwhile


def fail(said, status=1):
    print(said, file=sys.stderr)
    sys.exit(status)


def flag(words, name, default=None):
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), default)


def homes(words):
    """The home directories of the hosts that a command is for."""
    node, worker = flag(words, "node", "0"), flag(words, "worker", "0")
    chosen = []
    for home in sorted((ROOT / "hosts").iterdir()):
        its_node, its_worker = home.name.removeprefix("host-").split("-")
        if node in ("all", its_node) and worker in ("all", its_worker):
            chosen.append(home)
    return chosen


def take_away():
    """Ends everything that runs on the hosts, and what was on their disks."""
    for group in (ROOT / "hosts").glob("*/flm_launch/*/group"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(group.read_text()), signal.SIGKILL)
    shutil.rmtree(ROOT / "hosts", ignore_errors=True)


def create(words, name):
    if load("state.json", None):
        fail(f"ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: {name} already exists")
    shutil.rmtree(ROOT / "hosts", ignore_errors=True)
    for node in range(int(flag(words, "node-count", "1"))):
        for worker in range(int(os.environ.get("FAKE_WORKERS", "2"))):
            (ROOT / f"hosts/host-{node}-{worker}").mkdir(parents=True)
    (ROOT / "nodes.json").unlink(missing_ok=True)
    store("state.json", {"queue": load("queue.json", QUEUE)})


def named(state):
    return state if isinstance(state, str) else state["state"]


def node_state(number):
    return load("nodes.json", {}).get(str(number), "READY")


def describe_node(name):
    """Prints the state of one slice, and its endpoints, a host each."""
    number = name.rpartition("-")[2] if name.rpartition("-")[2].isdigit() else 0
    hosts = list((ROOT / "hosts").glob(f"host-{number}-*"))
    if not hosts or node_state(number) == "MISSING":
        fail(f"ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: {name} was not found")
    ends = [{"ipAddress": host.name} for host in hosts]
    print(json.dumps({"state": node_state(number), "health": "HEALTHY", "networkEndpoints": ends}))


def connected(words, state):
    """The hosts that a command reaches; like gcloud, it leaves out slices that it cannot reach, with a warning."""
    chosen = []
    for home in homes(words):
        at = node_state(home.name.split("-")[1])
        if (ROOT / "no_key").exists():
            print(f"googlecloudsdk.x.exceptions.SSHKeyNotInAgent: {NO_KEY}", file=sys.stderr)
        elif named(state["queue"][0]) != "ACTIVE" or at in ("PREEMPTED", "TERMINATED", "MISSING"):
            print(f'googlecloudsdk.x.Unusable: This TPU has terminal state "{at}"', file=sys.stderr)
        else:
            chosen.append(home)
    if len(chosen) < len(homes(words)):
        print("WARNING: Could not prepare all nodes, attempting to ssh into the rest.", file=sys.stderr)
    return chosen


def ssh(words, state):
    worst = 0
    for home in connected(words, state)[: load("reachable.json", None)]:
        path = f"{ROOT / 'bin'}:{os.environ['PATH']}"
        env = {"HOME": str(home), "PATH": path, "FAKE_HOSTNAME": home.name}
        done = subprocess.run(["bash", "-c", flag(words, "command")], env=env, cwd=home)
        worst = worst or done.returncode
    return worst


def main():
    words = sys.argv[1:]
    with (ROOT / "calls.jsonl").open("a") as file:
        file.write(json.dumps(["gcloud", *words]) + "\n")
    with (ROOT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        faults = load("faults.json", [])
        fault = next((fault for fault in faults if fault["match"] in " ".join(words)), None)
        if fault is not None:
            faults.remove(fault)
            store("faults.json", faults)
    if fault is not None:
        if fault["kind"] == "preempt":
            take_away()
            store("state.json", {"queue": ["SUSPENDING", "SUSPENDED"]})
        elif fault["kind"] == "lose":  # a slice, though the request is active
            store("nodes.json", {"0": "PREEMPTED"})
            fail(fault["said"])
        elif fault["kind"] == "slow":
            time.sleep(fault["seconds"])
        elif fault["kind"] == "after":  # it is done, and the answer is lost
            pass
        else:
            fail(fault["said"], fault.get("status", 1))
    verb = words[3]
    name = (words[5] if verb == "scp" else words[4]).partition(":")[0]
    state, status = load("state.json", None), 0
    if words[2] == "tpu-vm":
        describe_node(name)
    elif verb == "create":
        create(words, name)
    elif state is None:
        fail(f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) NOT_FOUND: {name} was not found")
    elif verb == "describe":
        now = state["queue"][0]
        print(json.dumps({"state": {"state": now} if isinstance(now, str) else now}))
        store("state.json", {"queue": state["queue"][1:] or state["queue"]})
    elif verb == "scp":
        for home in connected(words, state):
            shutil.copy(words[4], home)
    elif verb == "ssh":
        status = ssh(words, state)
    elif verb == "delete":
        take_away()
        (ROOT / "state.json").unlink()
    if fault is not None and fault["kind"] == "after":
        fail(fault["said"])
    sys.exit(status)


if __name__ == "__main__":
    main()
