"""MME-CoT's questions (arXiv 2502.09621), and a model's answers to them: DATASET.json and PREDICTIONS as rows
with the official columns. What does not read is named in `notes`, [(kind, where)], and costs itself alone."""

import json
import re
from collections import Counter
from pathlib import Path

from minicot.errors import InputError
from minicot.records import samples_from_row

METRICS = ("precision", "recall", "relevance_rate", "reflection_quality")
STEPS = (*METRICS, "extract", "judge")
TYPES = ("logical inference", "image description")  # of a step; "background information" is not scored
CATEGORIES = {  # with their subcategories
    "Math": ("Plane Geometry", "Algebra", "Coordinate", "Solid Geometry", "Application"),
    "Science": ("Physics", "Chemistry", "Biology"),
    "General Reasoning": ("Commonsense", "Details"),
    "OCR": ("Doc", "Diagram", "search"),
    "Spatial-Temporal": ("Spatial", "Temporal"),
    "Logic": ("Transformation", "Attribution"),
}
KINDS = ("logical_conclusion", "image_caption")  # of a key step
LETTERS = "ABCDEFGHIJKL"
SUFFIX = {  # the official ones
    "cot": "Please generate a step by step answer, include all your intermediate reasoning process, and "
    "provide the final answer at the end.",
    "dir": "Please directly provide the final answer without any other output.",
}


# ---- questions and predictions -------------------------------------------------------------------


def load(text):
    """JSON, with NaN. InputError where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # bytes in another encoding are a ValueError as well
        raise InputError(f"not JSON ({error!s:.80})") from None


def lines_of(content, kind, notes):
    """Yield (line number, object) of JSON lines; what is none is named."""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            if line.strip():
                yield number, load(line)
        except InputError as error:
            notes.append((kind, f"line {number}: {error}"))


def read_dataset(path, notes):
    """DATASET.json, a list of the official rows or one row a line -> {index: row}. A row without an integer
    index is left out, one of another type than the two is named as well; of two with one index the last
    counts, as officially."""
    content, questions = Path(path).read_bytes(), {}
    try:
        rows = load(content)
    except InputError:
        rows = [row for _, row in lines_of(content, "dataset row left out", notes)]
    for place, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        index = row.get("index") if isinstance(row, dict) else None
        texts = [row.get(name) for name in ("category", "subcategory")] if isinstance(row, dict) else []
        if type(index) is not int or not all(isinstance(text, str | None) for text in texts):
            notes.append(("dataset row left out", f"row {place}: {row!r:.60}"))
            continue
        if row.get("question_type") not in ("Reasoning", "Perception"):
            notes.append(("unknown question_type", f"row {place}: {row.get('question_type')!r:.40}"))
        if index in questions:
            notes.append(("index twice in the dataset", f"{index}"))
        questions[index] = row
    if not questions:
        raise InputError(f"{path}: no questions; allowed: rows with index, question_type, category, ...")
    return questions


def options_of(row):
    """The options of a question: "A. red", "B. blue", ..."""
    return [f"{letter}. {row[letter]}" for letter in LETTERS if row.get(letter) not in (None, "")]


def build_prompt(row, prompt):
    """The official request to the model under test: "cot" or "dir"."""
    return "\n".join([row["question"], *options_of(row), SUFFIX[prompt]])


def read_predictions(path, questions, notes):
    """PREDICTIONS, JSON lines -> {index: the question's row with `prediction`}. A line is an official row
    (index, prediction, ...) or one of sample.py's Samples (id is the index; the first response counts). What
    is none of these, is asked twice or by nobody, or is about another question is left out and named."""
    found = {}
    for number, line in lines_of(Path(path).read_bytes(), "prediction left out", notes):
        try:
            index, row = prediction_of(line, f"{path}:{number}")
        except InputError as error:
            notes.append(("prediction left out", f"line {number}: {error}"))
            continue
        asked = questions.get(index)
        if asked is None:
            notes.append(("prediction left out", f"line {number}: index {index} is not in the dataset"))
        elif index in found:
            notes.append(("prediction left out", f"line {number}: index {index} was given before"))
        elif not same_question(row.get("question"), asked):
            notes.append(("prediction left out", f"line {number}: not the dataset's question {index}"))
        else:
            if not isinstance(row["prediction"], str):
                notes.append(("no text as a prediction", f"line {number}: {row['prediction']!r:.40}"))
            columns = {name: value for name, value in asked.items() if name not in ("image", "images")}
            found[index] = row | columns | {"prediction": row["prediction"]}
    if not found:
        raise InputError(f"{path}: no prediction for a question of the dataset; {summary(notes)}")
    return found


def prediction_of(row, where):
    """A line -> (index, columns). InputError: it has no integer index, or no prediction."""
    if isinstance(row, dict) and "responses" in row:
        fields = {name: row.get(name) for name in ("question", "responses")}
        samples = samples_from_row(fields, where, 0)
        if not samples.responses:
            raise InputError("no response")
        row = {"index": row.get("id"), "question": fields["question"], "prediction": samples.first.text}
    if not isinstance(row, dict) or "prediction" not in row:
        raise InputError("no prediction")
    index = str(row.get("index"))
    if not re.fullmatch(r"\d{1,9}", index):
        raise InputError(f"index {index!r:.40}; allowed: whole numbers")
    return int(index), row


def same_question(text, row):
    """Whether a text, if any, holds or is held by the row's question, but for marks and blanks."""
    bare = lambda value: re.sub(r"<image>|\W", "", str(value)).lower()
    return text is None or bare(row.get("question")) in bare(text) or bare(text) in bare(row.get("question"))


def summary(notes, shown=3):
    """Notes (kind, where), by kind, in a line."""
    kinds = Counter(kind for kind, _ in notes)
    first = lambda kind: "; ".join([where for name, where in notes if name == kind][:shown])
    text = " | ".join(f"{n} x {kind}: {first(kind)}{'; ...' * (n > shown)}" for kind, n in kinds.items())
    return text.encode(errors="backslashreplace").decode()
