"""A page to read chains in: what a model thought, where it went wrong and what the scores saw.

One self-contained HTML file of Samples, of one model or of several side by side. view.html, beside this file,
is the template: jinja2 writes the summary into it, its script draws the rest from a block of JSON. Texts are
whatever a model wrote, so they are never HTML here: `<`, `>` and `&` of the block are escaped, the script
builds the page by textContent, and the page's Content-Security-Policy allows its own script and style, by
their hashes, and data: pictures, nothing else. Equal samples make an equal page.

A `piece` of a response is one of its steps (answers.split_steps) or what stands between two of them, such as
the line of the answer. `name`s are those of files and, in `scores`, `token_scores`, `step_scores`, of scores.
"""

import base64
import hashlib
import io
import json
import math
import re
from bisect import bisect_right
from collections import Counter
from functools import partial
from pathlib import Path

import jinja2
import numpy as np

from minicot.answers import is_correct, majority_vote, normalize, step_spans
from minicot.data import open_pictures
from minicot.errors import InputError
from minicot.metrics import auroc, majority_accuracy, mean_interval, pass_at_k
from minicot.toy import pictures, problems
from minicot.verifier import best_of_n

TEMPLATE = Path(__file__).with_name("view.html")
ESCAPED = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}
SIDE = 512  # pixels of a picture's longer side, at most
BLANKS = 8  # how many of them before a token its decoder may drop


def page(files):
    """{name: list of Samples} -> the page as text. Problems of several files meet by id and question."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script, style = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in re.search("<style>(.*?)</style>.*<script>(.*?)</script>", template, re.S).groups()[::-1]
    )
    merged, notes = merge(files)
    shown = [problem_of(key, groups) for key, groups in merged.items()]
    facts = {name: summary(sampled) for name, sampled in files.items()}
    responses = [r for problem in shown for group in problem["groups"] if group for r in group["responses"]]
    sizes = {}
    for name, row in (item for one in responses for piece in one["pieces"] for item in piece[4].items()):
        sizes.setdefault(name, []).extend(abs(value) for value in row if is_number(value))
    data = {
        "files": list(files),
        "scores": sorted({name for one in responses for name in one["scores"]}),
        "tints": {
            name: round(max(0.1, float(np.quantile(row or [1], 0.95))), 3) for name, row in sizes.items()
        },
        "problems": shown,
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        policy="default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"script-src 'sha256-{script}'; style-src 'sha256-{style}'",
        facts=facts,
        heads=dict.fromkeys(head for one in facts.values() for head in one),
        notes=notes,
        data=json.dumps(data, ensure_ascii=False, allow_nan=False).translate(ESCAPED),
    )


def merge(files):
    """{name: list of Samples} -> ({key: the problem's Samples in each file, or None}, what is to be said of
    them). A key is the id; a later question under the same id gets another."""
    found, keyed, notes = {}, {}, []
    for i, sampled in enumerate(files.values()):
        for samples in sampled:
            question = samples.problem.id, samples.problem.question
            found.setdefault(question, [None] * len(files))[i] = samples
    for (key, _), groups in found.items():
        while not key or key in keyed:
            key += "~"
        keyed[key] = groups
    if len(files) > 1:
        common = sum(None not in groups for groups in found.values())
        notes.append(f"{common:,} of {len(found):,} problems are in each of the {len(files)} files.")
    if len({key for key, _ in found}) < len(found):
        notes.append("One id stands for different questions: these are listed apart, not compared.")
    return keyed, notes


# ---- the summary ---------------------------------------------------------------------------------


def summary(sampled):
    """A file's Samples -> {head: text}; a head is left out where there is nothing to tell. A problem with an
    answer and without a response counts as wrong, as in sample.py."""
    responses = [one for samples in sampled for one in samples.responses]
    answered = [samples for samples in sampled if samples.problem.answer is not None]
    marks = [marks_of(samples) or [False] * (not samples.responses) for samples in answered]
    judged, n = [row for row in marks if row], min((len(row) for row in marks if row[1:]), default=0)
    facts = {"problems": f"{len(sampled):,}", "responses": f"{len(responses):,}"}
    if judged:
        shares = [[sum(row) / len(row) for row in judged]]
        facts["accuracy [95 %]"] = "{:.1%} [{:.1%}, {:.1%}]".format(*mean_interval(shares, resamples=2000))
    if answered and (missing := [one.answer is None for one in responses]) and not all(missing):
        answers = [[one.answer for one in samples.responses] or [None] for samples in answered]
        voted = majority_accuracy(answers, [samples.problem.answer for samples in answered])
        facts |= {"majority": f"{voted:.1%}", "no answer": f"{sum(missing) / len(missing):.1%}"}
    if ks := [2**i for i in range(1, 14) if 2**i <= n]:
        passed = (sum(pass_at_k(len(row), sum(row), k) for row in judged if len(row) >= k) for k in ks)
        facts[f"pass@{', '.join(map(str, ks))}"] = ", ".join(f"{one / len(judged):.1%}" for one in passed)
    for name in dict.fromkeys(name for one in responses for name in one.scores or {}):
        facts |= what_it_saw(name, answered)
    if responses:
        unit = "tokens" if all(one.ids for one in responses) else "words"
        lengths = [len(one.ids if unit == "tokens" else one.text.split()) for one in responses]
        cut = sum(one.finish == "length" for one in responses)
        facts[f"mean length ({unit}), cut off"] = (
            f"{sum(lengths) / len(lengths):.1f}, {cut / len(lengths):.1%}"
        )
    failed = sum(not samples.responses for samples in sampled)
    return facts | ({"without response": f"{failed:,}"} if failed else {})


def marks_of(samples):
    """Right or not, of each graded response."""
    return [one.correct for one in samples.responses if one.correct is not None]


def what_it_saw(name, sampled):
    """How well the response of the highest score answers, and the chance that a right response has a higher
    score than a wrong one: of the problems all of whose responses are graded and scored."""
    rows = [(s, [(r.scores or {}).get(name) for r in s.responses]) for s in sampled if s.responses]
    rows = [(s, x) for s, x in rows if all(map(is_number, x)) and len(marks_of(s)) == len(x)]
    if not rows:
        return {}
    best = [is_correct(best_of_n([r.answer for r in s.responses], x), s.problem.answer) for s, x in rows]
    area = auroc([one for _, x in rows for one in x], [mark for s, _ in rows for mark in marks_of(s)])
    return {f"best by {name}, AUROC": f"{sum(best) / len(best):.1%}, {area and f'{area:.3f}'}"}


# ---- problems, responses, steps, tokens ----------------------------------------------------------


def problem_of(key, groups):
    """A problem and its Samples of each file, None where it is not in it -> what the page's script draws:
    `kind` says whether its graded responses are right, `apart` how far the files' shares of right ones lie
    apart (of one file: the share of responses that its majority outvotes), `disagree` whether the files'
    majorities differ."""
    [problem, *_] = [samples.problem for samples in groups if samples]
    there, label = [samples for samples in groups if samples], oracle(problem)
    shown = [samples and group_of(samples, label) for samples in groups]
    marks = [mark for samples in there for mark in marks_of(samples)]
    shares = [group["share"] for group in shown if group and group["share"] is not None]
    votes = {group["vote"] and normalize(group["vote"]) for group in shown if group and group["responses"]}
    return {
        "id": key,
        "question": problem.question,
        "history": [[turn["role"], turn["content"]] for turn in problem.history or []],
        "choices": problem.choices or [],
        "answer": problem.answer,
        "solution": problem.solution,
        "pictures": [picture_of(picture) for picture in problem.images],
        "kind": "none" if not marks else "right" if all(marks) else "mixed" if any(marks) else "wrong",
        "share": sum(marks) / len(marks) if marks else None,
        "apart": max(shares, default=0) - min(shares, default=0) if shown[1:] else shown[0]["outvoted"],
        "disagree": len(votes) > 1,
        "groups": shown,
    }


def group_of(samples, label):
    """A problem's responses of one file; `vote` is the answer of their majority, `share` that of right ones
    among the graded."""
    responses, marks = samples.responses, marks_of(samples)
    vote = majority_vote([one.answer for one in responses])
    votes = Counter(normalize(one.answer) for one in responses if one.answer is not None)
    return {
        "error": samples.error,
        "share": sum(marks) / len(marks) if marks else None,
        "vote": vote,
        "voted": None if None in (vote, samples.problem.answer) else is_correct(vote, samples.problem.answer),
        "outvoted": 1 - max(votes.values()) / len(responses) if votes else 0,
        "responses": [response_of(one, label, votes) for one in responses],
    }


def response_of(response, label, votes):
    """A response, its steps judged by the first there is of its own step_labels, the toy world's oracle, and
    a score that says of each step how probably it is right (below 1/2: wrong)."""
    text, spans = response.text, step_spans(response.text)
    rows = {name: row for name, row in (response.step_scores or {}).items() if len(row) == len(spans)}
    notes = [
        f"{name}: {len(row)} numbers for {len(spans)} steps, {', '.join(str(number(x)) for x in row[:20])}"
        for name, row in (response.step_scores or {}).items()
        if name not in rows and row != [(response.scores or {}).get(name)]  # but for an ORM's one
    ]
    judges = {"step_labels": response.step_labels, "oracle": label([text[a:b] for a, b in spans])}
    judges |= {f"{name} below 1/2": [is_number(x) and x >= 0.5 for x in row] for name, row in rows.items()}
    if len(response.step_labels or spans) != len(spans):
        notes.append(f"{len(judges.pop('step_labels'))} step_labels for {len(spans)} steps: not shown")
    judge, labels = next(((name, row) for name, row in judges.items() if row), (None, []))
    labels, graded = list(map(bool, labels)), {} if response.reward is None else {"reward": response.reward}
    return {
        "correct": response.correct,
        "answer": response.answer,
        "votes": 0 if response.answer is None else votes[normalize(response.answer)],
        "cut": response.finish == "length",
        "length": f"{len(response.ids)} tokens" if response.ids else f"{len(text.split())} words",
        "scores": {name: number(x) for name, x in {**(response.scores or {}), **graded}.items()},
        "judge": judge,
        "wrong": labels.index(False) if False in labels else None,
        "pieces": pieces_of(response, spans, labels, rows, notes),
        "notes": notes,
    }


def pieces_of(response, spans, labels, rows, notes):
    """[text, its place among the steps or None, label, {name: score of the step}, {name: score of each of its
    tokens}, its tokens] of each piece."""
    text, cuts, at, tokens = response.text, [], 0, response.tokens or []
    for k, (start, end) in enumerate([*spans, (len(text), None)]):
        cuts += [(start - rest, None)] if (rest := len(text[at:start].lstrip())) else []
        cuts, at = cuts + [(start, k)] * (k < len(spans)), end
    starts, token_scores = [start for start, _ in cuts], response.token_scores or {}
    of_tokens = {name: row for name, row in token_scores.items() if len(row) == len(tokens) > 0}
    if of_tokens.keys() != token_scores.keys():
        notes.append(f"token_scores that are not one for each of {len(tokens)} tokens: not shown")
    held = [[] for _ in cuts]
    for i, (start, written) in enumerate(placed(tokens, text) if of_tokens and cuts else ()):
        held[max(0, bisect_right(starts, start) - 1)].append((i, written))
    return [
        [
            text[start:end].strip(),
            k,
            labels[k] if k is not None and labels else None,
            {name: number(row[k]) for name, row in rows.items() if k is not None},
            {name: [number(row[i]) for i, _ in own] for name, row in of_tokens.items()},
            [written for _, written in own],
        ]
        for (start, k), end, own in zip(cuts, [*starts[1:], len(text)], held)
    ]


def placed(tokens, text):
    """Tokens -> [(where in the text each has its first letter, what it holds of the text)]. A decoder may
    drop blanks of a single token, or break a letter that two of them share: such a token keeps its own text.
    A line break alone counts to the line that it ends."""
    at, found = 0, []
    for token in tokens:
        start = text.find(token, at, at + len(token) + BLANKS) if token else -1
        written = token if start < 0 else text[at : start + len(token)]
        found.append((at + len(written) - len(written.lstrip() or written), written))
        at += 0 if start < 0 else len(written)
    return found


def oracle(problem):
    """The toy world's step oracle for a problem: a list of steps -> labels; None for all problems that are
    not, word by word, of that world."""
    try:
        scene = pictures.scene_of(problem.id)
    except ValueError:  # no id of a scene, or of one that there is not
        return lambda steps: None
    row = (pictures if pictures.is_picture(scene) else problems).row_of(scene)
    return partial(pictures.label_steps, scene) if row["question"] == problem.question else lambda steps: None


def picture_of(picture):
    """(file, its root) -> its name and a data: URI, or why there is none."""
    try:
        [image] = open_pictures([picture])
    except (InputError, OSError) as error:
        return {"name": picture[0], "error": str(error)}
    file, small = io.BytesIO(), max(image.size) <= 128
    image.thumbnail((SIDE, SIDE))
    image.save(file, "WEBP", quality=80, lossless=small)
    uri = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return {"name": picture[0], "uri": uri, "small": small}


# ---- numbers -------------------------------------------------------------------------------------


def is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value):
    """A number of three digits behind the point; what is none, such as NaN, as text."""
    return round(value, 3) if is_number(value) else str(value)[:40]
