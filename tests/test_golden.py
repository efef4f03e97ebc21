"""Shapes and shardings of the full-size stages, as text: a change of either is seen in review.

`python -m tests.test_golden` writes the files anew.
"""

from pathlib import Path

import gin
import jax
import pytest
from jax.sharding import AbstractMesh

from flm_jax import costs
from flm_jax.cli import configure
from flm_jax.recipe import resolve
from flm_jax.sharding import MESH_AXES, sharding

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 1024  # v5p-2048
RECIPES = ["tele_flm_52b", "tele_flm_102b", "tele_flm_1t"]


def placements(name):
    """One line a parameter: path, signature, dtype, shape, what its dimensions are split over, a device's share."""
    gin.clear_config()
    configure.parse([f"gin_configs/recipes/{name}.gin"], [])
    recipe, run = configure.train()
    gin.clear_config()
    lines = []
    for stage in resolve(recipe):
        mesh = AbstractMesh(run.mesh_of(stage.stage).shape(DEVICES), MESH_AXES)
        lines.append(f"{stage.name}: {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}")
        for path, like, sig in costs.leaves(stage.cfg):
            where = sharding(sig, mesh, like.shape, path)
            split = ", ".join(
                "-" if not names else names if isinstance(names, str) else "+".join(names) for names in where.spec
            )
            shape, share = ("x".join(map(str, s)) for s in (like.shape, where.shard_shape(like.shape)))
            lines.append(f"  {path}: {sig}; {like.dtype} {shape}; split ({split}); {share}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", RECIPES)
def test_shapes_and_shardings_of_every_stage_are_those_reviewed(name):
    found = placements(name)
    assert found == (ROOT / f"tests/golden/{name}.txt").read_text(), (
        "shapes or shardings have changed; if they should, `python -m tests.test_golden` writes them anew"
    )


@pytest.mark.parametrize("name", RECIPES[1:])
def test_the_stages_of_one_recipe_begin_like_those_of_the_one_before(name):
    """Each recipe adds a stage to the one before it."""
    shorter = RECIPES[RECIPES.index(name) - 1]
    assert placements(name).startswith(placements(shorter))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    for recipe_name in RECIPES:
        (ROOT / f"tests/golden/{recipe_name}.txt").write_text(placements(recipe_name))
