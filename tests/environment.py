"""The environment of tests, set where this is imported, before JAX; and the one that a user's programs have."""

import atexit
import json
import os
import shutil
import tempfile

# What is set here for tests, and what launchers that tests start must not inherit (`as_user`).
_OURS = (
    "FLM_JAX_TESTS",
    "XLA_FLAGS",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "NPROC",
    "JAX_PLATFORMS",
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
)
# XLA's options for programs that compile in a quarter of the time: without fusions that it writes by MLIR, in one part
# instead of 32. What such a program rounds depends on the program around it: see `compiled_as_in_use` in conftest.py.
FAST = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}

# Set before JAX is imported; the test runner's worker processes inherit what its first process has set.
if "FLM_JAX_TESTS" not in os.environ:
    os.environ["FLM_JAX_TESTS"] = json.dumps({name: os.environ[name] for name in _OURS if name in os.environ})
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
    # A run that is resumed five times compiles the same programs five times.
    cache = tempfile.mkdtemp(prefix="flm_jax_compiled_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# XLA has as many threads as cores; on two of them, the collectives of eight simulated devices wait for each other
# for ever now and then. This is the variable that it reads.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before anything of Hugging Face is imported: no test needs a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests compile thousands of tiny programs and run each once: less optimisation halves the time. The growths of a real
# run, optimised, are checked by the run itself. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the optimised programs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def as_user() -> dict[str, str]:
    """The environment as it was before this file changed it: what a program that a user starts would have."""
    rest = {name: value for name, value in os.environ.items() if name not in _OURS}
    return {**rest, **json.loads(os.environ["FLM_JAX_TESTS"])}


def optimised() -> bool:
    """Whether the optimised programs are tested."""
    return os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0"


def fast_flags() -> str:
    """`FAST` as a part of `XLA_FLAGS`; empty if the optimised programs are tested."""
    return "" if optimised() else " ".join(f"--{name}={str(value).lower()}" for name, value in FAST.items())


def as_user_compiling_fast() -> dict[str, str]:
    """The same, for programs whose results are compared with each other alone: each program compiles fast, and once."""
    shared = [name for name in _OURS if name.startswith("JAX_") and name != "JAX_PLATFORMS" and name in os.environ]
    env = {**as_user(), **{name: os.environ[name] for name in shared}}
    return {**env, "XLA_FLAGS": f"{env.get('XLA_FLAGS', '')} {fast_flags()}".strip()}
