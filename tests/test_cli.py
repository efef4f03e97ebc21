"""Programs: what gin can bind, the shipped minimal recipe, help that answers at once, the shipped gin files."""

import re
import subprocess
import sys
from pathlib import Path

import gin
import pytest

from flm_jax import records
from flm_jax.cli import bindings, configure, runs
from flm_jax.config import small_52b
from flm_jax.growth import Lineage
from tests.environment import as_user

ROOT = Path(__file__).resolve().parent.parent
SURFACE = ROOT / "tests/golden/bindings.txt"
PROGRAMS = sorted(path.stem for path in ROOT.glob("experiments/[a-z]*.py"))
# What --help may import from site-packages: reading the flags, and the names of gin's constants. Both are light.
LIGHT = {"absl", "gin"}


# Of the configurations of data, those that describe their fields one by one.
DESCRIBED = ("DataConfig", "Mixture", "Pretrained", "SentencePiece", "Source")


def surface() -> str:
    """Everything that gin can bind, as `python experiments/bindings.py` prints it."""
    return "\n\n".join(bindings.table(c, meanings=False) for c in configure.configurables()) + "\n"


def test_what_gin_can_bind_is_what_was_reviewed():
    assert surface() == SURFACE.read_text(), (
        "users' gin files name these; if they are to change, `python -m tests.test_cli` writes them anew"
    )


@pytest.mark.parametrize("cls", records.classes(), ids=lambda c: c.__name__)
def test_every_field_of_every_configuration_has_a_meaning(cls):
    # Corpora say theirs in their first lines.
    if not cls.__module__.startswith("flm_jax.data") or cls.__name__ in DESCRIBED:
        assert set(bindings.meanings_of(cls)) == {name for name, _, _ in bindings.fields_of(cls)}


def test_bindings_of_a_name_that_gin_does_not_know_are_refused(capsys):
    with pytest.raises(SystemExit):
        bindings.run(["bindings", "Growht"])
    assert re.search("gin knows no Growht; it knows .*; did you mean 'Growth'", capsys.readouterr().err)
    bindings.run(["bindings", "Ramp"])
    assert "Ramp.delay = 0: an integer, at least 0\n      steps at 0 before it." in capsys.readouterr().out


@pytest.mark.integration
def test_the_minimal_recipe_is_short_and_trains_and_grows_on_texts_of_ones_own(tmp_path, capsys):
    recipe = ROOT / "gin_configs/recipes/minimal.gin"
    assert len(recipe.read_text().splitlines()) < 20
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"{number} is a number; " * 30)
    given = [f"TextFolder.path = {str(tmp_path)!r}", f"DataConfig.cache_dir = {str(tmp_path / 'cache')!r}"]
    given += ["DataConfig.context = 32", "Stage.steps = 2", "Recipe.eval_windows = 4", "train.run = @Run()"]
    given += ["Run.verify_data = 100"]
    gin.clear_config()
    runs.run_train([str(recipe)], given, str(tmp_path / "run"), False)
    gin.clear_config()
    said = capsys.readouterr().out
    assert "Growth to 'large' by zero" in said and "were verified in the background, to the end." in said
    assert (tmp_path / "run/report.md").is_file()


@pytest.mark.integration
@pytest.mark.parametrize("name", PROGRAMS)
def test_help_reads_like_documentation_and_imports_nothing_heavy(name):
    code = f"""
import runpy, sys
sys.argv, before = ["experiments/{name}.py", "--help"], set(sys.modules)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    new = {{n.partition(".")[0] for n, m in sys.modules.items()
           if n not in before and "site-packages" in str(getattr(m, "__file__", ""))}}
    print(*new, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=as_user())
    assert done.returncode == 0, done.stderr
    assert "absl" in done.stderr and set(done.stderr.split()) <= LIGHT
    about, _, listed = done.stdout.partition("\nflags:\n")
    first, blank, *_ = about.splitlines()
    assert first.endswith(".") and not blank
    assert re.search(rf"^  (.* \| )?python experiments/{name}\.py", about, re.MULTILINE)
    # A command of several lines can be copied: no backslash has joined them.
    assert not re.search(r"\S {3,}--|.{121}", about)
    # Every flag says what it is.
    said = re.findall(r"^  --(\S+):(?: <\S+>:)? ?(.*)$", listed, re.MULTILINE)
    assert len(said) == len(re.findall(r"^  --", listed, re.MULTILINE)) and (said or name == "bindings")
    assert not [flag for flag, text in said if len(text) < 8]
    assert ".;" not in listed


CONFIGS = sorted(ROOT.glob("gin_configs/growth/*.gin"))


@pytest.mark.integration
@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_every_growth_configuration_parses_and_fits(file):
    gin.clear_config()
    configure.parse([str(file)], [])
    settings = configure.grow()
    configure.check_used()
    gin.clear_config()
    grown = Lineage(small_52b()).grown(settings["target"], settings["growth"])
    assert grown.outline
    assert grown.ramp_steps in (0, 120)


if __name__ == "__main__":
    SURFACE.write_text(surface())
