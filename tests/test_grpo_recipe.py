"""The recipe grpo: its arms, what is read of their samples, its figure. The loss and the loop are in
test_grpo.py."""

import json

import pytest

from minicot.recipes import grpo
from minicot.records import Problem, Response, Samples, samples_to_row
from minicot.runs import write_jsonl


@pytest.fixture
def declared(tmp_path, monkeypatch):
    E = grpo.E
    monkeypatch.chdir(tmp_path)
    E.parse(["--fast", "--splits", "train", "validation", "test"])
    grpo.declare(E)
    E.check(grpo.CLAIMS)
    yield {model.name: model for model in E.models}
    E.models.clear(), E.reads.clear(), E.chosen.clear(), E.validations.clear()


def test_the_arms_differ_in_their_normalisation_alone_and_rft_has_as_many_responses(declared):
    arms, rft = [declared[name] for name in grpo.NORMALISATIONS], declared["rft"]
    assert [arm.flags["normalisation"] for arm in arms] == [*grpo.NORMALISATIONS]
    assert len({repr({k: v for k, v in arm.flags.items() if k != "normalisation"}) for arm in arms}) == 1
    assert len({repr((model.grid, model.flags["init"], model.flags["steps"])) for model in [*arms, rft]}) == 1
    asked, drawn = arms[0].flags, rft.flags["samples"].flags
    assert (asked["limit"], asked["k"]) == (asked["steps"] * asked["batch_size"], drawn["n"])
    problems = [json.loads(line) for line in drawn["data"].read_text().splitlines()]
    assert len(problems) == asked["limit"] and drawn["model"] is declared["sft"]


def test_habits_by_hand(tmp_path):
    answered = lambda answer, n: Response("x", answer == "1", answer=answer, ids=[7] * n)
    pool = [answered("1", 10), answered("2", 20), answered("2", 40), answered(None, 50)]
    problems = [
        Samples(Problem("p", "q", answer="1"), pool),
        Samples(Problem("q", "q", answer="2"), pool[:1]),
    ]
    write_jsonl(tmp_path / "drawn", map(samples_to_row, problems))
    grpo.habits(tmp_path / "out", tmp_path / "drawn", seed=0)
    assert json.loads((tmp_path / "out").read_text()) == {
        "sampled": [0.25, 1.0],
        "majority": [False, False],
        "pass": [True, True],
        "length": [30.0, 10.0],
        "length_wrong": [[110, 3], [0, 0]],
    }


def test_the_figure_has_a_line_for_each_arm_and_a_panel_for_what_is_tracked(tmp_path):
    history = {key: [[1, 0.5], [2, 0.6]] for key in grpo.TRACKED}
    training = {name: history for name in grpo.NORMALISATIONS} | {
        "rft": history | dict.fromkeys(grpo.DRAWN, [])
    }
    grpo.draw({"extra": {"training": training}}, tmp_path / "page")
    svg = (tmp_path / "page_training.svg").read_text()
    assert all(f">{name}<" in svg for name in (*grpo.NORMALISATIONS, "rft", *grpo.TRACKED.values()))
