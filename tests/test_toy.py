"""The built-in world: its truth, its oracle, its teacher's mistakes, and the shipped base."""

import collections
import hashlib
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minicot.answers import extract_answer, is_correct
from minicot.tokenizer import Tokenizer
from minicot.toy import problems, teacher
from minicot.toy.base_text import DRILLS, base_rows, seeing_rows, word_rows
from minicot.toy.problems import WORDINGS, Quantity, Scene, derived_by, grade, label_steps, make_problem
from minicot.toy.problems import make_scene, perception_questions, row_of, rows, scene_hash, scene_of
from minicot.toy.problems import split_of

BASE = Path(problems.__file__).parent / "base"
FACTS = (
    Quantity("given", "Jon", "eggs", 4, (), (4,)),
    Quantity("times", "Kim", "eggs", 12, (0,), (3,)),
    Quantity("fewer", "Ben", "eggs", 8, (1,), (4,)),
)
CHAIN = Scene("toy-0-2-0", FACTS, Quantity("value", None, "eggs", 8, (2,)), (0, 1, 2), (0, 0, 0, 0))


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(seed) for seed in range(2000)]


def test_every_wording_of_every_scene_is_labelled_right_and_graded_one(scenes):
    for scene in scenes:
        for wording in WORDINGS:
            row = row_of(scene, wording=wording)
            assert all(label_steps(row, row["steps"])) and grade(scene.id, row["solution"]) == 1.0, row


def test_a_row_is_rebuilt_from_its_id(scenes):
    for scene in scenes[:200]:
        assert scene_of(scene.id) == scene_of(row_of(scene)) == scene
    seed, difficulty, distractors = map(int, re.fullmatch(r"toy-(\d+)-(\d)-(\d)", scenes[7].id).groups())
    assert make_scene(seed, difficulty, distractors) == scenes[7]


def test_an_id_that_is_none_of_ours_is_refused():
    for bad in ("gsm8k-3", "toy-1", "toy-1-2", "toy-1-2-0.x", "toy--1-2-0", "toy-1-9-0"):
        with pytest.raises(ValueError, match="allowed"):
            scene_of(bad)


def test_bad_arguments_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match="allowed: 1 to 6"):
        make_problem(1, difficulty=0)
    with pytest.raises(ValueError, match="'rhyme'.*plain"):
        make_problem(1, wording="rhyme")
    with pytest.raises(ValueError, match="'dev'.*validation"):
        rows("dev", 3)


def test_the_question_tells_every_fact_once_and_each_step_names_the_facts_that_it_reads(scenes):
    for scene in scenes[:300]:
        row = row_of(scene, wording="items")
        assert row["question"].startswith(" ".join(row["facts"]))
        assert len(row["facts"]) == len(scene.quantities)
        assert len(row["uses"]) == len(row["steps"]) == row["difficulty"]
        needed = {place for use in row["uses"] for place in use}
        by_place = {scene.order.index(place) for place in scene.needed}
        assert needed <= by_place
        given = {scene.order.index(p) for p in scene.needed if scene.quantities[p].kind == "given"}
        assert given <= needed  # no fact that the answer needs is forgotten


def test_distractors_are_told_and_never_needed(scenes):
    for scene in scenes[:500]:
        assert len(scene.quantities) - len(scene.needed) == int(scene.id.split("-")[3])


def test_answers_are_whole_positive_and_stand_nowhere_in_the_question(scenes):
    for scene in scenes:
        row = row_of(scene)
        answer = int(row["answer"])
        assert 2 <= answer <= 2 * problems.LARGEST
        assert answer not in map(int, re.findall(r"\d+", row["question"])), row["question"]
        assert all(2 <= quantity.value <= problems.LARGEST for quantity in scene.quantities)


def test_difficulty_follows_its_weights_and_can_be_fixed(scenes):
    counts = collections.Counter(scene.difficulty for scene in scenes)
    total = sum(problems.DIFFICULTY_WEIGHTS)
    for difficulty, weight in zip(problems.DIFFICULTIES, problems.DIFFICULTY_WEIGHTS):
        assert abs(counts[difficulty] / 2000 - weight / total) < 0.05
    for difficulty in range(1, 7):
        row = make_problem(3, difficulty=difficulty, distractors=3)
        assert row["difficulty"] == len(row["steps"]) == difficulty and grade(row, row["solution"]) == 1.0


def test_splits_are_disjoint_by_what_the_scenes_say():
    seen = {}
    for seed in range(20_000):
        scene = make_scene(seed)
        assert seen.setdefault(scene_hash(scene), split_of(scene)) == split_of(scene)
    shares = collections.Counter(seen.values())
    assert 0.77 < shares["train"] / len(seen) < 0.83 and min(shares.values()) > 0.08 * len(seen)


def test_names_items_and_phrasing_do_not_change_the_split(scenes):
    scene = scenes[0]
    swap = dict(zip(problems.NAMES, problems.NAMES[1:] + problems.NAMES[:1]))
    quantities = tuple(replace(q, who=swap[q.who], item="cups") for q in scene.quantities)
    assert len({q.item for q in scene.quantities}) == 1
    renamed = replace(
        scene,
        quantities=quantities,
        phrases=tuple(1 - p for p in scene.phrases),
        asked=replace(scene.asked, item="cups"),
    )
    assert scene_hash(renamed) == scene_hash(scene)
    other = next(s for s in scenes[1:] if len(s.quantities) == len(scene.quantities))
    assert scene_hash(other) != scene_hash(scene)


def test_rows_are_the_same_list_wherever_they_start_and_stay_in_their_split():
    ten = rows("test", 10)
    assert rows("test", 4, start=6) == ten[6:]
    assert all(split_of(scene_of(row)) == "test" for row in ten) and len({row["id"] for row in ten}) == 10


def test_another_process_makes_the_same_rows():
    code = "import json; from minicot.toy.problems import rows; print(json.dumps(rows('validation', 5)))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and json.loads(printed.pop()) == rows("validation", 5)


def test_a_perception_question_reads_one_number_of_one_fact(scenes):
    for scene in scenes[:200]:
        row = row_of(scene)
        for asked in perception_questions(row):
            fact = row["facts"][asked["fact"]].replace("twice", "2 times")
            assert asked["answer"] in re.findall(r"\d+", fact)
            assert asked["question"].startswith(" ".join(row["facts"]))
            assert row["question"] != asked["question"] or row["answer"] == asked["answer"]


# ---- the step oracle ---------------------------------------------------------------------------------------


def test_a_scene_is_told_and_solved_word_by_word():
    row = row_of(CHAIN, wording="plain")
    assert row["question"] == (
        "Jon has 4 eggs. Kim has 3 times as many eggs as Jon. "
        "Ben has 4 fewer eggs than Kim. How many eggs does Ben have?"
    )
    assert row["solution"] == "Kim has 4 x 3 = 12.\nBen has 12 - 4 = 8.\n#### 8"
    assert row["uses"] == [[0, 1], [2]] and row["answer"] == "8" and row["difficulty"] == 2


@pytest.mark.parametrize(
    "steps, labels",
    [
        (["Kim has 4 x 3 = 12.", "Ben has 12 - 4 = 8."], [1, 1]),
        (["Step 1: Kim has 3 * 4 = 12 eggs", "Step 2: 12 − 4 = 8, so Ben has 8 eggs."], [1, 1]),
        (
            ["Jon has 4 eggs.", "Kim has 3 times as many eggs as Jon", "Kim has 12, since 4 × 3 = 12."],
            [1, 1, 1],
        ),
        (["4 x 3 = 12", "Kim has 12 eggs", "Kim and Jon have 12 + 4 = 16 together"], [1, 1, 1]),
        (
            ["4 x 3 = 12", "Kim has 12 - 4 = 8 more than Jon", "Jon has 12 - 4 = 8 fewer eggs than Kim"],
            [1, 1, 1],
        ),
        (["Kim has 4 x 3 = 13.", "Ben has 13 - 4 = 9."], [0, 0]),  # wrong result, carried on
        (["Kim has 4 + 3 = 7.", "Ben has 7 - 4 = 3."], [0, 0]),  # right arithmetic, wrong operation
        (["Kim has 5 x 3 = 15.", "Ben has 15 - 4 = 11."], [0, 0]),  # misread
        (["Kim has 6 x 2 = 12.", "Ben has 12 - 4 = 8."], [0, 0]),  # right result by a wrong derivation
        (["Ben has 12 - 4 = 8."], [0]),  # leans on a skipped step
        (["Kim has 12."], [0]),  # a jump
        (["Ben has 4 x 3 = 12."], [0]),  # of the wrong person
        (["Kim has 4 x 3 = 12 cups."], [0]),  # of the wrong thing
        (["Kim has 3 - 4 = 12", "Kim has 4 x 3 = 12.", "Ben has 4 - 12 = 8."], [0, 1, 0]),
        (["Together they have 4 + 12 = 16."], [0]),  # nobody asked for a total: who?
        (
            ["Kim has 4 x 3 = 12. Ben has 12 - 4 = 8.", "hello", "", "Kim has 4 x 3 =", "Kim has 4 x = 2"],
            [0] * 5,
        ),
        (
            ["Jon has 4 / 0 = 4", "Jon has 1 + 3 = 4", "Zoe has 4", "Kim has 99999999999999999 x 3 = 12"],
            [0] * 4,
        ),
    ],
)
def test_the_oracle_labels_each_step_by_the_scene_and_the_right_steps_before(steps, labels):
    assert label_steps(CHAIN, steps) == [bool(label) for label in labels]


def test_every_single_number_changed_in_a_solution_is_noticed(scenes):
    """Guards against an oracle that checks the arithmetic only, or the result only."""
    for scene in scenes[:150]:
        row = row_of(scene, wording="so")
        for i, step in enumerate(row["steps"]):
            for match in re.finditer(r"\d+", step):
                changed = step[: match.start()] + str(int(match[0]) + 1) + step[match.end() :]
                assert not label_steps(row, row["steps"][:i] + [changed])[i], changed


def test_the_grade_ranks_answers_first_and_right_steps_second():
    ranked = [
        "Kim has 4 x 3 = 12.\nBen has 12 - 4 = 8.\n#### 8",
        "Kim has 4 x 3 = 12.\nBen has 12 + 4 = 16.\n#### 8",
        "Ben has 4 + 4 = 8.\n#### 8",
        "Kim has 4 x 3 = 12.\nBen has 12 - 4 = 8.\n#### 9",
        "Kim has 4 x 3 = 12.\nBen has 12 - 4 = 9.\n#### 9",
        "Kim has 4 x 3 = 13.\nBen has 13 - 4 = 9.\n#### 9",
    ]
    grades = [grade(CHAIN, text) for text in ranked]
    assert grades == sorted(set(grades), reverse=True) and grades[0] == 1.0 and grades[-1] == 0.0
    assert grade(CHAIN, "#### 8") == grades[2] == 0.6 and grades[3] == pytest.approx(0.4)
    assert grade(CHAIN, "Jon has 4 eggs.\n#### 8") == 0.6  # true but leads nowhere
    assert grade(CHAIN, "") == 0.0


# ---- the teacher -------------------------------------------------------------------------------------------


def test_every_mistake_is_caught_by_the_oracle_or_the_answer_check(scenes):
    rng = random.Random(0)
    for scene in scenes[:400]:
        row = row_of(scene)
        for kind in teacher.MISTAKES:
            mistaken = teacher.corrupt(row, rng, kind)
            right_answer = is_correct(extract_answer(mistaken["solution"], "hash"), row["answer"])
            right_steps = all(label_steps(row, mistaken["steps"]))
            assert right_answer == (kind == "skip") and right_steps == (kind == "label"), mistaken
            assert mistaken["kind"] == kind and row == row_of(scene)


def test_a_carried_on_mistake_has_arithmetic_that_holds_everywhere_else(scenes):
    """Guards against mistakes that any calculator would find."""
    rng = random.Random(1)
    evaluate = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__, "/": lambda a, b: a / b}
    for scene in scenes[:300]:
        for kind, slips in (("misread", 0), ("operation", 0), ("arithmetic", 1)):
            text = teacher.corrupt(row_of(scene), rng, kind)["solution"]
            equations = re.findall(r"(\d+) ([-+x/]) (\d+) = (\d+)", text)
            assert sum(evaluate[op](int(a), int(b)) != int(c) for a, op, b, c in equations) == slips, text
            assert equations[-1][3] == extract_answer(text, "hash")


def test_rewriting_changes_words_and_order_but_not_the_truth(scenes):
    rng, texts, results = random.Random(0), set(), set()
    for scene in scenes[:300]:
        row = row_of(scene)
        rewritten = teacher.rewrite(row, rng)
        assert grade(row, rewritten["solution"]) == 1.0 and rewritten["id"] == row["id"]
        texts.add(rewritten["solution"] == row["solution"])
        results.add(re.findall(r"= (\d+)", rewritten["solution"]) == re.findall(r"= (\d+)", row["solution"]))
    assert texts == {True, False} and results == {True, False}


@pytest.fixture
def chain_row(monkeypatch):
    monkeypatch.setattr(problems, "make_scene", lambda *_: CHAIN)
    return {"id": CHAIN.id, "question": "", "answer": "8"}


def test_a_bare_answer_is_expanded_and_a_wrong_one_refused(chain_row):
    assert grade(CHAIN, teacher.expand(chain_row, random.Random(0))["solution"]) == 1.0
    with pytest.raises(ValueError, match="answer is '9'"):
        teacher.expand({**chain_row, "answer": "9"}, random.Random(0))


def test_other_formats_are_unified_and_mistakes_are_not_repaired(chain_row):
    solution = (
        "Step 1: 4 x 3 = 12, so Kim has 12 eggs.\nStep 2: since Kim has 12,\nBen has 12 - 5 = 7\n†Answer: 7"
    )
    unified = teacher.unify({**chain_row, "solution": solution})
    assert unified["solution"] == "Kim has 4 x 3 = 12.\nsince Kim has 12, Ben has 12 - 5 = 7\n#### 7"
    for last in ("The answer is 8.", r"\boxed{8}", "### Answer: 8"):
        right = teacher.unify({**chain_row, "solution": f"Kim: 4 x 3 = 12\n12 - 4 = 8\n{last}"})
        assert right["solution"] == "Kim has 4 x 3 = 12.\nBen has 12 - 4 = 8.\n#### 8"
    with pytest.raises(ValueError, match="no answer"):
        teacher.unify({**chain_row, "solution": "Kim has 12."})


def test_the_teacher_errs_as_often_as_asked_and_says_how(scenes):
    rng = random.Random(0)
    kinds = collections.Counter()
    for scene in scenes:
        row = row_of(scene)
        taught = teacher.teach(row, rng, 0.3)
        kinds[taught["kind"]] += 1
        assert (taught["kind"] == "right") == (grade(row, taught["solution"]) == 1.0)
    assert 0.66 < kinds["right"] / 2000 < 0.74 and set(kinds) == {"right", *teacher.MISTAKES}
    with pytest.raises(ValueError, match="error_rate is 2"):
        teacher.teach(row, rng, 2)


def test_evolved_problems_change_difficulty_by_their_word_and_are_rebuilt_from_their_ids(scenes):
    rng, splits = random.Random(0), set()
    for scene in scenes[:200]:
        row = teacher.harder(row_of(scene), rng)
        assert row["difficulty"] == scene.difficulty + 1 and grade(row["id"], row["solution"]) == 1.0
        splits.add((split_of(scene), split_of(scene_of(row))))
        try:
            child = teacher.easier(row)
        except ValueError as error:
            assert "no easier question" in str(error)
        else:
            assert child["difficulty"] < row["difficulty"] and grade(child["id"], child["solution"]) == 1.0
    assert ("train", "test") in splits  # why the caller must filter by split


def test_derived_by_tells_needed_from_unneeded_derivations():
    labels, derived = derived_by(CHAIN, ["Kim has 4 x 3 = 12.", "Kim has 12 - 4 = 8 more than Jon."])
    assert labels == [True, True] and {q.kind for q in derived} == {"times", "difference"}


# ---- the shipped base --------------------------------------------------------------------------------------


def test_the_world_is_the_one_that_the_shipped_base_and_the_published_figures_know():
    """Guards against a change of the generator that leaves base weights, sample files and tables behind."""
    text = json.dumps(rows("train", 50) + rows("test", 50))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "c9587b0c93bd38f9"


def test_the_base_tokenizer_has_a_token_for_each_word_and_digit_and_any_text_round_trips(scenes):
    tokenizer = Tokenizer(BASE)
    for scene in scenes[:100]:
        for wording in WORDINGS:
            row = row_of(scene, wording=wording)
            text = row["question"] + "\n" + row["solution"]
            assert all(len(tokenizer.encode(word)) == 1 for word in re.findall(r" ?[A-Za-z#]+| ?\d", text))
            assert tokenizer.decode(tokenizer.encode(text)) == text
    typed = "Łódź 日本 \t\n  \\boxed{5} 1,234.5 <b> 🙂"
    assert tokenizer.decode(tokenizer.encode(typed)) == typed


def test_the_base_text_holds_no_worked_solution_and_no_held_out_scene():
    held_out = {row["question"] for split in ("validation", "test") for row in rows(split, 300)}
    drilled = [row for _, start, shares in DRILLS.values() for row in seeing_rows(400, start, shares)]
    for row in drilled:  # nothing is computed but sums and, where numbers are listed, their problem
        worked = bool(set("=+#") & set(row["question"] + row["solution"]))
        assert worked <= (row["id"].startswith("sums") or row["id"].endswith("-listed")), row
        assert row["question"].split("\n")[0] not in held_out
        assert not row["id"].endswith("-listed") or re.search(r"^\w+, .*\. \w+: \d", row["question"], re.M), (
            row
        )
    again = [row for row in word_rows(4000) if row["question"] == ""]
    assert 0.6 < len(again) / 4000 < 0.9
    for row in base_rows(3000) + again:
        text = row["solution"]
        assert row["question"] == "" and "####" not in text and text not in held_out
        assert not re.search(rf"(?:{'|'.join(problems.NAMES)})(?: has|:) \d+ [-+x/] \d+", text), text
