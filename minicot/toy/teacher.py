"""A noisy teacher for the built-in world: rewrites, expands and unifies solutions, makes known mistakes,
evolves problems.

It stands in for the GPT-4 or Gemini teachers of the papers. It knows the scene, so what it does is known too:
a `kind` says which mistake a solution holds. Every function takes a row of problems.py or pictures.py (harder
and easier: XX
"""

import base64
import io
import random
import re

from PIL import Image

from minicot.answers import STYLES, extract_answer, is_correct, number_steps, split_steps
from minicot.errors import InputError
from minicot.toy import problems
from minicot.toy.pictures import chain, draw, in_picture, is_picture, label_steps, read_from, scene_of
from minicot.toy.pictures import wordings_of, write_step
from minicot.toy.problems import FACTS, WORDINGS, Quantity, Scene, compute, row_of

MISTAKES = ("arithmetic", "misread", "operation", "skip", "label")


def rewrite(row: dict, rng: random.Random) -> dict:
    """The same solution in one wording drawn for all its steps (a picture's: of wordings_of): first what is
    read from a picture, then all that is computed, in any order in which each step follows what it rests
    on."""
    scene = scene_of(row)
    wording = rng.choice(wordings_of(scene) if is_picture(scene) else list(WORDINGS))
    left, order = list(scene.derivation), read_from(scene)
    while left:
        waiting = set(left)
        ready = [q for q in left if not any(scene.quantities[place] in waiting for place in q.of)]
        order.append(rng.choice(ready))
        left.remove(order[-1])
    return _with_solution(row, [write_step(scene, q, wording) for q in order], row["answer"])


def expand(row: dict, rng: random.Random) -> dict:
    """A row that has a bare answer gets a full worked solution (LLaVA-Reasoner's distillation, without its
    mistakes: see teach)."""
    scene = scene_of(row)
    if not is_correct(row["answer"], str(scene.asked.value)):
        raise InputError(
            f"{scene.id}: answer is {row['answer']!r}, the scene's is {scene.asked.value}, "
            "and there is no chain to another"
        )
    return rewrite(row, rng)


def final_answer(text: str) -> str | None:
    """The answer by the first of STYLES that finds one; None where none does."""
    return next(filter(None, (extract_answer(text, style) for style in STYLES)), None)


def unify(row: dict) -> dict:
    """A solution in any wording, with `Step k:` heads and any answer style, in the standard form: "plain"
    steps, then `#### answer`.

    A right step becomes the plain sentence of what it derives; a wrong or unreadable one is kept as written,
    since unification must not repair. ValueError where no style finds an answer.
    """
    scene = scene_of(row)
    answer = final_answer(row["solution"])
    if answer is None:
        raise InputError(
            f"{scene.id}: no answer in the solution {row['solution']!r:.60}; "
            f"allowed styles: {', '.join(STYLES)}"
        )
    steps, seen = [], []
    for step in split_steps(row["solution"]):
        derived = problems.derived_by(scene, [*seen, step])[1] - problems.derived_by(scene, seen)[1]
        stated = [q for q in scene.derivation if q in derived]
        plain = re.sub(r"^step \d+\s*[:.]\s*", "", " ".join(step.split()), flags=re.IGNORECASE)
        reads = [q for q in read_from(scene) if plain in {write_step(scene, q, w) for w in WORDINGS}]
        steps += [write_step(scene, q, "plain") for q in stated or reads] or [plain]
        seen.append(step)
    return _with_solution(row, steps, answer)


def corrupt(row: dict, rng: random.Random, kind: str) -> dict:
    """The row with one known mistake in its solution, plus the field `kind`; step oracle or answer check
    catch every one.

    "arithmetic"  one result is wrong, and carried on consistently to a wrong answer
    "misread"     one number of the question, or of the picture where there is one, is misread, and carried
                  on consistently (URSA's MIE)
    "operation"   one step uses a wrong operation, carried on consistently
    "skip"        a step that computes is left out (not the last but where it is the only one), all else is
                  right
    "label"       the chain is right, the final answer is not (label noise)
    """
    if kind not in MISTAKES:
        raise ValueError(f"kind of mistake is {kind!r}; allowed: {', '.join(MISTAKES)}")
    scene = scene_of(row)
    wording = rng.choice(wordings_of(scene))
    steps = [write_step(scene, q, wording) for q in chain(scene)]
    answer, computed = scene.asked.value, len(scene.derivation)
    if kind == "skip":
        del steps[len(steps) - computed + rng.randrange(max(1, computed - 1))]
    elif kind == "label":
        answer += rng.choice([change for change in (-2, -1, 1, 2, 10) if answer + change > 0])
    else:
        steps, answer = _carried_on(scene, rng, kind, wording)
    return {**_with_solution(row, steps, str(answer)), "kind": kind}


def _carried_on(scene: Scene, rng: random.Random, kind: str, wording: str) -> tuple[list[str], int]:
    """Steps with one mistake and its consequences, all whole and positive, and the wrong answer. A number of
    the picture is misread by 1 to 3; by up to 16 where 200 tries found none (half of half: fours alone)."""
    for tries in range(10_000):
        as_read = {q: q.numbers for q in scene.quantities}  # the question's numbers
        wrong, change = rng.choice(scene.derivation), rng.choice((-10, -2, -1, 1, 2, 10))
        if kind == "misread":
            reads = [q for q in (scene.quantities[place] for place in scene.needed) if q.numbers]
            shown = [q for q in read_from(scene) if q in reads]
            wrong, furthest = rng.choice(shown or reads), 3 if shown and tries < 200 else 16
            place, change = rng.randrange(len(wrong.numbers)), rng.choice((-1, 1)) * rng.randint(1, furthest)
            as_read[wrong] = tuple(n + change * (i == place) for i, n in enumerate(wrong.numbers))
        symbol = rng.choice("+-x/") if kind == "operation" else None
        values, steps = {}, []
        needed = [scene.quantities[place] for place in scene.needed]
        for q in dict.fromkeys([*read_from(scene), *needed, scene.asked]):
            slip = change if kind == "arithmetic" and q is wrong else 0
            values[q], step = _redo(scene, q, values, as_read, slip, symbol if q is wrong else None, wording)
            if values[q] is None or values[q] < 1 or min(as_read.get(q) or (1,)) < 1:
                break
            steps += step
        else:
            if values[scene.asked] != scene.asked.value:
                return steps, values[scene.asked]
    raise InputError(f"{scene.id}: no mistake of the kind {kind} stays whole and positive in it")


def _redo(
    scene: Scene, q: Quantity, values: dict, as_read: dict, change: int, symbol: str | None, wording: str
):
    """A quantity's value from the values and numbers as (mis)taken so far, and its step (none for what is
    read in the question)."""
    numbers = (2,) if q.kind == "half" else as_read.get(q, ())
    taken = tuple(values[scene.quantities[place]] for place in q.of) + numbers
    if FACTS[q.kind][0] is None:
        return taken[0], [write_step(scene, q, wording, taken)] * (q in in_picture(scene))
    kind = next((k for k in ("more", "fewer", "times", "half") if FACTS[k][0] == symbol), q.kind)
    value = compute(kind, taken)
    if value is None:
        return None, []
    return value + change, [write_step(scene, q, wording, (*taken, value + change), symbol)]


def teach(row: dict, rng: random.Random, error_rate: float) -> dict:
    """One answer of a noisy teacher: {solution, kind}; kind is "right" or, with probability error_rate, one
    of MISTAKES."""
    if not 0 <= error_rate <= 1:
        raise ValueError(f"error_rate is {error_rate}; allowed: 0 to 1")
    if rng.random() >= error_rate:
        return {"solution": rewrite(row, rng)["solution"], "kind": "right"}
    mistaken = corrupt(row, rng, rng.choice(MISTAKES))
    return {"solution": mistaken["solution"], "kind": mistaken["kind"]}


def chat(task: str, rows: list[dict], *, error_rate: float = 0.0, seed: int = 0):
    """The teacher as a chat, messages -> text (see minicot/chat.py), that answers the requests of
    minicot/synthesis.py about these rows: task "expand", "rewrite", "unify" or "misinterpret". A row is known
    by its question, and by its picture where several ask the same. The same messages get the same reply.

    With probability error_rate a reply has one of MISTAKES. In a misinterpretation, which always has one, the
    first step that the oracle calls wrong, and all behind it, are <neg>. InputError: another task, a question
    that no row asks, what the task refuses."""
    if task not in ("expand", "rewrite", "unify", "misinterpret"):
        raise InputError(f"task is {task!r}; allowed: expand, rewrite, unify, misinterpret")
    of_question = {}
    for row in rows:
        of_question.setdefault(row["question"].splitlines()[0], []).append(row)

    def looks_like(row, part):
        shown = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
        return is_picture(scene_of(row)) and draw(row["id"]).tobytes() == shown.tobytes()

    def reply(messages):
        parts = messages[-1]["content"]
        parts = [{"text": parts}] if isinstance(parts, str) else parts
        text = "\n\n".join(part["text"] for part in parts if "text" in part)
        said = dict(re.findall(r"^(Question|Answer|Solution):\n(.*?)(?=\n\n|\Z)", text, re.M | re.S))
        question = said.get("Question", "").partition("\n")[0]
        found = of_question.get(question, [])
        for part in (part for part in parts if "image_url" in part):
            found = [row for row in found if looks_like(row, part)]
        if not found:
            raise InputError(f"the teacher is asked {question!r:.80}, which is none of its {len(rows)} rows")
        rng, row = random.Random(f"{seed} {text}"), found[0]
        if task == "misinterpret":
            made = corrupt(row, rng, "misread")
            first = label_steps(row, made["steps"]).index(False)
            tag = lambda j: "<pos>" if j < first else "<neg>"
            made["steps"] = [f"{step} {tag(j)}" for j, step in enumerate(made["steps"])]
        elif rng.random() < error_rate:
            made = corrupt(row, rng, rng.choice(MISTAKES))
        elif task == "unify":
            made = unify({**row, "solution": said.get("Solution", "")})
        else:
            made = {"expand": expand, "rewrite": rewrite}[task](
                {**row, "answer": said.get("Answer", row["answer"])}, rng
            )
        return number_steps(made["steps"], extract_answer(made["solution"], "hash"))

    return reply


def harder(row: dict, rng: random.Random) -> dict:
    """A new problem, one operation longer, in a default wording. It has a split of its own
    (problems.split_of): filter by it."""
    return row_of(problems.harder(problems.scene_of(row), rng.randrange(2**16)))


def easier(row: dict) -> dict:
    """A new problem with fewer operations about the same facts; its split is its own. ValueError where there
    is none."""
    return row_of(problems.easier(problems.scene_of(row)))


def _with_solution(row: dict, steps: list[str], answer: str) -> dict:
    """The row with another solution; `uses` told of the old steps and goes."""
    kept = {key: value for key, value in row.items() if key != "uses"}
    return {**kept, "steps": steps, "solution": "\n".join([*steps, f"#### {answer}"])}


# ---- naming a mistake ----------------------------------------------------------------------------

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


def first_error(problem_id, text):
    """What the first wrong step of a chain (in the wording "because", numbered or not) does, of ERRORS."""
    scene, steps = scene_of(problem_id), [re.sub(r"^Step \d+: ", "", step) for step in split_steps(text)]
    labels = label_steps(scene, steps)
    if False not in labels:
        return "answer"
    step, before = steps[labels.index(False)], steps[: labels.index(False)]
    reading = re.fullmatch(r"(\w+): \w+ (\d+)\.", step)
    if reading:
        others = {(one.who, str(one.value)) for one in in_picture(scene) if one.item != scene.asked.item}
        return "other column" if reading.groups() in others else "misread"
    known, _, claim = step.rpartition(", so ")
    equation = re.search(EQUATION.format(r"\w+ has"), claim) or re.search(EQUATION.format("they have"), claim)
    if not equation:
        return "unreadable"
    who, a, sign, b, c, more = equation.groups()
    if known and (
        not label_steps(scene, [*before, f"{known}."])[-1]
        or not {*map(int, re.findall(r"\d+", known))} <= {int(a), int(b)}
    ):
        return "look-up"
    if not HOLDS[sign](int(a), int(b), int(c)):
        return "arithmetic"
    asked = {"difference": more, "total": who == "they have", "value": False}[scene.asked.kind]
    own = [one for one in scene.quantities if f"{one.who} has" == who and not more]
    subjects = [scene.asked] if asked else own
    return "operand" if sign in {FACTS[one.kind][0] for one in subjects} else "operation"
