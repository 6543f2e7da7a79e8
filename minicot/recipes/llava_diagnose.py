"""Why the LLaVA-Reasoner recipe's numbers are what they are: what its base reads, where chains first go
wrong, what the verifier's scores order.

    python -m minicot.recipes.llava_diagnose                      # from cells in runs/recipes/llava_verifier
    python -m minicot.recipes.llava_diagnose --base toy-vision    # what a base reads, arrays and files
    python -m minicot.recipes.llava_diagnose --pairs FILE         # how early rejected chains go wrong

Prints tables; each takes a minute.
"""

import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from minicot.answers import is_correct, majority_vote, split_steps
from minicot.config import Flags, flag, run
from minicot.data import image_reader
from minicot.metrics import paired_difference
from minicot.recipes.llava_verifier import SCORES, E, scored_by
from minicot.recipes.tables import INTERVAL, markdown, read_results
from minicot.records import Problem, read_samples
from minicot.sampling import sample_groups
from minicot.tokenizer import Tokenizer
from minicot.toy import pictures, teacher
from minicot.training import resolve
from minicot.verifier import best_of_n, best_of_repeated, weighted_vote
from minicot.weights import load_model


@dataclass(frozen=True)
class DiagnoseConfig(Flags):
    """Why the LLaVA-Reasoner recipe's numbers are what they are."""

    base: str = flag("model", "", "what a base that sees reads: its folder or name, such as toy-vision")
    pictures: int = flag("data", 100, "of each kind, with --base", least=1)
    pairs: str = flag("data", "", "right x wrong pairs of toy pictures: where the wrong one goes wrong")


FILES = ((None, None), (192, "png"), (200, "png"), (320, "jpg"), (200, "jpg"), (64, "jpg"))
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
    return (f"of {n}", *ways), lines


# ---- where chains go wrong ---------------------------------------------------------------------------------


def errors_table(seeds):
    """Samples of test problems, a list a seed -> of the chains about each kind of picture the share that is
    right, and the share that first goes wrong in each way."""
    counts = defaultdict(Counter)
    for samples in (one for groups in seeds for one in groups):
        for response in samples.responses:
            kind = "right" if response.correct else teacher.first_error(samples.problem.id, response.text)
            counts[samples.problem.id.split("-")[0]][kind] += 1
    rows = [
        (
            kind,
            *(
                f"{counts[kind][one] / max(counts[kind].total(), 1):.1%}"
                for one in ("right", *teacher.ERRORS)
            ),
        )
        for kind in pictures.KINDS
    ]
    return ("chains", "right", *teacher.ERRORS), rows


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


def orders_table(seeds, name, said):
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
        f"{said}, seed",
        f"right above wrong: {first}",
        *others,
        "best's answer is no other's",
        "best",
        "best of repeated answers",
        "majority",
    )
    return head, rows


def betas_table(seeds, name, said, betas=(0.1, 1, 3, 10, 30)):
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
    return (f"vote by {said}, over majority", *(f"beta {beta}" for beta in betas)), rows


# ---- what a cut leaves ---------------------------------------------------------------------------


def cut_table(samples, widths=(13, 18, 21, 26, 30, 33, 42, 54)):
    """Pairs -> of their rejected chains the share whose first wrong step stands whole within their first W
    words, at blanks as align.py --truncate-words counts them."""
    ends = []
    for one in samples:
        text = one.responses[1].text
        labels = pictures.label_steps(one.problem.id.partition("/")[0], split_steps(text))
        ends += (
            ["\n".join(text.split("\n")[: labels.index(False) + 1]).count(" ") + 1] if False in labels else []
        )
    shares = (sum(end <= width for end in ends) / len(samples) for width in widths)
    return (f"{len(samples)} pairs, W", *widths), [("wrong within W", *(f"{share:.1%}" for share in shares))]


def main(config):
    if config.base:
        found = [base_table(resolve(config.base), config.pictures)]
    elif config.pairs:
        found = [cut_table(read_samples(config.pairs))]
    else:
        E.parse([])
        results = read_results(E.results / f"{E.name}.json", E.world())
        [setting] = {tuple(cell["settings"].items()) for cell in results["cells"] if cell["name"] == "dpo"}
        label = "".join(f"-{flag}{value:g}" for flag, value in setting)
        first, seeds = results["sizes"]["first_seed"], results["seeds"]["dpo"]
        folders = [E.root / f"dpo{label}-s{seed}" for seed in range(first, first + seeds)]
        drawn = [read_samples(folder / "test-samples-scored" / "samples.jsonl") for folder in folders]
        found = [errors_table(drawn)]
        for by in SCORES:
            scored = [scored_by(sampled, by) for sampled in drawn]
            found += [orders_table(scored, "dpo", by), betas_table(scored, "dpo", by)]
        found.append(orders_table(scored, "short", "fewer characters"))
    print("\n".join(line for head, rows in found for line in markdown(head, rows)))


if __name__ == "__main__":
    run(main, DiagnoseConfig)
