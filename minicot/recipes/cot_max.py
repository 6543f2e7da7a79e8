"""CoT-Influx (CoT-Max), "Fewer is More: Boosting LLM Reasoning with Reinforced Context Pruning" (arXiv
2312.08901), in a world of made-up units: which worked examples, and which of their words, a budget is spent
on.

    python -m minicot.recipes.cot_max             # 3 seeds, three hours on two cores
    python -m minicot.recipes.cot_max --fast      # a small part, one seed, nine minutes of one core

The path: a base that uses its shots (toy/shots.py says why it needs them) -> a pruner of shots and tokens,
by REINFORCE, for T tokens -> test problems with their candidate shots cut down to a budget by it and by the
baselines of minicot/selection.py -> greedy answers of the same base. First it is shown that shots help this
base, that losing the ones that show a unit hurts, and so does losing the numbers.

Ablations: without the shot stage (no-shots), without the token stage (no-tokens), without the difficulty
filter (no-filter), with the loss alone as reward (loss-alone); at one seed other T and no penalty below T
(w-0). Not the paper's: a pruner that reads the question before each shot (see-question).

Differs from the paper: the encoder is the base itself, not BERT-large; every problem brings its candidates,
which a convention of its own ties together, so none are retrieved; a base is trained for each seed.
"""

from minicot import plots
from minicot.pruner import prune_by
from minicot.recipes.experiment import Cell, Experiment
from minicot.recipes.tables import claims
from minicot.records import fields_of
from minicot.runs import write_json
from minicot.sets import read_problems
from minicot.tokenizer import Tokenizer
from minicot.toy import shots

SIZES = {
    "seeds": 3,
    "first_seed": 10,
    "taught": 7000,  # rows of the base's short stage, of the other three half as many
    "asked": 400,  # training problems of the pruner
    "steps": 200,
    "questions": 8,  # a step
    "repeats": 8,  # prunings of each; the paper's are 10 (13B) and 5 (70B)
    "target": 96,  # T
    "lrs": (1e-3, 3e-3),
    "other_targets": (48, 192),
    "validation": 300,
    "test": 1000,
    "budgets": (24, 48, 96, 192),
}
FAST = dict(
    seeds=1, taught=1000, asked=60, steps=10, questions=4, repeats=4, lrs=(3e-3,),
    validation=20, test=60,
)  # fmt: skip
BASELINES = ("fixed", "random", "topk", "complexity", "selective-context", "random-tokens")
KINDS = ("number", "operator", "unit", "other", "filler")

# Metrics: at<B>: accuracy where the shots have B tokens; answers: with the candidates as they are named;
# kept_<kind>: share of a kind of word that the pruner leaves at T. Written down before the run. The interval
# of 3 seeds x 1,000 problems is about 2 points to each side.
CLAIMS = claims("""
s1*|answers      |all   |none               |up  |shots help this base
s2 |answers      |others|all                |down|without the shots that show the unit it answers worse
s3 |answers      |no-numbers|all            |down|without their numbers it answers worse
s4 |answers      |needed|all                |level .02, others|the shots that show the unit are enough
a1*|at96         |pruner|random             |up  |at T, the pruner beats random shots
a2*|at96         |pruner|topk               |up  |... TopK
a3*|at96         |pruner|selective-context  |up  |... Selective Context
a4 |at96         |pruner|complexity         |up  |... the most complex shots
a5 |at96         |pruner|random-tokens      |up  |... random words
a6 |at48         |pruner|topk               |up  |at half of T it beats TopK
a7 |at192        |pruner|topk               |up  |at twice T it beats TopK
b1*|at96         |pruner|topk/at192         |level .02, topk|with half the tokens it is level with TopK
b2 |at96         |pruner|no-tokens/at192    |level .02, no-tokens|... and with whole shots of its own choice
b3 |at96         |pruner|all/answers        |level .02, random|... and with all candidates
c1 |kept_number  |pruner|pruner/kept_filler |up  |numbers are kept rather than filler
c2 |kept_operator|pruner|pruner/kept_filler |up  |operators are kept rather than filler
c3 |kept_unit    |pruner|pruner/kept_filler |up  |names of units are kept rather than filler
d1 |at96         |pruner|no-shots           |up  |the shot stage matters
d2 |at96         |pruner|no-tokens          |up  |the token stage matters
d3 |at96         |pruner|no-filter          |up  |the difficulty filter matters
d4 |at96         |pruner|loss-alone         |up  |right answers in the reward matter
d5 |at96         |see-question|pruner       |up  |a pruner that reads the question answers better
""")
PAPER = {"none": "", "pruner": "15.9, 32.2, 59.6 (GSM8K; LLaMA2-7B, 13B, 70B)"}
COLUMNS = {
    "model": {
        **{f"{budget} tokens": f"{{at{budget}:.1%}}" for budget in SIZES["budgets"]},
        "over random at 96": ("at96", "random"),
        "kept at 96: numbers, operators": "{kept_number:.0%} / {kept_operator:.0%}",
        "units, other words, filler": "{kept_unit:.0%} / {kept_other:.0%} / {kept_filler:.0%}",
        "paper": PAPER,
    },
    "candidates": {"accuracy": "{answers:.1%}", "over none": ("answers", "none")},
}
TRACKED = {
    "reward": "reward",
    "accuracy": "right (share)",
    "t_over_target": "t / T",
    "shots_kept": "shots kept (share)",
    "tokens_kept": "tokens kept (share)",
}


def what_is_kept(out, pruner, base, data, *, seed):
    """{"kept_<kind>": the share of its characters that is left of each problem's shots} at the pruner's T."""
    shares = {f"kept_{kind}": [] for kind in KINDS}
    for one in prune_by(pruner, read_problems(str(data)), "", 0, tokenizer=Tokenizer(base)):
        counts = {kind: [0, 0] for kind in KINDS}
        for pieces, keep in zip(one.pieces, one.keep):
            stays = [is_kept for piece, is_kept in zip(pieces, keep) for _ in piece]
            kinds = [kind for word, kind in shots.word_kinds("".join(pieces)) for _ in word]
            for is_kept, kind in zip(stays, kinds, strict=True):
                counts[kind] = [counts[kind][0] + is_kept, counts[kind][1] + 1]
        for kind, (kept, all_) in counts.items():
            shares[f"kept_{kind}"].append(kept / max(1, all_))
    write_json(out, shares)


def base_of(E):
    """The LM: the text base, taught in stages to use shots (see toy/shots.py)."""
    base, s = E.init, E.size
    for name, rows in shots.stages(s.taught).items():
        flags = dict(init=base, data=E.write(f"{name}.jsonl", rows), mode="plain", save_every=0)
        flags |= dict(batch_size=16) if name == "drill" else {}
        base = Cell(name, ("train.py", "--no-group-by-length"), "model", flags, root=E.root)
    return base


def declare(E):
    s, base = E.size, base_of(E)
    asked, apart, tested = (
        E.problems(split, limit)
        for split, limit in ((E.train, s.asked), (E.validation, s.validation), (E.test, s.test))
    )

    def cut(name, model, budget, **flags):
        """Problems with their shots cut down to a budget; a cell in the folder of `model`."""
        work = "minicot.pruner", "prune"
        return Cell(
            f"{name}-{budget}", work, "pruned.jsonl", dict(model=base, budget=budget, **flags), of=model
        )

    def read(model, budgets=s.budgets, **how):
        for budget in budgets:
            flags = tested | dict(model=base, data=cut("test", model, budget, data=tested["data"], **how))
            E.read(f"at{budget}", of=[model], take={f"at{budget}": "correct"}, **flags)

    def pruner(name, *switches, target=s.target, budgets=(), **flags):
        model = E.model(
            name, "minicot.pruner", *switches, model=base, target=target, steps=s.steps,
            batch_size=s.questions, repeats=s.repeats, **asked, **flags,
        )  # fmt: skip
        read(model, budgets or (target,), pruner=model)
        return model

    rows = [fields_of(problem) for problem in read_problems(E.data, E.test, limit=s.test)]
    for how, vary in shots.VARIANTS.items():
        named = tested | dict(model=base, data=E.write(f"test-{how}.jsonl", map(vary, rows)))
        E.read("answers", of=[E.alias(how, base, "candidates")], take={"answers": "correct"}, **named)
    for method in BASELINES:
        read(E.alias(method, base), method=method)
    main = pruner("pruner", "--easy-only", budgets=s.budgets, grid=dict(lr=s.lrs))
    held_out = apart | dict(data=cut("validation", main, s.target, data=apart["data"], pruner=main))
    E.choose_by("metrics.accuracy", of=[main], **held_out | dict(model=base))
    same = dict(at=(main, "lr"))
    alone = pruner("no-shots", "--easy-only", "--no-shot-stage", budgets=s.budgets, **same)
    for one in (main, alone):
        E.read("kept", what_is_kept, one, base, apart["data"], of=[one])
    pruner("no-tokens", "--easy-only", "--no-token-stage", budgets=s.budgets[-2:], **same)
    pruner("no-filter", **same)
    pruner("loss-alone", "--no-accuracy", **same)
    pruner("see-question", "--easy-only", "--see-question", **same)
    pruner("w-0", "--easy-only", w_below=0.0, seeds=1, **same)
    for target in s.other_targets:
        pruner(f"T-{target}", "--easy-only", target=target, seeds=1, **same)


def extra(E):
    shown = [model for model in E.models if model.name in ("pruner", "no-shots", "no-tokens")]
    logs = {model.name: E.path(model, 0) / "metrics.jsonl" for model in shown}
    return {"training": {name: plots.smooth(log, TRACKED) for name, log in logs.items()}}


def draw(results, stem):
    curves = [
        {f"{cell['name']}@{name[2:]}": value for name, value in cell["metrics"].items() if name[:2] == "at"}
        for cell in results["cells"]
        if cell["name"] in (*BASELINES, "pruner", "no-shots")
    ]
    plots.best_of_n(curves, f"{stem}_budgets.svg", "tokens of the shots")
    plots.over_steps(results["extra"]["training"], TRACKED, f"{stem}_training.svg")


E = Experiment(
    "cot_max",
    "CoT-Influx (CoT-Max): Boosting LLM Reasoning with Reinforced Context Pruning (arXiv 2312.08901)",
    SIZES,
    FAST,
    data="toy-shots",
    init="toy",
    splits=("train", "validation", "test[1000:2000]"),  # earlier looks were at the first problems
)

if __name__ == "__main__":
    E.main(declare, CLAIMS, COLUMNS, extra=extra, draw=draw)
