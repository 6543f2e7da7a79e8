"""sample.py as a person uses it: a typed question, resumable samples, evaluation; on the shipped base."""

import io
import json
import re
import sys

import pytest

import sample as sample_script
from minicot.records import Problem, Response, Samples, read_samples
from minicot.toy import problems
from minicot.training import resolve
from tests.helpers import assert_one_line_error, script

BASE = resolve("toy")


def sample(*argv, cwd):
    return script("sample.py", "--model", BASE, "--device", "cpu", *argv, cwd=cwd)


def test_a_typed_question_is_answered_without_a_grade(tmp_path):
    done = sample("Tom has 3 apples. How many apples does Tom have?", "--max-new-tokens", 8, cwd=tmp_path)
    assert done.returncode == 0 and "Tom has 3 apples." in done.stdout and "gold" not in done.stdout
    assert not any(word in done.stdout for word in ("right", "wrong", "no answer"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


RIGHT, WRONG = "\033[32m", "\033[31m"
SHOWN = [
    Samples(
        Problem("1", "Tom has 3 apples. Ana has 4 more apples than Tom. How many?", "7", choices=["7", "8"]),
        [
            Response("Ana has 3 + 4 = 7.\n\n#### 7", True, answer="7"),
            Response("#### 8", False, answer="8"),
            Response("Ana has", False),
            Response("Ana has 3 +", False, finish="length"),
        ],
    ),
    Samples(Problem("2", "Who?", history=[{"role": "user", "content": "Hi."}]), [Response("Tom.")]),
    Samples(Problem("3", "What?", image="cut.png"), error="image 'cut.png': found a broken PNG"),
]


def shown(monkeypatch, out):
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "40")
    sample_script.show(iter(SHOWN))
    return out.getvalue()


def test_problems_are_shown_for_a_person_to_read(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown(monkeypatch, io.StringIO())
    assert (
        text
        == """\
Tom has 3 apples. Ana has 4 more apples
than Tom. How many?
(A) 7
(B) 8
gold answer: 7
  right:
    Ana has 3 + 4 = 7.

    #### 7
  wrong:
    #### 8
  no answer:
    Ana has
  cut:
    Ana has 3 +

user: Hi.
Who?

    Tom.

<image>
What?
picture: cut.png
  image 'cut.png': found a broken PNG

1 of 4 responses are right
"""
    )


def test_colour_is_for_terminals_alone(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in shown(monkeypatch, Terminal())
    monkeypatch.setenv("NO_COLOR", "")
    text = shown(monkeypatch, Terminal())
    assert f"{RIGHT}    Ana has 3 + 4 = 7." in text and f"{WRONG}  wrong:" in text
    assert re.sub(r"\033\[\d+m", "", text) == shown(monkeypatch, io.StringIO())


def test_interrupted_sampling_goes_on_and_ends_with_the_same_file(tmp_path):
    argv = ["--split", "train", "--limit", 12, "--n", 3, "--max-new-tokens", 12, "--batch-size", 12]
    whole = sample(*argv, "--out", "whole.jsonl", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    text = (tmp_path / "whole.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    part.write_text("".join(lines[:5]) + lines[5][:40])  # the last line was cut off while being written
    (tmp_path / "part.jsonl.settings.json").write_text((tmp_path / "whole.jsonl.settings.json").read_text())
    resumed = sample(*argv, "--out", "part.jsonl", cwd=tmp_path)
    assert "7 problems to sample, 5 are in" in resumed.stdout
    assert part.read_text() == text
    samples = read_samples(part)
    assert [len(s.responses) for s in samples] == [3] * 12 and samples[0].responses[0].correct is not None


def test_samples_of_other_settings_are_not_mixed(tmp_path):
    argv = ["--limit", 2, "--max-new-tokens", 4, "--out", "s.jsonl"]
    assert sample(*argv, cwd=tmp_path).returncode == 0
    before = (tmp_path / "s.jsonl").read_text()
    assert_one_line_error(sample(*argv, "--temperature", 0.5, cwd=tmp_path), "other settings", "--overwrite")
    assert sample(*argv, "--compile", cwd=tmp_path).returncode == 0  # changes how, not what
    assert (tmp_path / "s.jsonl").read_text() == before


def test_step_rewards_are_graded_by_the_oracle_beside_the_answers(tmp_path):
    argv = ["--limit", 4, "--n", 2, "--max-new-tokens", 8]
    for reward in ("steps", "correct"):
        done = sample(*argv, "--reward", reward, "--out", f"{reward}.jsonl", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    steps, correct = (read_samples(tmp_path / f"{reward}.jsonl") for reward in ("steps", "correct"))
    responses = [(samples.problem.id, r) for samples in steps for r in samples.responses]
    assert len(responses) == 8 and all(r.reward == problems.grade(id_, r.text) for id_, r in responses)
    assert [r.correct for s in steps for r in s.responses] == [
        r.correct for s in correct for r in s.responses
    ]
    assert all(r.reward is None for s in correct for r in s.responses)


def test_evaluation_writes_what_it_prints(tmp_path):
    argv = ["--evaluate", "--limit", 8, "--n", 4, "--max-new-tokens", 16, "--out", "r.json"]
    done = sample(*argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    metrics = results["metrics"]
    assert metrics["accuracy"] == sum(results["correct"]) / 8 and len(results["problem_ids"]) == 8
    assert metrics["low"] <= metrics["accuracy"] <= metrics["high"] and set(metrics["pass"]) == {
        "1",
        "2",
        "4",
    }
    assert {"majority", "missing_answers", "mean_length", "repeated_4grams", "unfinished"} <= metrics.keys()
    assert f"greedy accuracy {metrics['accuracy']:.1%}" in done.stdout and "majority@4" in done.stdout


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--model", "nowhere"], ["nowhere"]),
        (["--n", "0"], ["--n"]),
        (["--top-p", "2"], ["--top-p"]),
        (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--split", "trial"], ["trial", "validation"]),
        (["--max-new-tokens", "100000"], ["problem 'toy-", "context of 512"]),
        (["--style", "haiku"], ["--style", "haiku", "boxed"]),
        (["--image", "p.png"], ["--image", "without a question"]),
        (["How many?", "--reward", "steps"], ["--reward", "but for toy problems"]),
        (["--data", "questions.jsonl", "--evaluate"], ["problems with an answer"]),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, argv, parts):
    (tmp_path / "questions.jsonl").write_text('{"question": "Why?"}\n')
    assert_one_line_error(sample("--limit", 2, *argv, cwd=tmp_path), *parts)


def test_a_model_folder_with_broken_weights_is_refused_in_one_line(tmp_path):
    for file in BASE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_one_line_error(script("sample.py", "--model", tmp_path, "hi", cwd=tmp_path), "model.safetensors")


def test_fields_of_a_file_and_conversations_pass_through_sampling(tmp_path):
    row = {
        "id": "a",
        "question": "How many pens?",
        "answer": "3",
        "history": [{"role": "user", "content": "Tom has 3 pens."}, {"role": "assistant", "content": "Yes."}],
        "plain": True,
        "level": {"grade": 2},
    }
    (tmp_path / "set.jsonl").write_text(json.dumps(row) + "\n")
    done = sample("--data", "set.jsonl", "--max-new-tokens", 4, "--out", "s.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "s.jsonl").read_text())
    assert {name: written[name] for name in row} == row and written.keys() == row.keys() | {"responses"}


def test_a_temperature_that_is_given_is_obeyed_and_the_model_is_named(tmp_path):
    argv = ["--limit", 2, "--max-new-tokens", 12]
    shown = [sample(*argv, *more, cwd=tmp_path).stdout for more in
             ([], ["--temperature", 0], ["--temperature", 5.0])]  # fmt: skip
    assert shown[0] == shown[1] != shown[2] and f"model: {BASE}" in shown[0]
