"""What a run uses of its machine: memory, and the share of the devices' peak FLOP/s."""

from __future__ import annotations

import functools
from pathlib import Path

import jax

# Peak dense bf16 FLOP/s of a chip (sources: `flm_jax/planning/topology.py`), and the chips' names as JAX gives them.
PEAK_FLOPS = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "h100": 989e12, "h200": 989e12}
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


@functools.cache
def peak_flops() -> float | None:
    """Peak dense bf16 FLOP/s of all devices together; None if their kind is not known here."""
    chip = DEVICE_KINDS.get(jax.devices()[0].device_kind)
    return None if chip is None else PEAK_FLOPS[chip] * jax.device_count()


def utilisation(flops_per_second: float) -> dict[str, float]:
    """Model FLOPs utilisation, as a measurement: FLOP/s over the peak of all devices; {} if that is not known."""
    peak = peak_flops()
    return {} if peak is None else {"utilisation": flops_per_second / peak}


def memory() -> dict[str, float]:
    """Bytes that are in use, as measurements.

    Returns:
      `memory/device` and `memory/device_peak`, the largest of this process's devices, where the backend counts them;
      otherwise `memory/process`, what the process holds of the machine's memory; {} where neither is known.
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(own and "bytes_in_use" in own for own in stats):
        found = {"memory/device": float(max(own["bytes_in_use"] for own in stats))}
        if all("peak_bytes_in_use" in own for own in stats):
            found["memory/device_peak"] = float(max(own["peak_bytes_in_use"] for own in stats))
        return found
    resident = _resident()
    return {} if resident is None else {"memory/process": resident}


def _resident() -> float | None:
    """Bytes of memory that this process holds; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("VmRSS:")), None)
    return None if kilobytes is None else 1024.0 * int(kilobytes)
