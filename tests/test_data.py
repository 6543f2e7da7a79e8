"""Problems, samples, rows and batches: what is read, what is refused, and that nothing is lost silently."""

import json

import pytest
import torch

from minicot import data, sets, records
from minicot.data import Row
from minicot.records import Problem, Response, Samples
from minicot.tokenizer import Tokenizer
from minicot.training import resolve


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(resolve("toy"))


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ---- reading -------------------------------------------------------------------------------------


def test_missing_id_becomes_the_line_number_and_numbers_become_text(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"question": "1 + 1?", "answer": 2},
        {"id": 7, "question": "2 + 2?", "answer": 4.5},
    )
    assert sets.read_problems(str(path)) == [Problem("1", "1 + 1?", "2"), Problem("7", "2 + 2?", "4.5")]


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
    path = write(tmp_path / "p.jsonl", {"id": "1", "question": "q"}, row)
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("[", r"\[")) as error:
        sets.read_problems(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_empty_file_a_missing_file_and_an_unknown_set_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no problems in it"):
        sets.read_problems(str(write(tmp_path / "empty.jsonl")))
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        sets.read_problems("nowhere.jsonl")
    with pytest.raises(ValueError, match="allowed: toy, toy-pictures, gsm8k:PATH"):
        sets.read_problems("gsm9k:x")
    with pytest.raises(ValueError, match="allowed for toy"):
        sets.read_problems("toy", "dev")


def test_gsm8k_rows_lose_calculator_marks_and_keep_the_marked_answer(tmp_path):
    write(
        tmp_path / "train.jsonl",
        {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 1,024"},
    )
    (problem,) = sets.read_problems(f"gsm8k:{tmp_path}")
    assert problem.solution == "48/2 = 24 clips.\n#### 1,024" and problem.answer == "1,024"


def test_choice_sets_become_letters_and_plain_choices(tmp_path):
    write(
        tmp_path / "val.jsonl",
        {"id": "e", "question": "Q?", "choices": ["x", "y", "z", "u", "v"], "answer": 1},
    )
    (ecqa,) = sets.read_problems(f"ecqa:{tmp_path}", "validation")
    assert (ecqa.answer, ecqa.solution, ecqa.choices) == ("B", None, ["x", "y", "z", "u", "v"])
    write(
        tmp_path / "dev.jsonl",
        {"question": "Q?", "options": ["A)10", "B) 20"], "rationale": "so", "correct": "B"},
    )
    (aqua,) = sets.read_problems(f"aqua:{tmp_path}", "validation")
    assert aqua.choices == ["10", "20"] and aqua.solution == "so\nThe answer is (B)."
    assert data.render(aqua, "direct") == "Q?\n(A) 10\n(B) 20" + data.DIRECT_PROMPT


def test_a_row_of_another_set_names_file_and_line(tmp_path):
    write(tmp_path / "train.jsonl", {"question": "Q?"})
    with pytest.raises(ValueError, match="train.jsonl:1: not a row of this set"):
        sets.read_problems(f"gsm8k:{tmp_path}")


def test_split_slices_and_limit():
    rows = sets.read_problems("toy", "test", limit=20)
    assert [p.id for p in sets.read_problems("toy", "test[5:8]")] == [p.id for p in rows[5:8]]
    with pytest.raises(ValueError, match="slice"):
        sets.read_problems("toy", "test[5")


def test_samples_survive_a_round_trip_and_trl_rows_become_pairs(tmp_path):
    samples = Samples(
        Problem("a", "q", "3"), [Response("#### 3", True, ids=[1, 2]), Response("x", None, 0.5, "length")]
    )
    path = write(
        tmp_path / "s.jsonl",
        records.samples_to_row(samples),
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
    )
    read = records.read_samples(path)
    assert read[0] == samples
    assert [(r.text, r.reward, r.correct) for r in read[1].responses] == [
        ("good", 1.0, None),
        ("bad", 0.0, None),
    ]
    assert data.pairs(read[1:], seed=0) == read[1:]


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
    path = write(tmp_path / "s.jsonl", {"question": "q", "responses": [response]})
    with pytest.raises(ValueError, match=f"s.jsonl:1: .*{message}"):
        records.read_samples(path)


# ---- grading -------------------------------------------------------------------------------------


def test_grading_is_strict_and_knows_choices():
    problem = Problem("1", "q", "1000")
    assert data.grade(problem, "so\n#### 1,000.0", mode="cot", style="hash") == ("1,000.0", True)
    assert data.grade(problem, "it is 1000", mode="cot", style="hash") == (None, False)
    assert data.grade(problem, " 1000 ", mode="direct", style="hash") == ("1000", True)
    choice = Problem("2", "q", "B", choices=["cat", "dog"])
    assert data.grade(choice, "dog", mode="direct", style="letter") == ("B", True)
    assert data.grade(Problem("3", "q"), "#### 4", mode="cot", style="hash") == ("4", None)


# ---- rows and batches ----------------------------------------------------------------------------


def test_row_is_prompt_then_response_then_eos_and_only_the_response_is_scored(tokenizer):
    problem = Problem("1", "Tom has 3 apples. How many apples does Tom have?", "3")
    row = data.encode_row(tokenizer, problem, "#### 3", mode="cot")
    assert tokenizer.decode(row.ids[: row.n_prompt]) == tokenizer.decode(
        tokenizer.encode(data.prompt_text(tokenizer, problem, "cot"))
    )
    assert tokenizer.decode(row.ids[row.n_prompt :]) == "#### 3" and row.ids[-1] == tokenizer.eos_id
    cut = data.encode_row(tokenizer, problem, "#### 3", mode="cot", finish="length")
    assert cut.ids == row.ids[:-1]


def test_sampled_ids_are_kept_as_they_are_and_foreign_ones_refused(tokenizer):
    problem, ids = Problem("1", "q?"), [tokenizer.encode("3")[0], tokenizer.eos_id]
    row = data.encode_row(tokenizer, problem, "3", mode="cot", ids=ids)
    assert row.ids[row.n_prompt :] == ids
    for bad in ([-1], tokenizer.encode("4")):
        with pytest.raises(ValueError, match="another tokenizer"):
            data.encode_row(tokenizer, problem, "3", mode="cot", ids=bad)


def test_an_empty_prompt_never_scores_the_first_token(tokenizer):
    row = data.encode_row(tokenizer, Problem("1", "", solution="3 + 4 = 7"), "3 + 4 = 7", mode="cot")
    assert row.n_prompt == 1
    batch = data.collate([[row]], tokenizer.pad_id)
    assert not batch.loss_mask[0, 0] and batch.loss_mask[0, 1:].all()


def test_overlong_rows_are_refused_or_counted_never_cut():
    rows = [Row("a", [1] * 5, 2), Row("b", [1] * 9, 2)]
    with pytest.raises(
        ValueError, match="1 of 2 rows are longer than 8 tokens, the first is problem 'b' with 9"
    ):
        data.fit(rows, 8, "refuse")
    assert data.fit(rows, 8, "skip") == (rows[:1], 1)
    with pytest.raises(ValueError, match="all 2 rows"):
        data.fit(rows, 3, "skip")


def test_collate_places_rows_in_their_groups_and_masks_prompts_and_pads():
    batch = data.collate(
        [[Row("a", [5, 6, 7], 1, 1.0, True), Row("a", [5, 8], 1, 0.0, False)], [Row("b", [9, 4], 1, 0.5)]], 0
    )
    assert batch.ids.tolist() == [[5, 6, 7], [5, 8, 0], [9, 4, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1], [0, 1, 0], [0, 1, 0]]
    assert batch.pad_mask.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert batch.rewards.tolist() == [[1, 0], [0.5, 0]] and batch.correct.tolist() == [[1, 0], [-1, -1]]
    assert batch.present.tolist() == [[True, True], [True, False]]
    assert data.to_groups(torch.tensor([1.0, 2.0, 3.0]), batch).tolist() == [[1, 2], [3, 0]]


def test_schedule_covers_each_pass_once_is_seeded_and_buckets_lengths():
    lengths = [7 * i % 101 for i in range(1000)]
    batches = data.schedule(lengths, 16, 2000, seed=3)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == sorted(list(range(1000)) * 2) and all(len(batch) <= 16 for batch in batches)
    assert batches == data.schedule(lengths, 16, 2000, seed=3) != data.schedule(lengths, 16, 2000, seed=4)
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    assert spread < 15  # random batches would spread over about 90
    mixed = data.schedule([0] * 1000, 16, 2000, seed=3)  # --no-group-by-length
    assert all({lengths[i] < 50 for i in batch} == {True, False} for batch in mixed if len(batch) == 16)


# ---- groups --------------------------------------------------------------------------------------


def test_pairs_are_right_against_wrong_within_the_window_and_at_most_three():
    def group(id_, marks):
        return Samples(Problem(id_, "q", "1"), [Response(f"{id_} {i}", bool(m)) for i, m in enumerate(marks)])

    samples = [group("mixed", [1, 0, 1, 0]), group("right", [1, 1, 1, 1]), group("rare", [1] + [0] * 9)]
    found = data.pairs(samples, seed=1)
    assert [s.problem.id for s in found] == ["mixed"] * 3
    assert all(s.responses[0].correct and not s.responses[1].correct for s in found)
    assert len({(s.responses[0].text, s.responses[1].text) for s in found}) == 3
    assert found == data.pairs(samples, seed=1)
    assert {s.problem.id for s in data.pairs(samples, seed=1, window=(0, 1))} == {"mixed", "rare"}
    ungraded = Samples(Problem("u", "q"), [Response("a", True), Response("b"), Response("c", False)])
    assert [[r.text for r in s.responses] for s in data.pairs([ungraded], seed=0)] == [["a", "c"]]


def test_groups_count_duplicates_empties_and_pairless_ones(tokenizer):
    problem = Problem("1", "q?", "3", solution="#### 3")
    samples = [
        Samples(
            problem,
            [
                Response("#### 3", True),
                Response("#### 4", False),
                Response("#### 4", False),
                Response(" ", False),
            ],
        ),
        Samples(Problem("2", "q?", "3", solution="#### 3"), [Response("so #### 3", True)]),
    ]
    groups, counts = data.make_groups(tokenizer, samples, mode="cot", max_length=64, reference=True)
    assert [[row.is_reference for row in group] for group in groups] == [[True, False], [True, False]]
    assert counts == {"duplicates": 2, "empty": 1, "without a pair": 1}
    with pytest.raises(ValueError, match="neither 'reward' nor 'correct'"):
        data.make_groups(
            tokenizer, [Samples(problem, [Response("x")])], mode="cot", max_length=64, reference=False
        )
    with pytest.raises(ValueError, match="has no solution"):
        data.make_groups(
            tokenizer,
            [Samples(Problem("1", "q"), [Response("x", True)])],
            mode="cot",
            max_length=64,
            reference=True,
        )


def test_the_reference_ranks_below_no_response(tokenizer):
    problem = Problem("1", "q?", "3", solution="so 3\n#### 3")
    graded = Samples(problem, [Response("#### 3", True, 5.0), Response("#### 4", False, 2.0)])
    ((reference, *rest),), _ = data.make_groups(
        tokenizer, [graded], mode="cot", max_length=64, reference=True
    )
    assert reference.is_reference and reference.reward == 5.0 and [row.reward for row in rest] == [5.0, 2.0]


def test_finish_must_agree_with_the_sampled_ids(tokenizer):
    problem, ids = Problem("1", "q?"), tokenizer.encode("3")
    data.encode_row(tokenizer, problem, "3", mode="cot", ids=ids, finish="length")
    for finish, given in (("stop", ids), ("length", [*ids, tokenizer.eos_id])):
        with pytest.raises(ValueError, match="finish is"):
            data.encode_row(tokenizer, problem, "3", mode="cot", ids=given, finish=finish)
    with pytest.raises(ValueError, match="question and text are empty"):
        data.encode_row(tokenizer, Problem("1", ""), "", mode="cot")


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
        sets.read_problems(str(write(tmp_path / "p.jsonl", row)))


def test_the_same_row_number_of_two_splits_is_another_problem(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", {"question": "How many?", "answer": "#### 1"})
    a, b = (sets.read_problems(f"gsm8k:{tmp_path}", split)[0].id for split in ("train", "test"))
    assert a != b


def test_plain_mode_leaves_the_question_as_it_is():
    problem = Problem("1", "What is the capital of France?", "Paris", solution="so\n#### Paris")
    assert data.render(problem, "plain") == problem.question
    assert data.target(problem, "plain") == problem.solution
    assert data.render(problem, "cot") == problem.question + data.COT_PROMPT
    assert data.grade(problem, "so\n#### Paris", mode="plain", style="hash") == ("Paris", True)


def test_sets_are_read_as_their_authors_publish_them(tmp_path):
    svamp = [{"ID": "chal-1", "Body": "Each pack costs 76 dollars.", "Question": "How much?", "Answer": 51.0}]
    (tmp_path / "SVAMP.json").write_text(json.dumps(svamp))
    (problem,) = sets.read_problems(f"svamp:{tmp_path / 'SVAMP.json'}")
    assert (problem.question, problem.answer) == ("Each pack costs 76 dollars. How much?", "51.0")
    addsub = [{"iIndex": 3, "sQuestion": " Q? ", "lSolutions": [43.0]}]
    (tmp_path / "AddSub.json").write_text(json.dumps(addsub))
    assert sets.read_problems(f"addsub:{tmp_path / 'AddSub.json'}") == [Problem("AddSub-3", "Q?", "43.0")]
    (tmp_path / "cqa_data_val.csv").write_text(
        "q_no,q_concept,q_text,q_op1,q_op2,q_op3,q_op4,q_op5,q_ans,taskA_pos,taskA_neg,taskB\n"
        '7,c,"Where, then?",a,b,c,d,e,b,x,y,"Because, so."\n'
    )
    (problem,) = sets.read_problems(f"ecqa:{tmp_path}", "validation")
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
        sets.read_problems(f"tabmwp:{tmp_path}", "validation")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "33.png").write_bytes(b"read later")
    (problem,) = sets.read_problems(f"tabmwp:{tmp_path}", "validation")
    assert (problem.id, problem.answer, problem.images) == (
        "tabmwp-33",
        "B",
        [("tables/33.png", str(tmp_path.resolve()))],
    )
    assert data.grade(problem, problem.solution, mode="cot", style="hash")[1]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="bad.json: holds a JSON dict, expected an array"):
        sets.read_problems(f"svamp:{tmp_path / 'bad.json'}")
