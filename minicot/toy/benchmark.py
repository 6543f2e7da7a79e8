"""MME-CoT on the built-in world: its questions in the official form, and a judge that knows the scenes.

`rows` makes DATASET.json of pictures; `judge` stands in for the GPT-4o of the paper (arXiv 2502.09621). It
answers the requests of minicot/mme_cot/judge.py in the official schemas, by rule: labels come from the step
oracle, so the same solution always gets the same judgment. `reflective` writes solutions that think again.
"""

import json
import re
from dataclasses import replace

from minicot.answers import is_correct, split_steps
from minicot.errors import InputError
from minicot.toy import pictures, problems
from minicot.toy.pictures import chain, in_picture, read_from, row_of, scene_of, write_step
from minicot.toy.teacher import final_answer
from minicot.toy.problems import FACTS, WORDINGS, operands

# What is asked about a kind of picture: a table is a document, bars are read by their height, things counted.
PLACES = {
    "table": ("OCR", "Doc"),
    "bars": ("Spatial-Temporal", "Spatial"),
    "rows": ("General Reasoning", "Details"),
}
LETTERS = "ABCDEFGHIJKL"
WAIT = "Wait, "
REFLECTS = re.compile(r"(?:wait|alternatively|hold on|let me (?:double-?)?check)\b[,.:]?\s*", re.IGNORECASE)
HEAD = re.compile(r"step \d+\s*[:.]\s*", re.IGNORECASE)


# ---- questions -----------------------------------------------------------------------------------


def rows(split, n_reasoning, n_perception, *, start=0):
    """Official rows, indices from 1: questions that compute, then questions that read one number, each about
    a picture of its own; `start` is the first picture's place in the split. The image is "toy:" and the id
    that pictures.draw takes. Free-form: no options."""
    made = [
        official_row(scene, "Reasoning", row_of(scene))
        for scene in pictures.scenes(split, n_reasoning, start, None)
    ]
    for asked in pictures.perception_rows(split, n_perception, start=start + n_reasoning):
        made.append(official_row(scene_of(asked["image"].removeprefix("toy:")), "Perception", asked))
    return [{"index": index, **row} for index, row in enumerate(made, 1)]


def official_row(scene, question_type, row):
    """A toy row with the columns of the official dataset. Key steps: the conclusions are what a solution
    computes, the captions what it reads; the reference caption tells all that the picture shows."""
    category, subcategory = PLACES[scene.id.split("-")[0]]
    keys, reference = None, []
    if question_type == "Reasoning":
        keys = {f"solution{i}": None for i in range(1, 5)}
        keys["solution1"] = {
            "logical_conclusion": [write_step(scene, q, "because") for q in scene.derivation],
            "image_caption": [write_step(scene, q, "because") for q in read_from(scene)],
        }
        reference = [f"Image 1: {row['caption']}"]
    return {
        "category": category,
        "subcategory": subcategory,
        "question_type": question_type,
        "question": row["question"],
        **dict.fromkeys(LETTERS),
        "answer": row["answer"],
        "meta_info": None,
        "key_annotation_steps": keys,
        "reference_caption": reference,
        "image": row["image"],
    }


def problem_of(row):
    """An official row as a problem for sample.py, whose samples mme_cot judges: the id is the index."""
    return {"id": str(row["index"])} | {name: row[name] for name in ("question", "answer", "image")}


def reflective(row, rng, *, slip=0.5):
    """The row of a picture with a solution that thinks again about one step: with probability `slip` it is
    wrong at first and then put right, else it is right and said again."""
    scene = scene_of(row)
    steps = [write_step(scene, q, "because") for q in chain(scene)]
    place = rng.randrange(len(steps))
    asked, again = chain(scene)[place], WAIT + steps[place]
    if rng.random() < slip:
        wrong = asked.value + rng.choice([change for change in (-2, -1, 1, 2) if asked.value + change > 0])
        numbers = operands(scene, asked) if FACTS[asked.kind][0] else ()
        steps[place] = write_step(scene, asked, "because", (*numbers, wrong))
    steps.insert(place + 1, again)
    return {**row, "steps": steps, "solution": "\n".join([*steps, f"#### {row['answer']}"])}


# ---- the judge -----------------------------------------------------------------------------------


def judge(step, rows):
    """The judge of a step ("precision", "recall", "relevance_rate", "reflection_quality", "extract", "judge")
    as a chat, messages -> text, about these rows. InputError: another step, an index that no row has."""
    if step not in REPLIES:
        raise InputError(f"step is {step!r}; allowed: {', '.join(REPLIES)}")
    of_index = {row["index"]: row for row in rows}

    def reply(messages):
        text = messages[-1]["content"]
        asked = json.loads(text[text.index("\n\n{") :])
        if asked["index"] not in of_index:
            raise InputError(
                f"the judge is asked about index {asked['index']!r}, none of its {len(rows)} rows"
            )
        row = of_index[asked["index"]]
        made = REPLIES[step](scene_of(row["image"].removeprefix("toy:")), asked)
        return made if isinstance(made, str) else json.dumps(made, indent=2)

    return reply


def plain(quantity):
    """Ana and Ben, Ben and Ana: one total."""
    return replace(quantity, of=tuple(sorted(quantity.of)))


def told(scene, solution):
    """A solution's steps, judged: [{text, kind (the official step_type), right, states (the quantities that
    it says first), repeats, reflects}]."""
    steps, seen, found = [HEAD.sub("", step) for step in split_steps(solution)], set(), []
    bare = [REFLECTS.sub("", step, count=1) if REFLECTS.match(step) else step for step in steps]
    shown = {write_step(scene, q, wording): plain(q) for q in in_picture(scene) for wording in WORDINGS}
    readers = "|".join(q.who for q in in_picture(scene))
    for place, (step, text) in enumerate(zip(steps, bare)):
        labels, derived = problems.derived_by(scene, bare[: place + 1])
        states = {plain(q) for q in derived} | ({shown[text]} if text in shown else set())
        computes = re.search(r"\d ?[-+x/*] ?\d", text)
        reads = not computes and re.match(rf"(?:{readers})\b", text)
        kind = "image description" if reads else "logical inference"
        found.append(
            {
                "text": step,
                "kind": kind if re.search(r"\d", text) else "background information",
                "right": labels[-1],
                "states": states - seen,
                "repeats": text in bare[:place] or (labels[-1] and states <= seen),
                "reflects": text != step,
            }
        )
        seen |= states
    return found


def needed(scene):
    return {plain(q) for q in chain(scene)}


def precision(scene, asked):
    found = []
    for step in told(scene, asked["solution"]):
        matches = step["repeats"] or step["states"] & needed(scene)
        mark = ("Match" if matches else "Reasonable") if step["right"] else "Wrong"
        mark = "N/A" if step["kind"] == "background information" else mark
        found.append({"step_type": step["kind"], "premise": "", "conclusion": step["text"], "judgment": mark})
    answer = final_answer(asked["solution"])
    if answer is not None:
        mark = "Match" if is_correct(answer, asked["answer"]) else "Wrong"
        last = {"premise": "", "conclusion": f"The answer is {answer}.", "judgment": mark}
        found.append({"step_type": "logical inference", **last})
    return found


def recall(scene, asked):
    said = set().union(*(step["states"] for step in told(scene, asked["solution"])))
    keys = {write_step(scene, q, "because"): plain(q) for q in chain(scene)}
    mark = lambda item: "Matched" if keys.get(item["content"]) in said else "Unmatched"
    return [{"step_index": item["step_index"], "judgment": mark(item)} for item in asked["gt_annotation"]]


def relevance_rate(scene, asked):
    found = []
    for step in told(scene, asked["solution"]):
        works = not step["repeats"] and (not step["states"] or step["states"] & needed(scene))
        marked = {"step_type": step["kind"], "conclusion": step["text"], "relevant": "Yes" if works else "No"}
        found.append(marked)
    return found


def reflection_quality(scene, asked):
    found = []
    for step in (step for step in told(scene, asked["solution"]) if step["reflects"]):
        error = "Repetition" if step["repeats"] else "N/A" if step["right"] else "Wrong Conclusion"
        error = "Incompleteness" if step["kind"] == "background information" else error
        mark = "Correct" if error == "N/A" else "Wrong"
        found.append({"conclusion": step["text"], "judgment": mark, "error_type": error})
    return found


def consistent(scene, asked):
    said = asked["extract_answer"]
    said = final_answer(said) or said
    return str(int(is_correct(said, asked["answer"])))


REPLIES = {
    "precision": precision,
    "recall": recall,
    "relevance_rate": relevance_rate,
    "reflection_quality": reflection_quality,
    "extract": lambda scene, asked: final_answer(asked["solution"]) or "Z",
    "judge": consistent,
}
