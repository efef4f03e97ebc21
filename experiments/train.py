"""Train a recipe: its first stage, then every growth and the stages after it.

The program is flm_jax/cli/train.py; installed, it is also the command flm-train.
"""

from flm_jax.cli.train import main

if __name__ == "__main__":
    main()
