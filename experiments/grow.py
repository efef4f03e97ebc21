"""Grow a checkpoint, optimizer state included, into a new work directory, and verify it.

The program is flm_jax/cli/grow.py; installed, it is also the command flm-grow.
"""

from flm_jax.cli.grow import main

if __name__ == "__main__":
    main()
