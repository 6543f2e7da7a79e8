"""What MME-CoT (arXiv 2502.09621) asks judges about a model's answers, and the cache of what they reply.

    precision           is each step of an answer right?                 Reasoning questions, prompt cot
    recall              which key steps does the answer hold?            "
    relevance_rate      does each step work toward an answer?            "
    reflection_quality  do its second thoughts help?                     "
    extract, judge      the final answer, and whether it is right        all questions, prompts cot and dir

A cache has the official layout, so that the official scripts score it too: CACHE/STEP/MODEL/INDEX.json, for
the last two CACHE/STEP/MODEL_PROMPT/INDEX.json; a file holds the question's columns, the prediction and
`valid_outputs`, what the judge said; scoring.py reads it. A judge is a chat (chat.py) and sees no picture.

Not as in the official pipeline: the wording of the requests is ours; they show the options of a question
(the official condition is inverted, so none are shown); extract reads the prompt's own file, not cot's for
both; columns come from the dataset where it has them; a list without line breaks is written with them, which
the official relevance script asks for; the request is not kept in the file.
"""

import json
import os
import re
from pathlib import Path

from minicot.chat import describe_failures, many
from minicot.errors import InputError
from minicot.mme_cot.questions import KINDS, LETTERS, METRICS, STEPS, TYPES, load, options_of

SYSTEM = "You are an AI assistant that helps people solve their questions."  # the official one
# What stands before a final answer, in the order in which it is looked for (official).
MARKERS = (
    *("Answer:", "Final answer", "final answer", "Final Answer", "the answer is", "The answer is"),
    *("correct answer", "Correct answer", "Correct Answer", "<CONCLUSION>"),
)


# ---- what a judge is asked -----------------------------------------------------------------------


def gt_annotation(row, step):
    """The reference that a judge is given. recall: every key step, numbered, a solution's conclusions before
    its captions. Else: the conclusions and, twice, the pictures' captions, as the official code has it."""
    solutions = {name: one for name, one in (row.get("key_annotation_steps") or {}).items() if one}
    if step == "recall":
        parts = [solutions[name][kind] for name in sorted(solutions) for kind in KINDS]
        texts = [text.strip() for part in parts for text in part if text.strip()]
        return [{"step_index": place, "content": text} for place, text in enumerate(texts)]
    conclusions = [text for one in solutions.values() for text in one["logical_conclusion"]]
    texts = conclusions + 2 * (row.get("reference_caption") or [])
    return [text.strip() for text in texts if text.strip()]


def is_annotated(row, step):
    """Whether a judge can be asked about this row: its reference reads, and recall has key steps to find."""
    try:
        return bool(gt_annotation(row, step)) or step != "recall"
    except (AttributeError, LookupError, TypeError):
        return False


LIST = 'Reply with JSON alone, {{"steps": [{}]}}, an item for each step, in order.'
TYPED = (
    "step_type is image description (what is read from a picture), logical inference (what follows) or "
    "background information (what restates or plans)"
)
# step -> what the judge is told. The tasks and the labels are the official ones, the wording is ours.
TASKS = {
    "precision": "Split the solution into its atomic steps, at most 35, the final answer last, and compare "
    "each with gt_annotation. judgment is Match (it says what an item there says), Reasonable (right, but no "
    f"item there), Wrong, or N/A (background information). {TYPED}. "
    + LIST.format('{"step_type", "premise", "conclusion", "judgment"}'),
    "recall": "For each item of gt_annotation, in order: is it stated in the solution, or does it follow at "
    "once from what is stated, with all its values right? judgment is Matched or Unmatched. "
    + LIST.format('{"step_index", "judgment"}'),
    "relevance_rate": "Split the solution into its atomic steps, at most 40. Does each step work toward an "
    f"answer to the question? Right or wrong does not matter. relevant is Yes or No. {TYPED}. "
    + LIST.format('{"step_type", "conclusion", "relevant"}'),
    "reflection_quality": "Find the steps of the solution that think again (wait, alternatively, let me "
    "check), at most 30. judgment is Correct where the conclusion is right and new, else Wrong; error_type "
    "is then Repetition, Wrong Conclusion, Incompleteness or Other, else N/A. No such steps: an empty list. "
    + LIST.format('{"conclusion", "judgment", "error_type"}'),
    "extract": "What is the final answer of the solution? Reply with its letter or value alone, Z where it "
    "has none.",
    "judge": "Is extract_answer the same answer as answer? Reply with 1 (yes) or 0 (no) alone.",
}
FIELDS = {
    "precision": {
        "step_type": [*TYPES, "background information"],
        "premise": None,
        "conclusion": None,
        "judgment": ["Match", "Reasonable", "Wrong", "N/A"],
    },
    "recall": {"step_index": int, "judgment": ["Matched", "Unmatched"]},
    "relevance_rate": {
        "step_type": [*TYPES, "background information"],
        "conclusion": None,
        "relevant": ["Yes", "No"],
    },
    "reflection_quality": {
        "conclusion": None,
        "judgment": ["Correct", "Wrong"],
        "error_type": ["N/A", "Repetition", "Wrong Conclusion", "Incompleteness", "Other"],
    },
}


def schema_of(step):
    """The JSON schema of a step's reply, for chat.Endpoint; None where the reply is a bare text. Servers want
    an object at the top, so the official list is its `steps`."""
    if step not in FIELDS:
        return None
    kind = lambda allowed: {"type": "integer"} if allowed is int else {"type": "string"}
    fields = {
        name: {**kind(allowed), **({"enum": allowed} if isinstance(allowed, list) else {})}
        for name, allowed in FIELDS[step].items()
    }
    closed = lambda properties: {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return closed({"steps": {"type": "array", "items": closed(fields)}})


def request(step, row):
    """The messages about a row, which has its `prediction` (and, for judge, its `extract_answer`)."""
    question = str(row.get("question"))
    shown = [option for option in options_of(row) if option not in question]
    given = {"index": row["index"], "question": "\n".join([question, *shown])}
    if step not in ("extract", "relevance_rate"):
        given["answer"] = row.get("answer")
    given |= {"extract_answer": row["extract_answer"]} if step == "judge" else {"solution": row["prediction"]}
    if step in ("precision", "recall", "reflection_quality"):
        given["gt_annotation"] = gt_annotation(row, step)
    asked = f"{TASKS[step]}\n\n{json.dumps(given, indent=1, ensure_ascii=False)}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]


def official(reply):
    """A judge's reply as the official scripts want it: a list, or an object of `steps`, becomes a list with
    line breaks. All else stays as it was said; scoring names it where it is no list."""
    try:
        said = json.loads(reply)
    except (ValueError, RecursionError):
        return reply
    said = said.get("steps") if isinstance(said, dict) else said
    return json.dumps(said, indent=2) if isinstance(said, list) else reply


# ---- answers by rule -----------------------------------------------------------------------------


def extract_by_rule(row):
    """The official shortcut: the final answer of row["prediction"], or None, which leaves it to the judge.

    Of more than ten words only what follows the last of the first marker counts. A question whose answer is a
    capital letter: the one option whose letter, else whose text, is in it. Else the text as a whole, from its
    last `oxed{` on."""
    text = str(row["prediction"])
    if len(text.split()) > 10:
        marker = next((marker for marker in MARKERS if marker in text), None)
        if marker is None:
            return None
        text = text.split(marker)[-1].strip()
    answer = str(row.get("answer"))
    if len(answer) == 1 and answer.isupper():
        options = {letter: str(row[letter]) for letter in LETTERS[:-1] if row.get(letter) is not None}
        options = {letter: text for letter, text in options.items() if text.strip() not in ("", "nan")}
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
        named = [letter for letter in options if letter in words]
        if len(named) != 1:
            named = [letter for letter, option in options.items() if option.lower() in text.lower()]
        if len(named) == 1:
            return named[0]
    if "oxed{" in text:
        text = "\\boxed{" + text.split("oxed{")[-1]
    return text.lstrip(":").strip()


def judge_by_rule(extracted, answer):
    """The official shortcut: "1" or "0" for two single characters, else None: the judge is asked."""
    return str(int(extracted == answer)) if len(extracted) == len(answer) == 1 else None


# ---- making a cache ------------------------------------------------------------------------------


def make_cache(rows, out, prompt, name, chat_of, *, steps=STEPS, limit=8, notes):
    """Ask judges about `rows` ({index: row with its prediction}), the answers of the model `name` to `prompt`
    ("cot" or "dir"), and write the cache `out`. `chat_of(step)` is the chat for a step. Yields, a step:
    (step, replies that were there, replies written, what failed). Who failed has no file and is asked when
    this is called again; what is there is not."""
    if not re.fullmatch(r"[^./\\\0][^/\\\0]*", name):
        raise InputError(f"the model's name is {name!r}; allowed: the name of a folder")
    folder = lambda step: Path(out, step, name if step in METRICS else f"{name}_{prompt}")
    for step in (step for step in STEPS if step in steps and (prompt == "cot" or step not in METRICS)):
        folder(step).mkdir(parents=True, exist_ok=True)
        there = read_cached(folder(step), notes)
        chosen = [
            row for row in rows.values() if step not in METRICS or row.get("question_type") == "Reasoning"
        ]
        todo = [dict(row) for row in chosen if row["index"] not in there]
        if step in METRICS:
            todo = leave_out(todo, lambda row: is_annotated(row, step), f"no key steps for {step}", notes)
        if step == "judge":
            answers = read_cached(folder("extract"), notes)
            todo = leave_out(todo, lambda row: row["index"] in answers, "no extracted answer", notes)
            todo = [row | {"extract_answer": answers[row["index"]]} for row in todo]
        asked = []
        for row in todo:
            row["pre_answer"] = by_rule(step, row)
            row |= {} if step in METRICS else {"task": "judge"}
            asked += [] if row["pre_answer"] else [row]
            if row["pre_answer"]:
                write_cached(folder(step), row, row["pre_answer"])
        failures = []
        for row, reply in zip(asked, many(chat_of(step), [request(step, row) for row in asked], limit=limit)):
            if isinstance(reply, InputError):
                failures.append(reply)
            else:
                write_cached(folder(step), row, official(reply) if step in METRICS else reply)
        answered = [""] * (len(asked) - len(failures))
        counted = len(there.keys() & {row["index"] for row in chosen}), len(todo) - len(failures)
        yield step, *counted, describe_failures([*failures, *answered])


def leave_out(rows, keep, kind, notes):
    """The rows to keep; the others are named."""
    notes += [(kind, f"index {row['index']}") for row in rows if not keep(row)]
    return [row for row in rows if keep(row)]


def by_rule(step, row):
    """The reply that needs no judge, None where one is asked."""
    if step == "extract":
        return extract_by_rule(row)
    return judge_by_rule(row["extract_answer"], str(row.get("answer"))) if step == "judge" else None


def read_cached(folder, notes):
    """A folder of a cache -> {index: valid_outputs}. A file that was cut is named, and made again."""
    there = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            said = load(file.read_text(encoding="utf-8"))["valid_outputs"]
            there[int(file.stem)] = "" if said is None else str(said)
        except (ValueError, LookupError, TypeError, OSError) as error:
            notes.append(("file of the cache left out", f"{file}: {error!r:.80}"))
    return there


def write_cached(folder, row, reply):
    """One file of the cache, whole or not at all: begun outside the folders that are scored."""
    part = folder.parents[1] / f"{folder.name}-{row['index']}.part"
    part.write_text(json.dumps({**row, "valid_outputs": reply}, indent=4))
    os.replace(part, folder / f"{row['index']}.json")
