"""The picture of a coordinate check: the size of each kind of activation against width or depth, a line per step."""

from __future__ import annotations

import io

from flm_jax.mup.coordinates import Found


def draw(found: Found) -> bytes:
    """The picture as PNG: a panel per kind of layer, with the slope after the last step in its title."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(len(found.sizes), 3)
    rows = -(-len(found.sizes) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    last = max(len(each) for each in found.sizes.values()) - 1
    colours = colormaps["viridis"]
    for panel, (kind, sizes) in zip(panels[: len(found.sizes)], found.sizes.items(), strict=True):
        for step, at in enumerate(sizes):
            label = f"step {step}" if step in (0, last) else None
            panel.plot(found.at, at, marker="o", markersize=3, color=colours(0.9 * step / max(last, 1)), label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        # A panel spans a factor of 10 at least, or rounding would look like a slope.
        low, high = min(map(min, sizes)), max(map(max, sizes))
        middle, half = (low * high) ** 0.5, max((high / low) ** 0.5 * 1.1, 10**0.5)
        panel.set_ylim(middle / half, middle * half)
        panel.set_yticks([low, high], [f"{low:.2g}", f"{high:.2g}"])
        panel.set_xticks(found.at, [str(size) for size in found.at])
        panel.minorticks_off()
        panel.set_title(f"{kind}: slope {found.slopes[kind][-1]:+.2f}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(found.sizes) :]:
        panel.set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("width" if found.axis == "width" else "layers", fontsize=10)
    figure.supylabel("mean absolute size", fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()
