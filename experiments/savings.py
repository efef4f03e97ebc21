"""Measure whether growing pays: grown runs against tuned scratch runs of the same size and of the best size.

The program is flm_jax/cli/savings.py; installed, it is also the command flm-savings.
"""

from flm_jax.cli.savings import main

if __name__ == "__main__":
    main()
