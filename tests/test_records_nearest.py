"""A name that does not exist is answered with the nearest ones, in every place where a user writes one."""

import gin
import pytest

from flm_jax.chat.template import find_template
from flm_jax.checkpoint.find import step_directory
from flm_jax.cli import bindings, configure, errors, flags
from flm_jax.config import small_52b
from flm_jax.convert.families import choose
from flm_jax.convert.pieces import check_dtype
from flm_jax.data.corpora import Jsonl, TextFolder
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.evaluation.evaluate import read_texts
from flm_jax.evaluation.judges import read_judge
from flm_jax.generation.prompts import read_prompts
from flm_jax.growth import Growth
from flm_jax.growth.distance import layer_distances
from flm_jax.planning.topology import topology
from flm_jax.recipe import Recipe, Run, Stage
from flm_jax.records import meant, meant_beside
from flm_jax.selection.config import TextRules
from flm_jax.selection.rules import check_rules
from flm_jax.selection.scores import lookup
from flm_jax.sharding import MeshConfig


def test_names_are_near_in_their_order_capitals_or_not():
    names = ("zero", "noise", "uneven", "copy", "Copies")
    assert meant("zreo", names) == "; did you mean 'zero'?"
    assert meant("ZERO", names) == "; did you mean 'zero'?"
    assert meant("copie", names, most=3) == "; did you mean 'Copies', 'copy' or 'noise'?"
    assert meant("n1", ("n1a", "n1b", "n1c"), most=3).count("n1") == 3
    assert meant("n1", ("n1a", "n1b"), most=1).count("n1") == 1
    assert meant("far", names) == meant("", names) == meant(7, names) == meant("x", ()) == ""


def test_of_a_path_the_first_part_that_is_missing_is_compared(tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert meant_beside(tmp_path / "runs" / "dmeo" / "checkpoints") == f"; did you mean '{tmp_path}/runs/demo'?"
    assert meant_beside(tmp_path / "rusn" / "demo") == f"; did you mean '{tmp_path}/runs'?"
    assert meant_beside(tmp_path / "elsewhere") == meant_beside("/") == ""


def gin_of(*statements, files=()):
    gin.clear_config()
    try:
        configure.parse(files, statements)
        configure.configured(configure.train)
    finally:
        gin.clear_config()


# Of what is looked up: how a name with a mistake is given there, and the one that is meant.
WRITTEN = {
    "a gin file": (lambda at: gin_of(files=["gin_configs/recipes/dmeo.gin"]), "gin_configs/recipes/demo.gin"),
    "a gin file of one's own": (lambda at: gin_of(files=[f"{at}/text.gni"]), "text.gin"),
    "a configurable": (lambda at: gin_of("Recipee.seed = 1"), "Recipe"),
    "a configurable in another case": (lambda at: gin_of("recipe.seed = 1"), "Recipe"),
    "a configurable as a value": (lambda at: gin_of("Stage.model = @smal_52b()"), "small_52b"),
    "a parameter": (lambda at: gin_of("Recipe.sede = 1"), "seed"),
    "a macro": (lambda at: gin_of("seed = 1", "Recipe.seed = %sede"), "seed"),
    "an argument of bindings.py": (lambda at: bindings.run(["bindings", "Stagee"]), "Stage"),
    "a value of a flag": (lambda at: flags.parse(["x", "--nearest_dtype=flaot32"]), "float32"),
    "a chip": (lambda at: topology("v5pp-2048"), "v5p"),
    "a chip without a size": (lambda at: topology("h1000"), "h100"),
    "an operator": (lambda at: Growth("zreo"), "zero"),
    "an operator of an axis": (lambda at: Growth("zero", methods={"layers": "nosie"}), "noise"),
    "an axis": (lambda at: Growth("zero", methods={"layer": "zero"}), "layers"),
    "a place of new layers": (lambda at: Growth("zero", depth="interleaved"), "interleave"),
    "a distance": (lambda at: layer_distances(None, None, None, metric="cosin"), "cosine"),
    "a field of a model": (lambda at: small_52b().changed({"head": 8}), "heads"),
    "a family": (lambda at: choose(small_52b(), "LamaForCausalLM", {}), "LlamaForCausalLM"),
    "a dtype": (lambda at: check_dtype("bf16"), "bfloat16"),
    "a template": (lambda at: find_template("chatlm", ByteVocabulary()), "chatml"),
    "a template's file": (lambda at: find_template(f"{at}/text.jinjia", ByteVocabulary()), "text.jinja"),
    "a judge": (lambda at: read_judge("endpont:m@https://x"), "endpoint"),
    "a stage": (lambda at: run_of(meshes={"frist": MeshConfig()}), "first"),
    "a rule": (lambda at: check_rules(TextRules(off=("refusals",))), "refusal"),
    "a score": (lambda at: lookup("lenght", base=True), "length"),
    "a checkpoint": (lambda at: step_directory(at / "rnus"), "runs"),
    "texts": (lambda at: TextFolder(str(at / "rnus")).paths(), "runs"),
    "a text": (lambda at: read_texts(str(at / "text.txtx")), "text.txt"),
    "lines": (lambda at: Jsonl(str(at / "text.jsnol")).files(), "text.jsonl"),
    "a field of lines": (lambda at: Jsonl("x", field="txet").parse(b'{"text": "a", "id": 1}', "x:1"), "text"),
    "prompts": (lambda at: read_prompts(str(at / "text.jsnol")), "text.jsonl"),
}


def run_of(**fields):
    Run(**fields).check(Recipe((Stage("first", small_52b(), 1, 1),)))


@pytest.mark.parametrize("what", WRITTEN)
def test_a_mistyped_name_is_answered_with_the_one_that_is_meant(what, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    for ending in ("txt", "jsonl", "gin", "jinja"):
        (tmp_path / f"text.{ending}").touch()
    if "nearest_dtype" not in flags.FLAGS:
        flags.flags.DEFINE_enum("nearest_dtype", None, ["float32", "bfloat16"], "For this test.")
    write, right = WRITTEN[what]
    with pytest.raises((SystemExit, *errors.EXPECTED)) as refused:
        write(tmp_path)
    said = capsys.readouterr().err if refused.type is SystemExit else str(refused.value)
    assert f"did you mean {right!r}?" in said or f"/{right}'?" in said, said
