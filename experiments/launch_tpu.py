"""Launch a recipe on TPU VMs and keep it running until it is finished, or write it as a job for another launcher.

The program is flm_jax/cli/launch_tpu.py; installed, it is also the command flm-launch.
"""

from flm_jax.cli.launch_tpu import main

if __name__ == "__main__":
    main()
