"""Problems, graded responses and batches: the one data flow.

    problems (JSONL or a known set) -> rows of token ids -> Batch          (train.py)
    problems -> Samples (K graded responses each) -> rows -> Batch         (sample.py, align.py)

Letters: N rows, B groups (problems), K the largest group of the batch, T tokens of the longest row.
"""

import csv
import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from minicot.answers import extract_answer, is_correct
from minicot.images import ImageProcessor, load_image, locate
from minicot.toy import pictures
from minicot.toy import problems as toy

LETTERS = "ABCDEFGHIJ"
IMAGE = "<image>"  # where a picture stands in a text; one token of a vision-language folder's tokenizer
COT_PROMPT, DIRECT_PROMPT = "\nThink step by step.", "\nAnswer briefly."


# ---- records: what one line of a file says -------------------------------------------------------


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
}
ITEM_TYPES = {"steps": TEXT, "choices": TEXT, "image": TEXT, "ids": (int,), "step_labels": BOOL + (int,)}


def typed(row, fields, where):
    """The known fields of a JSON object, with their types checked; absent and null are the same."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found a JSON {type(row).__name__}, expected an object")
    found = {name: row[name] for name in fields if row.get(name) is not None}
    for name, value in found.items():
        ok = isinstance(value, fields[name]) and not (isinstance(value, bool) and bool not in fields[name])
        if ok and isinstance(value, list):
            ok = all(isinstance(item, ITEM_TYPES[name]) for item in value)
        if not ok:
            expected = describe(name, fields[name])
            raise ValueError(f"{where}: field {name!r} is {value!r:.80}, expected {expected}")
        texts = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
        if not all(map(encodable, texts)):
            raise ValueError(f"{where}: field {name!r} holds a lone surrogate, which is no text")
        if isinstance(value, (int, float)) and not abs(value) <= 1e300:
            raise ValueError(f"{where}: field {name!r} is {value}, expected a finite number")
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
        raise ValueError(f"{where}: no field 'question'; found {sorted(row)}")
    found["id"] = str(found.get("id", line_number))
    if "image" in found:  # relative to the file that names it
        found.setdefault("image_root", str(Path(where.rpartition(":")[0]).parent.resolve()))
        for name in [found["image"]] if isinstance(found["image"], str) else found["image"]:
            check_image(name, found["image_root"], where)
    if "answer" in found:
        found["answer"] = str(found["answer"])
    if len(found.get("choices", [])) > len(LETTERS):
        raise ValueError(f"{where}: {len(found['choices'])} choices; allowed: at most {len(LETTERS)}")
    if "choices" in found and "answer" in found and found["answer"] not in LETTERS[: len(found["choices"])]:
        raise ValueError(f"{where}: answer is {found['answer']!r}; allowed: a letter of its choices")
    return Problem(**found)


def check_image(name, root, where):
    """Refuse, by its row, a picture that is not there or not inside its folder; it is read later."""
    try:
        if not name.startswith("toy:"):
            locate(name, root)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from None


def response_from_row(row, where):
    found = typed(row, RESPONSE_FIELDS, where)
    if "text" not in found:
        raise ValueError(f"{where}: a response has no field 'text'")
    if found.get("finish", "stop") not in ("stop", "length"):
        raise ValueError(f"{where}: finish is {found['finish']!r}, allowed: 'stop', 'length'")
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
        raise ValueError(f"{where}: field 'responses' is {responses!r:.40}, expected a list of objects")
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
                        raise ValueError(
                            f"{path}:{number}: not JSON ({error}); found {line.strip()!r:.60}"
                        ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def read_samples(path):
    """samples.jsonl -> list of Samples; ids must be unique."""
    found = [(number, samples_from_row(row, f"{path}:{number}", number)) for number, row in read_jsonl(path)]
    refuse_duplicates([(number, samples.problem.id) for number, samples in found], path)
    if not found:
        raise ValueError(f"{path}: no samples in it")
    return [samples for _, samples in found]


def refuse_duplicates(numbered_ids, path):
    first = {}
    for number, id_ in numbered_ids:
        if id_ in first:
            raise ValueError(
                f"{path}:{number}: id {id_!r} was already given on line {first[id_]}; ids must be unique"
            )
        first[id_] = number


# ---- known sets, as they are published -----------------------------------------------------------


def gsm8k_row(row, number, stem):
    """Cobbe et al. 2021: `answer` is the worked solution; its calculator marks <<48/2=24>> are left out."""
    solution = re.sub(r"<<[^>]*>>", "", row["answer"])
    if extract_answer(solution, "hash") is None:
        raise ValueError("its answer has no line #### number")
    return {
        "id": f"gsm8k-{stem}-{number}",
        "question": row["question"],
        "solution": solution,
        "answer": extract_answer(solution, "hash"),
    }


def aqua_row(row, number, stem):
    """Ling et al. 2017: options "A)32400", a rationale, the letter of the right option."""
    options = [re.sub(r"^\s*[A-E]\s*\)\s*", "", option) for option in row["options"]]
    return {
        "id": f"aqua-{stem}-{number}",
        "question": row["question"],
        "choices": options,
        "answer": row["correct"],
        "solution": f"{row['rationale'].strip()}\nThe answer is ({row['correct']}).",
    }


def ecqa_row(row, number, stem):
    """Aggarwal et al. 2021, cqa_data_<split>.csv: a question, five options, the right one's text, a free-flow
    explanation (taskB). Or {id, question, choices, answer: index, explanation?} as JSON lines."""
    if "q_text" in row:
        choices = [row[f"q_op{i}"] for i in range(1, 6)]
        row = {
            "id": row["q_no"],
            "question": row["q_text"],
            "choices": choices,
            "answer": choices.index(row["q_ans"]),
            "explanation": row["taskB"],
        }
    letter = dict(enumerate(LETTERS[: len(row["choices"])]))[row["answer"]]
    explanation = row.get("explanation")
    return {
        "id": row["id"],
        "question": row["question"],
        "choices": row["choices"],
        "answer": letter,
        "solution": explanation and f"{explanation.strip()}\nThe answer is ({letter}).",
    }


def arithmetic_row(row, number, stem):
    """SVAMP.json (Patel et al. 2021): Body, Question, Answer. MultiArith.json, AddSub.json, SingleEq.json:
    sQuestion, lSolutions. Or {id, question, answer} as JSON lines."""
    if "Body" in row:
        question = f"{row['Body'].strip()} {row['Question'].strip()}"
        return {"id": row["ID"], "question": question, "answer": row["Answer"]}
    if "sQuestion" in row:
        answer = row["lSolutions"][0]
        return {"id": f"{stem}-{row['iIndex']}", "question": row["sQuestion"].strip(), "answer": answer}
    return {"id": row["id"], "question": row["question"], "answer": row["answer"]}


def tabmwp_row(row, number, stem):
    """Lu et al. 2023, TabMWP: problems_<split>.json beside tables/<id>.png, questions on pictured tables; or
    JSON lines that name their `image`. The published solutions don't mark the answer: a line is added."""
    choices, answer = row["choices"], row["answer"]
    return {
        "id": f"tabmwp-{row['id']}",
        "question": row["question"],
        "choices": choices,
        "answer": LETTERS[choices.index(answer)] if choices else answer,
        "solution": f"{row['solution'].strip()}\n#### {answer}",
        "image": row.get("image") or f"tables/{row['id']}.png",
    }


def read_rows(path):
    """Yield (line or element number, object) of JSON lines, of a JSON array or an object of objects by id
    (.json), or of a table (.csv)."""
    if path.suffix not in (".json", ".csv") or not path.is_file():
        yield from read_jsonl(path)
        return
    try:
        with open(path, encoding="utf-8", newline="") as file:
            found = json.load(file) if path.suffix == ".json" else list(csv.DictReader(file))
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}: not {path.suffix[1:].upper()} ({error})") from None
    if isinstance(found, dict) and found and all(isinstance(row, dict) for row in found.values()):
        found = [{"id": id_, **row} for id_, row in found.items()]
    if not isinstance(found, list):
        raise ValueError(f"{path}: holds a JSON {type(found).__name__}, expected an array")
    yield from enumerate(found, 1)


# name: (reader of a row, style of the final answer, file name of a split where it differs)
KNOWN_SETS = {
    "gsm8k": (gsm8k_row, "hash", {}),
    "aqua": (aqua_row, "letter", {"validation": "dev"}),
    "ecqa": (ecqa_row, "letter", {"validation": "val"}),
    "tabmwp": (tabmwp_row, "hash", {"validation": "dev"}),
    **{name: (arithmetic_row, "hash", {}) for name in ("svamp", "multiarith", "addsub", "singleeq")},
}
TOYS = {"toy": toy.rows, "toy-pictures": pictures.rows}
TOY_SIZES = {"train": 20_000, "validation": 1_000, "test": 1_000}


def style_of(spec):
    """How the final answer is marked in a data source, e.g. "hash" for `#### 18`."""
    return KNOWN_SETS[spec.split(":")[0]][1] if spec.split(":")[0] in KNOWN_SETS else "hash"


def read_problems(spec, split="train", *, limit=0):
    """`toy`, `toy-pictures`, `gsm8k:PATH` (a folder with train.jsonl / test.jsonl, or one file) or
    `file.jsonl` -> list of Problem.

    `split` may be a slice, `train[7000:]`. limit > 0 keeps the first problems. ValueError names file, line
    and value."""
    name, _, path = spec.partition(":")
    if limit < 0:
        raise ValueError(f"limit is {limit}; allowed: 0 (all) or more")
    match = re.fullmatch(r"([\w-]+)(?:\[(-?\d*):(-?\d*)\])?", split)
    if not match:
        raise ValueError(f"split is {split!r}; allowed: a name, or a slice of one such as train[:7000]")
    split, start, stop = match[1], *(int(text) if text else None for text in match.groups()[1:])
    if spec in TOYS:
        if split not in TOY_SIZES:
            raise ValueError(f"split is {split!r}; allowed for {spec}: {', '.join(TOY_SIZES)}")
        source = f"{spec} {split}"
        whole = start is not None or stop is not None or not limit
        rows = enumerate(TOYS[spec](split, TOY_SIZES[split] if whole else min(limit, TOY_SIZES[split])), 1)
    elif name in KNOWN_SETS and path:
        reader, _, file_names = KNOWN_SETS[name]
        source, split = Path(path), file_names.get(split, split)
        if source.is_dir():
            published = [source / f"cqa_data_{split}.csv", source / f"problems_{split}.json"]
            source = next((file for file in published if file.is_file()), source / f"{split}.jsonl")
        rows = ((number, convert(reader, row, number, source)) for number, row in read_rows(source))
    elif spec.endswith(".jsonl"):
        source = Path(spec)
        rows = read_jsonl(source)
    else:
        known = ", ".join(f"{known}:PATH" for known in KNOWN_SETS)
        raise ValueError(f"data is {spec!r}; allowed: {', '.join(TOYS)}, {known}, FILE.jsonl")
    numbered = [(number, problem_from_row(row, f"{source}:{number}", number)) for number, row in rows]
    refuse_duplicates([(number, problem.id) for number, problem in numbered], source)
    problems = [problem for _, problem in numbered][start:stop][: limit or None]
    if not problems:
        raise ValueError(f"{source}: no problems in it")
    return problems


def convert(reader, row, number, source):
    """One published row -> our row; a row of another shape is an error with its line number."""
    try:
        return reader(row, number, source.stem)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{source}:{number}: not a row of this set ({type(error).__name__}: {error})"
        ) from None


# ---- text: what the model reads and writes -------------------------------------------------------


def render(problem, mode):
    """Problem -> the user turn. Choices are lettered; the last line asks for a chain ("cot") or the bare
    answer ("direct"); "plain" adds no such line. An empty question (a pretraining row) renders to nothing."""
    if not problem.question:
        return ""
    placeholders = f"{IMAGE}\n" * len(problem.images)
    choices = "".join(f"\n({LETTERS[i]}) {choice}" for i, choice in enumerate(problem.choices or []))
    question = problem.question if IMAGE in problem.question else placeholders + problem.question
    return question + choices + {"cot": COT_PROMPT, "direct": DIRECT_PROMPT, "plain": ""}[mode]


def prompt_text(tokenizer, problem, mode):
    """The user turn inside the folder's chat template, ready for the response."""
    content = render(problem, mode)
    return tokenizer.chat_prompt([{"role": "user", "content": content}]) if content else ""


def target(problem, mode):
    """What SFT teaches: the worked solution ("cot", "plain") or the bare answer ("direct")."""
    text = problem.solution if mode != "direct" else problem.answer
    if text is None:
        raise ValueError(
            f"problem {problem.id!r} has no {'solution' if mode != 'direct' else 'answer'}, "
            f"which training in mode {mode!r} needs"
        )
    return text


def grade(problem, text, *, mode, style):
    """(answer, correct) of a response: the marked answer ("cot", "plain") or all of it ("direct"); correct is
    None without a gold answer. An answer that spells out a choice counts as its letter."""
    answer = extract_answer(text, style) if mode != "direct" else text.strip() or None
    if answer is not None and problem.choices:
        spelled = [choice.strip().lower().rstrip(".") for choice in problem.choices]
        if answer.lower().rstrip(".") in spelled:
            answer = LETTERS[spelled.index(answer.lower().rstrip("."))]
    return answer, None if problem.answer is None else is_correct(answer, problem.answer)


# ---- rows and batches ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Token ids of one prompt and one response; ids[n_prompt:] is trained and scored. A picture is one
    placeholder id here."""

    problem_id: str
    ids: list
    n_prompt: int
    reward: float = 1.0
    correct: bool | None = None
    is_reference: bool = False
    images: tuple = ()


def encode_row(tokenizer, problem, text, *, mode, finish="stop", ids=None, **row_fields):
    """One prompt and one response -> Row. Both are tokenised jointly; `ids` (a sampled response's own ids)
    are taken as they are, after checking that this tokenizer reads them as `text`. EOS is added where finish
    is "stop".

    An empty prompt starts with BOS where there is one; the very first token is never scored."""
    prompt = prompt_text(tokenizer, problem, mode)
    if ids is not None:
        if any(not 0 <= i < 2**31 for i in ids) or tokenizer.decode(ids) != text:
            raise ValueError(
                f"problem {problem.id!r}: the response's ids do not read as its text; "
                "the samples were made with another tokenizer"
            )
        if (ids[-1:] != [] and ids[-1] in tokenizer.stop_ids) != (finish == "stop"):
            raise ValueError(f"problem {problem.id!r}: finish is {finish!r}, but its ids end in {ids[-1:]}")
        prompt_ids = tokenizer.encode(prompt)
        all_ids, n_prompt = prompt_ids + list(ids), len(prompt_ids)
    else:
        all_ids, n_prompt = tokenizer.encode_pair(prompt, text)
        if finish == "stop":
            all_ids = all_ids + [tokenizer.eos_id]
    if not prompt and tokenizer.bos_id is not None:
        all_ids, n_prompt = [tokenizer.bos_id] + all_ids, 1
    if len(all_ids) <= max(n_prompt, 1):
        raise ValueError(f"problem {problem.id!r}: no token to train or score; question and text are empty")
    return Row(problem.id, all_ids, max(n_prompt, 1), images=tuple(problem.images), **row_fields)


def fit(rows, max_length, overlong):
    """Rows that fit the context, and the number left out. overlong "refuse" raises instead: a response is
    never cut."""
    long = [row for row in rows if len(row.ids) > max_length]
    if long and overlong == "refuse":
        raise ValueError(
            f"{len(long)} of {len(rows)} rows are longer than {max_length} tokens, the first is problem "
            f"{long[0].problem_id!r} with {len(long[0].ids)}; allowed: a larger --max-length (within the "
            "model's context) or --overlong skip"
        )
    kept = [row for row in rows if len(row.ids) <= max_length]
    if not kept:
        raise ValueError(f"all {len(rows)} rows are longer than {max_length} tokens")
    return kept, len(long)


@dataclass(frozen=True)
class Batch:
    """N response rows of B groups, at most K a group; only present responses are rows. Right-padded.

    ids (N,T); loss_mask, pad_mask (N,T) bool (True = scored, True = a real token); group, slot (N,) the row's
    place in (B,K); rewards (B,K) float64; correct (B,K) int8 (1, 0, -1 = unknown); present (B,K) bool;
    is_reference (N,) bool; images (I,C,H,W) or None, once a group, and image_group (I,)."""

    ids: torch.Tensor
    loss_mask: torch.Tensor
    pad_mask: torch.Tensor
    group: torch.Tensor
    slot: torch.Tensor
    rewards: torch.Tensor
    correct: torch.Tensor
    present: torch.Tensor
    is_reference: torch.Tensor
    problem_ids: list
    images: torch.Tensor | None = None
    image_group: torch.Tensor | None = None

    def to(self, device):
        moved = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class ImageReader:
    """How a folder's model takes pictures: the placeholder's id, how many of them stand for a picture, and
    what makes pixels of it."""

    token_id: int
    n_tokens: int
    processor: ImageProcessor
    blind: bool = False  # control: grey pictures

    def pixels(self, images):
        """[(picture, root)] -> list of (C,H,W). ValueError or OSError names the one that can't be read."""
        opened = [
            pictures.draw(name[4:]) if name.startswith("toy:") else load_image(name, root)
            for name, root in images
        ]
        found = [self.processor(image) for image in opened]
        return [torch.zeros_like(image) for image in found] if self.blind else found

    def expand(self, ids, problem_id, n_images):
        """Each placeholder id -> its n tokens. ValueError where there are not as many as pictures."""
        if ids.count(self.token_id) != n_images:
            raise ValueError(
                f"problem {problem_id!r}: {ids.count(self.token_id)} {IMAGE} in its text, {n_images} "
                "pictures; allowed: one for each, or none in the question"
            )
        return [token for i in ids for token in [i] * (self.n_tokens if i == self.token_id else 1)]


def image_reader(model, tokenizer, folder):
    """The ImageReader of a model, whose preprocessor_config.json is in `folder`; None for a model that reads
    text only."""
    if not hasattr(model, "vlm_config"):
        return None
    config = model.vlm_config
    if tokenizer.encode(IMAGE) != [config.image_token_id]:
        raise ValueError(
            f"{tokenizer.folder}: its tokenizer reads {IMAGE} as {tokenizer.encode(IMAGE)}; "
            f"allowed: as the model's image token, [{config.image_token_id}]"
        )
    return ImageReader(config.image_token_id, config.image_seq_length, ImageProcessor(folder))


def text_room(context, problems, reader):
    """Tokens that a row may have while a picture is one of them, so that it fits the context later."""
    per_picture = reader.n_tokens - 1 if reader else 0
    return context - per_picture * max((len(problem.images) for problem in problems), default=0)


def check_pictures(groups, reader, source):
    """Refuse, before any work, rows with pictures that the model has no eyes for, or not as many as their
    text has places for."""
    for row in (row for group in groups for row in group):
        if reader is not None:
            reader.expand(row.ids, row.problem_id, len(row.images))
        elif row.images:
            raise ValueError(
                f"{source}: problem {row.problem_id!r} has a picture, but the model reads text "
                "only; allowed: a vision-language folder, or train.py --vision"
            )


def collate(groups, pad_id, reader=None):
    """Groups (a list of lists of Row; for SFT each row is its own group) -> Batch. `reader` expands each
    image placeholder to its n tokens and reads the pictures, those of a group once."""
    images, image_group = [], []
    if reader is not None:
        groups = [
            [
                replace(
                    row,
                    ids=(ids := reader.expand(row.ids, row.problem_id, len(row.images))),
                    n_prompt=row.n_prompt + len(ids) - len(row.ids),
                )
                for row in group
            ]
            for group in groups
        ]
        for b, group in enumerate(groups):
            found = reader.pixels(group[0].images)
            images, image_group = images + found, image_group + [b] * len(found)
    rows = [row for group in groups for row in group]
    N, T = len(rows), max(len(row.ids) for row in rows)
    B, K = len(groups), max(len(group) for group in groups)
    ids = torch.full((N, T), pad_id)
    loss_mask, pad_mask = torch.zeros(N, T, dtype=torch.bool), torch.zeros(N, T, dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, : len(row.ids)] = torch.tensor(row.ids)
        pad_mask[n, : len(row.ids)] = True
        loss_mask[n, row.n_prompt : len(row.ids)] = True
    group = torch.tensor([b for b, rows_b in enumerate(groups) for _ in rows_b])
    slot = torch.tensor([k for rows_b in groups for k in range(len(rows_b))])
    rewards, correct = torch.zeros(B, K, dtype=torch.float64), torch.full((B, K), -1, dtype=torch.int8)
    present = torch.zeros(B, K, dtype=torch.bool)
    rewards[group, slot] = torch.tensor([row.reward for row in rows], dtype=torch.float64)
    correct[group, slot] = torch.tensor(
        [-1 if row.correct is None else int(row.correct) for row in rows], dtype=torch.int8
    )
    present[group, slot] = True
    return Batch(
        ids,
        loss_mask,
        pad_mask,
        group,
        slot,
        rewards,
        correct,
        present,
        torch.tensor([row.is_reference for row in rows]),
        [rows_b[0].problem_id for rows_b in groups],
        torch.stack(images) if images else None,
        torch.tensor(image_group) if images else None,
    )


def to_groups(values, batch):
    """Values of the rows (N,) -> (B,K); absent = 0."""
    grouped = values.new_zeros(batch.present.shape)
    return grouped.index_put((batch.group, batch.slot), values)


def schedule(lengths, batch_size, n_rows, seed):
    """Which items make which batch: a list of lists of indices that covers n_rows items, pass after pass,
    each pass in a new order. Batches are length-bucketed: within a window of 32 batches, items of like length
    stand together (equal lengths leave the order alone). A function of its arguments alone, so that a resumed
    run finds the same batches."""
    rng = np.random.default_rng(seed)
    passes = math.ceil(n_rows / len(lengths))
    order = np.concatenate([rng.permutation(len(lengths)) for _ in range(passes)])[:n_rows]
    batches = []
    for start in range(0, n_rows, 32 * batch_size):
        window = order[start : start + 32 * batch_size]
        window = window[np.argsort(np.asarray(lengths)[window], kind="stable")]
        cut = [window[i : i + batch_size].tolist() for i in range(0, len(window), batch_size)]
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches


def refuse_shared(trained, held_out, flag):
    """Refuse held-out problems that are trained on (a single file has no splits but slices)."""
    shared = {problem.id for problem in trained} & {problem.id for problem in held_out}
    if shared:
        raise ValueError(
            f"{flag}: {len(shared)} held-out problems are among the trained ones, e.g. {min(shared)!r}; "
            "allowed: problems that are not, such as --split train[:900] and train[900:]"
        )


def default_length(spec):
    """Longest response in tokens where no flag says it."""
    return 96 if spec in TOYS else 256


def seed_of(*parts):
    """A 63-bit seed that is a function of its parts (e.g. a run's seed and a problem's id), the same on
    every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def peek(tokenizer, groups):
    """Print rows as the loss sees them: prompt tokens grey, trained tokens green, each token's edge marked
    by `|`."""
    for group in groups:
        for row in group:
            tokens = [tokenizer.decode([i], skip_special=False).replace("\n", "\\n") for i in row.ids]
            grey, green = "|".join(tokens[: row.n_prompt]), "|".join(tokens[row.n_prompt :])
            print(
                f"{row.problem_id}  reward {row.reward:g}  "
                f"{row.n_prompt} + {len(tokens) - row.n_prompt} tokens\n"
                f"\033[90m{grey}\033[0m|\033[32m{green}\033[0m"
            )


# ---- groups for alignment ------------------------------------------------------------------------


def distinct(samples):
    """Samples without responses that repeat an earlier one's text (the first stays)."""
    first = {}
    for response in samples.responses:
        first.setdefault(response.text.strip(), response)
    return replace(samples, responses=list(first.values()))


def pairs(samples, *, max_pairs=3, window=(0.25, 0.85), seed):
    """Right x wrong pairs for DPO and IPO: Samples of two responses each, the chosen one first.

    Of each problem whose share of right responses lies in `window`, at most max_pairs random pairs of
    distinct responses (LLaVA-Reasoner, section 3.3). Rows of {prompt, chosen, rejected}, whose correctness is
    unknown, pass through."""
    found = []
    for group in samples:
        if all(response.correct is None for response in group.responses):
            rewards = [response.reward for response in group.responses]
            if len(rewards) != 2 or None in rewards or rewards[0] <= rewards[1]:
                raise ValueError(
                    f"problem {group.problem.id!r}: without 'correct', a group must be a chosen and a "
                    f"rejected response; found rewards {rewards}"
                )
            found.append(group)
            continue
        share = sum(bool(response.correct) for response in group.responses) / len(group.responses)
        if not window[0] <= share <= window[1]:
            continue
        unlike = distinct(group).responses
        couples = [
            (chosen, rejected)
            for chosen in unlike
            if chosen.correct
            for rejected in unlike
            if rejected.correct is False
        ]
        rng = np.random.default_rng(seed_of(seed, group.problem.id))
        for i in rng.permutation(len(couples))[:max_pairs]:
            found.append(replace(group, responses=list(couples[i])))
    if not found:
        raise ValueError(
            f"no right x wrong pair in {len(samples)} groups whose share of right responses lies in "
            f"{list(window)}; allowed: a wider --pair-low, --pair-high, or more samples"
        )
    return found


def truncate_words(samples, words):
    """Samples whose responses keep their first `words` words (split at blanks, as LLaVA-Reasoner's code does,
    which counts words and not tokens) and lose EOS: what is cut is not the model's to end, and that code
    never scores EOS in DPO."""

    def cut(response):
        kept = response.text.split(" ")[:words]
        ids = response.ids[:-1] if response.ids and response.finish == "stop" else response.ids
        return replace(
            response,
            text=" ".join(kept),
            finish="length",
            ids=ids if len(kept) == len(response.text.split(" ")) else None,
        )

    return [replace(group, responses=list(map(cut, group.responses))) for group in samples]


def make_groups(tokenizer, samples, *, mode, max_length, reference):
    """Samples -> (groups of Rows, counts of what was left out).

    Duplicates, empty responses and rows over max_length are left out and counted; reference True puts the
    problem's own solution first, as a right response with reward 1 (AFT: at least one positive). A group that
    ends up without a response is left out. counts also says how many groups have no pair (all right, all
    wrong, or one response)."""
    groups, counts = [], Counter()
    for group in samples:
        problem, responses = group.problem, group.responses
        if not responses:
            counts["without a response"] += 1
            continue
        if reference:
            best = max([1.0, *(r.reward for r in responses if r.reward is not None)])  # none ranks above it
            responses = [Response(target(problem, mode), correct=True, reward=best), *responses]
        unlike = distinct(replace(group, responses=responses)).responses
        counts["duplicates"] += len(responses) - len(unlike)
        rows = []
        for response in unlike:
            reward = response.reward if response.reward is not None else response.correct
            if reward is None:
                raise ValueError(f"problem {problem.id!r}: a response has neither 'reward' nor 'correct'")
            row = encode_row(
                tokenizer,
                problem,
                response.text,
                mode=mode,
                finish=response.finish,
                ids=response.ids,
                reward=float(reward),
                correct=response.correct,
                is_reference=reference and response is responses[0],
            )
            kept = "empty" if not response.text.strip() else "overlong" if len(row.ids) > max_length else None
            if kept:
                counts[kept] += 1
            else:
                rows.append(row)
        if rows:
            groups.append(rows)
            counts["without a pair"] += len({row.reward for row in rows}) < 2
        else:
            counts["without a response"] += 1
    if not groups:
        raise ValueError(f"no group is left of {len(samples)}: {dict(counts)}")
    return groups, dict(counts)
