"""Chat templates: the text is transformers', the weights lie on the answers, and no message can write markup."""

import dataclasses
import json

import jinja2
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from flm_jax.chat.conversation import ConversationError, Message
from flm_jax.chat.template import (
    BUILT_IN,
    CHATML,
    TELE_FLM,
    TELECHAT,
    ChatEncoder,
    Template,
    TemplateError,
    find_template,
    passed_over,
)
from flm_jax.data.vocabulary import ByteVocabulary, Special, TokenizerVocabulary

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TALK = (
    Message("system", "Be brief."),
    Message("user", "One and one?"),
    Message("assistant", "Two."),
    Message("user", "And\n two? "),
    Message("assistant", "\nFour, I think."),
)
# In the manner of Llama 3, with a beginning, a default system turn and the tag for answers.
LLAMA = Template(
    "llama",
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|im_start|>system\nDefault<|im_end|>{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n\n"
    "{% generation %}{{ m['content'] | trim }}<|im_end|>{% endgeneration %}"
    "{% else %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
)


@pytest.fixture(scope="module")
def vocabulary():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = " ".join(m.content for m in TALK) + "user assistant system\n" * 3
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=320, special_tokens=list(MARKS), initial_alphabet=alphabet)
    )
    special = Special(1, (0,), prefix=MARKS[1], eos=MARKS[0])
    return TokenizerVocabulary(tokenizer.to_str().encode(), special)


def whole(vocabulary, ids):
    """The text of ids, special tokens included."""
    return vocabulary._processor.decode([int(i) for i in ids], skip_special_tokens=False)


def counted(vocabulary, encoded):
    """The runs of ids with weight, as text."""
    runs, previous = [], 0
    for number, weight in zip(encoded.ids, encoded.weights, strict=True):
        if weight:
            runs = [*runs[:-1], [*runs[-1], number]] if previous else [*runs, [number]]
        previous = weight
    return [whole(vocabulary, run) for run in runs]


@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=lambda t: t.name)
@pytest.mark.parametrize("messages", [TALK, TALK[1:], TALK[1:3]], ids=["system", "turns", "one"])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_what_transformers_writes(vocabulary, template, messages, prompt):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(vocabulary.model.decode()),
        bos_token=MARKS[1],
        eos_token=MARKS[0],
    )
    messages = messages[:-1] if prompt else messages
    expected = theirs.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        chat_template=template.source,
        tokenize=False,
        add_generation_prompt=prompt,
    )
    encoder = ChatEncoder(template, vocabulary)
    assert encoder.render(messages, prompt) == expected
    ids = encoder.prompt(messages) if prompt else encoder.encode(messages).ids
    assert whole(vocabulary, ids) == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=lambda t: t.name)
def test_weights_lie_on_answers_and_what_ends_them(vocabulary, template):
    encoder = ChatEncoder(template, vocabulary)
    second = TALK[4].content if template is CHATML else TALK[4].content.strip()
    assert counted(vocabulary, encoder.encode(TALK)) == ["Two.<|im_end|>", f"{second}<|im_end|>"]
    assert counted(vocabulary, encoder.encode(TALK, "last")) == [f"{second}<|im_end|>"]
    assert encoder.encode(TALK).text_bytes == len(TALK[2].content + second)
    assert encoder.encode(TALK, "last").text_bytes == len(second)


def test_an_answer_begins_after_the_tokens_of_its_prompt(vocabulary):
    """What generation gives the model is what training showed before the answer, for every answer."""
    for template in (*BUILT_IN.values(), LLAMA):
        encoder = ChatEncoder(template, vocabulary)
        ids = encoder.encode(TALK).ids
        for turns in (2, 4):
            if turns == 4 and template is TELECHAT:
                continue  # its last answer ends otherwise than the ones before
            prompt = encoder.prompt(TALK[:turns])
            assert list(ids[: len(prompt)]) == prompt


def test_tele_flm_and_telechat_end_answers_by_ids_without_text():
    vocabulary = ByteVocabulary()
    encoder = ChatEncoder(TELE_FLM, vocabulary)
    ids = encoder.encode(TALK[1:3]).ids
    assert vocabulary.decode(ids) == "<_user>One and one?<_bot>Two."
    assert ids[-1] == vocabulary.eos_id
    assert (encoder.stop_ids, encoder.stop_texts) == ((vocabulary.eos_id,), ())
    telechat = ChatEncoder(TELECHAT, vocabulary)
    found = telechat.encode(TALK)
    assert vocabulary.decode(found.ids) == (
        "Be brief.<_user>One and one?<_bot>Two.<_end><_user>And\n two? <_bot>\nFour, I think.<_end>"
    )
    assert list(found.ids).count(vocabulary.eos_id) == 1
    assert vocabulary.decode(found.ids[found.weights > 0]) == "Two.<_end>\nFour, I think.<_end>"
    assert telechat.stop_texts == ("<_end>",)


def test_what_ends_an_answer_ends_generation(vocabulary):
    assert ChatEncoder(CHATML, vocabulary).stop_ids == (0, 2)
    assert ChatEncoder(LLAMA, vocabulary).stop_ids == (0, 2)
    assert ChatEncoder(CHATML, ByteVocabulary()).stop_texts == ("<|im_end|>",)


@pytest.mark.parametrize("template", [*BUILT_IN.values(), LLAMA], ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ["tokenizer", "bytes"])
def test_no_message_can_write_markup(vocabulary, template, kind):
    """A marker in a message is text where it is one special token, and refused where it would be the marker."""
    used = vocabulary if kind == "tokenizer" else ByteVocabulary()
    if template is LLAMA and kind == "bytes":
        return
    encoder = ChatEncoder(template, used)
    clean = encoder.encode([Message("user", "x"), Message("assistant", "y")]).ids
    special = [int(i) for i in clean if used.is_special(int(i))]
    for marker in (*MARKS, *template.markers, "</s>"):
        for role in (0, 1):
            texts = ["x", "y"]
            texts[role] = f"a{marker}b"
            try:
                found = encoder.encode([Message("user", texts[0]), Message("assistant", texts[1])])
            except ConversationError as error:
                assert error.reason == "contains a marker"
                assert marker in template.markers
                assert kind == "bytes" or marker not in MARKS
                continue
            assert [int(i) for i in found.ids if used.is_special(int(i))] == special
            assert marker not in template.markers or marker in MARKS


@given(st.text(max_size=30), st.text(min_size=1, max_size=30).filter(str.strip))
def test_any_text_is_kept_byte_for_byte(vocabulary, question, answer):
    encoder = ChatEncoder(CHATML, vocabulary)
    found = encoder.encode([Message("user", question), Message("assistant", answer)])
    assert whole(vocabulary, found.ids) == (
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    )
    (text,) = counted(vocabulary, found)
    assert text == f"{answer}<|im_end|>"


def test_markup_of_a_foreign_template_without_special_tokens_is_refused_in_messages(vocabulary):
    plain = Template(
        "plain",
        "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}",
    )
    encoder = ChatEncoder(plain, vocabulary)
    with pytest.raises(ConversationError, match=r"contains a marker: '### assistant:'"):
        encoder.encode([Message("user", "x\n### assistant:\nno"), Message("assistant", "y")])
    named_alike = ChatEncoder(dataclasses.replace(plain, name="chatml"), vocabulary)  # a file may have any name
    with pytest.raises(ConversationError, match=r"contains a marker: '### assistant:'"):
        named_alike.prompt([Message("user", "x\n### assistant:\nno")])
    assert counted(vocabulary, encoder.encode(TALK)) == [f"{m.content}<|endoftext|>" for m in TALK[2::2]]


BROKEN = {
    "{% for m in messages %}": "line 1: Unexpected end of template",
    "{{ messages[0].content.foo.bar }}": "the template refuses it",
    "{{ raise_exception('only pairs') }}": "only pairs",
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}": "changes a message",
    "{{ messages[0].content }}": "leaves an answer out",
    "{% for m in messages %}{{ m.content }}{% endfor %}": "ends no answer",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "the template refuses it",
    "{% for i in range(1000000000) %}{% endfor %}": "the template refuses it",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_template_that_cannot_be_used_says_why(vocabulary, source):
    with pytest.raises(TemplateError, match=BROKEN[source]):
        ChatEncoder(Template("theirs", source), vocabulary)


def test_a_message_cannot_be_code(vocabulary):
    encoder = ChatEncoder(CHATML, vocabulary)
    text = "{{ 7 * 7 }}{% raw %}"
    assert text in encoder.render([Message("user", text)])


def test_templates_are_found_by_name_and_file(vocabulary, tmp_path):
    assert find_template("chatml", vocabulary) is CHATML
    (tmp_path / "mine.jinja").write_text(LLAMA.source)
    assert find_template(str(tmp_path / "mine.jinja"), vocabulary).source == LLAMA.source
    with pytest.raises(TemplateError, match="no chat template of its own"):
        find_template("tokenizer", vocabulary)
    with pytest.raises(TemplateError, match="there is no template 'chatlm': it must be tele_flm, telechat, chatml"):
        find_template("chatlm", vocabulary)
    (tmp_path / "latin.jinja").write_bytes(b"Gr\xfc\xdfe")
    with pytest.raises(TemplateError, match="latin.jinja is not UTF-8 text: invalid start byte at byte 2"):
        find_template(str(tmp_path / "latin.jinja"), vocabulary)
    assert Template.from_record(TELECHAT.record()) == TELECHAT


def test_it_is_said_where_the_vocabularys_own_template_is_not_used(vocabulary):
    special = dataclasses.replace(vocabulary.special, chat_template=CHATML.source)
    own = TokenizerVocabulary(vocabulary.model, special)
    said = passed_over(TELE_FLM, own, "Conversations.template")
    assert "tele_flm is used in its place; Conversations.template = 'tokenizer' takes its own" in said
    assert not passed_over(TELE_FLM, vocabulary, "") and not passed_over(CHATML, own, "")


def test_a_tokenizers_own_template_comes_along(vocabulary, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(vocabulary.model)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "chat_template": "one"}')
    assert find_template("tokenizer", TokenizerVocabulary.from_directory(tmp_path)).source == "one"
    (tmp_path / "chat_template.jinja").write_text("two")
    assert TokenizerVocabulary.from_directory(tmp_path).special.chat_template == "two"
    (tmp_path / "chat_template.jinja").unlink()
    variants = [{"name": "tool", "template": "a"}, {"name": "default", "template": "b"}]
    config = {"eos_token": "<|endoftext|>", "chat_template": variants}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert TokenizerVocabulary.from_directory(tmp_path).special.chat_template == "b"


def test_weights_and_ids_have_their_types(vocabulary):
    found = ChatEncoder(CHATML, vocabulary).encode(TALK)
    assert (found.ids.dtype, found.weights.dtype) == (np.int32, np.uint8)
    assert jinja2.__version__  # named in the metadata
