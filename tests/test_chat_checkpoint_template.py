"""The template of a checkpoint: the flag's, else that of its record, else that of its vocabulary."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from flm_jax.chat.checkpoint_template import chat_template_of
from flm_jax.chat.template import CHATML, TELE_FLM, TemplateError
from flm_jax.data.special import Special


def source(data=None, own=""):
    return SimpleNamespace(
        directory=Path("run/0"),
        meta=SimpleNamespace(data=data),
        vocabulary=SimpleNamespace(special=Special(chat_template=own)),
    )


def test_the_flag_then_the_record_then_the_vocabulary():
    tuned = source({"corpus": {"template": TELE_FLM.record()}}, own="own")
    assert chat_template_of(tuned, "chatml") == CHATML
    assert chat_template_of(tuned) == TELE_FLM
    assert chat_template_of(source({"corpus": {"files": []}}, own="own")).source == "own"
    assert chat_template_of(source(None, own="own"), "tokenizer").source == "own"


def test_without_any_template_the_error_says_what_to_give():
    with pytest.raises(TemplateError, match=r"run/0 does not say .*give --template, one of tele_flm, telechat, chatml"):
        chat_template_of(source())


@pytest.mark.parametrize(
    "record",
    ["chatml", {"name": "x"}, {**CHATML.record(), "markers": "x"}, {**CHATML.record(), "source": 3}, {"other": 1}],
)
def test_a_record_that_is_no_template_is_refused(record):
    with pytest.raises(TemplateError, match="run/0/meta.json: the template of its corpus is"):
        chat_template_of(source({"corpus": {"template": record}}, own="own"))
