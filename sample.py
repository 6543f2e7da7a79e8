"""Answer a question, write K graded responses a problem, or evaluate a model.

    python sample.py                                            # worked solutions of held-out toy problems
    python sample.py "Tom has 3 apples. Ana has 4 more apples than Tom. How many apples does Ana have?"
    python sample.py --split train --n 8 --out runs/samples.jsonl              # K = 8; may be resumed
    python sample.py --evaluate --n 8 --out runs/sft/results.json              # accuracy, majority@8, pass@k
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: waiting threads sleep, not spin

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from minicot.config import SampleConfig, check, run
from minicot.data import Problem, read_problems, read_samples, samples_to_row, style_of
from minicot.metrics import accuracy, degeneration, majority_accuracy, pass_at_k
from minicot.sampling import sample_groups, step_reward
from minicot.tokenizer import Tokenizer
from minicot.training import pick_device, train_first, write_json
from minicot.weights import load_model


def find_model(folder):
    """--model, or what the step before left under runs/; without one, train.py is run first."""
    if folder:
        return Path(folder)
    return Path("runs/aft" if Path("runs/aft/model.safetensors").is_file() else train_first())


def show(samples):
    """A question and its responses: green where the answer is right, red where it is wrong."""
    print(
        f"\n{samples.problem.question}"
        + (f"   [gold: {samples.problem.answer}]" if samples.problem.answer else "")
    )
    for response in samples.responses:
        colour = {True: 32, False: 31, None: 36}[response.correct]
        print(
            f"\033[{colour}m{response.text.strip()}\033[0m"
            + ("" if response.finish == "stop" else "  (cut: too long)")
        )


def write_samples(path, groups, problems, settings, overwrite):
    """Stream Samples to a JSON-lines file; problems that it holds already are not sampled again. Settings
    stand beside it in <path>.settings.json, and going on with other settings is refused."""
    path, beside = Path(path), Path(f"{path}.settings.json")
    done = set()
    if path.is_file() and path.stat().st_size and not overwrite:
        before = json.loads(beside.read_text()) if beside.is_file() else None
        if before != settings:
            raise ValueError(
                f"--out {path} was made with other settings ({beside}); allowed: the same, --overwrite, "
                "or another file"
            )
        drop_unfinished_line(path)
        done = {samples.problem.id for samples in read_samples(path)} if path.stat().st_size else set()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(beside, settings)
    left = [problem for problem in problems if problem.id not in done]
    print(f"{len(left)} problems to sample, {len(done)} are in {path} already")
    with open(path, "a" if done else "w", encoding="utf-8") as file:
        for samples in tqdm(groups(left), total=len(left), unit="problem", disable=None):
            file.write(json.dumps(samples_to_row(samples), ensure_ascii=False) + "\n")
            file.flush()
    return read_samples(path)


def drop_unfinished_line(path):
    """An interrupted write leaves a last line without its newline: cut it off."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def summarise(greedy, sampled, tokenizer):
    """Metrics of greedy Samples (one response each) and, where sampled, of K responses each."""
    correct = [samples.responses[0].correct for samples in greedy]
    responses = [samples.responses[0] for samples in greedy]
    share, low, high = accuracy(correct)
    metrics = {
        "accuracy": share,
        "low": low,
        "high": high,
        "problems": len(correct),
        **degeneration([response.ids for response in responses], [response.answer for response in responses]),
        "unfinished": sum(response.finish == "length" for response in responses) / len(responses),
    }
    if sampled:
        k = len(sampled[0].responses)
        metrics["k"] = k
        metrics["majority"] = majority_accuracy(
            [[r.answer for r in s.responses] for s in sampled], [s.problem.answer for s in sampled]
        )
        counts = [sum(r.correct for r in s.responses) for s in sampled]
        metrics["pass"] = {
            str(j): sum(pass_at_k(k, c, j) for c in counts) / len(counts)
            for j in (1, 2, 4, 8, 16, 32, 64, 128)
            if j <= k
        }
    return metrics, correct


def main(config):
    for name, ok in {
        "n": config.n > 0,
        "temperature": config.temperature >= 0,
        "top_p": 0 < config.top_p <= 1,
        "top_k": config.top_k >= 0,
        "batch_size": config.batch_size > 0,
        "limit": config.limit >= 0,
        "max_new_tokens": config.max_new_tokens >= 0,
    }.items():
        check(ok, "--" + name.replace("_", "-"), getattr(config, name), "see --help")
    check(
        config.reward == "correct" or config.data == "toy",
        "--reward",
        config.reward,
        "correct, unless --data is toy",
    )
    device = pick_device(config.device)
    style = config.style or style_of(config.data)
    showing = not (config.evaluate or config.out)
    if config.question:
        problems = [Problem(id="typed", question=config.question)]
    else:
        problems = read_problems(config.data, config.split, limit=config.limit or (5 if showing else 0))
    folder = find_model(config.model)
    tokenizer = Tokenizer(folder)
    model = load_model(folder, dtype=getattr(torch, config.dtype), device=device).eval()
    max_new_tokens = config.max_new_tokens or (96 if config.data == "toy" else 256)

    def groups(problems, n=config.n, temperature=config.temperature):
        return sample_groups(
            model,
            tokenizer,
            problems,
            n=n,
            mode=config.mode,
            style=style,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            batch_size=config.batch_size,
            reward=step_reward if config.reward == "steps" else None,
        )

    if config.evaluate:
        without = [problem.id for problem in problems if problem.answer is None]
        check(not without, "--data", config.data, f"problems with an answer ({len(without)} have none)")
        start = time.perf_counter()
        greedy = list(tqdm(groups(problems, 1, 0.0), total=len(problems), unit="problem", disable=None))
        sampled = (
            list(tqdm(groups(problems), total=len(problems), unit="problem", disable=None))
            if config.n > 1
            else []
        )
        metrics, correct = summarise(greedy, sampled, tokenizer)
        out = Path(config.out or folder / "results.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            out,
            {
                "command": " ".join(["python", "sample.py", *sys.argv[1:]]),
                "settings": dataclasses.asdict(config),
                "model": str(folder),
                "metrics": metrics,
                "problem_ids": [p.id for p in problems],
                "correct": [int(c) for c in correct],
            },
        )
        print(
            f"{folder}: greedy accuracy {metrics['accuracy']:.1%} "
            f"[{metrics['low']:.1%}, {metrics['high']:.1%}] on "
            f"{len(problems)} problems; missing answers {metrics['missing_answers']:.1%}, mean length "
            f"{metrics['mean_length']:.1f} tokens, repeated 4-grams {metrics['repeated_4grams']:.1%}"
        )
        if sampled:
            print(
                f"majority@{config.n} {metrics['majority']:.1%}; "
                + ", ".join(f"pass@{k} {share:.1%}" for k, share in metrics["pass"].items())
            )
        print(f"{time.perf_counter() - start:.0f} s -> {out}")
    elif config.out:
        settings = {
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name not in ("out", "overwrite", "limit", "batch_size")
        }
        written = write_samples(
            config.out, groups, problems, {**settings, "model": str(folder)}, config.overwrite
        )
        graded = [
            response.correct
            for samples in written
            for response in samples.responses
            if response.correct is not None
        ]
        print(
            f"{len(written)} problems, {config.n} responses each"
            + (f", {sum(graded) / len(graded):.1%} of them right" if graded else "")
            + f" -> {config.out}"
        )
    else:
        for samples in groups(problems, config.n, config.temperature if config.n > 1 else 0.0):
            show(samples)


if __name__ == "__main__":
    run(main, SampleConfig)
