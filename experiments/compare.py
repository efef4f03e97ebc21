"""Compare runs: their curves on one figure, what differs in their recipes, FLOPs to the same held-out loss.

The program is flm_jax/cli/compare.py; installed, it is also the command flm-compare.
"""

from flm_jax.cli.compare import main

if __name__ == "__main__":
    main()
