"""Plan a recipe for machines that are not here: what each stage takes, whether it fits, what growing costs.

  python experiments/plan.py --gin_file=gin_configs/recipes/tele_flm_1t.gin --topology=v5p-2048 [--json=FILE]

The real train step and the real growth step of every stage are compiled: for as many simulated devices, or with
--compiler=tpu by the TPU compiler for that topology, which needs no TPU (`make test-tpu` installs it).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "A gin file; may be given several times, later ones win.")
_GIN_BINDINGS = flags.DEFINE_multi_string("gin_bindings", [], "A gin binding, such as 'MeshConfig.fsdp = 64'.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "A machine, such as v5p-2048, 2xv5e-256 or h100-64.", required=True)
_COMPILER = flags.DEFINE_enum(
    "compiler", "cpu", ["none", "cpu", "tpu"], "none: lower only; cpu: for simulated devices; tpu: the real one."
)
_JSON = flags.DEFINE_string("json", None, "Write what was found to this file.")
_UTILISATION = flags.DEFINE_float(
    "utilisation", 0.5, "Model FLOPs over peak FLOPs, to reckon days by.", lower_bound=0.01, upper_bound=1.0
)
_STORAGE = flags.DEFINE_float(
    "storage", 1.0, "GB/s that one host reads or writes of checkpoints, to reckon times by.", lower_bound=0.001
)


def main(argv: list[str]) -> None:
    """Parses flags and gin, and calls one function."""
    if len(argv) > 1:
        app.usage(shorthelp=True, detailed_error=f"unexpected argument {argv[1]!r}", exitcode=2)
    if not _GIN_FILE.value and not _GIN_BINDINGS.value:
        app.usage(shorthelp=True, detailed_error="give a recipe with --gin_file", exitcode=2)
    from flm_jax.planning.topology import topology

    try:
        machine = topology(_TOPOLOGY.value)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    # Both are read when JAX starts. Nothing is computed here, so an accelerator that is here stays free.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if _COMPILER.value != "tpu":
        count = f"--xla_force_host_platform_device_count={machine.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()

    # Imported here, so that --help answers at once, and after the environment is set.
    from experiments import launch

    launch.run_plan(
        *(machine, _COMPILER.value, _UTILISATION.value, _STORAGE.value * 1e9),
        *(_JSON.value, _GIN_FILE.value, _GIN_BINDINGS.value),
    )


if __name__ == "__main__":
    app.run(main)
