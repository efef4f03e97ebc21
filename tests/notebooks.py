"""Notebooks as tests see them: their cells, what they printed, and an execution in a place of its own."""

import re

from dev import notebooks
from tests.environment import as_user, as_user_compiling_fast

# A number, as rounding may change it from machine to machine, and a duration.
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
# What a good run may write to stderr: the last state of a progress bar; on a busy machine, that compiling is slow.
HARMLESS = re.compile(r"^[\w ]+: +\d+%\|.*\|.*$|slow_operation_alarm|^\*+$|Very slow compile|^The operation took ")

# What a notebook's cell `sizes` says in its short form, in which `make test` runs every cell.
SHORT = {
    "chat_and_tune": {"BASE_STEPS": 20, "TUNING_STEPS": 15},
    "grow_your_own": {"THEIR_STEPS": 20, "OUR_STEPS": 12},
    "growth_and_training": {"TRAIN_STEPS": 20, "STEPS": 10, "RAMP": 4, "EVAL_WINDOWS": 16},
    "growth_verification": {"AXES": ("embed", "layers", "vocab"), "POINTS": 6, "TOGETHER": 2},
    "plan_1t": {"LAYOUTS": [(32, 1, 32), (64, 4, 4)], "OTHER_MACHINES": ("h100-1024",)},
}


def stored(name):
    return notebooks.read(notebooks.FOLDER / f"{name}.ipynb")


def executed(name, short=False):
    """The notebook, run by this interpreter in an empty folder, as a reader with the light package would run it.

    `short`: with the values of `SHORT`, and its programs compile fast, as those of most tests.
    """
    path = notebooks.FOLDER / f"{name}.ipynb"
    return notebooks.run(path, as_user_compiling_fast(), SHORT[name]) if short else notebooks.run(path, as_user())


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def faults(notebook):
    """Tracebacks, and what was written to stderr, harmless lines apart."""
    for cell in code(notebook):
        for output in cell.outputs:
            if output.output_type == "error":
                yield output.evalue
            elif output.get("name") == "stderr":
                yield from (line for line in output.text.splitlines() if line.strip() and not HARMLESS.search(line))


def printed(notebook, fixed=False):
    """All that was printed, as one text; `fixed`: without cells whose words a model makes, or a machine changes."""
    cells = [cell for cell in code(notebook) if not (fixed and "varies" in cell.metadata.get("tags", ()))]
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def pictures(notebook):
    return [o.data["image/png"] for cell in code(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]


def shape(notebook):
    """The words of what was printed, numbers left out, and how many outputs each cell has."""
    return re.sub(NUMBER, "#", printed(notebook, fixed=True)).split(), len(pictures(notebook))


def found(pattern, text):
    """The one number that a pattern captures."""
    (value,) = re.findall(pattern, text)
    return float(value)
