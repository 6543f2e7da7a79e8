"""AFT, "Making Large Language Models Better Reasoners with Alignment" (arXiv 2309.02144): toy world or real
sets.

    python -m minicot.recipes.aft                    # toy world, 3 seeds, two hours on two CPU cores
    python -m minicot.recipes.aft --fast             # a small part of the work, one seed
    python -m minicot.recipes.aft --data gsm8k:PATH --init SmolLM2-135M --device cuda --seeds 2

The path (paper, section 4): base -> VFT (fine-tuning on solutions) -> K samples a training question, graded
by their final answer -> alignment of the same VFT model on the same samples by each method: plain, detached,
boundary. Each method gets the same grid of learning rates (boundary: and of margins) at the first seed,
chosen by greedy accuracy on validation problems; the chosen setting runs at every seed and meets the test
problems once. Ranking feedback (the paper's GSM8K-RANK) replaces right/wrong by the step oracle's grade of
each chain. CLAIMS were written down before the run.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from minicot import plots
from minicot.data import collate, encode_row, make_groups
from minicot.errors import InputError
from minicot.records import Response, read_samples
from minicot.sets import read_problems
from minicot.data import target, to_groups
from minicot.records import samples_to_row
from minicot.losses import better_than, sequence_logps
from minicot.metrics import assessment_accuracy, paired_difference, perplexity, rerank_accuracy
from minicot.metrics import share_with_pair
from minicot.recipes.cells import INTERVAL, claims_of, claims_table, command, from_hex, judge, made_by
from minicot.recipes.cells import markdown, pack_pairs, run_cell, to_hex, unpack_pairs
from minicot.scoring import score
from minicot.tokenizer import Tokenizer
from minicot.training import ROOT, weights_digest, write_json, write_jsonl
from minicot.weights import load_model

RUNS, RESULTS = Path("runs/aft"), ROOT / "minicot" / "recipes" / "results"
CONSTRAINTS = ("none", "detached", "boundary")
METHODS = ("rft", *(f"{method}-{c}" for method in ("dpo", "rrhf", "pro", "aft") for c in CONSTRAINTS))
RANKED = ("rank-rrhf-none", "rank-pro-none", *(f"rank-aft-{c}" for c in CONSTRAINTS))


@dataclass(frozen=True)
class Sizes:
    problems: int = 2000  # training questions that are sampled and aligned on
    k: int = 8  # responses a question
    epochs: float = 1.0
    batch_size: int = 8  # questions a step
    validation: int = 1000  # problems that choose a setting
    test: int = 1000  # problems of the table
    pool: int = 200  # held-out questions of A-accuracy and of the reference NLL
    votes: int = 8  # samples of majority@k on the test problems
    lrs: tuple = (3e-5, 1e-4, 3e-4)
    margins: tuple = (0.1,)
    seeds: int = 3
    other_margins: tuple = (0.0, 0.03, 0.3)  # ablations, at the first seed
    other_ks: tuple = (2, 4)


FAST = Sizes(
    problems=120,
    k=6,
    validation=100,
    test=200,
    pool=60,
    votes=4,
    lrs=(1e-4,),
    margins=(0.3,),
    seeds=1,
    other_margins=(0.1,),
    other_ks=(2,),
)
SLICE = Sizes(
    problems=16,
    k=4,
    epochs=1.0,
    batch_size=4,
    validation=0,
    test=0,
    pool=64,
    votes=1,
    lrs=(1e-5,),
    margins=(0.3,),
    seeds=1,
    other_margins=(),
    other_ks=(),
)  # of a real set on a CPU: every path once, four steps of four questions; nothing is generated after it

# Written down before the run. The difference ours - other goes "up" or "down", is "level" (does not lie below
# minus 2 points), or ours alone is "below X".
CLAIM_TABLE = """
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
"""
CLAIMS = claims_of(CLAIM_TABLE, ("id", "metric", "ours", "other", "rule", "text"))
PAPER = {
    "vft": "36.48 (LLaMA-7B, GSM8K)",
    "aft-boundary": "40.43",
    "aft-detached": "about as boundary",
    "rft": "slightly under AFT",
    "rank-rrhf-none": "7.51 (its VFT: 20.82)",
    "rank-aft-boundary": "26.08",
}


def with_reference(group):
    """A question's samples and its written solution as a right response among them."""
    reference = Response(group.problem.solution, correct=True)
    return replace(group, responses=[*group.responses, reference])


class Recipe:
    """The folders and commands of the cells, runs/aft/<set>/<cell>-s<seed>/."""

    def __init__(self, args, sizes):
        self.args, self.sizes, self.toy = args, sizes, args.data == "toy"
        self.root = RUNS / (args.data.split(":")[0] + ("-fast" if args.fast else ""))
        self.machine = {"device": args.device, "dtype": None if args.dtype == "float32" else args.dtype}

    def folder(self, name, seed):
        return self.root / f"{name.replace('@', '-at-')}-s{seed}"

    def run(self, folder, commands, inputs=()):
        run_cell(folder, commands, inputs, fresh=self.args.fresh)

    def vft(self, seed):
        """Fine-tune the base model; sample the training questions and a held-out pool from it."""
        s, a, out = self.sizes, self.args, self.folder("vft", seed)
        train = command(
            "train.py",
            "--overwrite",
            data=a.data,
            init=a.init,
            split=a.train_split,
            seed=seed,
            out=out / "model",
            **self.machine,
        )
        files = (
            ("graded.jsonl", a.train_split, s.problems),
            ("graded_pool.jsonl", a.validation_split, s.pool),
        )
        pools = [
            command(
                "sample.py",
                "--overwrite",
                data=a.data,
                model=out / "model",
                split=split,
                limit=limit,
                n=s.k,
                seed=seed,
                out=out / file,
                batch_size=256,
                reward="steps" if self.toy else None,
                **self.machine,
            )
            for file, split, limit in files
        ]
        self.run(out, [train + a.train_flags.split(), *pools])
        for graded, plain in (("graded.jsonl", "samples.jsonl"), ("graded_pool.jsonl", "pool.jsonl")):
            rows = [
                replace(group, responses=[replace(response, reward=None) for response in group.responses])
                for group in read_samples(out / graded)
            ]  # right/wrong: the same responses, grades left out
            write_jsonl(out / plain, map(samples_to_row, rows))
            if plain == "pool.jsonl":
                continue
            if not self.toy:  # a weak model answers few rightly: DPO's pairs
                write_jsonl(out / "referenced.jsonl", map(samples_to_row, map(with_reference, rows)))
            for k in s.other_ks:
                first = [replace(group, responses=group.responses[:k]) for group in rows]
                write_jsonl(out / f"samples_k{k}.jsonl", map(samples_to_row, first))

    def cell_folder(self, name, seed, lr=None, margin=None, *switches, k=None):
        """Where a cell lives; cells of the same settings (as with "aft-none@twin") share it."""
        if name == "vft":
            return self.folder("vft", seed)
        label = f"{name.partition('@')[0]}-lr{lr:g}" + ("" if margin is None else f"-margin{margin:g}")
        label += f"-k{k}" if k else ""
        return self.folder("".join([label, *switches]), seed)

    def align(self, name, seed, lr, margin, *switches, k=None):
        """Align the VFT model as a name such as "rank-aft-boundary" says (k: on a question's first k
        responses) -> the folder of the cell."""
        s, vft = self.sizes, self.folder("vft", seed)
        folder = self.cell_folder(name, seed, lr, margin, *switches, k=k)
        method, _, constraint = name.partition("@")[0].removeprefix("rank-").partition("-")
        samples = vft / (
            "referenced.jsonl"
            if method == "dpo" and not self.toy
            else f"samples_k{k}.jsonl"
            if k
            else "graded.jsonl"
            if name.startswith("rank-")
            else "samples.jsonl"
        )
        every_mixed = dict(pair_low=0.001, pair_high=0.999) if method == "dpo" else {}
        words = command(
            "align.py",
            "--overwrite",
            *switches,
            method=method,
            constraint=constraint or "none",
            lr=lr,
            margin=margin,
            init=vft / "model",
            samples=samples,
            epochs=s.epochs,
            batch_size=s.batch_size,
            seed=seed,
            probe_every=0,
            save_every=0,
            out=folder / "model",
            **self.machine,
            **every_mixed,
        )
        self.run(folder, [words], [samples, vft / "model" / "model.safetensors"])
        return folder

    def evaluate(self, folder, name, split, limit, n, seed):
        """Evaluate the cell's model by sample.py -> what it wrote."""
        model, out = folder / "model", folder / name / "results.json"
        words = command(
            "sample.py",
            "--evaluate",
            data=self.args.data,
            model=model,
            split=split,
            limit=limit,
            n=n,
            seed=seed,
            batch_size=256,
            out=out,
            **self.machine,
        )
        self.run(folder / name, [words], [model / "model.safetensors"])
        return json.loads(out.read_text())

    def grid_cell(self, name, lr, margin):
        """One setting at the first seed -> its greedy accuracy on validation problems."""
        folder = self.align(name, 0, lr, margin)
        found = self.evaluate(folder, "validation", self.args.validation_split, self.sizes.validation, 1, 0)
        keys = ("accuracy", "missing_answers", "repeated_4grams")
        kept = {key: round(found["metrics"][key], 4) for key in keys}
        return {"name": name, "lr": lr, "margin": margin, **kept}

    def cell(self, name, seed, lr=None, margin=None, *switches, k=None):
        """One method at one seed: aligned, evaluated on the test problems, assessed -> its row."""
        vft = name == "vft"
        folder = self.folder("vft", seed) if vft else self.align(name, seed, lr, margin, *switches, k=k)
        row = {
            "name": name,
            "seed": seed,
            "settings": {"lr": lr, "margin": margin},
            "metrics": self.assess(folder / "model", seed),
        }
        if self.sizes.test:
            test = (self.args.test_split, self.sizes.test, self.sizes.votes, seed)
            results = self.evaluate(folder, "test", *test)
            row["metrics"] |= results["metrics"]
            row["correct"] = to_hex(results["correct"])
        return row

    def ablation(self, label, name, settings, switches=(), k=None):
        """A cell at the first seed that differs from `name`'s in one thing, which `label` says."""
        return {**self.cell(name, 0, *settings, *switches, k=k), "name": f"{name}, {label}"}

    @torch.no_grad()
    def assess(self, model_folder, seed):
        """`measure`, kept in the cell's assessed.json as long as the weights stay the same."""
        kept, key = model_folder.parent / "assessed.json", weights_digest(model_folder)
        if kept.is_file() and (found := json.loads(kept.read_text()))["weights"] == key:
            return found["metrics"]
        metrics = self.measure(model_folder, seed)
        write_json(kept, {"weights": key, "metrics": metrics})
        return metrics

    def measure(self, model_folder, seed):
        """Of a model, on the VFT model's own samples of training and of held-out questions: A-accuracy (a
        problem's right pairs and pairs), reranking by own score, perplexity of right and of wrong responses;
        NLL of reference solutions. A weak model's samples hold few right ones: on real sets the reference
        solution is one of a question's right responses."""
        tokenizer = Tokenizer(model_folder)
        model = load_model(model_folder, dtype=torch.float32, device=self.args.device)
        found, context = {}, model.config.max_position_embeddings
        for name, file in (("train", "samples.jsonl"), ("held", "pool.jsonl")):
            samples = read_samples(self.folder("vft", seed) / file)[: self.sizes.pool]
            told = not self.toy and all(one.problem.solution for one in samples)  # a split may have none
            groups, _ = make_groups(tokenizer, samples, mode="cot", max_length=context, reference=told)
            tables, logps_of = [], {True: [], False: []}
            for start in range(0, len(groups), 16):
                batch = collate(groups[start : start + 16], tokenizer.pad_id).to(self.args.device)
                logps = self.score(model, batch)
                scores = to_groups(sequence_logps(logps, batch.loss_mask, reduce="mean"), batch).cpu().numpy()
                better, right = (
                    better_than(batch.rewards, batch.present).cpu().numpy(),
                    (batch.correct == 1).cpu(),
                )
                tables += [
                    (
                        assessment_accuracy(scores[b : b + 1], better[b : b + 1]),
                        share_with_pair(better[b : b + 1]),
                        rerank_accuracy(scores[b : b + 1], right[b : b + 1], batch.present[b : b + 1].cpu()),
                    )
                    for b in range(len(scores))
                ]
                for logp, mask, b, k in zip(logps.cpu(), batch.loss_mask.cpu(), batch.group, batch.slot):
                    logps_of[bool(right[b, k])].append(logp[mask].tolist())
            pairs = [list(counts) for counts, _, _ in tables]
            found |= {
                f"a_{name}": round(sum(r for r, _ in pairs) / max(1, sum(n for _, n in pairs)), 5),
                f"with_pair_{name}": round(sum(t[1] for t in tables) / len(tables), 4),
                f"rerank_{name}": round(sum(t[2] for t in tables) / len(tables), 4),
                **{
                    f"ppl_{'right' if kind else 'wrong'}_{name}": round(perplexity(rows), 4)
                    for kind, rows in logps_of.items()
                    if rows
                },
            }
            if name == "held":
                found["a_held_pairs"] = pairs
        solved = [
            p
            for p in read_problems(self.args.data, self.args.validation_split, limit=self.sizes.pool)
            if p.solution
        ]
        nlls = []
        for start in range(0, len(solved), 32):
            rows = [
                [encode_row(tokenizer, p, target(p, "cot"), mode="cot")] for p in solved[start : start + 32]
            ]
            batch = collate(rows, tokenizer.pad_id).to(self.args.device)
            nlls += (-sequence_logps(self.score(model, batch), batch.loss_mask, reduce="mean")).tolist()
        if nlls:
            found |= {
                "reference_nll": sum(nlls) / len(nlls),
                "reference_nlls": [round(nll, 3) for nll in nlls],
            }
        return found

    def score(self, model, batch):
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            return score(model, batch)

    def scores(self, folder):
        """(scores of right, scores of wrong responses) of the first seed's held-out pool by a model."""
        model, tokenizer = load_model(folder / "model", dtype=torch.float32), Tokenizer(folder / "model")
        samples = read_samples(self.folder("vft", 0) / "pool.jsonl")
        groups, _ = make_groups(tokenizer, samples, mode="cot", max_length=10**6, reference=False)
        found = {True: [], False: []}
        with torch.no_grad():
            for group in groups:
                batch = collate([group], tokenizer.pad_id)
                values = sequence_logps(self.score(model, batch), batch.loss_mask, reduce="mean").tolist()
                for row, value in zip(group, values):
                    found[bool(row.correct)].append(value)
        return found[True], found[False]


# ---- the table -----------------------------------------------------------------------------------


def numbers(cells, name, metric):
    """(seeds, problems) numbers of a cell name whose mean is the metric; [] where it did not run."""
    rows = []
    for cell in sorted((c for c in cells if c["name"] == name), key=lambda c: c["seed"]):
        if metric == "accuracy" and "correct" not in cell:  # of a slice
            return []
        if metric == "accuracy":
            rows.append(from_hex(cell["correct"]))
        elif metric == "reference_nll":
            rows.append(cell["metrics"].get("reference_nlls", []))
        else:  # a ratio of sums as a mean over problems (linearised): the ratio, and each one's pull on it
            pairs = unpack_pairs(cell["metrics"]["a_held_pairs"])
            ratio, mean = (sum(column) / len(pairs) for column in zip(*pairs))
            ratio /= mean
            rows.append([ratio + (right - ratio * n) / mean for right, n in pairs])
    return rows


def judge_all(cells):
    found = []
    for claim in CLAIMS:
        ours = numbers(cells, claim["ours"], claim["metric"])
        other = numbers(cells, claim["other"], claim["metric"])
        if ours and all(ours) and (not claim["other"] or (other and all(other))):
            found.append(judge(claim, ours, other))
    return found


def table(results):
    """Results -> the README's tables, in Markdown."""
    cells, k = results["cells"], results["sizes"]["votes"]
    vft = numbers(cells, "vft", "accuracy")
    lines = [
        f"| cell | accuracy | over VFT [95 %] | majority@{k} | A-accuracy train / held-out | reference NLL "
        "| no answer | repeated 4-grams | paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(cell["name"] for cell in cells):
        rows = [cell["metrics"] for cell in cells if cell["name"] == name]
        mean = {
            key: sum(row.get(key, float("nan")) for row in rows) / len(rows)
            for key in (
                "accuracy",
                "majority",
                "a_train",
                "a_held",
                "reference_nll",
                "missing_answers",
                "repeated_4grams",
            )
        }
        over = ""
        if vft and name != "vft":
            difference = paired_difference(vft, numbers(cells, name, "accuracy"))
            over = INTERVAL.format(*difference)
        line = (
            "| {name} | {accuracy:.1%} | {over} | {majority:.1%} | {a_train:.1%} / {a_held:.1%} "
            "| {reference_nll:.3f} | {missing_answers:.1%} | {repeated_4grams:.1%} | {paper} |"
        )
        lines.append(line.format(name=name, over=over, paper=PAPER.get(name, ""), **mean).replace("nan%", ""))
    lines += ["", *claims_table(results["claims"])]
    if results.get("grid"):
        lines += grid_table(results["grid"])
    if results.get("ablations_one_seed"):
        first = [numbers(cells, "vft", "accuracy")[0]]
        lines += [
            "",
            *markdown(
                ("ablation, one seed", "accuracy", "over VFT [95 %, one seed]", "A-accuracy held-out"),
                [
                    (
                        cell["name"],
                        f"{cell['metrics']['accuracy']:.1%}",
                        INTERVAL.format(*paired_difference(first, [from_hex(cell["correct"])])),
                        f"{cell['metrics']['a_held']:.1%}",
                    )
                    for cell in results["ablations_one_seed"]
                ],
            ),
        ]
    return "\n".join(lines)


def grid_table(grid):
    """The whole grid: accuracy on validation problems, a row a method, a column a learning rate."""
    lrs = sorted({one["lr"] for one in grid})
    rows = []
    for name in dict.fromkeys(one["name"] for one in grid):
        shown = {one["lr"]: f"{one['accuracy']:.1%}" for one in grid if one["name"] == name}
        rows.append((name, *(shown[lr] for lr in lrs)))
    return ["", *markdown(("grid, first seed, validation", *(f"lr {lr:g}" for lr in lrs)), rows)]


def draw(results, recipe, out):
    """Differences with intervals; scores over training with and without the constraint; histograms VFT
    beside AFT."""
    cells = results["cells"]
    vft = numbers(cells, "vft", "accuracy")
    rows = [
        (name, *paired_difference(vft, numbers(cells, name, "accuracy")))
        for name in dict.fromkeys(cell["name"] for cell in cells)
        if vft and name != "vft"
    ]
    if vft:
        plots.differences(rows, "greedy accuracy over VFT", out / f"{recipe.root.name}_aft_differences.svg")
    first = {
        cell["name"]: recipe.cell_folder(cell["name"], 0, *cell["settings"].values())
        for cell in cells
        if cell["seed"] == 0
    }
    logs = {
        name: (first[name] / "model" / "metrics.jsonl").read_text().splitlines()
        for name in ("aft-none@twin", "aft-detached", "aft-boundary")
    }
    plots.scores_over_training(
        {name: list(map(json.loads, log)) for name, log in logs.items()},
        out / f"{recipe.root.name}_aft_collapse.svg",
    )
    plots.score_histograms(
        {name: recipe.scores(first[name]) for name in ("vft", "aft-boundary")},
        out / f"{recipe.root.name}_aft_misalignment.svg",
    )


def slim(cells):
    """Cells without the numbers of single problems that no claim needs, to keep the results file small."""
    kept = {(claim[side], claim["metric"]) for claim in CLAIMS for side in ("ours", "other")}
    lists = {"a_held_pairs": "a_held", "reference_nlls": "reference_nll"}
    needed = lambda name, key: key not in lists or (name, lists[key]) in kept
    found = []
    for cell in cells:
        metrics = {
            k: round(v, 5) if isinstance(v, float) else v
            for k, v in cell["metrics"].items()
            if needed(cell["name"], k) and k != "pass"
        }
        if "a_held_pairs" in metrics:
            metrics["a_held_pairs"] = pack_pairs(unpack_pairs(metrics["a_held_pairs"]))
        found.append({**cell, "metrics": metrics})
    return found


def ablation_jobs(sizes, chosen):
    """One seed each: the boundary's margin, K, and the reference solution kept out of the ranking."""
    jobs = [(f"margin {m:g}", "aft-boundary", (chosen["aft-boundary"][0], m)) for m in sizes.other_margins]
    for name in ("aft-detached", "aft-boundary") if sizes.other_ks else ():
        jobs += [(f"K = {k}", name, chosen[name], (), k) for k in sizes.other_ks]
        jobs.append(("reference not ranked", name, chosen[name], ("--no-reference-in-positives",)))
    return jobs


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="toy")
    parser.add_argument("--init", default="toy", help="base model folder")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--problems", type=int, help="training questions")
    parser.add_argument("--samples-per", type=int, help="K, responses a question")
    parser.add_argument("--pool", type=int, help="held-out questions of A-accuracy")
    parser.add_argument("--lrs", help="the grid of learning rates, such as 1e-4,3e-4")
    parser.add_argument("--methods", help="a part of them, such as rft,aft-boundary; no figures")
    parser.add_argument("--name", help="of the results file, instead of aft or aft_<set>")
    parser.add_argument("--fast", action="store_true", help="a small part of the work; no results file")
    parser.add_argument("--fresh", action="store_true", help="run every cell again")
    parser.add_argument("--jobs", type=int, default=2, help="cells at once (CPU: one thread each)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--train-flags", default="", help="further flags of train.py, such as '--lr 2e-5'")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--validation-split", default="validation")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--table", action="store_true", help="print the tables of the committed results")
    args = parser.parse_args(argv)
    name = args.name or ("aft" if args.data == "toy" else "aft_" + args.data.split(":")[0])
    if args.table:
        print(table(json.loads((RESULTS / f"{name}.json").read_text())))
        return
    sizes = (FAST if args.data == "toy" else SLICE) if args.fast else Sizes()
    given = {
        "seeds": args.seeds,
        "problems": args.problems,
        "k": args.samples_per,
        "pool": args.pool,
        "lrs": args.lrs and tuple(map(float, args.lrs.split(","))),
    }
    sizes = replace(sizes, **{key: value for key, value in given.items() if value})
    methods = METHODS + RANKED if args.data == "toy" else METHODS
    if args.methods:
        asked = tuple(args.methods.split(","))
        if unknown := set(asked) - set(methods):
            raise InputError(f"--methods has {', '.join(sorted(unknown))}; allowed: {', '.join(methods)}")
        methods, sizes = asked, replace(sizes, other_margins=(), other_ks=())
    recipe, started = Recipe(args, sizes), time.perf_counter()
    if args.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1" if args.jobs > 1 else "2")
        torch.set_num_threads(1)

    settings = [
        (method, lr, margin)
        for method in methods
        for lr in sizes.lrs
        for margin in (sizes.margins if method.endswith("boundary") else (None,))
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        tuned = [pool.submit(recipe.vft, seed) for seed in range(sizes.seeds)]
        tuned[0].result()  # the grid needs the first seed alone
        grid = []  # a slice has one setting a method: nothing to choose
        chosen = {method: (lr, margin) for method, lr, margin in settings}
        if len(settings) > len(methods):
            grid = list(pool.map(lambda setting: recipe.grid_cell(*setting), settings))
            for setting in sorted(grid[::-1], key=lambda one: one["accuracy"]):  # the first of equals
                chosen[setting["name"]] = (setting["lr"], setting["margin"])
        for one in tuned[1:]:
            one.result()
        if "aft-boundary" in chosen:
            chosen["aft-none@twin"] = (chosen["aft-boundary"][0], None)
        cells = list(
            pool.map(
                lambda job: recipe.cell(*job),
                [
                    *(("vft", seed) for seed in range(sizes.seeds)),
                    *((method, seed, *chosen[method]) for seed in range(sizes.seeds) for method in chosen),
                ],
            )
        )
        ablations = list(pool.map(lambda job: recipe.ablation(*job), ablation_jobs(sizes, chosen)))
    results = {
        "command": " ".join(["python -m minicot.recipes.aft", *(argv if argv is not None else sys.argv[1:])]),
        **made_by(args, started),
        "sizes": asdict(sizes),
        "claims": judge_all(cells),
        "cells": slim(cells),
        "grid": grid,
        "ablations_one_seed": slim(ablations),
    }
    out = recipe.root / "results" if args.fast else RESULTS
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", results, indent=None)
    if not args.methods:
        draw(results, recipe, out)
    print(table(results))
    print(f"{results['minutes']} minutes -> {out / name}.json")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None
