"""Plan a recipe for a machine, without the machine: cost of each stage, whether it fits, cost of each growth.

  python experiments/plan.py --gin_file=gin_configs/recipes/tele_flm_1t.gin --topology=v5p-2048 [--json=FILE]

The train step and the growth of every stage are compiled for the same number of simulated devices, or, with
--compiler=tpu, by the TPU compiler for that topology, which needs no TPU (`make test-tpu` installs it).
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from flm_jax.cli.flags import define_assumptions, define_gin, define_json, launch, refuse

if TYPE_CHECKING:
    from flm_jax.planning.topology import Topology


def define() -> None:
    """Defines the flags."""
    define_gin("MeshConfig.fsdp = 64")
    define_json()
    flags.DEFINE_string("topology", None, "A machine, such as v5p-2048, 2xv5e-256 or h100-64.", required=True)
    flags.DEFINE_enum(
        "compiler",
        "cpu",
        ["arithmetic", "none", "cpu", "tpu"],
        "arithmetic: count bytes, FLOPs and days, in seconds; none: lower too; cpu: compile for simulated devices; "
        "tpu: compile with the TPU compiler.",
    )
    define_assumptions()


def run(values: Any) -> None:
    """Plans the recipe that the flags describe."""
    if not values.gin_file and not values.gin_bindings:
        refuse("give a recipe with --gin_file")
    from flm_jax.planning.topology import topology

    try:
        machine = topology(values.topology)
    except ValueError as error:
        refuse(str(error))
    simulate(machine, values.compiler)
    from flm_jax.cli import runs  # Imported here, after the environment is set, and so that --help is fast.

    assumed = (values.utilisation, values.storage * 1e9)
    price = values.price_per_chip_hour
    fits = runs.run_plan(machine, values.compiler, *assumed, values.json, values.gin_file, values.gin_bindings, price)
    if not fits:
        sys.exit(1)


def simulate(machine: Topology, compiler: str) -> None:
    """Sets the environment in which JAX has as many simulated devices as a machine; before JAX is imported."""
    # JAX reads both variables when it starts. A plan computes nothing, so it does not occupy a local accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if compiler != "tpu":
        count = f"--xla_force_host_platform_device_count={machine.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run)


if __name__ == "__main__":
    main()
