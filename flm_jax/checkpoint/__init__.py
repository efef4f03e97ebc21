"""Checkpoints on disk: saving, restoring and verifying them, and the format of a step.

A directory of checkpoints holds one directory per step:

    100/manifest.json      what must be in the others: leaves with checksums, files with sizes (`manifest`)
    100/meta.json          what the caller records about the step: model, lineage, data, provenance
    100/blobs/             small files as bytes, such as a vocabulary
    100/arrays/            the leaves, written by orbax as nested dictionaries named by leaf path (`orbax_io`)

Of a step only regular files inside its directory are read, and only those that the manifest knows; a small file is
interpreted once its sha256 is found to be right.

`manager` saves and restores whole states through orbax; `blocks` reads and writes runs of rows of one leaf without
orbax, and `places` tells where they lie; `directory` tells which steps look complete and holds the writer's lock;
`commit` gives a step its name once it is on disk; `find` resolves a path given by a user to a step; `verify` checks
every bit of a step without a model.
"""

from flm_jax.checkpoint.manager import Checkpoints, Restored
from flm_jax.checkpoint.manifest import (
    CheckpointError,
    DamagedError,
    NoCheckpointError,
    leaf_paths,
    read_manifest,
)
from flm_jax.checkpoint.verify import Report, verify

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DamagedError",
    "NoCheckpointError",
    "Report",
    "Restored",
    "leaf_paths",
    "read_manifest",
    "verify",
]
