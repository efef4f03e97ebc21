"""Verify a grown checkpoint against its source: exit status 0 only if all promises of its growth method hold.

The program is flm_jax/cli/verify.py; installed, it is also the command flm-verify.
"""

from flm_jax.cli.verify import main

if __name__ == "__main__":
    main()
