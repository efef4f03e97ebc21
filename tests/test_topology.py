"""Topologies by their makers' names: sizes, bounds, hosts and slices; and the chips' figures."""

import pytest

from flm_jax.planning.topology import CHIPS, topology

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("name", "devices", "bounds", "hosts", "slices"),
    [
        ("v5p-2048", 1024, (8, 8, 16), 256, 1),
        ("v4-128", 64, (4, 4, 4), 16, 1),
        ("2xv5e-256", 512, (16, 16), 128, 2),
        ("v5litepod-16", 16, (4, 4), 4, 1),
        ("v6e-8", 8, (2, 4), 2, 1),
        ("h100-64", 64, (64,), 8, 1),
        ("H200-8", 8, (8,), 1, 1),
    ],
)
def test_topologies_by_their_makers_names(name, devices, bounds, hosts, slices):
    found = topology(name)
    assert (found.devices, found.bounds, found.hosts, found.slices) == (devices, bounds, hosts, slices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-2000", "counts TensorCores, two per chip, and the nearest sizes are v5p-1920 and v5p-2048"),
        ("h100-12", "the nearest sizes are h100-8 and h100-16"),
        ("v9-8", "the chips are v4, v5e, v5p, v6e, h100, h200"),
        ("pod", "such as v5p-2048, or 2xv5e-256 for two slices"),
        ("0xv5e-16", "no topology"),
    ],
)
def test_unknown_topologies_are_refused_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        topology(name)


def test_every_chip_names_its_source_and_a_clock_that_fits_its_peak():
    units = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2}
    for name, chip in CHIPS.items():
        assert chip.source
        if name in units:
            assert 2 * units[name] * chip.clock == pytest.approx(chip.flops, rel=0.02)
