"""The README: short, its example runs as printed, its numbers stand on the pages."""

import json
import re
import shutil
import statistics
import subprocess
import sys

import pytest

from minicot.recipes.experiment import RESULTS
from minicot.records import samples_to_row
from minicot.runs import write_jsonl
from minicot.training import ROOT, resolve
from tests.helpers import assert_one_line_error
from tests.test_align import groups, lines

README = (ROOT / "README.md").read_text()
NUMBER = r"[-+]?\d+(?:\.\d+)?"


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def rows(text):
    """The cells of a section's table, without its head."""
    table = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


def block(name):
    return re.search(rf"<!-- loss: {name} -->\n```python\n(.*?)```", README, re.S)[1]


def test_it_can_be_finished():
    assert len(README.splitlines()) <= 180
    [transcript] = re.findall(r"^(?:    .*\n|\n(?=    ))+", section("Start"), re.M)
    assert len(transcript.splitlines()) <= 15 and "%" in transcript
    assert len(rows(section("Read it in this order"))) == 6 and len(rows(section("Speed"))) == 8
    assert len(section("Limits").strip().splitlines()) == 5


def test_a_new_loss_is_one_function_one_row_and_one_test_as_printed(tmp_path):
    """Written into a copy of the two files that a user edits, the loss passes its test and trains from the
    command line."""
    shutil.copytree(ROOT / "minicot", tmp_path / "minicot", ignore=shutil.ignore_patterns("recipes", "*.pyc"))
    losses, script = tmp_path / "minicot" / "losses.py", tmp_path / "align.py"
    losses.write_text(f"{losses.read_text()}\n\n{block('function')}")
    imported, row = block("row").split("\n\n", 1)
    text = (ROOT / "align.py").read_text().replace("METHODS = {", f"METHODS = {{\n{row}", 1)
    script.write_text(
        text.replace("from minicot.losses import", f"{imported}\nfrom minicot.losses import", 1)
    )
    (tmp_path / "test_it.py").write_text(block("test"))
    run = lambda *words: subprocess.run(
        [sys.executable, *map(str, words)], cwd=tmp_path, capture_output=True, text=True
    )
    tested = run("-m", "pytest", "-q", "test_it.py")
    assert tested.returncode == 0 and "1 passed" in tested.stdout, tested.stdout

    write_jsonl(tmp_path / "samples.jsonl", map(samples_to_row, groups([[1, 0], [0, 1], [1, 0, 0], [1, 0]])))
    common = ["--init", resolve("toy"), "--samples", "samples.jsonl", "--steps", 6, "--batch-size", 5]
    common += ["--lr", 1e-3, "--pair-low", 0, "--pair-high", 1, "--device", "cpu"]
    done = run("align.py", "--method", "simpo", *common)
    assert done.returncode == 0 and "simpo, constraint none" in done.stdout, done.stderr
    log = lines(tmp_path, "runs/simpo")
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["margin"] > log[0]["margin"]
    assert_one_line_error(run("align.py", "--method", "simpler", *common), "simpler", "'simpo'", "'aft'")


def test_headline_numbers_stand_on_the_pages_that_they_link_to():
    table = rows(section("The papers"))
    recipes = [file.stem for file in (ROOT / "minicot" / "recipes").glob("*.py")]
    named = [name for name in recipes if f"`python -m minicot.recipes.{name}`" in README]
    assert len(table) == len(named) >= 2
    for paper, _, _, _, headline, pages in table:
        linked = [(ROOT / name).read_text() for name in re.findall(r"\]\((minicot/[\w/.]+\.md)\)", pages)]
        assert linked and "[" in headline, paper
        said = {number.lstrip("+") for number in re.findall(NUMBER, " ".join(linked))}
        for number in re.findall(NUMBER, headline):
            assert number.lstrip("+") in said, f"{paper}: {number} of the README stands on none of its pages"


def test_speed_is_what_the_bench_measured():
    measured = json.loads((ROOT / "tests" / "bench" / "results.json").read_text())["cpu"]["rows"]
    for *about, ratio in rows(section("Speed")):
        [row] = [r for r in measured if [r["work"], r["model"], r["shape"], r["peer"]] == about]
        assert float(ratio) == pytest.approx(statistics.median(row["ratio"]), abs=0.005)


def test_its_links_and_figures_are_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for recipe in RESULTS.glob("*.md"):
        assert f"results/{recipe.name}" in README, f"README links no page {recipe.name}"
