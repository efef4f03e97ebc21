"""Whether the sources of a mixture suffice for the stages of a run, and when one of them has been read often enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flm_jax.data.batches import StageNeed
from flm_jax.data.mixing import Order
from flm_jax.data.mixture import Mixture, Source
from flm_jax.records import counted


def limit_of(source: Source, windows: int) -> int | None:
    """The most windows that are read of a source, which has `windows` to train on; None: there is no limit.

    Raises:
      ValueError: that is not one window.
    """
    if source.epochs is None:
        return None
    limit = int(source.epochs * windows)
    if limit == 0:
        raise ValueError(
            f"Source {source.name!r}: Source.epochs = {source.epochs} of {counted(windows, 'window')} is not one "
            "window; raise it, or leave the source out."
        )
    return limit


def weights_of(names: Sequence[str], own: Sequence[float], given: Mapping[str, float] | None) -> tuple[float, ...]:
    """The weights of sources in order: as given by name, where one that is not named has 0, or their own."""
    return tuple(own) if given is None else tuple(float(given.get(name, 0.0)) for name in names)


def supply(
    names: Sequence[str],
    own: Sequence[float],
    limits: Sequence[int | None],
    stages: Sequence[StageNeed],
    order: Order | None = None,
    position: int = 0,
) -> list[str]:
    """Sentences about sources that run out in a run.

    Args:
      names: of the sources.
      own: their weights, for stages without weights.
      limits: the most windows that are read of each.
      stages: of the run, in order.
      order: of the sources up to where the stages begin; None: the run begins with them.
      position: where they begin.

    Raises:
      ValueError: the sources together do not suffice; the message names the stage and the step.
    """
    said = []
    order = Order(tuple(own), tuple(limits)) if order is None else order
    for name, steps, batch_size, weights, since in stages:
        order, before = order.weighed(weights_of(names, own, weights), position), position
        position += steps * batch_size
        if order.end is not None and order.end < position:
            most = ", ".join(f"{n} {limit:,}" for n, limit in zip(names, limits, strict=True) if limit is not None)
            left = max(order.end - before, 0)
            raise ValueError(
                f"Stage {name!r} needs {counted(position - before, 'window')}, and after "
                f"{left:,} of them (step {since + left // batch_size}) every "
                f"source that has a weight has been read as often as it may (windows in all stages: {most}); "
                "raise Source.epochs, or train for fewer steps."
            )
        for at, ended in order.run_out:
            if before < at <= position:
                gone = " and ".join(names[k] for k in ended)
                said.append(
                    f"Stage {name!r}: {gone} will have been read as often as it may at step "
                    f"{since - (-(at - before) // batch_size)}; its share then goes to the other sources."
                )
    return said


def expected_supply(
    mixture: Mixture, tokens: Sequence[int | None], context: int, stages: Sequence[StageNeed]
) -> list[str]:
    """As `supply`, from the training tokens of each source, before data is opened; None: they are not known yet.

    Raises:
      ValueError: as `supply` and `limit_of`.
    """
    if all(source.epochs is None for source in mixture.sources):
        return []
    known = [count for count in tokens if count is not None]
    if len(known) < len(tokens):
        return ["When Source.epochs are used up is known once every source is in a token store."]
    windows = [(count - 1) // context for count in known]  # as the token store counts them
    limits = [limit_of(source, own) for source, own in zip(mixture.sources, windows, strict=True)]
    return supply(mixture.names, mixture.weights_by_size(known), limits, stages)
