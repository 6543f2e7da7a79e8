"""LLaVA-Reasoner, "Improve Vision Language Model Chain-of-thought Reasoning" (arXiv 2410.16198), on toy
pictures or real ones.

    python -m minicot.recipes.llava_reasoner             # 3 seeds, 70 minutes on two CPU cores
    python -m minicot.recipes.llava_reasoner --fast      # a small part of the work, one seed
    python -m minicot.recipes.llava_reasoner --data tabmwp:PATH --init LLAVA --name llava_tabmwp \\
        --device cuda --dtype bfloat16 --set lr=2e-5 steps=1000

The path (paper, sections 3 and 4): a noisy teacher writes chains, those that miss the gold answer are dropped
-> four SFT mixes from the same base that sees (format only: a small set with both prompts, few passes; that
set and direct answers; and chains; and both; the last three at equal steps), each read out with the direct
and the CoT prompt -> from "both": 32 chains a question, 0.25 <= share right <= 0.85, at most 3 pairs a
question, cut to their first W words, no EOS -> DPO, beta 0.1, summed log-probabilities, frozen reference,
tower and projector frozen. Controls: whole pairs; RFT on the same right chains; as many pairs of another
model (the CoT mix of another seed) as generic preference data. Then the DPO model ranks 32 samples a question
(best-of-n, weighted vote against majority).
"""

import random
from dataclasses import replace

from minicot import plots
from minicot.answers import split_steps
from minicot.config import check
from minicot.data import grade, pairs, render, target
from minicot.metrics import mean_interval, paired_difference
from minicot.recipes.experiment import Experiment, Next
from minicot.recipes.tables import claims
from minicot.records import read_jsonl, read_samples, samples_to_row
from minicot.sets import read_problems, style_of
from minicot.toy import pictures, teacher
from minicot.runs import write_json, write_jsonl
from minicot.verifier import curves, step_sums

SIZES = {
    "seeds": 3,
    "taught": 9000,  # training problems that the teacher answers
    "error_rate": 0.25,  # ... wrongly
    "steps": 500,  # of the direct, CoT and both mixes, alike
    "batch_size": 32,
    "lr": 2e-3,
    "format_rows": 48,  # problems of the format-only mix, each with both prompts
    "format_steps": 9,
    "sampled": 1200,  # training problems that DPO samples
    "k": 32,
    "validation": 300,
    "test": 1000,
    "pool": 300,  # test problems of the verifier
    "lrs": (3e-6, 1e-5, 3e-5, 1e-4),
}
FAST = dict(seeds=1, taught=2000, steps=60, sampled=100, k=8, validation=100, test=200, pool=50, lrs=(1e-5,))
MIXES, MODES = ("format", "direct", "cot", "both"), ("direct", "cot")
METHODS = ("dpo-off-policy", "dpo-uncut", "dpo", "rft")

# Metrics: direct, cot: the prompt, read out greedily; sampled: the CoT prompt at T = 1; <way>@<n>: a way of
# choosing among n samples. Written down before the run; d4 to d6 and f2 after a look at the first seed on
# validation problems, where samples rose.
CLAIMS = claims("""
a1|cot        |direct|format        |within 0.05, cot|direct SFT moves CoT by less than 5 points
a2|cot        |direct|cot           |down      |... and leaves it below CoT SFT
b1|cot        |cot   |format        |up        |CoT SFT lifts CoT
b2|direct     |cot   |format        |up        |CoT SFT also lifts direct
c1|direct+cot |both  |direct        |up        |both beat direct over the two prompts, at equal steps
c2|direct+cot |both  |cot           |up        |both beat CoT over the two prompts, at equal steps
d1|cot        |dpo   |both          |up        |DPO on own chains lifts CoT
d2|cot        |dpo   |dpo-off-policy|up        |... more than another model's pairs
d3|cot        |dpo   |rft           |level 0.006, both|... and is level with RFT on its right chains
e1|vote@32    |dpo   |dpo/majority@32|up        |weighted vote by the log-ratio beats majority
e2|best@32    |dpo   |dpo/majority@32|up        |best-of-n by the log-ratio beats majority
e3|cut vote@32|dpo   |dpo/majority@32|up        |weighted vote by the first words' log-ratio beats majority
e4|cut best@32|dpo   |dpo/majority@32|up        |best-of-n by the first words' log-ratio beats majority
f1|cot        |dpo   |dpo-uncut     |up        |cut pairs beat whole ones
d4|sampled    |dpo   |both          |up        |DPO lifts the chains that are sampled, at T = 1
d5|sampled    |dpo   |dpo-off-policy|up        |... more than another model's pairs
d6|sampled    |dpo   |rft           |up        |... more than RFT on the same right chains
f2|sampled    |dpo   |dpo-uncut     |up        |... and cut pairs more than whole ones
g1|cot        |blind |              |below 0.15|without the picture, accuracy falls to the text prior (< 15 %)
""")
PAPER = {
    "format": "65.5 / 62.7",
    "direct": "71.1 / 65.6",
    "cot": "69.7 / 73.2",
    "both": "72.8 / 74.4",
    "dpo-off-policy": "73.0 / 74.6",
    "dpo": "73.0 / 75.3",
}  # average over its 8 sets
COLUMNS = {
    "model": {
        "direct prompt": "{direct:.1%}",
        "CoT prompt": "{cot:.1%}",
        "CoT over both [95 %]": ("cot", "both"),
        "CoT, sampled (T = 1)": "{sampled:.1%}",
        "no answer (CoT)": "{cot_missing:.1%}",
        "paper: direct, CoT": PAPER,
    }
}
PIVOTS = [
    (
        "choosing among n",
        "dpo",
        ("majority", "best", "vote", "sigmoid vote", "raw vote", "pass", "cut best", "cut vote"),
        (1, 2, 4, 8, 16, 32),
    )
]


# ---- data ----------------------------------------------------------------------------------------


def teach(E):
    """The problems with the chains that SFT learns, and of each kind of chain how many were kept and dropped.
    On toy pictures a teacher writes them, and those that miss the gold answer are dropped; other data brings
    its own."""
    taught, counts = [], {}
    for problem in read_problems(E.data, E.train, limit=E.size.taught):
        told = {"solution": problem.solution, "kind": "own"}
        if E.toy:
            told = teacher.teach(vars(problem), random.Random(f"teacher {problem.id}"), E.size.error_rate)
        _, right = grade(problem, told["solution"] or "", mode="cot", style=style_of(E.data))
        taught += [replace(problem, solution=told["solution"])] if right else []
        counts.setdefault(told["kind"], [0, 0])[0 if right else 1] += 1
    check(taught, "--data", E.data, "problems with a solution that ends in the gold answer")
    return taught, counts


def mix_rows(name, taught, few):
    """The SFT rows of a mix, each prompt's last line within its question: the first `few` problems with both
    prompts, which is the format-only mix and part of the others, and all problems with the mix's own."""
    own, rows = {"format": (), "both": MODES}.get(name, (name,)), []
    for place, problem in enumerate(taught):
        picture = {"image": problem.image, "image_root": problem.image_root}
        for mode in MODES if place < few else own:
            texts = {"question": render(problem, mode), "solution": target(problem, mode)}
            rows.append({"id": f"{problem.id}/{mode}", **texts, **picture})
    return rows


def as_many_pairs(out, own, other, which, *, seed):
    """At most 3 right x wrong pairs a question of "own" or "other" samples, as many as both sides have."""
    found = {
        name: pairs(read_samples(file), max_pairs=3, window=(0.25, 0.85), seed=seed)
        for name, file in (("own", own), ("other", other))
    }
    chosen = random.Random(f"{which} {seed}").sample(found[which], min(map(len, found.values())))
    of_pair = lambda two, i: replace(two, problem=replace(two.problem, id=f"{two.problem.id}/{i}"))
    write_jsonl(out, (samples_to_row(of_pair(two, i)) for i, two in enumerate(chosen)))


# ---- the verifier --------------------------------------------------------------------------------


def all_curves(out, scored, *, seed):
    """{"<way>@<n>": right or not of each problem that has responses}; "cut" are the ways by the log-ratio of
    the first words."""
    samples, found = [one for one in read_samples(scored) if one.responses], {}
    sizes = [2**i for i in range(6) if 2**i <= len(samples[0].responses)]
    whole, cut = (curves(samples, name, sizes=sizes) for name in ("dpo", "dpo-cut"))
    for n in sizes:
        found |= {f"{way}@{n}": shares for way, shares in whole[n].items()}
        found |= {f"cut {way}@{n}": cut[n][way] for way in ("best", "vote")}
    write_json(out, found)


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
    s = E.size
    taught, E.counts = teach(E)
    E.words = round(0.9 * sum(len(problem.solution.split(" ")) for problem in taught) / len(taught))
    mix = {}
    for name in MIXES:
        rows, steps = mix_rows(name, taught, s.format_rows), s.format_steps if name == "format" else s.steps
        mix[name] = E.model(
            name, "train.py", "--no-group-by-length", init=E.init, data=E.write(f"mix-{name}.jsonl", rows),
            mode="plain", steps=steps, lr=s.lr, batch_size=s.batch_size, save_every=0,
        )  # fmt: skip
    both = mix["both"]
    drawn = {
        name: E.samples("train-samples", mix[name], split=E.train, limit=s.sampled, n=s.k)
        for name in ("both", "cot")
    }
    two = (drawn["both"], Next(drawn["cot"]))
    E.own_pairs, other = (E.file(f"pairs-{which}", as_many_pairs, *two, which) for which in ("own", "other"))
    aligned = {
        name: E.model(
            name, "align.py", "--no-reference", init=both, method=name.partition("-")[0], epochs=1,
            samples=other if name == "dpo-off-policy" else E.own_pairs, pair_low=0, pair_high=1, save_every=0,
            truncate_words=None if name in ("dpo-uncut", "rft") else E.words, probe_every=0,
            grid=dict(lr=s.lrs),
        )
        for name in METHODS
    }  # fmt: skip
    seeing, blind, dpo = list(E.models), E.alias("blind", both), aligned["dpo"]

    E.choose_by("metrics.accuracy", split=E.validation, limit=s.validation)
    for mode in MODES:
        taken = {mode: "correct", f"{mode}_missing": "metrics.missing_answers"}
        for models, *switches in ((seeing,), ([blind], "--evaluate", "--blind")):
            E.read(mode, *switches, of=models, mode=mode, split=E.test, limit=s.test, take=taken)
    E.read(
        "sampled", of=[both, *aligned.values()], split=E.test, limit=s.pool, n=8, take={"sampled": "right"}
    )

    chains = E.samples("test-samples", both, split=E.test, limit=s.pool, n=s.k)
    whole = E.samples("scored", dpo, "--token-scores", verifier=dpo, ref=both, samples=chains)
    cut = E.samples("scored-cut", dpo, verifier=dpo, ref=both, samples=whole, truncate_words=E.words)
    E.read("curves", all_curves, cut, of=[dpo])
    E.wrong = E.file("wrong-chains", wrong_chains, whole)


def extra(E):
    lines = lambda cell: [[row for _, row in read_jsonl(E.path(cell, s))] for s in range(E.size.seeds)]
    more = {"teacher": E.counts, "words": E.words, "pairs": [len(rows) for rows in lines(E.own_pairs)]}
    chains = lines(E.wrong) if E.toy and not E.args.only else [[]]
    most = min(100, *map(len, chains))  # an interval takes as many of each seed
    if not most:
        return more
    hits, chances = (
        [[one[key] for one in of_seed[:most]] for of_seed in chains] for key in ("hit", "chance")
    )
    judged = mean_interval(hits), mean_interval(chances), paired_difference(chances, hits)
    shares = (f"{share:.1%} [{low:.1%}, {high:.1%}]" for share, low, high in judged)
    said = (
        "The lowest log-ratio of a wrong chain's steps is at its first wrong one: {}; by chance {}; more {}."
    )
    return more | {"chain": chains[0][0], "notes": [said.format(*shares)]}


def draw(results, stem):
    plots.best_of_n([cell["metrics"] for cell in results["cells"]], f"{stem}_verifier.svg")
    if "chain" in results["extra"]:
        plots.log_ratios_along(results["extra"]["chain"], f"{stem}_chain.svg")


E = Experiment(
    "llava_reasoner",
    "LLaVA-Reasoner: Improve Vision Language Model Chain-of-thought Reasoning (arXiv 2410.16198)",
    SIZES,
    FAST,
    data="toy-pictures",
    init="toy-vision",
)

if __name__ == "__main__":
    E.main(declare, CLAIMS, COLUMNS, pivots=PIVOTS, extra=extra, draw=draw)
