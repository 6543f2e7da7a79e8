"""Data engines of URSA (arXiv 2501.04686): worked solutions by a teacher, step labels by rollouts.

    expand, rewrite, unify   a teacher writes `Step 1: ...`, `Step 2: ...`, `†Answer: ...`; a filter reads it
    BEL                      binary error localisation: rollouts find a wrong solution's first step from which
                             the right answer is out of reach (Algorithm 1)
    MIE                      misinterpretation insertion: a teacher misreads one fact of a right solution and
                             carries it on

The teacher is a chat (chat.py): an Endpoint, sampling.model_chat, or toy/teacher.chat, which needs no
network. Labels of written samples, by a model that `load_model` and `Tokenizer` have read:

    rates = Rates(model_rollouts(model, tokenizer, max_new_tokens=96), style="hash")
    labelled, report = locate_errors(read_samples("runs/samples.jsonl"), rates)
    write_jsonl("runs/labelled.jsonl", map(samples_to_row, labelled))

Step labels are 0-based, one for each of split_steps(text): label j is True iff step j stands before the first
step that cannot be rescued. So all labels behind the first False are False.
"""

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from minicot.answers import extract_answer, normalize, number_steps, split_steps, step_spans
from minicot.chat import ChatError, many, picture
from minicot.data import IMAGE, grade, open_pictures, render, seed_of
from minicot.errors import InputError
from minicot.records import Problem, Response
from minicot.sampling import encode_prompts, generate

FORM = (
    "Write every step on a line of its own, `Step 1: ...`, `Step 2: ...` and so on, then a last line "
    "`†Answer: ...` with the bare answer (the letter, where there are options), and nothing else."
)
# task -> (what the teacher is told, the field of the problem that it is shown). The wording is ours.
TASKS = {
    "expand": (
        "Solve the problem step by step. The right answer is there for you to check yourself: derive it from "
        "the question, and write as if you had not been told it.",
        "answer",
    ),
    "rewrite": (
        "Rewrite the solution as clear steps in words of your own. Leave out nothing of the reasoning, and "
        "keep the answer.",
        "solution",
    ),
    "unify": (
        "The solution is written in symbols or as a program. Say the same in plain sentences, step by step, "
        "and keep the answer. Do not mend it.",
        "solution",
    ),
    "misinterpret": (
        "The solution is right. List for yourself the facts that it takes from the picture or the question, "
        "and choose one that is easily taken for another. Write the solution of somebody who got this one "
        "fact wrong and did all else consistently, so that the answer is wrong. Never mention the change. "
        "End each step with <pos> if it is right and with <neg> from the changed fact on; tag no answer.",
        "solution",
    ),
}
JUDGE = (
    "Does the solution derive its answer from the question, without taking the answer for granted, doubting "
    "it or going in circles? Reply with one word, yes or no."
)
HEAD = re.compile(r"(?:\*\*)?step (\d{1,4})\s*(?::|\.(?!\d))(?:\*\*)?\s*(.*)", re.IGNORECASE | re.DOTALL)
ANSWER_LINE = re.compile(r"[>#*_\s-]*†\s*answer\**\s*:", re.IGNORECASE)
TAG = re.compile(r"\s*<(pos|neg)>$")
# A step that leans on the answer it was told, or doubts it; a step that gives the misreading away.
ASSUMES = re.compile(
    r"\b(?:assum|suppos|trust|accept|believ)\w*\b[^.\n]{0,60}\banswer\b|\bI (?:still )?doubt\b|"
    r"\b(?:know|known|told|since|because|as) (?:that )?the answer (?:is|was|equals)\b|"
    r"\banswer (?:that )?(?:is |was )?(?:given|provided|known|supplied)\b|"
    r"\b(?:given|provided|stated|known|expected|reference) answer\b|"
    r"\b(?:reference|gold|official) (?:answer|solution)\b|"
    r"\banswer key\b|\b(?:match|fit|reach)\w* the answer\b|"
    r"\banswer\b[^.\n]{0,40}\b(?:wrong|incorrect|mistaken|as (?:given|provided|stated))\b",
    re.IGNORECASE,
)
TELLS = re.compile(
    r"\b(?:alter(?:ed|ation)|misread\w*|misinterpret\w*|deliberate\w*|on purpose|mistake\w*|incorrect\w*|"
    r"wrong\w*|I(?:'ve| have)? (?:changed|swapped|replaced) the|instead of \d\S* I)\b",
    re.IGNORECASE,
)


# ---- a teacher's requests and replies ------------------------------------------------------------


def turn(problem, text):
    """A user turn about a problem: a text, or its parts with each picture in the place of its placeholder."""
    pieces = text.split(IMAGE)
    if len(pieces) - 1 != len(problem.images):
        found = f"{len(pieces) - 1} {IMAGE} in the text, {len(problem.images)} pictures"
        raise InputError(f"problem {problem.id!r}: {found}; allowed: one for each")
    try:
        pictures = [picture(one) for one in open_pictures(problem.images)]
    except OSError as error:
        raise InputError(str(error)) from None
    parts = [{"type": "text", "text": pieces[0].strip()}]
    for shown, piece in zip(pictures, pieces[1:]):
        parts += [shown, *([{"type": "text", "text": piece.strip()}] if piece.strip() else [])]
    return {"role": "user", "content": parts if pictures else text}


def request(problem, task):
    """The messages that ask for a task, one of TASKS. InputError: the problem lacks what the task shows."""
    if task not in TASKS:
        raise InputError(f"task is {task!r}; allowed: {', '.join(TASKS)}")
    told, shown = TASKS[task]
    for name in ("answer", shown):
        if getattr(problem, name) is None:
            raise InputError(f"problem {problem.id!r} has no {name}, which the task {task!r} needs")
    question = f"Question:\n{render(problem, 'plain')}"
    given = f"{shown.capitalize()}:\n{getattr(problem, shown)}"
    return [*(problem.history or []), turn(problem, f"{told} {FORM}\n\n{question}\n\n{given}")]


def parse(text):
    """A reply in FORM -> (steps without their heads, answer). A head or an answer counts at the start of its
    line alone; "by Step 2" in a sentence is no step. ChatError, by its reason, where the form is another:
    so fail HTML, refusals and replies that were cut."""
    matches = [HEAD.fullmatch(step) for step in split_steps(text)]
    lines = text.strip().splitlines()
    answers = [extract_answer(line, "dagger") for line in lines if ANSWER_LINE.match(line)]
    steps = [match[2].strip() for match in matches if match]
    if None in matches or not steps:
        reason = "words outside the steps" if None in matches else "no steps"
    elif [int(match[1]) for match in matches] != list(range(1, len(steps) + 1)):
        reason = "steps are not numbered 1, 2, 3, ..."
    elif not all(TAG.sub("", step) for step in steps):
        reason = "an empty step"
    elif len(answers) > 1:
        reason = "several answers"
    elif answers in ([], [None]) or not ANSWER_LINE.match(lines[-1]):
        reason = "no answer in the last line"
    elif loops(steps):
        reason = "it goes in circles"
    else:
        return steps, answers[0]
    raise ChatError(reason, repr(text[:80]))


def loops(steps):
    """Whether a step comes twice, or any twelve words in a row three times."""
    words = " ".join(steps).split()
    runs = Counter(tuple(words[i : i + 12]) for i in range(len(words) - 11))
    return len(set(steps)) < len(steps) or max(runs.values(), default=0) > 2


def teach(problem, task, teacher, judge=None):
    """One problem -> the same with a new `solution` in FORM and its `steps`. ChatError where the filter
    refuses the reply: its answer is not the problem's, it assumes or doubts the answer, or the judge (a chat)
    does not say yes. The paper asks an LLM about both; we decide equality of answers by rule."""
    steps, answer = parse(teacher(request(problem, task)))
    solution = number_steps(steps, answer)
    if not grade(problem, solution, mode="cot", style="dagger")[1]:
        raise ChatError("another answer", f"{answer!r:.40}, the problem's is {problem.answer!r:.40}")
    if said := ASSUMES.search("\n".join(steps)):
        raise ChatError("it leans on the answer", repr(said[0]))
    if judge is not None:
        asked = f"{JUDGE}\n\nQuestion:\n{render(problem, 'plain')}\n\nSolution:\n{solution}"
        verdict = judge([turn(problem, asked)]).strip()
        if not re.match(r"yes\b", verdict, re.IGNORECASE):
            raise ChatError("the judge does not say yes", repr(verdict[:80]))
    return replace(problem, solution=solution, steps=steps, meta=problem.meta | {"synthesis": task})


def misinterpret(problem, teacher):
    """One problem with a right solution (in FORM, as teach makes it) -> a wrong Response with `step_labels`
    (MIE). ChatError: tags are missing or turn back to <pos>, none is <neg>, the answer is still right or not
    of the kind of the problem's (number, choice, text), or the text gives the change away. InputError: the
    solution's answer is not the problem's."""
    asked = request(problem, "misinterpret")
    if not grade(problem, problem.solution, mode="cot", style="dagger")[1]:
        raise InputError(
            f"problem {problem.id!r}: its solution does not end in its answer, marked `†Answer:`"
        )
    tagged, answer = parse(teacher(asked))
    tags, steps = [TAG.search(step) for step in tagged], [TAG.sub("", step) for step in tagged]
    labels = [tag is not None and tag[1] == "pos" for tag in tags]
    text = number_steps(steps, answer)
    answer, correct = grade(problem, text, mode="cot", style="dagger")
    if None in tags or re.search("<(pos|neg)>", text):
        raise ChatError("tags are not one a step", repr(tagged[0][:80]))
    if labels != sorted(labels, reverse=True) or all(labels):
        raise ChatError("no <neg>" if all(labels) else "<pos> behind <neg>", str(labels))
    if correct:
        raise ChatError("the answer is still right", answer)
    if normalize(answer)[0] != normalize(problem.answer)[0]:
        raise ChatError(
            "an answer of another kind", f"{answer!r:.40}, the problem's is {problem.answer!r:.40}"
        )
    if said := TELLS.search("\n".join(steps)):
        raise ChatError("it gives the change away", repr(said[0]))
    return Response(text, False, answer=answer, step_labels=labels, meta={"synthesis": "misinterpret"})


def synthesise(problems, task, teacher, *, judge=None, limit=8):
    """Yield, in order, what each problem becomes: a Problem with a new solution (a Response for the task
    "misinterpret"), or the InputError that says why there is none; chat.describe_failures counts these by
    reason. At most `limit` requests are under way at a time."""
    if task == "misinterpret":
        return many(partial(misinterpret, teacher=teacher), problems, limit=limit)
    return many(partial(teach, task=task, teacher=teacher, judge=judge), problems, limit=limit)


# ---- binary error localisation -------------------------------------------------------------------


class Prefix(NamedTuple):
    """A problem and the beginning of a response to it."""

    problem: Problem
    text: str


def prefixes(problem, text):
    """The response's beginnings of 1, 2, ..., K steps, to the letter: each ends where the next step, or what
    follows the last one, begins."""
    spans = step_spans(text)
    starts = [start for start, _ in spans[1:]]
    end = spans[-1][1] if spans else 0
    ends = [*starts, len(text) - len(text[end:].lstrip())] if spans else []
    return [Prefix(problem, text[:cut]) for cut in ends]


def binary_search(lengths, rescued):
    """The first step that cannot be rescued (0-based) of many solutions at once, of lengths K: a list of
    0 .. K, where K says that all can be, or None (Algorithm 1).

    rescued([(i, n), ...]) -> for each whether solution i can be rescued after its first n steps; None: not
    known, and solution i is given up. Each round asks for one prefix of every solution that is still open: at
    most ceil(log2(K + 1)) in all. It assumes that what is lost stays lost."""
    low, high, unknown = [0] * len(lengths), list(lengths), set()
    while still := [i for i, (a, b) in enumerate(zip(low, high)) if a < b]:
        middle = [(low[i] + high[i]) // 2 for i in still]
        for i, mid, can in zip(still, middle, rescued([(i, mid + 1) for i, mid in zip(still, middle)])):
            if can is None:
                unknown.add(i)
                high[i] = low[i]
            elif can:
                low[i] = mid + 1
            else:
                high[i] = mid
    return [None if i in unknown else found for i, found in enumerate(low)]


def exhaustive_search(lengths, rescued):
    """The same from all K prefixes of each solution, without an assumption: binary_search's oracle."""
    asked = [(i, n) for i, K in enumerate(lengths) for n in range(1, K + 1)]
    can = dict(zip(asked, rescued(asked)))
    rows = [[can[i, n] for n in range(1, K + 1)] for i, K in enumerate(lengths)]
    first_lost = lambda row: row.index(False) if False in row else len(row)
    return [None if None in row else first_lost(row) for row in rows]


class Rates:
    """mc of prefixes: the share of a prefix's rollouts that end in the problem's answer.

    roll_out(prefixes) -> for each the texts that go on from it, or the InputError that says why there are
    none, as chat.many does. A prefix is rolled out once, whoever asks for it again: `known` is the cache,
    `counts` say what was done. A rollout that does not end counts by the answer that it has come to, and as
    wrong where there is none."""

    def __init__(self, roll_out, *, style="dagger"):
        self.roll_out, self.style, self.known, self.counts = roll_out, style, {}, Counter()

    def __call__(self, asked):
        """Prefixes -> their rates, an InputError where there is none."""
        key = lambda prefix: (prefix.problem.id, prefix.text)
        new = list({key(one): one for one in asked if key(one) not in self.known}.values())
        rolled = self.roll_out(new) if new else []
        assert len(rolled) == len(new), f"{len(rolled)} lists of rollouts for {len(new)} prefixes"
        for one, texts in zip(new, rolled):
            self.known[key(one)] = texts if isinstance(texts, InputError) else self.share(one, texts)
        self.counts["prefixes"] += len(new)
        return [self.known[key(one)] for one in asked]

    def share(self, prefix, texts):
        """The share of a prefix's rollouts that are right."""
        if not texts:
            return InputError(f"problem {prefix.problem.id!r}: no rollout of a prefix came back")
        whole = [prefix.text + text for text in texts]
        marks = [grade(prefix.problem, text, mode="cot", style=self.style) for text in whole]
        self.counts["rollouts"] += len(marks)
        self.counts["without an answer"] += sum(answer is None for answer, _ in marks)
        return sum(correct for _, correct in marks) / len(marks)


def locate_errors(sampled, rates, *, search=binary_search, above=0.0):
    """A list of graded Samples -> (the same with step_labels, a report in a line). A right response's labels
    are all True; a wrong one's are True before the step that `search` finds, whose rates stand beside them as
    `step_rates` (None: not known).

    All problems are searched together. Without labels stay, and are counted: responses that are not graded or
    have no steps, and those of which a prefix could not be rolled out. Where every step can be rescued the
    answer alone is wrong, and all labels are True.

    A prefix can be rescued where its rate is `above` this; the paper's 0 says: by one rollout of n. So the
    first step of a problem that the model never solves is labelled False, and a rollout that is right by luck
    behind an error moves the labels. For n = 16, rates of 0.5 before and 0.05 behind an error, 2 to 12 steps,
    binary search finds 27 % of the errors above 0 (exhaustive search 43 %) and 91 % above 2 / 16
    (tests/test_synthesis.py)."""
    responses = {(i, j): r for i, one in enumerate(sampled) for j, r in enumerate(one.responses)}
    begun = {(i, j): prefixes(sampled[i].problem, r.text) for (i, j), r in responses.items()}
    graded = {(i, j): r.correct for (i, j), r in responses.items() if sampled[i].problem.answer is not None}
    wrong = [place for place in responses if graded.get(place) is False and begun[place]]

    def rescued(asked):
        known = rates([begun[wrong[i]][n - 1] for i, n in asked])
        return [None if isinstance(rate, InputError) else rate > above for rate in known]

    found = dict(zip(wrong, search([len(begun[place]) for place in wrong], rescued)))
    labelled, counts = [list(one.responses) for one in sampled], Counter()
    for (i, j), r in responses.items():
        K = len(begun[i, j])
        if graded.get((i, j)) is None or not K:
            counts["not graded" if K else "without steps"] += 1
        elif r.correct:
            counts["right"] += 1
            labelled[i][j] = replace(r, step_labels=[True] * K)
        elif found[i, j] is None:
            counts["not rolled out"] += 1
        else:
            counts["located" if found[i, j] < K else "wrong in the answer alone"] += 1
            labels = [k < found[i, j] for k in range(K)]
            known = [rates.known.get((one.problem.id, one.text)) for one in begun[i, j]]
            shown = [rate if isinstance(rate, float) else None for rate in known]
            labelled[i][j] = replace(r, step_labels=labels, meta=r.meta | {"step_rates": shown})
    report = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
    spent = ", ".join(
        f"{rates.counts[what]} {what}" for what in ("prefixes", "rollouts", "without an answer")
    )
    done = [replace(one, responses=new) for one, new in zip(sampled, labelled)]
    return done, f"{len(responses)} responses: {report or 'none'}; rolled out: {spent}"


def model_rollouts(
    model,
    tokenizer,
    *,
    max_new_tokens,
    n=16,
    temperature=0.3,
    top_p=0.95,
    mode="cot",
    seed=0,
    batch_size=64,
    reader=None,
):
    """A roll_out for Rates: n continuations of each prefix, which share its computation; the paper's n,
    temperature and top-p. About batch_size sequences run at once. A prefix's rollouts depend on the seed and
    itself alone. A prefix that leaves no room in the context, or whose picture cannot be read, gets the
    InputError that says so."""
    room = dict(mode=mode, max_new_tokens=max_new_tokens, reader=reader)
    options = dict(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, n=n)

    def roll_out(asked):
        rolled, prompts, images = [None] * len(asked), {}, {}
        for i, (problem, text) in enumerate(asked):
            try:
                prompts[i] = encode_prompts(model, tokenizer, [problem], begun=[text], **room)[0]
                images[i] = reader.pixels(problem.images) if reader else []
            except (InputError, OSError) as error:
                rolled[i] = InputError(str(error))
        order = sorted(images, key=lambda i: len(prompts[i]))  # like lengths are prefilled together
        window = 8 * max(1, batch_size // n)
        for start in tqdm(range(0, len(order), window), desc="rollouts", disable=None, leave=False):
            part = order[start : start + window]
            drawn = generate(
                model,
                [prompts[i] for i in part],
                stop_ids=tokenizer.stop_ids,
                seed=[seed_of(seed, asked[i].problem.id, asked[i].text) for i in part],
                images=[images[i] for i in part],
                max_rows=batch_size,
                **options,
            )
            for i, rows in zip(part, drawn):
                rolled[i] = [tokenizer.decode(ids) for ids in rows]
        return rolled

    return roll_out
