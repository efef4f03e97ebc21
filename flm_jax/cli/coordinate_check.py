r"""Check muP's coordinates: whether activations keep their size as the model grows wider, after some steps of training.

  python experiments/coordinate_check.py --widths=64,128,256,512 --plot=coordinates.png [--json=FILE]

One model trains at every width for a few steps, on texts that it makes itself. For each kind of layer the mean absolute
size of its activations is measured; under muP it does not depend on the width. The exit status is 1 if the slope of a
size's logarithm over the width's is further from 0 than --limit, for any kind. Check a model and a rate of your own by

      --gin_file=RECIPE.gin --gin_bindings='coordinate_check.model = @ModelConfig()' \
      --gin_bindings='coordinate_check.optimizer = @OptimizerConfig()'
"""

from __future__ import annotations

from typing import Any

from absl import flags

from flm_jax.cli.flags import define_gin, define_json, launch, refuse


def define() -> None:
    """Defines the flags."""
    define_gin("coordinate_check.model = @small_52b()")
    define_json()
    flags.DEFINE_list("widths", ["64", "128", "256", "512"], "Widths of the residual stream, separated by commas.")
    flags.DEFINE_integer("steps", 10, "Steps of training before the sizes are compared.", lower_bound=0)
    flags.DEFINE_integer("seeds", 2, "Runs at each width, whose sizes are averaged.", lower_bound=1)
    flags.DEFINE_float("limit", 0.1, "The steepest slope, up or down, that still counts as flat.", lower_bound=0.0)
    flags.DEFINE_string("plot", None, "Write the picture to this file, as PNG.")
    flags.DEFINE_bool(
        "same_rate", False, "For contrast: matrices learn at the same rate at every width, as without muP."
    )


def run(values: Any) -> None:
    """Checks the model that the flags describe."""
    try:
        widths = [int(width) for width in values.widths]
    except ValueError:
        refuse(f"--widths={','.join(values.widths)}: give integers separated by commas, such as 64,128,256")
    if min(widths, default=0) < 1 or len(set(widths)) < max(len(widths), 2):
        refuse(f"--widths={','.join(values.widths)}: give two or more different widths")
    from flm_jax.cli import coordinates  # Imported here, so that --help is fast.

    asked = {name: values[name].value for name in ("steps", "seeds", "same_rate")}
    output = (values.limit, values.plot, values.json)
    coordinates.run_coordinate_check(values.gin_file, values.gin_bindings, {**asked, "widths": widths}, *output)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run, computes=True)


if __name__ == "__main__":
    main()
