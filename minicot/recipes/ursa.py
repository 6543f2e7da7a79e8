"""URSA, "Unlocking Multimodal Mathematical Reasoning via Process Reward Model" (arXiv 2501.04686), on toy
pictures: chains synthesised, steps labelled, a process reward model that verifies.

    python -m minicot.recipes.ursa             # 3 seeds
    python -m minicot.recipes.ursa --fast      # a small part of the work, one seed

The path (paper, stages I and II): a teacher expands answers into chains of `Step k:` and `†Answer:`; those
that miss the gold answer are dropped -> SFT -> K chains a question; of the wrong ones rollouts find the first
step that cannot be rescued (BEL), and the teacher misreads one fact of right ones (MIE) -> a process reward
model (PRM) of both label sources, of each alone, and an outcome reward model (ORM) of the same responses, all
in as many steps and with a right chain for two wrong ones -> each ranks n samples a test problem of the SFT
model, the PRM of both sources and the ORM also those of another (SFT on other problems, whose chains the
teacher rewrites in other wordings and orders).

A chain's score by a PRM is the mean of its steps' (the paper's), or their least, last or product. Controls:
majority, the shortest chain, chains of one length, the log-ratio of DPO on the same samples. The step oracle
says how right labels and step scores are (ursa_labels.py); it also calls a number wrong that is read wrongly
and not needed, which rollouts rescue and no misreading touches: labels cannot reach 100 %.

Differs from the paper: the reward models do not start from the SFT model, from which they learn nothing
here, but from a base that knows right lines from wrong ones (--init toy-judge); 8 chains and 8 rollouts,
not 16 (the temperature, 0.3, is the paper's); a misreading is written anew from the scene, and alters a
number by 1 to 3, where the paper swaps confusable facts in a model's chain; the head is read at the end of
a step's line, no marker is added; the oracle stands in for people.
"""

from dataclasses import replace

from minicot import plots
from minicot.chat import describe_failures
from minicot.recipes.experiment import Experiment
from minicot.recipes.llava_reasoner import PICTURES
from minicot.recipes.tables import claims
from minicot.recipes.ursa_labels import TOKENS, bel_quality, label_by_rollouts, length_matched, misread
from minicot.recipes.ursa_labels import step_quality, training_set, two_chains
from minicot.records import Problem, fields_of, read_samples
from minicot.runs import write_json
from minicot.sets import read_problems
from minicot.synthesis import synthesise
from minicot.toy import teacher
from minicot.verifier import AGGREGATES, aggregate, curves
from minicot.weights import read_json

SIZES = {
    "seeds": 3,
    "first_seed": 10,
    "taught": 6000,  # training problems that the teacher answers
    "error_rate": 0.25,  # ... wrongly
    "steps": 400,
    "batch_size": 32,
    "lr": 2e-3,
    "labelled": 500,  # training problems that are sampled and labelled
    "k": 8,  # responses to each
    "reward_steps": 200,  # of each reward model
    "reward_lrs": (1e-4, 3e-4),
    "dpo_lrs": (1e-5, 3e-5, 1e-4),
    "validation": 300,
    "test": 600,
    "n": 32,  # samples that are chosen among
}
FAST = dict(
    seeds=1, taught=1500, steps=220, labelled=60, k=4, validation=50, test=100, n=4, reward_steps=20,
    reward_lrs=(3e-4,), dpo_lrs=(3e-5,),
)  # fmt: skip
FORM = dict(style="dagger", max_new_tokens=TOKENS)  # of the chains, drawn and graded
SOURCES = {"prm": "both", "prm-no-bel": "mie", "prm-no-mie": "bel", "orm": "both"}

# Metrics: <way>@<n>: a way of choosing among n samples: majority, the highest mean (min, last, product) of
# step scores, vote (by the mean), the shortest; "other ...": among another model's; first_error: how often
# the first step below 1/2 is the first wrong one; steps: how often a score is on the oracle's side of 1/2;
# matched: of a right and a wrong chain of as many tokens, how often the right one scores higher; bel_cost:
# the share of the prefixes that are rolled out. DPO's vote weighs exp(0.1 r). Written down before the run.
# The interval of 3 seeds x 600 problems is about 2 points to each side.
CLAIMS = claims("""
a1*|mean@32       |prm       |prm/majority@32|up  |PRM best-of-n beats majority
a2 |majority@32   |prm       |sft/greedy     |up  |majority beats the greedy answer
a3*|mean@32       |prm       |orm            |up  |PRM best-of-n beats the ORM's
a4 |vote@32       |prm       |prm/majority@32|up  |a vote weighted by the PRM beats majority
a5 |mean@32       |prm       |prm/shortest@32|up  |PRM best-of-n beats the shortest chain
a6 |mean@32       |prm       |dpo/best@32    |up  |PRM best-of-n beats the log-ratio of DPO
a8 |vote@32       |prm       |dpo            |up  |... and in a weighted vote
a9 |matched       |prm       |orm            |up  |among chains of one length the PRM sees right ones better
a7 |mean@8        |prm       |prm/majority@8 |up  |with 8 samples, PRM best-of-n beats majority
b1*|mean@32       |prm       |prm-no-bel     |up  |losing BEL costs
b2 |mean@32       |prm       |prm-no-mie     |up  |losing MIE costs
b3 |mean@32       |prm-no-mie|prm-no-bel     |up  |losing BEL costs more than losing MIE
b4 |steps         |prm       |prm-no-bel     |up  |losing BEL costs in step labels
b5 |steps         |prm       |prm-no-mie     |up  |losing MIE costs in step labels
c1 |other mean@32 |prm       |prm/other majority@32|up|it verifies another model's chains
d1 |first_error   |prm       |prm-no-bel     |up  |BEL helps to find the first error
d2 |first_error   |prm       |prm-no-mie     |up  |MIE helps to find the first error
e1 |bel_cost      |sft       |               |below 0.6|binary search rolls out under 60 % of all prefixes
""")
PAPER = {"sft": "45.7 (URSA-8B, MathVerse)", "prm": "55.0, majority 50.7 (of 32)", "orm": "51.3"}
WAYS = ("majority", *AGGREGATES, "vote", "shortest", "pass")
COLUMNS = {
    "model": {
        "greedy": "{greedy:.1%}",
        "majority of 32": "{majority@32:.1%}",
        "best of 32": "{mean@32:.1%}",
        "weighted vote of 32": "{vote@32:.1%}",
        "other's chains: majority, best": "{other majority@32:.1%} / {other mean@32:.1%}",
        "step labels": "{steps:.1%}",
        "first error": "{first_error:.1%}",
        "AUROC of steps": "{auroc:.3f}",
        "BEL: step labels, first error": "{bel_steps:.1%} / {bel_first:.1%}",
        "BEL as exhaustive search, prefixes": "{as_exhaustive:.1%} / {bel_cost:.0%}",
        "paper": PAPER,
    }
}
POINTS = (1, 2, 4, 8, 16, 32)
OTHERS = {f"other {way}": way for way in ("majority", "mean", "min", "vote", "pass")}
PIVOTS = [("choosing among n", model, WAYS, POINTS) for model in ("prm", "orm")]
PIVOTS += [("choosing among n", "dpo", ("majority", "best", "vote", "pass"), POINTS)]
PIVOTS += [("among n of another model", model, tuple(OTHERS), POINTS) for model in ("prm", "orm")]
JOINT = {
    "PRM, best": ("prm", "mean"),
    "PRM, vote": ("prm", "vote"),
    "ORM, best": ("orm", "mean"),
    "DPO, best": ("dpo", "best"),
    "DPO, vote": ("dpo", "vote"),
    "majority": ("prm", "majority"),
    "pass": ("prm", "pass"),
}


# ---- choosing ------------------------------------------------------------------------------------


def chosen_among(file):
    """{"<way>@<n>": right or not (as a share) of each problem}."""
    sampled = [one for one in read_samples(file) if one.responses]
    sizes = [2**i for i in range(6) if 2**i <= len(sampled[0].responses)]
    [kind] = sampled[0].responses[0].scores
    scores = {how: lambda r, how=how: aggregate(r.step_scores[kind], how) for how in AGGREGATES}
    scores, vote = (scores, "raw vote") if kind != "dpo" else ({"best": lambda r: r.scores["dpo"]}, "vote")
    found = {}
    for way, score in (scores | {"shortest": lambda r: -len(r.text)}).items():
        marked = [
            replace(one, responses=[replace(r, scores={"s": score(r)}) for r in one.responses])
            for one in sampled
        ]
        for n, ways in curves(marked, "s", sizes=sizes).items():
            found[f"{way}@{n}"] = ways["best"]
            if way == next(iter(scores)):  # a vote by the first of the scores, the mean
                found |= {
                    f"majority@{n}": ways["majority"],
                    f"pass@{n}": ways["pass"],
                    f"vote@{n}": ways[vote],
                }
    return found


def all_curves(out, scored, *, seed):
    write_json(out, chosen_among(scored))


def best_score(out, scored, *, seed):
    """{"score": the accuracy of the best of all samples, of DPO of the vote}, which chooses a rate."""
    found = chosen_among(scored)
    n = max(int(name.partition("@")[2]) for name in found)
    values = found.get(f"mean@{n}") or found[f"vote@{n}"]
    write_json(out, {"score": sum(values) / len(values)})


# ---- the experiment ------------------------------------------------------------------------------


def taught(E, task, start):
    """The rows that SFT learns, the teacher's chains that pass the filter, and a line on the others."""
    problems = read_problems(E.data, E.train, limit=start + E.size.taught)[start:]
    chat = teacher.chat(task, [vars(problem) for problem in problems], error_rate=E.size.error_rate)
    made = list(synthesise(problems, task, chat))
    rows = [fields_of(one) for one in made if isinstance(one, Problem)]
    return rows, f"{task}, {len(problems)}: {describe_failures(made) or 'none is refused'}"


def solver(E, name, task="expand", start=0):
    """SFT on the chains that the teacher writes of the problems from `start` on."""
    s, (rows, said) = E.size, taught(E, task, start)
    E.said = [*getattr(E, "said", []), said]
    return E.model(
        name, "train.py", "--no-group-by-length", init=E.init, data=E.write(f"{task}.jsonl", rows),
        eval_split="", steps=s.steps, lr=s.lr, batch_size=s.batch_size, save_every=0,
    )  # fmt: skip


def labels(E, sft):
    """(the SFT model's chains to training problems, labelled by rollouts, misread)."""
    drawn = E.samples("train-samples", sft, n=E.size.k, **E.problems(E.train, E.size.labelled) | FORM)
    return drawn, E.file("bel", label_by_rollouts, drawn, sft), E.file("mie", misread, drawn)


def reward_model(E, name, sft, bel, mie, lrs):
    s, samples = E.size, E.file(f"train-{SOURCES[name]}", training_set, bel, mie, SOURCES[name])
    base = "toy-judge" if E.init == "toy-vision" else sft
    return E.model(
        name, "train.py", task=name.partition("-")[0], init=base, steps=s.reward_steps, train="language",
        batch_size=s.batch_size, save_every=0, samples=samples, grid=dict(lr=lrs),
    )  # fmt: skip


def declare(E):
    s = E.size
    sft, other = solver(E, "sft"), solver(E, "other", "rewrite", s.taught)
    apart, tested = (E.problems(*part) | FORM for part in ((E.validation, s.validation), (E.test, s.test)))
    drawn, bel, mie = labels(E, sft)
    held_out = E.samples("validation-samples", sft, n=s.n, **apart)
    chains = [E.samples("test-samples", model, n=s.n, **tested) for model in (sft, other)]

    def ranks(model, **how):
        """Its rate is chosen by the best of the validation samples, of DPO by the vote (best_score); it ranks
        the test samples, those of full data also the other model's."""
        scored = lambda name, of: E.samples(name, model, verifier=model, samples=of, **how)
        E.choose_by("score", best_score, scored("validation-scored", held_out), of=[model])
        own = scored("scored", chains[0])
        E.read("curves", all_curves, own, of=[model])
        E.read("matched", length_matched, own, of=[model])
        if model.name in ("prm", "orm"):
            at = [n for n in POINTS if n <= s.n]
            others = {f"{name}@{n}": f"{way}@{n}" for name, way in OTHERS.items() for n in at}
            E.read("other", all_curves, scored("scored-other", chains[1]), of=[model], take=others)
        return own

    for name in SOURCES:
        model = reward_model(E, name, sft, bel, mie, s.reward_lrs)
        scored = ranks(model)
        if name != "orm":
            E.read("steps", step_quality, scored, of=[model])
        if name == "prm":
            E.chains = E.file("chains", two_chains, scored)
    dpo = E.model(
        "dpo", "align.py", "--no-reference", init=sft, method="dpo", epochs=1, samples=drawn, save_every=0,
        probe_every=0, grid=dict(lr=s.dpo_lrs),
    )  # fmt: skip
    ranks(dpo, ref=sft)
    E.read("greedy", of=[sft, other], take={"greedy": "correct"}, **tested)
    E.read("bel", bel_quality, bel, sft, drawn, of=[sft])


def extra(E):
    chains = {"chains": read_json(E.path(E.chains, 0))} if hasattr(E, "chains") else {}
    return chains | {"notes": [f"The teacher's chains that were refused: {'; '.join(E.said)}."]}


def draw(results, stem):
    of = {
        name: [cell["metrics"] for cell in results["cells"] if cell["name"] == name]
        for name in ("prm", "orm", "dpo")
    }
    own = [{way: value for way, value in row.items() if not way.startswith("other")} for row in of["prm"]]
    plots.best_of_n(own, f"{stem}_prm.svg")
    joint = [
        {f"{title}@{n.partition('@')[2]}": value for n, value in row.items() if n.partition("@")[0] == way}
        for title, (name, way) in JOINT.items()
        for row in of[name]
    ]
    plots.best_of_n(joint, f"{stem}_curves.svg")
    if results["extra"].get("chains"):
        plots.step_scores(results["extra"]["chains"], f"{stem}_steps.svg")


E = Experiment(
    "ursa",
    "URSA: Unlocking Multimodal Mathematical Reasoning via Process Reward Model (arXiv 2501.04686)",
    SIZES,
    FAST,
    **PICTURES,
)

if __name__ == "__main__":
    E.main(declare, CLAIMS, COLUMNS, pivots=PIVOTS, extra=extra, draw=draw)
