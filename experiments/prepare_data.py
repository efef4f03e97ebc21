"""Prepare the data of a recipe before it is trained: tokenise, leave out duplicates, and write token stores.

The program is flm_jax/cli/prepare_data.py; installed, it is also the command flm-prepare.
"""

from flm_jax.cli.prepare_data import main

if __name__ == "__main__":
    main()
