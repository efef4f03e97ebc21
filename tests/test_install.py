"""Installation: what is imported is declared and pinned, and what works without the extra `data`."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import gin
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flm_jax.cli import configure, errors
from flm_jax.data.reading import load_tensorflow
from tests.environment import as_user

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"flm_jax", "experiments", "benchmarks", "dev", "tests"}


def declared(*extras: str) -> list[Requirement]:
    """The requirements of the base and of some extras, those that an extra takes over from another included."""
    lines = [*PROJECT["dependencies"], *(line for e in extras for line in PROJECT["optional-dependencies"][e])]
    found = [Requirement(line) for line in lines]
    inherited = {extra for r in found if r.name == "flm_jax" for extra in r.extras} - set(extras)
    return declared(*extras, *inherited) if inherited else [r for r in found if r.name != "flm_jax"]


def names(*extras: str) -> set[str]:
    return {canonicalize_name(r.name) for r in declared(*extras)}


def imports(*folders: str):
    """(distributions that provide a module, its name, the file, whether the import is indented) for every import."""
    distributions = packages_distributions()
    for file in (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            if file.name == "tunix_step.py":  # it runs in an environment of its own, which make builds
                continue
            for name in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - OURS:
                owners = {canonicalize_name(owner) for owner in distributions.get(name, [name])}
                yield owners, name, file.relative_to(ROOT).as_posix(), node.col_offset > 0


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (("flm_jax", "experiments"), ("beam", "data", "datasets", "eval", "select", "wandb", "mlflow", "trackio")),
        (("tests", "benchmarks", "dev"), ("dev",)),
    ],
)
def test_what_is_imported_is_declared(folders, extras):
    undeclared = {(name, file) for owners, name, file, _ in imports(*folders) if not owners & names(*extras)}
    assert not undeclared, f"add these to pyproject.toml: {undeclared}"


def test_the_data_extra_is_imported_in_the_data_package_alone_and_lazily():
    extra = names("data") - names()
    found = [(name, file, lazy) for owners, name, file, lazy in imports("flm_jax", "experiments") if owners & extra]
    assert {"seqio", "tensorflow", "tensorflow_datasets"} <= {name for name, _, _ in found}
    assert not [f for f in found if not (f[1].startswith("flm_jax/data/") and f[2])]


def test_every_runtime_requirement_is_pinned_inside_its_declared_range():
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line]
    assert {canonicalize_name(pin.name) for pin in pins} == names("data", "select")
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "==", f"{pin} pins nothing"
        # A requirement of one Python has its pin under the same marker, quotes apart.
        same = [r for r in declared("data", "select") if canonicalize_name(r.name) == canonicalize_name(pin.name)]
        (range_,) = [r for r in same if str(r.marker) == str(pin.marker)]
        assert exact.version in range_.specifier, f"{pin} is not in {range_}"


def test_without_the_data_extra_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqio", None)
    with pytest.raises(errors.EXPECTED, match=r"pip install -e '\.\[data\]'"):
        load_tensorflow()


def test_gin_files_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)  # gin_configs then looks like a package, which it is not
    try:
        configure.parse(["gin_configs/recipes/demo.gin"], [])  # it includes another
    finally:
        gin.clear_config()


GIN = """
train.recipe = @Recipe()
Recipe.stages = [@Stage()]
Recipe.data = @DataConfig()
Recipe.eval_windows = 8
DataConfig.corpus = @TextFolder()
DataConfig.vocabulary = @Bytes()
DataConfig.context = 16
TextFolder.path = '{corpus}'
DataConfig.cache_dir = '{cache}'
Stage.name = 'a'
Stage.model = @small_52b()
Stage.steps = 4
Stage.batch_size = 8
small_52b.vocab = 264
"""


@pytest.mark.slow
def test_the_base_alone_trains_grows_verifies_converts_and_plans(data, tmp_path):
    """In an environment of its own, made from a wheel, with neither TensorFlow nor seqio."""
    from safetensors.numpy import load_file

    from flm_jax.data.source import open_data

    open_data(data)  # the store is prepared here, where the data extra is installed
    python = tmp_path / "env" / "bin" / "python"
    env = {name: value for name, value in as_user().items() if not name.startswith("PYTHON")}

    def call(*command, succeeds=True) -> str:
        done = subprocess.run([*map(str, command)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert (done.returncode == 0) == succeeds, done.stderr[-3000:]
        return done.stdout if succeeds else done.stderr

    def launch(name, *flags, **keywords) -> str:
        return call(python.with_name(f"flm-{name}"), *flags, **keywords)

    call(sys.executable, "-m", "venv", python.parents[1])
    call(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", ROOT)
    # Bytes, not blocks: a small file takes a block of 4 KiB, whatever the file system. Compiled files are included.
    size = sum(f.stat().st_size for f in python.parents[1].rglob("*") if f.is_file() and not f.is_symlink())
    print(f"{size / 1e6:.0f} MB installed")
    assert size < 1e9
    package = Path(call(python, "-c", "import flm_jax; print(flm_jax.__file__)").strip()).parent
    assert python.parents[1] in package.parents
    assert (package / "py.typed").is_file()
    assert (package / "gin_configs/recipes/demo.gin").read_bytes() == (
        ROOT / "gin_configs/recipes/demo.gin"
    ).read_bytes()
    call(python, "-c", "import tensorflow", succeeds=False)
    call(python, "-c", "import seqio", succeeds=False)

    (tmp_path / "small.gin").write_text(GIN.format(corpus=data.corpus.path, cache=data.cache_dir))
    assert "Held-out loss" in launch("train", "--gin_file=small.gin", "--workdir=run")
    shape = "--gin_bindings=grow.target = {'embed': 80, 'heads': 5, 'mlp': 216, 'layers': 5}"
    launch("grow", "--source=run", "--workdir=larger", shape, "--gin_bindings=grow.growth = @Growth()")
    launch("verify", "--source=run", "--target=larger")
    launch("convert", "--workdir=larger", "--to_hf=out", "--dtype=float32")
    launch("convert", "--workdir=again", "--from_hf=out")
    launch("convert", "--workdir=again", "--to_hf=out2", "--dtype=float32")
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "out2"))
    assert once.keys() == twice.keys()
    assert all((once[name] == twice[name]).all() for name in once)
    recipe = "--gin_file=gin_configs/recipes/tele_flm_52b.gin"
    assert "fits in" in launch("plan", recipe, "--topology=v5p-2048", "--compiler=none")

    error = launch(
        "train", "--gin_file=small.gin", "--workdir=new", "--gin_bindings=DataConfig.cache_dir = 'new'", succeeds=False
    )
    assert "pip install -e '.[data]'" in error
    assert "Traceback" not in error
