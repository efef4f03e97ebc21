"""Gin files and bindings: what is mistyped is refused with what to write; recipes are cut by a binding; includes."""

import logging
from pathlib import Path

import gin
import pytest

from flm_jax.cli import configure

ROOT = Path(__file__).resolve().parent.parent
TINY = """
steps = 60
train.recipe = @Recipe()
Recipe.stages = [@Stage()]
Recipe.data = @DataConfig()
DataConfig.corpus = @TextFolder()
TextFolder.path = 'texts'
Stage.name = 'small'
Stage.model = @small_52b()
Stage.steps = %steps
Stage.batch_size = 8
"""


@pytest.fixture
def tiny(tmp_path):
    gin.clear_config()
    (tmp_path / "tiny.gin").write_text(TINY)
    yield tmp_path / "tiny.gin"
    gin.clear_config()


def configured(file, *bindings):
    configure.parse([str(file)], bindings)
    found = configure.configured(configure.train)
    configure.check_used()
    return found


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("Stage.model = small_52b()", "`Stage.model = small_52b()`: write @small_52b(): @ before the name"),
        ("Stage.model = small_52b", "write @small_52b()"),
        (
            "Stage.model = @small_52b",
            "Stage.model = small_52b: use a ModelConfig. Write it with parentheses: @small_52b()",
        ),
        ("Stage.model = @a/ModelConfig", "Write it with parentheses: @a/ModelConfig()."),
        ("Stage.model = 'small_52b'", "Write it without quotes: @small_52b()."),
        ("Stage.model = @small_52()", "there is no configurable @small_52; did you mean 'small_52b'?"),
        ("Stage.model = @small_52b(vocab=3)", "bind arguments by themselves"),
        (
            "Stage.model = @ModelConfig()",
            "ModelConfig lacks embed, heads, layers, mlp, vocab: bind ModelConfig.embed (an",
        ),
        ("Recipe.stages = [@Stage]", "Recipe.stages[0] = Stage: use a Stage. Write it with parentheses: @Stage()."),
        ("Recipe.stages = @Stage()", "use a list, each entry a Stage; write brackets around a single one."),
        (
            "Recipe.stages = [@Stage()",
            "does not parse: --gin_bindings, `Recipe.stages = [@Stage()`: a bracket or a quote",
        ),
        ("train.recipe = @Recipe", "Write it with parentheses: @Recipe()."),
        ("DataConfig.corpus = @TextFolder", "Write it with parentheses: @TextFolder()."),
        ("DataConfig.corpus = 'texts'", "or a TextFolder or a Tfds. Write one without quotes, such as @"),
        ("DataConfig.corpus = @TextFoldr()", "did you mean 'TextFolder'?"),
        ("DataConfig.vocabulary = @Pretrained()", "Pretrained lacks path: bind Pretrained.path (a text)."),
        ("DataConfig.streamed = true", "write True."),
        ("TextFolder.path = my-texts/x", "write a text in quotes: 'my-texts/x'."),
        ("TextFolder.path = /texts", "write one value: a text in quotes"),
        ("Stage.name = my run", "write a text in quotes: 'my run'."),
        ("Stage.steps = 30.5", "Stage.steps = 30.5: use an integer, at least 1. It is bound in --gin_bindings."),
        ("Stage.steps = steps", "write %steps: % before the name of a macro."),
        ("Stage.steps = %stepz", "nothing defines the macro %stepz; did you mean 'steps'?"),
        ("Stage.steps 30", "write a binding as Name.parameter = value."),
        ("Stage.stps = 3", "Stage doesn't have a parameter named 'stps'; did you mean 'steps'?"),
        ("Stge.steps = 3", "there is no configurable Stge; did you mean 'Stage'?"),
        ("Recipe = 3", "Recipe = ... sets nothing; write Recipe.parameter = value."),
        ("learningrate = 3", "Nothing uses these gin bindings: learningrate; .* did you mean 'learning_rate'?"),
        (
            "SpikeGuard.sigmas = 5",
            "SpikeGuard.sigmas: there is no SpikeGuard here. Bind Recipe.spike_guard = @SpikeGuard() too.",
        ),
        ("Watchdog.end = True", "Bind train.run = @Run() and Run.watchdog = @Watchdog() too."),
        ("Growth.methods = {'embed'}", "write entries in braces as 'name': value."),
        ("include 'nowhere.gin'", "There is no gin file 'nowhere.gin' in the current directory nor in"),
        ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
    ],
)
def test_a_mistyped_binding_is_refused_with_what_to_write(tiny, binding, message):
    with pytest.raises(ValueError) as refused:
        configured(tiny, binding)
    start, _, end = message.partition(" .* ")
    assert start in str(refused.value) and end in str(refused.value)


def test_an_error_of_a_file_names_its_line(tiny):
    tiny.write_text(TINY.replace("= 60", "= 60.5"))
    with pytest.raises(ValueError, match=r"Stage.steps = 60.5: .* It is bound in .*tiny\.gin, line 10\."):
        configured(tiny)
    gin.clear_config()
    tiny.write_text(TINY + "Stage.accumulate = two\n")
    with pytest.raises(
        ValueError, match=r"tiny\.gin, line 12, `Stage.accumulate = two`: write a text in quotes: 'two'"
    ):
        configured(tiny)


def test_a_scope_that_is_not_the_one_bound_is_named(tiny):
    tiny.write_text(TINY.replace("Stage.", "first/Stage."))
    with pytest.raises(ValueError, match=r"Nothing uses .*: frist/Stage.steps; .* did you mean 'first'\?"):
        configured(tiny, "Recipe.stages = [@first/Stage()]", "frist/Stage.steps = 3")
    gin.clear_config()
    with pytest.raises(ValueError, match=r"frist/Stage lacks .*name.* in the scope 'frist'; did you mean 'first'\?"):
        configured(tiny, "Recipe.stages = [@frist/Stage()]")


@pytest.mark.parametrize("by", ["binding", "file"])
def test_a_shipped_recipe_is_cut_to_one_stage(by, tmp_path, caplog):
    cut = "Recipe.stages = [@first/Stage()]"
    (tmp_path / "cut.gin").write_text(cut)
    gin.clear_config()
    files = ["gin_configs/recipes/demo.gin", *([str(tmp_path / "cut.gin")] if by == "file" else [])]
    with caplog.at_level(logging.WARNING):
        configure.parse(files, [cut] if by == "binding" else [])
        recipe, _ = configure.configured(configure.train)
        configure.check_used()
    gin.clear_config()
    assert [stage.name for stage in recipe.stages] == ["52b_small"]
    assert caplog.text == ""  # third/OptimizerConfig too, which no reference names


def test_a_scope_of_a_file_that_nothing_refers_to_is_named_in_a_warning(tiny, caplog):
    tiny.write_text(TINY + "frist/Stage.steps = 3\n")
    with caplog.at_level(logging.WARNING):
        configured(tiny)
    assert "nothing uses, by what they belong to: frist/Stage." in caplog.text


def test_a_scope_that_a_later_file_goes_on_using_is_still_checked(tiny, tmp_path, caplog):
    stages = TINY.replace("Stage.", "first/Stage.").replace("[@Stage()]", "[@first/Stage(), @second/Stage()]")
    tiny.write_text(stages + "first/DataConfig.context = 32\nsecond/Stage.name = 'left out'\n")
    (tmp_path / "cut.gin").write_text("Recipe.stages = [@first/Stage()]")
    with caplog.at_level(logging.WARNING):
        configure.parse([str(tiny), str(tmp_path / "cut.gin")], [])
        configure.configured(configure.train)
        configure.check_used()
    assert "nothing uses, by what they belong to: first/DataConfig.\n" in caplog.text


@pytest.mark.parametrize("file", sorted((ROOT / "gin_configs").glob("[gr]*/*.gin")), ids=lambda file: file.name)
def test_a_shipped_file_is_read_from_any_directory_without_a_word(file, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    gin.clear_config()
    for name in (str(file), str(file.relative_to(ROOT))):
        configure.parse([name], ["TextFolder.path = 'x'"] if file.name == "minimal.gin" else [])
        configure.configured(configure.train if file.parent.name == "recipes" else configure.grow)
        configure.check_used()
        gin.clear_config()
    assert caplog.text == ""


def test_what_a_later_file_binds_where_nothing_looks_is_named(tiny, tmp_path, caplog):
    stages = TINY.replace("Stage.", "first/Stage.").replace("[@Stage()]", "[@first/Stage(), @second/Stage()]")
    tiny.write_text(stages + "second/Stage.name = 'left out'\n")
    (tmp_path / "cut.gin").write_text("Recipe.stages = [@first/Stage()]\nsecond/Stage.steps = 3\n")
    with caplog.at_level(logging.WARNING):
        configure.parse([str(tiny), str(tmp_path / "cut.gin")], [])
        configure.configured(configure.train)
        configure.check_used()
    assert "nothing uses, by what they belong to: second/Stage.\n" in caplog.text


@pytest.mark.parametrize("name", ["five", "short", "t1"])
def test_a_study_that_changes_another_is_read_without_a_word(name, caplog):
    gin.clear_config()
    with caplog.at_level(logging.WARNING):
        configure.parse(["gin_configs/savings/t0.gin", f"gin_configs/savings/{name}.gin"], [])
        configure.configured(configure.savings)
        configure.check_used()
    gin.clear_config()
    assert caplog.text == ""


def test_an_included_file_lies_beside_the_one_that_includes_it(tiny, tmp_path, monkeypatch):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "long.gin").write_text("include 'tiny.gin'\nsteps = 80\n")
    monkeypatch.chdir("/")
    assert configured(tmp_path / "more" / "long.gin")[0].stages[0].steps == 80
    gin.clear_config()
    tiny.write_text(f"include {str(tmp_path / 'more' / 'long.gin')!r}\n")
    with pytest.raises(ValueError, match="which includes it"):
        configured(tiny)


def test_a_scoped_binding_whose_object_is_not_there_is_told_how_to_make_it_in_that_scope(tiny):
    tiny.write_text(TINY.replace("[@Stage()]", "[@a/Stage()]"))
    with pytest.raises(ValueError, match=r"Bind a/Stage\.optimizer = @OptimizerConfig\(\) too\."):
        configured(tiny, "a/OptimizerConfig.learning_rate = 0.1")
    gin.clear_config()
    configured(tiny, "a/OptimizerConfig.learning_rate = 0.1", "a/Stage.optimizer = @OptimizerConfig()")
