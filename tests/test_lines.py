"""Lines with verdicts, chains with labels (minicot/toy/lines.py), and the base that learned from them."""

import random
import re

import pytest
import torch

from minicot.answers import split_steps
from minicot.model import RewardModel
from minicot.recipes import ursa, ursa_labels
from minicot.tokenizer import Tokenizer
from minicot.toy import lines, pictures
from minicot.training import resolve
from minicot.weights import load_model, save_model


def test_a_mistaken_line_is_wrong_and_a_right_one_right_by_the_oracle():
    rng = random.Random(0)
    for scene in pictures.scenes("train", 60, 0, None):
        before = []
        for quantity in pictures.chain(scene):
            line = lines.mistaken(scene, quantity, pictures.wordings_of(scene)[0], rng, True)
            before.append(pictures.write_step(scene, quantity, pictures.wordings_of(scene)[0]))
            assert pictures.label_steps(scene, [*before[:-1], line])[-1] is False, line
            assert all(pictures.label_steps(scene, before)), before


def test_the_base_of_the_reward_models_is_told_what_each_line_is():
    """Verdicts and numbers stand behind the steps, where a reward model reads; the verdicts are the oracle's,
    of a line alone."""
    told = []
    for row in lines.rows("train", 20, start=10, kinds=lines.ASKED, reads=(True, False)):
        said, scene = row["solution"].splitlines(), pictures.scene_of(row["id"].rsplit("-", 3)[0])
        numbers = {str(quantity.value) for quantity in pictures.chain(scene)}
        for k, (step, verdict) in enumerate(zip(said[::2], said[1::2]), 1):
            assert step.startswith(f"Step {k}: ") and step.endswith(".")
            if row["question"].startswith("What is right? "):
                assert verdict[0] == " " and verdict[1:] in numbers
            elif ": " in step.removeprefix(f"Step {k}: "):  # it rests on no other
                told.append(verdict)
                assert pictures.label_steps(scene, [step]) == [verdict == "yes"]
        assert "<image>" in row["question"] and row["answer"] == said[-1].strip()
    assert 0.4 < told.count("yes") / len(told) < 0.6


def test_sums_are_told_right_or_wrong():
    for row in lines.sums(20):
        said = row["solution"].splitlines()
        for step, verdict in zip(said[::2], said[1::2]):
            a, symbol, b, c = re.fullmatch(r"Step \d: (\d+) ([-+x/]) (\d+) = (\d+)\.", step).groups()
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b), "/": int(a) / int(b)}
            assert (value[symbol] == int(c)) == (verdict == "yes"), step
        assert len(said) == 16 and "image" not in row


@pytest.mark.parametrize(
    "way", [lines.slipped, lines.swapped, lines.renamed, lines.confused, lines.miscopied]
)
@pytest.mark.parametrize("known", [True, False])
def test_every_way_to_go_wrong_makes_a_wrong_line_by_the_oracle(way, known):
    rng, made = random.Random(0), 0
    for scene in pictures.scenes("train", 80, 0, None):
        wording, before = pictures.wordings_of(scene)[0], []
        for place, quantity in enumerate(stated := pictures.chain(scene)):
            if quantity not in pictures.read_from(scene):
                line = way(scene, quantity, wording, rng, stated[:place] if known else None)
                made += line is not None
                if line:
                    assert line != pictures.write_step(scene, quantity, wording)
                    assert pictures.label_steps(scene, [*before, line])[-1] is False, (line, scene.id)
            before.append(pictures.write_step(scene, quantity, wording))
    assert made > 20


def test_what_is_swapped_has_been_stated_where_something_could():
    swaps = 0
    for scene in pictures.scenes("train", 60, 0, None):
        stated = pictures.chain(scene)
        for place, quantity in enumerate(stated):
            could = [scene.quantities[p] for p in lines.others_of(scene, quantity)]
            taken = [scene.quantities[p] for p in lines.others_of(scene, quantity, stated[:place])]
            assert taken == [other for other in could if other in stated[:place]] or taken == could
            swaps += taken != could
    assert swaps > 40


@pytest.mark.parametrize("stage", lines.LABELLED)
def test_chains_are_labelled_as_the_oracle_does(stage):
    """Up to the first wrong line and false from there on; about as many are wrong as the stage says."""
    _, how = lines.LABELLED[stage]
    drawn = [lines.labelled(scene, 0, **how) for scene in pictures.scenes("train", 200, 0, None)]
    for one in drawn:
        [response] = one.responses
        scene = one.problem.id.rsplit("-", 1)[0]
        truth = pictures.label_steps(scene, split_steps(response.text))
        assert response.step_labels == ursa_labels.so_far(truth), response.text
        assert response.correct == all(response.step_labels) and one.problem.answer == response.answer
    assert abs(sum(not one.responses[0].correct for one in drawn) / 200 - 0.15 - how.get("share", 0.5)) < 0.1


def test_a_reward_models_body_is_a_base_again(tmp_path):
    base = load_model(resolve("toy-vision"), dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    save_model(RewardModel(base, "prm"), tmp_path / "prm")
    lines.headless(tmp_path / "prm", tmp_path / "base")
    after = load_model(tmp_path / "base", dtype=torch.float32).state_dict()
    assert after.keys() == before.keys() and all(after[name].equal(before[name]) for name in before)
    assert Tokenizer(tmp_path / "base").decode([5]) == Tokenizer(resolve("toy-vision")).decode([5])


def test_a_probe_finds_what_is_there_and_nothing_where_nothing_is(monkeypatch):
    """Labels that are a direction of the hidden states in lines that compute, chance in those that read."""
    made = torch.Generator().manual_seed(0)

    def at_lines(folder, sampled):
        hidden, computes = torch.randn(2000, 8, generator=made), torch.rand(2000, generator=made) < 0.5
        return hidden, torch.where(computes, hidden[:, 3] > 0, hidden[:, 3].roll(1) > 0), computes

    monkeypatch.setattr(ursa_labels, "at_lines", at_lines)
    found = ursa_labels.probe("", [], [])
    assert found["computes"] > 0.99 and abs(found["reads"] - 0.5) < 0.05


def test_the_shipped_base_judges_lines_and_the_one_that_sees_does_not():
    how = lines.LABELLED["last"][1]
    drawn = [lines.labelled(scene, 0, **how) for scene in pictures.scenes("validation", 160, 0, None)]
    judge, sees = (
        ursa_labels.probe(resolve(base), drawn[:80], drawn[80:]) for base in ("toy-judge", "toy-vision")
    )
    assert judge["reads"] > 0.95 and judge["computes"] > 0.7
    assert max(sees.values()) < 0.7


def test_the_stages_share_no_problem_id_and_no_picture_with_the_recipe():
    rows = [row for draw in (1, 2) for row in lines.rows("train", 3, kinds=lines.ASKED, draw=draw)]
    assert len({row["id"] for row in rows + lines.sums(2)}) == 14
    assert lines.PART[0] == 2 * ursa.SIZES["taught"]
