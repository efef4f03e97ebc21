"""Generate text with a checkpoint: continue a prompt, or answer a file of prompts.

The program is flm_jax/cli/generate.py; installed, it is also the command flm-generate.
"""

from flm_jax.cli.generate import main

if __name__ == "__main__":
    main()
