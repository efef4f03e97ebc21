"""Convert a model of the Llama family into a checkpoint, and a checkpoint into one that other programs load.

The program is flm_jax/cli/convert.py; installed, it is also the command flm-convert.
"""

from flm_jax.cli.convert import main

if __name__ == "__main__":
    main()
