"""What the reward models of the recipe ursa start from: a base that has learned to tell right lines of a
chain from wrong ones.

A model of 1.4M parameters does not learn it from 3,000 labelled chains; the paper's of 8B brings it along.
So the base that sees is shown lines about other pictures of the train split, each right or, as likely, with a
mistake of its own, and writes its verdict behind each:

    Kim has the pens of Mia and Eva together. ...                 Step 1: Mia: pens 6.
                                                                  no
                                                                  Step 2: Eva: pens 9.
                                                                  yes
    What is right? Kim has the pens of Mia and Eva together. ...  Step 1: Mia: pens 6.
                                                                   5

It is written where a reward model's head will read. Half of the rows ask for the right number, not for the
verdict: to read again is learned first. Half of the rows hold only the lines that read. A mistake: a number
off by 1 to 3, or another quantity in the place of one that the line rests on. A verdict is of its line alone;
no mistake is carried on. The second stage asks for verdicts alone, and in whole chains four of five lines
that read are right, so that a line that computes can be held against them; the third is of whole chains, and
of sums without a picture.
"""

import math
import random
from dataclasses import replace
from functools import partial

import torch

from minicot.data import collate, encode_row, image_reader, target
from minicot.scoring import score
from minicot.records import Problem, fields_of
from minicot.runs import write_json
from minicot.sets import read_problems
from minicot.tokenizer import Tokenizer
from minicot.toy.pictures import chain, read_from, scene_of, wordings_of, write_step
from minicot.toy.problems import FACTS, compute, operands
from minicot.training import pick_device
from minicot.weights import load_model

ASKED = {"verdict": "", "number": "What is right? "}


def mistaken(scene, quantity, wording, rng):
    """The line that states this quantity, with one mistake; its number is not the right one."""
    near = rng.choice([n for n in range(quantity.value - 3, quantity.value + 4) if 0 < n != quantity.value])
    if not FACTS[quantity.kind][0]:
        return write_step(scene, quantity, wording, (near,))
    others = [
        place
        for place, other in enumerate(scene.quantities)
        if other.item == quantity.item and other != quantity and place not in quantity.of
    ]
    if quantity.of and others and rng.random() < 0.5:
        swapped = rng.randrange(len(quantity.of))
        of = tuple(rng.choice(others) if i == swapped else place for i, place in enumerate(quantity.of))
        numbers = operands(scene, replace(quantity, of=of))
        value = compute(quantity.kind, numbers)
        if value and value > 0 and value != quantity.value:
            return write_step(scene, replace(quantity, of=of), wording, (*numbers, value))
    return write_step(scene, quantity, wording, (*operands(scene, quantity), near))


def judged(problem, kind, reads, draw=1):
    """A Problem of pictures -> one whose solution is lines with verdicts (kind "verdict": yes, no; "number":
    the right one behind it); reads: only the lines that read, in any order. Another draw has
    other mistakes; from the second on, in whole chains, four of five lines that read are right."""
    scene, lines = scene_of(vars(problem)), []
    rng = random.Random(f"{kind} {reads} {problem.id}{f' {draw}' * (draw > 1)}")
    wording = rng.choice(wordings_of(scene))
    stated = rng.sample(read_from(scene), len(read_from(scene))) if reads else chain(scene)
    for k, quantity in enumerate(stated, 1):
        steady = draw > 1 and not reads and quantity in read_from(scene)
        right = rng.random() < (0.8 if steady else 0.5)
        step = write_step(scene, quantity, wording) if right else mistaken(scene, quantity, wording, rng)
        verdict = ("no", "yes")[right] if kind == "verdict" else f" {quantity.value}"
        lines += [f"Step {k}: {step}", verdict]
    question = "<image>" if reads else problem.question
    return replace(
        problem, id=f"{problem.id}-{kind}-{reads:d}", question=ASKED[kind] + question, steps=None,
        answer=verdict.strip(), solution="\n".join(lines),
    )  # fmt: skip


def judged_rows(data, split, start, stop, *, kinds=tuple(ASKED), reads=(True, False), draw=1):
    """The rows of each problem start to stop of a split of the picture world."""
    for problem in read_problems(data, split, limit=stop)[start:]:
        for kind in kinds:
            yield from (judged(problem, kind, read, draw) for read in reads)


def sums(n):
    """n rows of eight sums in words of one line, without a picture, half of them wrong by 1 to 3, with
    verdicts."""
    for i in range(n):
        rng, lines = random.Random(f"sums {i}"), []
        for k in range(1, 9):
            kind, a, b = (
                rng.choice(("more", "fewer", "times", "half")),
                rng.randint(1, 40),
                rng.randint(1, 20),
            )
            a, b = {"fewer": (a + b, b), "times": (a, rng.randint(2, 5)), "half": (2 * a, 2)}.get(
                kind, (a, b)
            )
            c, right = compute(kind, (a, b)), rng.random() < 0.5
            said = c if right else rng.choice([m for m in range(c - 3, c + 4) if 0 < m != c])
            lines += [f"Step {k}: {a} {FACTS[kind][0]} {b} = {said}.", ("no", "yes")[right]]
        yield Problem(id=f"sums-{i}", question="Sums.", answer=lines[-1], solution="\n".join(lines))


@torch.no_grad()
def judged_rightly(out, model, lines, *, seed):
    """{"verdicts": of each problem of `lines` [verdicts for which the model finds the right one likelier than
    not, verdicts]}; lines of numbers are left out."""
    judge, tokenizer = load_model(model, dtype=torch.float32, device=pick_device("auto")), Tokenizer(model)
    reader, found = image_reader(judge, tokenizer, model), []
    for problem in read_problems(str(lines)):
        if problem.answer in ("yes", "no"):
            row = encode_row(tokenizer, problem, target(problem, "cot"), mode="cot")
            batch = collate([[row]], tokenizer.pad_id, reader).to(pick_device("auto"))
            logps = score(judge.eval(), batch)[batch.loss_mask].tolist()
            texts = [tokenizer.decode([token]) for token in row.ids[row.n_prompt :]]
            behind = [before == "\n" and text in "yn" for before, text in zip(texts, texts[1:])]
            right = [logp > math.log(0.5) for logp, is_verdict in zip(logps[1:], behind) if is_verdict]
            found.append([sum(right), len(right)])
    write_json(out, {"verdicts": found})


def judge(E):
    """The base of the reward models, one for all seeds; its pictures are behind those of SFT. It learns
    verdicts and numbers, then verdicts alone, then those of whole chains and of sums."""
    s, base = E.size, E.init
    part = partial(judged_rows, E.data, E.train, 2 * s.taught, 2 * s.taught + s.judged)
    verdicts = dict(kinds=("verdict",))
    stages = {
        "judge": ("lines", part()),
        "judge-more": ("lines-more", part(**verdicts, draw=2)),
        "judge-sums": ("lines-sums", [*part(**verdicts, reads=(False,), draw=3), *sums(s.judged)]),
    }
    held_out = judged_rows(E.data, E.validation, 0, 100, **verdicts, draw=2)
    held_out = E.write("held-out.jsonl", map(fields_of, held_out))
    for (name, (file, rows)), steps in zip(stages.items(), s.judge_steps):
        base = E.model(
            name, "train.py", init=base, data=E.write(f"{file}.jsonl", map(fields_of, rows)), eval_split="",
            steps=steps, lr=s.lr, batch_size=s.batch_size, train="language", save_every=1000, seeds=1,
        )  # fmt: skip
        E.read("lines", judged_rightly, base, held_out, of=[base])
    return base
