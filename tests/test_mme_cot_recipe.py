"""MME-CoT (arXiv 2502.09621): the recipe. Its numbers are the official ones of test_mme_cot.py; here: numbers
of single questions, what is taken of llava_reasoner, and a run whose scripts are played.

    F1 = 2 P R / (P + R),  P and R means over the questions that have a score
"""

import json
import random
import shutil
from pathlib import Path

import pytest

from minicot.mme_cot.judge import make_cache
from minicot.mme_cot.questions import METRICS, read_dataset, read_predictions
from minicot.mme_cot.scoring import headline, score
from minicot.recipes import llava_reasoner, mme_cot
from minicot.recipes.experiment import Experiment
from minicot.recipes.tables import read_results
from minicot.records import Problem, Response, Samples, read_jsonl, samples_to_row
from minicot.runs import write_json, write_jsonl
from minicot.toy import benchmark, pictures, teacher
from minicot.training import resolve

SPLITS = ("train", "validation", "test")
TINY = ("seeds=2", "skipped=0", "reasoning=6", "perception=4", "chains=6", "asked=4", "validation=4")
SMALL = dict(
    seeds=2, taught=40, easy=2, sampled=6, k=4, validation=4, test=4, pool=2, lrs=(1e-5,), one_rate=1e-5
)


# ---- numbers of single questions -----------------------------------------------------------------


def test_values_of_scores_leave_out_questions_without_one():
    """Of 1, none, 0: the mean is 1/2; the two that have a score pull at it, the other does not."""
    assert mme_cot.values_of([1, None, 0]) == pytest.approx([0.5 + 0.75, 0.5, 0.5 - 0.75])
    assert mme_cot.values_of([None, None]) == [] and mme_cot.values_of([0.25]) == [0.25]


def test_f1_of_single_questions_by_hand():
    """P = 1/2, R = 1: F1 = 2/3; dF1/dP = 2 / 1.5^2 = 8/9, so a P of 1 pulls it up by 4/9."""
    assert mme_cot.f1_values([1, 0], [1, 1]) == pytest.approx([2 / 3 + 4 / 9, 2 / 3 - 4 / 9])
    assert mme_cot.f1_values([0, 0], [0, 0]) == mme_cot.f1_values([], [1]) == []


def test_the_pull_of_a_question_is_f1s_derivative():
    rng = random.Random(0)
    p, r = ([rng.random() for _ in range(50)] for _ in range(2))
    f1 = lambda p, r: 2 * sum(p) * sum(r) / (sum(p) + sum(r)) / 50
    values, h = mme_cot.f1_values(p, r), 1e-6
    assert sum(values) / 50 == pytest.approx(f1(p, r))
    for place in (0, 17):
        moved = [[one + h * (i == place) for i, one in enumerate(scores)] for scores in (p, r)]
        slope_p, slope_r = (50 * (f1(*two) - f1(p, r)) / h for two in ((moved[0], r), (p, moved[1])))
        pull = slope_p * (p[place] - sum(p) / 50) + slope_r * (r[place] - sum(r) / 50)
        assert values[place] == pytest.approx(f1(p, r) + pull, abs=1e-4)


ROWS = benchmark.rows("test", 12, 8)


def answers(folder, solution_of):
    """DATASET.json and a model's samples of both prompts; solution_of(official row, toy row or None)."""
    files = [folder / name for name in ("dataset.jsonl", "cot.jsonl", "dir.jsonl")]
    write_jsonl(files[0], ROWS)
    for file in files[1:]:
        made = []
        for row in ROWS:
            scene = pictures.scene_of(row["image"].removeprefix("toy:"))
            toy = pictures.row_of(scene) if row["question_type"] == "Reasoning" else None
            asked = Problem(str(row["index"]), row["question"], row["answer"])
            text = solution_of(row, toy, file.stem)
            made.append(samples_to_row(Samples(asked, [Response(text)] if text is not None else [])))
        write_jsonl(file, made)
    return files


def noisy(row, toy, prompt):
    """Chains of which half are corrupt, some think again, one is no chain; direct answers, half of them."""
    rng = random.Random(f"{prompt} {row['index']}")
    if toy is None or prompt == "dir":
        return f"#### {row['answer'] if rng.random() < 0.5 else 99}"
    if row["index"] == 3:
        return "I cannot see the picture."
    if row["index"] % 3 == 0:
        return benchmark.reflective(toy, rng)["solution"]
    return teacher.corrupt(toy, rng, "misread")["solution"] if rng.random() < 0.5 else toy["solution"]


def mean(values):
    return sum(values) / len(values)


def test_the_means_of_single_questions_are_the_official_numbers(tmp_path):
    files = answers(tmp_path, noisy)
    mme_cot.judged(tmp_path / "results.json", *files, seed=0)
    found = json.loads((tmp_path / "results.json").read_text())
    questions = read_dataset(files[0], [])
    for prompt, file in (("cot", files[1]), ("dir", files[2])):
        rows, chat_of = read_predictions(file, questions, []), lambda step: benchmark.judge(step, ROWS)
        list(make_cache(rows, tmp_path / "cache", prompt, "m", chat_of, notes=[]))
    made = score(tmp_path / "cache", questions, [])[0]
    official = headline(made)["m"]
    for ours, theirs in {"f1": "F1", "precision": "P", "recall": "R", "relevance": "relevance"}.items():
        assert len(found[ours]) == 12 and mean(found[ours]) == pytest.approx(official[theirs], abs=3e-4), ours
    assert mean(found["reflection"]) == pytest.approx(official["reflection"], abs=1e-4)
    for name in ("robustness", "stability", "efficacy", "efficiency"):
        assert found[name] == official[name], name
    assert official["stability"] == mean(found["perception_cot"]) - mean(found["perception_dir"])
    assert official["efficacy"] == mean(found["reasoning_cot"]) - mean(found["reasoning_dir"])
    assert len(found["perception_dir"]) == 8 and 0 < mean(found["reasoning_cot"]) < 1
    valid = {metric: made["coverage.json"][metric]["m"]["valid"] for metric in METRICS}
    assert found["reflecting"] == valid["reflection_quality"] / 12 > 0
    assert found["of_recall"] == 1 and found["of_relevance"] == valid["relevance_rate"] / 12


def test_a_model_that_never_reflects_counts_1_within_efficiency(tmp_path):
    files = answers(tmp_path, lambda row, toy, prompt: toy["solution"] if toy else f"#### {row['answer']}")
    mme_cot.judged(tmp_path / "results.json", *files, seed=0)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["reflection"] == [] and found["reflecting"] == 0 and found["efficiency"] == 1
    assert mean(found["f1"]) == 1 and found["stability"] == found["efficacy"] == 0


def test_answers_that_say_nothing_have_no_f1(tmp_path):
    files = answers(tmp_path, lambda row, toy, prompt: "")
    mme_cot.judged(tmp_path / "results.json", *files, seed=0)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["f1"] == found["relevance"] == [] and found["of_precision"] == 0 and found["of_recall"] == 1
    assert mean(found["recall"]) == mean(found["reasoning_cot"]) == 0


# ---- the recipe ----------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The recipe at tiny sizes in a temporary folder, its scripts played: models are copies of the base,
    chains are the world's own or corrupt. `ran` are the scripts' words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llava_reasoner, "SIZES", llava_reasoner.SIZES | SMALL)
    monkeypatch.setitem(llava_reasoner.PICTURES, "splits", SPLITS)
    E, ran = Experiment("mme_cot", "MME-CoT", mme_cot.SIZES, mme_cot.FAST, **llava_reasoner.PICTURES), []
    E.results = tmp_path / "results"

    def command(words, log):
        ran.append(words)
        flags = dict(zip(words, words[1:]))
        out = Path(flags["--out"])
        if words[0] != "sample.py":
            shutil.copytree(resolve("toy-vision"), out, dirs_exist_ok=True)
        elif "--evaluate" in words:
            write_json(out, {"metrics": {"accuracy": float(len(ran))}})
        else:
            write_jsonl(out, map(played, (row for _, row in read_jsonl(flags["--data"])), [flags] * 10**4))

    monkeypatch.setattr(E, "command", command)
    E.ran = ran
    return E


def played(row, flags):
    """--n samples of a problem, in turn right and wrong; a model that reflects thinks again."""
    scene, made = pictures.scene_of(row["image"].removeprefix("toy:")), []
    toy, rng = pictures.row_of(scene), random.Random(f"{flags['--model']} {row['id']}")
    for i in range(int(flags["--n"])):
        right = (i + rng.randrange(2)) % 2 == 0
        answer = row["answer"] if right else "999"
        text = toy["solution"] if right else teacher.corrupt(toy, rng, "arithmetic")["solution"]
        if Path(flags["--model"]).parent.name.startswith("re"):
            text = benchmark.reflective(toy, rng)["solution"]
        if row["answer"] != toy["answer"] or flags.get("--mode") == "direct":
            text = f"#### {answer}"
        made.append(Response(f"{text} ", right))
    kept = {name: row[name] for name in ("question", "answer", "image")}
    return samples_to_row(Samples(Problem(str(row["id"]), **kept), made))


def run(E, *argv):
    tiny = ("--set", *TINY, "--splits", *SPLITS)
    E.main(mme_cot.declare, mme_cot.CLAIMS, mme_cot.COLUMNS, extra=mme_cot.extra, draw=mme_cot.draw,
           argv=["--jobs", "1", "--name", "tiny", *tiny, *argv])  # fmt: skip


def test_the_whole_recipe_with_its_scripts_played(recipe, tmp_path, capsys):
    run(recipe)
    printed = capsys.readouterr().out
    results = read_results(tmp_path / "results" / "tiny.json", recipe.world())
    names = [*mme_cot.BORROWED, "aft", "grpo", *mme_cot.SLIPS]
    assert list(dict.fromkeys(cell["name"] for cell in results["cells"])) == names
    assert [claim["id"] for claim in results["claims"]] == [claim["id"] for claim in mme_cot.CLAIMS]
    assert all(claim["seeds"] == 2 for claim in results["claims"])
    assert {claim["problems"] for claim in results["claims"]} == {4, 6}
    assert "| model | F1 | P | R |" in printed and "| QVQ-72B | 62.0 | 80.2 |" in printed
    page = (tmp_path / "results" / "tiny.md").read_text()
    assert "![tiny_accuracy](tiny_accuracy.svg)" in page
    figure = (tmp_path / "results" / "tiny_accuracy.svg").read_text()
    assert all(f">{name}<" in figure for name in names) and "efficiency (%)" in figure
    rows = {cell["name"]: cell["metrics"] for cell in results["cells"]}
    assert "reflection" in rows["reflect"] and "reflection" not in rows["both"]

    # models of llava_reasoner lie in its folders; AFT has DPO's pairs and words
    there = Path("runs/recipes/llava_reasoner")
    assert {folder.name for folder in there.iterdir() if folder.is_dir()} == {
        f"{name}{label}-s{seed}"
        for name, label in (*((mix, "") for mix in ("format", "direct", "cot", "both")), ("dpo", "-lr1e-05"))
        for seed in (10, 11)
    }
    flags = lambda method: [words for words in recipe.ran if method in words][0]
    same = ("--samples", "--truncate-words", "--init", "--epochs")
    for flag in same:
        aft, dpo = (words[words.index(flag) + 1] for words in (flags("aft"), flags("dpo")))
        assert aft == dpo, flag
    assert all("--no-reference" in flags(method) for method in ("aft", "dpo"))
    assert flags("grpo")[flags("grpo").index("--init") + 1] == flags("dpo")[flags("dpo").index("--init") + 1]
    for name in mme_cot.SLIPS:
        [words] = [words for words in recipe.ran if words[-3].endswith(f"tiny/{name}-s11/model")]
        assert words[words.index("--init") + 1] == str(there / "cot-s11/model")


def test_models_that_llava_reasoner_left_are_taken_as_they_are(recipe, monkeypatch):
    """Run the recipe of llava_reasoner for these models, then this one: none of them is made again."""
    sizes = llava_reasoner.SIZES, llava_reasoner.FAST
    other = Experiment("llava_reasoner", "", *sizes, **llava_reasoner.PICTURES)
    monkeypatch.setattr(other, "command", recipe.command)
    other.parse(["--jobs", "1"])
    llava_reasoner.declare(other)
    models = {cell.name: cell for cell in other.models}
    for name in mme_cot.BORROWED:
        other.chosen[name] = {"lr": 1e-5} if name == "dpo" else {}
        for seed in range(2):
            other.path(models[name], seed)
    made = [words for words in recipe.ran if words[0] != "sample.py"]
    assert len(made) == 10
    del recipe.ran[:]
    run(recipe)
    again = [words for words in recipe.ran if words[0] != "sample.py"]
    assert len(again) == 2 * 3 + 2 * (len(mme_cot.SIZES["lrs"]) + 1)
    assert all(words not in made for words in again)


def test_the_recipe_wants_pictures_whose_scenes_are_known(recipe):
    with pytest.raises(SystemExit) as stop:
        run(recipe, "--data", "toy", "--init", "toy")
    assert stop.value.code == 2


def test_where_it_looks_by_hand(tmp_path):
    rows = pictures.perception_rows("test", 40)
    [first, later] = [
        next(row for row in rows if (row["fact"] > 0) == is_later) for is_later in (False, True)
    ]
    chain = pictures.rows("test", 1)[0]
    wrong = chain["solution"].replace(chain["solution"].split(".")[0], "Max: pens 99")
    answered = [(first, "x", True), (first, "x", False), (later, "x", False), (later, "x", True)]
    answered += [(chain, chain["solution"], True), (chain, wrong, True), (chain, "#### 3", True)]
    samples = [
        Samples(Problem(str(i), row["question"], image=row["image"]), [Response(text, correct=right)])
        for i, (row, text, right) in enumerate(answered)
    ]
    write_jsonl(tmp_path / "s.jsonl", map(samples_to_row, samples))
    said = mme_cot.where_it_looks([tmp_path / "s.jsonl", tmp_path / "s.jsonl"])
    kinds = [row["image"].removeprefix("toy:").partition("-")[0] for row in (first, later)]
    assert f"{kinds[0]}, first 50.0%" in said and f"{kinds[1]}, later 50.0%" in said
    assert "all numbers of a chain 33.3%" in said


def test_chains_that_reflect_are_of_the_same_problems_and_end_right():
    plain, reflect, recheck = (mme_cot.chains(30, slip) for slip in mme_cot.SLIPS.values())
    assert [row["id"] for row in plain] == [row["id"] for row in reflect] == [row["id"] for row in recheck]
    for row, thought in zip(plain, recheck):
        again = [step.removeprefix(benchmark.WAIT) for step in thought["steps"]]
        assert list(dict.fromkeys(again)) == row["steps"] and len(again) == len(row["steps"]) + 1
    bare = lambda row: [step.removeprefix(benchmark.WAIT) for step in row["steps"]]
    wrong = sum(False in pictures.label_steps(row["id"], bare(row)) for row in reflect)
    assert 5 < wrong < 25 and all(row["solution"].endswith(f"#### {row['answer']}") for row in reflect)
    assert reflect == mme_cot.chains(30, 0.5)
