"""GRPO, "DeepSeekMath" (arXiv 2402.03300), on the text world, under its normalisation and those of Dr. GRPO
(2503.20783) and DAPO (2503.14476).

    python -m minicot.recipes.grpo             # 3 seeds
    python -m minicot.recipes.grpo --fast      # a small part of the work, one seed

The path: SFT, as `python train.py` does it -> one pass over training questions, which SFT has seen once: 8
responses to each of 16 questions a step, drawn from the policy as it is; the reward is 1 for a right answer.
The control is RFT: as many responses to the same questions, drawn from SFT's model, the right ones trained on
in as many steps. Every arm keeps the learning rate, of the same grid, at which it answers most validation
problems rightly at the first seed. The figure shows the first seed's training.

Differs from the papers: batches of 128 responses in one update, so the ratio is 1 and the clip (of DAPO a
wider one) has nothing to cut; no KL term (as in Dr. GRPO and DAPO); chains of some 30 tokens.
"""

from minicot import plots
from minicot.answers import is_correct, majority_vote
from minicot.recipes.experiment import Experiment
from minicot.recipes.tables import claims
from minicot.records import read_samples
from minicot.runs import write_json

SIZES = {
    "seeds": 3,
    "first_seed": 20,
    "steps": 150,
    "questions": 16,  # a step
    "responses": 8,  # to each
    "lrs": (3e-5, 1e-4, 3e-4),  # at 1e-3 samples are soon all wrong
    "validation": 600,
    "test": 2000,
    "drawn": 1000,  # test problems that are sampled
    "draws": 8,  # samples of each
    "looked": 200,  # validation problems that are answered during training, eight times
}
FAST = dict(seeds=1, steps=8, lrs=(3e-4,), validation=50, test=100, drawn=50, looked=20)
NORMALISATIONS = ("grpo", "dr-grpo", "dapo")

# Metrics: accuracy: greedy. Of the samples, at temperature 1: sampled: accuracy; majority and pass of 8;
# length, length_wrong: tokens of all and of the wrong ones. Written down before the run. The interval of 3
# seeds x 2,000 problems is about 2 points to each side.
CLAIMS = claims("""
a1*|accuracy    |grpo   |sft |up             |GRPO beats SFT
a2*|sampled     |grpo   |sft |up             |GRPO's samples are right more often
a3 |majority    |grpo   |sft |up             |... and so is the majority of 8
a4 |pass        |grpo   |sft |up             |... and pass@8 (DeepSeekMath: it is not)
b1*|accuracy    |grpo   |rft |up             |GRPO beats RFT on as many responses of SFT's model
b2 |sampled     |grpo   |rft |up             |... and in samples
c1 |accuracy    |dr-grpo|grpo|level 0.02, sft|Dr. GRPO is level with GRPO
c2 |length_wrong|dr-grpo|grpo|down           |... and its wrong responses are shorter
c3 |accuracy    |dapo   |grpo|level 0.02, sft|DAPO's mean over tokens is level with GRPO
c4 |length_wrong|dapo   |grpo|down           |... and its wrong responses are shorter
""")
PAPER = {"sft": "46.8 (DeepSeekMath-Instruct 7B, MATH)", "grpo": "51.7"}
COLUMNS = {
    "model": {
        "greedy": "{accuracy:.1%}",
        "over SFT [95 %]": ("accuracy", "sft"),
        "samples": "{sampled:.1%}",
        "over SFT's": ("sampled", "sft"),
        "majority of 8": "{majority:.1%}",
        "pass@8": "{pass:.1%}",
        "tokens: all, wrong": "{length:.1f} / {length_wrong:.1f}",
        "paper": PAPER,
    }
}
DRAWN = {"reward": "right samples (share)", "entropy": "entropy (nats a token)", "length": "tokens"}
TRACKED = {"held_out_accuracy": "greedy, validation (share)"} | DRAWN


def habits(out, drawn, *, seed):
    """A number a problem of {"sampled", "majority", "pass", "length"}; "length_wrong": [tokens, how many]."""
    read = read_samples(drawn)
    mean = lambda value: [sum(map(value, one.responses)) / len(one.responses) for one in read]
    vote = lambda one: majority_vote([r.answer for r in one.responses])
    lengths = [[len(r.ids) for r in one.responses if not r.correct] for one in read]
    found = {
        "sampled": mean(lambda r: bool(r.correct)),
        "majority": [is_correct(vote(one), one.problem.answer) for one in read],
        "pass": [any(r.correct for r in one.responses) for one in read],
        "length": mean(lambda r: len(r.ids)),
        "length_wrong": [[sum(wrong), len(wrong)] for wrong in lengths],
    }
    write_json(out, found)


def declare(E):
    s = E.size
    sft = E.model("sft", "train.py", init=E.init, data=E.data, split=E.train, eval_split="")
    asked = dict(data=E.data, split=E.train, limit=s.steps * s.questions)
    look = dict(eval_split=E.validation, eval_limit=s.looked, probe_limit=s.looked)
    look |= dict(probe_every=max(1, s.steps // 8), save_every=0)
    rates = dict(grid=dict(lr=s.lrs), batch_size=s.questions, steps=s.steps)
    for name in NORMALISATIONS:
        E.model(
            name, "align.py", init=sft, method="grpo", normalisation=name, k=s.responses,
            **asked, **rates, **look,
        )  # fmt: skip
    samples = E.samples("samples", sft, n=s.responses, **E.problems(E.train, s.steps * s.questions))
    E.model(
        "rft", "align.py", "--no-reference", init=sft, method="rft", samples=samples, data=E.data, **rates,
        **look,
    )  # fmt: skip
    E.choose_by("metrics.accuracy", **E.problems(E.validation, s.validation))
    E.read("answers", take={"accuracy": "correct"}, **E.problems(E.test, s.test))
    drawing = dict(n=s.draws, **E.problems(E.test, s.drawn))
    for model in E.models:
        drawn = E.samples("drawn", model, **drawing)
        E.read("habits", habits, drawn, of=[model])


def extra(E):
    logs = {model.name: E.path(model, 0) / "metrics.jsonl" for model in E.models if model.name != "sft"}
    whole = {name: plots.smooth(log, DRAWN) for name, log in logs.items()}
    looks = {name: plots.smooth(log, ["held_out_accuracy"], window=0) for name, log in logs.items()}
    return {"training": {name: whole[name] | looks[name] for name in logs}}


def draw(results, stem):
    plots.over_steps(results["extra"]["training"], TRACKED, f"{stem}_training.svg")


E = Experiment(
    "grpo",
    "GRPO: DeepSeekMath (arXiv 2402.03300), and the normalisations of Dr. GRPO and DAPO",
    SIZES,
    FAST,
    splits=("train", "validation", "test[1000:3000]"),
)

if __name__ == "__main__":
    E.main(declare, CLAIMS, COLUMNS, extra=extra, draw=draw)
