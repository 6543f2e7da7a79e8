"""The recipes' engine: cells run once, settings are chosen on validation problems, claims are judged by their
interval, the table and the page are made of the results alone."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minicot.errors import InputError
from minicot.recipes import aft, cot_max, cot_max_text, grpo, llava_reasoner, llava_verifier, mme_cot
from minicot.recipes import ursa, ursa_grpo, ursa_text, work
from minicot.recipes.experiment import RESULTS, Experiment, Next
from minicot.recipes.tables import BY_HAND, claims, judge_all, numbers, pack, read_results, sides, tables
from minicot.recipes.tables import unpack
from minicot.recipes.tables import write_page
from minicot.runs import write_json
from tests.test_layout import ROOT

# ---- a recipe that a paper's reader would write --------------------------------------------------

MADE_UP = '''
from minicot.recipes.experiment import Experiment
from minicot.recipes.tables import claims

CLAIMS = claims("""
a|accuracy|aft|vft|up|AFT beats VFT
b|accuracy|vft|   |below 0.9|VFT leaves room
""")
COLUMNS = {"model": {"accuracy": "{accuracy:.1%}", "over VFT": ("accuracy", "vft")}}


def declare(E):
    vft = E.model("vft", "train.py", init=E.init, data=E.data, limit=64, steps=2, eval_split="")
    samples = E.samples("samples", vft, split=E.train, limit=E.size.problems, n=4, max_new_tokens=8)
    rates = dict(lr=(1e-5, 1e-4))
    E.model("aft", "align.py", init=vft, samples=samples, steps=2, batch_size=2, probe_every=0, grid=rates)
    E.choose_by("metrics.accuracy", split=E.validation, limit=8, max_new_tokens=8)
    E.read("test", split=E.test, limit=8, max_new_tokens=8, take={"accuracy": "correct"})


E = Experiment("made_up", "A paper that nobody wrote", dict(seeds=1, problems=6), fast={}, results="results")
'''


def test_a_recipe_of_25_lines_trains_samples_aligns_judges_and_prints(tmp_path, monkeypatch, capsys):
    assert len(MADE_UP.strip().splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    recipe = {}
    exec(MADE_UP, recipe)
    run = lambda *argv: recipe["E"].main(recipe["declare"], recipe["CLAIMS"], recipe["COLUMNS"], argv=argv)
    run("--jobs", "1")
    printed = capsys.readouterr().out
    commands = [line for line in printed.splitlines() if line.startswith("python ")]
    scripts = [command.split()[1] for command in commands]
    # two settings are aligned and validated at the first seed; the chosen one meets the test problems
    assert sorted(scripts) == ["align.py"] * 2 + ["sample.py"] * 5 + ["train.py"]
    assert all(f"| {model} | 0.0% |" in printed for model in ("vft", "aft"))
    assert "| a. AFT beats VFT | +0.000 [+0.000, +0.000] | not seen |" in printed
    assert "| grid, first seed, validation | lr 1e-05 | lr 0.0001 |" in printed
    results = json.loads((tmp_path / "results" / "made_up.json").read_text())
    assert results["grid"][0].keys() == {"name", "settings", "score"} and results["cell_minutes"] > 0
    page = (tmp_path / "results" / "made_up.md").read_text()
    assert page.startswith("# A paper that nobody wrote") and "| b. VFT leaves room |" in page
    [chains] = (tmp_path / "runs").rglob("samples.html")  # of the first seed alone
    assert (chains.parent / "samples.jsonl").is_file() and "samples/samples.jsonl</th>" in chains.read_text()

    exec(MADE_UP, recipe)  # a second call finds all its cells; --table makes none
    run("--jobs", "1")
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    run("--table")
    assert "| a. AFT beats VFT |" in capsys.readouterr().out


# ---- cells ---------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An experiment in a temporary folder whose scripts are not run: their words are noted, their output is
    a file that holds the words."""
    monkeypatch.chdir(tmp_path)

    def make(declare=None, argv=("--jobs", "1"), sizes=None, **options):
        E = Experiment("e", "E", {"seeds": 2, **(sizes or {})}, dict(seeds=1), results="results", **options)
        E.ran = []

        def command(words, log):
            E.ran.append(words)
            out = words[words.index("--out") + 1]
            value = len(words) if "--lr" not in words else float(words[words.index("--lr") + 1])
            write_json(out, {"metrics": {"accuracy": value}, "correct": [1, 0, 1]})

        E.command = command
        E.parse(list(argv))
        if declare:
            declare(E)
        return E

    return make


def test_a_cell_is_made_again_only_when_its_command_or_an_input_changes(toy, tmp_path):
    (tmp_path / "data.jsonl").write_text("one\n")

    def once(lr=1e-3, argv=()):
        E = toy(argv=("--jobs", "1", *argv))
        model = E.model("m", "train.py", data="data.jsonl", lr=lr, margin=None)
        E.path(model, 0)
        return E.ran

    [words] = once()
    assert words[:2] == ["train.py", "--overwrite"] and "--margin" not in words
    assert [words[words.index(f"--{flag}") + 1] for flag in ("lr", "seed")] == ["0.001", "0"]
    assert not once() and once(1e-4)
    assert not once(1e-4)
    (tmp_path / "data.jsonl").write_text("two\n")
    assert once(1e-4) and once(1e-4, ["--fresh"]) and not once(1e-4)
    mark = json.loads((tmp_path / "runs" / "recipes" / "e" / "m-s0" / "cell.json").read_text())
    assert mark.keys() == {"command", "inputs", "commit", "minutes"} and list(mark["inputs"]) == [
        "data.jsonl"
    ]


def test_a_cell_may_be_the_command_of_a_module(toy, tmp_path):
    E = toy()
    E.path(E.model("m", "minicot.mme_cot", "score", data="FILE"), 0)
    assert E.ran == [
        ["-m", "minicot.mme_cot", "score", "--overwrite", "--data", "FILE", "--seed", "0"]
        + ["--out", "runs/recipes/e/m-s0/model", "--device", "cpu"]
    ]
    Experiment.command(E, ["-m", "minicot.mme_cot", "score", "--help"], log := tmp_path / "log.txt")
    assert "--dataset" in log.read_text()  # found from any folder


def test_the_base_model_counts_among_a_cells_inputs(toy, monkeypatch):
    def cell():
        E = toy()
        E.path(E.model("m", "train.py", init="toy", data="toy"), 0)
        return E.ran

    assert cell() and not cell()
    monkeypatch.setattr(work, "weights_digest", lambda folder: "another base" * 2)
    assert cell()


def test_what_a_cell_needs_is_made_first_and_once(toy):
    E = toy()
    base = E.model("base", "train.py", init="toy")
    drawn = E.samples("drawn", base, limit=3)
    one, two = (E.model(name, "align.py", init=base, samples=drawn) for name in ("one", "two"))
    E.path(one, 1), E.path(two, 1)
    assert [words[0] for words in E.ran] == ["train.py", "sample.py", "align.py", "align.py"]
    assert all(words[words.index("--seed") + 1] == "1" for words in E.ran)
    made = E.ran[2]
    assert made[made.index("--samples") + 1] == "runs/recipes/e/base-s1/drawn/samples.jsonl"
    E.path(E.model("three", "align.py", init=Next(base)), 1)  # the model of the next seed, here the first
    assert E.ran[-1][E.ran[-1].index("--init") + 1] == "runs/recipes/e/base-s0/model"


def test_every_method_gets_the_whole_grid_at_the_first_seed_and_the_best_is_chosen(toy):
    def declare(E):
        E.tried = E.model("tried", "align.py", grid=dict(lr=(1e-4, 3e-4, 1e-3)))
        E.twin = E.model("other@twin", "align.py", at=(E.tried, "lr"))
        E.choose_by("metrics.accuracy", split="validation")
        E.read("test", split="test", take={"accuracy": "correct"})

    E = toy(declare)
    E.command = lambda words, log: E.ran.append(words) or write_json(
        words[words.index("--out") + 1],
        {"metrics": {"accuracy": {"0.0001": 0.2, "0.0003": 0.7, "0.001": 0.7}.get(rate_of(words), 0)},
         "correct": [1, 0, 1]},
    )  # fmt: skip
    results = E.run([], {"model": {"accuracy": ("accuracy", "tried")}}, None)
    assert [one["score"] for one in results["grid"]] == [0.2, 0.7, 0.7]
    assert all(cell["settings"] == {"lr": 3e-4} for cell in results["cells"])  # the first of equals; its twin
    splits = [words[words.index("--split") + 1] for words in E.ran if "--split" in words]
    assert splits.count("validation") == 3 and splits.count("test") == 4  # two models, two seeds
    assert {cell["lists"]["accuracy"] for cell in results["cells"]} == {pack([1, 0, 1])}


def test_a_model_waits_for_the_setting_of_another_that_it_takes(toy):
    def declare(E):
        first = E.model("first", "align.py", grid=dict(lr=(1e-4, 3e-4)))
        E.second = E.model("second", "align.py", verifier=first, grid=dict(lr=(1e-5, 3e-5)))
        E.choose_by("metrics.accuracy", split="validation")
        E.read("test", split="test", take={"accuracy": "metrics.accuracy"})

    E = toy(declare)
    score = lambda words: 1000 * float(rate_of(words))  # the higher, the better
    E.command = lambda words, log: (
        E.ran.append(words)
        or write_json(words[words.index("--out") + 1], {"metrics": {"accuracy": score(words)}})
    )
    results = E.run([], {}, None)
    assert [cell["settings"] for cell in results["cells"][::2]] == [{"lr": 3e-4}, {"lr": 3e-5}]
    taken = {words[words.index("--verifier") + 1] for words in E.ran if "--verifier" in words}
    assert taken == {f"runs/recipes/e/first-lr0.0003-s{seed}/model" for seed in (0, 1)}


def rate_of(words):
    """The learning rate in a command, or in the folder of the model that it reads."""
    if "--lr" in words:
        return words[words.index("--lr") + 1]
    found = re.search(r"lr([\d.e-]+?)-s", " ".join(words))
    return found and found[1]


def test_functions_make_files_and_are_run_again_when_their_code_changes(toy, tmp_path):
    def count(out, samples, k, *, seed):
        out.write_text(f"{samples.name} {k} {seed}\n")

    def declare(E):
        E.made_file = E.file("counted", count, E.samples("drawn", E.model("m", "train.py")), 3)

    E = toy(declare)
    path = E.path(E.made_file, 1)
    assert path.read_text() == "samples.jsonl 3 1\n" and path.name == "counted.jsonl"
    path.write_text("kept\n")
    assert toy(declare).path(E.made_file, 1).read_text() == "kept\n"
    same_name = count

    def count(out, samples, k, *, seed):
        out.write_text("anew\n")

    assert count.__name__ == same_name.__name__
    E = toy(declare)
    assert E.path(E.made_file, 1).read_text() == "anew\n"


def test_a_cell_that_fails_ends_in_one_line_and_what_is_done_stays_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def declare(E):
        vft = E.model("vft", "train.py", init=E.init, data=E.data, limit=8, steps=1, eval_split="")
        E.model("broken", "align.py", init=vft, samples="nowhere.jsonl")
        E.read("test", split=E.test, limit=2, max_new_tokens=2, take={"accuracy": "correct"})

    E = Experiment("f", "F", dict(seeds=1), {}, results="results")
    with pytest.raises(SystemExit) as stop:
        E.main(declare, [], {"model": {}}, argv=["--jobs", "1"])
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and re.fullmatch(
        "error: python align.py .*exit code 2.*nowhere.jsonl.*", line
    )
    assert (tmp_path / "runs" / "recipes" / "f" / "vft-s0" / "cell.json").is_file()
    assert not (tmp_path / "runs" / "recipes" / "f" / "broken-s0" / "cell.json").exists()
    assert not (tmp_path / "results").exists()


def test_after_a_failure_no_cell_begins_and_those_at_work_are_finished(toy):
    def declare(E):
        for name in ("slow", "broken", *"abcdef"):
            E.model(name, "train.py")
        E.read("test", take={"accuracy": "correct"})

    def command(words, log):
        name = Path(words[words.index("--out") + 1]).parts[3]
        began.append(name)
        if name == "broken-s0":
            at_work.wait(10)  # or "slow" might not have begun
            raise InputError("exit code 2")
        if name == "slow-s0":
            at_work.set()
            failed.wait(10)
        plain(words, log)

    E, at_work, failed, began = toy(argv=["--seeds", "1"]), threading.Event(), threading.Event(), []
    plain, E.command, end = E.command, command, E.end
    E.end = lambda error: (end(error), failed.set())
    declare(E)
    with pytest.raises(InputError, match="^python train.py .*/broken-s0/.*: exit code 2"):
        E.run([], {"model": {}}, None)
    assert sorted(began) == ["broken-s0", "slow-s0"]
    assert (E.root / "slow-s0" / "cell.json").is_file()  # its work is not lost


def test_a_function_that_fails_is_named(toy):
    def choose(out, samples, *, seed):
        raise InputError("no right x wrong pair")

    E = toy()
    with pytest.raises(InputError, match=r"^choose\(runs/.*\): no right x wrong pair"):
        E.path(E.file("pairs", choose, E.samples("drawn", E.model("m", "train.py"))), 0)


def test_two_cells_cannot_make_the_same_file(toy):
    E = toy()
    model = E.model("m", "train.py")
    one, two, three = (E.samples("drawn", model, split=split) for split in ("train", "train", "test"))
    assert E.path(one, 0) == E.path(two, 0) and len(E.ran) == 2
    with pytest.raises(AssertionError, match="two cells make runs/recipes/e/m-s0/drawn"):
        E.path(three, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_scripts_too_and_what_was_cut_off_is_not_done(tmp_path, number):
    code = MADE_UP.replace("steps=2, eval_split", "steps=10000, eval_split")
    (tmp_path / "paper.py").write_text(code + "\nE.main(declare, CLAIMS, COLUMNS)\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    deaf_no_more = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # as from a terminal
    options = dict(cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=deaf_no_more)
    recipe = subprocess.Popen([sys.executable, "paper.py"], **options)
    folder = tmp_path / "runs" / "recipes" / "made_up" / "vft-s0"
    log, deadline = folder / "model" / "metrics.jsonl", time.time() + 120
    while not (log.is_file() and log.stat().st_size):
        assert recipe.poll() is None and time.time() < deadline
        time.sleep(0.05)
    child = json.loads((folder / "model" / "lock.json").read_text())["pid"]
    recipe.send_signal(number)
    _, error = recipe.communicate(timeout=60)
    assert (recipe.returncode, error) == (128 + number, f"ended by {number.name}\n")
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not (folder / "cell.json").exists()


def test_a_commit_is_no_reason_to_fail(monkeypatch):
    monkeypatch.setattr(work.shutil, "which", lambda name: None)
    assert work.commit() == "unknown"


# ---- the command line ----------------------------------------------------------------------------


def test_sizes_can_be_given(toy):
    sizes = dict(problems=10, share=0.5, lrs=(1e-4, 1e-3))
    E = toy(argv=["--set", "problems=4", "lrs=1e-5,1e-6", "--seeds", "3"], sizes=sizes)
    assert vars(E.size) == dict(seeds=3, problems=4, share=0.5, lrs=(1e-5, 1e-6))
    assert toy(argv=["--fast"], sizes=sizes).size.seeds == 1
    with pytest.raises(InputError, match="--set has problem; allowed: seeds, problems"):
        toy(argv=["--set", "problem=4"], sizes=sizes)
    for argv, what in ((["--set", "problems=-4"], "problems is -4"),
                       (["--set", "lrs=1e-4,nan"], "lrs is 1e-4,nan"),
                       (["--set", "lrs=1e-4;3"], "lrs is '1e-4;3'"), (["--seeds", "two"], "seeds is 'two'"),
                       (["--seeds", "0"], "seeds 0"), (["--jobs", "0"], "--jobs is 0")):  # fmt: skip
        with pytest.raises(InputError, match=what):
            toy(argv=argv, sizes=sizes)


@pytest.mark.parametrize(
    "argv, what",
    [
        (["--name", "../x"], "--name is '../x'"),
        (["--name", ""], "--name is ''"),
        (["--train-flags", "--lr '2"], '--train-flags is "--lr \'2": No closing quotation'),
    ],
    ids=lambda one: one[0],
)
def test_bad_words_are_named_before_the_first_cell(toy, argv, what):
    with pytest.raises(InputError, match=re.escape(what)):
        toy(argv=argv)


def test_a_part_of_the_models_needs_a_name_of_its_own(toy):
    with pytest.raises(InputError, match="--only is given; allowed: with --name"):
        toy(argv=["--only", "rft"])
    E = toy(argv=["--only", "rft", "aft-hinge", "--name", "part"])
    E.model("rft", "align.py")
    with pytest.raises(InputError, match="--only has aft-hinge; allowed: rft"):
        E.check([])


def test_seeds_splits_and_looks_are_the_recipes(toy):
    def declare(E):
        E.model("m", "train.py", data=E.data, split=E.part(E.train, 2, 5))
        E.read("test", split=E.test, take={"accuracy": "correct"})

    sizes, columns = dict(first_seed=10), {"model": {"accuracy": ("accuracy", "m")}}
    make = lambda: toy(
        declare, ["--jobs", "1"], sizes, splits=("train[10:]", "validation", "test[1000:3000]")
    )
    looks = []
    for _ in range(2):
        E = make()
        results = E.run([], columns, None, Path("results/e.json"))
        Path("results").mkdir(exist_ok=True)
        write_json(Path("results/e.json"), results)
        looks.append((len(E.ran), results["looks"]))
    assert looks == [(4, {"test[1000:3000]": 1}), (0, {"test[1000:3000]": 1})]
    words = make()
    assert words.part("train", 3, 9) == "train[3:9]" and words.part("train[10:14]", 2, 9) == "train[12:14]"
    with pytest.raises(InputError, match=r"--splits has 'train\[-5:\]'"):
        words.part("train[-5:]", 0, 3)
    command = json.loads(Path("runs/recipes/e/m-s10/cell.json").read_text())["command"]
    assert "--seed 10 " in command and "train[12:15]" in command
    assert not Path("runs/recipes/e/m-s0").exists() and Path("runs/recipes/e/m-s11").exists()


def test_studies_of_other_names_or_data_share_no_folder(toy):
    names = [toy(argv=argv).name for argv in ([], ["--data", "gsm8k:x/y"], ["--data", "a/own.jsonl"])]
    assert names == ["e", "e_gsm8k", "e_own"]
    one, two = (toy(argv=["--name", name]) for name in ("aft_2000", "aft_4000"))
    assert one.folder(one.model("m", "x"), 0) != two.folder(two.model("m", "x"), 0)


def test_claims_must_name_what_the_cells_give(toy):
    def declare(E):
        E.model("ours", "align.py")
        E.read("test", take={"accuracy": "correct"})

    E = toy(declare)
    E.check(claims("a|accuracy|ours||below 1|fine"))
    for claim in ("a|accuracy|theirs||up|no such model", "a|length|ours||up|no such metric"):
        with pytest.raises(InputError, match="claim a names (theirs/accuracy|ours/length), which no cell"):
            E.check(claims(claim))
    elsewhere = toy(declare, argv=["--data", "toy-pictures"])  # not what the claims are about: a part is made
    elsewhere.check(claims("a|accuracy|theirs||up|only on the recipe's own data"))


def test_what_a_recipes_author_gets_wrong_is_found_before_the_first_cell(toy):
    E = toy()
    E.model("m", "train.py")
    with pytest.raises(AssertionError, match="two models are called m"):
        E.model("m", "train.py", lr=1)
    for rule in ("sideways", "level", "level 0.02", "within 0.02"):  # a bound, and a control, are needed
        with pytest.raises(AssertionError, match=f"claim a: {rule}"):
            claims(f"a|accuracy|ours|theirs|{rule}|no such rule")
    with pytest.raises(ValueError):
        claims("a|accuracy|ours|theirs|up")


def test_splits_must_be_there_and_share_nothing_before_the_first_cell(toy, tmp_path):
    rows = [json.dumps({"question": f"{i}?", "answer": str(i)}) + "\n" for i in range(6)]
    (tmp_path / "own.jsonl").write_text("".join(rows))
    check = lambda *splits: toy(argv=["--data", "own.jsonl", "--splits", *splits]).check([])
    check("train[:2]", "train[2:4]", "train[4:]")
    with pytest.raises(InputError, match=r"--splits: train\[1:4\] of train\[:2\].*held-out"):
        check("train[:2]", "train[1:4]", "train[4:]")
    (tmp_path / "gsm").mkdir()
    (tmp_path / "gsm" / "train.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n')
    with pytest.raises((InputError, OSError), match="validation.jsonl"):
        toy(argv=["--data", "gsm8k:gsm"]).check([])


# ---- results, tables, pages ----------------------------------------------------------------------

CLAIMS = claims("""
up   |accuracy|better|base |up       |ten points more
none |accuracy|same  |base |up       |the same share
down |accuracy|worse |base |up       |less
level*|accuracy|better|better |level 0.01, base|as good, where the base is not
alone|ratio   |base  |     |below 0.8|a bound
mixed|accuracy|better|base/ratio|up  |another metric
""")


def results(seeds=3, problems=400):
    """Made-up results: each problem right with a chance of its own."""
    cells = []
    for name, share in {"base": 0.45, "better": 0.55, "same": 0.45, "worse": 0.3}.items():
        for seed in range(seeds):
            rng = random.Random(f"{name} {seed}")
            bits = [int(random.Random(p).random() / 2 + rng.random() / 2 < share) for p in range(problems)]
            pairs = [[rng.randrange(3), 3] for _ in range(problems)]
            metrics = {"accuracy": sum(bits) / problems, "vote@2": 0.5, "vote@4": 0.75}
            lists = {"accuracy": pack(bits), "ratio": pack(pairs)}
            cells.append({"name": name, "seed": seed, "settings": {}, "metrics": metrics, "lists": lists})
    found = {"cells": cells, "grid": [], "extra": {"notes": ["A note."]}, "sizes": {"seeds": seeds}}
    found |= {"seeds": {cell["name"]: seeds for cell in cells}, "looks": {"test": 2}}
    made = {"command": "python -m x", "device": "CPU", "commits": ["abc"], "cell_minutes": 1.5, "world": None}
    return {**found, **made, "claims": judge_all(found, CLAIMS)}


@pytest.mark.parametrize(
    "values",
    [[0, 0, 1, 0], [1] * 9, [0] * 1000, [[0, 0], [3, 4], [10, 35]], [[3, 36]], [0.25, 1.5], []],
    ids=str,
)
def test_numbers_of_single_problems_come_back(values):
    assert unpack(json.loads(json.dumps(pack(values)))) == values


def test_claims_are_judged_by_their_interval():
    found = {one["id"]: one for one in results()["claims"]}
    words = {id_: one["verdict"] for id_, one in found.items()}
    assert words == {"up": "holds", "none": "not seen", "down": "reversed", "level*": "holds",
                     "alone": "holds", "mixed": "holds"}  # fmt: skip
    assert found["up"]["seeds"] == 3 and found["up"]["problems"] == 400
    assert "up" not in {c["id"] for c in judge_all({"cells": []}, CLAIMS)}  # its cells did not run


def test_a_claim_about_other_problems_is_named():
    cells = [
        {"name": name, "seed": 0, "lists": {"accuracy": pack([1] * n)}} for name, n in (("a", 3), ("b", 4))
    ]
    with pytest.raises(InputError, match=r"claim x compares numbers of \[3, 4\] problems"):
        judge_all({"cells": cells}, claims("x|accuracy|a|b|up|it grows"))


def test_claims_are_judged_again_at_one_rate_over_the_seeds_that_both_have():
    found = results()
    twins = [
        cell | {"name": f"{cell['name']}@one-rate"} for cell in found["cells"] if cell["name"] == "worse"
    ]
    found["cells"] = [c for c in found["cells"] if c["name"] != "worse"] + [
        cell | {"name": "worse"} for cell in found["cells"] if cell["name"] == "better" and cell["seed"] < 2
    ]
    found["cells"] += twins
    [up, level] = judge_all(
        found,
        claims("""
u|accuracy|worse|base|up|at its own rate it is better
l|accuracy|better|better|level 0.01, worse|as good, where the other falls
"""),
    )
    assert (up["verdict"], up["seeds"]) == ("holds", 2)
    assert (up["one_rate"]["verdict"], up["one_rate"]["seeds"]) == ("reversed", 3)
    assert (level["verdict"], level["one_rate"]["verdict"]) == ("no test", "holds")
    lines = tables(found | {"claims": [up, level]}, {"model": {"accuracy": "{accuracy:.1%}"}})
    assert "| claim (* primary) | difference [95 %] | verdict | all at one rate | verdict |" in lines
    assert sum("| holds | -" in line and line.endswith("| reversed |") for line in lines) == 1
    assert f"{up['one_rate']['difference']:+.3f}" in "".join(lines)


def test_a_metric_of_nothing_is_left_out(toy):
    """Samples without a pair of a better and a worse response, or without a solution."""
    values = {"a_held": [[0, 0], [0, 0]], "nll": [], "majority": None, "accuracy": [1, 0]}
    E = toy(lambda E: (E.model("m", "train.py"), E.read("test")))
    E.command = lambda words, log: write_json(words[words.index("--out") + 1], values)
    row = E.row(E.models[0], 0)
    assert row["metrics"] == {"accuracy": 0.5} and row["lists"] == {"accuracy": [1, 0]}
    assert tables({"cells": [row], "grid": [], "claims": [], "extra": {}}, {"m": {"A": "{a_held:.1%}"}})[
        2
    ] == ("| m |  |")


def test_a_mean_of_two_metrics_is_taken_problem_by_problem():
    cells = [{"name": "m", "seed": 0, "metrics": {}, "lists": {"a": pack([1, 0]), "b": pack([1, 1])}}]
    assert numbers({"cells": cells}, "m", "a+b") == [[1.0, 0.5]]


def test_tables_have_a_row_a_model_a_claim_and_a_way(capsys):
    heads = {"accuracy": "{accuracy:.1%}", "over base": ("accuracy", "base"), "not read": "{x:.2f}"}
    columns = {"model": {**heads, "paper": {"better": "40.4"}}}
    lines = tables(results(), columns, [("choosing", "base", ("vote",), (2, 4))])
    [row] = [line for line in lines if line.startswith("| better |")]
    assert re.fullmatch(r"\| better \| [56]\d\.\d% \| \+1?\d\.\d% \[\+.*%, \+.*%\] \|  \| 40.4 \|", row)
    assert "| vote | 50.0% | 75.0% |" in lines and lines[-2] == "A note."
    assert sum(line.startswith("| up. ten points more |") for line in lines) == 1


def test_a_page_is_made_again_around_what_was_written_by_hand(tmp_path):
    file = tmp_path / "e.json"
    page = write_page(file, "Title", results(), ["a table"])
    page.write_text(page.read_text() + "What it means.\n")
    write_page(file, "Another title", results(), ["another table"])
    text = page.read_text()
    assert text.startswith("# Another title") and "a table" not in text.replace("another table", "")
    assert text.endswith(f"{BY_HAND}\nWhat it means.\n")
    page.write_text("no mark")
    with pytest.raises(InputError, match="e.md: its hand-written part is gone"):
        write_page(file, "Title", results(), [])
    assert page.read_text() == "no mark"


def with_list(packed):
    found = results()
    found["cells"][0]["lists"]["accuracy"] = packed
    return found


def test_a_page_shows_its_own_figures(tmp_path):
    for name in ("aft_b.svg", "aft_4000_a.svg", "aft_4000.json"):
        (tmp_path / name).touch()
    text = {
        name: write_page(tmp_path / f"{name}.json", "T", results(), []).read_text()
        for name in ("aft", "aft_4000")
    }
    figures = {name: re.findall(r"\((\w+).svg\)", page) for name, page in text.items()}
    assert figures == {"aft": ["aft_b"], "aft_4000": ["aft_4000_a"]}


def test_results_of_another_world_or_without_a_seed_are_refused(tmp_path):
    file = tmp_path / "e.json"
    with pytest.raises(InputError, match="e.json: no such results"):
        read_results(file, None)
    file.write_text("{")
    with pytest.raises(InputError, match="e.json:1: not JSON"):
        read_results(file, None)
    write_json(file, results())
    assert read_results(file, None)["claims"]
    with pytest.raises(InputError, match="e.json: is of the world None, this is abc"):
        read_results(file, "abc")
    for broken, what in (
        (results() | {"cells": 3}, "'int' object is not iterable"),
        ({k: v for k, v in results().items() if k != "grid"}, "has no 'grid'"),
        ({k: v for k, v in results().items() if k != "looks"}, "has no 'looks'"),
        (
            results() | {"seeds": dict.fromkeys(("base", "better", "same", "worse"), 4)},
            "model base has the seeds",
        ),
        (results() | {"cells": [{"name": "m"}]}, "has no 'seed'"),
        (with_list(pack([1, 0])), "base/accuracy is of [2, 400] problems"),
        (with_list("xyz"), "invalid literal"),
    ):
        write_json(file, broken)
        with pytest.raises(InputError, match=f"^{file}: .*{re.escape(what)}.*run the recipe again$"):
            read_results(file, None)
    partial = results()
    partial["cells"] = [c for c in partial["cells"] if (c["name"], c["seed"]) != ("same", 1)]
    write_json(file, partial)
    with pytest.raises(InputError, match=r"e.json: cell same has the seeds \[0, 2\]"):
        read_results(file, None)
    with pytest.raises(InputError, match=r"cell same has the seeds \[0, 2\]"):
        numbers(partial, "same", "accuracy")


def test_results_of_another_base_or_other_problems_are_of_another_world(toy, monkeypatch):
    E = toy()
    world = E.world()
    assert world == toy().world() and toy(argv=["--data", "own.jsonl"]).world() is None
    assert toy(argv=["--data", "toy-pictures"]).world() != world != toy(argv=["--init", "toy-vision"]).world()
    monkeypatch.setattr("minicot.recipes.experiment.weights_digest", lambda folder: "of another base")
    assert E.world() != world


# ---- what is committed ---------------------------------------------------------------------------

RECIPES = {"aft_main": aft, "aft_all": aft, "mme_cot": mme_cot}
RECIPES |= {"llava_reasoner": llava_reasoner, "llava_verifier": llava_verifier}
RECIPES |= {"llava_long": llava_reasoner}
RECIPES |= {"cot_max": cot_max, "cot_max_text": cot_max_text, "grpo": grpo, "ursa": ursa}
RECIPES |= {"ursa_grpo": ursa_grpo}


JUDGED = [aft, cot_max, cot_max_text, grpo, llava_reasoner, llava_verifier, mme_cot, ursa, ursa_grpo]
JUDGED += [ursa_text]


@pytest.mark.parametrize("recipe", JUDGED)
def test_no_claim_holds_where_all_models_are_the_same(recipe):
    """A rule that equal models pass needs a control that is not equal."""
    for claim in recipe.CLAIMS:
        same = {
            "lists": dict.fromkeys(
                [part for _, m in sides(claim) for part in m.split("+")], pack([1, 0] * 50)
            )
        }
        cells = [
            {"name": model, "seed": seed} | same for model, _ in dict(sides(claim)).items() for seed in (0, 1)
        ]
        [judged] = judge_all({"cells": cells}, [claim])
        assert judged["verdict"] != "holds" or not claim["other"], claim


@pytest.mark.parametrize(
    "recipe", [aft, cot_max, cot_max_text, grpo, llava_reasoner, mme_cot, ursa, ursa_text]
)
def test_three_to_five_claims_are_primary(recipe):
    assert 3 <= sum(claim["id"].endswith("*") for claim in recipe.CLAIMS) <= 5


def test_every_results_file_has_a_recipe_and_a_page():
    assert {file.stem for file in RESULTS.glob("*.json")} == RECIPES.keys()
    assert {file.stem for file in RESULTS.glob("*.md")} == RECIPES.keys() | {"real"}


@pytest.mark.parametrize("name", RECIPES)
def test_committed_pages_and_verdicts_are_what_the_committed_numbers_give(name):
    """Every interval is computed again, and with it every table."""
    recipe, file = RECIPES[name], RESULTS / f"{name}.json"
    other = {"llava_long": ["--data", "toy-pictures-long"]}
    recipe.E.parse(["--table", "--name", name, *other.get(name, [])])
    found = read_results(file, recipe.E.world())
    assert judge_all(found, recipe.CLAIMS) == found["claims"]
    page = file.with_suffix(".md").read_text()
    lines = tables(found, recipe.COLUMNS, getattr(recipe, "PIVOTS", ()))
    assert "\n".join(lines) in page and page.startswith(f"# {recipe.E.title}\n")
    assert all((RESULTS / figure).is_file() for figure in re.findall(r"\]\((\w+\.svg)\)", page))
    assert len(page.partition(BY_HAND)[2]) > 500  # the analysis is there
    for cell in found["cells"]:
        for metric, packed in cell["lists"].items():
            values = unpack(packed)
            if metric in cell["metrics"] and not isinstance(values[0], list):
                assert sum(values) / len(values) == pytest.approx(cell["metrics"][metric], abs=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_studys_results_stay_small(name):
    others = tuple(other for other in RECIPES if other.startswith(f"{name}_"))
    files = [file for file in RESULTS.glob(f"{name}*") if not others or not file.stem.startswith(others)]
    assert sum(file.stat().st_size for file in files) <= 320_000
