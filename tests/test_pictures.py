"""The built-in world in pictures: what is drawn is what is asked, and blind guesses fail."""

import collections
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minicot.answers import extract_answer, is_correct
from minicot.tokenizer import Tokenizer
from minicot.toy import pictures, problems, teacher
from minicot.toy.base_text import STAGES, as_files, caption_rows, cell_rows, listed, recall, seeing_rows
from minicot.toy.pictures import COLOURS, KINDS, LARGEST, chain, draw, glyphs, grade
from minicot.toy.pictures import in_picture, label_steps, make_picture, make_problem, perception_rows
from minicot.toy.pictures import read_from, reading_rows, row_of, rows, scene_of, split_of
from minicot.toy.problems import ITEMS, NAMES, WORDINGS

BASE = Path(problems.__file__).parent / "base"


@pytest.fixture(scope="module")
def scenes():
    return [make_picture(seed, kind) for kind in KINDS for seed in range(300)]


def kind_of(scene):
    return scene.id.split("-")[0]


# ---- what is drawn -----------------------------------------------------------------------------------------


def find(canvas, x, y, signs, colour=None):
    """The sign whose pixels are exactly those (of a colour) in its box at (x, y); None for an empty box."""
    bitmaps = {sign: glyphs()[sign] for sign in signs}
    height, width = next(iter(bitmaps.values())).shape
    box = canvas[y : y + height, x : x + width]
    drawn = (box == (colour or (0, 0, 0))).all(-1)
    return next((sign for sign, bitmap in bitmaps.items() if (drawn == bitmap).all()), None)


def name_at(canvas, x, y):
    found = "".join(find(canvas, x + 5 * i, y, "ABEIJKLMNOSTVXZ") or "" for i in range(3))
    return found.capitalize() or None


def item_at(canvas, x, y):
    return next((item for item in ITEMS if find(canvas, x, y, [item], COLOURS[item])), None)


def read_rows(canvas):
    for y in range(0, 64, 16):
        cells = [item_at(canvas, 16 + 8 * i, y + 8 * j) for i in range(6) for j in range(2)]
        if name_at(canvas, 1, y):
            (item,) = set(cells) - {None}
            yield name_at(canvas, 1, y), item, len(cells) - cells.count(None)


def read_bars(canvas):
    """A bar's height on the axis, whose numbers stand just below their lines."""
    levels = {int(find(canvas, 10, y + 1, "0123456789") + ""): y for y in (40, 24)}
    assert find(canvas, 5, 9, "0123456789") + find(canvas, 10, 9, "0123456789") == "12"
    unit = (levels[4] - levels[8]) / 4
    assert (canvas[[8, 24, 40], 16:64:16] == pictures.GREY).all()
    for x in (16, 32, 48):
        tops = [y for y in range(8, 57) if (canvas[y:56, x + 8] == canvas[55, x + 8]).all()]
        yield name_at(canvas, x + 1, 57), item_at(canvas, 0, 0), (levels[4] - min(tops)) / unit + 4


def read_table(canvas):
    for y in (16, 32, 48):
        for x in (16, 48):
            item = item_at(canvas, x + 4, 0)
            assert item_at(canvas, x + 4, y + 8) == item
            digits = [find(canvas, x + 2 + 8 * i, y, "0123456789") or "" for i in range(2)]
            yield name_at(canvas, 1, y), item, int("".join(digits))


def test_every_number_name_and_thing_can_be_read_back_from_the_pixels(scenes):
    reader = {"rows": read_rows, "bars": read_bars, "table": read_table}
    for scene in scenes:
        canvas = np.array(draw(scene.id))
        assert canvas.shape == (64, 64, 3) and canvas.dtype == np.uint8
        shown = [(q.who, q.item, q.value) for q in in_picture(scene)]
        assert list(reader[kind_of(scene)](canvas)) == shown, scene.id
        assert all(2 <= value <= LARGEST[kind_of(scene)] for _, _, value in shown)


def test_names_digits_and_things_look_different_and_fit():
    """Guards against two names or things that a patch cannot tell apart."""
    assert len({glyphs()[item].tobytes() for item in ITEMS}) == len(ITEMS) == len(set(COLOURS.values()))
    assert len({glyphs()[sign].tobytes() for sign in "ABEIJKLMNOSTVXZ0123456789"}) >= 24  # O is 0
    assert {bitmap.shape for bitmap in glyphs().values()} == {(7, 4), (7, 7)}
    assert set("".join(NAMES).upper()) <= set(glyphs()) and {len(name) for name in NAMES} == {3}


def test_a_picture_is_the_same_on_every_call_and_in_every_process():
    code = (
        "import hashlib, json; from minicot.toy.pictures import draw, rows\n"
        "found = rows('test', 6)\n"
        "print(json.dumps(found), [hashlib.sha256(draw(r['id']).tobytes()).hexdigest() for r in found])"
    )
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
    found = rows("test", 6)
    assert len(printed) == 1 and printed.pop().startswith(json.dumps(found))
    assert draw(found[0]["id"]).tobytes() == draw(found[0]["id"]).tobytes()


def test_the_world_in_pictures_is_the_one_that_the_shipped_base_and_the_published_figures_know():
    """Guards against a change of the generator that leaves base weights, sample files and tables behind."""
    found = rows("train", 50) + rows("test", 50)
    numbers = [{k: row[k] for k in row if k != "solution"} for row in perception_rows("train", 50)]
    text = json.dumps([found, caption_rows("train", 50), numbers])
    pixels = b"".join(draw(row["image"].removeprefix("toy:")).tobytes() for row in found)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "e21654b6ade37e84"
    assert hashlib.sha256(pixels).hexdigest()[:16] == "5b3b2ca5c9a8d43c"


# ---- rows --------------------------------------------------------------------------------------------------


def test_a_picture_is_asked_and_solved_word_by_word():
    row = make_problem(0, kind="bars", difficulty=2, wording="plain")
    assert row == {
        "id": "bars-0-2",
        "image": "toy:bars-0-2",
        "difficulty": 2,
        "answer": "20",
        "shown": 3,
        "question": "Lea has 7 more books than Mia. How many books do Lea and Ben have together?\n<image>",
        "solution": "Ben has 3.\nTom has 9.\nMia has 10.\nLea has 10 + 7 = 17.\n"
        "Together they have 17 + 3 = 20.\n#### 20",
        "steps": [
            "Ben has 3.",
            "Tom has 9.",
            "Mia has 10.",
            "Lea has 10 + 7 = 17.",
            "Together they have 17 + 3 = 20.",
        ],
        "caption": "Ben has 3 books. Tom has 9 books. Mia has 10 books.",
        "facts": [
            "Ben has 3 books.",
            "Tom has 9 books.",
            "Mia has 10 books.",
            "Lea has 7 more books than Mia.",
        ],
        "uses": [[0], [1], [2], [2, 3], [0]],
    }


def test_every_wording_of_every_scene_is_labelled_right_and_graded_one(scenes):
    for scene in scenes:
        for wording in WORDINGS:
            row = row_of(scene, wording=wording)
            assert all(label_steps(row, row["steps"])) and grade(scene.id, row["solution"]) == 1.0, row
            assert extract_answer(row["solution"], "hash") == row["answer"]


def test_the_first_steps_say_what_was_read_and_each_step_names_the_facts_that_it_uses(scenes):
    for scene in scenes:
        row = row_of(scene, wording="items")
        n = len(read_from(scene))
        assert row["steps"][:n] == [row["facts"][used[0]] for used in row["uses"][:n]]
        assert all(len(used) == 1 and used[0] < row["shown"] for used in row["uses"][:n])
        assert len(row["steps"]) == len(row["uses"]) == n + row["difficulty"] == len(chain(scene))
        read = {used[0] for used in row["uses"][:n]}
        later = {place for used in row["uses"][n:] for place in used}
        assert len({place for place in later if place < row["shown"]} & read) > 1  # one is not enough


def test_a_question_never_tells_what_the_picture_shows(scenes):
    for scene in scenes:
        row = row_of(scene)
        for name in {q.who for q in in_picture(scene)}:
            assert f"{name} has" not in row["question"] and f"{name} owns" not in row["question"]
        assert row["question"].startswith(" ".join(row["facts"][row["shown"] :]))
        numbers = re.findall(r"\d+", row["question"]) + [
            str(q.value) for q in in_picture(scene) if q.item == scene.asked.item
        ]
        assert row["answer"] not in numbers and re.fullmatch(r"\w+( \S+)+\n<image>", row["question"])


def test_a_caption_tells_the_whole_picture_and_a_perception_question_one_number_of_it():
    problems_, captions, reads = rows("train", 200), caption_rows("train", 200), perception_rows("train", 200)
    for row, caption, read in zip(problems_, captions, reads):
        scene = scene_of(row)
        told = re.findall(r"(\w+) has (\d+) (\w+)\.", caption["solution"])
        assert told == [(q.who, str(q.value), q.item) for q in in_picture(scene)]
        assert caption["solution"] == row["caption"] and caption["image"] == read["image"] == row["image"]
        who, number, item = told[read["fact"]]
        assert read["question"] == f"How many {item} does {who} have?\n<image>" and read["answer"] == number
        assert (who, item) not in {(w, i) for k, (w, _, i) in enumerate(told) if k != read["fact"]}
    assert len({row["id"] for row in problems_ + captions + reads}) == 600


def test_a_reading_is_how_a_solution_begins_and_computes_nothing():
    for row, reading in zip(rows("train", 200), reading_rows("train", 200)):
        reads = len(pictures.read_from(scene_of(row)))
        assert reading["solution"] == "\n".join(row["steps"][:reads]) and reading["image"] == row["image"]
        facts, asked = " ".join(row["facts"][row["shown"] :]), scene_of(row).asked.item
        assert reading["question"] == f"{facts} How many {asked} does each have in the picture?\n<image>"


def test_what_gives_the_base_eyes_works_on_no_picture():
    for name, (_, _, shares) in STAGES.items():
        found = seeing_rows(400, 0, shares)
        assert len({row["id"] for row in found}) == len(found) > 360, name
        shown = [row for row in found if "image" in row]
        assert shown
        assert all(("<image>" in row["question"]) == ("image" in row) for row in found)
        assert not any("=" in row["solution"] or "####" in row["solution"] for row in shown), name
        worked = sum("####" in row["solution"] for row in found)
        worded = sum(shares.get(kind, 0) for kind in ("told", "listed"))
        assert worked == round(400 * worded), name


@pytest.mark.parametrize("how", ["echo", "say", "plain", "lines"])
def test_what_is_recalled_stands_in_the_question(how):
    rng = random.Random(0)
    for _ in range(50):
        row = recall(rng, how)
        told, said = (
            re.findall(r"([A-Z]\w+):? (?:[a-z]+ )?(\d+)( \1)?", row[key]) for key in ("question", "solution")
        )
        assert len(said) == 2 * len(told) and len(dict(one[:2] for one in told)) == len(told) in (3, 4, 5)
        assert set(said) <= set(told) and all(bool(one[2]) == (how in ("echo", "say")) for one in told)


def test_cells_name_the_thing_before_the_number_in_either_order():
    orders = collections.Counter()
    for row in cell_rows("train", 60):
        shown = in_picture(scene_of(row["image"][4:]))
        for line in row["solution"].removesuffix(".").split(". "):
            who, cells = line.split(": ")
            found = [tuple(cell.split()) for cell in cells.split(", ")]
            true = [(one.item, str(one.value)) for one in shown if one.who == who]
            assert sorted(found) == sorted(true) and len(found) == 2
            orders[found == true] += 1
    assert min(orders.values()) > 60


def test_half_of_the_readings_are_of_files_that_look_like_the_arrays(tmp_path):
    plain = seeing_rows(100, 0, {"reading": 1.0, "caption": 0.1})
    rows = list(as_files(plain, tmp_path / "pictures"))
    files = [row for row in rows if row["image"].startswith("pictures/")]
    assert [{**row, "image": ""} for row in rows] == [{**row, "image": ""} for row in plain]
    assert 30 < len(files) < 70 and all(row["id"].endswith("-reading") for row in files)
    sizes = set()
    for row in files:
        with Image.open(tmp_path / row["image"]) as picture:
            sizes.add(picture.size)
            small = np.asarray(picture.convert("RGB").resize((64, 64), Image.Resampling.BOX), float)
        far = {
            other["id"]: abs(small - np.asarray(draw(other["id"].removesuffix("-reading")), float)).mean()
            for other in files
        }
        assert sorted(far, key=far.get)[0] == row["id"] and 1.5 * far.pop(row["id"]) < min(far.values())
    assert len(sizes) > 20 and min(sizes)[0] >= 64 and max(sizes)[0] <= 320


def test_a_list_of_what_a_picture_shows_keeps_names_and_numbers_apart():
    row = next(row for row in rows("train", 20) if row["id"].startswith("table"))
    shown = in_picture(scene_of(row))
    names, *numbers = listed(row).removesuffix(".").split(". ")
    assert names == ", ".join(dict.fromkeys(one.who for one in shown)) and len(numbers) == 2
    for item, told in (one.split(": ") for one in numbers):
        assert told == ", ".join(str(one.value) for one in shown if one.item == item)


def test_no_two_splits_share_the_numbers_of_a_picture():
    seen = {
        split: {tuple(q.value for q in in_picture(scene_of(row))) for row in rows(split, 700)}
        for split in problems.SPLITS
    }
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["test"] & seen["validation"] and min(map(len, seen.values())) > 300
    counts = collections.Counter(split_of(make_picture(seed)) for seed in range(2000))
    assert 0.76 < counts["train"] / 2000 < 0.84 and 0.07 < counts["test"] / 2000 < 0.13


def test_rows_are_the_same_list_wherever_they_start_and_of_the_kind_that_was_asked_for():
    ten = rows("test", 10, kind="table", difficulty=3)
    assert rows("test", 4, start=6, kind="table", difficulty=3) == ten[6:]
    assert all(row["id"].startswith("table-") and row["difficulty"] == 3 for row in ten)
    kinds = collections.Counter(row["id"].split("-")[0] for row in rows("train", 600))
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 150
    assert all(scene_of(row) == make_picture(int(row["id"].split("-")[1]), "table", 3) for row in ten)


def test_what_is_no_picture_is_refused_with_what_is_allowed():
    for bad in ("toy-3-2-0", "pies-3-2", "rows-3", "rows-3-6", "rows--3-2", "rows-3-2-fact0"):
        with pytest.raises(ValueError, match="allowed"):
            draw(bad)
    with pytest.raises(ValueError, match="'pies'.*rows, bars, table"):
        rows("train", 1, kind="pies")
    with pytest.raises(ValueError, match="difficulty 6; allowed.*1 to 5"):
        make_picture(1, difficulty=6)
    with pytest.raises(ValueError, match="'dev'.*validation"):
        caption_rows("dev", 1)
    assert scene_of("toy-3-2-0") == problems.scene_of("toy-3-2-0") and not in_picture(scene_of("toy-3-2-0"))
    text = problems.make_problem(3)
    assert grade(text, text["solution"]) == 1.0 and all(label_steps(text, text["steps"]))


# ---- the blind ---------------------------------------------------------------------------------------------


def blind_share(scene):
    """How often the best guess is right that knows the whole question but not the picture: the share of the
    commonest answer over all numbers that the picture could show."""
    places = [place for place in scene.needed if scene.quantities[place].kind == "given"]
    numbers = np.arange(2, LARGEST[kind_of(scene)] + 1)
    grid = dict(zip(places, (axis.ravel() for axis in np.meshgrid(*[numbers] * len(places)))))
    fair = np.ones_like(grid[places[0]], bool)
    told = [place for place in scene.needed if place not in grid]
    for place, quantity in [(place, scene.quantities[place]) for place in told] + [(None, scene.asked)]:
        given = (2,) if quantity.kind == "half" else quantity.numbers
        a, b = ([grid[p] for p in quantity.of] + list(given) + [0])[:2]
        symbol = problems.FACTS[quantity.kind][0]
        grid[place] = {
            "+": lambda: a + b,
            "-": lambda: a - b,
            "x": lambda: a * b,
            "/": lambda: a // b,
            None: lambda: a,
        }[symbol]()
        fair &= (grid[place] >= 2) & (grid[place] <= (problems.LARGEST if place is not None else 120))
        fair &= (a % b == 0) if symbol == "/" else True
    for place, values in grid.items():
        fair &= (values != grid[None]) | (place is None) | ((place,) == scene.asked.of)
    fair &= ~np.isin(grid[None], [n for p in told for n in scene.quantities[p].numbers])
    counts = np.bincount(grid[None][fair])
    assert counts[scene.asked.value] > 0
    return counts.max() / counts.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_blind_guess_is_right_at_most_one_time_in_ten(kind, scenes):
    """Guards against questions that need no picture. One answer to all questions does worse still."""
    own = [scene for scene in scenes if kind_of(scene) == kind]
    assert np.mean([blind_share(scene) for scene in own]) < 0.10
    answers = collections.Counter(row["answer"] for row in rows("test", 600, kind=kind))
    assert answers.most_common(1)[0][1] / 600 < 0.08 and len(answers) > 40


# ---- the oracle and the teacher ----------------------------------------------------------------------------


def test_a_misread_number_is_a_wrong_step_and_so_is_all_that_rests_on_it(scenes):
    for scene in scenes[::3]:
        for wording in WORDINGS:
            row = row_of(scene, wording=wording)
            for i, quantity in enumerate(read_from(scene)):
                steps = list(row["steps"])
                steps[i] = pictures.write_step(scene, quantity, wording, (quantity.value + 1,))
                labels = label_steps(row, steps)
                assert labels == [j != i for j in range(len(steps))], steps  # the others stand as they are
    row = make_problem(0, kind="table", difficulty=2, wording="plain")
    other = next(q for q in in_picture(scene_of(row)) if q.item != scene_of(row).asked.item)
    assert label_steps(row, [f"{other.who} has {other.value} {other.item}."]) == [True]
    assert label_steps(row, [f"{other.who} has {other.value}."]) == [False]  # read in the wrong column
    assert label_steps(row, [f"{other.who}: {other.item} {other.value}."]) == [True]
    asked = scene_of(row).asked.item
    assert label_steps(row, [f"{other.who}: {asked} {other.value}."]) == [False]
    for unsaid in ("{p} {i} {c}.", "{i}: {p} {c}.", "{p}: {i} {c} {i}.", "{p} has {i} {c}.", "{i} {c}."):
        step = unsaid.format(p=other.who, i=other.item, c=other.value)
        assert label_steps(row, [step]) == [False], step


def test_every_mistake_of_the_teacher_is_caught_by_the_oracle_or_the_answer_check(scenes):
    rng = random.Random(0)
    for scene in scenes[::3]:
        row = row_of(scene)
        n = len(read_from(scene))
        for kind in teacher.MISTAKES:
            mistaken = teacher.corrupt(row, rng, kind)
            labels = label_steps(row, mistaken["steps"])
            right_answer = is_correct(extract_answer(mistaken["solution"], "hash"), row["answer"])
            assert right_answer == (kind == "skip") and all(labels) == (kind == "label"), mistaken
            assert len(mistaken["steps"]) == len(row["steps"]) - (kind == "skip")
            assert sum(labels[:n]) == n - (kind == "misread")
            assert kind != "misread" or not all(labels[n:])
            assert row == row_of(scene)


def test_a_misreading_is_carried_on_by_arithmetic_that_holds(scenes):
    rng = random.Random(1)
    evaluate = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__, "/": lambda a, b: a / b}
    for scene in scenes[::3]:
        text = teacher.corrupt(row_of(scene), rng, "misread")["solution"]
        equations = re.findall(r"(\d+) ([-+x/]) (\d+) = (\d+)", text)
        assert all(evaluate[op](int(a), int(b)) == int(c) for a, op, b, c in equations)
        assert equations[-1][3] == extract_answer(text, "hash")


def test_a_misreading_goes_further_where_no_small_one_stays_whole(scenes):
    row = row_of(scene_of("table-1755-5"))  # half of half of a sum: 1 to 3 more or less are never whole
    numbers = [q.value for q in read_from(scene_of(row))]
    for seed in range(5):
        steps = teacher.corrupt(row, random.Random(seed), "misread")["steps"]
        read = [int(re.findall(r"\d+", step)[0]) for step in steps[: len(numbers)]]
        [change] = [a - b for a, b in zip(read, numbers) if a != b]
        assert change in (-12, -8, -4, 4, 8, 12, 16)


def test_the_gold_answer_filter_rejects_a_part_of_what_a_noisy_teacher_says(scenes):
    rng, kept = random.Random(0), collections.defaultdict(list)
    for scene in scenes:
        row = row_of(scene)
        taught = teacher.teach(row, rng, 0.3)
        kept[taught["kind"]].append(is_correct(extract_answer(taught["solution"], "hash"), row["answer"]))
        assert (taught["kind"] == "right") == (grade(row, taught["solution"]) == 1.0)
    assert all(kept["right"]) and all(kept["skip"]) and set(kept) == {"right", *teacher.MISTAKES}
    assert not any(map(any, (kept[kind] for kind in ("misread", "label", "operation", "arithmetic"))))
    assert 0.18 < sum(len(v) - sum(v) for v in kept.values()) / len(scenes) < 0.30


def test_rewriting_and_unifying_keep_what_was_read(scenes):
    rng = random.Random(0)
    for scene in scenes[::5]:
        row, plain = row_of(scene), row_of(scene, wording="plain")
        rewritten = teacher.rewrite(row, rng)
        assert grade(row, rewritten["solution"]) == 1.0
        unified = teacher.unify(rewritten)
        assert sorted(unified["steps"]) == sorted(plain["steps"]) and grade(row, unified["solution"]) == 1.0
        numbered = {
            **row,
            "solution": "\n".join(f"Step {i}: {s}" for i, s in enumerate(row["steps"], 1))
            + f"\n†Answer: {row['answer']}",
        }
        assert teacher.unify(numbered)["solution"] == plain["solution"]
        with pytest.raises(ValueError, match="allowed: toy-"):
            teacher.harder(row, rng)  # another scene would need another picture


def test_the_base_tokenizer_has_a_token_for_each_word_of_the_pictures(scenes):
    tokenizer, lengths = Tokenizer(BASE), []
    for scene in scenes[::3]:
        row = row_of(scene)
        text = row["question"].removesuffix("\n<image>") + "\n" + row["solution"]
        lengths.append(len(tokenizer.encode(text)))
        for text in (text, row["caption"], " does each have?"):
            assert all(len(tokenizer.encode(word)) == 1 for word in re.findall(r" ?[A-Za-z#]+| ?\d", text))
    assert np.mean(lengths) < 90
