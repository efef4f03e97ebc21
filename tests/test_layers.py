"""Imports point down: the declared order of modules and packages, bottom to top, and no import cycle."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "flm_jax"
# Names on one line do not import each other. Packages count as one; inside them, imports only must not form a cycle.
ORDER = """
files counter_rng duplicates
distributed
records
tracking
progress
signature
config sharding
kernels
attention
model
loss costs optimizer
compiler_options
growth
state
checkpoint
data
guards
source_checkpoint
chat checkpoint_care distillation generation
recipe
step
checkpoint_growth
report run_comparison
stage_run forking
train
convert evaluation planning
selection launching sweeps savings mup
cli
"""
LEVEL = {name: level for level, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}


def modules() -> dict[str, Path]:
    """Every module by its dotted name within the package; a package's own is that of its folder."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that one imports, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flm_jax":
            base = ".".join(node.module.split(".")[1:])
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in known else base)
    return found - {name, ""}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(name, path, known) for name, path in known.items() if name}


def test_every_module_has_a_place_in_the_order():
    assert {name.split(".")[0] for name in graph()} == set(LEVEL)
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= 20


def test_imports_point_down():
    up = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if name.split(".")[0] != other.split(".")[0] and LEVEL[name.split(".")[0]] <= LEVEL[other.split(".")[0]]
    ]
    assert not up, "\n".join(up)


def test_no_imports_form_a_cycle():
    edges, state = graph(), {}

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert state.get(name) != "open", f"a cycle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in state:
            state[name] = "open"
            for other in sorted(edges[name]):
                visit(other, (*way, name))
            state[name] = "done"

    for name in edges:
        visit(name, ())


def test_no_file_is_longer_than_400_lines():
    root = PACKAGE.parent
    code = [p for folder in ("flm_jax", "experiments", "benchmarks") for p in (root / folder).rglob("*.py")]
    long = {str(p.relative_to(root)): n for p in code if (n := len(p.read_text().splitlines())) > 400}
    assert not long, long
