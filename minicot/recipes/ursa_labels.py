"""Step labels of the recipe ursa: by rollouts (BEL), by a teacher's misreading (MIE); and how right they and
a reward model's step scores are, by the toy world's step oracle."""

import random
from dataclasses import replace

import torch

from minicot.answers import split_steps
from minicot.chat import describe_failures
from minicot.data import image_reader
from minicot.metrics import auroc
from minicot.records import Response, Samples, read_samples, samples_to_row
from minicot.runs import write_json, write_jsonl
from minicot.synthesis import Rates, exhaustive_search, locate_errors, model_rollouts, synthesise
from minicot.tokenizer import Tokenizer
from minicot.toy import pictures, teacher
from minicot.training import pick_device
from minicot.weights import load_model

ROLLOUTS, TOKENS = 8, 144  # continuations of a prefix; longest response


# ---- labels --------------------------------------------------------------------------------------


def roll_outs(folder, seed):
    """Rates of rollouts of the model in this folder."""
    model, tokenizer = load_model(folder, dtype=torch.float32, device=pick_device("auto")), Tokenizer(folder)
    options = dict(
        n=ROLLOUTS, max_new_tokens=TOKENS, seed=seed, reader=image_reader(model, tokenizer, folder)
    )
    return Rates(model_rollouts(model.eval(), tokenizer, **options))


def label_by_rollouts(out, samples, model, *, seed):
    """BEL: the samples with step_labels."""
    labelled, report = locate_errors(read_samples(samples), roll_outs(model, seed))
    print(f"{out}: {report}")
    write_jsonl(out, map(samples_to_row, labelled))


def misread(out, samples, *, seed):
    """MIE: of each problem's first right response the teacher's misreading, as Samples of it alone."""
    right = [(one, next((r for r in one.responses if r.correct), None)) for one in read_samples(samples)]
    problems = [replace(one.problem, solution=response.text) for one, response in right if response]
    chat = teacher.chat("misinterpret", [vars(problem) for problem in problems], seed=seed)
    made = list(synthesise(problems, "misinterpret", chat))
    print(f"{out}: {describe_failures(made)}")
    kept = [Samples(p, [wrong]) for p, wrong in zip(problems, made) if isinstance(wrong, Response)]
    write_jsonl(out, map(samples_to_row, kept))


def training_set(out, bel, mie, source, *, seed):
    """The responses that a reward model learns from, each as Samples of its own: the wrong ones of "bel", of
    "mie" or of "both", and always the same right ones, one for three wrong ones of both."""
    parts = [
        [(one, r) for one in read_samples(file) for r in one.responses if r.step_labels]
        for file in (bel, mie)
    ]
    wrong = [[pair for pair in part if not pair[1].correct] for part in parts]
    right = [pair for pair in parts[0] if pair[1].correct]
    kept = random.Random(f"right {seed}").sample(right, min(len(right), sum(map(len, wrong)) // 3))
    chosen = kept + {"both": wrong[0] + wrong[1], "bel": wrong[0], "mie": wrong[1]}[source]
    own_id = lambda one, i: replace(one.problem, id=f"{one.problem.id}/{i}")
    rows = (Samples(own_id(one, i), [response]) for i, (one, response) in enumerate(chosen))
    write_jsonl(out, map(samples_to_row, rows))


# ---- readings ------------------------------------------------------------------------------------


def so_far(labels):
    """Labels of steps -> whether all is right up to each."""
    return [all(labels[: j + 1]) for j in range(len(labels))]


def against_oracle(samples, labels_of):
    """One problem's Samples -> ([steps labelled as the oracle does, steps], [wrong chains whose first error
    is found, wrong chains], [(score, right) of each step]). labels_of: Response -> a number or label a
    step."""
    steps, first, told = [0, 0], [0, 0], []
    for one in samples.responses:
        scores = labels_of(one)
        truth = so_far(pictures.label_steps(samples.problem.id.partition("/")[0], split_steps(one.text)))
        said = [score >= 0.5 for score in scores]
        steps = [steps[0] + sum(a == b for a, b in zip(said, truth)), steps[1] + len(truth)]
        if False in truth:
            found = so_far(said).count(True) == truth.count(True)
            first = [first[0] + found, first[1] + 1]
        told += zip(scores, truth)
    return steps, first, told


def step_quality(out, scored, *, seed):
    """{"steps", "first_error": counts of each problem, "auroc"} of a PRM's step scores."""
    judged = [against_oracle(one, lambda r: r.step_scores["prm"]) for one in read_samples(scored)]
    steps, first, told = zip(*judged)
    write_json(out, {"steps": steps, "first_error": first, "auroc": auroc(*zip(*sum(told, [])))})


def two_chains(out, scored, *, seed):
    """Of the first question of which a chain goes wrong behind its first step and another ends right, these
    two: {title: {"steps", "scores", "wrong": its first wrong step, None in the right one}}."""
    for samples in read_samples(scored):
        told = [(split_steps(r.text), r.step_scores["prm"], r.correct) for r in samples.responses]
        first = [so_far(pictures.label_steps(samples.problem.id, steps)).count(True) for steps, *_ in told]
        right = [one for one, n in zip(told, first) if one[2] and n == len(one[0]) > 1]
        wrong = [(*one, n) for one, n in zip(told, first) if not one[2] and 0 < n < len(one[0])]
        if right and wrong:
            (steps, scores, _), (others, theirs, _, n) = right[0], wrong[0]
            found = {"a right chain": {"steps": steps, "scores": scores, "wrong": None}}
            found["a wrong one"] = {"steps": others, "scores": theirs, "wrong": n}
            return write_json(out, found)
    write_json(out, {})


def bel_quality(out, bel, model, samples, *, seed):
    """{"bel_steps", "bel_first": BEL's labels against the oracle, counts of each problem; "as_exhaustive":
    how often both searches find the same step, of 50 problems}."""
    labelled = [
        one for one in read_samples(bel) if one.responses and all(r.step_labels for r in one.responses)
    ]
    steps, first, _ = zip(*(against_oracle(one, lambda r: r.step_labels) for one in labelled))
    few, rates = read_samples(samples)[:50], roll_outs(model, seed)
    [binary, _], [whole, _] = locate_errors(few, rates), locate_errors(few, rates, search=exhaustive_search)
    same = [
        [
            sum(a.step_labels == b.step_labels for a, b in zip(*two) if not a.correct),
            sum(not a.correct for a in two[0]),
        ]
        for two in ((one.responses, other.responses) for one, other in zip(binary, whole))
    ]
    write_json(out, {"bel_steps": steps, "bel_first": first, "as_exhaustive": same})
