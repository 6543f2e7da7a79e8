"""LLaVA-Reasoner, "Improve Vision Language Model Chain-of-thought Reasoning" (arXiv 2410.16198), on toy
pictures.

    python -m minicot.recipes.llava_reasoner             # 3 seeds, 70 minutes on two CPU cores
    python -m minicot.recipes.llava_reasoner --fast      # a small part of the work, one seed

The path (paper, sections 3 and 4): a noisy teacher writes chains, those that miss the gold answer are dropped
-> four SFT mixes from the same base that sees (format only: a small set with both prompts, few passes; that
set and direct answers; and chains; and both; the last three at equal steps), each read out with the direct
and the CoT prompt -> from "both": 32 chains a question, 0.25 <= share right <= 0.85, at most 3 pairs a
question, cut to their first W words, no EOS -> DPO, beta 0.1, summed log-probabilities, frozen reference,
tower and projector frozen. Controls: whole pairs; RFT on the same right chains; as many pairs of another
model (the CoT mix of another seed) as generic preference data. Then the DPO model ranks 32 samples a question
(best-of-n, weighted vote against majority). Learning rates: each method over the same grid at the first seed,
chosen by CoT accuracy on validation problems. CLAIMS were written down before the run, but for four.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from minicot import plots
from minicot.answers import extract_answer, is_correct, split_steps
from minicot.data import image_reader, pairs, render, target
from minicot.errors import InputError
from minicot.records import Problem, read_samples, samples_to_row
from minicot.metrics import mean_interval, paired_difference
from minicot.recipes.cells import INTERVAL, claims_of, claims_table, command, from_hex, judge, made_by
from minicot.recipes.cells import markdown, pack_pairs, run_cell, to_hex, unpack_pairs
from minicot.tokenizer import Tokenizer
from minicot.toy import pictures, teacher
from minicot.training import ROOT, write_json, write_jsonl
from minicot.verifier import curves, token_log_ratios
from minicot.weights import load_model

RUNS, RESULTS = Path("runs/llava_reasoner"), ROOT / "minicot" / "recipes" / "results"
MIXES = ("format", "direct", "cot", "both")
METHODS = ("dpo", "dpo-uncut", "dpo-off-policy", "rft")
MODES = ("direct", "cot")


@dataclass(frozen=True)
class Sizes:
    taught: int = 9000  # training problems that the teacher answers
    error_rate: float = 0.25  # ... wrongly
    steps: int = 500  # of the direct, CoT and both mixes, alike
    batch_size: int = 32
    lr: float = 2e-3
    format_rows: int = 48  # problems of the format-only mix, each with both prompts
    format_steps: int = 9
    sampled: int = 1200  # training problems that DPO samples
    k: int = 32
    validation: int = 300
    test: int = 1000
    pool: int = 300  # test problems of the verifier
    lrs: tuple = (3e-6, 1e-5, 3e-5, 1e-4)
    seeds: int = 3


FAST = Sizes(taught=2000, steps=60, sampled=100, k=8, validation=100, test=200, pool=50, lrs=(1e-5,), seeds=1)

# id, ours, other, rule, text; a cell is <model>@<prompt>, read out greedily, "mean" the mean over both
# prompts, "sampled" the CoT prompt at T = 1, and "<way>:<n>" a way of choosing among n samples. Written down
# before the run; d4 to d6 and f2 after a look at the first seed on validation problems, where samples rose.
CLAIM_TABLE = """
a1|direct@cot |format@cot       |below 0.05|direct SFT lifts CoT by less than 5 points over format only
a2|direct@cot |cot@cot          |down      |... and leaves it below CoT SFT
b1|cot@cot    |format@cot       |up        |CoT SFT lifts CoT
b2|cot@direct |format@direct    |up        |CoT SFT also lifts direct
c1|both@mean  |direct@mean      |up        |both beat direct over the two prompts, at equal steps
c2|both@mean  |cot@mean         |up        |both beat CoT over the two prompts, at equal steps
d1|dpo@cot    |both@cot         |up        |DPO on own chains lifts CoT
d2|dpo@cot    |dpo-off-policy@cot|up       |... more than another model's pairs
d3|dpo@cot    |rft@cot          |level     |... and does not lie below RFT on the same right chains
e1|vote:32    |majority:32      |up        |weighted vote by the log-ratio beats majority at the largest n
e2|best:32    |majority:32      |up        |best-of-n by the log-ratio beats majority at the largest n
e3|cut vote:32|majority:32      |up        |weighted vote by the first words' log-ratio beats majority
e4|cut best:32|majority:32      |up        |best-of-n by the first words' log-ratio beats majority
f1|dpo@cot    |dpo-uncut@cot    |up        |cut pairs beat whole ones
d4|dpo@sampled|both@sampled     |up        |DPO lifts the chains that are sampled, at T = 1
d5|dpo@sampled|dpo-off-policy@sampled|up   |... more than another model's pairs
d6|dpo@sampled|rft@sampled      |up        |... more than RFT on the same right chains
f2|dpo@sampled|dpo-uncut@sampled|up        |... and cut pairs more than whole ones
g1|blind@cot  |                 |below 0.15|without the picture, accuracy falls to the text prior (< 15 %)
"""
CLAIMS = claims_of(CLAIM_TABLE, ("id", "ours", "other", "rule", "text"))
PAPER = {
    "format": (65.5, 62.7),
    "direct": (71.1, 65.6),
    "cot": (69.7, 73.2),
    "both": (72.8, 74.4),
    "dpo-off-policy": (73.0, 74.6),
    "dpo": (73.0, 75.3),
}  # average over its 8 sets: direct, CoT


def distill(sizes):
    """The teacher's chains for the training problems, and which of them the gold answer lets through -> rows
    that are kept and a count of each kind of mistake, kept and dropped."""
    kept, counts = [], {}
    for row in pictures.rows("train", sizes.taught):
        told = teacher.teach(row, random.Random(f"teacher {row['id']}"), sizes.error_rate)
        right = is_correct(extract_answer(told["solution"], "hash"), row["answer"])
        if right:
            kept.append(
                {key: row[key] for key in ("id", "question", "answer", "image")}
                | {"solution": told["solution"]}
            )
        counts.setdefault(told["kind"], [0, 0])[0 if right else 1] += 1
    return kept, counts


def mix_rows(name, taught, few):
    """The SFT rows of a mix, each prompt's last line within its question: the first `few` problems with both
    prompts, which is the format-only mix and part of the others, and all problems with the mix's own."""
    own = {"format": (), "both": MODES}.get(name, (name,))
    rows = []
    for place, row in enumerate(taught):
        problem = Problem(row["id"], row["question"], row["answer"], row["solution"])
        for mode in MODES:
            if place < few or mode in own:
                rows.append(
                    {
                        "id": f"{row['id']}/{mode}",
                        "question": render(problem, mode),
                        "solution": target(problem, mode),
                        "image": row["image"],
                    }
                )
    return rows


class Recipe:
    """Folders and commands of the cells, runs/llava_reasoner/<set>/<cell>-s<seed>/."""

    def __init__(self, args, sizes):
        self.args, self.sizes = args, sizes
        self.root = RUNS / ("toy-fast" if args.fast else "toy")

    def folder(self, name, seed, lr=None):
        return self.root / (name + ("" if lr is None else f"-lr{lr:g}") + f"-s{seed}")

    def run(self, folder, words, inputs=()):
        run_cell(folder, [words], inputs, fresh=self.args.fresh)

    def distill(self):
        kept, self.counts = distill(self.sizes)
        self.root.mkdir(parents=True, exist_ok=True)
        for name in MIXES:
            write_jsonl(self.root / f"mix-{name}.jsonl", mix_rows(name, kept, self.sizes.format_rows))
        words = [len(row["solution"].split(" ")) for row in kept]
        self.words = round(0.9 * sum(words) / len(words))  # the paper: 90 of about 100

    def mix(self, name, seed):
        """SFT of one mix -> its folder."""
        s, folder, rows = self.sizes, self.folder(name, seed), self.root / f"mix-{name}.jsonl"
        words = command(
            "train.py",
            "--overwrite",
            "--no-group-by-length",
            init=self.args.init,
            data=rows,
            mode="plain",
            steps=s.format_steps if name == "format" else s.steps,
            lr=s.lr,
            batch_size=s.batch_size,
            save_every=0,
            seed=seed,
            out=folder / "model",
            device=self.args.device,
        )
        self.run(folder, words, [rows])
        return folder

    def sample(self, name, seed, split, limit):
        """K chains a question by a mix's model -> the file."""
        folder, file = self.folder(name, seed), self.folder(name, seed) / f"samples-{split}.jsonl"
        words = command(
            "sample.py",
            "--overwrite",
            model=folder / "model",
            data="toy-pictures",
            split=split,
            limit=limit,
            n=self.sizes.k,
            seed=seed,
            batch_size=256,
            out=file,
            device=self.args.device,
        )
        self.run(folder / f"sampling-{split}", words, [folder / "model" / "model.safetensors"])
        return file

    def pairs(self, seed):
        """The pairs of the policy's own chains, and as many of another model's -> their files."""
        files, found = {}, {}
        other = (seed + 1) % max(2, self.sizes.seeds)
        for name, source in (("own", ("both", seed)), ("other", ("cot", other))):
            samples = read_samples(self.sample(*source, "train", self.sizes.sampled))
            found[name] = pairs(samples, max_pairs=3, window=(0.25, 0.85), seed=seed)
        most = min(map(len, found.values()))
        for name, two in found.items():
            two = random.Random(f"{name} {seed}").sample(two, most)
            files[name] = self.folder("both", seed) / f"pairs-{name}.jsonl"
            write_jsonl(
                files[name],
                [
                    samples_to_row(replace(pair, problem=replace(pair.problem, id=f"{pair.problem.id}/{i}")))
                    for i, pair in enumerate(two)
                ],
            )
        return files

    def align(self, name, seed, lr):
        start, folder = self.folder("both", seed), self.folder(name, seed, lr)
        samples = self.files[seed]["other" if name == "dpo-off-policy" else "own"]
        words = command(
            "align.py",
            "--overwrite",
            "--no-reference",
            method=name.partition("-")[0],
            init=start / "model",
            samples=samples,
            lr=lr,
            batch_size=8,
            pair_low=0,
            pair_high=1,
            eval_limit=1,
            seed=seed,
            truncate_words=None if name in ("dpo-uncut", "rft") else self.words,
            probe_every=0,
            save_every=0,
            out=folder / "model",
            device=self.args.device,
        )
        self.run(folder, words, [samples, start / "model" / "model.safetensors"])
        return folder

    def evaluate(self, folder, mode, split, limit, *switches):
        out = folder / f"{split}-{mode}{''.join(switches)}" / "results.json"
        words = command(
            "sample.py",
            "--evaluate",
            *switches,
            model=folder / "model",
            data="toy-pictures",
            split=split,
            limit=limit,
            mode=mode,
            batch_size=256,
            out=out,
            device=self.args.device,
        )
        self.run(out.parent, words, [folder / "model" / "model.safetensors"])
        return json.loads(out.read_text())

    def validate(self, name, lr):
        folder = self.align(name, 0, lr)
        found = self.evaluate(folder, "cot", "validation", self.sizes.validation)["metrics"]
        return {"name": name, "lr": lr, "accuracy": found["accuracy"], "missing": found["missing_answers"]}

    def cell(self, name, seed, lr=None):
        """A model read out with both prompts on the test problems -> rows <name>@direct and <name>@cot."""
        folder, blind = self.folder(name, seed, lr), ("--blind",) if name == "blind" else ()
        folder = self.folder("both", seed) if blind else folder
        found = {mode: self.evaluate(folder, mode, "test", self.sizes.test, *blind) for mode in MODES}
        return [
            {
                "name": f"{name}@{mode}",
                "seed": seed,
                "settings": {"lr": lr},
                "metrics": results["metrics"],
                "correct": to_hex(results["correct"]),
            }
            for mode, results in found.items()
        ]

    def sampled(self, name, seed, lr=None):
        """8 chains a problem of the pool -> row <name>@sampled, [right, 8] of each problem."""
        folder = self.folder(name, seed, lr)
        out = folder / "test-sampled" / "samples.jsonl"
        words = command(
            "sample.py",
            "--overwrite",
            model=folder / "model",
            data="toy-pictures",
            split="test",
            limit=self.sizes.pool,
            n=8,
            seed=seed,
            batch_size=256,
            out=out,
            device=self.args.device,
        )
        self.run(out.parent, words, [folder / "model" / "model.safetensors"])
        right = [[sum(one.correct for one in samples.responses), 8] for samples in read_samples(out)]
        return {"name": f"{name}@sampled", "seed": seed, "settings": {"lr": lr}, "right": pack_pairs(right)}

    def verify(self, seed, lr):
        """The verifier's curves on samples of the mix "both" -> (share of each problem by way and n); "cut"
        are the ways by the log-ratio of the first words, on which DPO was trained."""
        start, dpo = self.folder("both", seed), self.folder("dpo", seed, lr)
        file, sizes = self.sample("both", seed, "test", self.sizes.pool), [2**i for i in range(6)]
        for end, first in (("", None), ("-cut", self.words)):
            out = dpo / f"scored{end}.jsonl"
            words = command(
                "sample.py",
                "--overwrite",
                verifier=dpo / "model",
                ref=start / "model",
                samples=file,
                truncate_words=first,
                out=out,
                device=self.args.device,
            )
            self.run(dpo / f"scoring{end}", words, [file, dpo / "model" / "model.safetensors"])
            file = out  # which has both scores in the end
        whole, cut = (
            curves(read_samples(file), name, sizes=[n for n in sizes if n <= self.sizes.k])
            for name in ("dpo", "dpo-cut")
        )
        return {n: {**whole[n], **{f"cut {way}": cut[n][way] for way in ("best", "vote")}} for n in whole}

    def wrong_chains(self, seed, lr):
        """Of each question of the pool the first sampled chain that begins rightly and ends wrong -> (its
        tokens, their log-ratios, how many steps it has, the place of the first wrong one)."""
        dpo = self.folder("dpo", seed, lr)
        tokenizer = Tokenizer(dpo / "model")
        model, ref = (load_model(folder / "model") for folder in (dpo, self.folder("both", seed)))
        reader = image_reader(model, tokenizer, dpo / "model")
        for samples in read_samples(dpo / "scored.jsonl"):
            for response in samples.responses:
                steps = pictures.label_steps(samples.problem.id, split_steps(response.text))
                if steps and steps[0] and False in steps and not response.correct:
                    one = replace(samples, responses=[response])
                    [(ids, ratios)] = token_log_ratios(model, ref, tokenizer, one, mode="cot", reader=reader)
                    tokens = [tokenizer.decode([i], skip_special=False) for i in ids]
                    yield tokens, [float(ratio) for ratio in ratios], len(steps), steps.index(False)
                    break


def world():
    """A hash of the first test problems: results that hold another are of a world that is no more."""
    return hashlib.sha256(json.dumps(pictures.rows("test", 50)).encode()).hexdigest()[:16]


def blame(chains):
    """Where the log-ratio puts the blame: for each of some wrong_chains, whether the step with the lowest sum
    is the first wrong one, and the chance of that."""
    hits, chances = [], []
    for tokens, ratios, steps, wrong in chains:
        sums = step_sums(tokens, ratios)[:steps]
        hits.append(float(sums.index(min(sums)) == wrong))
        chances.append(1 / steps)
    return hits, chances


def step_sums(tokens, ratios):
    """The log-ratios summed over each line of a chain; a line break counts to the line that it ends."""
    sums = [0.0]
    for token, ratio in zip(tokens, ratios):
        sums[-1] += ratio
        sums += [0.0] * ("\n" in token)
    return sums


def numbers(results, name):
    """(seeds, problems) numbers whose mean is what a claim's name stands for; [] where it did not run."""
    if ":" in name:
        way, n = name.split(":")
        return [seed.get(n, {}).get(way, []) for seed in results["curves"]]
    model, mode = name.split("@")
    if mode == "mean":
        two = [numbers(results, f"{model}@{one}") for one in MODES]
        return [[(a + b) / 2 for a, b in zip(*rows)] for rows in zip(*two)]
    rows = [cell for cell in results["cells"] if cell["name"] == name]
    rows.sort(key=lambda cell: cell["seed"])
    if mode == "sampled":
        return [[right / n for right, n in unpack_pairs(cell["right"])] for cell in rows]
    return [from_hex(cell["correct"]) for cell in rows]


def slim(curves):
    """Curves as they are kept: a share for each problem at the largest n, which claims look at, else the mean
    alone."""
    kept = lambda n, shares: shares if n == max(curves) else [sum(shares) / len(shares)]
    return {
        str(n): {way: [round(share, 4) for share in kept(n, shares)] for way, shares in ways.items()}
        for n, ways in curves.items()
    }


def judge_all(results):
    found = []
    for claim in CLAIMS:
        ours, other = (numbers(results, claim[side]) if claim[side] else [] for side in ("ours", "other"))
        if ours and all(ours) and (not claim["other"] or (other and all(other))):
            found.append(judge(claim, ours, other))
    return found


def table(results):
    """Results -> the README's tables, in Markdown."""
    shown, models = [], dict.fromkeys(cell["name"].split("@")[0] for cell in results["cells"])
    mean = lambda rows: sum(map(sum, rows)) / sum(map(len, rows))
    for model in models:
        rows = {mode: numbers(results, f"{model}@{mode}") for mode in MODES}
        over = paired_difference(numbers(results, "both@cot"), rows["cot"])
        missing = [
            cell["metrics"]["missing_answers"] for cell in results["cells"] if cell["name"] == f"{model}@cot"
        ]
        drawn = numbers(results, f"{model}@sampled")
        shown.append(
            (
                model,
                f"{mean(rows['direct']):.1%}",
                f"{mean(rows['cot']):.1%}",
                "" if model == "both" else INTERVAL.format(*over),
                f"{mean(drawn):.1%}" if drawn else "",
                f"{sum(missing) / len(missing):.1%}",
                "{} / {}".format(*PAPER[model]) if model in PAPER else "",
            )
        )
    sizes, ways = list(results["curves"][0]), list(results["curves"][0]["1"])
    chosen = [
        (way, *(f"{mean([seed[n][way] for seed in results['curves']]):.1%}" for n in sizes)) for way in ways
    ]
    hit, chance, more = ("{:.1%} [{:.1%}, {:.1%}]".format(*one) for one in results["blame"])
    head = (
        "model",
        "direct prompt",
        "CoT prompt",
        "CoT over both [95 %]",
        "CoT, sampled (T = 1)",
        "no answer (CoT)",
        "paper: direct, CoT",
    )
    return "\n".join(
        [
            *markdown(head, shown),
            "",
            *markdown(("choosing among n", *(f"n = {n}" for n in sizes)), chosen),
            "",
            *claims_table(results["claims"]),
            "",
            f"The lowest log-ratio of a wrong chain's steps is at its first wrong one: {hit}; by chance "
            f"{chance}; difference {more}.",
        ]
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", default="toy-vision", help="base model folder that sees")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--fast", action="store_true", help="a small part of the work; no results file")
    parser.add_argument("--fresh", action="store_true", help="run every cell again")
    parser.add_argument("--jobs", type=int, default=2, help="cells at once (CPU: one thread each)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--table", action="store_true", help="print the tables of the committed results")
    args = parser.parse_args(argv)
    if args.table:
        print(table(json.loads((RESULTS / "llava_reasoner.json").read_text())))
        return
    sizes = FAST if args.fast else Sizes()
    sizes = replace(sizes, seeds=args.seeds or sizes.seeds)
    recipe, started, seeds = Recipe(args, sizes), time.perf_counter(), range(sizes.seeds)
    if args.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1" if args.jobs > 1 else "2"
        torch.set_num_threads(1)
    with ThreadPoolExecutor(args.jobs) as pool:
        each = lambda function, jobs: list(pool.map(lambda job: function(*job), jobs))
        recipe.distill()
        more = () if sizes.seeds > 1 else (("cot", 1),)  # another model, for the pairs off policy
        each(recipe.mix, [(name, seed) for seed in seeds for name in MIXES] + list(more))
        each(
            recipe.sample,
            [
                (name, seed, "train", sizes.sampled)
                for seed in range(max(2, sizes.seeds))
                for name in ("both", "cot")
                if recipe.folder(name, seed).exists()
            ],
        )
        recipe.files = {seed: recipe.pairs(seed) for seed in seeds}
        grid = each(recipe.validate, [(name, lr) for name in METHODS for lr in sizes.lrs])
        chosen = {}
        for one in sorted(grid[::-1], key=lambda one: one["accuracy"]):  # the first of equals
            chosen[one["name"]] = one["lr"]
        each(recipe.align, [(name, seed, lr) for seed in seeds for name, lr in chosen.items()])
        models = [(name, None) for name in MIXES] + list(chosen.items()) + [("blind", None)]
        cells = each(recipe.cell, [(name, seed, lr) for name, lr in models for seed in seeds])
        sampled = each(
            recipe.sampled,
            [(name, seed, lr) for name, lr in [("both", None), *chosen.items()] for seed in seeds],
        )
        found = each(recipe.verify, [(seed, chosen["dpo"]) for seed in seeds])
    results = {
        "command": " ".join(["python -m minicot.recipes.llava_reasoner", *(argv or sys.argv[1:])]),
        **made_by(args, started),
        "world": world(),
        "sizes": asdict(sizes),
        "teacher": {kind: dict(zip(("kept", "dropped"), both)) for kind, both in recipe.counts.items()},
        "words": recipe.words,
        "pairs": [sum(1 for _ in open(recipe.files[seed]["own"])) for seed in seeds],
        "cells": [row for rows in cells for row in rows] + sampled,
        "grid": grid,
        "curves": [slim(one) for one in found],
    }
    chains = [list(islice(recipe.wrong_chains(seed, chosen["dpo"]), 100)) for seed in seeds]
    least = min(map(len, chains))  # an interval takes as many of each seed
    if not least:
        raise InputError("no sampled chain goes wrong after its first step")
    hits, chances = zip(*(blame(one[:least]) for one in chains))
    results["blame"] = [mean_interval(hits), mean_interval(chances), paired_difference(chances, hits)]
    results["claims"] = judge_all(results)
    out = recipe.root / "results" if args.fast else RESULTS
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "llava_reasoner.json", results, indent=None)
    plots.best_of_n(results["curves"], out / "llava_reasoner_verifier.svg")
    tokens, ratios, _, wrong = chains[0][0]
    along = [(token.replace("\n", "/"), ratio) for token, ratio in zip(tokens, ratios)]
    title = f"step {wrong + 1} is the first wrong one"
    plots.log_ratios_along(along, out / "llava_reasoner_chain.svg", title)
    print(table(results))
    print(f"{results['minutes']} minutes -> {out / 'llava_reasoner.json'}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None
