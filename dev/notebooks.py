"""Writes what all notebooks have in common, and runs them; `make notebooks` does both.

  python dev/notebooks.py             # writes the badge and the first cell of code into every notebook
  python dev/notebooks.py NAME ...    # also runs these notebooks (`all`: every one) and stores their outputs

A notebook is run as a reader with the light package would run it: in an empty folder, and what only an extra installs
cannot be imported. Who moves the repository changes REPOSITORY and runs the first command. What decides how long a
notebook takes is assigned in its cell with the id `sizes`; tests run it with smaller values (`with_sizes`).
"""

from __future__ import annotations

import ast
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

# The address of the repository, for Colab: OWNER stands for whoever publishes it.
REPOSITORY = "https://github.com/OWNER/flm_jax"

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
# The longest that one cell may take.
CELL_SECONDS = 1800
# What extras install. Notebooks must do without.
EXTRAS = ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "lm_eval", "torch", "transformers")

INSTALL = f'''\
# Installs flm_jax where it is not installed already, as on Colab; in a clone of the repository it is only found.
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "{REPOSITORY}"

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the models here are so small that a CPU is the fastest device
if importlib.util.find_spec("flm_jax") is None:
    clone = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "flm_jax" / "config.py").is_file()), None)
    if clone is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"flm_jax @ git+{{REPOSITORY}}"], check=True)
        importlib.invalidate_caches()
    else:
        sys.path.insert(0, str(clone))
        os.environ["PYTHONPATH"] = str(clone)  # for programs that this notebook starts'''


def badge(path: Path) -> str:
    """The text of the first cell: a link that opens the notebook on Colab."""
    place = REPOSITORY.removeprefix("https://")
    link = (
        f"https://colab.research.google.com/{place.replace('github.com', 'github', 1)}/blob/main/notebooks/{path.name}"
    )
    return f"[![Open in Colab]({BADGE})]({link})"


def read(path: Path) -> Any:
    """The notebook in a file."""
    return nbformat.read(path, as_version=4)


def write(notebook: Any, path: Path) -> None:
    """Writes a notebook, without what differs from one machine to the next."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    nbformat.write(notebook, path)


def common(notebook: Any, path: Path) -> bool:
    """Writes the badge and the first cell of code into a notebook; returns whether anything changed.

    Raises:
      ValueError: it has no cells with the ids `badge` and `install`.
    """
    wanted = {"badge": badge(path), "install": INSTALL}
    cells = {cell.id: cell for cell in notebook.cells}
    if missing := sorted(set(wanted) - set(cells)):
        raise ValueError(f"{path} has no cell with the id {' and '.join(missing)}: give the first cell the id 'badge', "
                         "and the first cell of code the id 'install'.")  # fmt: skip
    changed = [name for name, text in wanted.items() if cells[name].source != text]
    for name in changed:
        cells[name].source = wanted[name]
    return bool(changed)


def sizes(notebook: Any) -> dict[str, ast.expr]:
    """The names that a notebook's cell `sizes` assigns, with the expressions of their values."""
    (source,) = (cell.source for cell in notebook.cells if cell.id == "sizes")
    return {
        target.id: line.value
        for line in ast.parse(source).body
        if isinstance(line, ast.Assign)
        for target in line.targets
        if isinstance(target, ast.Name)
    }


def with_sizes(notebook: Any, values: Mapping[str, object]) -> None:
    """Gives names of a notebook's cell `sizes` other values; nothing else changes.

    Raises:
      ValueError: that cell assigns no such name.
    """
    assigned = sizes(notebook)
    if unknown := sorted(set(values) - set(assigned)):
        raise ValueError(f"The cell 'sizes' does not assign {', '.join(unknown)}; it assigns {', '.join(assigned)}.")
    (cell,) = (cell for cell in notebook.cells if cell.id == "sizes")
    for name, value in values.items():
        old = ast.get_source_segment(cell.source, sizes(notebook)[name]) or ""
        before, _, after = f"\n{cell.source}".partition(f"\n{name} = {old}")
        cell.source = f"{before}\n{name} = {value!r}{after}".removeprefix("\n")


def run(path: Path, environment: Mapping[str, str], values: Mapping[str, object] | None = None) -> Any:
    """A copy of a notebook, run by this interpreter in an empty folder, without the extras.

    Args:
      path: the notebook.
      environment: of the kernel; flm_jax is found besides.
      values: for names that its cell `sizes` assigns, in the place of those that it says.

    Returns:
      The notebook with its outputs, in which the folder's name is left out.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    with tempfile.TemporaryDirectory(prefix="flm_jax_notebook_") as made:
        folder = Path(made).resolve()
        without, work = folder / "without", folder / "work"
        without.mkdir()
        work.mkdir()
        for name in EXTRAS:
            text = f'raise ModuleNotFoundError("No module named {name!r}: notebooks do without", name="{name}")\n'
            (without / f"{name}.py").write_text(text)
        notebook = read(path)
        if values:
            with_sizes(notebook, values)
        client = NotebookClient(
            notebook,
            km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])),
            kernel_name="python3",
            resources={"metadata": {"path": str(work)}},
            timeout=CELL_SECONDS,
            coalesce_streams=True,  # and of what was written over a line, the last
        )
        before = os.environ.get("JUPYTER_RUNTIME_DIR")
        os.environ["JUPYTER_RUNTIME_DIR"] = str(folder / "runtime")
        try:
            paths = {"PYTHONPATH": f"{without}{os.pathsep}{ROOT}", "IPYTHONDIR": str(folder / "ipython")}
            own = {k: v for k, v in environment.items() if k != "MPLBACKEND"}
            # With cleanup_kc, channels are closed also when a cell fails. The finalizer of a client with open ones logs
            # a warning, at whatever moment the garbage collector finds it.
            client.execute(env={**own, **paths}, cleanup_kc=True)
        finally:
            os.environ.pop("JUPYTER_RUNTIME_DIR")
            if before is not None:
                os.environ["JUPYTER_RUNTIME_DIR"] = before
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = output.text.replace(f"{work}/", "")
    return notebook


def main(names: list[str]) -> None:
    """Does what the module's docstring says."""
    paths = sorted(FOLDER.glob("*.ipynb"))
    chosen = {path.stem for path in paths} if names == ["all"] else {Path(name).stem for name in names}
    if unknown := sorted(chosen - {path.stem for path in paths}):
        sys.exit(f"There is no notebook {', '.join(unknown)}: choose from {', '.join(p.stem for p in paths)}, or all.")
    for path in paths:
        notebook = read(path)
        changed = common(notebook, path)
        if changed:
            write(notebook, path)
        if path.stem in chosen:
            write(run(path, os.environ), path)
        print(f"{path.name}: {'run' if path.stem in chosen else 'written' if changed else 'as it was'}")


if __name__ == "__main__":
    main(sys.argv[1:])
