"""Rules: written-out answers, right and wrong, of every kind."""

from fractions import Fraction

import pytest

from flm_jax.chat.conversation import Message
from flm_jax.evaluation.numbers import last_box, last_number, same_number
from flm_jax.evaluation.questions import Question
from flm_jax.evaluation.rules import choice_of_text, normalised, right

NUMBERS = {
    "The answer is 1,234.5.": "1234.5",
    "1,234,567 people": "1234567",
    "10 000 km": "10000",
    "1 234 567.5": "1234567.5",
    "1'234'567": "1234567",
    "12\u00a0345 and no more": "12345",
    "12\u202f345": "12345",
    "0.5 100": "100",  # the decimals of one number are no group of another
    "in 2020 100 people": "100",
    "first 7, then 3.": "3",
    "a, 3,5": "5",  # no groups of three
    "1,2345": "2345",
    "-5": "-5",
    "\u22125 degrees": "-5",
    "it is (-5)": "-5",
    "x=-5": "-5",
    "x - 5": "5",
    "between 3-5": "5",
    "- 5 apples": "5",
    "-$5": "-5",
    "$1,234.56": "1234.56",
    ".5": "0.5",
    "No.5": "5",
    "1/2": "1/2",
    "3 1/2": "7/2",
    "½": "1/2",
    "1½ cups": "3/2",
    r"-\frac{1}{2}": "-1/2",
    r"3\frac{1}{2}": "7/2",
    r"\dfrac34": "3/4",
    r"$\boxed{42}$, as step 3 shows": "42",
    r"\boxed{\frac{3}{4}}": "3/4",
    r"\boxed{1} and \boxed{\text{about } 2}": "2",
    r"\boxed{1{,}234}": "1234",
    r"\left(-3\right)": "-3",
    "35%": "35",
    r"35\%": "35",
    "百分之35": "35",
    "１，２３４": "1234",
    "－３．５": "-3.5",
    "共12个": "12",
    "3万": "30000",
    "1.5亿元": "150000000",
    "2.5 million": "2500000",
    "1.5e3": "1500",
    "1.5×10^3": "1500",
    r"1.5 \times 10^{-3} m": "0.0015",
    "10²": "100",
    "2^10": "1024",
    "5 m²": "5",
    "7 cm^2": "7",
    r"\log_{2} 8": "8",
    "8 mol of H2O": "8",
    "5kg": "5",
    "5eV": "5",
    "#### 72": "72",
    "3.4.5": "3.4",
}


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_the_last_number_of_a_text(text, value):
    assert last_number(text).value == Fraction(value)


@pytest.mark.parametrize("text", ["", "three", "H2O", r"\boxed{x}, not 5", "5/0", "9" * 5000, "1e99999", "2^99999999"])
def test_a_text_without_a_number_that_can_be_read(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    "text", ["1" + "," * 200_000, "(1 " * 100_000, r"\boxed{" * 50_000, "1 " * 100_000, "9" * 10**6]
)
def test_a_model_that_repeats_itself_is_read_at_once(text):
    import time

    before = time.process_time()
    last_number(text)
    assert time.process_time() - before < 5  # a second at most; it would be minutes if time grew with the square


def test_a_box_that_is_not_closed_is_none():
    assert last_box(r"\boxed{1} \boxed{2") == "1"
    assert last_box(r"\boxed{a \boxed{b} c}") == "b"


SAME = [
    ("1/3", "0.33333333", None, True),
    ("1/3", "0.333", None, False),
    ("1/3", "0.333", 0.01, True),
    ("3.14", "3.14159", 0.01, True),
    ("100000000", "100000001", None, False),
    ("5.0", "5", None, True),
    ("35%", "35", None, True),
    ("35%", "0.35", None, True),
    ("0.35", "35%", None, True),
    ("35%", "3.5%", None, False),
    ("35%", "3500", None, False),
    ("5", "-5", None, False),
    ("0.3", "0.1", 0.2, True),  # exactly, though not in binary
]


@pytest.mark.parametrize(("answer", "reference", "tolerance", "same"), SAME)
def test_which_numbers_are_the_same(answer, reference, tolerance, same):
    assert same_number(last_number(answer), last_number(reference), tolerance) is same


def question(kind, *reference, **fields):
    return Question("1", "c", (Message("user", "?"),), kind, reference, **fields)


@pytest.mark.parametrize("answer", ["Paris", " paris.", "“Paris”", "**PARIS**", "Ｐａｒｉｓ。", "Paris\n"])
def test_the_same_text(answer):
    assert right(question("exact", "Lyon", "Paris"), answer)
    assert not right(question("exact", "Pari"), answer)


def test_normalising_keeps_what_stands_within():
    assert normalised("It's  1.5, isn't it?") == "it's 1.5, isn't it"
    assert normalised("...") == "" and normalised("北京。") == "北京"


def test_a_number_and_its_tolerance():
    assert right(question("numeric", "about 3.1416"), "so it is 3.1416")
    assert right(question("numeric", "3.14", tolerance=0.01), "3.1416")
    assert not right(question("numeric", "3.14"), "3.1416") and not right(question("numeric", "3"), "no idea")


CITIES = ("Paris", "York", "New York", "北京")
NAMED = {
    "York": 1,
    "b": 1,
    "(C).": 2,
    "C. New York": 2,
    "D、北京": 3,
    "**B**": 1,
    "The answer is (B).": 1,
    "I first thought that the answer is A, but the answer is: **C**": 2,
    "答案是B": 1,
    "答案：Ｄ": 3,
    "故选C。": 2,
    r"so \boxed{B}": 1,
    r"so \boxed{New York}": 2,
    "It must be New York, I think": 2,
    "当然是北京了": 3,
    "Parisian": None,
    "Paris or New York": None,
    "A big city": None,
    "The answer is E": None,
    "The answer is a large city": None,
    "no idea": None,
    "": None,
}


@pytest.mark.parametrize(("answer", "index"), NAMED.items())
def test_the_choice_that_an_answer_names(answer, index):
    assert choice_of_text(answer, CITIES) == index


def test_a_right_choice():
    asked = question("choice", "New York", choices=CITIES)
    assert right(asked, "C") and not right(asked, "B") and not right(asked, "no idea")


def test_what_needs_a_judge_has_no_rule():
    with pytest.raises(ValueError, match="needs a judge"):
        right(question("judged"), "x")
