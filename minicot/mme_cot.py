"""MME-CoT (arXiv 2502.09621) scored: from a cache of judges' replies to the paper's numbers.

    python -m minicot.mme_cot judge PREDICTIONS --prompt cot|dir --dataset DATASET.json --out CACHE
    python -m minicot.mme_cot score CACHE --dataset DATASET.json --out DIR

quality     F1 of precision and recall                              (section 3.1)
efficiency  mean of relevance rate and reflection quality           (section 3.3)
robustness  mean of stability (Perception) and efficacy (Reasoning), each accuracy with the prompt cot minus
            accuracy with the prompt dir                            (section 3.2)

Values, grouping, rounding and files are those of the official scripts (MME-Benchmarks/MME-CoT, 08fa4e9); so
are their oddities, which stand where they are computed. Fractions, not percent. Not as there: sums are exact
(math.fsum), so the order of files is nothing; the cache is only read, what the scripts write into it goes to
DIR/per_sample.json; what crashes them is named and the rest is scored; DIR/coverage.json says how many
replies each number rests on.

`--fixed`: a question without a usable reply counts 0, and stability and efficacy compare the same questions.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minicot.chat import Endpoint
from minicot.config import Flags, check, flag, run
from minicot.errors import InputError
from minicot.mme_judge import KINDS, METRICS, STEPS, TYPES, load, make_cache, read_dataset, read_predictions
from minicot.mme_judge import schema_of, summary
from minicot.repair import read_list

DUMMY = {"overall_metrics": {"average_reflection_quality": 1}}  # of a model without reflections, everywhere
EMPTY = "the list is empty"
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError, OverflowError)


class Sample(NamedTuple):
    """One file of a cache, scored. `score` None: it has none and is skipped. `types`: step type -> (score,
    ratio); `added`: what the official script writes back into the file."""

    index: int | None
    score: float | None
    ratio: float | None = None
    types: dict = {}
    added: dict = {}
    question_type: str | None = None
    place: tuple = (None, None)  # category and subcategory


# ---- one file ------------------------------------------------------------------------------------


def precision(data, steps):
    """(Match + Reasonable) / all, over the steps of TYPES; ratio: Match / (Match + Reasonable). A file with
    no such step, and a type with none, counts 0; a step without a judgment makes it 0."""

    def share(steps):
        if not steps or not all("judgment" in step for step in steps):
            return 0, None
        matched, reasonable = (sum(s["judgment"] == mark for s in steps) for mark in ("Match", "Reasonable"))
        right = matched + reasonable
        return right / len(steps), matched / right if right else None

    overall, by_type = of_types(steps, share)
    return Sample(None, *overall, by_type)


def relevance_rate(data, steps):
    """Yes / all, over the steps of TYPES; None where there is none, or one lacks `relevant`."""

    def share(steps):
        if not steps or not all("relevant" in step for step in steps):
            return None, None
        return sum(step["relevant"] == "Yes" for step in steps) / len(steps), None

    overall, by_type = of_types(steps, share)
    written = {"overall": {"score": overall[0]}, "by_type": {t: {"score": by_type[t][0]} for t in TYPES}}
    return Sample(None, *overall, by_type, {"relevance_rate": written})


def of_types(steps, share):
    """`share` of all steps of TYPES, and {type: share of its steps}."""
    by_type = {kind: share([step for step in steps if step["step_type"] == kind]) for kind in TYPES}
    return share([step for step in steps if step["step_type"] in TYPES]), by_type


def reflection_quality(data, steps):
    """Correct / all; ratio: repetitions / Wrong. None where an item is no object."""
    score = ratio = None
    if all(isinstance(step, dict) for step in steps):
        wrong = [step for step in steps if step.get("judgment") == "Wrong"]
        score = sum(step.get("judgment") == "Correct" for step in steps) / len(steps)
        repeated = sum(step.get("error_type") == "Repetition" for step in wrong)
        ratio = repeated / len(wrong) if wrong else None
    written = {"score": score, "repetition_ratio": ratio}
    return Sample(None, score, ratio, added={"reflection_quality": written})


def recall(data, steps):
    """Matched / key steps, of the solution (1 to 4) where it is largest. The list is read by position,
    conclusions before captions, solution after solution: what it lacks is missed, what it has more is
    ignored. So `[]` is a recall of 0."""
    best, at = None, 0
    for counts in key_steps(data["key_annotation_steps"]):
        matched = []
        for count in counts:
            matched.append(sum(step.get("judgment") == "Matched" for step in steps[at : at + count]))
            at += count
        if sum(counts) and (best is None or sum(matched) / sum(counts) > best[0]):
            shares = [n / count if count else None for n, count in zip(matched, counts)]
            best = sum(matched) / sum(counts), shares
    if best is None:
        raise ValueError("no key steps")
    score, (inference, caption) = best
    written = {"score": score, "logical_inference": inference, "image_caption": caption}
    types = {"logical inference": (inference, None), "image caption": (caption, None)}
    return Sample(None, score, types=types, added={"recall": written})


def key_steps(solutions):
    """How many conclusions and captions, not blank, each of the four solutions has."""
    found = [solutions.get(f"solution{i}", {}) for i in range(1, 5)]
    return [
        [0, 0] if one is None else [sum(bool(text.strip()) for text in one.get(kind, [])) for kind in KINDS]
        for one in found
    ]


SCORES = {one.__name__: one for one in (precision, recall, relevance_rate, reflection_quality)}


def read_sample(file, metric, questions):
    """A file of the cache -> Sample; one of UNREADABLE where the official script fails on it."""
    text = file.read_text(encoding="utf-8")
    data = json.loads(text)
    index = data.get("index")
    if metric == "judge":
        index, kind = int(data["index"]), data["question_type"]
        if index not in questions or kind not in ("Reasoning", "Perception"):
            raise ValueError(f"index {index} with question_type {kind!r:.40} is not in the dataset")
        return Sample(index, verdict(data["valid_outputs"]), question_type=kind).within(questions)
    if metric != "precision" and "\\ud" in text.lower():
        json.dumps(data, ensure_ascii=False).encode()  # half a character: it cannot be written back
    steps = read_list(data.get("valid_outputs") or "", own_line=metric == "relevance_rate")
    if steps is None:
        raise ValueError("no list in valid_outputs" + ", or not in lines" * (metric == "relevance_rate"))
    if not steps and metric != "recall":
        raise ValueError(EMPTY)
    return SCORES[metric](data, steps)._replace(index=index).within(questions)


def verdict(said):
    """1 or 0; None where the judge said something else, which counts as 0."""
    try:
        return int(said) if int(said) in (0, 1) else None
    except UNREADABLE:
        return None
