"""Evaluate a checkpoint: lm-eval's tasks, bits per byte of any text, continuations of a prompt, judged answers.

The program is flm_jax/cli/evaluate.py; installed, it is also the command flm-evaluate.
"""

from flm_jax.cli.evaluate import main

if __name__ == "__main__":
    main()
