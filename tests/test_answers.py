"""Extraction is strict, equality is by rule and exact, votes and steps follow both."""

import time

import pytest

from minicot.answers import STYLES, extract_answer, is_correct, majority_vote, normalize, split_steps


@pytest.mark.parametrize(
    "style, text, answer",
    [
        ("hash", "3 + 4 = 7\n#### 7", "7"),
        ("hash", "#### 5\nno, wait\n####  7 . ", "7"),
        ("hash", "#### $1,000\nmore", "$1,000"),
        ("hash", "so #### $7$", "7"),
        ("hash", "7", None),
        ("hash", "### 7", None),
        ("hash", "##### 7", None),
        ("hash", "####\n7", None),
        ("hash", "#### 7\n####", None),
        ("answer", "### Answer: 12 apples.", "12 apples"),
        ("answer", "### Answer : 12", "12"),
        ("answer", "#### 12", None),
        ("answer", "Answer: 12", None),
        ("dagger", "Step 1: x\n†Answer: \\(x^2\\)", "x^2"),
        ("dagger", "Answer: 12", None),
        ("sentence", "So the answer is 5.", "5"),
        ("sentence", "The answer is: -3/4", "-3/4"),
        ("sentence", "The final answer is $5$.", "5"),
        ("sentence", "The answer isn't known", None),
        ("sentence", "An answer is 5", None),
        ("boxed", r"thus $\boxed{\frac{1}{2}}$, done", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} then \boxed{ 2. }", "2"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{12", None),
        ("boxed", "12", None),
        ("letter", "The answer is (B)", "B"),
        ("letter", "The answer is (b).", "B"),
        ("letter", "Answer: B", "B"),
        ("letter", "A is wrong.\n### Answer: (C) a pen", "C"),
        ("letter", "†Answer: D) blue", "D"),
        ("letter", "#### E", "E"),
        ("letter", "because of that\n(B)", "B"),
        ("letter", "B.", "B"),
        ("letter", "The answer is A dog", None),
        ("letter", "The answer is (A) or (B)", None),
        ("letter", "The answer is not (A)", None),
        ("letter", "Answer: F", None),
        ("letter", "I like (B) best", None),
        ("letter", "Bananas", None),
        ("letter", "", None),
    ],
)
def test_an_answer_is_what_follows_the_last_marker_of_its_style_and_nothing_else(style, text, answer):
    assert extract_answer(text, style) == answer


@pytest.mark.parametrize("style", STYLES)
def test_text_without_a_marker_has_no_answer_in_any_style(style):
    assert extract_answer("Tom has 3 + 4 = 7 apples.", style) is None


def test_an_unknown_style_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="'json'.*hash.*letter"):
        extract_answer("#### 5", "json")


@pytest.mark.parametrize(
    "a, b",
    [
        ("1,000", "1000.0"),
        ("1,234,567.50", "1234567.5"),
        ("$18", "18 dollars"),
        ("-$5", "$-5"),
        ("£5", "5.00"),
        ("18$", "18"),
        ("5 apples", "5"),
        ("60 km/h", "60"),
        ("5 m^2", "5"),
        ("3kg", "3"),
        ("20 square feet", "20"),
        ("50%", "50"),
        (r"50\%", "50 percent"),
        (r"\$18", "18"),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        (r"-\dfrac{3}{4}", "-0.75"),
        ("1 1/2", "1.5"),
        ("-1 1/2", "-3/2"),
        (r"1\frac{1}{2}", "1.5"),
        ("½", "0.5"),
        ("1½", "3/2"),
        ("2/4", "1/2"),
        (".5", "0.5"),
        ("3e2", "300"),
        ("3 x 10^2", "300"),
        (r"3 \times 10^{-2}", "0.03"),
        ("-0", "0"),
        ("+5", "5"),
        ("007", "7"),
        ("−5", "-5"),
        ("５", "5"),
        ("٣٤", "34"),
        (" 7 ", "7."),
        ("$7$", "7"),
        (r"1{,}000", "1000"),
        (r"5\text{ cm}", "5"),
        ("0.1", "1/10"),
        ("0.30000000000000004", "0.30000000000000004"),
        ("(B)", "B"),
        ("b)", "B"),
        ("B.", "(b)"),
        ("Yes", "yes."),
        ("  New   York", "new york"),
        ("1,5", "1,5"),
        ("nan", "NaN"),
        ("3:30 pm", "3:30 PM"),
    ],
)
def test_spellings_of_one_answer_are_equal_both_ways(a, b):
    assert is_correct(a, b) and is_correct(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        ("1,5", "15"),
        ("1,5", "1.5"),
        ("1,2,3", "123"),
        ("3:30", "330"),
        ("3:30", "3"),
        ("12/05/2020", "12/5"),
        ("2020-05-03", "2020"),
        ("nan", "0"),
        ("inf", "1e400"),
        ("1/0", "0"),
        ("5 million", "5"),
        ("5x", "5"),
        ("5 or 6", "5"),
        ("2 and a half", "2"),
        ("5-6", "5"),
        ("1.2.3", "1.2"),
        ("1/2/3", "1/2"),
        ("5²", "52"),
        ("5²", "25"),
        ("--5", "5"),
        ("0.3", "0.30000000000000004"),
        ("1/3", "0.3333"),
        ("50%", "0.5"),
        ("A", "B"),
        ("(B)", "(C)"),
        ("B", "beans"),
        ("", "0"),
        ("-5", "5"),
        ("x = 5", "5"),
    ],
)
def test_answers_that_only_look_alike_differ_both_ways(a, b):
    assert not is_correct(a, b) and not is_correct(b, a)


def test_no_answer_is_never_correct():
    assert not is_correct(None, "None") and not is_correct(None, "")


@pytest.mark.parametrize(
    "answer",
    [
        "1e999999999",
        "-1E-999999999",
        "9" * 100_000,
        "1," * 50_000,
        "1 x 10^99999999999",
        "1/" + "0" * 5_000,
        "a " * 50_000,
        "²",
        "½" * 300,
        "$" * 1000,
        "\\frac{" * 5000,
        "{" * 9999,
        "٣" * 5000,
    ],
)
def test_hostile_numbers_end_as_text_at_once(answer):
    start = time.perf_counter()
    assert normalize(answer)[0] == "text"
    extract_answer(r"\boxed{" + answer, "boxed")
    assert time.perf_counter() - start < 0.5


def test_a_vote_counts_equal_answers_together_and_returns_the_first_spelling():
    assert majority_vote(["7", "1,000", None, "1000", "1000.0", "7"]) == "1,000"


def test_a_tied_vote_goes_to_the_answer_that_came_first():
    assert majority_vote(["3", "2", "2", "3"]) == "3"


def test_missing_answers_never_vote():
    assert majority_vote([None, None, "5"]) == "5"
    assert majority_vote([None, None]) is None and majority_vote([]) is None


@pytest.mark.parametrize(
    "last",
    [
        "#### 7",
        "### Answer: 7",
        "†Answer: 7",
        "The answer is 7.",
        r"\boxed{7}",
        r"$\boxed{7}$",
        "Answer: (B)",
        "(B)",
        "So the answer is 7",
        "**†Answer:** 7",
        "### †Answer: 7",
        "- †Answer: 7",
        "> ### **Answer: 7**",
        "**The answer is 7.**",
        "**Answer**: 7",
        "## #### 7",
    ],
)
def test_the_answer_line_of_any_style_is_no_step(last):
    assert split_steps(f"a = 3\n\n  b = 4  \n{last}\n") == ["a = 3", "b = 4"]


def test_numbered_steps_are_blocks_of_lines():
    text = "First a plan.\nStep 1: add\n3 + 4 = 7\n\nStep 2: double\n7 x 2 = 14\n†Answer: 14"
    assert split_steps(text) == ["First a plan.", "Step 1: add\n3 + 4 = 7", "Step 2: double\n7 x 2 = 14"]


def test_a_number_with_a_fraction_is_no_step_number():
    assert split_steps("Step 1. pour\nStep 2.5 l away\nStep 2: fill") == [
        "Step 1. pour\nStep 2.5 l away",
        "Step 2: fill",
    ]


def test_marks_of_a_list_alone_make_no_answer_line_and_many_of_them_take_no_time():
    for text in (
        "- 3 + 4 = 7",
        "- The answer is their sum.",
        "**Step 1:** 3",
        "### Adding",
        "-" * 5000,
        "> " * 5000,
        "# " * 5000,
    ):
        assert split_steps(text) == [text.strip()]


@pytest.mark.parametrize(
    "text, style, answer",
    [
        ("**†Answer:** 7", "dagger", "7"),
        ("**†Answer**: 7", "dagger", "7"),
        ("#### **7**.", "hash", "7"),
        ("**The answer is 7.**", "sentence", "7"),
        ("**Answer: B**", "letter", "B"),
        ("#### 2**3", "hash", "2**3"),
        ("#### **a** or **b**", "hash", "**a** or **b**"),
    ],
)
def test_bold_answers_are_read(text, style, answer):
    assert extract_answer(text, style) == answer


def test_empty_text_has_no_steps():
    assert split_steps("") == [] and split_steps("#### 5") == []
