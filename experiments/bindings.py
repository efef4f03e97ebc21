"""List what gin files and --gin_bindings can set: every configurable, its fields, types, defaults and meanings.

The program is flm_jax/cli/bindings.py; installed, it is also the command flm-bindings.
"""

from flm_jax.cli.bindings import main

if __name__ == "__main__":
    main()
