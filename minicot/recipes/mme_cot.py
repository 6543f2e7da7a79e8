"""MME-CoT, "Benchmarking Chain-of-Thought in Large Multimodal Models for Reasoning Quality, Robustness, and
Efficiency" (arXiv 2502.09621), on toy pictures: the quality of chains, not of answers alone.

    python -m minicot.recipes.mme_cot             # 3 seeds, from the folders that llava_reasoner left
    python -m minicot.recipes.mme_cot --fast      # a small part of the work, one seed

The benchmark: pictures with questions that compute (Reasoning) and that ask for one number (Perception), with
key steps and captions from the scene. Every model answers with the CoT and the direct prompt, greedily; a
judge that knows the scene replies in the official schemas; minicot/mme_cot scores its replies.

Models of the recipe llava_reasoner, trained in its folders where absent: format (the base: a few steps, so
that it answers in format), direct, cot, both, dpo. From "both", as dpo: aft, on dpo's own pairs (of the model
that drew them, which is not "cot", so that the loss alone differs from DPO's; AFT's SFT term, which wants
written solutions, is left out), and grpo, on rollouts of its own. From "cot", on equal problems for equal
steps: plain (more chains as before), reflect (one step of a chain is thought over: half of the time it is
wrong at first, then put right) and recheck (it is right, and said again).

The judge, the prompts and the sizes are the toy's; values and formulas are the official ones. A claim
compares numbers of single questions whose mean is the official number: accuracies, mean scores of the files
that have one, and F1, a ratio of means, linearised (see f1_values).
"""

import itertools
import random
import re
import tempfile
from statistics import mean

from minicot import plots
from minicot.config import check
from minicot.metrics import ratio_values
from minicot.mme_cot.judge import make_cache
from minicot.mme_cot.questions import METRICS, read_dataset, read_predictions
from minicot.mme_cot.scoring import coverage_of, headline, read_cache, tables
from minicot.recipes import llava_reasoner
from minicot.recipes.experiment import Experiment
from minicot.recipes.tables import claims, markdown
from minicot.records import read_samples
from minicot.runs import write_json
from minicot.toy import benchmark, pictures

SIZES = {
    "seeds": 3,
    "first_seed": 10,
    "skipped": 1000,  # test pictures before those of the questions: earlier runs looked at them
    "reasoning": 600,  # questions
    "perception": 400,
    "chains": 3200,  # of plain, reflect and recheck, each once
    "chains_lr": 1e-3,
    "batch_size": 32,
    "lrs": (1e-5, 3e-5, 1e-4),  # of AFT and GRPO
    "margin": 0.1,  # of AFT's boundary
    "asked": 1200,  # training problems of GRPO, those of DPO
    "grpo_steps": 40,
    "grpo_batch": 16,  # problems a step, 8 responses each
    "validation": 600,
}
FAST = dict(
    seeds=1, skipped=0, reasoning=40, perception=20, chains=320, lrs=(1e-5,), asked=40, grpo_steps=2,
    grpo_batch=4, validation=40,
)  # fmt: skip
BORROWED = ("format", "direct", "cot", "both", "dpo")
SLIPS = {"plain": None, "reflect": 0.5, "recheck": 0.0}  # how often the step thought over is wrong at first

# Metrics: f1, precision, recall, relevance, reflection: the official numbers; <type>_<prompt>: accuracy on
# reasoning or perception questions with the prompt cot or dir: stability and efficacy are cot minus dir.
# Written down before the run. The interval of a difference of 3 seeds x 600 questions is about 2 points to
# each side, of dpo and its like to their start about 1.
CLAIMS = claims("""
a1*|perception_cot|both   |both/perception_dir|down|the CoT prompt hurts perception (stability < 0)
a2 |reasoning_cot |both   |both/reasoning_dir |up  |... and helps reasoning (efficacy > 0)
a3 |perception_cot|format |format/perception_dir|down|stability < 0 of the base
a4 |reasoning_cot |format |format/reasoning_dir|up |efficacy > 0 of the base
a5 |perception_cot|dpo    |dpo/perception_dir |down|stability < 0 of DPO
b1*|f1            |dpo    |both               |up  |DPO raises F1
b2 |f1            |aft    |both               |up  |AFT raises F1
b3 |f1            |grpo   |both               |up  |GRPO raises F1
b4 |f1            |cot    |format             |up  |SFT on chains raises the base's F1
c1*|f1            |reflect|plain              |up  |chains that reflect raise F1
c2 |relevance     |reflect|plain              |down|... and cost relevance
c3 |recall        |reflect|plain              |up  |... and raise recall
c4 |reasoning_cot |reflect|plain              |up  |... and answer more rightly
c5 |f1            |recheck|plain              |up  |chains that say a step again raise F1
c6 |relevance     |recheck|plain              |down|... and cost relevance
""")
COLUMNS = {
    "model": {
        "F1": "{f1:.1%}",
        "P": "{precision:.1%}",
        "R": "{recall:.1%}",
        "robustness": "{robustness:+.1%}",
        "stability": "{stability:+.1%}",
        "efficacy": "{efficacy:+.1%}",
        "efficiency": "{efficiency:.1%}",
        "relevance": "{relevance:.1%}",
        "reflection quality": "{reflection:.1%}",
        "answers that reflect": "{reflecting:.1%}",
        "coverage of P, R, relevance": "{of_precision:.1%} / {of_recall:.1%} / {of_relevance:.1%}",
        "reasoning: CoT, direct": "{reasoning_cot:.1%} / {reasoning_dir:.1%}",
        "perception: CoT, direct": "{perception_cot:.1%} / {perception_dir:.1%}",
    }
}
PAPER = """
Kimi k1.5    | 64.2 | 92.0 | 49.3 |  1.4 |  2.9 |  0.0 | 82.2 | 92.2 |  72.2
GPT-4o       | 64.0 | 85.4 | 51.2 |  2.1 | -1.0 |  5.1 | 96.0 | 92.0 | 100
QVQ-72B      | 62.0 | 80.2 | 50.5 | -1.8 | -3.1 | -0.4 | 67.9 | 83.7 |  61.7
Virgo-72B    | 60.8 | 79.5 | 49.2 | -2.3 | -1.7 | -2.9 | 75.3 | 90.6 |  60.6
Qwen2-VL-72B | 56.2 | 77.3 | 44.2 | -2.1 | -6.5 |  2.4 | 96.5 | 92.9 | 100
Qwen2-VL-7B  | 42.1 | 61.6 | 32.0 | -4.0 | -3.1 | -4.8 | 94.9 | 89.8 | 100
LLaVA-OV-7B  | 30.9 | 50.9 | 22.2 | -3.4 | -3.8 | -3.0 | 91.5 | 83.0 | 100
Mulberry     | 27.4 | 59.1 | 17.8 |  3.5 |  4.4 |  2.6 | 89.5 | 79.0 | 100
"""
NUMBERS = (
    *("f1", "precision", "recall", "relevance", "reflection", "reflecting", "efficiency", "robustness"),
    *("stability", "efficacy", "of_precision", "of_recall", "of_relevance"),
    *(f"{kind}_{prompt}" for kind in ("reasoning", "perception") for prompt in ("cot", "dir")),
)


# ---- numbers of single questions -----------------------------------------------------------------


def values_of(scores):
    """Scores, None where a question has none -> numbers whose mean is that of the scores that are there."""
    counts = [[score or 0, score is not None] for score in scores]
    return ratio_values(counts) if any(there for _, there in counts) else []


def f1_values(p, r):
    """Values of precision and recall -> numbers whose mean is F1 = 2 P R / (P + R) of their means, and whose
    spread is F1's: each question's pull on it, dF1/dP = 2 R^2 / (P + R)^2, dF1/dR = 2 P^2 / (P + R)^2."""
    if not p or not r or not mean(p) + mean(r):
        return []
    P, R = mean(p), mean(r)
    f1, pull = 2 * P * R / (P + R), 2 / (P + R) ** 2
    return [f1 + pull * (R**2 * (one - P) + P**2 * (other - R)) for one, other in zip(p, r)]


def judged(out, dataset, cot, dir, *, seed):
    """NUMBERS of a model's answers to the prompts cot and dir; lists hold a number a question. A model none
    of whose answers reflects has 1 for reflection within efficiency, as officially."""
    questions, notes = read_dataset(dataset, []), []
    with tempfile.TemporaryDirectory() as cache:
        chat_of = lambda step: benchmark.judge(step, questions.values())
        for prompt, file in (("cot", cot), ("dir", dir)):
            answers = read_predictions(file, questions, notes)
            list(make_cache(answers, cache, prompt, "model", chat_of, notes=notes))
        samples, errors = read_cache(cache, questions, notes)
    of = {
        metric: one["model"]
        for metric, one in coverage_of(samples, errors, questions).items()
        if metric in METRICS
    }
    share = {metric: one["valid"] / one["questions"] for metric, one in of.items()}
    values = {}
    for metric in METRICS:
        found = {one.index: one.score for one in samples[metric]["model"].values()}
        asked = [index for index, row in questions.items() if row["question_type"] == "Reasoning"]
        values[metric] = values_of([found.get(index) for index in asked])
    for prompt in ("cot", "dir"):
        marks = sorted(samples["judge"][f"model_{prompt}"].values(), key=lambda one: one.index)
        for kind in ("Reasoning", "Perception"):
            right = [one.score or 0 for one in marks if one.question_type == kind]
            values[f"{kind.lower()}_{prompt}"] = right
    if not share["reflection_quality"]:
        samples = samples | {"reflection_quality": {}}
    table = headline(tables(samples, errors, notes))["model"]
    made = table | values | {f"of_{metric.partition('_')[0]}": one for metric, one in share.items()}
    made |= {
        "f1": f1_values(values["precision"], values["recall"]),
        "relevance": [(one - 0.8) * 5 for one in values["relevance_rate"]],
        "reflection": values["reflection_quality"],
        "reflecting": share["reflection_quality"],
    }
    write_json(out, {name: made[name] for name in NUMBERS})


# ---- the experiment ------------------------------------------------------------------------------


def chains(n, slip):
    """Training problems with their chains; with one step thought over where a slip is given."""
    think = lambda row: benchmark.reflective(row, random.Random(f"reflect {row['id']}"), slip=slip)
    return [row if slip is None else think(row) for row in pictures.rows("train", n)]


def declare(E):
    s = E.size
    check(E.data == "toy-pictures", "--data", E.data, "toy-pictures, whose judge knows the scenes")
    home = Experiment(
        "llava_reasoner", "", llava_reasoner.SIZES, llava_reasoner.FAST, **llava_reasoner.PICTURES
    )
    there = E.borrow(home, llava_reasoner.declare, BORROWED)
    own = dict(init=there["both"], save_every=0, probe_every=0, eval_split="", grid=dict(lr=s.lrs))
    pairs = dict(samples=home.own_pairs, truncate_words=home.words[home.size.words])
    aligned = [
        E.model(
            "aft", "align.py", "--no-reference", method="aft", constraint="boundary", margin=s.margin,
            epochs=1, sft_weight=0, **pairs, **own,
        ),
        E.model(
            "grpo", "align.py", method="grpo", steps=s.grpo_steps, batch_size=s.grpo_batch, limit=0,
            **E.problems(E.train, s.asked), **own,
        ),
    ]  # fmt: skip
    for name, slip in SLIPS.items():
        E.model(
            name, "train.py", "--no-group-by-length", init=there["cot"], mode="cot", lr=s.chains_lr,
            data=E.write(f"{name}.jsonl", chains(s.chains, slip)), epochs=1, batch_size=s.batch_size,
            eval_split="", save_every=0,
        )  # fmt: skip
    E.choose_by("metrics.accuracy", of=aligned, **E.problems(E.validation, s.validation))
    rows = benchmark.rows("test", s.reasoning, s.perception, start=s.skipped)
    dataset = E.write("dataset.jsonl", rows)
    asked = E.write("questions.jsonl", map(benchmark.problem_of, rows))
    for model in E.models:
        answers = [
            E.samples(f"mme-{mode}", model, data=asked, mode=mode, n=1, temperature=0, max_new_tokens=128)
            for mode in ("cot", "direct")
        ]
        E.read("mme", judged, dataset, *answers, of=[model], take={name: name for name in NUMBERS})


def where_it_looks(files):
    """A note on the CoT answers in files of samples: how many chains that compute misread nothing, and how
    many answers that read one number are right, by kind and by the place in the picture."""
    found = {}
    for one in itertools.chain(*map(read_samples, files)):
        picture = one.problem.image.removeprefix("toy:")
        shown = pictures.in_picture(pictures.scene_of(picture))
        said = re.findall(r"(\w+): (\w+) (\d+)\.", one.first.text)
        if asked := re.fullmatch(r"How many (\w+) does (\w+) have\?\n<image>", one.problem.question):
            first = asked.groups() == (shown[0].item, shown[0].who)
            what, right = f"{picture.partition('-')[0]}, {'first' if first else 'later'}", one.first.correct
        else:
            true = {(fact.who, fact.item, str(fact.value)) for fact in shown}
            what, right = "all numbers of a chain", bool(said) and true.issuperset(said)
        found.setdefault(what, []).append(right)
    shares = [f"{what} {mean(right):.1%}" for what, right in sorted(found.items())]
    return f"What the model both reads rightly with the CoT prompt: {'; '.join(shares)}."


def extra(E):
    there = [E.folder(model, s) for model in E.models if model.name == "both" for s in range(E.size.seeds)]
    looks = [where_it_looks([folder / "mme-cot" / "samples.jsonl" for folder in there])] if there else []
    rows = [[word.strip() for word in line.split("|")] for line in PAPER.strip().splitlines()]
    return {"notes": [*looks, "\n".join(markdown(("the paper, %", *list(COLUMNS["model"])[:9]), rows))]}


def draw(results, stem):
    found, shown = {}, ("efficiency", "reasoning_cot")
    for cell in results["cells"]:
        if {*shown} <= cell["metrics"].keys():  # where no step could be judged there is no efficiency
            found.setdefault(cell["name"], []).append([cell["metrics"][metric] for metric in shown])
    rows = [(name, *map(mean, zip(*numbers))) for name, numbers in found.items()]
    labels = shown[0], "accuracy on reasoning questions, CoT prompt"
    plots.points(rows, labels, f"{stem}_accuracy.svg")


E = Experiment(
    "mme_cot",
    "MME-CoT: Benchmarking Chain-of-Thought in Large Multimodal Models (arXiv 2502.09621)",
    SIZES,
    FAST,
    **llava_reasoner.PICTURES,
)

if __name__ == "__main__":
    E.main(declare, CLAIMS, COLUMNS, extra=extra, draw=draw)
