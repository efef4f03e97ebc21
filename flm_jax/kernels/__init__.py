"""Attention kernels, which `flm_jax.attention` chooses between, and products with weights."""

# The checkpoint name of the attention's output, and of what else a fused kernel keeps for its backward pass.
ATTENDED = "attended"
