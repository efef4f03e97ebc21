"""A work directory whose checkpoints are looked after, and the program that does so."""

import json
import shutil

from tests.checkpoints import renumbered
from tests.commands import run_here
from tests.golden_run import RUN as GOLDEN

STEPS = (0, 1, 2, 3, 4, 5, 6)
# Held-out losses of the second stage by step; at steps 3 and 5 nothing was measured.
LOSSES = {0: 5.3, 1: 5.2, 2: 5.1, 4: 4.9, 6: 5.0}
SECOND = "checkpoints/1_second"


def line(kind, stage, step, **values):
    about = {"kind": kind, "stage": stage, "stage_step": step, "step": step, "tokens": 0, "flops": 0, "time": 1.5e9}
    return json.dumps(about | values) + "\n"


def write(run):
    """A work directory with steps 4 of its first stage and 0 to 6 of its second."""
    shutil.copytree(GOLDEN, run)
    for step in STEPS[2:]:
        renumbered(run / SECOND / "1", step)
    found = [line("start", "first", 0, devices=1), line("heldout", "first", 4, loss=5.4, bits_per_byte=7.0)]
    found += [line("heldout", "second", 4, loss=9.9)]  # a run that was rewound measured it again
    found += [line("heldout", "second", step, loss=loss) for step, loss in LOSSES.items()]
    (run / "metrics.jsonl").write_text("".join(found))
    return run


def program(*words):
    """Runs the program in this process; returns its exit status."""
    flags = [word for word in words if word.startswith("--")]
    try:
        run_here("checkpoint", [*(f"--command={word}" for word in words if word not in flags), *flags])
    except SystemExit as stop:
        return stop.code
    return 0


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
