"""Plan a recipe for a machine, without the machine: cost of each stage, whether it fits, cost of each growth.

  python experiments/plan.py --gin_file=gin_configs/recipes/tele_flm_1t.gin --topology=v5p-2048 [--json=FILE]

The train step and the growth of every stage are compiled for the same number of simulated devices, or, with
--compiler=tpu, by the TPU compiler for that topology, which needs no TPU (`make test-tpu` installs it).
"""

from __future__ import annotations

import os
from typing import Any

from absl import flags

from flm_jax.cli.flags import define_gin, define_json, launch, refuse


def define() -> None:
    """Defines the flags."""
    define_gin("MeshConfig.fsdp = 64")
    define_json()
    flags.DEFINE_string("topology", None, "A machine, such as v5p-2048, 2xv5e-256 or h100-64.", required=True)
    flags.DEFINE_enum(
        "compiler",
        "cpu",
        ["none", "cpu", "tpu"],
        "none: lower only; cpu: compile for simulated devices; tpu: compile with the TPU compiler.",
    )
    flags.DEFINE_float(
        "utilisation",
        0.5,
        "Model FLOPs over peak FLOPs, for the estimate of days.",
        lower_bound=0.01,
        upper_bound=1.0,
    )
    flags.DEFINE_float(
        "storage", 1.0, "GB/s at which one host reads or writes checkpoints, for estimates.", lower_bound=0.001
    )


def run(values: Any) -> None:
    """Plans the recipe that the flags describe."""
    if not values.gin_file and not values.gin_bindings:
        refuse("give a recipe with --gin_file")
    from flm_jax.planning.topology import topology

    try:
        machine = topology(values.topology)
    except ValueError as error:
        refuse(str(error))
    # JAX reads both variables when it starts. A plan computes nothing, so it does not occupy a local accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if values.compiler != "tpu":
        count = f"--xla_force_host_platform_device_count={machine.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    from flm_jax.cli import runs  # Imported here, after the environment is set, and so that --help is fast.

    assumed = (values.utilisation, values.storage * 1e9)
    runs.run_plan(machine, values.compiler, *assumed, values.json, values.gin_file, values.gin_bindings)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run)


if __name__ == "__main__":
    main()
