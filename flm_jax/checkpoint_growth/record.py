"""The record of a growth: one schema, for a growth inside a run and for one outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flm_jax import costs
from flm_jax.config import ModelConfig
from flm_jax.growth.lineage import Lineage
from flm_jax.growth.plan import Growth
from flm_jax.records import as_dict, from_dict


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
        """Reads what `record` returns; also the flat measurements that runs of version 0.1.0 recorded."""
        verification = record.get("verification")
        if verification is None:
            verification = {
                "method": record["method"],
                "preserving": record["preserving"],
                "holds": True,
                "logits": {"max_abs": record["max_abs_logit_diff"], "max_rel": record["max_rel_logit_diff"]},
                "hidden": {"max_rel_by_layer": record["layer_diffs"]},
                "eval_loss": {"before": record["eval_loss_before"], "after": record["eval_loss_after"]},
            }
        return cls(
            stage=record["stage"],
            growth=from_dict(record["plan"]),
            source=record["source"],
            source_digest=record["source_digest"],
            seed=record.get("seed", 0),
            distances=tuple(record["distances"]),
            before=from_dict(record["config_before"]),
            after=from_dict(record["config_after"]),
            verification=verification,
        )
