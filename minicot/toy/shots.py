"""The world in which worked examples matter: a convention that holds in one prompt and that its shots show.

    Q: Kim has 2 Zoe bags, found 3 pens. Ana is at the inn. How many pens?
    A: Think step by step. 2 Zoe x 6 = 12. 12 + 3 = 15. #### 15

    Q: Tom has 4 Zoe bags and 5 cups. How many cups?
    A:

A unit is a bag that somebody's name is given to; how many things a Zoe bag holds is true in this prompt
alone. No shot explains it, some use it. Other shots use other bags, name a Zoe bag without its value ("5 Zoe
bags, lost 2 Zoe bags. How many Zoe bags?"), or have no unit; nearly two fifths of the words are filler. So a
question needs one or two of the 6 to 8 shots, likeness to it doesn't tell which, and of these it needs a few
words: what a pruner of shots and of words (CoT-Influx, arXiv 2312.08901) has to find out.

The units have people's names because the base, which was drilled in those, finds a number by them at once:
after one drill of 8,000 rows on both it looked up all of 1,048 values by a name, and one in four (chance:
there were four) by a made-up word such as "bo".

An Item is one exercise, asked or worked. Its difficulty is its steps, of which each is one operation, and one
more for each conversion, whose value stands elsewhere. Five evolutions rewrite it as MRD3's do (named there:
three harder ones, one easier, one to a difficulty); mrd3_row writes it as MRD3's rows are.

    python -m minicot.toy.shots --rows 7000 --out runs/in-context
    stage() { python train.py --mode plain --no-group-by-length --save-every 0 "$@"; }
    stage --init toy --data runs/in-context/drill.jsonl --out runs/in-context/drilled --batch-size 16
    stage --init runs/in-context/drilled --data runs/in-context/short.jsonl --out runs/in-context/shown
    stage --init runs/in-context/shown --data runs/in-context/full.jsonl --out runs/in-context/full
    stage --init runs/in-context/full --data runs/in-context/more.jsonl --out runs/in-context/base
    python sample.py --evaluate --max-new-tokens 48 --model runs/in-context/base \\
        --data runs/in-context/test-all.jsonl

make a base that uses its shots, whole and in telegram style, and measure it (test-<how>.jsonl for each of
VARIANTS): look-ups alone, prompts of few shots, prompts of many, twice. The scenes that it learns from are
drawn from seeds that rows() never reaches.
"""

import argparse
import hashlib
import random
import re
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from minicot.records import shot_text
from minicot.toy.base_text import FIRST_SEED, write_rows
from minicot.toy.problems import ITEMS, NAMES, scenes_in_split

VALUES = range(2, 10)
LARGEST = 99  # no number of a chain is above it, none below 2
FILLER_SHARE, MOST_WORDS = 0.4, 340  # of the shots together; punctuation counts as a word

FILLER = (
    "{p} is at the {w}.",
    "{p} and {q} are in the {w}.",
    "{p} is so {m}.",
    "{p} is away with {q}.",
    "{p} is by the {m} {w}.",
    "{p} found the {w} first.",
    "It is day {n}.",
    "{p} is {n}.",
)
ASIDES = ("Think step by step.", "Step by step.", "{p} did that with {q}.", "{p} is so {m}.")
PLACES, MOODS = ("inn", "hall", "bay", "den"), ("dim", "calm", "sad", "tan", "old")
SLOTS = {slot: f"(?:{'|'.join(words)})" for slot, words in zip("pqwm", (NAMES, NAMES, PLACES, MOODS))}
WORD = re.compile(r" ?\d+| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+")
KINDS = {
    "filler": "|".join(f" {said.replace('.', '[.]').format(**SLOTS, n='[0-9]')}" for said in FILLER + ASIDES),
    "number": r" \d+",
    "operator": r" [-+=]| x(?= \d)",
    "unit": rf" {SLOTS['p']}(?= bags| x)| bags",
    "other": WORD.pattern,
}
KIND = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in KINDS.items()))


# ---- an exercise ---------------------------------------------------------------------------------


class Term(NamedTuple):
    """`count` things, or `count` of a unit of `value` things each, that are added (1) or taken away (-1)."""

    sign: int
    count: int
    unit: str = ""
    value: int = 1


@dataclass(frozen=True)
class Item:
    """Terms that are joined from the left, and the `factor` that all is taken times. `style` draws the
    words."""

    who: str
    thing: str
    terms: tuple[Term, ...]
    factor: int = 1
    style: int = 0

    @property
    def operations(self) -> list[tuple[str, int]]:
        """Each operation as text and its result: the conversions, the joins, the factor."""
        conversions = [(f"{t.count} {t.unit} x {t.value}", t.count * t.value) for t in self.terms if t.unit]
        totals = list(accumulate(t.sign * t.count * t.value for t in self.terms))
        joins = [
            (f"{before} {'+' if t.sign > 0 else '-'} {t.count * t.value}", after)
            for before, t, after in zip(totals, self.terms[1:], totals[1:])
        ]
        times = [(f"{totals[-1]} x {self.factor}", totals[-1] * self.factor)] if self.factor > 1 else []
        return conversions + joins + times

    @property
    def answer(self) -> int:
        return self.operations[-1][1]

    @property
    def steps(self) -> list[str]:
        return [f"{said} = {result}." for said, result in self.operations]

    @property
    def difficulty(self) -> int:
        """1 to 10: steps, and one more for each conversion."""
        return min(10, len(self.operations) + sum(bool(term.unit) for term in self.terms))

    @property
    def valid(self) -> bool:
        """Something to compute, from a first term that is there, and every number within 2..LARGEST."""
        if not self.terms or self.terms[0].sign < 0 or not self.operations:
            return False
        return all(2 <= result <= LARGEST for _, result in self.operations)

    @property
    def told(self) -> list[str]:
        """The question's two sentences: what there is, what is asked."""
        rng, said = random.Random(self.style), self.who
        for place, term in enumerate(self.terms):
            joins = (", found", ", bought", " and") if term.sign > 0 else (", lost", ", gave away")
            verb = rng.choice(joins if place else (" has", " owns", " had"))
            said += f"{verb} {term.count} {f'{term.unit} bags' if term.unit else self.thing}"
        times = f", all that {self.factor} times" if self.factor > 1 else ""
        return [f"{said}{times}.", f"How many {self.thing}?"]

    @property
    def question(self) -> str:
        return " ".join(self.told)

    @property
    def solution(self) -> str:
        return " ".join([*self.steps, f"#### {self.answer}"])


def draw_item(rng, people, units=(), loose=0, thing=None, factor=1):
    """A valid Item of one of `people`: a term for each (unit, value) of `units`, and `loose` without one."""
    while True:  # rejection: a try fails where a number is too small or too large
        terms = [Term(rng.choice((1, 1, -1)), rng.randint(2, 5), *unit) for unit in units]
        terms += [Term(rng.choice((1, 1, -1)), rng.randint(2, 20)) for _ in range(loose)]
        rng.shuffle(terms)
        who, what = rng.choice(people), thing or rng.choice(ITEMS)
        item = Item(who, what, tuple(terms), factor, rng.randrange(1000))
        if item.valid:
            return item


def mrd3_row(item: Item) -> dict:
    """An Item as a row of MRD3, all of it text."""
    return {
        "instruction": item.question,
        "input": "",
        "output": item.solution,
        "answer": str(item.answer),
        "difficulty": str(item.difficulty),
        "steps": str(len(item.steps)),
    }


# ---- MRD3's five evolutions: (Item, seed) -> Item ------------------------------------------------


def one_of(candidates, name, item, seed):
    """One of the valid candidates, the same for the same item and seed. ValueError where there is none."""
    valid = [candidate for candidate in candidates if candidate.valid]
    if not valid:
        raise ValueError(f"{name}: no such form of {item.question!r}")
    return random.Random(f"{name} {seed} {item}").choice(valid)


def add_constraints(item: Item, seed: int) -> Item:
    """Harder: one thing more happens, another join."""
    more = [Term(sign, count) for sign in (1, -1) for count in range(2, 10)]
    grown = [replace(item, terms=(*item.terms, term)) for term in more]
    return one_of(grown, "add_constraints", item, seed)


def deepening(item: Item, seed: int, unit: str, value: int) -> Item:
    """Harder: things that were simply counted are so many of a unit."""
    changed = [
        replace(item, terms=(*item.terms[:i], Term(term.sign, count, unit, value), *item.terms[i + 1 :]))
        for i, term in enumerate(item.terms)
        if not term.unit
        for count in range(2, 6)
    ]
    return one_of(changed, "deepening", item, seed)


def increase_reasoning(item: Item, seed: int) -> Item:
    """Harder: all is taken times a factor, another step behind the last."""
    times = [replace(item, factor=factor) for factor in (2, 3) if item.factor == 1]
    return one_of(times, "increase_reasoning", item, seed)


def produce_easier(item: Item, seed: int) -> Item:
    """Easier: without its factor, or without one of its terms."""
    fewer = [replace(item, terms=item.terms[:i] + item.terms[i + 1 :]) for i in range(len(item.terms))]
    return one_of(fewer + [replace(item, factor=1)] * (item.factor > 1), "produce_easier", item, seed)


def revise_difficulty(item: Item, seed: int, difficulty: int) -> Item:
    """Of the difficulty that is asked for: eased while it is above that, then terms are added."""
    if not 1 <= difficulty <= 10:
        raise ValueError(f"difficulty is {difficulty}; allowed: 1 to 10")
    while item.difficulty > difficulty:
        item = produce_easier(item, seed)
    while item.difficulty < difficulty:
        item = add_constraints(item, seed)
    return item


# ---- a problem and its shots ---------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What is asked, what each unit of the prompt is worth (the asked ones stand first), and the people in
    it, nobody whose name a unit has."""

    id: str
    asked: Item
    units: tuple[tuple[str, int], ...]
    people: tuple[str, ...]


def make_scene(seed: int) -> Scene:
    """The scene of a seed: four units of four values, of which the question uses one, or two (three times in
    ten); with one, a join follows two times in three, a factor one time in six."""
    rng = random.Random(f"shots {seed}")
    names = rng.sample(NAMES, len(NAMES))
    units, people = tuple(zip(names[:4], rng.sample(VALUES, 4))), tuple(names[4:])
    used = rng.choice((1,) * 7 + (2,) * 3)
    loose = rng.choice((0, 1, 1)) if used == 1 else 0
    asked = draw_item(rng, people, units[:used], loose, factor=rng.choice((1,) * 5 + (2,)))
    return Scene(f"shots-{seed}", asked, units, people)


def split_of(scene: Scene) -> str:
    """ "train" (80 %), "validation" or "test" (10 % each) by the question's numbers, its units' values among
    them: disjoint whatever the seeds, the names and the shots."""
    numbers = [scene.asked.factor, *((term.sign, term.count, term.value) for term in scene.asked.terms)]
    bucket = int(hashlib.sha256(repr(numbers).encode()).hexdigest()[:8], 16) % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


def word_kinds(shot: str) -> list[tuple[str, str]]:
    """A whole shot as [(word, kind)]: the words with the space before them, which joined are the shot again;
    "filler" (a sentence of FILLER or ASIDES), "number", "operator", "unit" or "other"."""
    return [(word, one.lastgroup) for one in KIND.finditer(shot) for word in WORD.findall(one[0])]


def shots_of(scene: Scene) -> list[tuple[str, str]]:
    """The candidate shots as [(text, the unit whose value it shows or "")], in random order."""
    rng = random.Random(f"shots of {scene.id}")
    used = [(term.unit, term.value) for term in scene.asked.terms if term.unit]
    others = [unit for unit in scene.units if unit not in used]
    plan = [("show", unit) for unit in used for _ in range(rng.choice((1, 1, 2)))]
    plan += [("other", rng.choice(others)), ("mention", rng.choice(used)), ("plain", None)]
    while len(plan) < 6 or (len(plan) < 8 and rng.random() < 0.7):
        kind = rng.choice(("other", "mention", "plain"))
        plan.append((kind, rng.choice(others if kind == "other" else used)))
    rng.shuffle(plan)
    told, shows = [], [unit[0] if kind in ("show", "other") else "" for kind, unit in plan]
    for (kind, unit), shown in zip(plan, shows):
        thing = f"{unit[0]} bags" if kind == "mention" else None
        loose = rng.choice((0, 0, 1)) if shown else 2
        item = draw_item(rng, scene.people, [unit] if shown else [], loose, thing)
        told.append((item.told, [*item.steps, f"#### {item.answer}"]))
    texts = lambda: [shot_text(" ".join(asked), " ".join(chain)) for asked, chain in told]
    words = len(WORD.findall("".join(texts())))
    most = min(MOST_WORDS, words / (1 - FILLER_SHARE))
    while words < most:
        shot, part = rng.choice(told), rng.choice((0, 0, 0, 1))
        (p, q), n = rng.sample(scene.people, 2), rng.randint(2, 9)
        slots = {"p": p, "q": q, "n": n, "w": rng.choice(PLACES), "m": rng.choice(MOODS)}
        said = rng.choice((FILLER, ASIDES)[part]).format(**slots)
        shot[part].insert(rng.randrange(len(shot[part])), said)
        words += len(WORD.findall(f" {said}"))
    return list(zip(texts(), shows))


def row_of(scene: Scene) -> dict:
    """A scene as a row: id, question, answer, solution, steps, shots; difficulty; shows (for each shot the
    unit whose value it shows, or ""); needed (the places of the shots that show a unit of the question; one
    for each of these units is enough); units (their values)."""
    (texts, shows), asked = zip(*shots_of(scene)), scene.asked
    used = {term.unit: term.value for term in asked.terms if term.unit}
    return {
        "id": scene.id,
        "question": asked.question,
        "answer": str(asked.answer),
        "solution": asked.solution,
        "steps": asked.steps,
        "difficulty": asked.difficulty,
        "shots": list(texts),
        "shows": list(shows),
        "needed": [place for place, unit in enumerate(shows) if unit in used],
        "units": used,
    }


def rows(split: str, n: int, *, start: int = 0, first_seed: int = 0) -> list[dict]:
    """The rows start .. start + n - 1 of a split, in the order of their seeds: the same list in every
    process. ValueError for an unknown split."""
    make = lambda seed: make_scene(first_seed + seed)
    return [row_of(scene) for scene in scenes_in_split(make, split_of, split, n, start)]


# ---- shots left out, words left out --------------------------------------------------------------


def with_shots(row: dict, places: list[int]) -> dict:
    """A row with these of its shots."""
    kept = {name: [row[name][place] for place in places] for name in ("shots", "shows")}
    return row | kept | {"needed": [new for new, place in enumerate(places) if place in row["needed"]]}


def without_words(row: dict, drop) -> dict:
    """A row without the words of its shots whose kind `drop` says true to."""
    keep = lambda shot: "".join(word for word, kind in word_kinds(shot) if not drop(kind))
    return row | {"shots": [keep(shot) for shot in row["shots"]]}


VARIANTS = {
    "all": lambda row: row,
    "needed": lambda row: with_shots(row, row["needed"]),
    "others": lambda row: with_shots(row, [i for i in range(len(row["shots"])) if i not in row["needed"]]),
    "none": lambda row: with_shots(row, []),
    "no-filler": lambda row: without_words(row, lambda kind: kind == "filler"),
    "no-numbers": lambda row: without_words(row, lambda kind: kind == "number"),
}


def thinned(row: dict, most_others: int) -> dict:
    """A row as a pruner might leave it. Half of them, and all where more others stand than that, lose shots:
    up to `most_others` that aren't needed stay, and the needed ones 19 times in 20. Half lose words at a rate
    of up to 0.6, filler twice as often; numbers, operators and units one tenth as often, but in one row of
    five as often as the rest."""
    rng = random.Random(f"thinned {row['id']}")
    others = [place for place in range(len(row["shots"])) if place not in row["needed"]]
    if rng.random() < 0.5 or most_others < len(others):
        others = rng.sample(others, rng.randint(0, min(most_others, len(others))))
        row = with_shots(row, sorted(others + row["needed"] * (rng.random() < 0.95)))
    rate, spared = rng.choice((0, 1)) * rng.uniform(0, 0.6), rng.choice((0.1,) * 4 + (1.0,))
    rates = {"filler": 2 * rate, "other": rate}
    return without_words(row, lambda kind: rng.random() < rates.get(kind, spared * rate))


def drill_rows(n: int) -> list[dict]:
    """Look-ups alone: what four units are worth, then eight times one of them; as base_text's recall says it,
    which the base can do ("lines"), or as a chain does."""
    rng, drilled = random.Random("drill"), []
    for _ in range(n):
        units = list(zip(rng.sample(NAMES, 4), rng.sample(VALUES, 4)))
        asked, item, lines = rng.choices(units, k=8), rng.choice(ITEMS), rng.random() < 0.5
        chain = lambda unit, value: f"{(count := rng.randint(2, 5))} {unit} x {value} = {count * value}."
        told = [f"{u}: {item} {value}." if lines else chain(u, value) for u, value in units]
        said = [f"{u} has {value}." if lines else chain(u, value) for u, value in asked]
        drilled.append({"question": "\n".join(told), "solution": " ".join(said)})
    return drilled


def stages(n: int) -> dict[str, list[dict]]:
    """What the base learns from, stage by stage: {name: rows}, n of the short stage, of the others half as
    many."""
    learned = rows("train", 2 * n, first_seed=FIRST_SEED)
    return {
        "drill": drill_rows(n // 2),
        "short": [thinned(row, 1) for row in learned[:n]],
        "full": [thinned(row, 8) for row in learned[n : n * 3 // 2]],
        "more": [thinned(row, 8) for row in learned[n * 3 // 2 :]],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=7_000, help="of the short stage; of the others half as many"
    )
    parser.add_argument("--test", type=int, default=300, help="test rows of each of VARIANTS")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.rows < 2 or args.test < 1:
        parser.error(f"--rows is {args.rows}, --test {args.test}; allowed: at least 2 and 1")
    args.out.mkdir(parents=True, exist_ok=True)
    held_out = rows("test", args.test)
    tests = {f"test-{how}": [vary(row) for row in held_out] for how, vary in VARIANTS.items()}
    files = stages(args.rows) | tests
    for name, made in files.items():
        write_rows(made, args.out / f"{name}.jsonl")


if __name__ == "__main__":
    main()
