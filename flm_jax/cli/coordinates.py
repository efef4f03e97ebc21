"""The coordinate check from gin and flags: sizes of activations at each width or depth, and whether they are flat."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flm_jax import mup
from flm_jax.cli import configure
from flm_jax.cli.configure import check_used, configured, parse
from flm_jax.cli.errors import started
from flm_jax.cli.runs import check_json_file
from flm_jax.config import ModelConfig, small_52b
from flm_jax.files import atomic_write, write_json
from flm_jax.mup import picture
from flm_jax.optimizer import OptimizerConfig
from flm_jax.records import as_dict


def run_coordinate_check(
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
    asked: Mapping[str, Any],
    limit: float,
    picture_file: str | None,
    json_file: str | None,
) -> None:
    """Prints the sizes of activations at each width or depth; exits with status 1 if one is not flat."""
    with started():
        check_json_file(json_file)
        check_json_file(picture_file, "plot")
        parse(gin_files, gin_bindings)
        given = configured(configure.coordinate_check)
        check_used()
        model = given["model"] or (_for_depths() if asked.get("depths") else small_52b())
        optimizer = given["optimizer"] or OptimizerConfig(learning_rate=4e-3)
        check = mup.Check(model, optimizer, **asked)
        found = mup.check(check, lambda size, sizes: print(f"{check.axis} {size}: {_sizes(sizes)}", flush=True))
        beyond = found.beyond(limit)
        for kind, slopes in found.slopes.items():
            verdict = "NOT FLAT" if kind in beyond else "flat"
            print(f"{kind:<10} slope {slopes[0]:+.3f} at step 0, {slopes[-1]:+.3f} after step {check.steps}: {verdict}")
        print(f"The limit is {limit:g}, up or down, after step {check.steps}.")
        if picture_file:
            atomic_write(Path(picture_file), picture.draw(found))
        if json_file:
            rest = {"model": as_dict(model), "optimizer": as_dict(optimizer), "limit": limit, "beyond": beyond}
            write_json(Path(json_file), {**found.record(), **asked, **rest})
    if beyond:
        sys.exit(1)


def _for_depths() -> ModelConfig:
    """The model whose depth is varied unless another is given, with a multiplier that follows the depth.

    At initialisation the sum of what blocks add falls with the root of the depth. Its embedding is large beside that.
    """
    model = small_52b()
    return model.replace(input_mult=100.0, residual_mult=0.5, base_layers=model.layers)


def _sizes(sizes: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {size:.4g}" for kind, size in sizes.items())
