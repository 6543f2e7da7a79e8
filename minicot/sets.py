"""Where problems come from: published sets, as they are published, JSON lines, the built-in worlds.

A published row's reader takes the fields that a Problem has; of a file of our own JSON lines all are kept.
"""

import csv
import json
import re
from pathlib import Path

from minicot.answers import extract_answer
from minicot.errors import InputError
from minicot.records import LETTERS, problem_from_row, read_jsonl, refuse_duplicates
from minicot.toy import pictures, shots
from minicot.toy import problems as toy


# ---- a row of a published set -> a row of ours --------------------------------------------------


def gsm8k_row(row, number, stem):
    """Cobbe et al. 2021: `answer` is the worked solution; its calculator marks <<48/2=24>> are left out."""
    solution = re.sub(r"<<[^>]*>>", "", row["answer"])
    if extract_answer(solution, "hash") is None:
        raise InputError("its answer has no line #### number")
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


# ---- files of them, and by name ------------------------------------------------------------------


def read_rows(path):
    """Yield (line or element number, object) of JSON lines, of a JSON array or an object of objects by id
    (.json), or of a table (.csv)."""
    if path.suffix not in (".json", ".csv") or not path.is_file():
        yield from read_jsonl(path)
        return
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = json.load(file) if path.suffix == ".json" else list(csv.DictReader(file))
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path}: not {path.suffix[1:].upper()} ({error})") from None
    if isinstance(rows, dict) and rows and all(isinstance(row, dict) for row in rows.values()):
        rows = [{"id": id_, **row} for id_, row in rows.items()]
    if not isinstance(rows, list):
        raise InputError(f"{path}: holds a JSON {type(rows).__name__}, expected an array")
    yield from enumerate(rows, 1)


# name: (reader of a row, style of the final answer, file name of a split where it differs)
KNOWN_SETS = {
    "gsm8k": (gsm8k_row, "hash", {}),
    "aqua": (aqua_row, "letter", {"validation": "dev"}),
    "ecqa": (ecqa_row, "letter", {"validation": "val"}),
    "tabmwp": (tabmwp_row, "hash", {"validation": "dev"}),
    **{name: (arithmetic_row, "hash", {}) for name in ("svamp", "multiarith", "addsub", "singleeq")},
}
TOYS = {"toy": toy.rows, "toy-pictures": pictures.rows, "toy-pictures-long": pictures.long_rows}
TOYS |= {"toy-shots": shots.rows}
TOY_SIZES = {"train": 20_000, "validation": 1_000, "test": 3_000}


def style_of(spec):
    """How the final answer is marked in a data source, e.g. "hash" for `#### 18`."""
    return KNOWN_SETS[spec.split(":")[0]][1] if spec.split(":")[0] in KNOWN_SETS else "hash"


def default_length(spec):
    """Longest response in tokens where no flag says it."""
    return {"toy": 96, "toy-pictures": 96, "toy-pictures-long": 160, "toy-shots": 48}.get(spec, 256)


def read_problems(spec, split="train", *, limit=0):
    """A name of TOYS, `gsm8k:PATH` (a folder with train.jsonl / test.jsonl, or one file) or
    `file.jsonl` -> list of Problem.

    `split` may be a slice, `train[7000:]`. limit > 0 keeps the first problems. InputError names file, line
    and value."""
    name, _, path = spec.partition(":")
    if limit < 0:
        raise InputError(f"limit is {limit}; allowed: 0 (all) or more")
    match = re.fullmatch(r"([\w-]+)(?:\[(-?\d*):(-?\d*)\])?", split)
    if not match:
        raise InputError(f"split is {split!r}; allowed: a name, or a slice of one such as train[:7000]")
    split, start, stop = match[1], *(int(text) if text else None for text in match.groups()[1:])
    if spec in TOYS:
        if split not in TOY_SIZES:
            raise InputError(f"split is {split!r}; allowed for {spec}: {', '.join(TOY_SIZES)}")
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
        raise InputError(f"data is {spec!r}; allowed: {', '.join(TOYS)}, {known}, FILE.jsonl")
    numbered = [(number, problem_from_row(row, f"{source}:{number}", number)) for number, row in rows]
    refuse_duplicates([(number, problem.id) for number, problem in numbered], source)
    problems = [problem for _, problem in numbered][start:stop][: limit or None]
    if not problems:
        raise InputError(f"{source}: no problems in it")
    return problems


def convert(reader, row, number, source):
    """One published row -> our row; a row of another shape is an error with its line number."""
    try:
        return reader(row, number, source.stem)
    except InputError as error:
        raise InputError(f"{source}:{number}: {error}") from None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{source}:{number}: not a row of this set ({type(error).__name__}: {error})"
        ) from None


def refuse_shared(trained, held_out, flag):
    """Refuse held-out problems that are trained on (a single file has no splits but slices)."""
    shared = {problem.id for problem in trained} & {problem.id for problem in held_out}
    if shared:
        raise InputError(
            f"{flag}: {len(shared)} held-out problems are among the trained ones, e.g. {min(shared)!r}; "
            "allowed: problems that are not, such as --split train[:900] and train[900:]"
        )
