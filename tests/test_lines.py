"""Lines with verdicts (minicot/toy/lines.py), and the base that learned from them."""

import random
import re

import torch

from minicot.recipes import ursa, ursa_labels
from minicot.records import problem_from_row
from minicot.tokenizer import Tokenizer
from minicot.toy import lines, pictures
from minicot.training import resolve


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


def test_verdicts_are_counted_where_the_right_one_is_likelier(monkeypatch):
    """By a model that always says yes."""
    rows = [problem_from_row(row, "", i) for i, row in enumerate(lines.rows("validation", 5, draw=4))]
    yes = Tokenizer(resolve("toy-judge")).encode("y")[0]
    monkeypatch.setattr(ursa_labels, "score", lambda model, batch: torch.where(batch.ids == yes, -0.1, -2.3))
    found = ursa_labels.verdicts(resolve("toy-judge"), rows)
    said = [verdict for row in rows for verdict in row.solution.splitlines()[1::2]]
    assert sum(map(len, found.values())) == len(said)
    for (_, verdict), right in found.items():
        assert right == [verdict == "yes"] * len(right)


def test_the_shipped_base_judges_lines_and_the_one_that_sees_does_not():
    rows = [problem_from_row(row, "", i) for i, row in enumerate(lines.rows("validation", 30, draw=4))]
    share = lambda found: {key: sum(right) / len(right) for key, right in found.items()}
    judge = share(ursa_labels.verdicts(resolve("toy-judge"), rows))
    assert min(judge["reads", "yes"], judge["reads", "no"]) > 0.95
    assert judge["computes", "yes"] > 0.8 and judge["computes", "no"] > 0.3
    assert max(share(ursa_labels.verdicts(resolve("toy-vision"), rows)).values()) < 0.5


def test_the_stages_share_no_problem_id_and_no_picture_with_the_recipe():
    rows = [row for draw in (1, 2) for row in lines.rows("train", 3, kinds=lines.ASKED, draw=draw)]
    assert len({row["id"] for row in rows + lines.sums(2)}) == 14
    assert lines.PART[0] == 2 * ursa.SIZES["taught"]
