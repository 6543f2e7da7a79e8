"""The built-in world: scenes, questions, worked solutions, and an oracle that labels any written step.

    Tom has 3 apples. Ana has 4 more apples than Tom. Ben has twice as many apples as Ana.
    How many apples does Ben have?

    Ana has 3 + 4 = 7.
    Ben has 7 x 2 = 14.
    #### 14

A Scene is a small dependency graph: each Quantity (a person's number of an item) is given, or made by ONE
operation from quantities before it and numbers of its own. The question asks for a quantity, a total or a
difference; the difficulty is the number of operations that the answer needs, all else is distraction. A
problem's id rebuilds its scene, so the oracle needs no more.
"""

import hashlib
import random
import re
from dataclasses import dataclass, replace
from itertools import count, islice

from minicot.answers import extract_answer, is_correct, split_steps
from minicot.errors import InputError

NAMES = ("Tom", "Ana", "Ben", "Eva", "Max", "Lea", "Sam", "Mia", "Leo", "Zoe", "Kim", "Jon")
ITEMS = ("apples", "pears", "books", "cards", "coins", "shells", "pens", "eggs", "cups", "balls")
SPLITS = ("train", "validation", "test")
DIFFICULTIES = (2, 3, 4)  # operations, and how often each is drawn
DIFFICULTY_WEIGHTS = (5, 4, 2)
LARGEST = 60  # no quantity is above it, none below 2 ("1 apples" is never said)

# kind: (operation symbol, phrasings). {p} the owner, {i} the item, {q} {r} the owners that it refers to,
# {0} {1} its own numbers.
FACTS = {
    "given": (None, ("{p} has {0} {i}.", "{p} owns {0} {i}.")),
    "more": ("+", ("{p} has {0} more {i} than {q}.", "{p} has {0} {i} more than {q}.")),
    "fewer": ("-", ("{p} has {0} fewer {i} than {q}.", "{p} has {0} {i} fewer than {q}.")),
    "times": ("x", ("{p} has {0} times as many {i} as {q}.", "{p} has {0} times the {i} of {q}.")),
    "half": ("/", ("{p} has half as many {i} as {q}.", "{p} has half the {i} of {q}.")),
    "sum": (
        "+",
        ("{p} has as many {i} as {q} and {r} together.", "{p} has the {i} of {q} and {r} together."),
    ),
    "gave": ("-", ("{p} had {0} {i} and gave away {1}.", "{p} had {0} {i} but lost {1}.")),
    "got": ("+", ("{p} had {0} {i} and bought {1} more.", "{p} had {0} {i} and found {1} more.")),
    "bags": ("x", ("{p} has {0} bags of {1} {i}.", "{p} has {0} bags with {1} {i} each.")),
    "total": (
        "+",
        ("How many {i} do {q} and {r} have together?", "How many {i} do {q} and {r} have in all?"),
    ),
    "difference": (
        "-",
        ("How many more {i} does {q} have than {r}?", "How many {i} more does {q} have than {r}?"),
    ),
    "value": (None, ("How many {i} does {q} have?", "Find the number of {i} that {q} has.")),
}
ROOTS = ("gave", "got", "bags")  # one operation on two numbers of their own
# kind: the ranges of its own numbers
NUMBERS = {
    "given": ((2, 20),),
    "more": ((2, 12),),
    "fewer": ((2, 12),),
    "times": ((2, 4),),
    "half": (),
    "sum": (),
    "gave": ((8, 30), (2, 12)),
    "got": ((2, 20), (2, 12)),
    "bags": ((2, 6), (2, 9)),
}
LINKS = ("more", "fewer", "times", "half")  # one operation on a quantity before

# Wordings of one step: {p} owner, {e} "3 + 4 = 7", {c} "7", {i} item, {q} {r} owners, {why} what it rests on.
WORDINGS = {
    "plain": {"one": "{p} has {e}.", "total": "Together they have {e}.", "difference": "{q} has {e} more."},
    "items": {
        "one": "{p} has {e} {i}.",
        "total": "{q} and {r} have {e} {i} together.",
        "difference": "{q} has {e} more {i} than {r}.",
    },
    "so": {
        "one": "{e}, so {p} has {c} {i}.",
        "total": "{e}, so together they have {c} {i}.",
        "difference": "{e}, so {q} has {c} more {i}.",
    },
    "colon": {"one": "{p}: {e}", "total": "Total: {e}", "difference": "Difference: {e}"},
    "bare": {"one": "{e}", "total": "{e}", "difference": "{e}"},
    "because": {
        "one": "{why}{p} has {e}.",
        "total": "{why}together they have {e}.",
        "difference": "{why}{q} has {e} more.",
    },
}
DEFAULT_WORDINGS = ("plain", "items", "colon")  # what make_problem draws from; the rest: teacher only


@dataclass(frozen=True)
class Quantity:
    """`value` of `item`s of `who` (None: the question's own total or difference), made as `kind` says from
    the quantities at the places `of` in the scene and from `numbers`."""

    kind: str
    who: str | None
    item: str
    value: int
    of: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scene:
    """Quantities in dependency order, what is asked, and how it is told (the order and phrasing of its
    sentences)."""

    id: str
    quantities: tuple[Quantity, ...]
    asked: Quantity  # kind "value", "total" or "difference"
    order: tuple[int, ...]  # the places in the order of their sentences
    phrases: tuple[int, ...]  # which phrasing each fact and, last, the question has

    def __post_init__(self):
        for quantity in (*self.quantities, self.asked):
            made = compute(quantity.kind, operands(self, quantity))
            assert made == quantity.value, f"{self.id}: {quantity} makes {made}"

    @property
    def needed(self) -> tuple[int, ...]:
        """Places that the answer depends on, in dependency order; every other place is a distractor."""
        todo, needed = list(self.asked.of), set()
        while todo:
            place = todo.pop()
            needed.add(place)
            todo += self.quantities[place].of
        return tuple(sorted(needed))

    @property
    def derivation(self) -> tuple[Quantity, ...]:
        """The quantities that a full solution computes, one operation each, in dependency order."""
        chain = [self.quantities[place] for place in self.needed] + [self.asked]
        return tuple(quantity for quantity in chain if FACTS[quantity.kind][0])

    @property
    def difficulty(self) -> int:
        return len(self.derivation)


def compute(kind: str, values: tuple[int, ...]) -> int | None:
    """The result of a kind's operation; None where it is no whole number."""
    symbol = FACTS[kind][0]
    if symbol is None:
        return values[0]
    a, b = values
    if symbol == "/":
        return a // b if b and a % b == 0 else None
    return {"+": a + b, "-": a - b, "x": a * b}[symbol]


def operands(scene: Scene, quantity: Quantity) -> tuple[int, ...]:
    """The two numbers that the operation joins (the one number of a given quantity)."""
    numbers = (2,) if quantity.kind == "half" else quantity.numbers
    return tuple(scene.quantities[place].value for place in quantity.of) + numbers


# ---- making a scene ----------------------------------------------------------------------------------------


def make_scene(seed: int, difficulty: int | None = None, distractors: int | None = None) -> Scene:
    """The scene of a seed: `difficulty` operations (1 to 6; None draws from DIFFICULTIES), `distractors`
    facts that the answer does not need (0 to 3; None draws 0, 1 or 2). Every quantity is whole, 2..LARGEST;
    the answer differs from every number in the text and from every quantity but the asked one, so that no
    slip and no copied number is right by luck."""
    draw = random.Random(f"toy {seed}")
    drawn = draw.choices(DIFFICULTIES, DIFFICULTY_WEIGHTS)[0], draw.choices((0, 1, 2), (5, 4, 1))[0]
    difficulty = drawn[0] if difficulty is None else difficulty
    distractors = drawn[1] if distractors is None else distractors
    if not (1 <= difficulty <= 6 and 0 <= distractors <= 3):
        raise ValueError(
            f"toy scene {seed}: difficulty {difficulty}, distractors {distractors}; "
            "allowed: 1 to 6 and 0 to 3"
        )
    rng = random.Random(f"toy {seed} {difficulty} {distractors}")
    while True:  # rejection: a try fails where no number fits
        scene = _try_scene(rng, f"toy-{seed}-{difficulty}-{distractors}", difficulty, distractors)
        if scene is not None:
            return scene


def _try_scene(rng, scene_id, difficulty, distractors):
    names = rng.sample(NAMES, len(NAMES))
    item, other_item = rng.sample(ITEMS, 2)
    ask = rng.choices(("value", "total", "difference"), (6, 3, 2))[0] if difficulty > 1 else "value"
    quantities = [_new(rng, "given", names.pop(), item, [])]
    left = difficulty - (ask != "value")
    if left > 1 and rng.random() < 0.35:
        quantities = [_new(rng, rng.choice(ROOTS), names.pop(), item, [])]
        left -= 1
    if quantities[0] is None:
        return None
    while left:
        if len(quantities) > 1 and rng.random() < 0.25:
            kind, of = "sum", (len(quantities) - 1, rng.randrange(len(quantities) - 1))
        else:
            branches = rng.random() < 0.2  # kept, below, only where a later step joins the branches
            place = rng.randrange(len(quantities)) if branches else len(quantities) - 1
            kind, of = rng.choice(LINKS), (place,)
        quantities.append(_new(rng, kind, names.pop(), item, quantities, of))
        if quantities[-1] is None:
            return None
        left -= 1
    last = len(quantities) - 1
    of = (last,)
    if ask != "value":
        if last == 0:
            quantities.append(_new(rng, "given", names.pop(), item, []))
            last += 1
        of = (last, rng.randrange(last))
        if ask == "difference" and quantities[of[0]].value < quantities[of[1]].value:
            of = of[::-1]
    asked = _asked(ask, of, quantities)
    for _ in range(distractors):
        if rng.random() < 0.4:  # the same person, another item
            extra = _new(rng, "given", rng.choice(quantities).who, other_item, [])
        else:  # another person, the same item
            of = rng.randrange(last + 1)
            kind = rng.choice(("given", *LINKS))
            extra = _new(rng, kind, names.pop(), item, quantities, () if kind == "given" else (of,))
        if extra is None or any((q.who, q.item) == (extra.who, extra.item) for q in quantities):
            return None
        quantities.append(extra)
    scene = _tell(rng, Scene(scene_id, tuple(quantities), asked, (), ()))
    return scene if scene.difficulty == difficulty and _is_fair(scene) else None


def _new(rng, kind, who, item, quantities, of=()):
    """A random quantity of a kind, or None where it is not whole or not within 2..LARGEST."""
    numbers = tuple(rng.randint(low, high) for low, high in NUMBERS[kind])
    values = tuple(quantities[place].value for place in of) + ((2,) if kind == "half" else numbers)
    value = compute(kind, values)
    if value is None or not 2 <= value <= LARGEST:
        return None
    return Quantity(kind, who, item, value, of, numbers)


def _asked(kind, of, quantities):
    values = tuple(quantities[place].value for place in of)
    return Quantity(kind, None, quantities[of[0]].item, compute(kind, values), of)


def _tell(rng, scene):
    """Draw the order of the sentences (dependency order with distractors let in; one time in five any order)
    and their phrasings."""
    needed = scene.needed
    order = sorted(
        range(len(scene.quantities)), key=lambda place: place if place in needed else rng.uniform(0, place)
    )
    if rng.random() < 0.2:
        rng.shuffle(order)
    return replace(scene, order=tuple(order), phrases=tuple(rng.randrange(2) for _ in range(len(order) + 1)))


def _is_fair(scene):
    answer = scene.asked.value
    values = [q.value for place, q in enumerate(scene.quantities) if (place,) != scene.asked.of]
    numbers = [number for q in scene.quantities for number in q.numbers]
    return 2 <= answer <= 2 * LARGEST and answer not in values + numbers


def harder(scene: Scene, seed: int) -> Scene:
    """One operation more: another person, made from the asked quantity, is asked for instead (a total or
    difference is asked as before but of a longer chain). Its id is the parent's plus `.h<seed>`. The child is
    another scene: it has its own split_of, which may differ from its parent's, so whoever evolves training
    problems must drop the children that fall outside the split. ValueError past 6 operations."""
    if scene.difficulty >= 6:
        raise ValueError(f"{scene.id}: already has {scene.difficulty} operations, the most there is")
    rng = random.Random(f"harder {scene.id} {seed}")
    free = [name for name in NAMES if all(q.who != name for q in scene.quantities)]
    while True:
        places = len(scene.quantities)
        base = scene.asked.of[0]
        new = _new(rng, rng.choice(LINKS), rng.choice(free), scene.asked.item, scene.quantities, (base,))
        if new is None:
            continue
        quantities = (*scene.quantities, new)
        of = (places, *scene.asked.of[1:])
        if scene.asked.kind == "difference" and new.value < quantities[of[1]].value:
            of = of[::-1]
        asked = _asked(scene.asked.kind, of, quantities)
        child = _tell(rng, Scene(f"{scene.id}.h{seed}", quantities, asked, (), ()))
        if child.difficulty == scene.difficulty + 1 and _is_fair(child):
            return child


def easier(scene: Scene) -> Scene:
    """One operation less: the last needed quantity's premise is asked for instead. Its id is the parent's
    plus `.e`; as for harder(), the child has a split of its own. ValueError where one operation is left or no
    premise makes a fair question."""
    for place in reversed(scene.needed):
        of = (place,)
        child = replace(scene, id=f"{scene.id}.e", asked=_asked("value", of, scene.quantities))
        if 1 <= child.difficulty < scene.difficulty and _is_fair(child):
            return child
    raise ValueError(f"{scene.id}: has no easier question")


def scene_of(row_or_id: dict | str | Scene) -> Scene:
    """Rebuild the scene of a row or of an id `toy-<seed>-<difficulty>-<distractors>`, followed by `.h<seed>`
    or `.e` a step of evolution. InputError for an id of another form."""
    if isinstance(row_or_id, Scene):
        return row_or_id
    problem_id = row_or_id if isinstance(row_or_id, str) else row_or_id["id"]
    match = re.fullmatch(r"toy-(\d+)-([1-6])-([0-3])((?:\.h\d+|\.e)*)", problem_id)
    if not match:
        raise InputError(
            f"problem id is {problem_id!r}; allowed: toy-<seed>-<difficulty>-<distractors>, "
            "as make_problem writes it"
        )
    scene = make_scene(int(match[1]), int(match[2]), int(match[3]))
    for step in match[4].split(".")[1:]:
        scene = easier(scene) if step == "e" else harder(scene, int(step[1:]))
    return scene


# ---- splits and rows ---------------------------------------------------------------------------------------


def scene_hash(scene: Scene) -> str:
    """Hex hash of what the scene says: structure and numbers. Names, items, phrasing and the order of
    sentences do not count, so problems that differ in these alone fall into the same split. Stable across
    processes and machines."""
    people, items = {}, {}
    content = [
        (q.kind, people.setdefault(q.who, len(people)), items.setdefault(q.item, len(items)), q.of, q.numbers)
        for q in (*scene.quantities, scene.asked)
    ]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def split_of(scene: Scene) -> str:
    """ "train" (80 %), "validation" or "test" (10 % each), by the scene's hash alone: disjoint whatever the
    seeds."""
    bucket = int(scene_hash(scene)[:8], 16) % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


def make_problem(
    seed: int, *, difficulty: int | None = None, distractors: int | None = None, wording: str | None = None
) -> dict:
    """The problem of a seed as a row, see row_of; difficulty and distractors as in make_scene, wording as in
    row_of."""
    return row_of(make_scene(seed, difficulty, distractors), wording=wording)


def row_of(scene: Scene, *, wording: str | None = None) -> dict:
    """A scene as a row: id, question, answer, solution (steps, then `#### answer`), steps, difficulty, facts
    (the sentences of the question), uses (for each step, the places in `facts` that it rests on directly).
    wording: a key of WORDINGS; None draws one for the whole solution. ValueError for another."""
    if wording is not None and wording not in WORDINGS:
        raise ValueError(f"wording is {wording!r}; allowed: {', '.join(WORDINGS)}")
    wording = wording or random.Random(f"wording {scene.id}").choice(DEFAULT_WORDINGS)
    steps = [write_step(scene, quantity, wording) for quantity in scene.derivation]
    facts = fact_sentences(scene)
    question = " ".join([*facts, _say(scene, scene.asked, scene.phrases[-1])])
    return {
        "id": scene.id,
        "question": question,
        "answer": str(scene.asked.value),
        "solution": "\n".join([*steps, f"#### {scene.asked.value}"]),
        "steps": steps,
        "difficulty": scene.difficulty,
        "facts": facts,
        "uses": [facts_used(scene, quantity) for quantity in scene.derivation],
    }


def rows(
    split: str,
    n: int,
    *,
    start: int = 0,
    difficulty: int | None = None,
    distractors: int | None = None,
    wording: str | None = None,
) -> list[dict]:
    """The rows start .. start + n - 1 of a split, in the order of their seeds: the same list in every
    process. ValueError for an unknown split."""
    make = lambda seed: make_scene(seed, difficulty, distractors)
    return [row_of(scene, wording=wording) for scene in scenes_in_split(make, split_of, split, n, start)]


def scenes_in_split(make, split_of, split: str, n: int, start: int) -> list[Scene]:
    """The scenes start .. start + n - 1 of a split among make(0), make(1), ..."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    return list(islice((scene for scene in map(make, count()) if split_of(scene) == split), start, start + n))


# ---- telling -----------------------------------------------------------------------------------------------


def _say(scene: Scene, quantity: Quantity, phrase: int) -> str:
    q, r = [scene.quantities[place].who for place in quantity.of] + [None] * (2 - len(quantity.of))
    template = FACTS[quantity.kind][1][phrase]
    text = template.format(*quantity.numbers, p=quantity.who, i=quantity.item, q=q, r=r)
    return text.replace(" 2 times as many", " twice as many").replace(" 2 times the", " twice the")


def fact_sentences(scene: Scene) -> list[str]:
    """The facts of the question, one sentence a quantity, in the order in which they are told."""
    return [_say(scene, scene.quantities[place], scene.phrases[place]) for place in scene.order]


def facts_used(scene: Scene, quantity: Quantity) -> list[int]:
    """Places in fact_sentences that a step deriving `quantity` reads: its own fact, and given facts that it
    refers to."""
    places = [place for place in quantity.of if not FACTS[scene.quantities[place].kind][0]]
    if quantity in scene.quantities:
        places.append(scene.quantities.index(quantity))
    return sorted(scene.order.index(place) for place in places)


def write_step(
    scene: Scene,
    quantity: Quantity,
    wording: str,
    numbers: tuple[int, int, int] | None = None,
    symbol: str | None = None,
) -> str:
    """The step that derives a quantity, in one of WORDINGS. `numbers` (a, b, c) and `symbol` replace the true
    a op b = c (teacher.corrupt)."""
    a, b, c = numbers or (*operands(scene, quantity), quantity.value)
    owners = [scene.quantities[place].who for place in quantity.of]
    q, r = owners + [None] * (2 - len(owners))
    reasons = [f"{who} has {value}" for who, value in zip(owners, (a, b))]
    template = WORDINGS[wording][quantity.kind if quantity.kind in ("total", "difference") else "one"]
    text = template.format(
        p=quantity.who,
        q=q,
        r=r,
        i=quantity.item,
        c=c,
        e=f"{a} {symbol or FACTS[quantity.kind][0]} {b} = {c}",
        why=f"{' and '.join(reasons)}, so " if reasons else "",
    )
    return text[0].upper() + text[1:]


def perception_questions(row_or_id: dict | str | Scene) -> list[dict]:
    """Questions that read ONE fact of the scene, as rows {id, question, answer, fact}: the whole text is
    told, then e.g. "How many apples does Tom have?" for a given quantity, "How many more apples does Ana have
    than Tom?" for a comparison. `fact` is the place in facts."""
    scene = scene_of(row_or_id)
    facts = " ".join(fact_sentences(scene))
    ask = {
        "given": "How many {i} does {p} have?",
        "more": "How many more {i} does {p} have than {q}?",
        "fewer": "How many fewer {i} does {p} have than {q}?",
        "times": "How many times the {i} of {q} does {p} have?",
        "gave": "How many {i} did {p} have at first?",
        "got": "How many {i} did {p} have at first?",
        "bags": "How many bags does {p} have?",
    }
    questions = []
    for number, place in enumerate(scene.order):
        quantity = scene.quantities[place]
        if quantity.kind in ask:
            q = scene.quantities[quantity.of[0]].who if quantity.of else None
            question = ask[quantity.kind].format(i=quantity.item, p=quantity.who, q=q)
            questions.append(
                {
                    "id": f"{scene.id}-fact{number}",
                    "question": f"{facts} {question}",
                    "answer": str(quantity.numbers[0]),
                    "fact": number,
                }
            )
    return questions


# ---- the step oracle ---------------------------------------------------------------------------------------

_WHO = rf"(?:{'|'.join(NAMES)})"
_ITEM = rf"(?:{'|'.join(ITEMS)})"
_TOGETHER = r"(?:together|in all|in total)"
_CLAIM = re.compile(
    rf"(?:{_TOGETHER},? )?"
    rf"(?:(?P<who>{_WHO}|they)(?: and (?P<also>{_WHO}))?(?: (?:has|have|had|owns|gets)|:) |"
    r"(?P<label>total|difference): )?"
    rf"(?:(?<=: )(?P<read>{_ITEM}) )?"
    r"(?:(?P<a>\d{1,6}) ?(?P<op>[-−+x*×/÷]) ?(?P<b>\d{1,6}) ?= ?)?(?P<c>\d{1,6})"
    rf"(?: (?P<more>more|fewer))?(?(read)|(?: (?P<item>{_ITEM}))?)(?: (?P<more2>more|fewer))?"
    rf"(?: than (?P<than>{_WHO}))?(?: {_TOGETHER})?",
    re.IGNORECASE,
)
_SYMBOLS = str.maketrans("−*×÷", "-xx/")


def label_steps(row_or_id: dict | str | Scene, steps: list[str]) -> list[bool]:
    """Step oracle: label each step right (True) or wrong, given the steps before it.

    A step is right iff its arithmetic holds and it restates a fact of the scene or a quantity that a right
    step before derived, or derives a quantity (needed or not, also the total or difference of any two) by the
    scene's own operation from given or already derived ones. Any wording that the grammar reads and any valid
    order will do; a step that leans on a skipped or a wrong step, carries an error on consistently, or cannot
    be parsed is wrong.
    """
    scene = scene_of(row_or_id)
    known = {q for q in scene.quantities if not FACTS[q.kind][0]}
    return [_label(scene, known, step) for step in steps]


def derived_by(scene: Scene, steps: list[str]) -> tuple[list[bool], set[Quantity]]:
    """label_steps' labels, and the quantities that the right steps derived."""
    given = {q for q in scene.quantities if not FACTS[q.kind][0]}
    known = set(given)
    labels = [_label(scene, known, step) for step in steps]
    return labels, known - given


def _label(scene, known, step):
    text = re.sub(r"^step \d+\s*[:.]\s*", "", " ".join(step.split()), flags=re.IGNORECASE).removesuffix(".")
    facts = {_say(scene, q, phrase).removesuffix(".").lower() for q in scene.quantities for phrase in (0, 1)}
    if text.lower() in facts:
        return True
    before, _, after = text.partition(", since ")  # the reason first
    clauses = [after, before] if after else [text]
    clauses = [part for clause in clauses for part in re.split(r", so |; |(?<=\d) and (?=[A-Z])", clause)]
    learned = set(known)
    for clause in clauses:
        clause = re.sub(r"^(?:since|so|then|thus),? ", "", clause.strip(), flags=re.IGNORECASE)
        match = _CLAIM.fullmatch(clause)
        true = match and [q for q in _subjects(scene, match) if _holds(scene, q, match, learned)]
        if not true:
            return False
        learned.update(true)
    known |= learned
    return True


def _subjects(scene, match):
    """The quantities that a claim may be about."""
    text, people = match[0].lower(), {q.who.lower(): q.who for q in scene.quantities}
    item = (match["read"] or match["item"] or scene.asked.item).lower()
    places = {q.who: place for place, q in enumerate(scene.quantities) if q.item == item}
    who, also, than = (people.get((match[name] or "").lower()) for name in ("who", "also", "than"))
    more = (match["more"] or match["more2"] or "").lower()
    asks_two = len(scene.asked.of) == 2 and item == scene.asked.item
    is_total = match["also"] or re.search(_TOGETHER, text) or (match["who"] or "").lower() == "they"
    if match["label"] or (is_total and not match["also"]):
        named = (match["label"] or "total").lower()
        return [scene.asked] if scene.asked.kind == named and asks_two and not more and not who else []
    if is_total:
        if more or than or who not in places or also not in places or who == also:
            return []
        return [_asked("total", (places[who], places[also]), scene.quantities)]
    if more:
        if who not in places:
            return []
        if match["than"] is None and not (asks_two and places[who] in scene.asked.of):
            return []
        other = places.get(than) if match["than"] else next(p for p in scene.asked.of if p != places[who])
        if other is None or other == places[who]:
            return []
        pair = (places[who], other) if more == "more" else (other, places[who])
        return [_asked("difference", pair, scene.quantities)]
    if than or (match["who"] and who not in places):
        return []
    if who:
        return [scene.quantities[places[who]]]
    return [q for q in (*scene.quantities, scene.asked) if FACTS[q.kind][0]] if match["op"] else []


def _holds(scene, quantity, match, known):
    """Whether the claim about this quantity is true and follows from what is known."""
    if int(match["c"]) != quantity.value:
        return False
    if match["op"] is None:
        turned = replace(quantity, of=quantity.of[::-1]) if quantity.kind == "total" else quantity
        return quantity in known or turned in known
    if not FACTS[quantity.kind][0] or any(scene.quantities[place] not in known for place in quantity.of):
        return False
    written = (int(match["a"]), match["op"].lower().translate(_SYMBOLS), int(match["b"]))
    a, b = operands(scene, quantity)
    symbol = FACTS[quantity.kind][0]
    allowed = {(a, symbol, b)} | ({(b, symbol, a)} if symbol in "+x" else set())
    if symbol == "x" and b == 2 and quantity.kind == "times":
        allowed.add((a, "+", a))
    return written in allowed


def grade(row_or_id: dict | str | Scene, text: str, style: str = "hash") -> float:
    """Quality of a response in [0, 1], for ranking feedback: 0.6 * (answer right) + 0.4 * q, where q = (share
    of the written steps that label_steps calls right) * (share of the needed operations that right steps
    carried out).

    So any right answer beats any wrong one; among equals more right steps win; 1.0 is a right answer by a
    complete chain of only right steps, and a bare or lucky right answer gets 0.6.
    """
    scene = scene_of(row_or_id)
    labels, derived = derived_by(scene, split_steps(text))
    done = {replace(q, of=tuple(sorted(q.of))) for q in derived}  # Ana and Ben, Ben and Ana: one total
    needed = {replace(q, of=tuple(sorted(q.of))) for q in scene.derivation}
    quality = sum(labels) / len(labels) * len(done & needed) / len(needed) if labels else 0.0
    return 0.6 * is_correct(extract_answer(text, style), str(scene.asked.value)) + 0.4 * quality
