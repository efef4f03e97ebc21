"""Fused attention kernels: `splash` on TPUs, `cudnn` on NVIDIA GPUs. `flm_jax.attention` chooses between them."""

# The checkpoint name of the attention's output, and of what else a fused kernel keeps for its backward pass.
ATTENDED = "attended"
