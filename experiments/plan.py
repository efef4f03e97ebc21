"""Plan a recipe for a machine, without the machine: cost of each stage, whether it fits, cost of each growth.

The program is flm_jax/cli/plan.py; installed, it is also the command flm-plan.
"""

from flm_jax.cli.plan import main

if __name__ == "__main__":
    main()
