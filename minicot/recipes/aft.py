"""AFT, "Making Large Language Models Better Reasoners with Alignment" (arXiv 2309.02144): toy world or real
sets.

    python -m minicot.recipes.aft                    # toy world, some 160 models of two to four minutes
    python -m minicot.recipes.aft --fast             # a small part of the work, one seed
    python -m minicot.recipes.aft --data gsm8k:PATH --init SmolLM2 --device cuda --name aft_gsm8k \\
        --splits "train[:7000]" "train[7000:]" test --train-flags "--lr 2e-5 --batch-size 8 --epochs 3"

The path (paper, section 4): base -> VFT (fine-tuning on solutions) -> K samples a training question, graded
by their final answer -> one pass of alignment of the same VFT model over the same samples by each method:
plain, detached, boundary. 480 questions in three passes are too few for AFT to gain (results/aft_main.md).
The whole takes four hours or more on two cores; --only runs a part, as the two pages do.

Two judgements. At its own rate: a method gets a grid of learning rates at the first seed, and keeps the one
that answers most validation problems rightly. At one rate: the arms of a method share a rate that was written
down before the run ("@one-rate"), as the paper's arms do. The first asks which arm ends highest, the second
which is more robust: a method that may choose its rate retreats to where nothing breaks.

Ranking feedback (the paper's GSM8K-RANK) replaces right/wrong by the step oracle's grade of each chain, at
the one rate; built-in world only. "harder": test problems of five operations; training has two to four.

Differs from the paper: K = 4 samples of the one VFT model, one pass for its three; PRO's SFT term weighs 1,
as AFT's, in all arms (the paper's 0.05 (l - 1)^2, 3.2 at l = 9, is the row "pro-paper"); a toy world.
"""

import re
from dataclasses import replace

from minicot import plots
from minicot.metrics import mean_interval, paired_difference
from minicot.recipes.experiment import Experiment
from minicot.recipes.tables import INTERVAL, claims, numbers
from minicot.records import Response, read_samples, samples_to_row
from minicot.runs import write_jsonl
from minicot.sets import read_problems
from minicot.toy import problems

SIZES = {
    "seeds": 5,  # of VFT, RFT and AFT
    "few_seeds": 3,  # of the others
    "first_seed": 20,
    "problems": 6000,  # training questions that are sampled and aligned on
    "k": 4,  # responses a question
    "epochs": 1.0,
    "batch_size": 8,  # questions a step
    "validation": 600,  # problems that choose a setting
    "test": 2000,  # problems of the table
    "harder": 1000,  # problems of five operations
    "pool": 400,  # held-out questions of A-accuracy and of the reference NLL, after those of validation
    "lrs": (3e-5, 1e-4, 2e-4, 4e-4),  # of RFT and AFT
    "few_lrs": (3e-5, 1e-4, 2e-4),  # of RRHF and PRO
    "dpo_lrs": (1e-6, 1e-5, 3e-5, 1e-4),
    "one_rate": 2e-4,  # of all arms but DPO's
    "dpo_one_rate": 3e-5,
    "margin": 0.1,
    "other_margins": (0.03, 0.3),  # of boundary
    "other_ks": (2, 3),  # of boundary, at the first seed
}
FAST = dict(
    seeds=1, problems=120, validation=100, test=200, harder=100, pool=60, lrs=(1e-4,), few_lrs=(1e-4,),
    dpo_lrs=(1e-5,), other_margins=(), other_ks=(2,),
)  # fmt: skip
SLICE = dict(
    FAST, epochs=1.0, problems=16, k=4, batch_size=4, test=0, pool=64, lrs=(1e-5,), few_lrs=(1e-5,),
    one_rate=1e-5, dpo_one_rate=1e-5, other_ks=(),
)  # fmt: skip

CONSTRAINTS = ("none", "detached", "boundary")
METHODS = [("rft", "none"), *((m, c) for m in ("aft", "rrhf", "pro", "dpo") for c in CONSTRAINTS)]
FEW, RANKED = ("rrhf", "pro", "dpo"), ("aft", "rrhf", "pro")

# Written down before the run. The interval of a difference of 5 seeds x 2,000 problems is about 1.5 points to
# each side, of 3 x 2,000 about 2: smaller effects can not be seen.
CLAIMS = claims("""
a  |a_held  |vft               |                 |below 0.8|VFT misjudges: held-out A-accuracy < 80 %
b1 |accuracy|aft-detached      |vft              |up  |AFT detached beats VFT
b2*|accuracy|aft-boundary      |vft              |up  |AFT boundary beats VFT
b3 |accuracy|aft-detached      |rft              |level 0.01, vft|AFT detached is level with RFT, VFT is not
b4 |accuracy|aft-boundary      |rft              |level 0.01, vft|AFT boundary is level with RFT, VFT is not
b5 |a_held  |aft-detached      |vft              |up  |AFT detached raises held-out A-accuracy over VFT
b6 |a_held  |aft-boundary      |vft              |up  |AFT boundary raises held-out A-accuracy over VFT
b7 |a_held  |aft-boundary      |rft              |up  |... and over RFT
b8 |accuracy|aft-boundary      |aft-detached     |level 0.01, vft|boundary is level with detached, VFT is not
c1*|accuracy|aft-none          |vft              |down|AFT without a constraint falls below VFT
c2 |nll     |aft-none          |aft-boundary     |up  |... and its reference NLL rises over boundary's
c3 |accuracy|aft-detached      |aft-none         |up  |the detached constraint cures AFT
c4*|accuracy|aft-boundary      |aft-none         |up  |the boundary constraint cures AFT
c5 |accuracy|margin 0.03       |aft-none@one-rate|up  |... with a margin of 0.03 as well
c6 |accuracy|margin 0.3        |aft-none@one-rate|up  |... with a margin of 0.3 as well
d1 |accuracy|rrhf-detached     |rrhf-none        |up  |RRHF gains by the detached constraint
d2*|accuracy|rrhf-boundary     |rrhf-none        |up  |RRHF gains by the boundary constraint
d3 |accuracy|pro-detached      |pro-none         |up  |PRO gains by the detached constraint
d4 |accuracy|pro-boundary      |pro-none         |up  |PRO gains by the boundary constraint
d5 |accuracy|dpo-detached      |dpo-none         |up  |DPO gains by the detached constraint
d6 |accuracy|dpo-boundary      |dpo-none         |up  |DPO gains by the boundary constraint
e1 |accuracy|rank-rrhf-none    |vft              |down|ranked: RRHF falls below VFT
e2 |accuracy|rank-pro-none     |vft              |down|ranked: PRO falls below VFT
e3 |accuracy|rank-aft-detached |vft              |level 0.01, rank-aft-none|ranked: detached stays, none falls
e4*|accuracy|rank-aft-boundary |vft              |level 0.01, rank-aft-none|ranked: boundary stays, none falls
e5 |accuracy|rank-rrhf-boundary|rank-rrhf-none   |up  |ranked: RRHF gains by the boundary
e6 |accuracy|rank-pro-boundary |rank-pro-none    |up  |ranked: PRO gains by the boundary
e7 |accuracy|rank-aft-boundary |rank-aft-none    |up  |ranked: AFT gains by the boundary
f1 |harder  |aft-boundary      |vft              |up  |harder problems: AFT boundary beats VFT
f2 |harder  |aft-none          |vft              |down|harder problems: AFT without a constraint falls
""")
PAPER = {
    "vft": "36.48 (LLaMA-7B, GSM8K)",
    "aft-boundary": "40.43",
    "aft-detached": "about as boundary",
    "rft": "slightly under AFT",
    "rank-rrhf-none": "7.51 (its VFT: 20.82)",
    "rank-aft-boundary": "26.08",
}
COLUMNS = {
    "cell": {
        "accuracy": "{accuracy:.1%}",
        "over VFT [95 %]": ("accuracy", "vft"),
        "A-accuracy train / held-out (by length)": "{a_train:.1%} / {a_held:.1%} ({by_length:.1%})",
        "reference NLL": "{nll:.3f}",
        "no answer": "{missing_answers:.1%}",
        "repeated 4-grams": "{repeated_4grams:.1%}",
        "harder": "{harder:.1%}",
        "paper": PAPER,
    },
    "ablation": {
        "accuracy": "{accuracy:.1%}",
        "over VFT [95 %]": ("accuracy", "vft"),
        "A-accuracy held-out": "{a_held:.1%}",
    },
}
ASSESSED = {"a_held": "ordered_pairs", "nll": "reference_nlls", "by_length": "metrics.by_length"}
EVALUATED = {"accuracy": "correct"} | {
    name: f"metrics.{name}" for name in ("missing_answers", "repeated_4grams")
}


# ---- what is made of the samples -----------------------------------------------------------------


def without_grades(out, graded, *, seed):
    """Right/wrong feedback: the same responses, the oracle's grades left out."""
    samples = [
        replace(one, responses=[replace(response, reward=None) for response in one.responses])
        for one in read_samples(graded)
    ]
    write_jsonl(out, map(samples_to_row, samples))


def first_responses(out, samples, k, *, seed):
    """The first k responses to each question."""
    cut = [replace(one, responses=one.responses[:k]) for one in read_samples(samples)]
    write_jsonl(out, map(samples_to_row, cut))


def with_reference(out, samples, *, seed):
    """A question's samples and its written solution as a right response: a weak model answers few rightly."""
    solved = [
        replace(one, responses=[*one.responses, Response(one.problem.solution, correct=True)])
        for one in read_samples(samples)
    ]
    write_jsonl(out, map(samples_to_row, solved))


# ---- the experiment ------------------------------------------------------------------------------


def declare(E):
    s = E.size
    vft = E.model("vft", "train.py", init=E.init, data=E.data, split=E.train, eval_split="")
    sampling = dict(n=s.k, reward="steps" if E.toy else None)
    apart = E.part(E.validation, s.validation, s.validation + s.pool)
    graded = E.samples("graded", vft, split=E.train, limit=s.problems, **sampling)
    pool = E.samples("graded-pool", vft, split=apart, **sampling)
    samples, held_out = (E.file("ungraded", without_grades, drawn) for drawn in (graded, pool))
    for_pairs = samples if E.toy else E.file("referenced", with_reference, samples)

    def align(name, method, constraint, samples, **options):
        options = {"margin": s.margin} | options if constraint == "boundary" else options
        options |= dict(pair_low=0.001, pair_high=0.999) if method == "dpo" else {}
        options |= dict(sft_weight=1) if method == "pro" and name != "pro-paper" else {}
        return E.model(
            name, "align.py", init=vft, samples=samples, method=method, constraint=constraint,
            epochs=s.epochs, batch_size=s.batch_size, **dict(save_every=0, probe_every=0) | options,
        )  # fmt: skip

    few, one_rate, main = dict(seeds=s.few_seeds), dict(grid=dict(lr=(s.one_rate,))), [vft]
    for method, constraint in METHODS:
        name = method if method == "rft" else f"{method}-{constraint}"
        grid = {"dpo": s.dpo_lrs, "rrhf": s.few_lrs, "pro": s.few_lrs}.get(method, s.lrs)
        for ending, values in (
            ("", grid),
            ("@one-rate", (s.dpo_one_rate if method == "dpo" else s.one_rate,)),
        ):
            of, options = for_pairs if method == "dpo" else samples, few if method in FEW else {}
            model = align(name + ending, method, constraint, of, grid=dict(lr=values), **options)
            main += [] if method in FEW else [model]
    align("pro-paper", "pro", "none", samples, **one_rate, **few)
    for method in RANKED if E.toy else ():
        for constraint in CONSTRAINTS:
            align(f"rank-{method}-{constraint}", method, constraint, graded, **one_rate, **few)

    aside = dict(**one_rate, table="ablation")
    for margin in s.other_margins:
        align(f"margin {margin:g}", "aft", "boundary", samples, margin=margin, **aside, **few)
    for k in s.other_ks:
        cut = E.file(f"first-{k:g}", first_responses, samples, int(k))
        align(f"K = {k:g}", "aft", "boundary", cut, **aside, seeds=1)
    look = dict(
        data=E.data, eval_split=E.validation, eval_limit=s.validation, probe_limit=s.validation,
        probe_every=round(s.epochs * s.problems / s.batch_size / 6),
    )  # fmt: skip
    for constraint in CONSTRAINTS if E.toy else ():
        align(f"aft-{constraint}, watched", "aft", constraint, samples, **aside, **look, seeds=1)

    E.choose_by("metrics.accuracy", **E.problems(E.validation, s.validation))
    if s.test:
        E.read("test", **E.problems(E.test, s.test), take=EVALUATED)
    if E.toy:
        harder = E.write("harder.jsonl", problems.rows("test", s.harder, difficulty=5))
        E.read("harder", data=harder, take={"harder": "correct"}, of=main)
    assess = ("--assess",) if E.toy else ("--assess", "--reference")
    E.read("train", *assess, samples=samples, limit=s.pool, take={"a_train": "ordered_pairs"}, of=main)
    E.read("held-out", *assess, samples=held_out, take=ASSESSED, of=main if E.toy else None)


def right_and_wrong(assessed):
    """What sample.py --assess wrote -> (scores of right responses, scores of wrong ones)."""
    both = [
        (score, right)
        for scores, correct in zip(assessed["scores"], assessed["correct"])
        for score, right in zip(scores, correct)
    ]
    return [[round(score, 3) for score, right in both if right is side] for side in (True, False)]


def on_new_chains(E, models):
    """A note: models on the test problems whose equations, as a whole, no training solution has."""
    chain = lambda problem: tuple(re.findall(r"\d+ [-+x/] \d+ = \d+", problem.solution))
    seen = set(map(chain, read_problems(E.data, E.train)))
    tested = read_problems(E.data, E.test, limit=E.size.test)
    new = [place for place, problem in enumerate(tested) if chain(problem) not in seen]
    right = lambda name, seed: E.output(models[name], "test", seed)["correct"]
    picked = lambda name: [[right(name, seed)[p] for p in new] for seed in range(E.size.seeds)]
    vft, names = picked("vft"), ("rft", *(f"aft-{constraint}@one-rate" for constraint in CONSTRAINTS))
    over = [f"{name} {INTERVAL.format(*paired_difference(vft, picked(name)))}" for name in names]
    return (
        f"{1 - len(new) / len(tested):.0%} of the test problems have the equations of a training problem. On "
        f"the other {len(new)}: vft {mean_interval(vft)[0]:.1%}; over it {'; '.join(over)}."
    )


def extra(E):
    """What the figures show, of the first seed, and notes."""
    models = {model.name: model for model in E.models}
    watched = {name: f"aft-{name}, watched" for name in CONSTRAINTS}
    if not {"vft", "rft", *watched.values()} <= models.keys():
        return {}
    held_out = {name: E.output(models[name], "held-out") for name in ("vft", "aft-boundary@one-rate")}
    logs = {name: E.path(models[cell], 0) / "metrics.jsonl" for name, cell in watched.items()}
    return {
        "scores": {name: right_and_wrong(judged) for name, judged in held_out.items()},
        "training": {name: plots.smooth(log, ("score_right", "score_wrong")) for name, log in logs.items()},
        "accuracy": {name: plots.smooth(log, ["held_out_accuracy"], window=0) for name, log in logs.items()},
        "notes": [on_new_chains(E, models)],
    }


def draw(results, stem):
    vft = numbers(results, "vft", "accuracy")
    others = dict.fromkeys(cell["name"] for cell in results["cells"] if "table" not in cell)
    rows = [(name, numbers(results, name, "accuracy")) for name in others if vft and name != "vft"]
    if rows:
        rows = [(name, *paired_difference(vft[: len(ours)], ours)) for name, ours in rows]
        plots.differences(rows, "greedy accuracy over VFT", f"{stem}_differences.svg")
    if results["extra"]:
        training, accuracy = results["extra"]["training"], results["extra"]["accuracy"]
        plots.collapse(training, accuracy, f"{stem}_collapse.svg")
        plots.score_histograms(results["extra"]["scores"], f"{stem}_misalignment.svg")


TITLE = "AFT: Making Large Language Models Better Reasoners with Alignment (arXiv 2309.02144)"
E = Experiment(
    "aft",
    TITLE,
    SIZES,
    FAST,
    elsewhere=SLICE,
    splits=("train", "validation", "test[1000:3000]"),  # earlier runs looked at the first 1,000
)

if __name__ == "__main__":
    E.main(declare, CLAIMS, COLUMNS, extra=extra, draw=draw)
