"""Records and their JSON lines: what is read, what is refused, and that nothing is lost silently."""

import json
from dataclasses import replace

import pytest

from minicot.data import pairs, prompt_text, render
from minicot.errors import InputError
from minicot.records import Problem, Response, Samples, fields_of, problem_from_row, read_samples
from minicot.records import samples_to_row, shot_text
from minicot.sets import read_problems
from minicot.tokenizer import Tokenizer
from tests.helpers import jsonl


def test_missing_id_becomes_the_line_number_and_numbers_become_text(tmp_path):
    path = jsonl(
        tmp_path / "p.jsonl",
        {"question": "1 + 1?", "answer": 2},
        {"id": 7, "question": "2 + 2?", "answer": 4.5},
    )
    assert read_problems(str(path)) == [Problem("1", "1 + 1?", "2"), Problem("7", "2 + 2?", "4.5")]


@pytest.mark.parametrize(
    "row, message",
    [
        ("{not json", ":2: not JSON"),
        ([1, 2], ":2: found a JSON list"),
        ({"answer": "3"}, ":2: no field 'question'"),
        ({"question": 3}, ":2: field 'question' is 3, expected text"),
        ({"question": "q", "answer": True}, ":2: field 'answer' is True"),
        ({"question": "q", "choices": "A"}, ":2: field 'choices' is 'A', expected a list"),
        ({"question": "q", "steps": [1]}, ":2: field 'steps'"),
        ({"id": "1", "question": "q"}, ":2: id '1' was already given on line 1"),
    ],
)
def test_a_malformed_line_is_named_by_number(tmp_path, row, message):
    path = jsonl(tmp_path / "p.jsonl", {"id": "1", "question": "q"}, row)
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("[", r"\[")) as error:
        read_problems(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"question": "a\\ud800"}', "lone surrogate"),
        ('{"question": "q", "answer": ' + "9" * 400 + "}", "expected a finite number"),
        ('{"question": "q", "answer": ' + "9" * 5000 + "}", "not JSON"),
        ('{"question": "q", "choices": ["x", "y"], "answer": "C"}', "a letter of its choices"),
        (json.dumps({"question": "q", "choices": ["x"] * 11}), "11 choices"),
    ],
)
def test_values_that_break_later_are_refused_when_read(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"p.jsonl:1: .*{message}"):
        read_problems(str(jsonl(tmp_path / "p.jsonl", row)))


@pytest.mark.parametrize(
    "response, message",
    [
        ({"text": "x", "reward": float("nan")}, "'reward' is nan"),
        ({"correct": True}, "no field 'text'"),
        ({"text": "x", "finish": "end"}, "finish is 'end'"),
        ({"text": "x", "correct": 1}, "'correct' is 1"),
    ],
)
def test_a_bad_response_is_refused_with_its_line(tmp_path, response, message):
    path = jsonl(tmp_path / "s.jsonl", {"question": "q", "responses": [response]})
    with pytest.raises(ValueError, match=f"s.jsonl:1: .*{message}"):
        read_samples(path)


def test_samples_survive_a_round_trip_and_trl_rows_become_pairs(tmp_path):
    samples = Samples(
        Problem("a", "q", "3"), [Response("#### 3", True, ids=[1, 2]), Response("x", None, 0.0, "length")]
    )
    path = jsonl(
        tmp_path / "s.jsonl",
        samples_to_row(samples),
        {"prompt": "p", "chosen": "good", "rejected": "bad", "source": "somewhere"},
    )
    read = read_samples(path)
    assert read[0] == samples
    assert [(r.text, r.reward, r.correct) for r in read[1].responses] == [
        ("good", 1.0, None),
        ("bad", 0.0, None),
    ]
    assert pairs(read[1:], seed=0) == read[1:] and read[1].problem.meta == {"source": "somewhere"}
    again = read_samples(jsonl(tmp_path / "again.jsonl", *map(samples_to_row, read)))
    assert again == read and again[1].problem.plain


# ---- fields that no record knows -----------------------------------------------------------------


def test_unknown_fields_come_back_where_they_stood(tmp_path):
    """Among them names that Samples, TRL and our own dataclasses use for something else."""
    row = {
        "id": "a",
        "question": "How many?",
        "answer": "3",
        "meta": {"level": 2},
        "source": None,
        "prompt": "p",
        "chosen": 1,
        "rejected": [],
        "text": "of the problem",
        "responses": [
            {"text": "#### 3", "correct": True, "finish": "stop", "meta": 1, "question": "of the response"},
            {"text": "#### 4", "correct": False, "finish": "length", "logprob": -3.5, "note": None},
        ],
    }
    [samples] = read_samples(jsonl(tmp_path / "s.jsonl", row))
    assert samples.problem.meta["meta"] == {"level": 2} and samples.problem.meta["source"] is None
    assert samples.responses[1].meta == {"logprob": -3.5, "note": None}
    assert samples_to_row(samples) == row


def test_the_responses_of_a_line_are_no_part_of_its_problem(tmp_path):
    """A file of samples may be sampled again: new responses take the place of the old."""
    row = {"id": "a", "question": "q", "level": 2, "error": "no picture", "responses": [{"text": "old"}]}
    [problem] = read_problems(str(jsonl(tmp_path / "s.jsonl", row)))
    assert problem == Problem("a", "q", meta={"level": 2})
    assert samples_to_row(Samples(problem, [Response("new")])) == {
        "id": "a",
        "question": "q",
        "level": 2,
        "responses": [{"text": "new", "correct": None, "finish": "stop"}],
    }


@pytest.mark.parametrize("name", ["answer", "plain", "responses", "error"])
def test_meta_never_hides_a_field_of_a_record(name):
    with pytest.raises(AssertionError, match="meta holds"):
        samples_to_row(Samples(Problem("a", "q", meta={name: "x"})))


def test_what_is_plain_and_what_came_before_are_fields_of_a_line(tmp_path):
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = {"id": "a", "question": "q", "history": history, "plain": True}
    [problem] = read_problems(str(jsonl(tmp_path / "p.jsonl", row)))
    assert problem == Problem("a", "q", history=history, plain=True)
    assert samples_to_row(Samples(problem)) == row | {"responses": []}
    assert "plain" not in samples_to_row(Samples(Problem("a", "q")))


# ---- TRL's preference rows -----------------------------------------------------------------------

SYSTEM, USER, ASKED = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "user", "content": "How many?"},
)
HELLO, GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Hello.", "It is 3.", "It is 4."))
TALK = [SYSTEM, USER, HELLO, ASKED]


@pytest.mark.parametrize("mode", ["cot", "direct", "plain"])
def test_a_trl_question_is_asked_as_it_is_in_every_mode(tmp_path, mode):
    [samples] = read_samples(jsonl(tmp_path / "s.jsonl", {"prompt": "p?", "chosen": "a", "rejected": "b"}))
    assert render(samples.problem, mode) == "p?"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TALK, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": TALK, "chosen": "It is 3.", "rejected": "It is 4."},
        {"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
        {"prompt": "Hi", "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},  # beside it, repeated
        {"prompt": [turn | {"tool_calls": None} for turn in TALK], "chosen": [GOOD], "rejected": [BAD]},
    ],
)
def test_a_conversation_reaches_the_chat_template_turn_by_turn(tmp_path, tokenizer_folder, row):
    [samples] = read_samples(jsonl(tmp_path / "s.jsonl", row | {"messages": TALK, "score_chosen": 8.5}))
    problem = samples.problem
    assert problem.history == TALK[:3] and problem.question == "How many?" and problem.plain
    assert problem.meta == {"messages": TALK, "score_chosen": 8.5}
    assert [(r.text, r.reward) for r in samples.responses] == [("It is 3.", 1.0), ("It is 4.", 0.0)]
    tokenizer = Tokenizer(tokenizer_folder)
    assert prompt_text(tokenizer, problem, "cot") == tokenizer.chat_prompt(TALK)
    assert "Be brief." in tokenizer.chat_prompt(TALK) and "Hello." in tokenizer.chat_prompt(TALK)
    assert read_samples(jsonl(tmp_path / "again.jsonl", samples_to_row(samples))) == [
        Samples(Problem(**{**vars(problem), "id": "1"}), samples.responses)
    ]


def test_shots_stand_before_the_question(tmp_path):
    shot = shot_text("How many?\n(pens)", "2 + 2 = 4.\n#### 4")
    assert shot == "Q: How many? (pens)\nA: 2 + 2 = 4. #### 4\n\n"
    row = {"id": "a", "question": "And now?", "answer": "5", "shots": [shot, "4 pens\n\n"]}
    problem = problem_from_row(row, "f.jsonl:1", 1)
    assert problem.shots == row["shots"] and fields_of(problem) == row
    for mode in ("cot", "direct", "plain"):
        assert render(problem, mode) == shot + "4 pens\n\nQ: And now?\nA:"
    assert render(replace(problem, shots=[], choices=["5", "6"]), "cot") == "Q: And now?\n(A) 5\n(B) 6\nA:"
    with pytest.raises(InputError, match="shots.*expected a list, each item text"):
        problem_from_row({"question": "q", "shots": [{"question": "q"}]}, "f.jsonl:1", 1)


def test_one_turn_has_no_history(tmp_path):
    rows = [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "How many?", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    ]
    problems = [samples.problem for samples in read_samples(jsonl(tmp_path / "s.jsonl", *rows))]
    assert problems == [Problem(str(i), "How many?", plain=True) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": [SYSTEM], "chosen": [GOOD], "rejected": [BAD]},
            "chosen are system, assistant; allowed: user",
        ),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "turns of chosen are assistant; allowed: user"),
        ({"prompt": [USER, HELLO], "chosen": [GOOD], "rejected": [BAD]}, "user, assistant, assistant"),
        ({"prompt": [USER, ASKED], "chosen": [GOOD], "rejected": [BAD]}, "user, user, assistant"),
        ({"prompt": [USER, SYSTEM, ASKED], "chosen": [GOOD], "rejected": [BAD]}, "user, system"),
        (
            {"prompt": [USER, HELLO], "chosen": [ASKED], "rejected": [ASKED]},
            "1 behind the prompt; allowed: one behind it, the assistant's",
        ),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "user, user, assistant"),
        ({"prompt": [USER], "chosen": [HELLO, ASKED, GOOD], "rejected": [BAD]}, "3 behind the prompt"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": []}, "0 behind the prompt"),
        ({"chosen": [USER, GOOD], "rejected": [ASKED, BAD]}, "chosen and rejected begin differently"),
        ({"chosen": [*TALK, GOOD], "rejected": [ASKED, BAD]}, "chosen and rejected begin differently"),
        ({"chosen": TALK, "rejected": TALK}, "turns of chosen are system, user, assistant, user"),
        ({"prompt": "Else?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompt is 'Else?', which"),
        ({"chosen": "a", "rejected": "b"}, "field 'prompt' is None, expected text or a list of messages"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "field 'chosen' is 3, expected text or a list"),
        (
            {"prompt": [{"role": "user"}], "chosen": [GOOD], "rejected": [BAD]},
            "allowed: a role and a content",
        ),
        ({"prompt": [USER | {"name": "Al"}], "chosen": [GOOD], "rejected": [BAD]}, "a role and a content"),
        (
            {"prompt": [{"role": "user", "content": [1]}], "chosen": [GOOD], "rejected": [BAD]},
            "expected text",
        ),
        ({"prompt": ["Hi"], "chosen": [GOOD], "rejected": [BAD]}, "found a JSON str, expected an object"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "question": "q"}, "field 'question' beside chosen"),
        ({"question": "q", "history": [USER], "responses": []}, "turns of history are user, user"),
        ({"question": "", "history": [USER, HELLO], "responses": []}, "question is empty"),
        ({"question": "q", "history": [3], "responses": []}, "each item an object"),
        ({"question": "q"}, "no field 'responses'"),
        (
            {"question": "q", "responses": [1]},
            "field 'responses' is [1], expected a list, each item an object",
        ),
        ({"question": "q", "responses": [], "x": "\ud800"}, "field 'x' holds a lone surrogate"),
    ],
)
def test_a_malformed_conversation_is_named_by_its_line(tmp_path, row, message):
    path = jsonl(tmp_path / "s.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"}, row)
    with pytest.raises(InputError) as error:
        read_samples(path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value), error.value


@pytest.mark.parametrize("scores", [{"dpo": "x"}, {"dpo": None}, {"dpo": True}, {"dpo": float("nan")}])
def test_scores_are_numbers(tmp_path, scores):
    path = jsonl(tmp_path / "s.jsonl", {"question": "q", "responses": [{"text": "x", "scores": scores}]})
    with pytest.raises(InputError, match="s.jsonl:1: field 'scores'"):
        read_samples(path)
