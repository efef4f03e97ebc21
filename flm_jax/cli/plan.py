"""Plan a recipe for machines that are not here: what each stage takes, whether it fits, what growing costs.

  python experiments/plan.py --gin_file=gin_configs/recipes/tele_flm_1t.gin --topology=v5p-2048 [--json=FILE]

The real train step and the real growth step of every stage are compiled: for as many simulated devices, or with
--compiler=tpu by the TPU compiler for that topology, which needs no TPU (`make test-tpu` installs it).
"""

from __future__ import annotations

import os
import sys
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
        "none: lower only; cpu: for simulated devices; tpu: the real one.",
    )
    flags.DEFINE_float(
        "utilisation",
        0.5,
        "Model FLOPs over peak FLOPs, to reckon days by.",
        lower_bound=0.01,
        upper_bound=1.0,
    )
    flags.DEFINE_float(
        "storage", 1.0, "GB/s that one host reads or writes of checkpoints, to reckon times by.", lower_bound=0.001
    )


def run(values: Any) -> None:
    """Plans what the flags say."""
    if not values.gin_file and not values.gin_bindings:
        refuse("give a recipe with --gin_file")
    from flm_jax.planning.topology import topology

    try:
        machine = topology(values.topology)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    # Both are read when JAX starts. Nothing is computed here, so an accelerator that is here stays free.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if values.compiler != "tpu":
        count = f"--xla_force_host_platform_device_count={machine.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    from flm_jax.cli import runs  # Imported here, so that --help answers at once, and after the environment is set.

    assumed = (values.utilisation, values.storage * 1e9)
    runs.run_plan(machine, values.compiler, *assumed, values.json, values.gin_file, values.gin_bindings)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run)


if __name__ == "__main__":
    main()
