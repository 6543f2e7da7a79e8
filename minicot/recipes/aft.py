"""AFT, "Making Large Language Models Better Reasoners with Alignment" (arXiv 2309.02144): toy world or real
sets.

    python -m minicot.recipes.aft                    # toy world, 3 seeds, two hours on two CPU cores
    python -m minicot.recipes.aft --fast             # a small part of the work, one seed
    python -m minicot.recipes.aft --data gsm8k:PATH --init SmolLM2 --device cuda --name aft_gsm8k \\
        --splits "train[:7000]" "train[7000:]" test --train-flags "--lr 2e-5 --batch-size 8 --epochs 3"

The path (paper, section 4): base -> VFT (fine-tuning on solutions) -> K samples a training question, graded
by their final answer -> alignment of the same VFT model on the same samples by each method: plain, detached,
boundary. Each method gets the same grid of learning rates at the first seed, chosen by greedy accuracy on
validation problems. "aft-none@twin" is AFT without a constraint at the rate of AFT with the boundary, so that
a collapse is not tuned away. Ranking feedback (the paper's GSM8K-RANK) replaces right/wrong by the step
oracle's grade of each chain; built-in world only.

Differs from the paper: one epoch, not three; K = 8 samples of the one VFT model; a toy world.
"""

from dataclasses import replace

from minicot import plots
from minicot.metrics import paired_difference
from minicot.recipes.experiment import Experiment
from minicot.recipes.tables import claims, numbers
from minicot.records import Response, read_samples, samples_to_row
from minicot.runs import write_jsonl

SIZES = {
    "seeds": 3,
    "problems": 2000,  # training questions that are sampled and aligned on
    "k": 8,  # responses a question
    "epochs": 1.0,
    "batch_size": 8,  # questions a step
    "validation": 1000,  # problems that choose a setting
    "test": 1000,  # problems of the table
    "pool": 200,  # held-out questions of A-accuracy and of the reference NLL
    "votes": 8,  # samples of majority@k on the test problems
    "lrs": (3e-5, 1e-4, 3e-4),
    "margin": 0.1,
    "other_margins": (0.0, 0.03, 0.3),  # ablations, at the first seed
    "other_ks": (2, 4),
}
FAST = dict(
    seeds=1, problems=120, k=6, validation=100, test=200, pool=60, votes=4, lrs=(1e-4,), other_ks=(2,)
)
SLICE = dict(
    FAST, problems=16, k=4, batch_size=4, test=0, pool=64, lrs=(1e-5,), other_margins=(), other_ks=()
)

CONSTRAINTS = ("none", "detached", "boundary")
METHODS = [("rft", "none"), *((m, c) for m in ("dpo", "rrhf", "pro", "aft") for c in CONSTRAINTS)]
RANKED = [("rrhf", "none"), ("pro", "none"), *(("aft", constraint) for constraint in CONSTRAINTS)]

# Written down before the run.
CLAIMS = claims("""
a |a_held       |vft              |            |below 0.8|VFT misjudges: held-out A-accuracy < 80 %
b1|accuracy     |aft-detached     |vft         |up       |AFT detached beats VFT
b2|accuracy     |aft-boundary     |vft         |up       |AFT boundary beats VFT
b3|accuracy     |aft-detached     |rft         |level    |AFT detached is at least level with RFT
b4|accuracy     |aft-boundary     |rft         |level    |AFT boundary is at least level with RFT
b5|a_held       |aft-detached     |vft         |up       |AFT detached raises held-out A-accuracy
b6|a_held       |aft-boundary     |vft         |up       |AFT boundary raises held-out A-accuracy
c1|accuracy     |aft-none         |vft         |down     |AFT unconstrained, own setting, falls below VFT
c2|accuracy     |aft-none@twin    |vft         |down     |AFT unconstrained, boundary's rate, falls below VFT
c3|reference_nll|aft-none@twin    |aft-boundary|up       |... and its reference NLL rises over boundary's
d1|accuracy     |rrhf-detached    |rrhf-none   |up       |RRHF gains by the detached constraint
d2|accuracy     |rrhf-boundary    |rrhf-none   |up       |RRHF gains by the boundary constraint
d3|accuracy     |pro-detached     |pro-none    |up       |PRO gains by the detached constraint
d4|accuracy     |pro-boundary     |pro-none    |up       |PRO gains by the boundary constraint
d5|accuracy     |dpo-detached     |dpo-none    |up       |DPO gains by the detached constraint
d6|accuracy     |dpo-boundary     |dpo-none    |up       |DPO gains by the boundary constraint
e1|accuracy     |rank-rrhf-none   |vft         |down     |ranking feedback: RRHF falls below VFT
e2|accuracy     |rank-pro-none    |vft         |down     |ranking feedback: PRO falls below VFT
e3|accuracy     |rank-aft-detached|vft         |level    |ranking feedback: AFT detached does not fall
e4|accuracy     |rank-aft-boundary|vft         |level    |ranking feedback: AFT boundary does not fall
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
        "majority": "{majority:.1%}",
        "A-accuracy train / held-out": "{a_train:.1%} / {a_held:.1%}",
        "reference NLL": "{reference_nll:.3f}",
        "no answer": "{missing_answers:.1%}",
        "repeated 4-grams": "{repeated_4grams:.1%}",
        "paper": PAPER,
    },
    "ablation, one seed": {
        "accuracy": "{accuracy:.1%}",
        "over VFT [95 %, one seed]": ("accuracy", "vft"),
        "A-accuracy held-out": "{a_held:.1%}",
    },
}
EVALUATED = {"accuracy": "correct"} | {
    name: f"metrics.{name}" for name in ("majority", "missing_answers", "repeated_4grams")
}
SHOWN = ("aft-none@twin", "aft-detached", "aft-boundary")  # in the figure of the collapse


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
    graded = E.samples("graded", vft, split=E.train, limit=s.problems, **sampling)
    pool = E.samples("graded-pool", vft, split=E.validation, limit=s.pool, **sampling)
    samples, held_out = (E.file("ungraded", without_grades, drawn) for drawn in (graded, pool))
    for_pairs = samples if E.toy else E.file("referenced", with_reference, samples)

    def align(name, method, constraint, samples, *switches, **options):
        options = {"margin": s.margin} | options if constraint == "boundary" else options
        every_mixed = dict(pair_low=0.001, pair_high=0.999) if method == "dpo" else {}
        return E.model(
            name, "align.py", *switches, init=vft, samples=samples, method=method, constraint=constraint,
            epochs=s.epochs, batch_size=s.batch_size, probe_every=0, save_every=0, **every_mixed, **options,
        )  # fmt: skip

    grid, aft = dict(lr=s.lrs), {}
    for method, constraint in METHODS:
        name = method if method == "rft" else f"{method}-{constraint}"
        aft[name] = align(name, method, constraint, for_pairs if method == "dpo" else samples, grid=grid)
    for method, constraint in RANKED if E.toy else ():
        align(f"rank-{method}-{constraint}", method, constraint, graded, grid=grid)
    align("aft-none@twin", "aft", "none", samples, at=(aft["aft-boundary"], "lr"))

    for constraint in ("detached", "boundary"):
        same = dict(at=(aft[f"aft-{constraint}"], "lr"), seeds=1, table="ablation, one seed")
        for margin in s.other_margins if constraint == "boundary" else ():
            align(f"aft-boundary, margin {margin:g}", "aft", constraint, samples, margin=margin, **same)
        for k in s.other_ks:
            few = E.file(f"first-{k}", first_responses, samples, int(k))
            align(f"aft-{constraint}, K = {k:g}", "aft", constraint, few, **same)
        if s.other_ks:
            switch = "--no-reference-in-positives"
            align(f"aft-{constraint}, reference not ranked", "aft", constraint, samples, switch, **same)

    E.choose_by("metrics.accuracy", split=E.validation, limit=s.validation)
    if s.test:
        E.read("test", split=E.test, limit=s.test, n=s.votes, take=EVALUATED)
    assess = ("--assess",) if E.toy else ("--assess", "--reference")
    E.read("train", *assess, samples=samples, limit=s.pool, take={"a_train": "ordered_pairs"})
    E.read(
        "held-out",
        *assess,
        samples=held_out,
        take={"a_held": "ordered_pairs", "reference_nll": "reference_nlls"},
    )


def right_and_wrong(assessed):
    """What sample.py --assess wrote -> (scores of right responses, scores of wrong ones)."""
    both = [
        (score, right)
        for scores, correct in zip(assessed["scores"], assessed["correct"])
        for score, right in zip(scores, correct)
    ]
    return [[round(score, 3) for score, right in both if right is side] for side in (True, False)]


def extra(E):
    """What the figures show, of the first seed."""
    models = {model.name: model for model in E.models}
    if not {"vft", *SHOWN} <= models.keys():
        return {}
    scores = {name: right_and_wrong(E.output(models[name], "held-out")) for name in ("vft", "aft-boundary")}
    logs = {name: E.path(models[name], 0) / "metrics.jsonl" for name in SHOWN}
    keys = ("score_right", "score_wrong")
    return {"scores": scores, "training": {name: plots.smooth(log, keys) for name, log in logs.items()}}


def draw(results, stem):
    vft = numbers(results, "vft", "accuracy")
    others = dict.fromkeys(cell["name"] for cell in results["cells"] if "table" not in cell)
    rows = [(name, numbers(results, name, "accuracy")) for name in others if vft and name != "vft"]
    if rows:
        rows = [(name, *paired_difference(vft, ours)) for name, ours in rows]
        plots.differences(rows, "greedy accuracy over VFT", f"{stem}_differences.svg")
    if results["extra"]:
        plots.scores_over_training(results["extra"]["training"], f"{stem}_collapse.svg")
        plots.score_histograms(results["extra"]["scores"], f"{stem}_misalignment.svg")


TITLE = "AFT: Making Large Language Models Better Reasoners with Alignment (arXiv 2309.02144)"
E = Experiment("aft", TITLE, SIZES, FAST, elsewhere=SLICE)

if __name__ == "__main__":
    E.main(declare, CLAIMS, COLUMNS, extra=extra, draw=draw)
