"""Plan a recipe for machines that are not here: what each stage takes, whether it fits, what growing costs.

The program is flm_jax/cli/plan.py; installed, it is also the command flm-plan.
"""

from flm_jax.cli.plan import main

if __name__ == "__main__":
    main()
