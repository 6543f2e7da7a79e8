"""LLaVA-Reasoner, "Improve Vision Language Model Chain-of-thought Reasoning" (arXiv 2410.16198), on toy
pictures or real ones: the mixes of SFT, and DPO on right and wrong chains.

    python -m minicot.recipes.llava_reasoner             # 3 seeds
    python -m minicot.recipes.llava_reasoner --fast      # a small part of the work, one seed
    python -m minicot.recipes.llava_reasoner --data toy-pictures-long --name llava_long --only both ...
    python -m minicot.recipes.llava_reasoner --data tabmwp:PATH --init LLAVA --name llava_tabmwp \\
        --device cuda --dtype bfloat16 --set lr=2e-5 steps=1000

The path (paper, sections 3 and 4): a noisy teacher writes chains, those that miss the gold answer are dropped
-> SFT mixes from the same base that sees (format only: a small set with both prompts, few passes; that set
and direct answers; and chains; and both; the last three at equal steps, and both once more at equal chains),
each read out with the direct and the CoT prompt -> from "both": 32 chains a question, 0.25 <= share right <=
0.85, at most 3 pairs a question, cut to their first W words, no EOS -> DPO, beta 0.1, summed
log-probabilities, frozen reference, tower and projector frozen.

Controls: whole pairs and other W; RFT on the same right chains; as many pairs of a twin (the CoT mix of
another seed); as many generic pairs (what a picture shows, said rightly and misread: the paper's is RLAIF-V);
pairs of two of the three kinds of picture; whole pairs with AFT's detached constraint. Beside the world's
problems SFT has some of one operation and some whose answer is one number of the picture (the paper's
extraction sets), which a direct answer can reach.

Two judgements, as in the recipe of AFT: each arm of DPO at its own learning rate, all at one ("@one-rate").
"""

import random
import re
from collections import Counter
from dataclasses import replace

from minicot.answers import is_correct
from minicot.config import check
from minicot.data import grade, pairs, render, target
from minicot.recipes.experiment import Experiment, Next
from minicot.recipes.tables import claims
from minicot.records import Problem, Response, Samples, read_jsonl, read_samples, samples_to_row
from minicot.sets import read_problems, style_of
from minicot.toy import base_text, pictures, teacher
from minicot.runs import write_json, write_jsonl

SIZES = {
    "seeds": 3,
    "first_seed": 10,
    "taught": 9000,  # training problems that the teacher answers
    "error_rate": 0.25,  # ... wrongly
    "easy": 1000,  # problems of one operation, and as many of one number to read, that are taught too
    "steps": 500,  # of the direct, CoT and both mixes, alike
    "batch_size": 32,
    "lr": 2e-3,
    "format_rows": 48,  # problems of the format-only mix, each with both prompts
    "format_steps": 9,
    "sampled": 1200,  # training problems that DPO samples
    "k": 32,
    "words": 0.9,  # W, as a share of a chain's mean length
    "other_words": (0.35, 0.5, 0.7),
    "validation": 600,
    "test": 2000,
    "pool": 1000,  # test problems of one kind, and of 8 samples each
    "lrs": (3e-6, 1e-5, 3e-5, 1e-4),
    "one_rate": 1e-4,
}
PICTURES = dict(  # earlier runs looked at the first 1,000 test problems
    data="toy-pictures", init="toy-vision", splits=("train", "validation", "test[1000:3000]")
)
FAST = dict(
    seeds=1, taught=2000, easy=200, steps=60, sampled=100, k=8, validation=100, test=200, pool=50,
    lrs=(1e-5,), one_rate=1e-5,
)  # fmt: skip
MIXES, MODES = ("format", "direct", "cot", "both"), ("direct", "cot")

# Metrics: direct, cot: the prompt, read out greedily; easy: problems of one operation; extraction: one number
# of the picture; tables: pictures with a table; sampled: the CoT prompt at T = 1. Written down before the
# run; k after that of the others and a look at the first seed's validation problems. The interval of 3 seeds
# x 2,000 problems is about 1.5 points to each side, of arms of DPO about 0.7.
CLAIMS = claims("""
a1 |cot           |direct    |format        |within 0.05, cot|direct SFT moves CoT by less than 5 points
a2 |cot           |direct    |cot           |down|... and leaves it below CoT SFT
b1*|cot           |cot       |format        |up  |CoT SFT lifts CoT
b2 |direct        |cot       |format        |up  |CoT SFT also lifts direct
b3 |easy_direct   |cot       |format        |up  |... on problems of one operation
b4 |extraction_direct|cot    |format        |up  |... on numbers to read
c1 |direct+cot    |both      |direct        |up  |both beat direct over the two prompts, at equal steps
c2 |direct+cot    |both      |cot           |up  |both beat CoT over the two prompts, at equal steps
c3*|direct+cot    |both-twice|cot           |up  |... at equal chains
c4 |cot           |both-twice|cot           |up  |... on the CoT prompt alone
d1*|cot           |dpo       |both          |up  |DPO on own chains lifts CoT
d2*|cot           |dpo       |dpo-generic   |up  |... more than generic pairs
d3 |cot           |dpo       |dpo-off-policy|up  |... more than a twin's pairs
d4 |cot           |dpo       |rft           |level 0.006, both|... and is level with RFT on its right chains
d5 |sampled       |dpo       |both          |up  |DPO lifts the chains that are sampled, at T = 1
d6 |sampled       |dpo       |dpo-generic   |up  |... more than generic pairs
d7 |sampled       |dpo       |rft           |up  |... more than RFT on the same right chains
d8 |tables_cot    |dpo-domain|both          |up  |DPO on rows and bars lifts tables
d9 |easy_direct   |rft       |both          |down|RFT harms direct answers (one operation)
f1*|cot           |dpo       |dpo-uncut     |up  |cut pairs beat whole ones
f2 |sampled       |dpo       |dpo-uncut     |up  |... on sampled chains
f3 |cot           |dpo-w0.35 |dpo-uncut     |up  |... W at 0.35 of the mean length
f4 |cot           |dpo-w0.5  |dpo-uncut     |up  |... at 0.5
f5 |cot           |dpo-w0.7  |dpo-uncut     |up  |... at 0.7
g1 |cot           |blind     |commonest     |within 0.02, both|without the picture, as the commonest answer
h1 |extraction_cot|both|both/extraction_direct|down|CoT lies below direct where a number is to be read
k1 |cot           |dpo-detached|dpo-uncut   |up  |AFT's detached constraint makes DPO on whole pairs better
k2 |cot           |dpo-detached|both        |up  |... and lifts CoT
k3 |cot           |dpo-detached|rft         |up  |... more than RFT
k4 |sampled       |dpo-detached|rft         |up  |... on sampled chains
""")
PAPER = {
    "format": "65.5 / 62.7",
    "direct": "71.1 / 65.6",
    "cot": "69.7 / 73.2",
    "both": "72.8 / 74.4",
    "dpo-generic": "73.0 / 74.6",
    "dpo": "73.0 / 75.3",
}  # average over its 8 sets
COLUMNS = {
    "model": {
        "direct prompt": "{direct:.1%}",
        "CoT prompt": "{cot:.1%}",
        "CoT over both [95 %]": ("cot", "both"),
        "CoT, sampled (T = 1)": "{sampled:.1%}",
        "one operation: direct, CoT": "{easy_direct:.1%} / {easy_cot:.1%}",
        "one number: direct, CoT": "{extraction_direct:.1%} / {extraction_cot:.1%}",
        "tables": "{tables_cot:.1%}",
        "no answer (CoT)": "{cot_missing:.1%}",
        "paper: direct, CoT": PAPER,
    }
}


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


def write_pairs(out, chosen):
    """A row a pair, each a problem of its own."""
    write_jsonl(
        out,
        (
            samples_to_row(replace(two, problem=replace(two.problem, id=f"{two.problem.id}/{i}")))
            for i, two in enumerate(chosen)
        ),
    )


def as_many_pairs(out, own, other, which, *, seed):
    """At most 3 right x wrong pairs a question of "own" or "other" samples, as many as both sides have."""
    found = {
        name: pairs(read_samples(file), max_pairs=3, window=(0.25, 0.85), seed=seed)
        for name, file in (("own", own), ("other", other))
    }
    write_pairs(out, random.Random(f"{which} {seed}").sample(found[which], min(map(len, found.values()))))


def generic_pairs(out, own, *, seed):
    """As many pairs as `own` has, that prefer what a picture shows, as RLAIF-V's do: a reading of one thing
    or a caption of all; the rejected one says one number wrongly."""
    n, rng, made = sum(1 for _ in read_jsonl(own)), random.Random(f"generic {seed}"), []
    rows = pictures.reading_rows("train", n - n // 2, start=9000)
    for row in rows + base_text.caption_rows("train", n // 2, start=12_000):
        said = rng.choice(list(re.finditer(r"\d+", row["solution"])))
        wrong = str(max(1, int(said[0]) + rng.choice((-2, -1, 1, 2))))
        misread = row["solution"][: said.start()] + wrong + row["solution"][said.end() :]
        both = [Response(row["solution"], True), Response(misread, False)]
        made += [samples_to_row(Samples(Problem(row["id"], row["question"], image=row["image"]), both))]
    write_jsonl(out, made)


def without_tables(out, own, *, seed):
    """The pairs of rows and bars."""
    write_jsonl(out, (row for _, row in read_jsonl(own) if not row["id"].startswith("table")))


def commonest(out, train, test, *, seed):
    """{"cot": right or not of each test problem}, for the commonest answer of training."""
    [(answer, _)] = Counter(problem.answer for problem in read_problems(str(train))).most_common(1)
    write_json(out, {"cot": [is_correct(answer, problem.answer) for problem in read_problems(str(test))]})


# ---- the experiment ------------------------------------------------------------------------------


def both_mix(E, taught, name="both", steps=None):
    """A model of an SFT mix: "format", "direct", "cot", "both"; "both-twice" for twice as many steps."""
    s, mix = E.size, name.partition("-")[0]
    rows = mix_rows(mix, taught, s.format_rows)
    return E.model(
        name, "train.py", "--no-group-by-length", init=E.init, data=E.write(f"mix-{mix}.jsonl", rows),
        mode="plain", steps=steps or s.steps, lr=s.lr, batch_size=s.batch_size, save_every=0,
    )  # fmt: skip


def all_taught(E):
    """What teach gives, and on toy pictures the easy problems among it, in mixed order; sets E.words."""
    taught, E.counts = teach(E)
    mean = sum(len(problem.solution.split(" ")) for problem in taught) / len(taught)
    E.words = {share: round(share * mean) for share in (E.size.words, *E.size.other_words)}
    if E.toy:
        easy = pictures.rows("train", E.size.easy, difficulty=1)
        easy += pictures.perception_rows("train", E.size.easy)
        taught += read_problems(str(E.write("easy.jsonl", easy)))
        random.Random("mixed").shuffle(taught)
    return taught


def declare(E):
    s, taught = E.size, all_taught(E)
    steps = {"format": s.format_steps, "both-twice": 2 * s.steps}
    mix = {name: both_mix(E, taught, name, steps.get(name)) for name in (*MIXES, "both-twice")}
    both, words = mix["both"], E.words[s.words]
    drawn = {
        name: E.samples("train-samples", mix[name], n=s.k, **E.problems(E.train, s.sampled))
        for name in ("both", "cot")
    }
    two = (drawn["both"], Next(drawn["cot"]))
    E.own_pairs, other = (E.file(f"pairs-{which}", as_many_pairs, *two, which) for which in ("own", "other"))
    arms = {
        "dpo": (E.own_pairs, words),
        "dpo-uncut": (E.own_pairs, None),
        "dpo-off-policy": (other, words),
        "dpo-detached": (E.own_pairs, None),
        "rft": (E.own_pairs, None),
    }
    if E.toy:
        arms["dpo-generic"] = E.file("pairs-generic", generic_pairs, E.own_pairs), words
        arms["dpo-domain"] = E.file("pairs-domain", without_tables, E.own_pairs), words
    arms |= {f"dpo-w{share:g}": (E.own_pairs, E.words[share]) for share in s.other_words}
    aligned = {
        name + ending: E.model(
            name + ending, "align.py", "--no-reference", init=both, method=name.partition("-")[0], epochs=1,
            samples=samples, pair_low=0, pair_high=1, truncate_words=cut, save_every=0, probe_every=0,
            constraint="detached" if name == "dpo-detached" else None, grid=dict(lr=lrs),
        )
        for name, (samples, cut) in arms.items()
        for ending, lrs in (("", s.lrs), ("@one-rate", (s.one_rate,)))
    }  # fmt: skip
    seeing, blind = list(E.models), E.alias("blind", both)

    E.choose_by("metrics.accuracy", **E.problems(E.validation, s.validation))
    tested = E.problems(E.test, s.test)
    for mode in MODES:
        taken = {mode: "correct", f"{mode}_missing": "metrics.missing_answers"}
        for models, *switches in ((seeing,), ([blind], "--evaluate", "--blind")):
            E.read(mode, *switches, of=models, mode=mode, take=taken, **tested)
    E.read(
        "sampled", n=8, take={"sampled": "right"}, of=[both, *aligned.values()], **E.problems(E.test, s.pool)
    )
    if not E.toy:
        return
    answers = E.problems(E.train, s.taught)["data"], tested["data"]
    E.read("commonest", commonest, *answers, of=[E.alias("commonest", both)])
    parts = {
        "easy": pictures.rows("test", s.pool, difficulty=1),
        "extraction": pictures.perception_rows("test", s.pool),
        "tables": pictures.rows("test", s.pool, kind="table"),
    }
    for part, rows in parts.items():
        data = E.write(f"test-{part}.jsonl", rows)
        for mode in MODES:
            E.read(
                f"{part}-{mode}", data=data, mode=mode, max_new_tokens=96,
                of=[*mix.values(), aligned["dpo"], aligned["rft"], aligned["dpo-domain"]],
                take={f"{part}_{mode}": "correct"},
            )  # fmt: skip


def extra(E):
    count = lambda seed: sum(1 for _ in read_jsonl(E.path(E.own_pairs, seed)))
    return {"teacher": E.counts, "words": E.words, "pairs": [count(seed) for seed in range(E.size.seeds)]}


E = Experiment(
    "llava_reasoner",
    "LLaVA-Reasoner: Improve Vision Language Model Chain-of-thought Reasoning (arXiv 2410.16198)",
    SIZES,
    FAST,
    **PICTURES,
)

if __name__ == "__main__":
    E.main(declare, CLAIMS, COLUMNS, extra=extra)
