"""Verify a grown checkpoint against the one it grew from: exit status 0 only if what its method promises holds.

The program is flm_jax/cli/verify.py; installed, it is also the command flm-verify.
"""

from flm_jax.cli.verify import main

if __name__ == "__main__":
    main()
