"""Checkpoints, their differences and their fates as text for a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from flm_jax import costs
from flm_jax.checkpoint_care.description import MOMENTS, OTHERS, PARAMETERS, Description, lineage_sentences
from flm_jax.checkpoint_care.differences import ArrayDifference, Difference
from flm_jax.checkpoint_care.listing import Entry, Listing
from flm_jax.checkpoint_care.losses import Heldout
from flm_jax.checkpoint_care.pruning import Pruning
from flm_jax.records import counted

# Digits of a digest that are shown, and the widest value of a setting.
_DIGITS, _WIDE = 12, 40


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], right: str = "") -> str:
    """Columns with their titles, as lines.

    Args:
      titles: of the columns.
      rows: the cells.
      right: a letter per column, 'r' where cells end at the same place; columns after its end begin at the same place.
    """
    cells = [titles, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
    sides = right.ljust(len(titles))
    return "\n".join(
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        ).rstrip()
        for row in cells
    )


def listing_text(listing: Listing) -> str:
    """A table of checkpoints, and what else there is to say of them."""
    titles = ("stage", "step", "tokens", "size", "held-out loss", "digest", "written (UTC)", "state")
    rows = [
        (*_columns(entry), entry.digest[:_DIGITS] or "-", _when(entry.written), entry.state)
        for entry in listing.entries
    ]
    size = costs.size(sum(entry.bytes for entry in listing.entries))
    count = counted(len(listing.complete), "complete checkpoint")
    lines = [table(titles, rows, " rrr"), f"{count}, {size} in all."]
    for entry in listing.entries:
        where = str(entry.directory)
        lines += [f"{entry.fault}." if where in entry.fault else f"{where}: {entry.fault}."] if entry.fault else []
    lines += [f"A run writes there: process {listing.writer}."] if listing.writer else []
    return "\n".join([*lines, *listing.notes])


def pruning_text(found: Pruning, delete: bool) -> str:
    """A table of what is deleted and why the rest is kept, and the bytes of both."""
    titles = ("stage", "step", "tokens", "size", "held-out loss", "")
    rows = [
        (*_columns(fate.entry), f"keep: {fate.kept}" if fate.kept else _deleted(fate.entry)) for fate in found.fates
    ]
    gone, stays = (
        f"{counted(len(entries), 'checkpoint')}, {costs.size(sum(entry.bytes for entry in entries))}"
        for entries in (found.deleted, found.kept)
    )
    lines = [table(titles, rows, " rrr"), *found.notes]
    lines.append(f"{'Deletes' if delete else 'Would delete'} {gone}; keeps {stays}.")
    if not delete:
        if found.listing.writer:
            lines.append(f"A run writes there, process {found.listing.writer}: --yes is refused until it has ended.")
        lines.append("Nothing was deleted: this was a dry run, and --yes deletes.")
    return "\n".join(lines)


def description_text(found: Description) -> str:
    """A checkpoint, line by line."""
    source, meta = found.source, found.source.meta
    arrays = ", ".join(
        f"{costs.size(found.arrays[what])} {what}{f' ({dtypes})' if what == PARAMETERS else ''}"
        for what in (PARAMETERS, MOMENTS, OTHERS)
        for dtypes in (", ".join(found.dtypes),)
    )
    trains = "" if meta.train == "all" else f"; trained what is {meta.train}"
    optimizer = f"{meta.optimizer}{trains}" if source.trained else "none: weights alone"
    first, *grown = lineage_sentences(source.lineage)
    rising = "; ".join(f"{what} rise for {counted(left, 'more step')}" for what, left in source.rising.items())
    rows = [
        ("step", f"{source.step} of stage {meta.stage!r}, written {_when(found.written)} UTC"),
        ("digest", source.digest),
        ("model", f"{costs.shape_line(source.cfg)}; {costs.count(costs.param_count(source.cfg))} parameters"),
        ("optimizer", optimizer),
        ("lineage", first),
        *(("", sentence) for sentence in grown),
        *([("growing", rising)] if rising else []),
        *((("forked" if not i else ""), line) for fork in found.forks for i, line in enumerate(fork.lines())),
        ("data", _data(found)),
        ("held-out loss", "not measured" if found.heldout is None else _loss(found.heldout, source.step)),
        *(
            [("skipped", f"{counted(found.skipped, 'step')} with a loss or gradient that was not finite")]
            if found.skipped
            else []
        ),
        ("written by", ", ".join(f"{name} {version}" for name, version in meta.versions.items()) or "not recorded"),
        ("arrays", arrays),
        ("files", ", ".join(f"{name} {costs.size(size)}" for name, size in sorted(found.files.items()))),
        ("on disk", costs.size(found.stored)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([str(source.directory), *(f"  {name.ljust(width)}  {value}" for name, value in rows)])


def difference_text(found: Difference) -> str:
    """What differs between two checkpoints, parameters before moments; equal arrays are counted."""
    lines = [
        f"{name}: {one.directory} (digest {one.digest[:_DIGITS]})" for name, one in (("A", found.a), ("B", found.b))
    ]
    if found.equal:
        return "\n".join([*lines, f"Equal: settings, lineage and {counted(len(found.arrays), 'array')}, bit for bit."])
    steps = found.a.step, found.b.step
    settings = {**({"step": steps} if steps[0] != steps[1] else {}), **found.settings}
    if settings:
        rows = [(name, _short(a), _short(b)) for name, (a, b) in settings.items()]
        lines += ["", table(("setting", "A", "B"), rows)]
    for name, only in zip("AB", found.lineage, strict=True):
        lines += ["", f"only in the lineage of {name}:", *(f"  {sentence}" for sentence in only)] if only else []
    different = [array for array in found.arrays if not array.equal]
    equal = len(found.arrays) - len(different)
    if different:
        titles = ("array", "entries that differ", "max |B - A|", "|B - A| / |A|", "cosine")
        arrays = [
            _array(array) for array in sorted(different, key=lambda one: (not one.path.startswith("params/"), one.path))
        ]
        lines += ["", table(titles, arrays, " rrrr")]
    said = f"{counted(equal, 'array is', 'arrays are')} equal bit for bit, {len(different)} differ"
    lines += ["", f"{said}." if len(different) != 1 else f"{said}s."]
    return "\n".join(lines)


def _array(array: ArrayDifference) -> tuple[str, ...]:
    if not array.compared:
        there, here = (what or "not there" for what in (array.a, array.b))
        return array.path, f"{there} -> {here}", "-", "-", "-"
    numbers = (array.max_abs, array.relative)
    cosine = "-" if array.cosine is None else f"{array.cosine:.6f}"
    shape = array.a if array.a == array.b else f"{array.a} -> {array.b}"
    path = f"{array.path} {shape}"
    return path, f"{array.entries:,}", *("-" if number is None else f"{number:.3g}" for number in numbers), cosine


def _columns(entry: Entry) -> tuple[str, ...]:
    tokens = "-" if entry.tokens is None else costs.count(entry.tokens)
    loss = "-" if entry.heldout is None else _loss(entry.heldout, entry.step)
    return entry.stage, str(entry.step), tokens, costs.size(entry.bytes), loss


def _loss(heldout: Heldout, step: int) -> str:
    return f"{heldout.loss:.4f}" + (f" at step {heldout.step}" if heldout.step != step else "")


def _deleted(entry: Entry) -> str:
    return "delete" if entry.complete else f"delete: {entry.state}"


def _when(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _data(found: Description) -> str:
    data = found.source.meta.data
    if not data:
        return "not recorded"
    corpus = data.get("corpus")
    kind = corpus.get("kind") if isinstance(corpus, dict) else None
    context = found.source.context
    parts = [str(kind or "unknown"), f"windows of {context} tokens" if context else "", f"seed {data.get('seed')}"]
    if found.windows is not None:
        tokens = f" ({costs.count(found.windows * context)} tokens)" if context else ""
        parts.append(f"{counted(found.windows, 'window')} read{tokens}")
    if found.passes is not None:
        parts.append(f"{found.passes:.2f} passes")
    return ", ".join(part for part in parts if part)


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 3]}..."
