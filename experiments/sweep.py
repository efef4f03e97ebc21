"""Run a sweep: one recipe many times with different gin bindings, and compare what the runs reach.

The program is flm_jax/cli/sweep.py; installed, it is also the command flm-sweep.
"""

from flm_jax.cli.sweep import main

if __name__ == "__main__":
    main()
