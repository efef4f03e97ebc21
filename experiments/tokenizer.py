"""Train a tokenizer on a corpus or a mixture, and measure tokenizers side by side.

The program is flm_jax/cli/tokenizer.py; installed, it is also the command flm-tokenizer.
"""

from flm_jax.cli.tokenizer import main

if __name__ == "__main__":
    main()
