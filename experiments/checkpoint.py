"""Look after checkpoints: list them, describe, verify, compare, prune and copy them.

The program is flm_jax/cli/checkpoint.py; installed, it is also the command flm-checkpoint.
"""

from flm_jax.cli.checkpoint import main

if __name__ == "__main__":
    main()
