"""Recipes: a cell runs once, claims are judged by their interval, the table is made of the results alone."""

import json
import random

import pytest

from minicot import plots
from minicot.data import pairs
from minicot.records import Problem, Response, Samples
from minicot.recipes import aft
from minicot.recipes.cells import command, from_hex, judge, pack_pairs, run_cell, to_hex, unpack_pairs
from minicot.training import ROOT


def cell(name, seed, share, problems=400):
    """A made-up row of the results: each problem right with chance `share`, a chance of its own for each."""
    rng = random.Random(f"{name} {seed}")
    bits = [int(random.Random(p).random() * 0.5 + rng.random() * 0.5 < share) for p in range(problems)]
    pairs = [[rng.randrange(4), 3] for _ in range(50)]
    metrics = {
        "accuracy": sum(bits) / problems,
        "majority": share,
        "a_train": 0.7,
        "a_held": 0.6,
        "a_held_pairs": pairs,
        "reference_nll": 0.4,
        "reference_nlls": [0.4 + share / 10] * 50,
        "missing_answers": 0.0,
        "repeated_4grams": 0.01,
    }
    return {
        "name": name,
        "seed": seed,
        "settings": {"lr": 1e-4, "margin": None},
        "metrics": metrics,
        "correct": to_hex(bits),
    }


def results():
    shares = {
        "vft": 0.45,
        "rft": 0.45,
        "aft-detached": 0.55,
        "aft-boundary": 0.45,
        "aft-none": 0.3,
        "aft-none@twin": 0.3,
    }
    cells = [cell(name, seed, share) for name, share in shares.items() for seed in range(3)]
    return {"cells": cells, "claims": aft.judge_all(cells), "sizes": {"votes": 8}}


def test_bits_survive_as_hex():
    for bits in ([0, 0, 1, 0], [1] * 9, [0] * 1000):
        assert from_hex(to_hex(bits)) == bits


def test_claims_are_judged_by_their_interval():
    verdicts = {claim["id"]: claim["verdict"] for claim in results()["claims"]}
    assert verdicts["b1"] == "holds" and verdicts["b2"] == "not seen"  # +10 points; the same share
    assert verdicts["b3"] == "holds" and verdicts["c1"] == "holds" and verdicts["c2"] == "holds"
    assert verdicts["a"] == "holds"  # half of the pairs are in order: below 80 %
    assert "d1" not in verdicts  # its cells did not run
    assert judge({"rule": "up"}, [[0, 0, 0, 1] * 50], [[1, 1, 0, 1] * 50])["verdict"] == "reversed"
    assert judge({"rule": "level"}, [[1, 0] * 200], [[1, 0] * 200])["verdict"] == "holds"


def test_the_table_has_a_row_a_cell_and_a_row_a_claim():
    lines = aft.table(results()).splitlines()
    assert sum(line.startswith("| aft-none@twin |") for line in lines) == 1
    assert sum(line.startswith("| b1. ") for line in lines) == 1
    assert len({line.count("|") for line in lines[:8]}) == 1 and "nan" not in "".join(lines)


def test_the_table_shows_the_grid_and_the_ablations():
    grid = [
        {"name": name, "lr": lr, "margin": None, "accuracy": 0.4 + lr}
        for name in ("rft", "aft-none")
        for lr in (0.01, 0.02)
    ]
    full = {**results(), "grid": grid, "ablations_one_seed": [cell("aft-detached, K = 2", 0, 0.5)]}
    lines = aft.table(full).splitlines()
    assert "| rft | 41.0% | 42.0% |" in lines
    assert sum(line.startswith("| aft-detached, K = 2 | ") for line in lines) == 1


def test_a_cell_runs_again_only_when_its_commands_or_inputs_change(tmp_path, capsys):
    (tmp_path / "input").write_text("one")
    script = tmp_path / "count.py"
    script.write_text("open('%s', 'a').write('x')" % (tmp_path / "count"))
    runs = lambda: len((tmp_path / "count").read_text())
    run = lambda lr, fresh=False: run_cell(
        tmp_path / "cell",
        [command(str(script), "--overwrite", lr=lr, margin=None)],
        [tmp_path / "input"],
        fresh=fresh,
    )
    run(1e-3), run(1e-3)
    assert runs() == 1 and "--overwrite --lr 0.001" in capsys.readouterr().out
    run(1e-4)
    (tmp_path / "input").write_text("two")
    run(1e-4)
    run(1e-4, fresh=True)
    assert runs() == 4
    script.write_text("raise SystemExit('out of luck')")
    with pytest.raises(ValueError, match="exit code 1; .*out of luck"):
        run(1e-5)
    with pytest.raises(ValueError):
        run(1e-5)  # a failed cell is not done


def test_the_slim_results_give_the_same_claims_and_keep_only_what_claims_need():
    full = results()
    small = aft.slim(full["cells"])
    assert aft.judge_all(small) == full["claims"]
    assert "reference_nlls" not in small[0]["metrics"] and "a_held_pairs" in small[0]["metrics"]  # vft


def test_figures_are_drawn(tmp_path):
    plots.differences(
        [("a", 0.1, 0.05, 0.2), ("b", -0.1, -0.3, 0.1)], "accuracy over VFT", tmp_path / "d.svg"
    )
    plots.score_histograms(
        {"vft": ([-0.2, -0.3], [-0.4] * 5), "aft": ([-0.1], [-0.5, -2.0])}, tmp_path / "h.svg"
    )
    lines = [{"step": i, "score_right": -0.3, "score_wrong": None if i == 2 else -0.5} for i in range(5)]
    plots.scores_over_training({"aft-none": lines}, tmp_path / "s.svg")
    assert all((tmp_path / f"{name}.svg").stat().st_size > 2000 for name in "dhs")


def test_a_ratio_has_no_spread_where_every_problem_has_it_and_is_not_the_mean_of_ratios():
    row = lambda pairs: [{"name": "x", "seed": 0, "metrics": {"a_held_pairs": pairs}}]
    assert aft.numbers(row([[1, 2], [2, 4], [5, 10]]), "x", "a_held") == [[0.5] * 3]
    [found] = aft.numbers(row([[1, 1], [0, 3], [2, 4]]), "x", "a_held")
    assert sum(found) / 3 == pytest.approx(3 / 8)  # 3 of 8 pairs
    # by hand: ratio 3/8, mean pairs 8/3; (right - 3/8 n) / (8/3) = 5/8, -9/8, 1/2, each times 3/8
    assert found == pytest.approx([3 / 8 + 15 / 64, 3 / 8 - 27 / 64, 3 / 8 + 12 / 64])


def test_packed_pairs_come_back():
    pairs = [[0, 0], [3, 4], [10, 35]]
    assert unpack_pairs(pack_pairs(pairs)) == pairs == unpack_pairs(pairs)


def test_a_part_of_the_methods_must_be_methods():
    with pytest.raises(ValueError, match="--methods has aft-hinge; allowed: rft, dpo-none"):
        aft.main(["--methods", "rft,aft-hinge"])


def committed():
    return sorted((ROOT / "minicot" / "recipes" / "results").glob("aft*.json"))


@pytest.mark.parametrize("path", committed(), ids=lambda path: path.name)
def test_committed_intervals_are_what_the_committed_answers_give(path):
    found = json.loads(path.read_text())
    assert aft.judge_all(found["cells"]) == found["claims"]
    for row in found["cells"]:
        bits = from_hex(row["correct"])
        assert sum(bits) / len(bits) == pytest.approx(row["metrics"]["accuracy"])
    assert path.stat().st_size <= 200_000


def test_on_a_real_set_dpo_may_choose_the_written_solution():
    """Where no sample is right, right and wrong still meet: the solution first, the window met."""
    problem = Problem("1", "What is 2 + 2?", answer="4", solution="2 + 2 = 4\n#### 4")
    wrong = [Response(text, correct=False) for text in ("#### 5", "#### 3")]
    with pytest.raises(ValueError):
        pairs([Samples(problem, wrong)], window=(0.001, 0.999), seed=0)
    found = pairs([aft.with_reference(Samples(problem, wrong))], window=(0.001, 0.999), seed=0)
    assert sorted([r.text for r in pair.responses] for pair in found) == [
        [problem.solution, "#### 3"],
        [problem.solution, "#### 5"],
    ]
