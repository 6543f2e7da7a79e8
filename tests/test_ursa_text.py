"""The recipe ursa_text: who learns from what, which problems are labelled, its figures. The reward models,
the labels and GRPO are in test_prm.py, test_synthesis.py and test_grpo.py."""

import pytest

from minicot.recipes import ursa_text
from minicot.recipes.tables import sides
from minicot.recipes.ursa import WAYS
from minicot.records import Problem, Response, Samples, read_samples, samples_to_row
from minicot.runs import write_jsonl
from minicot.synthesis import Rates


@pytest.fixture
def declared(tmp_path, monkeypatch):
    """ursa_text on a file of one's own, declared below a folder of its own -> {name: model}."""
    monkeypatch.chdir(tmp_path)
    row = lambda i: {"id": str(i), "question": f"{i} + 1?", "answer": i, "solution": f"{i} + 1\n#### {i}"}
    write_jsonl("own.jsonl", map(row, range(300)))
    E = ursa_text.E
    E.parse(["--data", "own.jsonl", "--fast", "--splits", "train[:250]", "train[250:275]", "train[275:]"])
    ursa_text.declare(E)
    E.check(ursa_text.CLAIMS)
    yield {model.name: model for model in E.models}
    E.models.clear(), E.reads.clear(), E.chosen.clear(), E.validations.clear()


def test_both_reward_models_learn_from_one_file_and_both_rl_arms_from_the_same_fresh_problems(declared):
    told = lambda name: {k: v for k, v in declared[name].flags.items() if k != "task"}
    assert told("prm") == told("orm") and declared["prm"].grid == declared["orm"].grid
    grpo, rft = declared["grpo"].flags, declared["rft"].flags
    assert declared["grpo"].grid == declared["rft"].grid
    same = ("init", "steps", "batch_size", "accumulate", "data")
    assert [grpo[flag] for flag in same] == [rft[flag] for flag in same]
    assert grpo["split"] == rft["samples"].flags["split"] == "train[160:224]"
    assert declared["sft"].flags["split"] == "train[0:160]"


def test_every_claim_names_what_is_read(declared):
    ways = [f"{way}@{n}" for way in WAYS for n in (1, 2, 4, 8, ursa_text.SIZES["n"])]  # of ursa.all_curves
    reads = ursa_text.E.reads
    given = {(name, one) for name in declared for _, take in reads[name] for one in take or ways}
    assert {side for claim in ursa_text.CLAIMS for side in sides(claim)} <= given


def test_problems_that_are_never_solved_are_not_labelled(declared, tmp_path, monkeypatch):
    asked = []

    def roll_outs(folder, seed, *, style, tokens, rows, dtype):
        """Rollouts that are right as long as no step says 9."""

        def roll_out(prefixes):
            asked.extend(prefixes)
            return [["#### 9"] if "9" in one.text else ["#### 5"] for one in prefixes]

        assert (style, tokens, str(dtype)) == ("hash", 256, "torch.float32")
        return Rates(roll_out, style=style)

    monkeypatch.setattr(ursa_text, "roll_outs", roll_outs)
    right = Response("2 + 2 = 4\n4 + 1 = 5\n#### 5", True, answer="5")
    wrong = Response("2 + 2 = 4\n4 + 1 = 9\n#### 9", False, answer="9")
    pool = {"solved": [right, wrong], "unsolved": [wrong, wrong]}
    rows = [Samples(Problem(name, "q", answer="5"), drawn) for name, drawn in pool.items()]
    write_jsonl(tmp_path / "drawn", map(samples_to_row, rows))
    ursa_text.label_solved(tmp_path / "out", tmp_path / "drawn", "toy", "own.jsonl", "float32", seed=0)
    [one] = read_samples(tmp_path / "out")
    assert one.problem.id == "solved" and {prefix.problem.id for prefix in asked} == {"solved"}
    assert [r.step_labels for r in one.responses] == [[True, True], [True, False]]


def test_figures(tmp_path):
    cells = [{"name": "prm", "metrics": {f"{way}@{n}": 0.1 for way in WAYS for n in (1, 2)}}]
    history = {key: [[1, 0.5], [2, 0.6]] for key in ursa_text.DRAWN}
    ursa_text.draw({"cells": cells, "extra": {"training": {"grpo": history}}}, tmp_path / "page")
    assert ">majority<" in (tmp_path / "page_prm.svg").read_text()
    assert ">grpo<" in (tmp_path / "page_training.svg").read_text()
