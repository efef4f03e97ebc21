"""Gin files and bindings to configured objects. No module outside `flm_jax.cli` uses gin."""

from __future__ import annotations

import tokenize
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gin

from flm_jax import config, records
from flm_jax.checkpoint_growth.streaming import CHUNK_BYTES
from flm_jax.config import ModelConfig
from flm_jax.data.config import DataConfig
from flm_jax.growth import Growth
from flm_jax.recipe import Recipe, Run
from flm_jax.records.fields import NonNegative, Seed, Size, fitted
from flm_jax.sharding import MeshConfig
from flm_jax.source_checkpoint import model_of, read_source

PACKAGE = Path(__file__).resolve().parent.parent
# The folders that may contain `gin_configs/`: beside the package in a checkout, inside it if installed.
SHIPPED = tuple(base for base in (PACKAGE.parent, PACKAGE) if (base / "gin_configs").is_dir())
# The functions that gin can call, besides the configuration classes.
FUNCTIONS: tuple[Callable[..., Any], ...] = (
    config.tele_flm_52b,
    config.tele_flm_102b,
    config.tele_flm_1t,
    config.small_52b,
    config.small_102b,
    config.small_1t,
    model_of,
)
T = TypeVar("T")
Binding = tuple[str, str, str]  # scope, function, parameter
_registered: set[str] = set()


def configurables() -> list[Callable[..., Any]]:
    """Everything that gin files can name: configuration classes, functions, and one configurable per program."""
    return [*records.classes(), *FUNCTIONS, *(gin.get_configurable(f"flm_jax.{name}") for name in PROGRAMS)]


def register() -> None:
    """Registers the library's configurations with gin, under their own names."""
    known: list[Callable[..., Any]] = [*records.classes(), *FUNCTIONS]
    for configurable in known:
        if configurable.__name__ not in _registered:
            gin.external_configurable(configurable, module="flm_jax")
            _registered.add(configurable.__name__)


def parse(gin_files: Sequence[str], gin_bindings: Sequence[str]) -> set[Binding]:
    """Parses gin files, then bindings; files are looked up in the current directory and among the shipped ones.

    Returns:
      The parameters that the bindings set or changed, for `check_used`.

    Raises:
      ValueError: a file does not exist, or a file or binding does not parse.
    """
    register()
    for base in SHIPPED:
        gin.add_config_file_search_path(str(base))
    # Files alone: gin's second reader takes the folder of a name for a Python package, and crashes where it is none.
    del gin.config._FILE_READERS[1:]
    for name in gin_files:
        if not any((base / name).is_file() for base in (Path.cwd(), *SHIPPED)):
            places = " nor in ".join(map(str, SHIPPED))
            raise ValueError(f"There is no gin file {name!r} in the current directory nor in {places}.")
    try:
        gin.parse_config_files_and_bindings(
            list(gin_files), [], finalize_config=False, print_includes_and_imports=False
        )
        before = {key: dict(values) for key, values in gin.config._CONFIG.items()}
        gin.parse_config(list(gin_bindings))
    except (OSError, SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"The gin configuration does not parse: {error}") from error
    return {
        (*key, name)
        for key, values in gin.config._CONFIG.items()
        for name, value in values.items()
        if name not in before.get(key, {}) or before[key][name] is not value
    }


def check_used(by_hand: set[Binding]) -> None:
    """Refuses bindings that had no effect: a mistyped scope, or a macro that no value uses.

    gin itself refuses unknown functions and parameters, but not these. A file may bind parameters of functions that are
    not called, so that a binding on the command line can choose such a function; but bindings on the command line must
    have an effect.

    Args:
      by_hand: the bindings of the command line, as `parse` returns them.

    Raises:
      ValueError: there are such bindings; the message names them.
    """
    # gin's public functions give these only as text; the private dictionaries have not changed since its first release.
    given, used = gin.config._CONFIG, gin.config._OPERATIVE_CONFIG
    called = {selector for _, selector in used} - {"gin.macro"}

    def is_used(scope: str, selector: str, name: str) -> bool:
        return any(
            selector == other and name in parameters and f"{where}/".startswith(f"{scope}/" if scope else "")
            for (where, other), parameters in used.items()
        )

    unused = [
        scope if selector == "gin.macro" else f"{scope}/{selector.split('.')[-1]}.{name}".lstrip("/")
        for (scope, selector), parameters in given.items()
        for name in parameters
        if (selector in called or (scope, selector, name) in by_hand) and not is_used(scope, selector, name)
    ]
    if unused:
        raise ValueError(
            f"Nothing uses these gin bindings: {', '.join(unused)}; check their names and scopes, and that the "
            "object they belong to is bound (as in Run.mesh = @MeshConfig())."
        )


@gin.configurable(module="flm_jax")
def train(recipe: Recipe = gin.REQUIRED, run: Run | None = None) -> tuple[Recipe, Run]:
    """The recipe and the run of `experiments/train.py`, from gin."""
    given = fitted(train, dict(recipe=recipe, run=run))
    return given["recipe"], given["run"] or Run()


@gin.configurable(module="flm_jax")
def grow(
    target: ModelConfig | Mapping[str, Any] = gin.REQUIRED,
    growth: Growth = gin.REQUIRED,
    seed: Seed = 0,
    mesh: MeshConfig | None = None,
    data: DataConfig | None = None,
    tolerance: NonNegative = 1e-5,
    streamed: bool = False,
    chunk_bytes: Size = CHUNK_BYTES,
) -> dict[str, Any]:
    """The arguments of `flm_jax.checkpoint_growth.grow_checkpoint` that `experiments/grow.py` takes from gin."""
    given = dict(target=target, growth=growth, seed=seed, mesh=mesh, data=data)
    return fitted(grow, {**given, "tolerance": tolerance, "streamed": streamed, "chunk_bytes": chunk_bytes})


@gin.configurable(module="flm_jax")
def verify(
    mesh: MeshConfig | None = None, data: DataConfig | None = None, tolerance: NonNegative = 1e-5
) -> dict[str, Any]:
    """The arguments of `flm_jax.checkpoint_growth.verify_checkpoints` that `experiments/verify.py` takes from gin."""
    return fitted(verify, dict(mesh=mesh, data=data, tolerance=tolerance))


@gin.configurable(module="flm_jax")
def evaluate(mesh: MeshConfig | None = None) -> MeshConfig | None:
    """The mesh of `experiments/evaluate.py`, from gin."""
    found: MeshConfig | None = fitted(evaluate, dict(mesh=mesh))["mesh"]
    return found


def recorded_data(checkpoint: str) -> DataConfig | None:
    """The data configuration of a checkpoint's run, read from its work directory; None if it is not recorded there."""
    recorded = read_source(checkpoint).directory.parents[2] / "config.gin"
    if not recorded.is_file() or "DataConfig" not in recorded.read_text():
        return None
    gin.clear_config()
    parse([str(recorded)], ["verify.data = @DataConfig()"])
    data: DataConfig = verify()["data"]
    gin.clear_config()
    return data


def required(configured: Callable[[], T]) -> T:
    """The result of a gin configurable; a missing required binding raises ValueError, as other errors of input do."""
    try:
        return configured()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


PROGRAMS = ("train", "grow", "verify", "evaluate")
