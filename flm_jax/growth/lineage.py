"""A model's configuration and its ancestry: the growths that led to it, and everything that follows from each.

    small = Lineage(cfg)                            # initialised, or imported
    large = small.grown(target, Growth("zero"))     # its configuration keeps what the method needs
    params = grow_params(large, params, key)        # flm_jax.growth.grow

Whatever follows from a growth is a property here, computed once: axis maps, masks, norm widths, promises.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flm_jax.config import ModelConfig
from flm_jax.growth import masks, operators
from flm_jax.growth.axis_map import AxisMap
from flm_jax.growth.plan import Growth, axis_maps, grown_config, outline_maps
from flm_jax.model import Masks
from flm_jax.records import as_dict, from_dict
from flm_jax.records.foreign_json import check, field


@dataclass(frozen=True, eq=False)
class Lineage:
    """A model and the growths that led to it.

    Attributes:
      cfg: the model's configuration.
      growth: how it grew from `parent`; None: it was initialised or imported.
      parent: the model that it grew from; None if and only if `growth` is.
    """

    cfg: ModelConfig
    growth: Growth | None = None
    parent: Lineage | None = None

    def __post_init__(self) -> None:
        if (self.growth is None) != (self.parent is None):
            raise ValueError("A lineage has a growth and a parent, or neither.")

    def grown(self, target: ModelConfig, growth: Growth) -> Lineage:
        """The lineage of the model that this one grows into.

        Args:
          target: the shape to grow to.
          growth: how to grow.

        Raises:
          ValueError: see `plan.grown_config`.
        """
        return Lineage(grown_config(self.cfg, target, growth), growth, self)

    @property
    def last_growth(self) -> Growth:
        """The growth that led to this model.

        Raises:
          ValueError: there was none.
        """
        return self._parent_and_growth[1]

    @property
    def before(self) -> Lineage:
        """The lineage of the model that this one grew from.

        Raises:
          ValueError: there is none.
        """
        return self._parent_and_growth[0]

    @property
    def _parent_and_growth(self) -> tuple[Lineage, Growth]:
        if self.parent is None or self.growth is None:
            raise ValueError("This model grew from nothing: it was initialised or imported.")
        return self.parent, self.growth

    @property
    def is_settled(self) -> bool:
        """Whether the places of all new layers are known; until then only the grown model's shapes are."""
        return self.growth is None or self.growth.depth != "distance"

    def settled(self, distances: Sequence[float]) -> Lineage:
        """This lineage, with new layers placed by the measured distances of the parent's layers if it asks for that."""
        if self.is_settled:
            return self
        return dataclasses.replace(self, growth=self.last_growth.settled(distances, self.cfg.layers))

    @functools.cached_property
    def maps(self) -> dict[str, AxisMap]:
        """The map of each axis that grew, by axis name.

        Raises:
          ValueError: the growth places layers by distance, and no distances were measured yet.
        """
        parent, growth = self._parent_and_growth
        return axis_maps(parent.cfg, self.cfg, growth)

    @functools.cached_property
    def outline(self) -> dict[str, AxisMap]:
        """Like `maps`, but known before distances are measured; the places of new layers are then provisional."""
        parent, growth = self._parent_and_growth
        return outline_maps(parent.cfg, self.cfg, growth)

    @functools.cached_property
    def preserving(self) -> bool:
        """Whether the operators of all axes that grew promise to preserve the function."""
        growth = self.last_growth
        return all(operators.lookup(growth.method_of(axis)).preserving for axis in self.outline)

    @functools.cached_property
    def mask_flags(self) -> dict[str, np.ndarray]:
        """By axis, (size,) bool: the fresh entries that start behind a mask."""
        return {axis: m.span.fresh for axis, m in self.maps.items() if m.masked and axis in masks.FIELDS}

    @functools.cached_property
    def norm_widths(self) -> tuple[float, float] | None:
        """What norms divide by at the growth and after the ramp; None if it does not change.

        Raises:
          ValueError: it would have to change, but neither a mask nor `Growth.norm` allows that.
        """
        parent, growth = self._parent_and_growth
        embed = self.outline.get("embed")
        squares = 1.0 if embed is None else embed.squares
        widths = parent.cfg.effective_norm_width * (1.0 if squares is None else squares), self.cfg.effective_norm_width
        if np.isclose(*widths, rtol=1e-12):
            return None
        if squares is not None and growth.norm == "keep":
            raise ValueError(
                f"Norms of the grown model divide by {widths[1]:g}, but growing by {growth.name} keeps them exact at "
                f"{widths[0]:g}: take the configuration that grown_config() returns."
            )
        return widths

    @functools.cached_property
    def ramp_steps(self) -> int:
        """Steps after the growth that run with masks; all later steps run without them.

        Raises:
          ValueError: a ramp is missing, or has nothing to act on.
        """
        if self.growth is None:
            return 0
        growth, grown = self.growth, self.outline
        ramped = {axis for axis, m in grown.items() if m.masked and axis in masks.FIELDS}
        ramped |= {"embed"} if self.norm_widths else set()
        for axis in sorted(ramped):
            if growth.ramp_of(axis).steps < 1:
                raise ValueError(
                    f"Growing by {growth.name} masks {', '.join(sorted(ramped))}, and ramp_steps="
                    f"{growth.ramp_of(axis).steps} on {axis}: give the ramp at least one step."
                )
        for axis in growth.ramps:
            if axis not in ramped and axis in grown:
                why = "; key heads are hidden behind the mask of heads" if axis == "kv_heads" else ""
                raise ValueError(
                    f"Growth.ramps names {axis!r}, but growing it by {growth.method_of(axis)} masks nothing{why}."
                )
        if (growth.ramp_steps or growth.ramp_delay) and grown and not ramped:
            raise ValueError(f"ramp_steps={growth.ramp_steps}, but growing by {growth.name} masks nothing.")
        return max((growth.ramp_of(axis).end for axis in ramped), default=0)

    def masks(self, step: int | jax.Array) -> Masks | None:
        """The masks `step` steps after the growth, all 1 after the ramp; None if the growth has no masks."""
        if self.growth is None or (not self.mask_flags and self.norm_widths is None):
            return None
        values = {axis: self.growth.ramp_of(axis).at(step) for axis in (*self.mask_flags, "embed")}
        return masks.at(self.mask_flags, values, self.norm_widths)

    def record(self) -> list[dict[str, Any]]:
        """The models that led to this one, oldest first, each with the growth that produced it; JSON-able."""
        entries: list[dict[str, Any]] = []
        ancestor: Lineage | None = self
        while ancestor is not None:
            entries.append({"model": as_dict(ancestor.cfg), "growth": as_dict(ancestor.growth)})
            ancestor = ancestor.parent
        return entries[::-1]

    @classmethod
    def from_record(cls, record: Sequence[Mapping[str, Any]]) -> Lineage:
        """The lineage that a record describes.

        An entry without a growth, other than the first, is a stage that continued the model of the entry before, at
        most with other numerics: it is the same model.

        Raises:
          ValueError: the record is empty, an entry is not as `record` writes it, or it names what this version does not
            know.
        """
        found: Lineage | None = None
        for number, entry in enumerate(record):
            where = f"entry {number} of its lineage"
            cfg = recorded_model(check(entry, dict, where), "model", where)
            growth = recorded_growth(entry, "growth", where)
            if found is None or growth is not None:
                found = cls(cfg, growth, found)
            else:
                found = dataclasses.replace(found, cfg=cfg)
        if found is None:
            raise ValueError("The record of a lineage names no model.")
        return found


def recorded_model(record: Mapping[str, Any], name: str, where: str) -> ModelConfig:
    """The configuration of a model in a field of a record; `where` names the record in errors.

    Raises:
      ValueError: it is not one, or a number in it is larger than those of any model.
    """
    found = from_dict(_countable(field(record, name, dict, where), f"{where}, {name}"))
    if not isinstance(found, ModelConfig):
        raise ValueError(f"the field {name!r} of {where} is no ModelConfig")
    return found


def recorded_growth(record: Mapping[str, Any], name: str, where: str) -> Growth | None:
    """Like `recorded_model`: the growth in a field of a record, which may be null."""
    found = from_dict(_countable(field(record, name, (dict, type(None)), where), f"{where}, {name}"))
    if not isinstance(found, Growth | None):
        raise ValueError(f"the field {name!r} of {where} is neither a Growth nor null")
    return found


def _countable(value: Any, where: str) -> Any:
    """`value`, if its integers have 32 bits: with larger ones neither parameters nor masks can be computed.

    Raises:
      ValueError: one has more.
    """
    if isinstance(value, int) and abs(value) >= 2**31:
        raise ValueError(f"{where} is {value!s:.40}, which is too large")
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _countable(inner, f"{where}.{key}")
    return value


def lineage_of(old: ModelConfig, new: ModelConfig, growth: Growth) -> Lineage:
    """The lineage of one growth, from the configurations before and after; `new` is what `grown_config` returned."""
    return Lineage(new, growth, Lineage(old))


def masks_at(old: ModelConfig, new: ModelConfig, growth: Growth, step: int | jax.Array) -> Masks | None:
    """See `Lineage.masks`."""
    return lineage_of(old, new, growth).masks(step)
