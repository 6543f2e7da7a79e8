"""Records: problems, responses, samples, and the JSON lines that they are kept in.

Every field of a line is checked, by name and type, before anything is done with it; an error names file, line
and value. Fields that no record knows are kept in `meta` and written back where they stood, so a line that is
read and written loses nothing.

A Samples is one problem with its responses, one line of samples.jsonl. Here and in the files above,
`samples` is one of them and `sampled` a list of them; a `group` is the rows of token ids made of one.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from minicot.errors import InputError
from minicot.images import locate

LETTERS = "ABCDEFGHIJ"


# ---- the records ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One question. `answer` is the gold answer (a letter where there are `choices`), `solution` a worked
    solution that ends with the marked answer, `image` a picture file (or a list of them) inside the folder
    `image_root`, or "toy:" and what toy/pictures.py draws. `history` holds the turns of a conversation before
    the question, [{"role", "content"}, ...]; `shots` the worked examples before it in the same turn, texts as
    shot_text makes them (perhaps pruned); a `plain` question is asked as it is in any mode. `meta` holds
    the other fields of its line. Whoever needs an absent field says so."""

    id: str
    question: str
    answer: str | None = None
    solution: str | None = None
    steps: list | None = None
    image: str | list | None = None
    image_root: str | None = None
    choices: list | None = None
    history: list | None = None
    shots: list | None = None
    plain: bool = False
    meta: dict = field(default_factory=dict)

    @property
    def images(self):
        """[(picture, its root)], in the order of their placeholders."""
        names = [self.image] if isinstance(self.image, str) else self.image or []
        return [(name, self.image_root) for name in names]


@dataclass(frozen=True)
class Response:
    """One response to a problem. `correct` is the outcome (None: unknown), `reward` the graded quality (None:
    as `correct`); `finish` "stop" means that the model ended it, and only then is EOS trained and scored.
    `meta` holds the other fields of its JSON object."""

    text: str
    correct: bool | None = None
    reward: float | None = None
    finish: str = "stop"
    ids: list | None = None
    answer: str | None = None
    step_labels: list | None = None  # true or false for each of its steps: right so far
    scores: dict | None = None
    tokens: list | None = None  # the scored tokens as texts
    token_scores: dict | None = None  # name -> a number for each of `tokens`
    step_scores: dict | None = None  # name -> a number for each of its steps (answers.split_steps)
    meta: dict = field(default_factory=dict)


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


def shot_text(question, solution):
    """A worked example as the text that stands before a question (CoT-Influx, utils.py), without "Let's think
    step by step", which the official code adds: "Q: ...\\nA: ...", both on one line, and an empty line."""
    return f"Q: {' '.join(question.split())}\nA: {' '.join(solution.split())}\n\n"


# ---- fields and their types ----------------------------------------------------------------------

TEXT, NUMBER, LIST, BOOL, OBJECT = (str,), (int, float), (list,), (bool,), (dict,)
PROBLEM_FIELDS = {
    "id": TEXT + (int,),
    "question": TEXT,
    "answer": TEXT + NUMBER,
    "solution": TEXT,
    "steps": LIST,
    "image": TEXT + LIST,
    "image_root": TEXT,
    "choices": LIST,
    "history": LIST,
    "shots": LIST,
    "plain": BOOL,
}
RESPONSE_FIELDS = {
    "text": TEXT,
    "correct": BOOL,
    "reward": NUMBER,
    "finish": TEXT,
    "ids": LIST,
    "answer": TEXT,
    "step_labels": LIST,
    "scores": OBJECT,
    "tokens": LIST,
    "token_scores": OBJECT,
    "step_scores": OBJECT,
}
SAMPLES_FIELDS = {"responses": LIST, "error": TEXT}
ITEM_TYPES = {
    "steps": TEXT,
    "choices": TEXT,
    "image": TEXT,
    "history": OBJECT,
    "shots": TEXT,
    "ids": (int,),
    "tokens": TEXT,
    "step_labels": BOOL + (int,),
    "scores": NUMBER,
    "token_scores": LIST,
    "step_scores": LIST,
    "responses": OBJECT,
}
AS_IS = json.JSONEncoder(ensure_ascii=False)
WORDS = {
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def typed(row, fields, where):
    """A JSON object -> (its known fields, their types checked; the others). A known field that is null is
    absent."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: found a JSON {type(row).__name__}, expected an object")
    known = {name: row[name] for name in fields if row.get(name) is not None}
    for name, value in known.items():
        items = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
        if not is_of(value, fields[name]) or not all(is_of(item, ITEM_TYPES[name]) for item in items):
            raise InputError(f"{where}: field {name!r} is {value!r:.80}, expected {expected(name, fields)}")
        for number in (one for one in [value, *items] if isinstance(one, (int, float))):
            if not abs(number) <= 1e300:
                raise InputError(f"{where}: field {name!r} is {number}, expected a finite number")
    return known, {name: value for name, value in row.items() if name not in fields}


def is_of(value, kinds):
    """isinstance, but true and false are no numbers."""
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def expected(name, fields):
    say = lambda kinds: " or ".join(dict.fromkeys(WORDS[kind] for kind in kinds))
    return say(fields[name]) + (f", each item {say(ITEM_TYPES[name])}" if name in ITEM_TYPES else "")


def refuse_surrogates(row, where):
    """JSON may spell half of a character, "\\ud800", which no file and no tokenizer takes."""
    if not writable(row):
        name = next(name for name, value in row.items() if not writable({name: value}))
        raise InputError(f"{where}: field {name!r} holds a lone surrogate, which is no text")


def writable(value):
    try:
        return AS_IS.encode(value).encode() is not None
    except UnicodeEncodeError:
        return False


# ---- JSON objects -> records ---------------------------------------------------------------------


def problem_from_row(row, where, line_number):
    """A JSON object -> Problem. A missing id becomes the line number; a missing question is an error. What a
    line of samples.jsonl says of responses is no part of the problem."""
    fields, others = typed(row, PROBLEM_FIELDS, where)
    refuse_surrogates(row, where)
    if "question" not in fields:
        raise InputError(f"{where}: no field 'question'; found {sorted(row)}")
    fields["id"] = str(fields.get("id", line_number))
    if "image" in fields:  # relative to the file that names it
        fields.setdefault("image_root", str(Path(where.rpartition(":")[0]).parent.resolve()))
        for name in [fields["image"]] if isinstance(fields["image"], str) else fields["image"]:
            check_image(name, fields["image_root"], where)
    if "answer" in fields:
        fields["answer"] = str(fields["answer"])
    if len(fields.get("choices", [])) > len(LETTERS):
        raise InputError(f"{where}: {len(fields['choices'])} choices; allowed: at most {len(LETTERS)}")
    if "choices" in fields and "answer" in fields:
        if fields["answer"] not in LETTERS[: len(fields["choices"])]:
            raise InputError(f"{where}: answer is {fields['answer']!r}; allowed: a letter of its choices")
    if "history" in fields:
        asked = {"role": "user", "content": fields["question"]}
        fields["history"] = conversation([*fields["history"], asked], where, "history")[:-1]
        if not asked["content"]:
            raise InputError(f"{where}: question is empty; allowed: some words, with a history")
    meta = {name: value for name, value in others.items() if name not in SAMPLES_FIELDS}
    return Problem(**fields, meta=meta)


def check_image(name, root, where):
    """Refuse, by its row, a picture that is not there or not inside its folder; it is read later."""
    try:
        if not name.startswith("toy:"):
            locate(name, root)
    except (InputError, OSError) as error:
        raise InputError(f"{where}: {error}") from None


def conversation(turns, where, name):
    """The messages that lead up to `name`, each as {"role", "content"}. Refused: other fields, a content that
    is no text, and roles that are not user and assistant in turn, behind one system turn at most."""
    checked = []
    for turn in turns:
        fields, others = typed(turn, {"role": TEXT, "content": TEXT}, f"{where}: a message of {name}")
        if len(fields) < 2 or any(value is not None for value in others.values()):
            raise InputError(f"{where}: {name} holds the message {turn!r:.80}; allowed: a role and a content")
        checked.append(fields)
    roles = [turn["role"] for turn in checked]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise InputError(
            f"{where}: the turns of {name} are {', '.join(roles)}; allowed: user and assistant in turn, the "
            "user first, behind one system turn at most"
        )
    return checked


def response_from_row(row, where):
    fields, meta = typed(row, RESPONSE_FIELDS, where)
    if "text" not in fields:
        raise InputError(f"{where}: a response has no field 'text'")
    if fields.get("finish", "stop") not in ("stop", "length"):
        raise InputError(f"{where}: finish is {fields['finish']!r}, allowed: 'stop', 'length'")
    return Response(**fields, meta=meta)


def samples_from_row(row, where, line_number):
    """A line of samples.jsonl, or one of TRL's preference rows (see pair_from_trl) -> Samples."""
    if isinstance(row, dict) and {"chosen", "rejected"} <= row.keys() and row.get("responses") is None:
        row = pair_from_trl(row, where)
    problem = problem_from_row(row, where, line_number)
    fields, _ = typed(row, SAMPLES_FIELDS, where)
    if "responses" not in fields:
        raise InputError(f"{where}: no field 'responses'; found {sorted(row)}")
    responses = [response_from_row(response, where) for response in fields["responses"]]
    return Samples(problem, responses, fields.get("error") or None)


def pair_from_trl(row, where):
    """TRL's preference row -> a row of ours: a group of two, rewards 1 and 0, whose question is `plain`.

    {prompt, chosen, rejected}, each a text or a list of messages {role, content}; prompt then ends in the
    user's turn that is the question, chosen and rejected are the assistant's one message. Without prompt,
    chosen and rejected are whole conversations that differ in the last message alone; a prompt that is text
    repeats a turn of theirs. Other fields are read as in any line."""
    given, *replies = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    prompt, talks = given, []
    if not isinstance(prompt, list) and all(isinstance(reply, list) and len(reply) > 1 for reply in replies):
        prompt, other = (reply[:-1] for reply in replies)
        if prompt != other:
            raise InputError(f"{where}: chosen and rejected begin differently; allowed: one prompt for both")
        replies = [reply[-1:] for reply in replies]
    for name, reply in zip(("chosen", "rejected"), replies):
        reply = as_turns(reply, "assistant", where, name)
        turns = conversation([*as_turns(prompt, "user", where, "prompt"), *reply], where, name)
        if len(reply) != 1 or turns[-1]["role"] != "assistant":
            raise InputError(
                f"{where}: the turns of {name} are {', '.join(turn['role'] for turn in turns)}, "
                f"{len(reply)} behind the prompt; allowed: one behind it, the assistant's"
            )
        talks.append(turns)
    *history, asked, _ = talks[0]
    if isinstance(given, str) and given not in [turn["content"] for turn in talks[0][:-1]]:
        raise InputError(f"{where}: prompt is {given!r:.60}, which chosen and rejected do not begin with")
    others = {name: value for name, value in row.items() if name not in ("prompt", "chosen", "rejected")}
    ours = {"question": asked["content"], "history": history or None, "plain": True}
    if clash := sorted(ours.keys() & others.keys()):
        raise InputError(f"{where}: field {clash[0]!r} beside chosen and rejected; allowed: one of the forms")
    texts = [turns[-1]["content"] for turns in talks]
    pair = [{"text": text, "reward": reward} for text, reward in zip(texts, (1.0, 0.0))]
    return {**others, **ours, "responses": pair}


def as_turns(value, role, where, name):
    """A text -> one message of `role`; a list stays what it is."""
    if not isinstance(value, (str, list)):
        raise InputError(f"{where}: field {name!r} is {value!r:.80}, expected text or a list of messages")
    return [{"role": role, "content": value}] if isinstance(value, str) else value


# ---- records -> JSON objects, and files of them --------------------------------------------------


def fields_of(record):
    """The fields of a Problem or a Response as they stand in JSON: what is None or false is left out (but for
    `correct`), `meta` lies flat among the others."""
    known = {name: value for name, value in vars(record).items() if name != "meta"}
    assert not known.keys() & record.meta.keys(), f"meta holds fields of the record: {sorted(record.meta)}"
    written = lambda name, value: name == "correct" or (value is not None and value is not False)
    return {name: value for name, value in known.items() if written(name, value)} | record.meta


def samples_to_row(samples):
    """Samples -> the JSON object of one line."""
    assert not SAMPLES_FIELDS.keys() & samples.problem.meta.keys(), "meta holds fields of Samples"
    row = fields_of(samples.problem) | ({"error": samples.error} if samples.error else {})
    return row | {"responses": [fields_of(response) for response in samples.responses]}


def read_jsonl(path):
    """Yield (line number, object) of a JSON-lines file; a malformed line is an error that names it."""
    path = Path(path)
    if not path.is_file():
        reason = "a folder, expected a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {reason}")
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
    numbered = [(n, samples_from_row(row, f"{path}:{n}", n)) for n, row in read_jsonl(path)]
    refuse_duplicates([(n, samples.problem.id) for n, samples in numbered], path)
    if not numbered:
        raise InputError(f"{path}: no samples in it")
    return [samples for _, samples in numbered]


def refuse_duplicates(numbered_ids, path):
    first = {}
    for number, id_ in numbered_ids:
        if id_ in first:
            raise InputError(
                f"{path}:{number}: id {id_!r} was already given on line {first[id_]}; ids must be unique"
            )
        first[id_] = number
