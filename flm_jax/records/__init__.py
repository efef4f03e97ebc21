"""Configurations: the check of their fields, their records as JSON, and the identity of a work directory."""

from flm_jax.records.fields import FieldError, classes, recorded
from flm_jax.records.identity import (
    DATA,
    FORK,
    LOCK,
    RECIPE,
    check_identity,
    check_no_run,
    differences,
    write_identity,
    write_record,
)
from flm_jax.records.json import as_dict, completed, flattened, from_dict, reduced
from flm_jax.records.nearest import meant, meant_beside
from flm_jax.records.wording import counted

__all__ = [
    "DATA",
    "FORK",
    "LOCK",
    "RECIPE",
    "FieldError",
    "as_dict",
    "check_identity",
    "check_no_run",
    "classes",
    "completed",
    "counted",
    "differences",
    "flattened",
    "from_dict",
    "meant",
    "meant_beside",
    "recorded",
    "reduced",
    "write_identity",
    "write_record",
]
