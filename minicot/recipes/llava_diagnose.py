"""Why the LLaVA-Reasoner recipe's numbers are what they are: what its base reads, where chains first go
wrong, what the verifier's scores order.

    python -m minicot.recipes.llava_diagnose             # from the cells in runs/llava_reasoner/toy
    python -m minicot.recipes.llava_diagnose --base      # what a base that sees reads, arrays and files

Prints Markdown tables; each takes a minute.
"""

import argparse
import collections
import json
import re
import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from minicot.answers import is_correct, majority_vote, normalize, split_steps
from minicot.data import image_reader
from minicot.records import Problem, read_samples
from minicot.errors import InputError
from minicot.metrics import paired_difference
from minicot.recipes.cells import INTERVAL, markdown
from minicot.recipes.llava_reasoner import RESULTS, RUNS
from minicot.sampling import sample_groups
from minicot.tokenizer import Tokenizer
from minicot.toy import pictures
from minicot.toy.problems import FACTS
from minicot.training import resolve
from minicot.verifier import best_of_n, weighted_vote
from minicot.weights import load_model

FILES = ((None, None), (192, "png"), (200, "png"), (320, "jpg"), (200, "jpg"), (64, "jpg"))
# What a chain's first wrong step does: it reads a person's number of the other thing, or another number;
# takes up a number that no step before gave; miscalculates; computes with another person's or another number
# of the question, or by another operation; is not a step. "answer": the answer alone is wrong or missing.
ERRORS = ("other column", "misread", "look-up", "arithmetic", "operand", "operation", "unreadable", "answer")
HOLDS = {
    "+": lambda a, b, c: a + b == c,
    "-": lambda a, b, c: a - b == c,
    "x": lambda a, b, c: a * b == c,
    "/": lambda a, b, c: a == b * c and b > 0,
}
EQUATION = r"({}) (\d+) ([-+x/]) (\d+) = (\d+)( more)?"


# ---- what the base reads -----------------------------------------------------------------------------------


def readings(model, tokenizer, reader, rows, images, root=None):
    """What the model writes, greedily, to each of some pictures.reading_rows about these images."""
    asked = [
        Problem(row["id"], row["question"], image=image, image_root=root) for row, image in zip(rows, images)
    ]
    options = dict(n=1, mode="cot", style="hash", max_new_tokens=80, temperature=0.0, reader=reader, seed=0)
    return [one.responses[0].text for one in sample_groups(model, tokenizer, asked, **options)]


def save_as(rows, side, ending, folder):
    """The rows' pictures as files of side x side pixels (JPEG of quality 90) -> their names."""
    names = [f"{row['id']}-{side}.{ending}" for row in rows]
    for row, name in zip(rows, names):
        picture = pictures.draw(row["image"][4:]).resize((side, side), Image.Resampling.NEAREST)
        picture.save(Path(folder) / name, quality=90)
    return names


def base_table(folder, n):
    """Of n test pictures of each kind, how many are read without a mistake, as arrays and as files."""
    model, tokenizer = load_model(folder, dtype=torch.float32).eval(), Tokenizer(folder)
    reader = image_reader(model, tokenizer, folder)
    ways, lines = ["arrays" if side is None else f"{side} {ending}" for side, ending in FILES], []
    for kind in pictures.KINDS:
        rows, right = pictures.reading_rows("test", n, kind=kind), []
        for side, ending in FILES:
            with tempfile.TemporaryDirectory() as root:
                images = [row["image"] for row in rows] if side is None else save_as(rows, side, ending, root)
                found = readings(model, tokenizer, reader, rows, images, root)
            right.append(sum(text == row["solution"] for text, row in zip(found, rows)))
        lines.append((kind, *right))
    return "\n".join(markdown((f"of {n}", *ways), lines))


# ---- where chains go wrong ---------------------------------------------------------------------------------


def first_error(problem_id, text):
    """What the first wrong step of a chain (in the wording "because") does: one of ERRORS."""
    scene, steps = pictures.scene_of(problem_id), split_steps(text)
    labels = pictures.label_steps(scene, steps)
    if False not in labels:
        return "answer"
    step, before = steps[labels.index(False)], steps[: labels.index(False)]
    reading = re.fullmatch(r"(\w+): \w+ (\d+)\.", step)
    if reading:
        others = {
            (one.who, str(one.value)) for one in pictures.in_picture(scene) if one.item != scene.asked.item
        }
        return "other column" if reading.groups() in others else "misread"
    known, _, claim = step.rpartition(", so ")
    equation = re.search(EQUATION.format(r"\w+ has"), claim) or re.search(EQUATION.format("they have"), claim)
    if not equation:
        return "unreadable"
    who, a, sign, b, c, more = equation.groups()
    if known and (
        not pictures.label_steps(scene, [*before, f"{known}."])[-1]
        or not {*map(int, re.findall(r"\d+", known))} <= {int(a), int(b)}
    ):
        return "look-up"
    if not HOLDS[sign](int(a), int(b), int(c)):
        return "arithmetic"
    asked = {"difference": more, "total": who == "they have", "value": False}[scene.asked.kind]
    own = [one for one in scene.quantities if f"{one.who} has" == who and not more]
    subjects = [scene.asked] if asked else own
    return "operand" if sign in {FACTS[one.kind][0] for one in subjects} else "operation"


def errors_table(seeds):
    """Samples of test problems, a list a seed -> of the chains about each kind of picture the share that is
    right, and the share that first goes wrong in each way."""
    counts = collections.defaultdict(collections.Counter)
    for samples in (one for groups in seeds for one in groups):
        for response in samples.responses:
            kind = "right" if response.correct else first_error(samples.problem.id, response.text)
            counts[samples.problem.id.split("-")[0]][kind] += 1
    rows = [
        (kind, *(f"{counts[kind][one] / max(counts[kind].total(), 1):.1%}" for one in ("right", *ERRORS)))
        for kind in pictures.KINDS
    ]
    return "\n".join(markdown(("chains", "right", *ERRORS), rows))


# ---- what the verifier's scores order ----------------------------------------------------------------------


def answers_and_scores(samples, name):
    """Of one question's Samples the answers and the scores of this name; "short": the fewer characters the
    higher, a control for length."""
    scores = [-len(one.text) if name == "short" else one.scores[name] for one in samples.responses]
    return [one.answer for one in samples.responses], scores


def orders(samples, name):
    """Of the pairs of a right and a wrong chain to one question, the share in which the right one has the
    higher score, a tie one half; None where there is no pair."""
    _, scores = answers_and_scores(samples, name)
    right, wrong = (
        [score for score, one in zip(scores, samples.responses) if bool(one.correct) is side]
        for side in (True, False)
    )
    won = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    return sum(won) / len(won) if won else None


def best_of_repeated(answers, scores):
    """Best-of-n among the answers that at least two responses give (among all where none is)."""
    votes = collections.Counter(normalize(one) for one in answers if one is not None)
    repeated = [one if one is not None and votes[normalize(one)] > 1 else None for one in answers]
    return best_of_n(repeated if any(repeated) else answers, scores)


def orders_table(seeds, name):
    """Scored Samples, a list a seed -> what a score orders, and how well its best answer does."""
    rows, mean = [], lambda values: sum(values) / len(values) if values else float("nan")
    for seed, groups in enumerate(seeds):
        won = {
            kind: [orders(one, name) for one in groups if one.problem.id.startswith(kind)]
            for kind in pictures.KINDS
        }
        both = [answers_and_scores(one, name) for one in groups]
        best = [best_of_n(*one) for one in both]
        chosen = [best, [best_of_repeated(*one) for one in both], [majority_vote(one[0]) for one in both]]
        odd = [
            sum(is_correct(answer, found) for answer in answers) == 1
            for (answers, _), found in zip(both, best)
            if found is not None
        ]
        shares = [mean([one for one in won[kind] if one is not None]) for kind in pictures.KINDS]
        shares += [mean(odd)] + [
            mean([is_correct(answer, one.problem.answer) for answer, one in zip(way, groups)])
            for way in chosen
        ]
        rows.append((seed, *(f"{share:.1%}" for share in shares)))
    first, *others = pictures.KINDS
    head = (
        f"{name}, seed",
        f"right above wrong: {first}",
        *others,
        "best's answer is no other's",
        "best",
        "best of repeated answers",
        "majority",
    )
    return "\n".join(markdown(head, rows))


def betas_table(seeds, name, betas=(0.1, 1, 3, 10, 30)):
    """Scored Samples, a list a seed -> the weighted votes among all at other betas, over majority."""
    right = lambda choose: [
        [float(is_correct(choose(*answers_and_scores(one, name)), one.problem.answer)) for one in groups]
        for groups in seeds
    ]
    majority = right(lambda answers, _: majority_vote(answers))
    over = lambda beta, weight: paired_difference(
        majority, right(partial(weighted_vote, beta=beta, weight=weight))
    )
    rows = [
        (weight, *(INTERVAL.format(*over(beta, weight)) for beta in betas)) for weight in ("exp", "sigmoid")
    ]
    return "\n".join(markdown((f"vote by {name}, over majority", *(f"beta {beta}" for beta in betas)), rows))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", nargs="?", const="toy-vision", help="a base's folder or name")
    parser.add_argument("--pictures", type=int, default=100, help="of each kind, with --base")
    args = parser.parse_args(argv)
    if args.base:
        print(base_table(resolve(args.base), args.pictures))
        return
    results = json.loads((RESULTS / "llava_reasoner.json").read_text())
    [lr] = {cell["settings"]["lr"] for cell in results["cells"] if cell["name"] == "dpo@cot"}
    seeds = [
        read_samples(RUNS / "toy" / f"dpo-lr{lr:g}-s{seed}" / "scored-cut.jsonl")
        for seed in range(results["sizes"]["seeds"])
    ]
    print(
        errors_table(seeds),
        *(orders_table(seeds, name) for name in ("dpo", "dpo-cut", "short")),
        *(betas_table(seeds, name) for name in ("dpo", "dpo-cut")),
        sep="\n\n",
    )


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None
