"""What the launchers share: gin files to configured objects, and errors to one sentence."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import tokenize
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import gin

from flm_jax import ahead, config, evaluation, hosts, optimizer, overview, plan, sharding, transplant
from flm_jax import recipe as recipes
from flm_jax import train as library
from flm_jax.checkpoint import CheckpointError
from flm_jax.convert import exporting, importing
from flm_jax.data import corpora, source, train_vocabulary
from flm_jax.data.reading import MissingExtraError
from flm_jax.growth import Growth, GrowthError, Ramp
from flm_jax.origin import model_of, read_origin
from flm_jax.overview import dry_run as describe
from flm_jax.recipe import Recipe, Run
from flm_jax.streamed.flow import CHUNK_BYTES
from flm_jax.topology import Topology

ROOT = Path(__file__).resolve().parent.parent
# gin_configs/ lies beside the package in a checkout, and inside it where a wheel was installed.
_PACKAGE = Path(config.__file__).resolve().parent
GIN_ROOT = _PACKAGE if (_PACKAGE / "gin_configs").is_dir() else _PACKAGE.parent
# What a user's input can cause: one sentence is enough. Anything else is our error, and shows where.
EXPECTED = (
    ValueError,
    OSError,
    GrowthError,
    CheckpointError,
    library.NonFiniteError,
    hosts.PeerError,
    MissingExtraError,
)
_registered: set[str] = set()
T = TypeVar("T")
Binding = tuple[str, str, str]  # scope, function, parameter


def register() -> None:
    """Makes the library's configurations known to gin, under their own names; the library itself knows no gin."""
    known: list[Callable[..., Any]] = [
        config.ModelConfig,
        config.tele_flm_52b,
        config.tele_flm_102b,
        config.tele_flm_1t,
        config.small_52b,
        config.small_102b,
        config.small_1t,
        config.RopeScaling,
        model_of,
        optimizer.OptimizerConfig,
        sharding.MeshConfig,
        recipes.Stage,
        recipes.Recipe,
        recipes.Run,
        Growth,
        Ramp,
        source.DataConfig,
        corpora.StandardLibrary,
        corpora.TextFolder,
        corpora.Jsonl,
        corpora.Tfds,
        corpora.SeqioTask,
        train_vocabulary.Bytes,
        train_vocabulary.SentencePiece,
        train_vocabulary.Pretrained,
    ]
    for configurable in known:
        if configurable.__name__ not in _registered:
            gin.external_configurable(configurable, module="flm_jax")
            _registered.add(configurable.__name__)


def parse(gin_files: Sequence[str], gin_bindings: Sequence[str]) -> set[Binding]:
    """Parses gin files (found from here or from the folder that holds the project's gin_configs), then bindings.

    Returns:
        What the bindings set or changed, for `check_used`.

    Raises:
        ValueError: a file does not exist, or something does not parse.
    """
    register()
    gin.add_config_file_search_path(str(GIN_ROOT))
    # Files alone: gin's second reader takes the folder of a name for a Python package, and crashes where it is none.
    del gin.config._FILE_READERS[1:]
    for name in gin_files:
        if not any((base / name).is_file() for base in (Path.cwd(), GIN_ROOT)):
            raise ValueError(f"There is no gin file {name!r}, neither here nor in {GIN_ROOT}.")
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
    """Refuses bindings that nothing read: a mistyped scope, or a macro that no value uses.

    gin itself refuses unknown functions and parameters, but stays silent about these. A file may bind functions that
    are never called, for whoever chooses them; what was bound by hand must have an effect.

    Raises:
        ValueError: names the bindings.
    """
    # gin offers both only as text; the dictionaries have been the same since its first release.
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
            f"Nothing uses these gin bindings: {', '.join(unused)}; check their names and scopes, and that "
            "what they belong to is chosen (as in Run.mesh = @MeshConfig())."
        )


def join(flags: Mapping[str, Any]) -> None:
    """Joins the other processes of a run, if the flags or the environment name any: see `flm_jax.hosts.join`."""
    _log_from(logging.WARNING)
    try:
        hosts.join(**flags)
    except ValueError as error:
        fail(error)


def _log_from(level: int) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level, force=True)


@contextlib.contextmanager
def started() -> Iterator[None]:
    """What a launcher does, its errors told in one sentence."""
    _log_from(logging.WARNING)  # before JAX looks for devices, and tells of all that it does not find
    if not hosts.first():
        _log_from(logging.ERROR)
    try:
        yield
    except EXPECTED as error:
        fail(error)
    except (Exception, KeyboardInterrupt) as error:
        if hosts.joined():
            traceback.print_exc()
            hosts.leave(repr(error))
        raise


def fail(error: BaseException) -> NoReturn:
    """Prints one sentence, and exits with status 1."""
    # gin appends the calls that it was in; the sentence itself comes first.
    text = " ".join(str(error).split("\n  In call to configurable")[0].split())
    print(f"error: {text}", file=sys.stderr)
    hosts.leave(text)
    sys.exit(1)


@gin.configurable(module="flm_jax")
def train(recipe: Recipe = gin.REQUIRED, run: Run | None = None) -> tuple[Recipe, Run]:
    """What `experiments/train.py` runs: the one function that gin configures."""
    return recipe, run or Run()


def run_train(gin_files: Sequence[str], gin_bindings: Sequence[str], workdir: str | None, dry_run: bool) -> None:
    """Builds the recipe, and trains it, or only says what it would be."""
    with started():
        by_hand = parse(gin_files, gin_bindings)
        recipe, run = required(train)
        check_used(by_hand)
        if dry_run:
            for section in describe(recipe, run):
                hosts.say(section)
            return
        assert workdir is not None
        config = gin.operative_config_str()
        if library.train(recipe, run, workdir, records={"config.gin": config, "git.txt": git_state()}) is None:
            hosts.say(f"Stopped; everything is saved in {workdir}. Run the same command to go on.")


@gin.configurable(module="flm_jax")
def grow(
    target: config.ModelConfig | Mapping[str, Any] = gin.REQUIRED,
    growth: Growth = gin.REQUIRED,
    seed: int = 0,
    mesh: sharding.MeshConfig | None = None,
    data: source.DataConfig | None = None,
    tolerance: float = 1e-5,
    streamed: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Any]:
    """What `experiments/grow.py` takes from gin: see `flm_jax.transplant.grow_checkpoint`."""
    return dict(
        target=target,
        growth=growth,
        seed=seed,
        mesh=mesh,
        data=data,
        tolerance=tolerance,
        streamed=streamed,
        chunk_bytes=chunk_bytes,
    )


@gin.configurable(module="flm_jax")
def verify(
    mesh: sharding.MeshConfig | None = None, data: source.DataConfig | None = None, tolerance: float = 1e-5
) -> dict[str, Any]:
    """What `experiments/verify.py` takes from gin: see `flm_jax.transplant.verify_checkpoints`."""
    return dict(mesh=mesh, data=data, tolerance=tolerance)


@gin.configurable(module="flm_jax")
def evaluate(mesh: sharding.MeshConfig | None = None) -> sharding.MeshConfig | None:
    """What `experiments/evaluate.py` takes from gin: how devices are laid out."""
    return mesh


def recorded_data(checkpoint: str) -> source.DataConfig | None:
    """The data that a checkpoint's run was configured with, if its work directory records that."""
    recorded = read_origin(checkpoint).directory.parents[2] / "config.gin"
    if not recorded.is_file() or "DataConfig" not in recorded.read_text():
        return None
    gin.clear_config()
    parse([str(recorded)], ["verify.data = @DataConfig()"])
    data: source.DataConfig = verify()["data"]
    gin.clear_config()
    return data


def check_writable(json_file: str | None) -> None:
    """Refuses a --json that cannot be written, before anything is computed for it.

    Raises:
        ValueError: it is a directory, or lies in none.
    """
    if json_file is None:
        return
    path = Path(json_file).absolute()
    if path.is_dir():
        raise ValueError(f"--json={json_file} is a directory; name a file in it.")
    if not path.parent.is_dir():
        raise ValueError(f"--json={json_file}: there is no directory {path.parent}.")


def required(configured: Callable[[], T]) -> T:
    """What gin gives a function; a binding that is missing is a user's error."""
    try:
        return configured()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def run_grow(source: str, workdir: str, gin_files: Sequence[str], gin_bindings: Sequence[str]) -> None:
    """Grows a checkpoint into a new work directory, and says what was found."""
    with started():
        data = recorded_data(source)
        by_hand = parse(gin_files, gin_bindings)
        settings = required(grow)
        check_used(by_hand)
        for name, kinds in (("target", (config.ModelConfig, Mapping)), ("growth", (Growth,))):
            if not isinstance(settings[name], kinds):
                right = f"bind a {kinds[0].__name__}, called: '@name()'"
                more = ", or what changes, such as {'embed': 720}" if Mapping in kinds else ""
                raise ValueError(f"grow.{name} is {settings[name]!r}; {right}{more}.")
        if not settings["streamed"]:
            settings["data"] = settings["data"] or data
        records = {"config.gin": gin.operative_config_str(), "git.txt": git_state()}
        record = transplant.grow_checkpoint(source, workdir, **settings, records=records)
        hosts.say(transplant.lines(record["verification"]))
        hosts.say(f"Written to {workdir}. Go on from it with Recipe.start = {workdir!r}.")


def run_verify(
    source: str, target: str, json_file: str | None, gin_files: Sequence[str], gin_bindings: Sequence[str]
) -> None:
    """Verifies a grown checkpoint, and exits with status 1 if what its method promises does not hold."""
    with started():
        data = recorded_data(source)
        by_hand = parse(gin_files, gin_bindings)
        settings = verify()
        check_used(by_hand)
        settings["data"] = settings["data"] or data
        check_writable(json_file)
        found = transplant.verify_checkpoints(source, target, **settings)
    hosts.say(transplant.lines(found))
    if json_file and hosts.first():
        Path(json_file).write_text(json.dumps(found, indent=1) + "\n")
    if not found["holds"]:
        sys.exit(1)


def run_import(source: str, workdir: str, dtype: str | None) -> None:
    """Makes a checkpoint of another program's model, and says what it is."""
    with started():
        found = importing.import_model(source, workdir, dtype)
    hosts.say(
        f"{found['architecture']}: {found['model']}; {plan.count(found['params'])} parameters in {found['tensors']} "
        f"tensors, kept as {found['dtype']}; with {', '.join(found['files'])}."
    )
    if "tokenizer.json" not in found["files"]:
        hosts.say(
            "No tokenizer.json came with it: training and evaluation want one of you (Pretrained.path, --tokenizer)."
        )
    hosts.say(f"Written to {workdir}. Grow it with --source={workdir}, or go on from it with Recipe.start.")


def run_export(workdir: str, target: str, architecture: str | None, dtype: str | None, shard_bytes: int) -> None:
    """Writes a checkpoint for other programs, and says what it has become."""
    with started():
        found = exporting.export_model(workdir, target, architecture, dtype, shard_bytes)
    folded = (
        f"{found['folded']} kinds of parameters took over multipliers and kept widths"
        if found["folded"]
        else ("nothing to fold")
    )
    tokenizer = "" if found["tokenizer"] else "; the checkpoint has no tokenizer to go with it"
    hosts.say(
        f"{found['architecture']}: {found['model']}; {plan.count(found['params'])} parameters as {found['dtype']}, "
        f"{plan.size(found['bytes'])}; {folded}{tokenizer}."
    )
    if found["folded"] and found["dtype"] != "float32":
        hosts.say(f"What was folded is rounded to {found['dtype']}: with --dtype=float32 it stays within a few 1e-6.")
    hosts.say(f"Written to {target}: {', '.join(found['files'])} and the weights.")


def run_evaluate(
    checkpoint: str,
    what: evaluation.What,
    tokenizer: str | None,
    batch_size: int,
    max_length: int | None,
    json_file: str | None,
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
) -> None:
    """Evaluates a checkpoint, and says what was found."""
    with started():
        check_writable(json_file)
        data = recorded_data(checkpoint)
        by_hand = parse(gin_files, gin_bindings)
        mesh = evaluate()
        check_used(by_hand)
        try:
            found = evaluation.evaluate_checkpoint(
                checkpoint, what, tokenizer, data, mesh, batch_size, max_length, hosts.say
            )
        except ImportError as error:
            fail(error)
    if json_file and hosts.first():
        Path(json_file).write_text(json.dumps(found, indent=1) + "\n")


def run_plan(
    machine: Topology,
    compiler: str,
    utilisation: float,
    storage: float,
    json_file: str | None,
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
) -> None:
    """Plans a recipe for a machine, stage by stage."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    try:
        check_writable(json_file)
        by_hand = parse(gin_files, gin_bindings)
        recipe, run = required(train)
        check_used(by_hand)
        assumed = ahead.Assumptions(utilisation, storage)
        print(
            f"{machine.name}: {machine.devices} devices on {machine.hosts} hosts; utilisation {utilisation:.0%} assumed"
        )
        records = []
        for record in ahead.stages(recipe, run, ahead.devices_of(machine, compiler), machine, compiler, assumed):
            records.append(record)
            print(overview.stage_text(record), flush=True)
    except EXPECTED as error:
        fail(error)
    print(overview.total_text(records, machine))
    if json_file:
        about = {"name": machine.name, "devices": machine.devices, "hosts": machine.hosts, "chip": machine.chip.source}
        found = {
            "topology": about,
            "compiler": compiler,
            "assumed": {"utilisation": utilisation, "storage_bytes_per_second_and_host": storage},
            "stages": records,
            "total": overview.totals(records),
        }
        Path(json_file).write_text(json.dumps(found, indent=1) + "\n")
    if not all(record["fits"] for record in records):
        sys.exit(1)


def git_state() -> str:
    """The commit that this is, and what is changed on top of it; empty outside a git checkout."""
    try:
        call = [["git", "-C", str(ROOT), *args] for args in (["rev-parse", "HEAD"], ["diff", "HEAD", "--stat"])]
        return "\n".join(subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in call)
    except (OSError, subprocess.CalledProcessError):
        return ""
