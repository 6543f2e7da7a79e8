"""Step labels of the recipe ursa: by rollouts (BEL), by a teacher's misreading (MIE); and how right they and
a reward model's step scores are, by the toy world's step oracle.

    python -m minicot.recipes.ursa_labels              # what the base of the reward models knows of lines
    python -m minicot.recipes.ursa_labels FILE ...     # what is wrong in the chains that a reward model chose
"""

import random
import sys
from collections import Counter
from dataclasses import replace

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from minicot.answers import split_steps
from minicot.chat import describe_failures
from minicot.data import collate, encode_labelled, image_reader
from minicot.metrics import auroc
from minicot.records import Response, Samples, read_samples, samples_to_row
from minicot.runs import write_json, write_jsonl
from minicot.scoring import hidden_plain
from minicot.synthesis import Rates, exhaustive_search, locate_errors, model_rollouts, synthesise
from minicot.tokenizer import Tokenizer
from minicot.toy import lines, pictures, teacher
from minicot.training import pick_device, resolve
from minicot.verifier import aggregate
from minicot.weights import load_model

ROLLOUTS, TOKENS = 8, 144  # continuations of a prefix; longest response
MISREAD = 2  # right responses to a problem that are misread


# ---- labels --------------------------------------------------------------------------------------


def roll_outs(folder, seed, *, style="dagger", tokens=TOKENS, rows=64, dtype=torch.float32):
    """Rates of rollouts of the model in this folder, of at most so many tokens, so many rows at once."""
    model, tokenizer = load_model(folder, dtype=dtype, device=pick_device("auto")), Tokenizer(folder)
    options = dict(n=ROLLOUTS, max_new_tokens=tokens, seed=seed, batch_size=rows)
    options["reader"] = image_reader(model, tokenizer, folder)
    return Rates(model_rollouts(model.eval(), tokenizer, **options), style=style)


def label_by_rollouts(out, samples, model, *, seed):
    """BEL: the samples with step_labels."""
    labelled, report = locate_errors(read_samples(samples), roll_outs(model, seed))
    print(f"{out}: {report}")
    write_jsonl(out, map(samples_to_row, labelled))


def misread(out, samples, *, seed):
    """MIE: the teacher's misreadings of each problem's first MISREAD distinct right responses."""
    problems = []
    for one in read_samples(samples):
        texts = dict.fromkeys(r.text for r in one.responses if r.correct)
        problems += [replace(one.problem, solution=text) for text in [*texts][:MISREAD]]
    chat = teacher.chat("misinterpret", [vars(problem) for problem in problems], seed=seed)
    made = list(synthesise(problems, "misinterpret", chat))
    print(f"{out}: {describe_failures(made)}")
    kept = {}
    for problem, wrong in zip(problems, made):
        if isinstance(wrong, Response):
            kept.setdefault(problem.id, Samples(problem, [])).responses.append(wrong)
    write_jsonl(out, map(samples_to_row, kept.values()))


def training_set(out, bel, mie, source, *, seed):
    """The responses that a reward model learns from, each as Samples of its own: the wrong ones of "bel", of
    "mie" or of "both", and a right one for two of these."""
    parts = [
        [(one, r) for one in read_samples(file) for r in one.responses if r.step_labels]
        for file in (bel, mie)
    ]
    bel_wrong, mie_wrong = ([pair for pair in part if not pair[1].correct] for part in parts)
    wrong = {"both": bel_wrong + mie_wrong, "bel": bel_wrong, "mie": mie_wrong}[source]
    right = [pair for pair in parts[0] if pair[1].correct]
    chosen = random.Random(f"right {seed}").sample(right, min(len(right), len(wrong) // 2)) + wrong
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


def length_matched(out, scored, *, seed):
    """{"matched": of each problem [pairs in which the right chain scores higher, pairs]}, of a right and a
    wrong chain of as many tokens."""
    found = []
    for one in read_samples(scored):
        [kind] = one.responses[0].scores
        pairs = [
            a.scores[kind] > b.scores[kind]
            for a in one.responses
            for b in one.responses
            if a.correct and not b.correct and len(a.ids) == len(b.ids)
        ]
        found.append([sum(pairs), len(pairs)])
    write_json(out, {"matched": found})


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
    """{"bel_steps", "bel_first": BEL's labels against the oracle, counts of each problem; of 50 problems
    "as_exhaustive": how often exhaustive search over other rollouts finds the same step, and "bel_cost":
    [prefixes that were rolled out, prefixes that this takes]}."""
    labelled = [
        replace(one, responses=[r for r in one.responses if r.step_labels]) for one in read_samples(bel)
    ]
    steps, first, _ = zip(*(against_oracle(one, lambda r: r.step_labels) for one in labelled))
    few, ours, others = read_samples(samples)[:50], roll_outs(model, seed), roll_outs(model, seed + 1)
    [binary, _], [whole, _] = locate_errors(few, ours), locate_errors(few, others, search=exhaustive_search)
    same = []
    for one, other in zip(binary, whole):
        both = [
            (a.step_labels, b.step_labels) for a, b in zip(one.responses, other.responses) if not a.correct
        ]
        both = [(a, b) for a, b in both if a and b]
        same.append([sum(a == b for a, b in both), len(both)])
    cost = [[ours.counts["prefixes"], others.counts["prefixes"]]]
    write_json(out, {"bel_steps": steps, "bel_first": first, "as_exhaustive": same, "bel_cost": cost})


@torch.no_grad()
def at_lines(folder, sampled):
    """What a base knows where a reward model's head is read, behind each line up to the first wrong one:
    (hidden states (M,E), labels (M,), whether each line computes (M,))."""
    model, tokenizer = load_model(folder, dtype=torch.float32, device="cpu").eval(), Tokenizer(folder)
    reader, found = image_reader(model, tokenizer, folder), []
    rows, _ = encode_labelled(tokenizer, sampled, mode="cot", kind="prm")
    for row, one in zip(rows, sampled):
        n = min(row.step_labels.count(True) + 1, len(row.step_labels))
        batch = collate([[row]], tokenizer.pad_id, reader)
        hidden = hidden_plain(model, batch)[0, batch.step_ends[0, :n]]
        computes = [" = " in step for step in split_steps(one.responses[0].text)[:n]]
        found.append((hidden, torch.tensor(row.step_labels[:n]), torch.tensor(computes)))
    return tuple(map(torch.cat, zip(*found)))


def probe(folder, taught, tested):
    """{what lines do: AUROC} of a linear probe of a base, a logistic regression on the first rows, on the
    second (minicot/toy/lines.py, `labelled`)."""
    (x, y, _), (hidden, labels, computes) = at_lines(folder, taught), at_lines(folder, tested)
    mean, std, head = x.mean(0), x.std(0), torch.zeros(x.shape[1] + 1, requires_grad=True)
    logits = lambda x: ((x - mean) / std) @ head[:-1] + head[-1]
    lbfgs = torch.optim.LBFGS([head], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        lbfgs.zero_grad()
        value = binary_cross_entropy_with_logits(logits(x), y.float()) + 1e-3 * head.square().sum()
        value.backward()
        return value

    lbfgs.step(loss)
    scores = logits(hidden).tolist()
    of = lambda kind: [(s, bool(label)) for s, label, c in zip(scores, labels, computes) if bool(c) == kind]
    return {name: auroc(*zip(*of(kind))) for name, kind in (("reads", False), ("computes", True))}


def wrong_choices(files):
    """Of the wrong chains of samples that a reward model has scored: (the first errors, by
    teacher.first_error, of those with the best mean score; of all; how many of the best have an answer that
    no other sample has)."""
    best, drawn, alone = Counter(), Counter(), 0
    for one in (one for file in files for one in read_samples(file) if one.responses):
        [kind] = one.responses[0].step_scores
        top = max(one.responses, key=lambda r: aggregate(r.step_scores[kind], "mean"))
        wrong = [r for r in one.responses if not r.correct]
        drawn.update(teacher.first_error(one.problem.id, r.text) for r in wrong)
        best.update(teacher.first_error(one.problem.id, r.text) for r in [top] if not r.correct)
        alone += not top.correct and [r.answer for r in wrong].count(top.answer) == 1
    return best, drawn, alone


def main():
    if files := sys.argv[1:]:
        best, drawn, alone = wrong_choices(files)
        for what, n in drawn.most_common():
            shares = f"{best[what] / best.total():.1%} of the wrong choices, {n / drawn.total():.1%}"
            print(f"{what}: {shares} of all wrong chains")
        print(f"{best.total()} wrong choices, {alone} of an answer given once; {drawn.total()} wrong chains")
        return
    how = lines.LABELLED["last"][1]
    drawn = [lines.labelled(scene, -1, **how) for scene in pictures.scenes("validation", 1200, 0, None)]
    for base in ("toy-judge", "toy-vision"):
        for does, value in probe(resolve(base), drawn[:600], drawn[600:]).items():
            print(f"{base}, a line that {does}: AUROC {value:.3f}")


if __name__ == "__main__":
    main()
