"""A launch as a file for other launchers: a Slurm script, a JobSet for GKE, a task for SkyPilot.

Sources: https://slurm.schedmd.com/sbatch.html; https://jobset.sigs.k8s.io, the definition of JobSet v1alpha2 in its
repository (August 2026) and https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice; SkyPilot's pages
https://docs.skypilot.co/en/latest/reference/yaml-spec.html, its `sky/utils/schemas.py` and its page on TPUs (`setup`
and `run` run on every host of a slice).
"""

from __future__ import annotations

import dataclasses
import json
import re

from flm_jax.launching import host
from flm_jax.launching.description import Launch, is_tpu
from flm_jax.launching.verdict import ABORTED, LOST, STALLED, STOPPED
from flm_jax.planning.topology import Topology

FORMATS = ("slurm", "jobset", "skypilot", "host")
_GKE_NAMES = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
# The one slice of GKE that lies on a host of eight chips, ct6e-standard-8t; that of v5e may lie on two hosts of four.
_ON_ONE_HOST = ("v6e", (2, 4))
_PORT = 8476
_LONGEST_LABEL = 63  # of Kubernetes


def manifest(launch: Launch, form: str, image: str = "python:3.12", hours: int = 24) -> str:
    """The text of a file that launches.

    Args:
      launch: what is launched.
      form: one of `FORMATS`; host: the script that `gcloud` copies to the hosts.
      image: of the containers, for jobset: a Python that flm_jax runs on, with git.
      hours: after these Slurm ends the job, and queues it again.

    Raises:
      ValueError: that launcher has no such machine.
    """
    machine = launch.machine
    assert machine is not None
    if form == "slurm":
        if is_tpu(machine):
            raise ValueError(f"--format=slurm is for GPU nodes, such as --topology=h100-64; {machine.name} is a TPU.")
        if launch.nfs is not None:
            raise ValueError(
                "--nfs is for hosts that are new; nodes under Slurm have their file systems: leave it out."
            )
        return slurm(launch, machine, hours)
    if form == "skypilot":
        return skypilot(launch, machine)
    if not is_tpu(machine):
        raise ValueError(f"--format={form} is for TPUs, such as --topology=v5p-2048; {machine.name} are GPUs.")
    if form == "host":
        return host.script(launch)
    if launch.nfs is None:
        raise ValueError(
            "--format=jobset needs --nfs=SERVER:/EXPORT=/MOUNT: pods see no file system that is not named."
        )
    return jobset(launch, machine, image)


def slurm(launch: Launch, machine: Topology, hours: int = 24) -> str:
    """A script for sbatch: one task per GPU; a job that is stopped before its time limit saves and is queued again."""
    per_node = min(machine.devices, machine.chip.per_host)
    return f"""#!/bin/bash
# Submit it with the flags of your cluster: sbatch --partition=... --account=... {launch.name}.sbatch
#SBATCH --job-name={launch.name}
#SBATCH --nodes={machine.hosts}
#SBATCH --ntasks-per-node={per_node}
#SBATCH --gpus-per-node={per_node}
#SBATCH --exclusive
#SBATCH --time={hours}:00:00
# Five minutes before the end the tasks, not this script, are asked to save and stop.
#SBATCH --signal=TERM@300
#SBATCH --requeue
# Two jobs of this name at once would want the same work directory.
#SBATCH --dependency=singleton
#SBATCH --open-mode=append
#SBATCH --output={launch.name}-%j.log
set -euo pipefail

# The nodes share the home directory.
{host.preamble(launch)}
shared
install_here
# The first task that ends must not take the others with it while they save; flm_jax itself ends them if one fails.
code=0
srun --kill-on-bad-exit=0 --chdir="$home/gin" env "${{environment[@]}}" "${{train[@]}}" || code=$?
if [ "$code" -eq {STOPPED} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _block(text: str, indent: int) -> str:
    """Text as the lines of a literal block of YAML, which begins with ``|``."""
    return "\n".join(" " * indent + line if line else "" for line in text.rstrip("\n").split("\n"))


def _for_kubernetes(shell: str) -> str:
    """Shell for a container's command, where Kubernetes replaces ``$(NAME)`` and ``$$`` unless they are escaped."""
    return re.sub(r"\$(?=[$(])", "$$", shell)


def _check_pods(name: str, slices: int, per_slice: int) -> None:
    """Refuses a name that makes the names of pods too long: JobSet adds numbers, and Kubernetes five letters."""
    added = len(f"-slice-{slices - 1}-{per_slice - 1}-abcde")
    if len(name) + added > _LONGEST_LABEL:
        raise ValueError(
            f"--name={name}: with --format=jobset give at most {_LONGEST_LABEL - added} letters, because pods are "
            f"named {name}-slice-{slices - 1}-{per_slice - 1}-abcde, and Kubernetes takes {_LONGEST_LABEL}."
        )


def jobset(launch: Launch, machine: Topology, image: str = "python:3.12") -> str:
    """A JobSet: a job per slice, a pod per host. All pods are started again together until all end with 0."""
    assert launch.nfs is not None
    # The file system is a volume of the pod.
    inside = dataclasses.replace(launch, nfs=None)
    script = "\n".join(
        [
            "set -euo pipefail",
            host.preamble(inside).rstrip("\n"),
            "",
            "shared",
            "install_here",
            'cd "$home/gin"',
            "# As process 1 of the pod it is the one that gets SIGTERM.",
            'exec env "${environment[@]}" "${train[@]}"',
        ]
    )
    per_slice = machine.hosts // machine.slices
    chips = min(machine.devices // machine.slices, machine.chip.per_host)
    if (launch.kind, machine.bounds) == _ON_ONE_HOST:
        per_slice, chips = 1, 8
    _check_pods(launch.name, machine.slices, per_slice)
    spot = '\n                cloud.google.com/gke-spot: "true"' if launch.spot else ""
    return f"""# kubectl apply -f {launch.name}.yaml, with JobSet and a node pool of this topology per slice
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {launch.name}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    # A run that was stopped ends with {STOPPED}, one that lost a host with {LOST} or {ABORTED}: both go on from a save.
    maxRestarts: 100
    rules:
      - name: wrongFlags
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: {machine.slices}
      template:
        spec:
          parallelism: {per_slice}
          completions: {per_slice}
          backoffLimit: 0
          podFailurePolicy:
            rules:
              # Wrong flags stay wrong.
              - action: FailJob
                onExitCodes:
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: {_GKE_NAMES[launch.kind]}
                cloud.google.com/gke-tpu-topology: {"x".join(map(str, machine.bounds))}{spot}
              volumes:
                - name: shared
                  nfs:
                    server: {json.dumps(launch.nfs.server)}
                    path: {json.dumps(launch.nfs.export)}
              containers:
                - name: train
                  image: {json.dumps(image)}
                  securityContext:
                    privileged: true
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  volumeMounts:
                    - name: shared
                      mountPath: {json.dumps(launch.nfs.mount)}
                  resources:
                    limits:
                      google.com/tpu: {chips}
                  command:
                    - bash
                    - -c
                    - |
{_block(_for_kubernetes(script), 22)}
"""


def skypilot(launch: Launch, machine: Topology) -> str:
    """A task for `sky jobs launch`, which starts it again after a preemption, a stop, a hang and a lost process."""
    if is_tpu(machine):
        if machine.slices > 1:
            raise ValueError(
                f"SkyPilot starts one TPU slice, not {machine.slices}: use create and run, or --format=jobset."
            )
        nodes = ""
        accelerators = f"tpu-{launch.accelerator}"
        runtime = f"\n  accelerator_args:\n    runtime_version: {launch.runtime}"
    else:
        per_node = min(machine.devices, machine.chip.per_host)
        nodes, runtime = f"num_nodes: {machine.hosts}\n", ""
        accelerators = f"{launch.kind.upper()}:{per_node}"
    where = f"\n  infra: gcp/{launch.zone.rpartition('-')[0]}/{launch.zone}" if launch.zone else ""
    setup = "\n".join(["set -euo pipefail", host.preamble(launch).rstrip("\n"), "", "shared", "install_here"])
    found = "" if is_tpu(machine) else _FOUND
    call = '\nexec env "${environment[@]}" "${train[@]}"'
    run = "\n".join(["set -euo pipefail", host.variables(launch), 'cd "$home/gin"']) + found + call
    return f"""# sky jobs launch {launch.name}.yaml
name: {launch.name}
{nodes}resources:{where}
  accelerators: {accelerators}{runtime}
  use_spot: {str(launch.spot).lower()}
  job_recovery:
    strategy: FAILOVER
    max_restarts_on_errors: 3
    recover_on_exit_codes: [{STOPPED}, {STALLED}, {LOST}, {ABORTED}]
setup: |
{_block(setup, 2)}
run: |
{_block(run, 2)}
"""


# On GPU nodes JAX does not find the other processes by itself: the last argument, --distributed, is replaced.
_FOUND = f"""
unset 'train[-1]'
train+=(--coordinator="$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{_PORT}")
train+=(--processes="$SKYPILOT_NUM_NODES" --process="$SKYPILOT_NODE_RANK")"""
