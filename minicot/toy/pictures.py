"""The built-in world in pictures: scenes whose given numbers are drawn, not told.

    [a picture: TOM with 7 apples in his row, ANA with 3, BEN with 12]
    Eva has twice as many apples as Ana. How many apples do Eva and Tom have together?

    Tom: apples 7.
    Ana: apples 3.
    Ben: apples 12.
    Ana has 3, so Eva has 3 x 2 = 6.
    Eva has 6 and Tom has 7, so together they have 6 + 7 = 13.
    #### 13

Three kinds: rows of things to count, a bar chart with an axis, a table of digits with two columns of which
one matters. A scene is a problems.Scene, so its oracle labels these chains too: what is in the picture is
"given", and a step that restates it is right, or a misreading. An id rebuilds scene and picture. Pictures are
64 x 64; things to count, bars and the table's digits keep to patches of 8 x 8.
"""

import hashlib
import random
import re
from functools import cache

import numpy as np
from PIL import Image

from minicot.errors import InputError
from minicot.toy import problems
from minicot.toy.problems import FACTS, ITEMS, LINKS, NAMES, Quantity, Scene

KINDS = ("rows", "bars", "table")
PICTURE_ID = re.compile(rf"({'|'.join(KINDS)})-(\d{{1,18}})-([1-5])")
PEOPLE = {"rows": (3, 4), "bars": (3,), "table": (3,)}  # how many there are in a picture
LARGEST = {"rows": 12, "bars": 12, "table": 20}  # the numbers in it are 2 .. this
DIFFICULTIES, DIFFICULTY_WEIGHTS = (2, 3), (3, 1)  # operations, and how often each is drawn
SIZE, PATCH = 64, 8
# Where the picture stands in a question: behind the words. So it is always equally far from the response,
# whatever the question's length, and a small model that has learned to read captions reads here too.
PLACEHOLDER = "\n<image>"

# How a step says what was read, for each of problems.WORDINGS. {p} owner, {c} number, {i} item.
READINGS = {
    "plain": "{p} has {c}.",
    "items": "{p} has {c} {i}.",
    "so": "{p} has {c} {i}.",
    "colon": "{p}: {c}",
    "bare": "{p}: {c}",
    "because": "{p}: {i} {c}.",
}
# What a small model must find by its name has that name just before it. "Mia: pears 6.": a table's column is
# found by the thing. "Mia has 6, so Sam has 6 / 2 = 3.": a number read before is found by its owner; in the
# wordings of problems.py it comes at once, by a name that is itself still to be found in the question.
DEFAULT_WORDINGS = ("because",)

LETTERS = """
.##. ###. #### ###. ..## #..# #... #..# #..# .##. .### ###. #..# #..# ####
#..# #..# #... .#.. ...# #.#. #... #### ##.# #..# #... .#.. #..# #..# ...#
#..# #..# #... .#.. ...# ##.. #... #### ##.# #..# #... .#.. #..# .##. ..#.
#### ###. ###. .#.. ...# ##.. #... #..# #.## #..# .##. .#.. #..# .##. .#..
#..# #..# #... .#.. ...# ##.. #... #..# #.## #..# ...# .#.. #..# .##. #...
#..# #..# #... .#.. #..# #.#. #... #..# #..# #..# ...# .#.. .##. #..# #...
#..# ###. #### ###. .##. #..# #### #..# #..# .##. ###. .#.. .##. #..# ####
"""
DIGITS = """
.##. .#.. .##. ###. ..#. #### .##. #### .##. .##.
#..# ##.. #..# ...# .##. #... #... ...# #..# #..#
#..# .#.. ...# ...# #.#. ###. #... ..#. #..# #..#
#..# .#.. ..#. .##. #.#. ...# ###. ..#. .##. .###
#..# .#.. .#.. ...# #### ...# #..# .#.. #..# ...#
#..# .#.. #... ...# ..#. ...# #..# .#.. #..# ...#
.##. ###. #### ###. ..#. ###. .##. .#.. .##. .##.
"""
THINGS = """
...##.. ...#... ####### .#####. ..###.. ....... .....## ..###.. #####.. ..###..
...#... ...#... #.....# .#####. .#...#. ..###.. ....### .#####. ######. .##.##.
.##.##. ..###.. #.###.# .##.##. #..#..# .#.#.#. ...###. .#####. #####.# ##.#.##
####### ..###.. #.....# .#...#. #.###.# #.#.#.# ..###.. ####### #####.# #.###.#
####### .#####. #.###.# .##.##. #..#..# #.#.#.# .###... ####### ######. ##.#.##
.#####. ####### #.....# .#####. .#...#. .#####. ###.... ####### #####.. .##.##.
..#.#.. .#####. ####### .#####. ..###.. ..###.. #...... .#####. .###... ..###..
"""
BLACK, GREY, WHITE = (0, 0, 0), (200, 200, 200), (255, 255, 255)
COLOURS = dict(
    zip(
        ITEMS,
        (
            (210, 30, 40),
            (60, 160, 50),
            (40, 80, 200),
            (130, 50, 170),
            (200, 150, 0),
            (230, 110, 160),
            (60, 60, 70),
            (190, 150, 110),
            (120, 70, 30),
            (240, 120, 20),
        ),
    )
)


# ---- scenes ------------------------------------------------------------------------------------------------


def make_picture(seed: int, kind: str | None = None, difficulty: int | None = None) -> Scene:
    """The scene of a seed: a picture of a `kind` (of KINDS; None draws one) and a question of `difficulty`
    operations (1 to 5; None draws from DIFFICULTIES) that rests on at least two numbers of the picture. The
    answer differs from every number in picture and text and from every quantity but the asked one."""
    draw_one = random.Random(f"picture {seed}")
    drawn = draw_one.choice(KINDS), draw_one.choices(DIFFICULTIES, DIFFICULTY_WEIGHTS)[0]
    kind, difficulty = kind or drawn[0], drawn[1] if difficulty is None else difficulty
    if kind not in KINDS or difficulty not in range(1, 6):
        raise ValueError(
            f"toy picture {seed}: kind {kind!r}, difficulty {difficulty}; allowed: "
            f"{', '.join(KINDS)} and 1 to 5"
        )
    rng = random.Random(f"picture {seed} {kind} {difficulty}")
    while True:  # rejection: a try fails where no number fits
        scene = _try_picture(rng, f"{kind}-{seed}-{difficulty}", kind, difficulty)
        if scene is not None:
            return scene


def _try_picture(rng, scene_id, kind, difficulty):
    names = rng.sample(NAMES, len(NAMES))
    items = rng.sample(ITEMS, 2 if kind == "table" else 1)
    item, people = rng.choice(items), [names.pop() for _ in range(rng.choice(PEOPLE[kind]))]
    numbers = [rng.randint(2, LARGEST[kind]) for _ in range(len(people) * len(items))]
    quantities = [
        Quantity("given", who, thing, number, (), (number,))
        for (who, thing), number in zip(((who, thing) for who in people for thing in items), numbers)
    ]
    unread = [place for place, quantity in enumerate(quantities) if quantity.item == item]
    rng.shuffle(unread)
    ask, last = rng.choices(("value", "total", "difference"), (1, 3, 2))[0], unread.pop()
    for _ in range(difficulty - (ask != "value")):
        joins = unread and rng.random() < (0.25 if ask != "value" else 0.6)
        made, of = ("sum", (last, unread.pop())) if joins else (rng.choice(LINKS), (last,))
        quantities.append(problems._new(rng, made, names.pop(), item, quantities, of))
        if quantities[-1] is None:
            return None
        last = len(quantities) - 1
    of = (last,)
    if ask != "value":
        if not unread:
            return None
        of = (last, unread.pop())
        if ask == "difference" and quantities[of[0]].value < quantities[of[1]].value:
            of = of[::-1]
    shown = len(numbers)
    told = list(range(shown, len(quantities)))
    if rng.random() < 0.2:
        rng.shuffle(told)
    phrases = (0,) * shown + tuple(rng.randrange(2) for _ in range(len(told) + 1))
    scene = Scene(
        scene_id, tuple(quantities), problems._asked(ask, of, quantities), (*range(shown), *told), phrases
    )
    needs = sum(place < shown for place in scene.needed)
    return scene if needs > 1 and problems._is_fair(scene) else None


def is_id(text: str) -> bool:
    """Whether a text is the id of a picture, which `draw` takes."""
    return PICTURE_ID.fullmatch(text) is not None


def is_picture(scene: Scene) -> bool:
    """Whether a scene's given numbers are drawn."""
    return scene.id.split("-")[0] in KINDS


def scene_of(row_or_id: dict | str | Scene) -> Scene:
    """Rebuild the scene of a row or of an id `<kind>-<seed>-<difficulty>`; any other id is left to
    problems.scene_of."""
    if isinstance(row_or_id, Scene):
        return row_or_id
    problem_id = row_or_id if isinstance(row_or_id, str) else row_or_id["id"]
    match = PICTURE_ID.fullmatch(problem_id)
    return make_picture(int(match[2]), match[1], int(match[3])) if match else problems.scene_of(problem_id)


def in_picture(scene: Scene) -> list[Quantity]:
    """What the picture shows, in its order; nothing for a scene of problems.py."""
    return [quantity for quantity in scene.quantities if quantity.kind == "given" and is_picture(scene)]


def read_from(scene: Scene) -> list[Quantity]:
    """What a solution reads from the picture: all numbers of the thing in question, in the picture's order,
    needed or not. A small model learns to read in order long before it finds a number by a name, and by a
    name it can look up what it has written."""
    return [quantity for quantity in in_picture(scene) if quantity.item == scene.asked.item]


def wordings_of(scene: Scene) -> tuple[str, ...]:
    """What a solution's wording is drawn from, for scenes of both worlds."""
    return DEFAULT_WORDINGS if is_picture(scene) else problems.DEFAULT_WORDINGS


def chain(scene: Scene) -> list[Quantity]:
    """The quantities that a full solution states: what it reads from the picture, then what it computes."""
    return [*read_from(scene), *scene.derivation]


def split_of(scene: Scene) -> str:
    """ "train" (80 %), "validation" or "test" (10 % each), by the numbers in the picture alone: no two splits
    share them, whatever the kind, the names and the question."""
    numbers = [quantity.value for quantity in in_picture(scene)]
    bucket = int(hashlib.sha256(repr(numbers).encode()).hexdigest()[:8], 16) % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


# ---- rows --------------------------------------------------------------------------------------------------


def write_step(
    scene: Scene, quantity: Quantity, wording: str, numbers: tuple | None = None, symbol: str | None = None
) -> str:
    """problems.write_step, also for what is read: "Tom: apples 7." `numbers` ends with the claimed one."""
    if FACTS[quantity.kind][0]:
        return problems.write_step(scene, quantity, wording, numbers, symbol)
    claimed = numbers[-1] if numbers else quantity.value
    return READINGS[wording].format(p=quantity.who, c=claimed, i=quantity.item)


def row_of(scene: Scene, *, wording: str | None = None) -> dict:
    """A scene as problems.row_of's row, and: image ("toy:" and the id that draw takes), shown (how many of
    the facts, the first ones, stand in the picture and not in the question), caption (all of these). Steps
    that read come first."""
    wording = wording or random.Random(f"wording {scene.id}").choice(wordings_of(scene))
    row, shown = problems.row_of(scene, wording=wording), len(in_picture(scene))
    caption = " ".join(row["facts"][:shown])
    steps = [write_step(scene, quantity, wording) for quantity in chain(scene)]
    reads = [[scene.quantities.index(quantity)] for quantity in read_from(scene)]
    return {
        **row,
        "question": row["question"].removeprefix(caption).strip() + PLACEHOLDER,
        "steps": steps,
        "solution": "\n".join([*steps, f"#### {row['answer']}"]),
        "uses": reads + row["uses"],
        "image": f"toy:{scene.id}",
        "shown": shown,
        "caption": caption,
    }


def make_problem(
    seed: int, *, kind: str | None = None, difficulty: int | None = None, wording: str | None = None
) -> dict:
    """The problem of a seed as a row; arguments as in make_picture and problems.row_of."""
    return row_of(make_picture(seed, kind, difficulty), wording=wording)


def scenes(split, n, start, kind, difficulty=None):
    """The scenes start .. start + n - 1 of a split, the same in every process."""
    make = lambda seed: make_picture(seed, kind, difficulty)
    return problems.scenes_in_split(make, split_of, split, n, start)


def rows(
    split: str,
    n: int,
    *,
    start: int = 0,
    kind: str | None = None,
    difficulty: int | None = None,
    wording: str | None = None,
) -> list[dict]:
    """The rows start .. start + n - 1 of a split, in the order of their seeds: the same list in every
    process. ValueError for an unknown split."""
    return [row_of(scene, wording=wording) for scene in scenes(split, n, start, kind, difficulty)]


def long_rows(split: str, n: int, *, start: int = 0) -> list[dict]:
    """As rows, of four and five operations: chains of about 60 words."""
    make = lambda seed: make_picture(seed, difficulty=4 + seed % 2)
    return [row_of(scene) for scene in problems.scenes_in_split(make, split_of, split, n, start)]


def perception_rows(split: str, n: int, *, start: int = 0, kind: str | None = None) -> list[dict]:
    """Questions that read ONE number of a picture: {id, question, answer, fact, image, solution}, one for
    each of the scenes of rows(split, n, ...); `fact` is its place in that row's facts."""
    questions = []
    for scene in scenes(split, n, start, kind):
        fact = random.Random(f"fact {scene.id}").randrange(len(in_picture(scene)))
        asked = scene.quantities[fact]
        question = f"How many {asked.item} does {asked.who} have?{PLACEHOLDER}"
        questions.append(
            {
                "id": f"{scene.id}-fact{fact}",
                "question": question,
                "answer": str(asked.value),
                "fact": fact,
                "image": f"toy:{scene.id}",
                "solution": f"{write_step(scene, asked, DEFAULT_WORDINGS[0])}\n#### {asked.value}",
            }
        )
    return questions


def reading_rows(split: str, n: int, *, start: int = 0, kind: str | None = None) -> list[dict]:
    """Questions for every number of ONE thing, asked behind what a problem tells; the solution reads them in
    the picture's order, as a worked solution begins: {id, question, solution, image}."""
    readings = []
    for scene in scenes(split, n, start, kind):
        row, reads = row_of(scene), read_from(scene)
        asked = f"How many {scene.asked.item} does each have in the picture?{PLACEHOLDER}"
        readings.append(
            {
                "id": f"{scene.id}-reading",
                "image": f"toy:{scene.id}",
                "question": " ".join([*row["facts"][row["shown"] :], asked]),
                "solution": "\n".join(row["steps"][: len(reads)]),
            }
        )
    return readings


def label_steps(row_or_id: dict | str | Scene, steps: list[str]) -> list[bool]:
    """problems.label_steps for rows of both worlds; in a picture's a misread number is a wrong step."""
    return problems.label_steps(scene_of(row_or_id), steps)


def grade(row_or_id: dict | str | Scene, text: str, style: str = "hash") -> float:
    """problems.grade for rows of both worlds."""
    return problems.grade(scene_of(row_or_id), text, style)


# ---- drawing -----------------------------------------------------------------------------------------------


@cache
def glyphs() -> dict:
    """Character or item -> its (H,W) bool bitmap."""
    bitmaps = {}
    for names, art in (("ABEIJKLMNOSTVXZ", LETTERS), ("0123456789", DIGITS), (ITEMS, THINGS)):
        lines = [line.split() for line in art.split("\n") if line]
        for i, name in enumerate(names):
            bitmaps[name] = np.array([[c == "#" for c in line[i]] for line in lines])
    return bitmaps


def draw(picture_id: str) -> Image.Image:
    """The 64 x 64 RGB picture of an id: the same bytes in every process. InputError for an id of none."""
    if not is_id(picture_id):
        raise InputError(
            f"picture id is {picture_id!r}; allowed: <kind>-<seed>-<difficulty>, "
            f"kind one of {', '.join(KINDS)}"
        )
    scene, canvas = scene_of(picture_id), np.full((SIZE, SIZE, 3), WHITE, np.uint8)
    {"rows": _draw_rows, "bars": _draw_bars, "table": _draw_table}[picture_id.split("-")[0]](
        canvas, in_picture(scene), random.Random(f"draw {scene.id}")
    )
    return Image.fromarray(canvas)


def _put(canvas, x, y, signs, colour=BLACK, step=5):
    """Signs (characters or items) from left to right, the first with its top left corner at (x, y)."""
    for i, sign in enumerate(signs):
        bitmap = glyphs()[sign]
        left = x + step * i
        canvas[y : y + bitmap.shape[0], left : left + bitmap.shape[1]][bitmap] = colour


def _draw_rows(canvas, shown, rng):
    """A band of 16 pixels a person: the name, then 2 rows of 6 places, on which the things lie anywhere."""
    for band, quantity in enumerate(shown):
        _put(canvas, 1, 16 * band, quantity.who.upper())
        for place in rng.sample(range(12), quantity.value):
            x, y = 16 + PATCH * (place % 6), 16 * band + PATCH * (place // 6)
            _put(canvas, x, y, [quantity.item], COLOURS[quantity.item])


def _draw_bars(canvas, shown, rng):
    """Bars of 4 pixels a unit above their names, an axis with a line every 2 units, the thing at its head."""
    _put(canvas, 0, 0, [shown[0].item], COLOURS[shown[0].item])
    for level in range(2, 13, 2):
        canvas[56 - 4 * level, 16:] = GREY
        if level % 4 == 0:
            _put(canvas, 5 if level > 9 else 10, 57 - 4 * level, str(level))
    for column, (quantity, colour) in enumerate(zip(shown, rng.sample(sorted(COLOURS.values()), len(shown)))):
        left = 16 + 16 * column
        _put(canvas, left + 1, 57, quantity.who.upper())
        canvas[56 - 4 * quantity.value : 56, left + 2 : left + 14] = colour


def _draw_table(canvas, shown, rng):
    """A head with two things, then a line of 16 pixels a person: the name and two numbers, each above its
    thing. So a number's patch tells what it counts, and a tower of two layers need not carry that down from
    the head."""
    for place, quantity in enumerate(shown):
        x, y = 16 + 32 * (place % 2), 16 + 16 * (place // 2)
        if place < 2:
            _put(canvas, x + 4, 0, [quantity.item], COLOURS[quantity.item])
        else:
            canvas[y - 1, :] = GREY
        _put(canvas, 1, y, quantity.who.upper())
        _put(canvas, x + 2, y, str(quantity.value), step=8)
        _put(canvas, x + 4, y + PATCH, [quantity.item], COLOURS[quantity.item])
    canvas[15, :] = canvas[:, 15] = canvas[:, 39] = GREY
