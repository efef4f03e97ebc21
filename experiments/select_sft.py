"""Choose instruction data: a small set of conversations from a large pool, without duplicates, with quotas per domain.

The program is flm_jax/cli/select_sft.py; installed, it is also the command flm-select.
"""

from flm_jax.cli.select_sft import main

if __name__ == "__main__":
    main()
