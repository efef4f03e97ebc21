"""The picture of a selection: chosen conversations on top of a sample of the rest, in two dimensions."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from flm_jax.records import counted

# Domains with a colour of their own; the others are grey.
COLOURS = 8
ITERATIONS = 30


def projection(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two directions of largest variance, float32 (D, 2), and the share of the variance in each, (2,).

    Args:
      features: float32 (n, D).
    """
    centred = features - features.mean(axis=0)[None]
    # Orthogonal iteration: a whole decomposition would take minutes where D is that of a large model.
    basis = np.random.default_rng(0).standard_normal((features.shape[1], 8)).astype(np.float32)
    for _ in range(ITERATIONS):
        basis, _ = np.linalg.qr(centred.T @ (centred @ basis))
    _, sizes, turned = np.linalg.svd(centred @ basis, full_matrices=False)
    axes = basis @ turned[:2].T
    # The sign of a direction is arbitrary: its largest entry is made positive.
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
    total = float(np.square(centred).sum())
    return axes * np.where(largest < 0, -1, 1).astype(np.float32), np.square(sizes[:2]) / max(total, 1e-30)


def draw(
    rest: np.ndarray, chosen: np.ndarray, domains_of_chosen: np.ndarray, names: Sequence[str], counts: Sequence[int]
) -> bytes:
    """The picture as PNG.

    Args:
      rest: features of the sample, float32 (n, D).
      chosen: features of chosen conversations, (m, D).
      domains_of_chosen: int (m,), numbers of their domains.
      names: of the domains.
      counts: chosen conversations of each domain.
    """
    from matplotlib.figure import Figure

    axes, shares = projection(np.concatenate([rest, chosen]))
    figure = Figure(figsize=(8, 6), layout="constrained")
    plot = figure.add_subplot()
    at_rest, at = rest @ axes, chosen @ axes
    plot.scatter(
        at_rest[:, 0], at_rest[:, 1], s=9, c="0.82", linewidths=0, label=f"left by the rules (sample of {len(rest):,})"
    )
    order = sorted(range(len(names)), key=lambda number: (-counts[number], names[number]))
    for rank, number in enumerate(order):
        own = domains_of_chosen == number
        if not own.any():
            continue
        colour = f"C{rank}" if rank < COLOURS else "0.4"
        label = f"{names[number][:24]} ({counts[number]:,})" if rank < COLOURS else None
        plot.scatter(at[own, 0], at[own, 1], s=7, alpha=0.6, linewidths=0, label=label, color=colour)
    plot.set_xlabel(f"first principal component, {shares[0]:.0%} of the variance")
    plot.set_ylabel(f"second, {shares[1]:.0%}")
    shown = "" if len(chosen) == sum(counts) else f" ({len(chosen):,} are shown)"
    plot.set_title(f"{counted(sum(counts), 'chosen conversation')} by domain{shown}")
    plot.legend(markerscale=3, fontsize="small", loc="best")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()
