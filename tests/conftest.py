"""Eight simulated devices for every test, and JAX's quiet mistakes made loud."""

from tests import environment  # Sets variables, before JAX is imported.

# isort: split
import collections
import gc
import os
import shutil

import jax
import pytest
from hypothesis import HealthCheck, settings
from jax._src import compiler  # JAX has options for one program, and none for all

jax.config.update("jax_numpy_rank_promotion", "raise")
_OPTIONS = compiler.get_compile_options

# Compilation makes the first example slow, and CI machines are noisy: time is no measure of a test here. One commit has
# one verdict, so its examples are drawn from the test's own text; `make test-search` draws others each time.
PATIENT = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.register_profile("house", PATIENT, derandomize=True)
settings.register_profile("search", PATIENT)
settings.register_profile("quick", PATIENT, derandomize=True, max_examples=4)  # make check
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "house"))


# `make test` gives every file to one process. These take longest and come first, so that both processes end together.
LONGEST = (
    "test_checkpoint_growth",
    "test_processes",
    "test_golden_run",
    "test_train",
    "test_growth_exact",
    "test_docs_tutorial",
    "test_cli_train",
    "test_launching_tpu",
    "test_notebooks",
    "test_notebook",
    "test_cli_sweep",
    "test_convert_exporting",
    "test_convert_importing",
)


def _compiled_fast(*args, **given):
    more = {**(given.get("env_options_overrides") or {}), **environment.FAST}
    return _OPTIONS(*args, **{**given, "env_options_overrides": more})


def pytest_configure():
    """Tests compile thousands of programs and run each a few times."""
    if not environment.optimised():
        compiler.get_compile_options = _compiled_fast


def pytest_collection_modifyitems(config, items):
    """The longest files first; in `make check`, of each battery only every fourth case."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    if os.environ.get("HYPOTHESIS_PROFILE") != "quick":
        return
    counts, kept, dropped = collections.Counter(), [], []
    for item in items:
        case = (item.module.__name__, item.originalname)
        late = item.get_closest_marker("battery") is not None and counts[case] % 4 != 0
        (dropped if late else kept).append(item)
        counts[case] += 1
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_collection_finish(session):
    """What was imported stays: the garbage collector need not look at it again, nor as often as by default."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def x64():
    """Double precision for the test that asks for it."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def cheap_draws():
    """Draws that compile at once, for tests that compile hundreds of growths and ask nothing of what is drawn."""
    from tests import growing, small

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growing.GROW, "draw", small.waves)
        yield


@pytest.fixture(scope="module")
def compiled_as_in_use():
    """Programs that XLA compiles as it does for users, for files that hold two different programs to the same bits.

    Those of other files are compiled fast, and what is rounded then depends on the program around it: a value that is
    drawn alone, or as part of a growth, may differ in its last bit.
    """
    jax.clear_caches()  # a program that other files use too is compiled for each of both kinds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", _OPTIONS)
        yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small corpus, prepared on first use."""
    from flm_jax.data.config import DataConfig
    from flm_jax.data.corpora import TextFolder
    from flm_jax.data.train_vocabulary import Bytes
    from tests import small

    base = tmp_path_factory.mktemp("data")
    small.write_corpus(base / "corpus")
    return DataConfig(TextFolder(str(base / "corpus")), Bytes(), context=16, cache_dir=str(base / "cache"))


@pytest.fixture(scope="session")
def recipe(data):
    """Three stages, grown by a mask and by zeros."""
    from tests import runs

    return runs.three_stages(data)


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory):
    """Checkpoints of steps 1 and 2, to read; `damaged` is a copy."""
    from tests import checkpoints

    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints.save(directory, 1, 2)
    return directory


@pytest.fixture
def damaged(two_steps, tmp_path):
    """A copy of those checkpoints, to damage."""
    shutil.copytree(two_steps, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    """By name: the model, its directory, and the checkpoint that it becomes; each made once."""
    from flm_jax.convert.importing import import_model
    from tests import hub

    made = {}

    def one(name):
        if name not in made:
            family, fields = hub.MODELS[name]
            base = tmp_path_factory.mktemp(family)
            reference = hub.theirs(family, fields)
            reference.save_pretrained(base / "in")
            import_model(base / "in", base / "checkpoint", chunk_bytes=3000)
            made[name] = reference, base
        return made[name]

    return one
