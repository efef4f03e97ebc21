"""The measurements of a run: in files of the work directory, always, and at a tracking service, if one is named."""

from flm_jax.tracking.again import growth_values, heldout_values, unwritten
from flm_jax.tracking.background import Background, tracked
from flm_jax.tracking.forks import Change, ForkRecord, read_fork, recorded_forks, shown
from flm_jax.tracking.log import MetricsLog, Session, devices, where_to_look
from flm_jax.tracking.machine import memory, utilisation
from flm_jax.tracking.reading import METRICS, read_log
from flm_jax.tracking.services import Mlflow, Trackio, Wandb, check_installed
from flm_jax.tracking.waits import Waits
from flm_jax.tracking.writer import Measurement, StageCost, Totals

__all__ = [
    "METRICS",
    "Background",
    "Change",
    "ForkRecord",
    "Measurement",
    "MetricsLog",
    "Mlflow",
    "Session",
    "StageCost",
    "Totals",
    "Trackio",
    "Waits",
    "Wandb",
    "check_installed",
    "devices",
    "growth_values",
    "heldout_values",
    "memory",
    "read_fork",
    "read_log",
    "recorded_forks",
    "shown",
    "tracked",
    "unwritten",
    "utilisation",
    "where_to_look",
]
