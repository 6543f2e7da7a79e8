"""LLaVA-Reasoner (arXiv 2410.16198), section 4.3: the DPO model as a verifier.

    python -m minicot.recipes.llava_verifier             # 3 seeds
    python -m minicot.recipes.llava_verifier --fast      # a small part of the work, one seed

From the SFT model "both", which the recipe llava_reasoner leaves (or which is made there): DPO on its own
chains, whole, at the rate and beta whose weighted vote answers most validation problems rightly. Then a
second round from there, at the same setting: the rejected chains are the wrong ones that the first round's
log-ratio puts highest. Each ranks n samples a test problem, drawn from "both" at temperature 0.7. Controls: a
model of as many generic pairs (what a picture shows); a quarter of the pairs, and up to 9 a question for 3,
each in one pass.

A chain's score is made of its tokens' log-ratios to "both": their sum, their mean, or the sum after each is
clipped to +-1. Score and weight of the vote (exp(beta r)) are chosen by the vote on validation problems too.
"""

import random
from dataclasses import replace

from minicot import plots
from minicot.answers import split_steps
from minicot.data import distinct, pairs
from minicot.metrics import mean_interval, paired_difference
from minicot.recipes import llava_reasoner
from minicot.recipes.experiment import Experiment
from minicot.recipes.tables import claims
from minicot.records import read_jsonl, read_samples, samples_to_row
from minicot.runs import write_json, write_jsonl
from minicot.toy import pictures
from minicot.verifier import curves, step_sums
from minicot.weights import read_json

SIZES = llava_reasoner.SIZES | {
    "n": 16,  # samples a problem that are chosen among
    "temperature": 0.7,
    "lrs": (1e-5, 3e-5, 1e-4),
    "betas": (0.1, 0.5),
}
FAST = llava_reasoner.FAST | {"n": 4, "betas": (0.1,)}
SCORES = {
    "sum": sum,
    "mean": lambda ratios: sum(ratios) / max(1, len(ratios)),
    "clipped": lambda ratios: sum(max(-1.0, min(1.0, ratio)) for ratio in ratios),
}
BETAS = (0.1, 0.3, 1, 3, 10, 30)  # of the vote
WAYS = ("majority", "best", "best repeated", "vote", "pass")

# Metrics: <way>@<n>: a way of choosing among n samples; greedy: one greedy answer. Written down before the
# run, h after that of the others. The interval of 3 seeds x 2,000 problems is about 1 point to each side.
CLAIMS = claims("""
e1*|vote@16         |dpo  |dpo/majority@16|up|weighted vote by the log-ratio beats majority
e2 |best@16         |dpo  |dpo/majority@16|up|best-of-n by the log-ratio beats majority
e3 |best repeated@16|dpo  |dpo/majority@16|up|best-of-n among answers given twice beats majority
e4 |vote@16         |dpo  |dpo/greedy     |up|weighted vote beats DPO's own greedy answer
e5 |vote@4          |dpo  |dpo/majority@4 |up|with 4 samples, weighted vote beats majority
e6 |vote@16         |dpo-2|dpo            |up|a second round on the highest wrong chains lifts the vote
e7 |best@16         |dpo-2|dpo            |up|... and best-of-n
e8*|vote@16         |dpo  |dpo-generic    |up|own chains make a better verifier than generic pairs
e9 |greedy          |dpo-2|dpo            |up|the second round lifts the greedy answer
h1 |vote@16         |dpo  |dpo-quarter    |up|more pairs make a better verifier: all over a quarter, the vote
h2 |best@16         |dpo  |dpo-quarter    |up|... and best-of-n
h3 |vote@16         |dpo-thrice|dpo       |up|... up to 9 a question over 3, the vote
h4 |best@16         |dpo-thrice|dpo       |up|... and best-of-n
""")
COLUMNS = {
    "model": {
        "greedy": "{greedy:.1%}",
        "majority of 16": "{majority@16:.1%}",
        "best of 16": "{best@16:.1%}",
        "best of answers given twice": "{best repeated@16:.1%}",
        "weighted vote of 16": "{vote@16:.1%}",
        "pass@16": "{pass@16:.1%}",
    }
}
PIVOTS = [("choosing among n", model, WAYS, (1, 2, 4, 8, 16)) for model in ("dpo", "dpo-2")]


# ---- pairs and scores ----------------------------------------------------------------------------


def hardest_pairs(out, scored, *, seed):
    """At most 3 pairs a question with 0.25 <= share right <= 0.85: the wrong chains of the highest scores,
    each with a right one that is drawn."""
    made = []
    for samples in read_samples(scored):
        share = sum(one.correct for one in samples.responses) / max(1, len(samples.responses))
        rng, responses = random.Random(f"{seed} {samples.problem.id}"), distinct(samples.responses)
        wrong = sorted((one for one in responses if not one.correct), key=lambda one: -one.scores["dpo"])
        for i, rejected in enumerate(wrong[:3] if 0.25 <= share <= 0.85 else ()):
            chosen = rng.choice([one for one in responses if one.correct])
            problem = replace(samples.problem, id=f"{samples.problem.id}/{i}")
            made.append(samples_to_row(replace(samples, problem=problem, responses=[chosen, rejected])))
    write_jsonl(out, made)


def a_quarter(out, all_pairs, *, seed):
    """A quarter of the pairs, drawn."""
    rows = [row for _, row in read_jsonl(all_pairs)]
    write_jsonl(out, random.Random(f"quarter {seed}").sample(rows, len(rows) // 4))


def more_pairs(out, samples, *, seed):
    """At most 9 pairs a question, of the same window."""
    found = pairs(read_samples(samples), max_pairs=9, window=(0.25, 0.85), seed=seed)
    llava_reasoner.write_pairs(out, found)


def scored_by(sampled, score):
    """The Samples that have responses; their score "dpo" is made of tokens' log-ratios, by one of SCORES."""
    found = []
    for samples in filter(lambda one: one.responses, sampled):
        made = [replace(r, scores={"dpo": SCORES[score](r.token_scores["dpo"])}) for r in samples.responses]
        found.append(replace(samples, responses=made))
    return found


def choose_score(out, validation, *, seed):
    """The score and the vote's beta whose vote of all samples answers most problems rightly: {"score": its
    accuracy, "by": the score, "beta"}; the first of equals."""
    best, drawn = {"score": -1.0}, read_samples(validation)
    for by in SCORES:
        sampled = scored_by(drawn, by)
        n = len(sampled[0].responses)
        for beta in BETAS:
            [ways] = curves(sampled, "dpo", beta=beta, sizes=(n,)).values()
            found = {"score": sum(ways["vote"]) / len(sampled), "by": by, "beta": beta}
            best = max(best, found, key=lambda one: one["score"])
    write_json(out, best)


def all_curves(out, chosen, test, *, seed):
    """{"<way>@<n>": right or not (as a share) of each problem}, by the score and beta that were chosen."""
    how = read_json(chosen)
    sampled = scored_by(read_samples(test), how["by"])
    sizes = [2**i for i in range(6) if 2**i <= len(sampled[0].responses)]
    found = curves(sampled, "dpo", beta=how["beta"], sizes=sizes)
    write_json(out, {f"{way}@{n}": found[n][way] for n in sizes for way in WAYS})


def wrong_chains(out, scored, *, seed):
    """Of each question the first sampled chain that begins rightly and ends wrong, and where the log-ratio
    puts the blame: {tokens, ratios, wrong: place of the first wrong step, hit: has it the lowest sum of all
    steps?, chance: of that} a line."""
    chains = []
    for samples in read_samples(scored):
        label = lambda one: pictures.label_steps(samples.problem.id, split_steps(one.text))
        wrong = ((one, label(one)) for one in samples.responses if not one.correct)
        for one, labels in (pair for pair in wrong if pair[1][:1] == [True] and False in pair[1]):
            place, chain = labels.index(False), {"tokens": one.tokens, "ratios": one.token_scores["dpo"]}
            sums = step_sums(*chain.values())[: len(labels)]
            hit = float(sums.index(min(sums)) == place)
            chains += [{**chain, "wrong": place, "hit": hit, "chance": 1 / len(labels)}]
            break
    write_jsonl(out, chains)


# ---- the experiment ------------------------------------------------------------------------------


def declare(E):
    s, sizes = E.size, (llava_reasoner.SIZES, llava_reasoner.FAST)
    home = Experiment("llava_reasoner", "", *sizes, **llava_reasoner.PICTURES)
    both = E.borrow(home, llava_reasoner.declare, ())["both"]
    drawn = E.samples("train-samples", both, n=s.k, **home.problems(E.train, s.sampled))
    drawing = dict(n=s.n, temperature=s.temperature)
    chains, apart = (
        E.samples(f"{split}-samples", both, **drawing, **E.problems(part, limit))
        for split, part, limit in (("test", E.test, s.test), ("validation", E.validation, s.validation))
    )
    grid = dict(grid=dict(lr=s.lrs, beta=s.betas))

    def align(name, init, samples, setting):
        model = E.model(
            name, "align.py", "--no-reference", init=init, ref=both, method="dpo", epochs=1, samples=samples,
            pair_low=0, pair_high=1, save_every=0, probe_every=0, **setting,
        )  # fmt: skip
        score = dict(verifier=model, ref=both)
        judged, tested = (
            E.samples(f"{one.name}-scored", model, "--token-scores", samples=one, **score)
            for one in (apart, chains)
        )
        chosen = E.file("chosen", choose_score, judged)
        E.choose_by("score", choose_score, judged, of=[model])
        E.read("curves", all_curves, chosen, tested, of=[model])
        return model, chosen, tested, E.samples("train-scored", model, samples=drawn, **score)

    own = E.file("pairs", llava_reasoner.as_many_pairs, drawn, drawn, "own")
    dpo, E.how, tested, ranked = align("dpo", both, own, grid)
    same = dict(at=(dpo, "lr", "beta"))
    align("dpo-2", dpo, E.file("hardest", hardest_pairs, ranked), same)
    align("dpo-generic", both, E.file("pairs-generic", llava_reasoner.generic_pairs, own), grid)
    E.counted = {
        "dpo-quarter": E.file("pairs-quarter", a_quarter, own),
        "dpo": own,
        "dpo-thrice": E.file("pairs-thrice", more_pairs, drawn),
    }
    for name, samples in E.counted.items():
        if name != "dpo":
            align(name, both, samples, same)
    E.wrong = E.file("wrong-chains", wrong_chains, tested)
    E.read("greedy", take={"greedy": "correct"}, **E.problems(E.test, s.test))


def extra(E):
    seeds = range(E.size.seeds)
    hows = [read_json(E.path(E.how, seed)) for seed in seeds]
    notes = [
        "Chosen for dpo: " + "; ".join(f"{how['by']}, vote's beta {how['beta']:g}" for how in hows) + "."
    ]
    count = lambda cell: [str(sum(1 for _ in read_jsonl(E.path(cell, seed)))) for seed in seeds]
    notes += [
        "Pairs: " + "; ".join(f"{name} {', '.join(count(E.counted[name]))}" for name in E.counted) + "."
    ]
    chains = [[row for _, row in read_jsonl(E.path(E.wrong, seed))] for seed in seeds]
    most = min(100, *map(len, chains))  # an interval takes as many of each seed
    if not most:
        return {"notes": notes}
    hits, chances = (
        [[one[key] for one in of_seed[:most]] for of_seed in chains] for key in ("hit", "chance")
    )
    judged = mean_interval(hits), mean_interval(chances), paired_difference(chances, hits)
    shares = (f"{share:.1%} [{low:.1%}, {high:.1%}]" for share, low, high in judged)
    said = (
        "The lowest log-ratio of a wrong chain's steps is at its first wrong one: {}; by chance {}; more {}."
    )
    return {"chain": chains[0][0], "notes": [*notes, said.format(*shares)]}


def draw(results, stem):
    rows = [cell["metrics"] for cell in results["cells"] if cell["name"] == "dpo"]
    plots.best_of_n(rows, f"{stem}_curves.svg")
    if "chain" in results["extra"]:
        plots.log_ratios_along(results["extra"]["chain"], f"{stem}_chain.svg")


E = Experiment(
    "llava_verifier",
    "LLaVA-Reasoner's verifier: Improve Vision Language Model Chain-of-thought Reasoning (arXiv 2410.16198)",
    SIZES,
    FAST,
    **llava_reasoner.PICTURES,
)

if __name__ == "__main__":
    E.main(declare, CLAIMS, COLUMNS, pivots=PIVOTS, extra=extra, draw=draw)
