r"""Check whether activations keep their size as a model grows wider or deeper, after some steps of training.

  python experiments/coordinate_check.py --widths=64,128,256,512 --plot=coordinates.png [--json=FILE]
  python experiments/coordinate_check.py --depths=4,8,16,32 --plot=coordinates_depth.png [--json=FILE]

One model trains at every width for a few steps, on texts that it makes itself. For each kind of layer the mean absolute
size of its activations is measured; under muP it does not depend on the width, and with ModelConfig.base_layers
(CompleteP) not on the depth. The exit status is 1 if the slope of a size's logarithm over that of the width or depth is
further from 0 than --limit, for any kind. Check a model and a rate of your own by

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
    flags.DEFINE_list("depths", [], "Numbers of layers, separated by commas, which are checked in place of widths.")
    flags.DEFINE_integer("steps", 10, "Steps of training before the sizes are compared.", lower_bound=0)
    flags.DEFINE_integer("seeds", 2, "Runs at each width or depth, whose sizes are averaged.", lower_bound=1)
    flags.DEFINE_float("limit", 0.1, "The steepest slope, up or down, that still counts as flat.", lower_bound=0.0)
    flags.DEFINE_string("plot", None, "Write the picture to this file, as PNG.")
    flags.DEFINE_bool(
        "same_rate", False, "For contrast: matrices learn at the same rate at every width, as without muP."
    )
    flags.DEFINE_bool(
        "same_residual",
        False,
        "For contrast: the residual multiplier is the same at every depth, as without CompleteP.",
    )


def run(values: Any) -> None:
    """Checks the model that the flags describe."""
    widths = _sizes("widths", values.widths, "64,128,256")
    depths = _sizes("depths", values.depths, "4,8,16") if values.depths else []
    if depths and values["widths"].present:
        refuse("--widths and --depths: give one of them, since the check varies one thing")
    if depths and values.same_rate:
        refuse("--same_rate is for --widths: over depth, rates are the same in any case")
    if values.same_residual and not depths:
        refuse("--same_residual is for --depths: over width, the residual multiplier is the same in any case")
    from flm_jax.cli import coordinates  # Imported here, so that --help is fast.

    asked = {name: values[name].value for name in ("steps", "seeds", "same_rate", "same_residual")}
    output = (values.limit, values.plot, values.json)
    asked |= {"depths": depths} if depths else {"widths": widths}
    coordinates.run_coordinate_check(values.gin_file, values.gin_bindings, asked, *output)


def _sizes(flag: str, texts: list[str], example: str) -> list[int]:
    """The integers in a flag; refuses what is none, and less than two that differ."""
    try:
        found = [int(text) for text in texts]
    except ValueError:
        refuse(f"--{flag}={','.join(texts)}: give integers separated by commas, such as {example}")
    if min(found, default=0) < 1 or len(set(found)) < max(len(found), 2):
        refuse(f"--{flag}={','.join(texts)}: give two or more different {flag}")
    return found


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run, computes=True)


if __name__ == "__main__":
    main()
