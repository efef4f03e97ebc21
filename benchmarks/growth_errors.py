"""The error of every growth operator on every axis, in three precisions: the table of docs/growth_errors.md.

  python benchmarks/growth_errors.py [--out=FILE]

Every operator of the registry is measured on each axis that it grows, and on all of them together. An operator that
does not accept these sizes is measured at twice the old size.
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

# For each precision, which is also the dtype of activations: the dtype of parameters.
PRECISIONS: Mapping[str, str] = {"float64": "float64", "float32": "float32", "bfloat16": "float32"}
COLUMNS = ("operator", "promises preservation", "axis", "sizes", *PRECISIONS)
SHAPE = dict(embed=64, heads=4, kv_heads=4, head_dim=16, mlp=176, layers=4, vocab=128)
GROUPED = {**SHAPE, "heads": 8, "kv_heads": 2}
FOLDED = "embed, multiplier folded"
ALL = "all axes"
BATCH, TIME = 2, 24


@dataclass(frozen=True)
class Case:
    """A growth to measure, with every operator that grows all of its axes.

    Attributes:
      name: the name of its rows.
      before: sizes before the growth.
      after: the sizes that change, after the growth.
      doubled: `after` for operators that grow by whole multiples only.
      keeps_multiplier: whether the logits' multiplier stays the same; otherwise its change is folded into the head,
        which rounds the head's weights once more.
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
      operator: the operator's name in the registry.
      preserving: whether it promises to preserve the function.
      axis: the name of the case.
      sizes: the sizes that grew, as text.
      errors: for each precision, the relative difference of the logits; 0 means bit-equal.
    """

    operator: str
    preserving: bool
    axis: str
    sizes: str
    errors: Mapping[str, float]

    @property
    def key(self) -> tuple[str, str, str, bool]:
        """The row without its measurements, to compare tables by."""
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
    """A small model whose numerics make growth difficult: small embeddings with eps 1e-5."""
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


# Each growth runs once, so compiling it with optimisation would take longer than the optimisation saves.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=QUICKLY)
def _grown(old: ModelConfig, new: ModelConfig, method: str, params: Any) -> Any:
    return grow(params, old, new, Growth(method), jax.random.key(1))


@functools.partial(jax.jit, static_argnums=0)
def _apply(cfg: ModelConfig, params: Any, tokens: jax.Array, masks: Any) -> jax.Array:
    return model.apply(cfg, params, tokens, None, masks)


@functools.cache
def _source(cfg: ModelConfig) -> tuple[Any, np.ndarray, np.ndarray]:
    """Parameters with random norm scales, as after training; random tokens; the logits of these tokens."""
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
    """The rows of the table.

    Args:
      operators: names of operators; None: all of the registry.
      precisions: names from `PRECISIONS`; other columns are left out.

    Yields:
      One row per operator and case.
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
    """The sizes of these axes after the growth: those of `case.after`, or the doubled ones if the operator refuses."""
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
    """The largest difference of a logit, over the largest logit of the source; logits of new tokens do not count."""
    growth = Growth(method)
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        old, target = config(case.before, precision), config({**case.before, **after}, precision)
        if case.keeps_multiplier:
            target = target.replace(output_mult=old.logits_mult * target.embed / target.base_width)
        new = grown_config(old, target, growth)
        params, tokens, before = _source(old)
        # Growth depends on the parameters' dtype only, so float32 and bfloat16 share one compiled growth.
        stored = (cfg.replace(compute_dtype=PRECISIONS[precision]) for cfg in (old, new))
        grown = _grown(*stored, method, params)
        found = _apply(new, grown, tokens, masks_at(old, new, growth, 0))
        found = np.asarray(found, np.float64)[..., : old.vocab]
    return float(np.abs(before - found).max() / np.abs(before).max())


HEADER = f"""# How exact every operator is

    python benchmarks/growth_errors.py

wrote this page. It measures every operator of the registry ([growth.md](growth.md)) on each axis that it grows, and on
all of these axes together. Each number is the largest difference of a logit between the grown model and its source,
divided by the source's largest logit. **0 means bit-equal.**

- The source has {{shape}};
  for rows that widen groups, for new or divided key heads, and for all axes, {{grouped}}.
  Norm scales are random in [0.5, 1.5]. Embeddings have standard deviation 0.02 and eps is 1e-5, so that eps has an
  effect in the first norm. The input is {BATCH} x {TIME} random tokens.
- In the columns float64 and float32, parameters and activations have that dtype. In the column bfloat16, parameters are
  float32 and activations bfloat16, and the bfloat16 grown model is compared with the bfloat16 source. There, operators
  that scale their copies show the rounding of the scaled weights to bfloat16; it is not an error of the operator.
- The logits' multiplier stays the same, except in the rows "{FOLDED}". There it changes with the
  width, as in muP, and the change is folded into the head, which rounds the head's weights once more.
- Masked growth is compared at the start of its ramp. If the vocabulary grows, only logits of old tokens are compared.
- An operator that accepts whole multiples only is measured at twice the old size.
- Operators that do not promise preservation are still exact where no new entry affects an old logit: with new tokens,
  and where key heads are divided among their queries, which adds no new entries.
- Device: {{device}}; matrix products in its highest precision.
"""


def page(rows: Iterable[Row]) -> str:
    """The page in Markdown."""
    words = lambda sizes: ", ".join(f"{axis} {size}" for axis, size in sizes.items())  # noqa: E731
    changed = {axis: size for axis, size in GROUPED.items() if SHAPE[axis] != size}
    header = HEADER.format(shape=words(SHAPE), grouped=words(changed), device=jax.devices()[0].device_kind)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(row) for row in rows)]
    return header + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parse(text: str) -> list[Row]:
    """The rows of a page in Markdown."""
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
