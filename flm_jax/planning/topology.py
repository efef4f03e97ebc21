"""Machines to plan for: kinds of chips, and topologies such as ``v5p-2048``.

Names are those of the manufacturer: in ``v5p-2048`` and for v4 the number counts TensorCores, two per chip; in
``v5e-256`` and ``v6e-256`` it counts chips; ``h100-64`` is 8 nodes of 8 GPUs. ``4xv5e-256`` is four slices, connected
by the data centre's network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flm_jax.records.nearest import meant
from flm_jax.tracking.machine import PEAK_FLOPS


@dataclass(frozen=True)
class Chip:
    """The properties of one kind of accelerator that planning uses.

    Attributes:
      memory: bytes of high-bandwidth memory.
      flops: peak dense bf16 FLOP/s.
      bandwidth: bytes/s of that memory.
      links: bytes/s that a chip sends to its neighbours, over all links.
      network: bytes/s that a chip sends beyond its slice or node: its part of the host's network bandwidth.
      clock: Hz, to convert the compiler's cycles to seconds; 0: there are no estimated cycles.
      per_host: chips per host.
      counts: by how much one chip increases the number in a topology's name (2 if it counts TensorCores).
      sizes: the available shapes of a slice, in chips along each axis; empty: any number of whole hosts.
      compiler: the chip's name and settings for the TPU compiler; None: that compiler does not support it.
      source: where the figures come from.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float
    network: float
    clock: float
    per_host: int
    counts: int
    sizes: tuple[tuple[int, ...], ...]
    compiler: tuple[str, dict[str, object]] | None
    source: str


def _torus(largest: int) -> tuple[tuple[int, ...], ...]:
    """The slice shapes of v4 and v5p: some up to 2x4x4, then the most compact cuboids with sides that 4 divides."""
    sizes: list[tuple[int, ...]] = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    sides = [4 * n for n in range(1, 29)]
    best: dict[int, tuple[int, ...]] = {}
    for a in sides:
        for b in (s for s in sides if s >= a):
            for c in (s for s in sides if s >= b):
                n, old = a * b * c, best.get(a * b * c)
                if n <= largest and (old is None or (c, -a) < (old[2], -old[0])):
                    best[n] = (a, b, c)
    return (*sizes, *(best[n] for n in sorted(best)))


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_MEGACORE: dict[str, object] = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
_TPU = "Google Cloud's TPU documentation, page {}; clock derived: peak / (2 x 128^2 x {} matrix units)"

CHIPS = {
    "v4": Chip(
        memory=32 * 2**30,
        flops=PEAK_FLOPS["v4"],
        bandwidth=1.2e12,
        links=300e9,
        network=6.25e9,
        clock=1.05e9,
        per_host=4,
        counts=2,
        sizes=_torus(4096),
        compiler=("v4", _MEGACORE),
        source=_TPU.format("TPU v4", 8),
    ),
    "v5e": Chip(
        memory=16 * 2**30,
        flops=PEAK_FLOPS["v5e"],
        bandwidth=819e9,
        links=200e9,
        network=3.125e9,
        clock=1.5e9,
        per_host=4,
        counts=1,
        sizes=_FLAT,
        compiler=("v5e", {}),
        source=_TPU.format("TPU v5e", 4),
    ),
    "v5p": Chip(
        memory=95 * 2**30,
        flops=PEAK_FLOPS["v5p"],
        bandwidth=2765e9,
        links=600e9,
        network=6.25e9,
        clock=1.75e9,
        per_host=4,
        counts=2,
        sizes=_torus(6144),
        compiler=("v5", _MEGACORE),
        source=_TPU.format("TPU v5p", 8),
    ),
    "v6e": Chip(
        memory=32 * 2**30,
        flops=PEAK_FLOPS["v6e"],
        bandwidth=1.64e12,
        links=400e9,
        network=12.5e9,
        clock=1.75e9,
        per_host=4,
        counts=1,
        sizes=_FLAT,
        compiler=("v6e", {}),
        source="Google Cloud's TPU documentation, page TPU v6e; clock assumed: that of v5p, which fits the peak",
    ),
    "h100": Chip(
        memory=80e9,
        flops=PEAK_FLOPS["h100"],
        bandwidth=3.35e12,
        links=450e9,
        network=50e9,
        clock=0.0,
        per_host=8,
        counts=1,
        sizes=(),
        compiler=None,
        source="NVIDIA's H100 data sheet, SXM5: dense bf16, NVLink in one direction",
    ),
    "h200": Chip(
        memory=141e9,
        flops=PEAK_FLOPS["h200"],
        bandwidth=4.8e12,
        links=450e9,
        network=50e9,
        clock=0.0,
        per_host=8,
        counts=1,
        sizes=(),
        compiler=None,
        source="NVIDIA's H200 data sheet, SXM: dense bf16, NVLink in one direction",
    ),
}


@dataclass(frozen=True)
class Topology:
    """One or more slices of chips.

    Attributes:
      name: as it was given.
      chip: the kind of chip.
      slices: number of slices.
      bounds: chips along each physical axis of a slice; one axis if the manufacturer specifies none.
    """

    name: str
    chip: Chip
    slices: int
    bounds: tuple[int, ...]

    @property
    def devices(self) -> int:
        """Number of chips in all slices; each is one device."""
        total = self.slices
        for size in self.bounds:
            total *= size
        return total

    @property
    def hosts(self) -> int:
        """Number of hosts, each with one process."""
        return max(self.devices // self.chip.per_host, 1)


def topology(name: str) -> Topology:
    """The topology with a name such as ``v5p-2048``.

    Raises:
      ValueError: there is no such chip or no such size; the message names the nearest sizes.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+)-(\d+)", name.lower().replace("v5litepod", "v5e"))
    if not match or match[2] not in CHIPS:
        near = meant(match[2] if match else name.partition("-")[0], CHIPS) or "."
        raise ValueError(
            f"There is no topology {name!r}: write a chip and a size, such as v5p-2048, or 2xv5e-256 for two slices; "
            f"the chips are {', '.join(CHIPS)}{near}"
        )
    slices, kind, number = int(match[1] or 1), match[2], int(match[3])
    chip = CHIPS[kind]
    if chip.sizes:
        by_number = {chip.counts * _product(bounds): bounds for bounds in chip.sizes}
    else:
        whole = max(-(-number // chip.per_host), 1) * chip.per_host
        by_number = {n: (n,) for n in (1, 2, 4, max(whole - chip.per_host, chip.per_host), whole)}
    if slices < 1 or number not in by_number:
        below = max((n for n in by_number if n < number), default=min(by_number))
        above = min((n for n in by_number if n > number), default=max(by_number))
        near = " and ".join(f"{kind}-{n}" for n in sorted({below, above}))
        sizes = "sizes are" if below != above else "size is"
        what = "TensorCores, two per chip" if chip.counts == 2 else "chips"
        raise ValueError(f"There is no topology {name!r}: the number counts {what}, and the nearest {sizes} {near}.")
    return Topology(name, chip, slices, by_number[number])


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
