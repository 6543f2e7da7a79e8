"""Where problems come from: published sets as their authors publish them, JSON lines, splits and slices."""

import json

import pytest

from minicot.data import DIRECT_PROMPT, grade, render
from minicot.records import Problem
from minicot.sets import read_problems
from tests.helpers import jsonl


def test_an_empty_file_a_missing_file_and_an_unknown_set_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no problems in it"):
        read_problems(str(jsonl(tmp_path / "empty.jsonl")))
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        read_problems("nowhere.jsonl")
    with pytest.raises(
        ValueError, match="allowed: toy, toy-pictures, toy-pictures-long, toy-shots, gsm8k:PATH"
    ):
        read_problems("gsm9k:x")
    with pytest.raises(ValueError, match="allowed for toy"):
        read_problems("toy", "dev")


def test_gsm8k_rows_lose_calculator_marks_and_keep_the_marked_answer(tmp_path):
    jsonl(
        tmp_path / "train.jsonl",
        {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 1,024"},
    )
    (problem,) = read_problems(f"gsm8k:{tmp_path}")
    assert problem.solution == "48/2 = 24 clips.\n#### 1,024" and problem.answer == "1,024"


def test_choice_sets_become_letters_and_plain_choices(tmp_path):
    jsonl(
        tmp_path / "val.jsonl",
        {"id": "e", "question": "Q?", "choices": ["x", "y", "z", "u", "v"], "answer": 1},
    )
    (ecqa,) = read_problems(f"ecqa:{tmp_path}", "validation")
    assert (ecqa.answer, ecqa.solution, ecqa.choices) == ("B", None, ["x", "y", "z", "u", "v"])
    jsonl(
        tmp_path / "dev.jsonl",
        {"question": "Q?", "options": ["A)10", "B) 20"], "rationale": "so", "correct": "B"},
    )
    (aqua,) = read_problems(f"aqua:{tmp_path}", "validation")
    assert aqua.choices == ["10", "20"] and aqua.solution == "so\nThe answer is (B)."
    assert render(aqua, "direct") == "Q?\n(A) 10\n(B) 20" + DIRECT_PROMPT


def test_sets_are_read_as_their_authors_publish_them(tmp_path):
    svamp = [{"ID": "chal-1", "Body": "Each pack costs 76 dollars.", "Question": "How much?", "Answer": 51.0}]
    (tmp_path / "SVAMP.json").write_text(json.dumps(svamp))
    (problem,) = read_problems(f"svamp:{tmp_path / 'SVAMP.json'}")
    assert (problem.question, problem.answer) == ("Each pack costs 76 dollars. How much?", "51.0")
    addsub = [{"iIndex": 3, "sQuestion": " Q? ", "lSolutions": [43.0]}]
    (tmp_path / "AddSub.json").write_text(json.dumps(addsub))
    assert read_problems(f"addsub:{tmp_path / 'AddSub.json'}") == [Problem("AddSub-3", "Q?", "43.0")]
    (tmp_path / "cqa_data_val.csv").write_text(
        "q_no,q_concept,q_text,q_op1,q_op2,q_op3,q_op4,q_op5,q_ans,taskA_pos,taskA_neg,taskB\n"
        '7,c,"Where, then?",a,b,c,d,e,b,x,y,"Because, so."\n'
    )
    (problem,) = read_problems(f"ecqa:{tmp_path}", "validation")
    solution = "Because, so.\nThe answer is (B)."
    assert problem == Problem("7", "Where, then?", "B", solution, choices=list("abcde"))
    tables = {
        "33": {
            "question": "When?",
            "choices": ["2:00 P.M.", "3:00 P.M."],
            "answer": "3:00 P.M.",
            "solution": "Look.",
        }
    }
    (tmp_path / "problems_dev.json").write_text(json.dumps(tables))
    with pytest.raises(ValueError, match="problems_dev.json:1: image 'tables/33.png': no such file"):
        read_problems(f"tabmwp:{tmp_path}", "validation")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "33.png").write_bytes(b"read later")
    (problem,) = read_problems(f"tabmwp:{tmp_path}", "validation")
    assert (problem.id, problem.answer, problem.images) == (
        "tabmwp-33",
        "B",
        [("tables/33.png", str(tmp_path.resolve()))],
    )
    assert grade(problem, problem.solution, mode="cot", style="hash")[1]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="bad.json: holds a JSON dict, expected an array"):
        read_problems(f"svamp:{tmp_path / 'bad.json'}")


def test_a_row_of_another_set_names_file_and_line(tmp_path):
    jsonl(tmp_path / "train.jsonl", {"question": "Q?"})
    with pytest.raises(ValueError, match="train.jsonl:1: not a row of this set"):
        read_problems(f"gsm8k:{tmp_path}")


def test_split_slices_and_limit():
    rows = read_problems("toy", "test", limit=20)
    assert [p.id for p in read_problems("toy", "test[5:8]")] == [p.id for p in rows[5:8]]
    with pytest.raises(ValueError, match="slice"):
        read_problems("toy", "test[5")


def test_the_same_row_number_of_two_splits_is_another_problem(tmp_path):
    for split in ("train", "test"):
        jsonl(tmp_path / f"{split}.jsonl", {"question": "How many?", "answer": "#### 1"})
    a, b = (read_problems(f"gsm8k:{tmp_path}", split)[0].id for split in ("train", "test"))
    assert a != b
