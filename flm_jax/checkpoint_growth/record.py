"""The record of a growth: one schema, for a growth inside a run and for one outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flm_jax import costs
from flm_jax.config import ModelConfig
from flm_jax.growth.lineage import Lineage, recorded_growth, recorded_model
from flm_jax.growth.plan import Growth
from flm_jax.records import as_dict
from flm_jax.records.foreign_json import check, field

# The measurements in a record of version 0.1.0.
_FLAT: dict[str, type] = {
    "method": str,
    "preserving": bool,
    "max_abs_logit_diff": float,
    "max_rel_logit_diff": float,
    "layer_diffs": list,
    "eval_loss_before": float,
    "eval_loss_after": float,
}


@dataclass(frozen=True)
class GrowthRecord:
    """What was grown, from what, how, and what its verification found.

    Attributes:
      stage: name of the stage that begins with the growth.
      growth: how it grew, with layers placed.
      source: path of the checkpoint that grew.
      source_digest: digest of its state.
      seed: for drawn entries.
      distances: of the layers before growth, if layers were placed by them.
      before: the configuration before growth.
      after: the configuration after growth.
      verification: see `checkpoint_growth.verify.verify_growth`; of a streamed growth, what was compared.
    """

    stage: str
    growth: Growth
    source: str
    source_digest: str
    seed: int
    distances: tuple[float, ...]
    before: ModelConfig
    after: ModelConfig
    verification: Mapping[str, Any]

    @classmethod
    def of(cls, stage: str, lineage: Lineage, verification: Mapping[str, Any], **fields: Any) -> GrowthRecord:
        """The record of a lineage's last growth; `fields` are those that do not follow from the lineage."""
        before, growth = lineage.before.cfg, lineage.last_growth
        return cls(stage, growth, before=before, after=lineage.cfg, verification=verification, **fields)

    def record(self) -> dict[str, Any]:
        """The record as JSON-able data."""
        return {
            "stage": self.stage,
            "plan": as_dict(self.growth),
            "source": self.source,
            "source_digest": self.source_digest,
            "seed": self.seed,
            "distances": list(self.distances),
            "config_before": as_dict(self.before),
            "config_after": as_dict(self.after),
            "params_before": costs.param_count(self.before),
            "params_after": costs.param_count(self.after),
            "verification": dict(self.verification),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> GrowthRecord:
        """Reads what `record` returns; also the flat measurements that runs of version 0.1.0 recorded.

        Raises:
          ValueError: a field is missing or has the wrong type, or it names what this version does not know.
        """
        where = "the record of a growth"
        verification = record.get("verification")
        if verification is None:
            number = {name: field(record, name, kind, where) for name, kind in _FLAT.items()}
            verification = {
                "method": number["method"],
                "preserving": number["preserving"],
                "holds": True,
                "logits": {"max_abs": number["max_abs_logit_diff"], "max_rel": number["max_rel_logit_diff"]},
                "hidden": {"max_rel_by_layer": number["layer_diffs"]},
                "eval_loss": {"before": number["eval_loss_before"], "after": number["eval_loss_after"]},
            }
        if (growth := recorded_growth(record, "plan", where)) is None:
            raise ValueError(f"{where} has no plan")
        distances = field(record, "distances", list, where)
        return cls(
            stage=field(record, "stage", str, where),
            growth=growth,
            source=field(record, "source", str, where),
            source_digest=field(record, "source_digest", str, where),
            seed=check(record.get("seed", 0), int, f"{where}: its seed"),
            distances=tuple(check(distance, float, f"{where}: a distance") for distance in distances),
            before=recorded_model(record, "config_before", where),
            after=recorded_model(record, "config_after", where),
            verification=check(verification, dict, f"{where}: its verification"),
        )
