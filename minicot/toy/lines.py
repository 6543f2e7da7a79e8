"""Right and wrong lines about pictures: what the base of the reward models was made from.

    python -m minicot.toy.lines --out runs/lines
    stage() { python train.py --train language --eval-split "" --seed 10 "$@"; }
    stage --init toy-vision --data runs/lines/first.jsonl --steps 3000 --out runs/first
    stage --init runs/first --data runs/lines/second.jsonl --steps 2500 --out runs/second
    stage --init runs/second --data runs/lines/third.jsonl --steps 1500 --out runs/third
    stage --init runs/third --data runs/lines/fourth.jsonl --steps 5000 --out runs/fourth
    labels() {
        python train.py --task prm --train language --seed 10 --lr 1e-3 --batch-size 32 --init $1 --steps $3 \
            --samples runs/lines/$2.jsonl --out runs/$2
        python -m minicot.toy.lines --headless runs/$2 --out runs/$2-base
    }
    labels runs/fourth fifth 1000
    labels runs/fifth-base sixth 2500
    labels runs/sixth-base last 3000

They made --init toy-judge, in 120 minutes of one core and 33 of two (the sixth and the last by torchrun,
two processes end where one does). A reward model must compare a line with the picture, with the problem and
with the lines before it. A model of 1.4M parameters does not learn that from 3,000 labelled chains; the
papers' of 8B brings it along. So toy-vision is shown lines about other pictures of the train split, many of
them with a mistake of their own. In the first four stages verdicts stand behind them:

    Kim has the pens of Mia and Eva together. ...                 Step 1: Mia: pens 6.
                                                                  no
                                                                  Step 2: Eva: pens 9.
                                                                  yes
    What is right? Kim has the pens of Mia and Eva together. ...  Step 1: Mia: pens 6.
                                                                   5

A verdict stands where a reward model's head will be read, behind a line, and no word but the problem asks for
it: knowledge that the model has elsewhere does not help the head (README.md here). Verdicts are of a line
alone; no mistake is carried on.

    first   verdicts and right numbers (to read again is learned first); half of the rows hold only the lines
            that read
    second  verdicts alone; in whole chains four of five lines that read are right, so that a line that
            computes can be held against them
    third   of whole chains, and of sums without a picture
    fourth  the same, other mistakes, numbers copied wrongly among them

Then the body learns below a reward model's head itself, from the oracle's labels (`labelled`), which is
faster: all that is learned from is whether a line is right. The head is dropped after each stage.

    fifth   the mistakes of the fourth
    sixth   those that a solver makes: of another person, a step left out, far results
    last    also another operation; what stands in the place of another has been stated before
"""

import argparse
import random
import shutil
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from minicot.records import Response, Samples, problem_from_row, samples_to_row
from minicot.toy.base_text import write_rows
from minicot.toy.pictures import chain, read_from, row_of, scenes, wordings_of, write_step
from minicot.toy.problems import FACTS, LINKS, compute, operands

ASKED = {"verdict": "", "number": "What is right? "}
OPERATIONS = {FACTS[kind][0]: kind for kind in LINKS}  # sign: kind
PART = (12_000, 8000)  # of the train split: from where, how many pictures; behind those of the recipe ursa


def near(n, rng):
    """Another positive number, at most 3 away."""
    return rng.choice([m for m in range(n - 3, n + 4) if 0 < m != n])


def with_numbers(scene, stated, quantity, wording, numbers):
    """The line of `stated` with these numbers; nothing where their result is not whole and positive, or is
    the quantity's own after all."""
    value = compute(quantity.kind, numbers)
    if value and value > 0 and value != quantity.value:
        return write_step(scene, stated, wording, (*numbers, value))


def others_of(scene, quantity, among=None):
    """The places of the quantities (of `among`, where some are) that could stand for one of those that this
    one rests on."""
    found = [
        place
        for place, other in enumerate(scene.quantities)
        if other.item == quantity.item and other != quantity and place not in quantity.of
    ]
    return [place for place in found if scene.quantities[place] in (among or ())] or found


def miscopied(scene, quantity, wording, rng, among=None):
    """One of the numbers copied wrongly, by 1 to 3."""
    numbers, i = [*operands(scene, quantity)], rng.randrange(len(quantity.of))
    numbers[i] = near(numbers[i], rng)
    return with_numbers(scene, quantity, quantity, wording, tuple(numbers))


def swapped(scene, quantity, wording, rng, among=None, tries=8):
    """Another quantity in the place of one that this one rests on."""
    others = others_of(scene, quantity, among)
    for _ in range(tries if others else 0):
        at = rng.randrange(len(quantity.of))
        of = tuple(rng.choice(others) if i == at else place for i, place in enumerate(quantity.of))
        other = replace(quantity, of=of)
        if line := with_numbers(scene, other, quantity, wording, operands(scene, other)):
            return line


def renamed(scene, quantity, wording, rng, among=None):
    """The right numbers, said of somebody else, who is none of `among`: a step is left out."""
    others = [
        other.who
        for other in scene.quantities
        if other.who and other.item == quantity.item and other not in (among or ())
        if other.who != quantity.who and other.value != quantity.value
    ]
    if quantity.who and others:
        return write_step(scene, replace(quantity, who=rng.choice(others)), wording)


def confused(scene, quantity, wording, rng, among=None):
    """Another operation on the right numbers."""
    a, b = operands(scene, quantity)
    for symbol in rng.sample([sign for sign in OPERATIONS if sign != FACTS[quantity.kind][0]], 3):
        value = compute(OPERATIONS[symbol], (a, b)) if symbol != "/" or b == 2 else None
        if value and value > 0 and value != quantity.value:
            return write_step(scene, quantity, wording, (a, b, value), symbol)


def slipped(scene, quantity, wording, rng, among=None):
    """A wrong result: near, ten off, or far."""
    if rng.random() < 0.6:
        value = near(quantity.value, rng)
    else:
        far = (quantity.value + 2 * rng.randint(1, 20), max(1, quantity.value - rng.randint(4, 15)))
        far = (quantity.value + 10, quantity.value - 10, *far)
        value = rng.choice([m for m in far if m > 0 and m != quantity.value])
    return write_step(scene, quantity, wording, (*operands(scene, quantity), value))


def mistaken(scene, quantity, wording, rng, copied=False):
    """The line that states this quantity, with one mistake: a number read or computed wrongly by 1 to 3,
    another quantity in the place of one that it rests on, or, if asked, a number of these copied wrongly. Its
    last number is not the right one."""
    slip = near(quantity.value, rng)
    if not FACTS[quantity.kind][0]:
        return write_step(scene, quantity, wording, (slip,))
    said = miscopied(scene, quantity, wording, rng) if copied and rng.random() < 1 / 3 else None
    if not said and others_of(scene, quantity) and rng.random() < 0.5:
        said = swapped(scene, quantity, wording, rng, tries=1)
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
        step = step if right else mistaken(scene, quantity, wording, rng, copied=draw > 3)
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
            kind = rng.choice(LINKS)
            a, b, few = rng.randint(1, 40), rng.randint(1, 20), rng.randint(2, 5)
            a, b = {"fewer": (a + b, b), "times": (a, few), "half": (2 * a, 2)}.get(kind, (a, b))
            value, right = compute(kind, (a, b)), rng.random() < 0.5
            said = value if right else near(value, rng)
            lines += [f"Step {k}: {a} {FACTS[kind][0]} {b} = {said}.", ("no", "yes")[right]]
        made.append(
            {"id": f"sums-{i}", "question": "Sums.", "answer": lines[-1], "solution": "\n".join(lines)}
        )
    return made


LABELLED = {  # stage: (how many chains of each picture, how they are made)
    "fifth": (4, dict(seed="prm")),
    "sixth": (8, dict(seed="six", ways={slipped: 3, swapped: 5, renamed: 4, miscopied: 1})),
    "last": (
        12,
        dict(seed="steps", ways={slipped: 2, swapped: 5, renamed: 3, confused: 2}, share=0.6, known=True),
    ),
}


def labelled(scene, draw, *, seed="prm", ways=None, share=0.5, known=False):
    """A whole chain as Samples of one response. This share of them has a mistake in a line that computes,
    15 % one in a line that reads; step_labels are false from there on. ways: of the mistakes in lines that
    compute, with weights; None: as `mistaken` makes them. known: what is swapped has been stated, of whom a
    step speaks wrongly has not. The last line gives the right answer all the same."""
    rng = random.Random(f"{seed} {scene.id} {draw}")
    row, wording, stated = row_of(scene), rng.choice(wordings_of(scene)), chain(scene)
    reads, u, wrong = [quantity in read_from(scene) for quantity in stated], rng.random(), None
    if u < share + 0.15:
        reading = u < 0.15 if ways else u >= share
        wrong = rng.choice([place for place, read in enumerate(reads) if read == reading])
    lines = [f"Step {k}: {write_step(scene, quantity, wording)}" for k, quantity in enumerate(stated, 1)]
    if wrong is not None:
        told = (scene, stated[wrong], wording, rng)
        if ways and not reading:
            [way] = rng.choices([*ways], [*ways.values()])
            among = stated[:wrong] if known else None
            said = way(*told, among) or slipped(*told)
        else:
            said = mistaken(*told, copied=True)
        lines[wrong] = f"Step {wrong + 1}: {said}"
    kept = {key: row[key] for key in ("question", "answer", "image")} | {"id": f"{scene.id}-{draw}"}
    labels = [wrong is None or place < wrong for place in range(len(stated))]
    text = "\n".join([*lines, f"†Answer: {row['answer']}"])
    response = Response(text, wrong is None, answer=row["answer"], step_labels=labels)
    return Samples(problem_from_row(kept, "lines", 0), [response])


def shuffled(samples):
    rows = [samples_to_row(one) for one in samples]
    random.Random(0).shuffle(rows)
    return rows


def headless(reward_model, out):
    """Write a reward model's body as a language model of toy-vision's layout, for another head."""
    tensors = load_file(Path(reward_model) / "model.safetensors")
    shutil.copytree(Path(__file__).with_name("vision_base"), out, dirs_exist_ok=True)
    kept = {name: value for name, value in tensors.items() if not name.startswith("score.")}
    save_file(kept, Path(out) / "model.safetensors", metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--headless", type=Path, help="write this reward model there as a base, and no rows")
    args, (start, n), both = parser.parse_args(), PART, (True, False)
    if args.headless:
        return headless(args.headless, args.out)
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    stages = {
        "first": rows("train", n, start=start, kinds=ASKED, reads=both),
        "second": rows("train", n, start=start, reads=both, draw=2),
        "third": rows("train", n, start=start, draw=3) + sums(n),
        "fourth": [row for draw in range(4, 10) for row in rows("train", n, start=start, draw=draw)],
    }
    stages["fourth"] += sums(3 * n, start=n)
    for name, (draws, how) in LABELLED.items():
        drawn = (
            labelled(scene, draw, **how) for draw in range(draws) for scene in scenes("train", n, start, None)
        )
        stages[name] = shuffled(drawn)
    for name, made in stages.items():
        write_rows(made, out / f"{name}.jsonl")


if __name__ == "__main__":
    main()
