"""Right and wrong lines about pictures, with verdicts: what the base of the reward models was made from.

    python -m minicot.toy.lines --out runs/lines
    stage() { python train.py --train language --eval-split "" --seed 10 "$@"; }
    stage --init toy-vision --data runs/lines/first.jsonl --steps 3000 --out runs/first
    stage --init runs/first --data runs/lines/second.jsonl --steps 2500 --out runs/second
    stage --init runs/second --data runs/lines/third.jsonl --steps 1500 --out runs/third
    stage --init runs/third --data runs/lines/last.jsonl --steps 5000 --out runs/judge-base

They made --init toy-judge, in 110 minutes of one core (the last one by torchrun on two processes, which end
where one does). A reward model must compare a line with the picture or with the lines before it. A model of
1.4M parameters does not learn that from 3,000 labelled chains; the papers' of 8B brings it along. So
toy-vision is shown lines about other pictures of the train split, half of them with a mistake of their own:

    Kim has the pens of Mia and Eva together. ...                 Step 1: Mia: pens 6.
                                                                  no
                                                                  Step 2: Eva: pens 9.
                                                                  yes
    What is right? Kim has the pens of Mia and Eva together. ...  Step 1: Mia: pens 6.
                                                                   5

The verdict stands where a reward model's head will be read, behind a line, and no word but the problem asks
for it: knowledge that the model has elsewhere does not help the head (README.md here). Verdicts are of a line
alone; no mistake is carried on.

    first   verdicts and right numbers (to read again is learned first); half of the rows hold only the lines
            that read
    second  verdicts alone; in whole chains four of five lines that read are right, so that a line that
            computes can be held against them
    third   of whole chains, and of sums without a picture
    last    the same, other mistakes, numbers copied wrongly among them
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path

from minicot.toy.base_text import write_rows
from minicot.toy.pictures import chain, read_from, row_of, scenes, wordings_of, write_step
from minicot.toy.problems import FACTS, compute, operands

ASKED = {"verdict": "", "number": "What is right? "}
PART = (12_000, 8000)  # of the train split: from where, how many pictures; behind those of the recipe ursa


def near(n, rng):
    """Another positive number, at most 3 away."""
    return rng.choice([m for m in range(n - 3, n + 4) if 0 < m != n])


def mistaken(scene, quantity, wording, rng, miscopied=False):
    """The line that states this quantity, with one mistake: a number read or computed wrongly by 1 to 3,
    another quantity in the place of one that it rests on, or, if asked, a number of these copied wrongly. Its
    last number is not the right one."""
    slip = near(quantity.value, rng)
    if not FACTS[quantity.kind][0]:
        return write_step(scene, quantity, wording, (slip,))

    def line(stated, numbers):
        """Nothing where the result is not whole and positive, or is the right one after all."""
        value = compute(quantity.kind, numbers)
        if value and value > 0 and value != quantity.value:
            return write_step(scene, stated, wording, (*numbers, value))

    said = None
    if miscopied and rng.random() < 1 / 3:
        numbers, i = [*operands(scene, quantity)], rng.randrange(len(quantity.of))
        numbers[i] = near(numbers[i], rng)
        said = line(quantity, tuple(numbers))
    others = [
        place
        for place, other in enumerate(scene.quantities)
        if other.item == quantity.item and other != quantity and place not in quantity.of
    ]
    if not said and others and rng.random() < 0.5:
        swapped = rng.randrange(len(quantity.of))
        of = tuple(rng.choice(others) if i == swapped else place for i, place in enumerate(quantity.of))
        other = replace(quantity, of=of)
        said = line(other, operands(scene, other))
    return said or write_step(scene, quantity, wording, (*operands(scene, quantity), slip))


def judged(scene, kind, reads, draw=1):
    """A picture's row whose solution is lines with verdicts (kind "verdict": yes, no; "number": the right one
    behind it); reads: only the lines that read, in any order. Another draw has other mistakes; from
    the second on, in whole chains, four of five lines that read are right; from the fourth on numbers are
    copied wrongly, too."""
    row, lines = row_of(scene), []
    rng = random.Random(f"{kind} {reads} {scene.id}{f' {draw}' * (draw > 1)}")
    wording = rng.choice(wordings_of(scene))
    stated = rng.sample(read_from(scene), len(read_from(scene))) if reads else chain(scene)
    for k, quantity in enumerate(stated, 1):
        steady = draw > 1 and not reads and quantity in read_from(scene)
        right = rng.random() < (0.8 if steady else 0.5)
        step = write_step(scene, quantity, wording)
        step = step if right else mistaken(scene, quantity, wording, rng, miscopied=draw > 3)
        verdict = ("no", "yes")[right] if kind == "verdict" else f" {quantity.value}"
        lines += [f"Step {k}: {step}", verdict]
    return {
        "id": f"{scene.id}-{kind}-{reads:d}-{draw}",
        "question": ASKED[kind] + ("<image>" if reads else row["question"]),
        "answer": verdict.strip(),
        "solution": "\n".join(lines),
        "image": row["image"],
    }


def rows(split, n, *, start=0, kinds=("verdict",), reads=(False,), draw=1):
    """The rows of the scenes start .. start + n - 1 of a split of the pictures."""
    return [
        judged(scene, kind, read, draw)
        for scene in scenes(split, n, start, None)
        for kind in kinds
        for read in reads
    ]


def sums(n, *, start=0):
    """Rows of eight sums, differences, products and halves without a picture, half of them wrong by 1 to 3,
    with verdicts."""
    made = []
    for i in range(start, start + n):
        rng, lines = random.Random(f"sums {i}"), []
        for k in range(1, 9):
            kind = rng.choice(("more", "fewer", "times", "half"))
            a, b, few = rng.randint(1, 40), rng.randint(1, 20), rng.randint(2, 5)
            a, b = {"fewer": (a + b, b), "times": (a, few), "half": (2 * a, 2)}.get(kind, (a, b))
            value, right = compute(kind, (a, b)), rng.random() < 0.5
            said = value if right else near(value, rng)
            lines += [f"Step {k}: {a} {FACTS[kind][0]} {b} = {said}.", ("no", "yes")[right]]
        made.append(
            {"id": f"sums-{i}", "question": "Sums.", "answer": lines[-1], "solution": "\n".join(lines)}
        )
    return made


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    out, (start, n), both = parser.parse_args().out, PART, (True, False)
    out.mkdir(parents=True, exist_ok=True)
    stages = {
        "first": rows("train", n, start=start, kinds=ASKED, reads=both),
        "second": rows("train", n, start=start, reads=both, draw=2),
        "third": rows("train", n, start=start, draw=3) + sums(n),
        "last": [row for draw in range(4, 10) for row in rows("train", n, start=start, draw=draw)],
    }
    stages["last"] += sums(3 * n, start=n)
    for name, made in stages.items():
        write_rows(made, out / f"{name}.jsonl")


if __name__ == "__main__":
    main()
