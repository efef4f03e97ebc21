"""Check muP's coordinates: whether activations keep their size as the model grows wider, after some steps of training.

The program is flm_jax/cli/coordinate_check.py; installed, it is also the command flm-coordinate-check.
"""

from flm_jax.cli.coordinate_check import main

if __name__ == "__main__":
    main()
