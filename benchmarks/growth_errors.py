"""How far every growth operator is from exact, axis by axis, in three precisions: a table for the documentation.

  python benchmarks/growth_errors.py [--out=FILE]

Whatever is in the registry is measured on every axis that it grows, one at a time and all together. An operator that
refuses these ratios is measured at twice the size.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flm_jax import model
from flm_jax.config import ModelConfig
from flm_jax.growth import REGISTRY, Growth, axis_maps, grow, grown_config, masks_at
from flm_jax.signature import KINDS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "growth_errors.md"
_OUT = flags.DEFINE_string("out", str(PAGE), "Write the page to this file.")

# By the name of a precision: the dtype of the parameters; that of activations has its name.
PRECISIONS: Mapping[str, str] = {"float64": "float64", "float32": "float32", "bfloat16": "float32"}
COLUMNS = ("operator", "promises preservation", "axis", "sizes", *PRECISIONS)
SHAPE = dict(embed=64, heads=4, kv_heads=4, head_dim=16, mlp=176, layers=4, vocab=128)
GROUPED = {**SHAPE, "heads": 8, "kv_heads": 2}
FOLDED = "embed, multiplier folded"
ALL = "all axes"
BATCH, TIME = 2, 24


@dataclass(frozen=True)
class Case:
    """What grows: a row for every operator that grows all of these axes.

    Attributes:
      name: the row's name.
      before: sizes before.
      after: the sizes that change, after.
      doubled: the same, for operators that grow by whole multiples only.
      keeps_multiplier: whether the logits are multiplied by what they were; else its change is folded into the head,
        which rounds the head anew.
    """

    name: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    doubled: Mapping[str, int]
    keeps_multiplier: bool = True


CASES = (
    Case("embed", SHAPE, dict(embed=80), dict(embed=128)),
    Case(FOLDED, SHAPE, dict(embed=80), dict(embed=128), keeps_multiplier=False),
    Case("heads, with key heads", SHAPE, dict(heads=5, kv_heads=5), dict(heads=8, kv_heads=8)),
    Case("heads, groups widen", GROUPED, dict(heads=12), dict(heads=16)),
    Case("kv_heads, with their groups", GROUPED, dict(heads=12, kv_heads=3), dict(heads=16, kv_heads=4)),
    Case("kv_heads, divided", GROUPED, dict(kv_heads=4), dict(kv_heads=4)),
    Case("head_dim", SHAPE, dict(head_dim=20), dict(head_dim=32)),
    Case("mlp", SHAPE, dict(mlp=220), dict(mlp=352)),
    Case("layers", SHAPE, dict(layers=5), dict(layers=8)),
    Case("vocab", SHAPE, dict(vocab=160), dict(vocab=256)),
    Case(
        ALL,
        GROUPED,
        dict(embed=80, heads=12, kv_heads=3, head_dim=20, mlp=220, layers=5, vocab=160),
        dict(embed=128, heads=16, kv_heads=4, head_dim=32, mlp=352, layers=8, vocab=256),
    ),
)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      operator: its name in the registry.
      preserving: whether it promises that nothing changes.
      axis: the case's name.
      sizes: what grew, from where to where.
      errors: by precision, the relative difference of the logits; 0 means bit-equal.
    """

    operator: str
    preserving: bool
    axis: str
    sizes: str
    errors: Mapping[str, float]

    @property
    def key(self) -> tuple[str, str, str, bool]:
        """What the row is about, without what was measured."""
        return self.operator, self.axis, self.sizes, self.preserving


def cells(row: Row) -> list[str]:
    """A row's cells as text."""
    promise = "yes" if row.preserving else "no"
    return [row.operator, promise, row.axis, row.sizes, *(figure(row.errors[p]) for p in PRECISIONS)]


def figure(error: float) -> str:
    """An error to one digit, such as 7e-7; 0 when bit-equal."""
    if not error:
        return "0"
    digit, exponent = f"{error:.0e}".split("e")
    return f"{digit}e{int(exponent)}"


def config(sizes: Mapping[str, int], precision: str) -> ModelConfig:
    """A small model with the numerics that make growth hard: small embeddings under eps 1e-5."""
    axes: dict[str, Any] = dict(sizes)
    return ModelConfig(
        **axes,
        base_width=16,
        init_std=0.3,
        init_std_vector=0.02,
        norm_eps=1e-5,
        compute_dtype=precision,
        param_dtype=PRECISIONS[precision],
    )


# The growth runs once: compiling it takes longer than any optimisation of it could save.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=QUICKLY)
def _grown(old: ModelConfig, new: ModelConfig, method: str, params: Any) -> Any:
    return grow(params, old, new, Growth(method), jax.random.key(1))


@functools.partial(jax.jit, static_argnums=0)
def _apply(cfg: ModelConfig, params: Any, tokens: jax.Array, masks: Any) -> jax.Array:
    return model.apply(cfg, params, tokens, None, masks)


@functools.cache
def _source(cfg: ModelConfig) -> tuple[Any, np.ndarray, np.ndarray]:
    """Parameters with norm scales that are not 1, as after training; random tokens; their logits."""
    rng = np.random.default_rng(0)
    _, signatures = model.declared(cfg)
    params = jax.tree.map(
        lambda x, sig: x * rng.uniform(0.5, 1.5, x.shape).astype(x.dtype) if sig.gains else x,
        jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0)),
        signatures,
    )
    tokens = rng.integers(0, cfg.vocab, (BATCH, TIME), dtype=np.int32)
    return params, tokens, np.asarray(_apply(cfg, params, tokens, None), np.float64)


def measure(operators: Iterable[str] | None = None, precisions: Iterable[str] = tuple(PRECISIONS)) -> Iterator[Row]:
    """Measures operators on every axis that they grow.

    Args:
      operators: their names; None: all of the registry.
      precisions: of `PRECISIONS`; other columns are left out.

    Yields:
      The table's rows.
    """
    for name in REGISTRY if operators is None else operators:
        grows = {axis for axis, kind in KINDS.items() if kind in REGISTRY[name].kinds}
        for case in CASES:
            after = {axis: size for axis, size in case.after.items() if case.name != ALL or axis in grows}
            if not set(after) <= grows or (case.name == ALL and len(grows) == 1):
                continue
            yield _row(name, case, set(after), tuple(precisions))


def _row(method: str, case: Case, axes: set[str], precisions: tuple[str, ...]) -> Row:
    after = _accepted(method, case, axes)
    sizes = ", ".join(f"{axis} {case.before[axis]} -> {size}" for axis, size in after.items())
    errors = {precision: _error(method, case, after, precision) for precision in precisions}
    return Row(method, REGISTRY[method].preserving, case.name, sizes, errors)


def _accepted(method: str, case: Case, axes: set[str]) -> dict[str, int]:
    """The sizes after, of these axes: doubled where the operator refuses the others."""
    after, doubled = (
        {axis: sizes[axis] for axis in case.after if axis in axes} for sizes in (case.after, case.doubled)
    )
    old, new = (config({**case.before, **sizes}, "float32") for sizes in ({}, after))
    try:
        axis_maps(old, new, Growth(method))
    except ValueError:
        return doubled
    return after


def _error(method: str, case: Case, after: Mapping[str, int], precision: str) -> float:
    """The largest difference of a logit of the old vocabulary, over the largest logit."""
    growth = Growth(method)
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        old, target = config(case.before, precision), config({**case.before, **after}, precision)
        if case.keeps_multiplier:
            target = target.replace(output_mult=old.logits_mult * target.embed / target.base_width)
        new = grown_config(old, target, growth)
        params, tokens, before = _source(old)
        # Growth works on parameters: that of a float32 model serves the bfloat16 one, and is compiled once.
        stored = (cfg.replace(compute_dtype=PRECISIONS[precision]) for cfg in (old, new))
        # Names for one operator share what is compiled.
        first = next(name for name, operator in REGISTRY.items() if operator.map is REGISTRY[method].map)
        grown = _grown(*stored, first, params)
        found = _apply(new, grown, tokens, masks_at(old, new, growth, 0))
        found = np.asarray(found, np.float64)[..., : old.vocab]
    return float(np.abs(before - found).max() / np.abs(before).max())


HEADER = f"""# How exact every operator is

    python benchmarks/growth_errors.py

wrote this page: every operator of the registry ([growth.md](growth.md)), on every axis that it grows, one at a time,
then on all of them together while the axes that it does not grow stay. A figure is the largest difference of a logit
between the grown model and its source, over the source's largest logit. **0 means bit-equal.**

- The source has {{shape}};
  for rows that widen groups, for new or divided key heads, and for all axes, {{grouped}}.
  Norm scales are random in [0.5, 1.5], embeddings have standard deviation 0.02 and eps is 1e-5, so that eps weighs in
  the first norm. {BATCH} x {TIME} random tokens.
- float64 and float32 are the dtypes of parameters and activations alike. In the column bfloat16 parameters are float32
  and activations bfloat16, and the bfloat16 grown model is compared with the bfloat16 source. There an operator that
  weighs its copies rounds the weighted weights anew; that is the rounding of bfloat16, not an error of the rule.
- The logits' multiplier stays what it was, but in the rows "{FOLDED}": there it changes with the
  width, as muP has it, and the head absorbs the change, which rounds it anew.
- Masked growth is compared at the start of its ramp. Of a grown vocabulary the old logits are compared.
- An operator that takes whole multiples only is measured at twice the size.
- Operators that promise nothing are nevertheless exact where nothing new reaches an old logit: on new tokens, and where
  key heads are divided among their queries, which brings no new entry.
- Device: {{device}}; matrix products at the highest precision that it has.
"""


def page(rows: Iterable[Row]) -> str:
    """The page, in Markdown."""
    words = lambda sizes: ", ".join(f"{axis} {size}" for axis, size in sizes.items())  # noqa: E731
    changed = {axis: size for axis, size in GROUPED.items() if SHAPE[axis] != size}
    header = HEADER.format(shape=words(SHAPE), grouped=words(changed), device=jax.devices()[0].device_kind)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(row) for row in rows)]
    return header + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parse(text: str) -> list[Row]:
    """The rows of a page."""
    table = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    return [
        Row(operator, promise == "yes", axis, sizes, dict(zip(PRECISIONS, map(float, errors), strict=True)))
        for operator, promise, axis, sizes, *errors in table
    ]


def main(argv: list[str]) -> None:
    """Measures everything and writes the page."""
    del argv
    rows = []
    for row in measure():
        print(" | ".join(cells(row)), flush=True)
        rows.append(row)
    Path(_OUT.value).write_text(page(rows))


if __name__ == "__main__":
    app.run(main)
