"""Eight simulated devices for every test, and JAX's quiet mistakes made loud."""

import os

os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile thousands of tiny programs and run each once: less optimisation halves the time. The growths of a real
# run, optimised, are checked by the run itself. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the optimised programs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow, and CI machines are noisy: time is no measure of a test here.
settings.register_profile("house", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("house")


@pytest.fixture
def x64():
    """Double precision for the test that asks for it."""
    with jax.enable_x64(True):
        yield
