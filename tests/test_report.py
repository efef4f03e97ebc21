"""The report of a run, made from what a run has measured, without running one."""

from flm_jax import report
from flm_jax.recipe import Recipe, Stage, resolve
from tests import small


def test_a_report_names_the_shape_of_every_model():
    """Also of one whose configuration holds another, as those of Llama 3.1 do."""
    (stage,) = resolve(Recipe((Stage("tuned", small.shape(rope_scaling=small.SCALING), 3, 8),)))
    evals = [dict(stage="tuned", step=3, tokens=1, flops=1.0, loss=2.5, bits_per_byte=1.25)]
    history = dict(evals=evals, growths=[], skipped=[])
    result = report.summary([stage], history, {}, 3.0, 16, "a text")
    row = next(line for line in report.markdown(result).splitlines() if line.startswith("| tuned |"))
    assert "2 layers x 24 wide, 4 (2 kv) heads of 4" in row
    assert "| 2.5000 | 1.250 |" in row
