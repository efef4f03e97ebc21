"""Gin files and bindings to configured objects. No module outside `flm_jax.cli` uses gin."""

from __future__ import annotations

import collections
import dataclasses
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

import gin

import flm_jax.chat.corpus  # noqa: F401 - registers Conversations
from flm_jax import config, records
from flm_jax.checkpoint_growth.streaming import CHUNK_BYTES
from flm_jax.cli import gin_reader
from flm_jax.config import ModelConfig
from flm_jax.data.config import DataConfig
from flm_jax.data.train_vocabulary import SentencePiece
from flm_jax.generation import Sampling
from flm_jax.growth import Growth
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run
from flm_jax.records import FieldError, meant
from flm_jax.records.fields import NonNegative, Seed, Size, class_names, fitted, hints, says
from flm_jax.savings.study import Study
from flm_jax.selection.config import Selection
from flm_jax.sharding import MeshConfig
from flm_jax.source_checkpoint import model_of
from flm_jax.sweeps.config import Sweep

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


def parse(gin_files: Sequence[str], gin_bindings: Sequence[str]) -> None:
    """Parses gin files, then bindings; files are looked up in the current directory and among the shipped ones.

    Raises:
      ValueError: a file does not exist, or a file or binding does not parse; the message says what to write.
    """
    register()
    gin_reader.read(gin_files, gin_bindings, SHIPPED)


def check_used() -> None:
    """Refuses bindings of the command line that had no effect, and names those of files in a warning.

    A file may bind more than is used, so that the command line or a second file can take one stage of it, or another
    corpus: the scopes of the other stages, which the file's own list referred to, are then left out without a word. A
    binding on the command line must have an effect; one with a mistyped scope has none.

    Raises:
      ValueError: a binding on the command line had no effect; the message names it.
    """
    # gin's public functions give these only as text; the private dictionaries have not changed since its first release.
    given, used = gin.config._CONFIG, gin.config._OPERATIVE_CONFIG
    unused = [
        (scope, selector, name)
        for (scope, selector), parameters in given.items()
        for name in parameters
        if not any(
            selector == other and name in taken and f"{where}/".startswith(f"{scope}/" if scope else "")
            for (where, other), taken in used.items()
        )
    ]
    by_hand = [_shown(key) for key in unused if gin_reader.is_by_hand(key)]
    if by_hand:
        raise ValueError(f"Nothing uses these gin bindings: {', '.join(by_hand)}{_what_is_wrong(by_hand[0], used)}")
    # Of functions that are not called at all a file may well bind parameters: those of every model of a series.
    called = {selector for _, selector in used}
    taken = tuple(f"{where}/" for where, _ in used)
    left_out = {key for key in gin_reader.left_out() if not any(where.startswith(f"{key[0]}/") for where in taken)}
    told = [key for key in unused if key[1] in called and key not in left_out]
    groups = collections.Counter(_shown(key).rpartition(".")[0] or _shown(key) for key in told)
    if groups:
        counted = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in groups.items())
        logging.warning("Bindings in gin files that nothing uses, by what they belong to: %s.", counted)


def _what_is_wrong(binding: str, used: Collection[tuple[str, str]]) -> str:
    """The end of the sentence about a binding that nothing uses, given the scope and the selector of what is used."""
    names = [f"{cls.__name__}.{name}" for cls in records.classes() for name in hints(cls)]
    scope, _, name = binding.rpartition("/")
    owner, scopes = name.split(".")[0], {where for where, _ in used}
    near = meant(scope, scopes - {""}) if scope not in scopes else ""
    near = near or ("" if name in names else meant(name, [name.split(".")[1] for name in names]))
    makers = [] if near or name not in names else _makers(owner, {selector.split(".")[-1] for _, selector in used})
    if makers:
        holder = makers[-1].split(".")[0]
        if any(where == scope and selector.split(".")[-1] == holder for where, selector in used):
            makers[-1] = f"{scope}/{makers[-1]}".lstrip("/")
        return f": there is no {owner} here. Bind {' and '.join(makers)} too."
    return (
        "; check their names and scopes, and that the object they belong to is bound (as in Run.mesh = @MeshConfig())"
        f"{near or '.'}"
    )


def _makers(name: str, made: Set[str], tried: Set[str] = frozenset()) -> list[str]:
    """The bindings that make an object of a configuration class, given the names of what is made; empty: it is made."""
    if name in made:
        return []
    holders = [
        (holder.__name__, field)
        for holder in configurables()
        for field, kind in hints(holder).items()
        if holder.__name__ not in tried and name in class_names(kind)
    ]
    for holder, field in holders:
        if holder in made:
            return [f"{holder}.{field} = @{name}()"]
    for holder, field in holders:
        if above := _makers(holder, made, tried | {name}):
            return [*above, f"{holder}.{field} = @{name}()"]
    return []


def _shown(key: gin_reader.Key) -> str:
    scope, selector, name = key
    if selector == gin_reader.MACRO:
        return scope
    return f"{scope}/{selector.split('.')[-1]}.{name}".lstrip("/")


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


@gin.configurable(module="flm_jax")
def generate(mesh: MeshConfig | None = None, sampling: Sampling | None = None) -> dict[str, Any]:
    """The mesh and the sampling of `experiments/generate.py`, from gin; its flags override fields of the sampling."""
    return fitted(generate, dict(mesh=mesh, sampling=sampling))


@gin.configurable(module="flm_jax")
def select_sft(selection: Selection = gin.REQUIRED) -> Selection:
    """The selection of `experiments/select_sft.py`, from gin."""
    found: Selection = fitted(select_sft, dict(selection=selection))["selection"]
    return found


@gin.configurable(module="flm_jax")
def sweep(over: Sweep = gin.REQUIRED) -> Sweep:
    """The sweep of `experiments/sweep.py`, from gin; its recipe is that of `train`."""
    found: Sweep = fitted(sweep, dict(over=over))["over"]
    return found


@gin.configurable(module="flm_jax")
def savings(study: Study = gin.REQUIRED) -> Study:
    """The study of `experiments/savings.py`, from gin."""
    found: Study = fitted(savings, dict(study=study))["study"]
    return found


@gin.configurable(module="flm_jax")
def tokenizer(data: DataConfig | None = None) -> DataConfig:
    """The data of `experiments/tokenizer.py`, from gin, with a vocabulary.

    None: a `DataConfig` with what the gin files bind in it; so with a `SentencePiece`, if that names no vocabulary.
    """
    given: DataConfig | None = fitted(tokenizer, dict(data=data))["data"]
    found: DataConfig = gin.get_configurable(DataConfig)() if given is None else given
    if found.vocabulary is None:
        found = dataclasses.replace(found, vocabulary=gin.get_configurable(SentencePiece)())
    return found


@gin.configurable(module="flm_jax")
def coordinate_check(model: ModelConfig | None = None, optimizer: OptimizerConfig | None = None) -> dict[str, Any]:
    """The model and the optimizer of `experiments/coordinate_check.py`, from gin; None: those of the small family."""
    return fitted(coordinate_check, dict(model=model, optimizer=optimizer))


def configured(program: Callable[[], T]) -> T:
    """The result of a gin configurable; what gin says of wrong or missing values is put into a sentence.

    Raises:
      ValueError: a value is missing, or does not fit its field.
    """
    if missing := gin_reader.missing_macros():
        bindings = " ".join(f"--gin_bindings=\"{name} = '...'\"" for name in missing)
        raise ValueError(f"The gin file needs a value for {' and '.join(missing)}: add {bindings}")
    try:
        return program()
    except FieldError as error:
        text = str(error).split(gin_reader.IN_CALL)[0]
        wrong, references = error.wrong, gin_reader.raw_references(error.owner, error.field)
        if callable(wrong) and references:
            text += f" Write it with parentheses: {references[0]}()."
        elif error.classes and isinstance(wrong, str):
            name = wrong.strip("@() ")
            if name.rsplit("/", 1)[-1] in gin_reader.configurable_names():
                text += f" Write it without quotes: @{name}()."
            else:
                text += f" Write one without quotes, such as @{error.classes[0]}()."
        where = " and ".join(gin_reader.places(error.owner, error.field, error.value))
        raise ValueError(f"{text} It is bound in {where}." if where else text) from error
    except RuntimeError as error:
        lacking = re.search(r"Required bindings for `(.*)` not provided in config: \[(.*)\]", str(error))
        if lacking is None:
            raise
        raise ValueError(_lacking(lacking[1], lacking[2], "")) from error
    except TypeError as error:
        lacking = re.search(r"No values supplied by Gin or caller for arguments: \[(.*)\]", str(error))
        called = re.search(gin_reader.IN_CALL + r"(\w+)' \(.*?\)(?: in scope '(.*)')?(?:\n|$)", str(error))
        if lacking is None or called is None:
            raise
        raise ValueError(_lacking(called[1], lacking[1], called[2] or "")) from error


def _lacking(name: str, quoted: str, scope: str) -> str:
    """The sentence about a configurable that was called without its required parameters."""
    kinds = hints(next(known for known in configurables() if known.__name__ == name))
    missing = [field for field in re.findall(r"\w+", quoted) if field in kinds]
    full = f"{scope}/{name}" if scope else name
    right = ", ".join(f"{full}.{field} ({says(kinds[field])})" for field in missing)
    known = gin_reader.scopes()
    near = (
        "" if not scope or scope in known else f" Nothing is bound in the scope {scope!r}{meant(scope, known) or '.'}"
    )
    return f"{full} lacks {', '.join(missing)}: bind {right}.{near}"


PROGRAMS = (
    "train",
    "grow",
    "verify",
    "evaluate",
    "generate",
    "select_sft",
    "sweep",
    "savings",
    "tokenizer",
    "coordinate_check",
)
