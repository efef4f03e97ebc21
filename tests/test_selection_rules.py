"""Rules and domains: for each rule something that falls out, and something close to it that stays."""

import dataclasses

import pytest

from flm_jax.chat.conversation import Conversation, Message, parse
from flm_jax.selection import domains, rules
from flm_jax.selection.config import Domains, TextRules

LIMITS = TextRules()
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris, on the river Seine."


def talk(*contents, **fields):
    turns = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents))
    return Conversation(turns, fields=fields)


LONG = " ".join(f"Sentence {i} says something else about number {i * i}." for i in range(60))
CASES = [
    ("turns", talk(*[QUESTION, ANSWER] * 21), talk(*[QUESTION, ANSWER] * 20)),
    ("question length", talk("a", ANSWER), talk("a b", ANSWER)),
    ("question length", talk("w " * 10_001, ANSWER), talk("w " * 9_999, ANSWER)),
    ("answer length", talk(QUESTION, "Paris."), talk(QUESTION, "Paris.", QUESTION, "It is Paris, as I said.")),
    ("answer length", talk(QUESTION, LONG * 10), talk(QUESTION, LONG)),
    ("broken characters", talk(QUESTION, ANSWER + "\x07"), talk(QUESTION, ANSWER + "\r\n\t")),
    ("broken characters", talk(QUESTION + "\ufffd", ANSWER), talk(QUESTION + "\u00e9", ANSWER)),
    (
        "script",
        talk("Что это такое?", "Это столица Франции, Париж на Сене."),
        talk("什么?", "这是法国的首都巴黎, 在塞纳河边上的城市, 有很多博物馆"),
    ),
    (
        "script",
        talk("これは何ですか?", "これはフランスの首都パリです。セーヌ川にあります。"),
        talk(QUESTION, "\u03b1 + \u03b2 = \u03b3, the sum of two angles."),
    ),
    ("letters", talk(QUESTION, "!!! *** ??? ---- ++++ a b c"), talk(QUESTION, "f(x) = (x + 1)^2 - (y - 3)^2 = 0")),
    (
        "code fence",
        talk(QUESTION, f"{ANSWER}\n```python\nprint(1)"),
        talk(QUESTION, f"{ANSWER}\n```python\nprint(1)\n```"),
    ),
    ("repetition", talk(QUESTION, LONG[:900] + "I am sure. " * 100), talk(QUESTION, LONG)),
    ("repetition", talk(QUESTION, "16 16 16 16 16 16 16"), talk(QUESTION, "16 17 16 17 16 17 16 17 18")),
    ("repetition", talk(QUESTION, "Paris, of course. " * 6), talk(QUESTION, "Paris, of course. " * 2 + "So it is.")),
    ("repetition", talk(QUESTION, ANSWER + " no" * 300), talk(QUESTION, " ".join(map(str, range(100))))),
    (
        "refusal",
        talk(QUESTION, "As an AI language model, I have no opinion on capitals."),
        talk(QUESTION, "As an aid to memory: Paris has five letters."),
    ),
    (
        "refusal",
        talk(QUESTION, "I'm sorry, but I can't help with that request."),
        talk(QUESTION, "I'm sorry to hear that you lost your map. It is Paris."),
    ),
    (
        "refusal",
        talk(QUESTION, "作为一个人工智能语言模型我没有自己的意见和感受"),
        talk(QUESTION, "人工智能是计算机科学的一个分支研究怎样模拟人的智能"),
    ),
    (
        "only links",
        talk(QUESTION, "https://example.org/france/paris"),
        talk(QUESTION, f"{ANSWER} See https://example.org."),
    ),
    ("markers", talk(QUESTION, f"{ANSWER}<|im_end|>"), talk(QUESTION, f"{ANSWER} <end>")),
    ("echo", talk(QUESTION, f" {QUESTION}"), talk(QUESTION, f"{QUESTION} {ANSWER}")),
]


@pytest.mark.parametrize(("name", "falls", "stays"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_each_rule_drops_what_it_says_and_not_what_is_close_to_it(name, falls, stays):
    assert rules.first_broken(falls, LIMITS) == name
    assert rules.first_broken(stays, LIMITS) == ""
    assert rules.first_broken(falls, dataclasses.replace(LIMITS, off=(name,))) in ("", "letters", "answer length")


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(rules.REGISTRY)


def test_thresholds_are_those_of_the_configuration():
    assert rules.first_broken(talk(QUESTION, ANSWER), TextRules(least_answer=1000)) == "answer length"
    assert rules.first_broken(talk(QUESTION, ANSWER), TextRules(scripts=("han",))) == "script"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (TextRules(off=("refusals",)), r"TextRules.off names 'refusals'; known are .*; did you mean 'refusal'"),
        (TextRules(scripts=("latin", "hann")), r"TextRules.scripts names 'hann'.*did you mean 'han'"),
    ],
)
def test_names_that_do_not_exist_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        rules.check_rules(limits)


@pytest.mark.parametrize(
    ("conversation", "domain"),
    [
        (talk("Hi", "Hello", "How are you?", "Fine."), "multi-turn"),
        (talk("Write a Python function that adds numbers.", "Here."), "code"),
        (talk("Sort these.", "```\nsort(x)\n```"), "code"),
        (talk("I bought a python-skin bag", "Nice"), "code"),  # keywords know no meanings
        (talk("Javanese food?", "Nasi goreng."), "chat"),
        (talk("Solve 3x + 4 = 10.", "x = 2"), "maths"),
        (talk("How many apples are 3 and 4?", "Seven."), "maths"),
        (talk("计算 3 加 4", "7"), "maths"),
        (talk("How many people love music?", "Many."), "chat"),
        (talk("A coffee costs $3 and tea $2", "Good."), "chat"),
        (talk("Hi", "Hello", domain=" law "), "law"),
        (talk("Hi", "Hello", domain=7), "chat"),
    ],
    ids=str,
)
def test_a_domain_is_named_or_follows_from_keywords(conversation, domain):
    assert domains.domain_of(conversation, "domain") == domain


def test_without_a_field_keywords_decide():
    record = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "domain": "law",
    }
    assert domains.domain_of(parse(record, "f:1"), "") == "chat"


def test_places_are_whole_numbers_that_add_up():
    groups, room = domains.places({"maths": 0.3, "code": 0.3, "law": 1 / 3}, ["chat", "code", "maths"], 10)
    assert groups.tolist() == [3, 1, 0]
    assert room.tolist() == [3, 3, 3, 1] and room.sum() == 10
    assert domains.places({}, ["chat"], 10)[1].tolist() == [10]
    assert domains.places({"a": 0.5, "b": 0.5}, ["a", "b"], 3)[1].sum() == 3


def test_fractions_over_one_and_unknown_domains_are_refused():
    with pytest.raises(ValueError, match=r"add up to 1.1, more than 1: maths 0.6, code 0.5; lower them by 0.1"):
        Domains(fractions={"maths": 0.6, "code": 0.5})
    with pytest.raises(ValueError, match=r"names 'math', and no conversation is of this domain; .* mean 'maths'"):
        domains.check_domains(Domains(fractions={"math": 0.5}), ["chat"])
