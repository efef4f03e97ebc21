"""A conversation in the terminal: history, commands, what does not fit."""

import json

import pytest

from flm_jax.chat.conversation import ConversationError, Message, read_conversations
from flm_jax.chat.corpus import Conversations
from flm_jax.chat.session import Session, talk
from flm_jax.chat.template import TELE_FLM, ChatEncoder
from flm_jax.data.json_lines import Skipped
from flm_jax.data.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary()


class Model:
    """Answers with the number of its call, and keeps the prompts."""

    def __init__(self):
        self.prompts = []

    def __call__(self, ids):
        self.prompts.append(VOCABULARY.decode(ids))
        yield "answer "
        yield str(len(self.prompts))


@pytest.fixture
def model():
    return Model()


def session(model, context=200, **options):
    return Session(ChatEncoder(TELE_FLM, VOCABULARY), model, context, 20, **options)


def typed(session, *lines):
    shown = []
    talk(session, lines, shown.append, lambda: "[2 tokens]\n")
    return "".join(shown)


def test_history_is_kept_and_shown_to_the_model(model):
    found = session(model, system="Be brief.")
    assert typed(found, "One?\n", "", "Two?\n") == "answer 1\n[2 tokens]\nanswer 2\n[2 tokens]\n"
    assert model.prompts[1] == "Be brief.<_user>One?<_bot>answer 1<_user>Two?<_bot>"
    assert typed(found, "/reset", "Three?").startswith("[a new conversation]\n")
    assert model.prompts[2] == "Be brief.<_user>Three?<_bot>"
    typed(found, "/system Be long.", "Four?", "/system", "Five?")
    assert model.prompts[3:] == ["Be long.<_user>Four?<_bot>", "<_user>Five?<_bot>"]


def test_lines_go_on_and_a_slash_can_begin_a_message(model):
    typed(session(model), "one\\\n", "two\\\n", "three\n", "//reset\n", "end\\")
    assert model.prompts[0] == "<_user>one\ntwo\nthree<_bot>"
    assert "<_user>/reset<_bot>" in model.prompts[1]
    assert model.prompts[2].endswith("<_user>end\n<_bot>")


def test_an_answer_is_given_again(model):
    found = session(model)
    assert typed(found, "/retry") == "[there is no question yet]\n"
    typed(found, "One?", "/retry")
    assert model.prompts == ["<_user>One?<_bot>"] * 2
    assert [m.content for m in found.messages] == ["One?", "answer 2"]


def test_a_question_without_an_answer_is_asked_again_and_nothing_before_it_is_lost():
    answers = iter(["one", "", "", "two"])
    found = session(lambda ids: iter([next(answers)]))
    typed(found, "One?", "Two?", "/retry")
    assert [m.content for m in found.messages] == ["One?", "one"]
    typed(found, "/retry")
    assert [m.content for m in found.messages] == ["One?", "one", "Two?", "two"]
    assert typed(found, "/reset", "/retry").endswith("[there is no question yet]\n")


def test_the_oldest_turns_leave_where_the_context_is_full(model):
    found = session(model, context=80, system="S")
    shown = typed(found, *("question"[:6] * 2,) * 3)
    assert "[the first 2 turns do not fit into the context any more]" in shown
    assert model.prompts[-1].count("<_user>") == 1 + (len(model.prompts[-1]) > 50)
    assert model.prompts[-1].startswith("S<_user>")
    assert len(found.messages) == 7
    assert "longer than the context: " in typed(found, "x" * 80)
    assert len(found.messages) == 7
    with pytest.raises(ValueError, match="answers of 20 tokens leave no room in a context of 20"):
        session(model, context=20)


@pytest.mark.parametrize("context", range(60, 120, 7))
def test_what_is_shown_to_the_model_begins_with_a_question(context):
    found = Model()
    held = session(found, context=context, system="S")
    typed(held, "first", "a longer question", "third")
    assert all(prompt.startswith("S<_user>") for prompt in found.prompts)
    assert all(prompt.count("<_user>") == prompt.count("<_bot>") for prompt in found.prompts)


def test_a_stopped_answer_keeps_what_was_said():
    def stopped(ids):
        yield "half"
        raise KeyboardInterrupt

    found = session(stopped)
    assert typed(found, "One?") == "half [stopped]\n[2 tokens]\n"
    assert found.messages[-1] == Message("assistant", "half")


def test_markers_are_refused_and_nothing_is_kept(model):
    found = session(model)
    assert "contains a marker: '<_bot>'" in typed(found, "a<_bot>b")
    assert (found.messages, model.prompts) == ([], [])
    with pytest.raises(ConversationError):
        list(found.ask("<_user>"))


def test_a_conversation_is_saved_as_a_line_that_can_be_tuned_on(model, tmp_path):
    found = session(model)
    assert typed(found, "/save x") == "[there is no answer yet]\n"
    path = tmp_path / "talks.jsonl"
    assert typed(found, "One?", f"/save {path}", f"/save {path}").count(f"[saved to {path}]") == 2
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0])["messages"][1] == {"role": "assistant", "content": "answer 1"}
    assert "cannot be written: No such file" in typed(found, f"/save {tmp_path}/none/x")
    assert typed(found, "/save") == "[/save needs the name of a file]\n"


def test_what_is_saved_can_be_tuned_on(tmp_path):
    """An answer of spaces only is not kept, and one with a marker of the template is not saved."""
    answers = iter(["one", " \n ", "", "two", "<_user>"])
    found = session(lambda ids: iter([next(answers)]))
    path = tmp_path / "talks.jsonl"
    shown = typed(found, "One?", "Two?", f"/save {path}", "Three?", "/retry", f"/save {path}", "Four?", f"/save {path}")
    assert shown.count("[an answer without text is not kept; /retry asks again]") == 2
    assert "[not saved, as nothing could be tuned on it: the conversation: contains a marker: '<_user>'" in shown
    read = [[m.content for m in talk.messages] for talk in read_conversations(path, Skipped(limit=0))]
    assert read == [["One?", "one"], ["One?", "one", "Three?", "two"]]
    corpus = Conversations(str(path)).tokenised(VOCABULARY, 96)
    assert len(list(corpus.documents())) == 2


def test_commands_end_and_explain(model):
    assert typed(session(model), "/quit", "One?") == ""
    shown = typed(session(model), "/hlep")
    assert shown.startswith("[there is no command /hlep]\n/reset ")
    assert "/save FILE" in typed(session(model), "/help")
