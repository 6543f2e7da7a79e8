"""The world of units: a convention of one prompt that some of its shots show."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minicot.answers import extract_answer, is_correct
from minicot.data import encode_row, render
from minicot.sets import default_length, read_problems
from minicot.tokenizer import Tokenizer
from minicot.toy import problems, shots
from minicot.toy.shots import Item, Term, VARIANTS, drill_rows, make_scene, mrd3_row, row_of, rows, split_of
from minicot.toy.shots import thinned, word_kinds

EXAMPLE = Item("Kim", "pens", (Term(1, 2, "Zoe", 6), Term(1, 3)))


@pytest.fixture(scope="module")
def made():
    return rows("train", 150)


def solve(question, worth):
    """The answer of a question, read from its words alone. worth: unit -> things in it (None: none known)."""
    told, asked = re.search(
        r"([A-Z]\w+ (?:has|owns|had) \d+ [^.]*)\..*?How many (\w+ ?\w*)\?", question
    ).groups()
    times = re.search(r", all that (\d+) times", told)
    total = 0
    for joined, count, what in re.findall(
        r"(has|owns|had|found|bought|and|lost|away) (\d+) (\w+(?: bags)?)", told
    ):
        unit = what.removesuffix(" bags")
        value = worth[unit] if what.endswith(" bags") and what != asked else 1
        total += int(count) * value * (-1 if joined in ("lost", "away") else 1)
    return total * int(times[1] if times else 1)


def steps_of(text):
    return re.findall(r"(\d+)(?: [A-Z]\w+)? ([-+x]) (\d+) = (\d+)\.", text)


# ---- exercises and their evolutions ------------------------------------------------------------------------


def test_an_exercise_by_hand():
    assert EXAMPLE.solution == "2 Zoe x 6 = 12. 12 + 3 = 15. #### 15"
    assert EXAMPLE.question.startswith("Kim ") and EXAMPLE.question.endswith("How many pens?")
    assert (EXAMPLE.answer, EXAMPLE.difficulty) == (15, 3)  # two steps, one of them a conversion
    two = Item("Kim", "pens", (Term(1, 2, "Zoe", 6), Term(-1, 3, "Ben", 2)), factor=2)
    assert two.solution == "2 Zoe x 6 = 12. 3 Ben x 2 = 6. 12 - 6 = 6. 6 x 2 = 12. #### 12"
    assert two.difficulty == 6
    assert not Item("Kim", "pens", (Term(1, 9),)).valid  # nothing to compute
    assert not Item("Kim", "pens", (Term(1, 2), Term(-1, 9))).valid
    assert not Item("Kim", "pens", (Term(-1, 2), Term(1, 9))).valid


def test_a_row_of_mrd3_is_text_throughout():
    row = mrd3_row(EXAMPLE)
    assert list(row) == ["instruction", "input", "output", "answer", "difficulty", "steps"]
    assert all(isinstance(value, str) for value in row.values())
    assert (row["input"], row["answer"], row["difficulty"], row["steps"]) == ("", "15", "3", "2")
    assert row["instruction"] == EXAMPLE.question and row["output"] == EXAMPLE.solution


HARDER = {
    "add_constraints": shots.add_constraints,
    "deepening": lambda item, seed: shots.deepening(item, seed, "Ben", 3),
    "increase_reasoning": shots.increase_reasoning,
}


def evolved(change, items):
    """[(item, what it became, seed)], without the items that have no such form."""
    done = []
    for seed, item in enumerate(items):
        try:
            done.append((item, change(item, seed), seed))
        except ValueError as error:
            assert "no such form of" in str(error)
    assert len(done) > len(items) / 2
    return done


@pytest.mark.parametrize("name", [*HARDER, "produce_easier", "revise_difficulty"])
def test_evolutions_stay_right_and_move_difficulty_as_named(name):
    rng = random.Random(0)
    items = [
        shots.draw_item(rng, ["Kim", "Tom"], [("Zoe", 6)], loose=i % 3, factor=1 + i % 5 // 4)
        for i in range(60)
    ]
    change = (
        HARDER.get(name)
        or {
            "produce_easier": shots.produce_easier,
            "revise_difficulty": lambda item, seed: shots.revise_difficulty(item, seed, 4),
        }[name]
    )
    for item, new, seed in evolved(change, items):
        assert new.valid and change(item, seed) == new
        assert solve(new.question, {"Zoe": 6, "Ben": 3}) == new.answer
        assert is_correct(extract_answer(new.solution, "hash"), mrd3_row(new)["answer"])
        if name in HARDER:
            assert new.difficulty > item.difficulty and len(new.steps) > len(item.steps)
        elif name == "produce_easier":
            assert new.difficulty < item.difficulty
        else:
            assert new.difficulty == 4
    if name == "add_constraints":  # another seed, another evolution
        assert len({change(items[0], seed).question for seed in range(20)}) > 3


def test_what_has_no_such_form_is_refused():
    with pytest.raises(ValueError, match="increase_reasoning: no such form of 'Kim"):
        shots.increase_reasoning(Item("Kim", "pens", EXAMPLE.terms, factor=2), 0)
    with pytest.raises(ValueError, match="deepening: no such form"):
        shots.deepening(Item("Kim", "pens", (Term(1, 2, "Zoe", 6),)), 0, "Ben", 3)
    with pytest.raises(ValueError, match="produce_easier: no such form"):
        shots.produce_easier(Item("Kim", "pens", (Term(1, 2, "Zoe", 6),)), 0)
    for difficulty in (0, 11):
        with pytest.raises(ValueError, match=f"difficulty is {difficulty}; allowed: 1 to 10"):
            shots.revise_difficulty(EXAMPLE, 0, difficulty)


# ---- problems and their shots ------------------------------------------------------------------------------


def test_every_answer_is_right_and_every_shot_keeps_to_its_prompts_convention(made):
    for row in made:
        worth = dict(make_scene(int(row["id"].split("-")[1])).units)
        assert len(set(worth.values())) == len(worth) == 4
        texts = [*row["shots"], f"Q: {row['question']}\nA: {row['solution']}\n\n"]
        for text, unit in zip(texts, [*row["shows"], None]):
            question, chain = re.fullmatch(r"Q: (.*)\nA: (.*)\n\n", text).groups()
            assert solve(question, worth) == int(extract_answer(chain, "hash"))
            steps = steps_of(chain)
            assert steps and steps[-1][-1] == extract_answer(chain, "hash")
            for a, sign, b, c in steps:
                assert {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign] == int(c)
            shown = dict(re.findall(r"\d+ ([A-Z]\w+) x (\d+) =", chain))
            assert all(worth[name] == int(value) for name, value in shown.items())
            assert unit is None or list(shown) == [unit] * bool(unit)
        assert int(row["answer"]) == solve(row["question"], row["units"])
        assert row["solution"] == " ".join([*row["steps"], f"#### {row['answer']}"])


def test_needed_shots_alone_show_the_units_of_the_question(made):
    for row in made:
        asked = set(re.findall(r"(\w+) bags", row["question"]))
        assert asked == set(row["units"]) and 1 <= len(asked) <= 2
        assert row["needed"] == [i for i, unit in enumerate(row["shows"]) if unit in asked]
        assert {row["shows"][i] for i in row["needed"]} == asked
        rest = [text for i, text in enumerate(row["shots"]) if i not in row["needed"]]
        assert not any(re.search(rf"\b{name} x \d", text) for name in asked for text in rest)
        assert any(f"{name} bags" in text for name in asked for text in rest)  # named without its value
        assert 6 <= len(row["shots"]) <= 8
        assert row["shows"].count("") >= 2 and set(row["shows"]) - asked - {""}  # no unit's value, another's


def test_the_same_question_has_another_answer_in_another_prompt():
    """Nothing but the shots tells a unit's value: with another one the question reads the same."""
    for seed in range(60):
        scene = make_scene(seed)
        terms = [t._replace(value=t.value + 1) if t.unit else t for t in scene.asked.terms]
        other = Item(scene.asked.who, scene.asked.thing, tuple(terms), scene.asked.factor, scene.asked.style)
        assert other.question == scene.asked.question
        if len({term.sign for term in terms if term.unit}) == 1:  # no two changes that may cancel out
            assert other.answer != scene.asked.answer
    values = [value for row in rows("train", 400) for value in row["units"].values()]
    assert all(0.06 < values.count(value) / len(values) < 0.19 for value in shots.VALUES)  # one in eight


def test_prompts_fit_the_toys_context_and_words_are_its_tokens(made):
    tokenizer = Tokenizer(Path(problems.__file__).parent / "base")
    answer, context = default_length("toy-shots"), 512
    for split, limit in (("train", 400), ("validation", 300), ("test", 2000)):  # as the recipe takes them
        for problem in read_problems("toy-shots", split, limit=limit):
            row = encode_row(tokenizer, problem, problem.solution, mode="cot")
            assert row.n_prompt + answer <= context and len(row.ids) - row.n_prompt <= answer
    assert render(problem, "cot") == "".join(problem.shots) + f"Q: {problem.question}\nA:"
    assert problem.meta["difficulty"] in range(2, 7) and problem.meta["needed"]
    for name in problems.NAMES:
        assert len(tokenizer.encode(f" {name}")) == 1


def test_splits_are_disjoint_and_rows_are_the_same_every_time(made):
    numbers = {}
    for split in problems.SPLITS:
        part = [make_scene(int(row["id"].split("-")[1])) for row in rows(split, 80)]
        assert all(split_of(scene) == split for scene in part)
        numbers[split] = {(scene.asked.factor, *(t[:2] + t[3:] for t in scene.asked.terms)) for scene in part}
    assert not numbers["train"] & numbers["test"] and not numbers["train"] & numbers["validation"]
    assert rows("train", 3, start=5) == made[5:8]
    code = "import json; from minicot.toy.shots import rows; print(json.dumps(rows('train', 2)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == made[:2]
    with pytest.raises(ValueError, match="split is 'dev'; allowed: train, validation, test"):
        rows("dev", 1)


def test_the_base_learns_from_other_scenes():
    ours = {row["id"] for row in rows("train", 50)}
    theirs = {row["id"] for row in rows("train", 50, first_seed=shots.FIRST_SEED)}
    assert not ours & theirs and min(int(name.split("-")[1]) for name in theirs) >= shots.FIRST_SEED


# ---- words and what is left out ----------------------------------------------------------------------------


def test_kinds_of_words_by_hand():
    shot = "Q: Kim has 2 Zoe bags. Ana is 9. How many pens?\nA: Step by step. 2 Zoe x 6 = 12. #### 12\n\n"
    kinds = word_kinds(shot)
    said = lambda kind: [word.strip() for word, found in kinds if found == kind]
    assert "".join(word for word, _ in kinds) == shot
    assert said("number") == ["2", "2", "6", "12", "12"]
    assert said("operator") == ["x", "="]
    assert said("unit") == ["Zoe", "bags", "Zoe"]
    assert " ".join(said("filler")) == "Ana is 9 . Step by step ."
    assert said("other") == [*"Q:", "Kim", "has", ".", "How", "many", "pens", "?", "", *"A:", ".", "####", ""]


def test_two_fifths_of_the_words_are_filler_of_many_forms(made):
    kinds = [pair for row in made for shot in row["shots"] for pair in word_kinds(shot)]
    share = sum(kind == "filler" for _, kind in kinds) / len(kinds)
    assert 0.34 < share < 0.43
    told = "".join(word for word, kind in kinds if kind == "filler")
    assert len(set(told.split("."))) > 300
    for row in made[:40]:
        for shot in row["shots"]:  # what is no filler is the exercise, whole
            core = "".join(word for word, kind in word_kinds(shot) if kind != "filler")
            assert re.fullmatch(
                r"Q: [A-Z]\w+ (has|owns|had) \d[^.]*\. How many [\w ]+\?\nA:( [^.]+\.)+ #### \d+\n\n", core
            )


def test_variants_leave_out_what_their_names_say(made):
    for row in made[:40]:
        vary = {name: change(row) for name, change in VARIANTS.items()}
        assert vary["all"] == row and vary["none"]["shots"] == []
        assert len(vary["needed"]["shots"]) + len(vary["others"]["shots"]) == len(row["shots"])
        assert vary["needed"]["needed"] == list(range(len(row["needed"]))) and vary["others"]["needed"] == []
        assert set(vary["needed"]["shows"]) == set(row["units"])
        assert not set(vary["others"]["shows"]) & set(row["units"])
        assert not any(re.search(r"\b(?:inn|hall|Step|is)\b", shot) for shot in vary["no-filler"]["shots"])
        lacking = [
            re.sub(r" is \d|day \d", "", shot) for shot in vary["no-numbers"]["shots"]
        ]  # filler's stay
        assert not any(re.search(r"\d", shot) for shot in lacking)
        assert all(other["question"] == row["question"] for other in vary.values())


def test_thinned_rows_keep_what_is_needed_in_most(made):
    thin = [thinned(row, 8) for row in made]
    assert thin == [thinned(row, 8) for row in made]
    assert all(one["solution"] == row["solution"] for one, row in zip(thin, made))
    assert 0.9 < sum(bool(one["needed"]) for one in thin) / len(thin) < 1
    assert {len(one["shots"]) for one in thin} >= {1, 2, 4, 6, 8}
    lengths = [sum(map(len, one["shots"])) / sum(map(len, row["shots"])) for one, row in zip(thin, made)]
    assert 0.1 < sum(length == 1 for length in lengths) / len(lengths) < 0.5
    assert max(len(one["shots"]) - len(one["needed"]) for one in (thinned(row, 1) for row in made)) == 1


def test_drills_ask_for_what_they_tell():
    for row in drill_rows(40):
        told = dict(re.findall(r"([A-Z]\w+)(?:: \w+| x) (\d)", row["question"]))
        asked = re.findall(r"([A-Z]\w+) (?:has|x) (\d)", row["solution"])
        assert len(told) == 4 and len(asked) == 8
        assert all(told[name] == value for name, value in asked)


def test_the_command_writes_what_the_base_is_made_of(tmp_path):
    command = [sys.executable, "-m", "minicot.toy.shots"]
    subprocess.run(
        [*command, "--rows", "4", "--test", "3", "--out", tmp_path], check=True, capture_output=True
    )
    sizes = {path.stem: len(path.read_text().splitlines()) for path in tmp_path.glob("*.jsonl")}
    assert sizes == {"drill": 2, "short": 4, "full": 2, "more": 2, **{f"test-{name}": 3 for name in VARIANTS}}
    assert [problem.shots for problem in read_problems(str(tmp_path / "test-none.jsonl"))] == [[]] * 3
    assert [problem.meta["needed"] for problem in read_problems(str(tmp_path / "test-needed.jsonl"))][0][
        0
    ] == 0
    done = subprocess.run([*command, "--rows", "0", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "--rows is 0" in done.stderr


def test_the_set_has_a_name():
    problem = read_problems("toy-shots", "test", limit=1)[0]
    assert row_of(make_scene(int(problem.id.split("-")[1])))["shots"] == problem.shots
    assert [one.id for one in read_problems("toy-shots", "test[2:4]", limit=2)] == [
        row["id"] for row in rows("test", 4)[2:]
    ]
