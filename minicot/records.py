"""Records: problems, responses, samples, and the JSON lines that they are kept in.

Every field of a line is checked, by name and type, before anything is done with it; an error names file, line
and value.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minicot.errors import InputError
from minicot.images import locate

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Problem:
    """One question. `answer` is the gold answer (a letter where there are `choices`), `solution` a worked
    solution that ends with the marked answer, `image` a picture file (or a list of them) inside the folder
    `image_root`, or "toy:" and what toy/pictures.py draws. Whoever needs an absent field says so."""

    id: str
    question: str
    answer: str | None = None
    solution: str | None = None
    steps: list | None = None
    image: str | list | None = None
    image_root: str | None = None
    choices: list | None = None

    @property
    def images(self):
        """[(picture, its root)], in the order of their placeholders."""
        found = [self.image] if isinstance(self.image, str) else self.image or []
        return [(name, self.image_root) for name in found]


@dataclass(frozen=True)
class Response:
    """One response to a problem. `correct` is the outcome (None: unknown), `reward` the graded quality (None:
    as `correct`); `finish` "stop" means that the model ended it, and only then is EOS trained and scored."""

    text: str
    correct: bool | None = None
    reward: float | None = None
    finish: str = "stop"
    ids: list | None = None
    answer: str | None = None
    step_labels: list | None = None
    scores: dict | None = None
    tokens: list | None = None  # the scored tokens as texts
    token_scores: dict | None = None  # name -> a number for each of `tokens`


@dataclass(frozen=True)
class Samples:
    """A problem and its K responses: one line of samples.jsonl. `error` says why there are none: a picture
    that cannot be read costs its own problem alone."""

    problem: Problem
    responses: list = field(default_factory=list)
    error: str | None = None

    @property
    def first(self):
        """The first response; where there is none, an empty wrong one."""
        return self.responses[0] if self.responses else Response("", correct=False, ids=[])


TEXT, NUMBER, LIST, BOOL = (str,), (int, float), (list,), (bool,)
PROBLEM_FIELDS = {
    "id": TEXT + (int,),
    "question": TEXT,
    "answer": TEXT + NUMBER,
    "solution": TEXT,
    "steps": LIST,
    "image": TEXT + LIST,
    "image_root": TEXT,
    "choices": LIST,
}
RESPONSE_FIELDS = {
    "text": TEXT,
    "correct": BOOL,
    "reward": NUMBER,
    "finish": TEXT,
    "ids": LIST,
    "answer": TEXT,
    "step_labels": LIST,
    "scores": (dict,),
    "tokens": LIST,
    "token_scores": (dict,),
}
ITEM_TYPES = {
    "steps": TEXT,
    "choices": TEXT,
    "image": TEXT,
    "ids": (int,),
    "tokens": TEXT,
    "step_labels": BOOL + (int,),
}


def typed(row, fields, where):
    """The known fields of a JSON object, with their types checked; absent and null are the same."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: found a JSON {type(row).__name__}, expected an object")
    found = {name: row[name] for name in fields if row.get(name) is not None}
    for name, value in found.items():
        ok = isinstance(value, fields[name]) and not (isinstance(value, bool) and bool not in fields[name])
        if ok and isinstance(value, list):
            ok = all(isinstance(item, ITEM_TYPES[name]) for item in value)
        if not ok:
            expected = describe(name, fields[name])
            raise InputError(f"{where}: field {name!r} is {value!r:.80}, expected {expected}")
        texts = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
        if not all(map(encodable, texts)):
            raise InputError(f"{where}: field {name!r} holds a lone surrogate, which is no text")
        if isinstance(value, (int, float)) and not abs(value) <= 1e300:
            raise InputError(f"{where}: field {name!r} is {value}, expected a finite number")
    return found


def encodable(text):
    try:
        return text.encode() is not None
    except UnicodeEncodeError:
        return False


def describe(name, kinds):
    names = {
        str: "text",
        int: "a number",
        float: "a number",
        bool: "true or false",
        list: "a list",
        dict: "an object",
    }
    words = " or ".join(dict.fromkeys(names[kind] for kind in kinds))
    return words + (
        f" of {' or '.join(dict.fromkeys(k.__name__ for k in ITEM_TYPES[name]))}"
        if name in ITEM_TYPES
        else ""
    )


def problem_from_row(row, where, line_number):
    """A JSON object -> Problem. A missing id becomes the line number; a missing question is an error."""
    found = typed(row, PROBLEM_FIELDS, where)
    if "question" not in found:
        raise InputError(f"{where}: no field 'question'; found {sorted(row)}")
    found["id"] = str(found.get("id", line_number))
    if "image" in found:  # relative to the file that names it
        found.setdefault("image_root", str(Path(where.rpartition(":")[0]).parent.resolve()))
        for name in [found["image"]] if isinstance(found["image"], str) else found["image"]:
            check_image(name, found["image_root"], where)
    if "answer" in found:
        found["answer"] = str(found["answer"])
    if len(found.get("choices", [])) > len(LETTERS):
        raise InputError(f"{where}: {len(found['choices'])} choices; allowed: at most {len(LETTERS)}")
    if "choices" in found and "answer" in found and found["answer"] not in LETTERS[: len(found["choices"])]:
        raise InputError(f"{where}: answer is {found['answer']!r}; allowed: a letter of its choices")
    return Problem(**found)


def check_image(name, root, where):
    """Refuse, by its row, a picture that is not there or not inside its folder; it is read later."""
    try:
        if not name.startswith("toy:"):
            locate(name, root)
    except (ValueError, OSError) as error:
        raise InputError(f"{where}: {error}") from None


def response_from_row(row, where):
    found = typed(row, RESPONSE_FIELDS, where)
    if "text" not in found:
        raise InputError(f"{where}: a response has no field 'text'")
    if found.get("finish", "stop") not in ("stop", "length"):
        raise InputError(f"{where}: finish is {found['finish']!r}, allowed: 'stop', 'length'")
    return Response(**found)


def samples_to_row(samples):
    """Samples -> the JSON object of one line; fields that are None are left out."""
    row = {name: value for name, value in asdict(samples.problem).items() if value is not None}
    row |= {"error": samples.error} if samples.error else {}
    row["responses"] = [
        {name: value for name, value in asdict(response).items() if value is not None or name == "correct"}
        for response in samples.responses
    ]
    return row


def samples_from_row(row, where, line_number):
    """A line of samples.jsonl, or TRL's {prompt, chosen, rejected} (a group of two: rewards 1 and 0) ->
    Samples."""
    if isinstance(row, dict) and {"prompt", "chosen", "rejected"} <= row.keys():
        row = {
            "id": row.get("id"),
            "question": row["prompt"],
            "responses": [{"text": row["chosen"], "reward": 1.0}, {"text": row["rejected"], "reward": 0.0}],
        }
    problem = problem_from_row(row, where, line_number)
    responses = row.get("responses")
    if not isinstance(responses, list):
        raise InputError(f"{where}: field 'responses' is {responses!r:.40}, expected a list of objects")
    error = typed(row, {"error": TEXT}, where).get("error")
    return Samples(problem, [response_from_row(response, where) for response in responses], error)


def read_jsonl(path):
    """Yield (line number, object) of a JSON-lines file; a malformed line is an error that names it."""
    path = Path(path)
    if not path.is_file():
        found = "a folder, expected a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {found}")
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise InputError(
                            f"{path}:{number}: not JSON ({error}); found {line.strip()!r:.60}"
                        ) from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error})") from None


def read_samples(path):
    """samples.jsonl -> list of Samples; ids must be unique."""
    found = [(number, samples_from_row(row, f"{path}:{number}", number)) for number, row in read_jsonl(path)]
    refuse_duplicates([(number, samples.problem.id) for number, samples in found], path)
    if not found:
        raise InputError(f"{path}: no samples in it")
    return [samples for _, samples in found]


def refuse_duplicates(numbered_ids, path):
    first = {}
    for number, id_ in numbered_ids:
        if id_ in first:
            raise InputError(
                f"{path}:{number}: id {id_!r} was already given on line {first[id_]}; ids must be unique"
            )
        first[id_] = number
