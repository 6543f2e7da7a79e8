"""MME-CoT's numbers (arXiv 2502.09621) from a cache of judges' replies.

quality     F1 of precision and recall
efficiency  mean of relevance rate and reflection quality
robustness  mean of stability (Perception) and efficacy (Reasoning), each accuracy with the prompt cot minus
            accuracy with the prompt dir

Values, grouping, rounding and files are those of the official scripts (final_score/ of
MME-Benchmarks/MME-CoT at 08fa4e9); so are their oddities, which stand where they are computed. Fractions, not
percent. Not as there: sums are exact (math.fsum), so the order of files is nothing; the cache is only read,
what the scripts write into it goes to per_sample.json; what crashes them is named in `notes`, and the rest is
scored.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from minicot.errors import InputError
from minicot.mme_cot.questions import CATEGORIES, KINDS, METRICS, TYPES
from minicot.mme_cot.repair import read_list

DUMMY = {  # of a model without reflections: 1 everywhere
    "overall_metrics": {"average_reflection_quality": 1},
    "category": dict.fromkeys(CATEGORIES, 1),
    "subcategory": {name: 1 for names in CATEGORIES.values() for name in names},
}
COLUMNS = {  # the paper's: name -> where it stands
    "F1": ("quality/quality_results.json", "overall_metrics", "f1"),
    "P": ("quality/quality_results.json", "overall_metrics", "precision"),
    "R": ("quality/quality_results.json", "overall_metrics", "recall"),
    "robustness": ("robustness/robustness.json", "robustness", "overall"),
    "stability": ("robustness/robustness.json", "stability", "overall"),
    "efficacy": ("robustness/robustness.json", "efficacy", "overall"),
    "efficiency": ("efficiency/efficiency_results.json", "overall_metrics", "efficiency"),
    "relevance": ("efficiency/efficiency_results.json", "overall_metrics", "relevance_rate"),
    "reflection": ("efficiency/efficiency_results.json", "overall_metrics", "reflection_quality"),
}
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
        return Sample(
            index, verdict(data["valid_outputs"]), question_type=kind, place=place_of(index, questions)
        )
    if metric != "precision" and "\\ud" in text.lower():
        json.dumps(data, ensure_ascii=False).encode()  # half a character: it cannot be written back
    steps = read_list(data.get("valid_outputs") or "", own_line=metric == "relevance_rate")
    if steps is None:
        raise ValueError("no list in valid_outputs" + ", or not in lines" * (metric == "relevance_rate"))
    if not steps and metric != "recall":
        raise ValueError(EMPTY)
    return SCORES[metric](data, steps)._replace(index=index, place=place_of(index, questions))


def place_of(index, questions):
    """Category and subcategory; of an index that the dataset lacks (a text, too), neither."""
    return tuple(questions.get(index, {}).get(level) for level in ("category", "subcategory"))


def verdict(said):
    """1 or 0; None where the judge said something else, which counts as 0."""
    try:
        return int(said) if int(said) in (0, 1) else None
    except UNREADABLE:
        return None


# ---- a cache -------------------------------------------------------------------------------------


def read_cache(cache, questions, notes):
    """A cache folder -> ({metric: {model: {file name: Sample}}}, {metric: {model: {file name: error}}}). The
    Samples of a stray file among the folders of reflection_quality are None: officially it is a model without
    reflections."""
    samples, errors = {}, {}
    for metric in (*METRICS, "judge"):
        folder = Path(cache, metric)
        if not folder.is_dir():
            notes.append(("folder missing", str(folder)))
            continue
        samples[metric], errors[metric] = {}, {}
        for model in sorted(folder.iterdir()):
            if model.is_dir():
                found, failed = read_model(model, metric, questions, notes)
                samples[metric][model.name], errors[metric][model.name] = found, failed
            else:
                notes.append(("stray file", str(model)))
                if metric == "reflection_quality":
                    samples[metric][model.name] = None
    if not samples:
        raise InputError(f"{cache}: nothing to score; allowed: a folder with {', '.join(METRICS)} or judge")
    return samples, errors


def read_model(folder, metric, questions, notes):
    """A model's folder -> ({file name: Sample}, {file name: error})."""
    found, failed, first = {}, {}, {}
    for file in sorted(folder.iterdir()):
        if metric != "judge" and not file.name.endswith(".json"):
            notes.append(("not a .json file, not read", str(file)))
            continue
        if not (file.stem.isdecimal() and file.suffix == ".json"):
            notes.append(("file name that is no index", str(file)))
        try:
            found[file.name] = sample = read_sample(file, metric, questions)
        except UNREADABLE as error:
            failed[file.name] = f"{type(error).__name__}: {error!s:.200}"
            continue
        if sample.index in first:
            notes.append(("index twice", f"{file} and {first[sample.index]}, index {sample.index}"))
        first.setdefault(sample.index, file.name)
        if metric == "judge" and sample.score is None:
            notes.append(("verdict that is neither 1 nor 0 counts as 0", str(file)))
        elif sample.place == (None, None):
            notes.append(("index not in the dataset, in no category", f"{file}: {sample.index!r:.40}"))
    return found, failed


def fill(samples, errors, questions):
    """`--fixed`: each question once, whatever the file's name says; without a usable reply it counts 0. A
    reply that finds no reflections is a usable one, and still skipped. So cot and dir hold the same questions
    -> (samples, {metric: {model: zeros}})."""
    filled, zeros = {}, {}
    for metric in samples:
        filled[metric], zeros[metric] = {}, {}
        kinds = ("Reasoning", "Perception") if metric == "judge" else ("Reasoning",)
        asked = {i: row for i, row in questions.items() if row.get("question_type") in kinds}
        for model, found in samples[metric].items():
            if found is None:
                filled[metric][model] = None
                continue
            given, none = {}, {name for name, error in errors[metric][model].items() if EMPTY in error}
            for name in sorted(found, key=lambda name: (name != f"{found[name].index}.json", name)):
                if str(found[name].index).isdecimal():
                    given.setdefault(int(found[name].index), found[name])
            scored = filled[metric][model] = {}
            for index, row in asked.items():
                sample = given.get(index, Sample(index, None, types=no_types(metric, row)))
                if metric != "reflection_quality" or f"{index}.json" not in none:
                    zeros[metric][model] = zeros[metric].get(model, 0) + (sample.score is None)
                    known = {"question_type": row["question_type"], "place": place_of(index, questions)}
                    scored[f"{index}.json"] = sample._replace(score=sample.score or 0, **known)
    return filled, zeros


def no_types(metric, row):
    """The types of a question without a reply: 0 each. Recall has those that the key steps have."""
    if metric == "recall":
        try:
            kinds = zip(("logical inference", "image caption"), zip(*key_steps(row["key_annotation_steps"])))
        except UNREADABLE:
            return {}
        return {kind: (0, None) for kind, counts in kinds if any(counts)}
    return {} if metric in ("reflection_quality", "judge") else dict.fromkeys(TYPES, (0, None))


# ---- the official tables -------------------------------------------------------------------------


def avg4(values):
    """The mean of what is not None, rounded to 4 digits; None where there is nothing."""
    values = [value for value in values if value is not None]
    return round(math.fsum(values) / len(values), 4) if values else None


def metric_table(metric, samples):
    """A model's entry in <metric>_results.json. The relevance rate is rescaled to (rate - 0.8) * 5, overall
    and by type, but not by category: so the official script has it."""
    name = f"average_{metric}"
    ratio = {"precision": "average_ratio", "reflection_quality": "average_repetition_ratio"}.get(metric)

    def entry(scores):
        scores = list(scores)
        value = avg4(score for score, _ in scores)
        if metric == "relevance_rate" and value is not None:
            value = round((value - 0.8) * 5, 4)
        return {name: value} | ({ratio: avg4(r for _, r in scores)} if ratio else {})

    def group(level):
        places = dict.fromkeys(s.place[level] for s in samples if s.place[level] and s.score is not None)
        return {place: avg4(s.score for s in samples if s.place[level] == place) for place in places}

    kinds = ("logical inference", "image caption") if metric == "recall" else TYPES if samples else ()
    types = {
        kind: entry(s.types[kind] for s in samples if kind in s.types)
        for kind in kinds
        if ratio != "average_repetition_ratio"
    }
    table = {"overall_metrics": entry((s.score, s.ratio) for s in samples)}
    if metric == "precision":
        table["overall_metrics"][name] = table["overall_metrics"][name] or 0
    if metric == "relevance_rate":
        types = {kind: value for kind, value in types.items() if value[name] is not None}
    if metric != "reflection_quality":
        table["type_metrics"] = types
    return table | {"category": group(0), "subcategory": group(1)}


def quality_table(precision, recall):
    """F1 of two tables' rounded averages, overall, by type, and where both have the category."""

    def f1(p, r):
        return None if p is None or r is None or p == r == 0 else round(2 * p * r / (p + r), 4)

    both = lambda p, r: {"precision": p, "recall": r, "f1": f1(p, r)}
    pick = lambda p, r: both(p["average_precision"], r["average_recall"])
    types = {"logical inference": "logical inference", "image caption": "image description"}
    ours, theirs = precision["type_metrics"], recall["type_metrics"]
    return {
        "overall_metrics": pick(precision["overall_metrics"], recall["overall_metrics"]),
        "type_metrics": {kind: pick(ours[types[kind]], theirs[kind]) for kind in types},
        **by_category(precision, recall, both),
    }


def efficiency_table(relevance, reflection):
    """The mean of two tables' averages, overall and where both have the category."""

    def both(a, b):
        mean = None if a is None or b is None else round((a + b) / 2, 4)
        return {"relevance_rate": a, "reflection_quality": b, "efficiency": mean}

    overall = relevance["overall_metrics"]["average_relevance_rate"]
    return {
        "overall_metrics": both(overall, reflection["overall_metrics"]["average_reflection_quality"]),
        **by_category(relevance, reflection, both),
    }


def by_category(first, second, both):
    return {
        level: {
            name: both(value, second[level][name])
            for name, value in first[level].items()
            if name in second[level]
        }
        for level in ("category", "subcategory")
    }


def accuracy_table(samples):
    """A model's entry in robustness_extrainfo.json, for one prompt: means, not rounded."""
    mean = lambda some: sum(s.score or 0 for s in some) / len(some) if some else 0
    table = {}
    for kind in ("Reasoning", "Perception"):
        chosen = [s for s in samples if s.question_type == kind]
        places = [dict.fromkeys(s.place[level] for s in chosen) for level in (0, 1)]
        category, subcategory = (
            {place: mean([s for s in chosen if s.place[level] == place]) for place in places[level]}
            for level in (0, 1)
        )
        table[kind] = {"category": category, "subcategory": subcategory, "overall": mean(chosen)}
    return table


def robustness_table(cot, dir, lacking):
    """Stability, efficacy and their mean. cot and dir are two means, not paired; a category that the prompt
    dir alone has is ignored, one that it lacks is put into `lacking` (it crashes the official script)."""
    table = {}
    for name, kind in (("stability", "Perception"), ("efficacy", "Reasoning")):
        table[name] = {"overall": cot[kind]["overall"] - dir[kind]["overall"]}
        for level in ("category", "subcategory"):
            mine, theirs = cot[kind][level], dir[kind][level]
            table[name][level] = {place: mine[place] - theirs[place] for place in mine if place in theirs}
            lacking += [f"{kind} {place}" for place in mine if place not in theirs]
    stability, efficacy = table["stability"], table["efficacy"]
    table["robustness"] = {"overall": (efficacy["overall"] + stability["overall"]) / 2}
    for level in ("category", "subcategory"):
        pairs = {place: (efficacy[level].get(place), value) for place, value in stability[level].items()}
        table["robustness"][level] = {p: (e + s) / 2 for p, (e, s) in pairs.items() if e is not None}
    return table


def tables(samples, errors, notes):
    """read_cache's -> {path below --out: the official file's object}."""
    files, entries = {}, {}
    for metric in METRICS:
        if metric in samples:
            entries[metric] = {
                model: DUMMY if found is None else metric_table(metric, list(found.values()))
                for model, found in samples[metric].items()
            }
            files[f"{metric}/{metric}_results.json"] = entries[metric]
    for metric, models in errors.items():
        name = "robustness" if metric == "judge" else metric
        listed = {m: [{"file": f, "error": e} for f, e in of.items()] for m, of in models.items() if of}
        files |= {f"{name}/{name}_errors.json": listed} if listed else {}
    if "precision" in entries and "recall" in entries:
        whole = {
            m: p for m, p in entries["precision"].items() if m in entries["recall"] and p["type_metrics"]
        }
        notes += [
            ("no quality: no recall, or no precision file that reads", m)
            for m in entries["precision"]
            if m not in whole
        ]
        made = {model: quality_table(p, entries["recall"][model]) for model, p in whole.items()}
        files["quality/quality_results.json"] = made
    if "relevance_rate" in entries:
        reflections = entries.get("reflection_quality", {})
        notes += [
            ("no reflections judged: they count as 1", m)
            for m in entries["relevance_rate"]
            if m not in reflections
        ]
        files["efficiency/efficiency_results.json"] = {
            model: efficiency_table(table, reflections.get(model, DUMMY))
            for model, table in entries["relevance_rate"].items()
        }
    if "judge" in samples:
        accuracies, made = {}, {}
        for folder, found in samples["judge"].items():
            model, _, prompt = folder.rpartition("_")
            if found and prompt in ("cot", "dir"):
                accuracies.setdefault(model, {})[prompt] = accuracy_table(list(found.values()))
            else:
                notes.append(("no verdict that reads, or a name without _cot or _dir", f"judge/{folder}"))
        for model, of in accuracies.items():
            lacking = []
            if len(of) == 2:
                made[model] = robustness_table(of["cot"], of["dir"], lacking)
                notes += [("not in dir, so no difference", f"{model}: {place}") for place in lacking]
            else:
                notes.append(("no robustness: judged with one prompt alone", f"{model}: {', '.join(of)}"))
        files |= {"robustness/robustness.json": made, "robustness/robustness_extrainfo.json": accuracies}
    return files


# ---- all together --------------------------------------------------------------------------------


def coverage_of(samples, errors, questions):
    """{metric: {model: {valid, files, questions}}}: replies with a score, files, questions that there are."""
    found = {}
    for metric, models in errors.items():
        kinds = ("Reasoning", "Perception") if metric == "judge" else ("Reasoning",)
        asked = sum(row.get("question_type") in kinds for row in questions.values())
        found[metric] = {}
        for model, failed in models.items():
            scored = samples[metric][model].values()
            valid, files = sum(s.score is not None for s in scored), len(scored) + len(failed)
            found[metric][model] = {"valid": valid, "files": files, "questions": asked}
    return found


def score(cache, questions, notes, *, fixed=False):
    """A cache, {index: row} -> ({path: object} of all files that `score` writes, {metric: {model: zeros that
    --fixed counted}})."""
    samples, errors = read_cache(cache, questions, notes)
    coverage, zeros = coverage_of(samples, errors, questions), {}
    per_sample = {
        f"{metric}/{model}/{name}": sample.added
        for metric, models in samples.items()
        for model, found in models.items()
        for name, sample in (found or {}).items()
        if sample.added
    }
    before = files = tables(samples, errors, notes)
    if fixed:
        samples, zeros = fill(samples, errors, questions)
        files = tables(samples, errors, [])
    return files | {"per_sample.json": per_sample, "coverage.json": coverage}, before, zeros


def headline(files):
    """tables -> {model: {column: fraction or None}}, the paper's table."""
    models = dict.fromkeys(model for file, _, _ in COLUMNS.values() for model in files.get(file, {}))
    value = lambda model, file, part, name: files.get(file, {}).get(model, {}).get(part, {}).get(name)
    return {model: {name: value(model, *where) for name, where in COLUMNS.items()} for model in models}
