"""URSA (arXiv 2501.04686) on real text: step labels by rollouts, a process reward model (PRM) that verifies,
and GRPO (2402.03300), of a small language model's own solutions.

    python -m minicot.recipes.ursa_text --init LM --data gsm8k:PATH --name ursa_text --device cuda \\
        --dtype bfloat16 --jobs 3
    ... --fast                                             # a small part of the work: a CPU will do

SFT on the first `taught` of the first split -> K solutions of each of its next `labelled` problems; of those
problems that it solves at least once the wrong solutions' first steps that cannot be rescued (BEL) -> a PRM,
and an outcome reward model (ORM) of the same solutions, each choose among n samples of every test problem.
GRPO draws its own responses to the same `labelled` problems; RFT learns from the right ones of the K.

Differs from the paper: text; no misreading (MIE), which needs a teacher; 8 solutions and 8 rollouts, not 16.
"""

import torch

from minicot import plots
from minicot.recipes.experiment import Experiment
from minicot.recipes.grpo import DRAWN
from minicot.recipes.tables import claims
from minicot.recipes.ursa import WAYS, all_curves, best_score
from minicot.recipes.ursa_labels import roll_outs, training_set
from minicot.records import read_samples, samples_to_row
from minicot.runs import write_jsonl
from minicot.sets import default_length, style_of
from minicot.synthesis import locate_errors

SIZES = {
    "seeds": 1,
    "taught": 5000,
    "epochs": 3,
    "lr": 2e-4,
    "batch_size": 32,
    "labelled": 2000,
    "k": 8,  # solutions of each
    "temperature": 0.7,
    "reward_steps": 200,
    "reward_lrs": (3e-5, 1e-4, 3e-4),
    "rl_steps": 60,
    "rl_lrs": (3e-6, 1e-5, 3e-5),
    "questions": 32,  # a step of GRPO and of RFT
    "responses": 8,  # to each
    "accumulate": 4,
    "validation": 473,
    "test": 1319,
    "n": 16,  # samples that are chosen among
    "rows": 1024,  # sequences decoded together
}
FAST = dict(
    taught=160, epochs=1, batch_size=4, labelled=64, k=4, reward_steps=4, reward_lrs=(1e-4,), rl_steps=2,
    rl_lrs=(1e-5,), questions=2, responses=4, accumulate=1, validation=8, test=16, n=4, rows=32,
)  # fmt: skip

# Metrics: <way>@<n> as in ursa.py; accuracy: greedy; sampled: of 8 samples. Written down before the run. The
# interval of 1,319 problems, of which one in twenty is solved, is about 1.5 points to each side.
CLAIMS = claims("""
a1*|mean@16    |prm |prm/majority@16|up|PRM best-of-16 beats majority
a2 |majority@16|prm |sft/accuracy   |up|majority beats the greedy answer
a3*|mean@16    |prm |orm            |up|PRM best-of-16 beats the ORM's
a4 |vote@16    |prm |prm/majority@16|up|a vote weighted by the PRM beats majority
a5 |mean@16    |prm |prm/shortest@16|up|PRM best-of-16 beats the shortest chain
a6 |mean@16    |orm |orm/majority@16|up|ORM best-of-16 beats majority
g1*|accuracy   |grpo|sft            |up|GRPO beats SFT
g2*|sampled    |grpo|sft            |up|GRPO's samples are right more often than SFT's
g3 |sampled    |grpo|rft            |up|... and than RFT's
""")
PAPER = {"sft": "majority 50.7 (URSA-8B, MathVerse, of 32)", "prm": "55.0", "orm": "51.3"}
COLUMNS = {
    "model": {
        "greedy": "{accuracy:.1%}",
        "over SFT": ("accuracy", "sft"),
        "samples": "{sampled:.1%}",
        "over SFT's": ("sampled", "sft"),
        "majority of 16": "{majority@16:.1%}",
        "best of 16": "{mean@16:.1%}",
        "weighted vote of 16": "{vote@16:.1%}",
        "pass@16": "{pass@16:.1%}",
        "paper": PAPER,
    }
}
PIVOTS = [("choosing among n", model, WAYS, (1, 2, 4, 8, 16)) for model in ("prm", "orm")]


def label_solved(out, samples, model, data, dtype, *, seed):
    """BEL: the samples of the problems that are solved at least once, with step_labels."""
    solved = [one for one in read_samples(samples) if any(r.correct for r in one.responses)]
    how = dict(style=style_of(data), tokens=default_length(data), rows=E.size.rows)
    labelled, report = locate_errors(solved, roll_outs(model, seed, dtype=getattr(torch, dtype), **how))
    print(f"{out}: {report}", flush=True)
    write_jsonl(out, map(samples_to_row, labelled))


def declare(E):
    s = E.size
    tested, validation = E.problems(E.test, s.test), E.problems(E.validation, s.validation)
    fresh = E.part(E.train, s.taught, s.taught + s.labelled)
    drawing = dict(batch_size=s.rows, temperature=s.temperature)
    sft = E.model(
        "sft", "train.py", init=E.init, data=E.data, split=E.part(E.train, 0, s.taught), epochs=s.epochs,
        lr=s.lr, batch_size=s.batch_size, eval_split="", save_every=0,
    )  # fmt: skip
    drawn = E.samples("train-samples", sft, n=s.k, **E.problems(fresh, s.labelled) | drawing)

    loop = dict(init=sft, data=E.data, batch_size=s.questions, steps=s.rl_steps, accumulate=s.accumulate)
    loop |= dict(eval_split="", probe_every=0, save_every=0, grid=dict(lr=s.rl_lrs))
    asked = dict(split=fresh, limit=0, k=s.responses)
    rl = [E.model("grpo", "align.py", method="grpo", **asked, **loop)]
    rl += [E.model("rft", "align.py", "--no-reference", method="rft", samples=drawn, **loop)]
    E.choose_by("metrics.pass.1", of=rl, n=8, **validation | drawing)
    take = {"accuracy": "correct", "sampled": "right"}
    E.read("answers", of=[sft, *rl], take=take, n=8, **tested | drawing)

    bel = E.file("bel", label_solved, drawn, sft, E.data, E.args.dtype)
    learned = E.file("train-bel", training_set, bel, bel, "bel")
    held_out = E.samples("validation-samples", sft, n=s.n, **validation | drawing)
    chains = E.samples("test-samples", sft, n=s.n, **tested | drawing)
    for kind in ("prm", "orm"):
        model = E.model(
            kind, "train.py", task=kind, init=sft, steps=s.reward_steps, batch_size=s.batch_size,
            save_every=0, samples=learned, grid=dict(lr=s.reward_lrs),
        )  # fmt: skip
        scored = [
            E.samples(name, model, verifier=model, samples=of)
            for name, of in (("validation-scored", held_out), ("scored", chains))
        ]
        E.choose_by("score", best_score, scored[0], of=[model])
        E.read("curves", all_curves, scored[1], of=[model])


def extra(E):
    [grpo] = [model for model in E.models if model.name == "grpo"]
    return {"training": {"grpo": plots.smooth(E.path(grpo, 0) / "metrics.jsonl", DRAWN, window=10)}}


def draw(results, stem):
    of = {cell["name"]: cell["metrics"] for cell in results["cells"]}
    plots.best_of_n([of["prm"]], f"{stem}_prm.svg")
    plots.over_steps(results["extra"]["training"], DRAWN, f"{stem}_training.svg")


E = Experiment(
    "ursa_text",
    "URSA on real text: a process reward model from rollouts (arXiv 2501.04686), and GRPO (2402.03300)",
    SIZES,
    FAST,
    data="gsm8k:PATH",
    splits=("train[:7000]", "train[7000:]", "test"),
)

if __name__ == "__main__":
    E.main(declare, CLAIMS, COLUMNS, pivots=PIVOTS, extra=extra, draw=draw)
