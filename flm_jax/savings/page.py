"""The page of a study: what runs from scratch reach, the frontier, and what each growth saves, with plots beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from flm_jax import costs
from flm_jax.files import atomic_write
from flm_jax.records import counted
from flm_jax.savings import picture
from flm_jax.savings.catch_up import catch_ups
from flm_jax.savings.fit import Point, Ratio
from flm_jax.savings.study import baselines, unmeasured
from flm_jax.savings.summary import GrownRow, Summary, spread

# Tokens per parameter of the target after a growth, at which its gap to the scratch run is shown.
SINCE_GROWTH = (0, 0.5, 1, 2, 4, 6)


def write_page(summary: Summary, path: Path, command: str, second: Summary | None = None) -> None:
    """Writes the page of a study, and its plots beside it.

    Args:
      summary: of the study.
      path: of the page, a Markdown file.
      command: that made it.
      second: of what was measured on the study's second text.
    """
    plots = {
        "rates": picture.rates(summary),
        "scratch": picture.scratch(summary),
        "savings": picture.savings(summary),
        "curves": picture.curves(summary),
        "catch_up": picture.catch_up(summary),
    }
    for name, plot in plots.items():
        if plot is not None:
            atomic_write(path.parent / f"{path.stem}_{name}.png", plot)
    shown = {name: f"{path.stem}_{name}.png" for name, plot in plots.items() if plot is not None}
    atomic_write(path, "\n".join(page(summary, command, shown, second)) + "\n")


def page(summary: Summary, command: str, plots: dict[str, str], second: Summary | None = None) -> Iterator[str]:
    """The lines of the page."""
    study = summary.study
    target, context = study.target, study.target.data.context
    tokens = target.steps(target.tokens_per_param) * target.batch_size * context
    yield f"# Does growing pay: {target.name}"
    yield ""
    yield f"Made by `{command}`."
    yield ""
    yield (
        f"The target has {costs.shape_line(target.model)}: {costs.count(target.params)} parameters, the embedding "
        f"included. A full run is {costs.count(tokens)} tokens, {target.tokens_per_param:g} per parameter, "
        f"in steps of {target.batch_size} x {context}. Losses are held-out, in nats per token, on "
        f"{counted(target.eval_windows, 'window')}. FLOPs are those of all stages of a run, counted from shapes "
        "(`flm_jax.costs`), with those of a teacher and of Muon's orthogonalisation; tuning is not in them. All runs "
        "of a seed read the same data in the same order."
    )
    yield ""
    if summary.noise:
        yield f"The loss of a run has a standard deviation of {summary.noise:.4f} over seeds, pooled over all arms."
        yield ""
    if left := unmeasured(study, summary.results):
        steps = ", ".join(f"{counted(count, 'arm')} of the step '{step}'" for step, count in left.items())
        yield f"**The study has not come to its end.** Not measured yet, or with fewer seeds than it asks for: {steps}."
        yield ""
    yield from _rates(summary, plots)
    yield from _scratch(summary, plots)
    yield from _frontier(summary)
    yield from _plans(summary, plots)
    yield from _catch_up(summary, plots)
    if second is not None and second.rows:
        yield from _second(second)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _plot(plots: dict[str, str], name: str, about: str) -> Iterator[str]:
    if name in plots:
        yield f"![{about}]({plots[name]})"
        yield ""


def _rates(summary: Summary, plots: dict[str, str]) -> Iterator[str]:
    """The tuning of scratch runs of the target."""
    yield "## Tuned rates"
    yield ""
    families = baselines(summary.study)
    found = [(family, family.search(summary.results)) for family in families]
    spent = 0.0
    rows = []
    for family, (arms, rate) in found:
        for arm in arms:
            if arm.name in summary.results:
                result = summary.results[arm.name]
                spent += result.flops
                mark = " (best)" if rate == result.rate else ""
                rows.append([family.optimizer, family.schedule, f"{result.rate:g}{mark}", spread(result.losses)])
    yield f"Scratch runs of the target. The search took {spent:.3g} FLOPs, which no ratio below counts."
    yield ""
    yield from _table(("optimizer", "schedule", "peak rate", "loss"), rows)
    yield from _plot(plots, "rates", "loss against the learning rate")
    if unknown := [f"{family.optimizer} with {family.schedule}" for family, (_, rate) in found if rate is None]:
        yield (
            f"The best rate is not known yet for {', '.join(unknown)}: it needs a worse one on both sides. What "
            "depends on it is missing on this page."
        )
        yield ""


def _scratch(summary: Summary, plots: dict[str, str]) -> Iterator[str]:
    """Scratch runs of the target at all budgets."""
    per_param = summary.study.target.params
    rows = []
    for family in baselines(summary.study):
        if family.search(summary.results)[1] is None:
            continue
        for arm in family.budgets(summary.results, 1):
            if arm.name in summary.results:
                r = summary.results[arm.name]
                rows.append(
                    [
                        family.optimizer,
                        family.schedule,
                        f"{r.tokens / per_param:.1f}",
                        f"{r.flops:.3g}",
                        spread(r.losses),
                        str(len(r.runs)),
                    ]
                )
    if not rows:
        return
    yield "## From scratch"
    yield ""
    yield from _table(("optimizer", "schedule", "tokens per parameter", "FLOPs", "loss", "seeds"), rows)
    fitted = ", with the fitted frontier" if summary.frontier else ""
    yield from _plot(plots, "scratch", f"loss of scratch runs against FLOPs{fitted}")


def _frontier(summary: Summary) -> Iterator[str]:
    """The fit over sizes and budgets, and its residuals."""
    fitted = summary.frontier
    if fitted is None:
        return
    floor, a_log, a, b_log, b = fitted.values
    yield "## The frontier"
    yield ""
    yield (
        f"Scratch runs of {len({p.params for p in summary.others})} sizes, fitted by L(N, D) = E + A / N^a + B / D^b "
        f"with E = {floor:.3f}, A = {math.exp(a_log):.3g}, a = {a:.3f}, B = {math.exp(b_log):.3g}, b = {b:.3f}. "
        "At each budget the best size is that with the lowest fitted loss, among sizes within the data."
    )
    yield ""
    sizes = {p.params: name for name, p in _named(summary)}
    rows = [
        [
            sizes.get(p.params, "target"),
            costs.count(p.params),
            costs.count(p.tokens),
            f"{p.flops:.3g}",
            f"{p.loss:.4f}",
            f"{left:+.4f}",
        ]
        for p, left in zip(summary.others, fitted.residuals, strict=True)
    ]
    yield from _table(("size", "parameters", "tokens", "FLOPs", "loss", "minus fit"), rows)
    full = next((p for p in summary.others if p.params == summary.study.target.params), None)
    if full is not None:
        at = summary.study.target.tokens_per_param * full.params * full.flops / full.tokens
        loss, size = fitted.best(at)
        per = at / math.exp(float(_cost(fitted.cost, size))) / size
        yield (
            f"At the FLOPs of a full run of the target the best size has {costs.count(size)} parameters "
            f"({per:.0f} tokens per parameter) and a fitted loss of {loss:.4f}."
        )
        yield ""


def _cost(coefficients: Sequence[float], size: float) -> float:
    total = 0.0
    for coefficient in coefficients:
        total = total * math.log(size) + coefficient
    return total


def _named(summary: Summary) -> Iterator[tuple[str, Point]]:
    study = summary.study
    for name, changes in study.sizes.items():
        yield name, Point(costs.param_count(study.target.shape(**changes)), 0, 0, 0)


def _plans(summary: Summary, plots: dict[str, str]) -> Iterator[str]:
    """What growths reached, a table per group of plans."""
    if not summary.rows:
        return
    yield "## Growths"
    yield ""
    yield " ".join(_columns(summary))
    yield ""
    yield from _plot(plots, "savings", "loss against FLOPs: growths and scratch runs")
    groups: dict[str, list[GrownRow]] = {}
    for row in summary.rows:
        groups.setdefault(row.name.split("-")[0], []).append(row)
    several = len(summary.study.optimizers) > 1
    head = ["plan", "preserves the function", "loss", "FLOPs", "gain", "same-size", "if nothing were lost"]
    head += ["against the best optimizer"] if several else []
    head += (["frontier"] if summary.frontier else []) + ["spike", "recovered after"]
    for group, members in groups.items():
        yield f"### {group}"
        yield ""
        yield from _table(head, [_cells(row, summary) for row in members])
    yield from _plot(plots, "curves", "held-out loss during training")


def _columns(summary: Summary) -> Iterator[str]:
    """What the columns of growths are, of those that the page has."""
    yield (
        "Same-size: FLOPs of scratch runs of the target, with the same optimizer and the best of its schedules, at the "
        "growth's loss, divided by its own FLOPs. If nothing were lost: what the same-size ratio would be at the loss "
        "of a scratch run with the same tokens; more only if a growth ends below that loss."
    )
    ratios = ["same-size"]
    if len(summary.study.optimizers) > 1:
        ratios.append("against the best optimizer")
        yield "Against the best optimizer: as same-size, but with the best scratch run of any optimizer."
    if summary.frontier:
        ratios.append("frontier")
        yield "Frontier: FLOPs of the best scratch run of any size at the growth's loss, divided by its own."
    if summary.noise:
        residuals = ", of the frontier from the residuals of its fit where they are larger" if summary.frontier else ""
        yield (
            f"In parentheses: an interval of 95 % of {', '.join(ratios)}, from the noise over seeds{residuals}; 'or "
            "more', 'or less': the other end lies outside the runs that were measured; 'no interval': both ends do."
        )
    else:
        yield "No arm ran with several seeds, so the noise is not known and no ratio has an interval."
    yield (
        "'-' as a ratio: the growth's loss lies outside the runs that were measured; as a gain: its FLOPs do. Gain: "
        "the loss of a scratch run of the target with the same FLOPs, minus the growth's own. Spike: the rise of the "
        "loss at the growth; recovered after: the tokens until it is gone."
    )


def _catch_up(summary: Summary, plots: dict[str, str]) -> Iterator[str]:
    """How long growths stay above the scratch run with the same tokens."""
    found, per = catch_ups(summary), summary.study.target.params
    if not found:
        return
    yield "## After the growth"
    yield ""
    yield (
        "The loss of a grown run minus that of the full scratch run of the target at the same tokens, in nats per "
        "token; both have the same learning rate there, unless the growth re-warms it. By tokens per parameter of the "
        "target since the last growth, on straight lines between measurements. At the end both have decayed. '-': "
        "after the end."
    )
    yield ""
    yield from _plot(plots, "catch_up", "gap to the scratch run against tokens since the growth")
    yield from _table(
        ["plan", *(f"{tokens:g}" for tokens in SINCE_GROWTH), "at the end"],
        [
            [one.name, *(_signed(one.at(tokens * per)) for tokens in SINCE_GROWTH), _signed(one.gaps[-1])]
            for one in found
        ],
    )


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _cells(row: GrownRow, summary: Summary) -> list[str]:
    noise = summary.noise
    growths = row.result.growths()
    rises = ", ".join(f"{rise:+.3f}" for rise, _ in growths[: _per_run(row)])
    back = ", ".join("not" if math.isinf(tokens) else costs.count(tokens) for _, tokens in growths[: _per_run(row)])
    return [
        row.name,
        "yes" if row.preserving else "no",
        spread(row.result.losses),
        f"{row.result.flops:.3g}",
        "-" if row.gain is None else f"{row.gain:+.4f}",
        _shown(row.same_size, noise),
        "-" if row.equal_tokens is None else f"{row.equal_tokens:.2f}",
        *([_shown(row.best_optimizer, noise)] if len(summary.study.optimizers) > 1 else []),
        *([_shown(row.frontier, noise)] if summary.frontier else []),
        rises,
        back,
    ]


def _second(second: Summary) -> Iterator[str]:
    """What scratch runs of the target and growths reached on the second text."""
    corpus = second.study.second_text
    assert corpus is not None
    about = ", ".join(f"{name} {value}" for name, value in corpus.describe().items() if name != "kind")
    yield "## On a second text"
    yield ""
    yield (
        f"The same models on held-out documents of {type(corpus).__name__} ({about}), on which nothing was chosen: not "
        "the rates, not the schedule, not the optimizer. Columns as above. Runs whose last model is not kept any more "
        "are missing."
    )
    yield ""
    yield from _table(
        ("scratch run of the target", "tokens per parameter", "loss"),
        [
            [optimizer, f"{point.tokens / second.study.target.params:.1f}", f"{point.loss:.4f}"]
            for optimizer, points in second.scratch.items()
            for point in points
        ],
    )
    yield from _table(
        ("plan", "loss", "gain", "same-size", *(["frontier"] if second.frontier else [])),
        [
            [
                row.name,
                spread(row.result.losses),
                "-" if row.gain is None else f"{row.gain:+.4f}",
                _shown(row.same_size, second.noise),
                *([_shown(row.frontier, second.noise)] if second.frontier else []),
            ]
            for row in second.rows
        ],
    )


def _per_run(row: GrownRow) -> int:
    return sum(stage.growth is not None for stage in row.result.stages)


def _shown(ratio: Ratio | None, noise: float) -> str:
    """A ratio as text; without its interval, which would be too narrow, if the noise over seeds is not known."""
    return "-" if ratio is None else str(ratio) if noise else f"{ratio.value:.2f}"
