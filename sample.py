"""Answer a question, write K graded responses a problem, or evaluate a model.

    python sample.py                                            # worked solutions of held-out toy problems
    python sample.py "Tom has 3 apples. Ana has 4 more apples than Tom. How many apples does Ana have?"
    python sample.py --model runs/sft --split train --n 8 --out runs/samples.jsonl    # K = 8; may be resumed
    python sample.py --model runs/sft --evaluate --n 8             # accuracy, majority@8, pass@k
    python sample.py --image picture.png "How many apples does Tom have?"        # a vision-language model
    python sample.py --verifier runs/dpo --ref runs/sft --samples runs/samples.jsonl --out runs/scored.jsonl
    python sample.py --assess --model runs/sft --samples runs/samples.jsonl --out runs/assessed.json

`samples` is one problem's Samples, `sampled` a list or a stream of them.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: waiting threads sleep, not spin

import dataclasses
import itertools
import json
import shlex
import shutil
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from minicot.answers import STYLES
from minicot.config import SampleConfig, check, run
from minicot.data import grade_answers, image_reader, readable, render
from minicot.errors import InputError
from minicot.metrics import accuracy, assessment, degeneration, majority_accuracy, pass_at_k
from minicot.records import Problem, read_samples, samples_to_row
from minicot.sampling import sample_groups
from minicot.sets import default_length, read_problems, style_of
from minicot.tokenizer import Tokenizer
from minicot.toy import pictures
from minicot.runs import write_json, write_jsonl
from minicot.training import pick_device, report_unreadable, resolve, train_first, weights_digest
from minicot.verifier import assess, curves, log_ratio_scores
from minicot.weights import load_model, read_json


def find_model(folder):
    """--model, or what the step before left under runs/; without one, train.py is run first."""
    aligned = Path("runs/aft/model.safetensors").is_file()
    return resolve(folder or ("runs/aft" if aligned else train_first()))


def load(folder, config, device):
    """(model, tokenizer, reader of pictures or None) of a folder."""
    tokenizer = Tokenizer(folder, config.chat_template)
    model = load_model(folder, dtype=getattr(torch, config.dtype), device=device).eval()
    allowed = f"one whose tokenizer has at most {model.config.vocab_size} ids"
    check(tokenizer.vocab_size <= model.config.vocab_size, "the model", str(folder), allowed)
    return model, tokenizer, image_reader(model, tokenizer, folder)


def about(config, folder):
    """What a results file says of its making."""
    command = shlex.join(["python", "sample.py", *sys.argv[1:]])
    return {"command": command, "model": str(folder), "settings": dataclasses.asdict(config)}


def grade_steps(sampled, *, mode, style):
    """A grader: final answers, and the toy step oracle's grade in [0, 1] as reward, as AFT's GSM8K-RANK."""
    graded = []
    for samples in grade_answers(sampled, mode=mode, style=style):
        rewards = [pictures.grade(samples.problem.id, response.text) for response in samples.responses]
        responses = [dataclasses.replace(r, reward=x) for r, x in zip(samples.responses, rewards)]
        graded.append(dataclasses.replace(samples, responses=responses))
    return graded


def verdict(response):
    """A response's grade in a word (none where it is not graded), and its colour on a terminal."""
    unfinished = "cut" if response.finish == "length" else ""
    if response.correct is None:
        return unfinished, 36
    if response.correct:
        return "right", 32
    return ("wrong" if response.answer is not None else unfinished or "no answer"), 31


def show(sampled):
    """Print problems and their responses for a person to read, then how many are right. Coloured on a
    terminal alone, and not where NO_COLOR is set."""
    width, marks = shutil.get_terminal_size().columns, []
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def put(text, indent="", colour=None):
        wrap = partial(textwrap.fill, width=width, initial_indent=indent, subsequent_indent=indent)
        text = "\n".join(map(wrap, text.splitlines()))
        print(f"\033[{colour}m{text}\033[0m" if coloured and colour else text)

    for samples in sampled:
        for turn in samples.problem.history or []:
            put(f"{turn['role']}: {turn['content']}")
        put(render(samples.problem, "plain"))
        for name, _ in samples.problem.images:
            put(f"picture: {name}")
        if samples.problem.answer is not None:
            put(f"gold answer: {samples.problem.answer}")
        if samples.error:
            put(samples.error, "  ", 31)
        for response in samples.responses:
            word, colour = verdict(response)
            put(f"{word}:" if word else "", "  ", colour)
            put(response.text.strip(), "    ", colour)
        marks += [response.correct for response in samples.responses if response.correct is not None]
        print()
    if marks:
        print(f"{sum(marks)} of {len(marks)} responses are right")


def report_unread(sampled, then=""):
    """Say which problems had a picture that could not be read."""
    unread = [samples for samples in sampled if samples.error]
    if unread:
        print(
            f"{len(unread)} of {len(sampled)} problems without a response, as their picture can't be read"
            f"{then}; the first is {unread[0].problem.id!r}: {unread[0].error}"
        )


# ---- samples.jsonl -------------------------------------------------------------------------------


def write_samples(path, draw, problems, settings, overwrite):
    """Stream draw(problems) to a JSON-lines file; problems that it holds already are not sampled again.
    Settings stand beside it in <path>.settings.json; going on with other settings or another model is
    refused."""
    path, beside, done = Path(path), Path(f"{path}.settings.json"), set()
    if path.is_dir():
        raise InputError(f"--out {path} is a folder, expected a file")
    if path.is_file() and path.stat().st_size and not overwrite:
        if not beside.is_file() or read_json(beside) != settings:
            raise InputError(
                f"--out {path} was made with other settings or another model ({beside}); "
                "allowed: the same, --overwrite, or another file"
            )
        drop_unfinished_line(path)
        done = {samples.problem.id for samples in read_samples(path)} if path.stat().st_size else set()
    path.parent.mkdir(parents=True, exist_ok=True)
    left = [problem for problem in problems if problem.id not in done]
    print(f"{len(left)} problems to sample, {len(done)} are in {path} already")
    stream = draw(left)
    first = next(stream, None)  # what is there is only replaced once there is something new
    write_json(beside, settings)
    with open(path, "a" if done else "w", encoding="utf-8") as file:
        sampled = itertools.chain([first] if first else [], stream)
        for samples in tqdm(sampled, total=len(left), unit="problem", disable=None):
            file.write(json.dumps(samples_to_row(samples), ensure_ascii=False) + "\n")
            file.flush()
    return read_samples(path)


def drop_unfinished_line(path):
    """An interrupted write leaves a last line without its newline: cut it off."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


# ---- evaluation ----------------------------------------------------------------------------------


def summarise(greedy, sampled, k):
    """Metrics of greedy Samples (one response each) and, where there are any, of k sampled responses each. A
    problem without a response counts as wrong."""
    responses = [samples.first for samples in greedy]
    share, low, high = accuracy([response.correct for response in responses])
    metrics = {
        "accuracy": share,
        "low": low,
        "high": high,
        "problems": len(responses),
        **degeneration([r.ids for r in responses], [r.answer for r in responses]),
        "unfinished": sum(response.finish == "length" for response in responses) / len(responses),
    }
    if sampled:
        counts = [sum(response.correct for response in samples.responses) for samples in sampled]
        answers = [[response.answer for response in samples.responses] or [None] for samples in sampled]
        metrics |= {
            "k": k,
            "majority": majority_accuracy(answers, [samples.problem.answer for samples in sampled]),
            "pass": {
                str(j): sum(pass_at_k(k, c, j) for c in counts) / len(counts)
                for j in (2**i for i in range(14))
                if j <= k
            },
        }
    return metrics


def evaluate(config, draw, problems, folder):
    """Greedy accuracy and, with --n over 1, majority@n and pass@k of the problems -> a file and two lines."""
    without = [problem.id for problem in problems if problem.answer is None]
    check(not without, "--evaluate", "given", f"problems with an answer ({len(without)} have none)")
    out, start = Path(config.out or folder / "results.json"), time.perf_counter()
    ours = out.suffix == ".json" and (not out.exists() or "metrics" in read_json(out))
    if out.exists() and not ours and not config.overwrite:
        raise InputError(f"--out {out} holds no results of sample.py; allowed: another file, --overwrite")
    watch = lambda stream: list(tqdm(stream, total=len(problems), unit="problem", disable=None))
    greedy = watch(draw(problems, n=1, temperature=0.0))
    sampled = watch(draw(problems)) if config.n > 1 else []
    metrics = summarise(greedy, sampled, config.n)
    lists = {
        "problem_ids": [problem.id for problem in problems],
        "correct": [int(samples.first.correct) for samples in greedy],
        "right": [[sum(r.correct for r in samples.responses), config.n] for samples in sampled],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {**about(config, folder), "metrics": metrics, **lists})
    interval = f"[{metrics['low']:.1%}, {metrics['high']:.1%}]"
    print(
        f"{folder}: greedy accuracy {metrics['accuracy']:.1%} {interval} on {len(problems)} problems; "
        f"missing answers {metrics['missing_answers']:.1%}, mean length {metrics['mean_length']:.1f} tokens"
        f", repeated 4-grams {metrics['repeated_4grams']:.1%}"
    )
    if config.n > 1:
        passes = ", ".join(f"pass@{k} {share:.1%}" for k, share in metrics["pass"].items())
        print(f"majority@{config.n} {metrics['majority']:.1%}; {passes}")
    report_unread(greedy, " (they count as wrong)")
    print(f"{time.perf_counter() - start:.0f} s -> {out}")


# ---- scores of samples: DPO as verifier, a model's own -------------------------------------------


def files_of(config, flag, names):
    """--out, which must be new, and the --samples that `flag` scores."""
    for name in names:
        check(getattr(config, name), f"--{name}", getattr(config, name), f"a path, with {flag}")
    out = Path(config.out)
    check(config.overwrite or not out.exists(), "--out", config.out, "a new file, or --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out, read_samples(config.samples)[: config.limit or None]


def verify(config, device):
    """Score --samples by log pi - log pi_ref -> --out, and show how well choosing by it does."""
    out, whole = files_of(config, "--verifier", ("samples", "ref", "out"))
    sampled = [samples for samples in whole if samples.responses]
    check(sampled, "--samples", config.samples, "samples with responses")
    model, tokenizer, reader = load(resolve(config.verifier), config, device)
    ref, its_tokenizer, _ = load(resolve(config.ref), config, device)
    same = its_tokenizer.fingerprint == tokenizer.fingerprint
    check(same, "--ref", config.ref, "a model with the verifier's tokenizer")
    name = "dpo-cut" if config.truncate_words else "dpo"
    options = dict(name=name, mode=config.mode, words=config.truncate_words, tokens=config.token_scores)
    options |= dict(reader=reader, batch_size=config.batch_size)
    scored = log_ratio_scores(model, ref, tokenizer, sampled, **options)
    scored = list(tqdm(scored, total=len(sampled), unit="problem", disable=None))
    of_id = {samples.problem.id: samples for samples in [*whole, *scored]}
    write_jsonl(out, map(samples_to_row, of_id.values()))
    most = min(len(samples.responses) for samples in scored)
    if all(samples.problem.answer is not None for samples in scored):
        for n, ways in curves(scored, name, sizes=[2**i for i in range(14) if 2**i <= most]).items():
            print(f"n = {n}: " + ", ".join(f"{way} {sum(v) / len(v):.1%}" for way, v in ways.items()))
    print(f"{len(scored)} problems scored -> {out}")


def assess_samples(config, device):
    """The model's own scores of --samples and of written solutions -> --out and a line."""
    out, sampled = files_of(config, "--assess", ("samples", "out"))
    folder = find_model(config.model)
    model, tokenizer, reader = load(folder, config, device)
    options = dict(mode=config.mode, reference=config.reference, reader=reader, batch_size=config.batch_size)
    problems, unreadable = readable([samples.problem for samples in sampled], reader)
    report_unreadable(unreadable, problems)
    ids = {problem.id for problem in problems}
    sampled = [samples for samples in sampled if samples.problem.id in ids]
    watch = lambda groups: tqdm(groups, unit="problem", disable=None)
    judged = assess(model, tokenizer, sampled, watch=watch, **options)
    metrics = assessment(judged)
    lists = judged | {"ordered_pairs": metrics.pop("ordered_pairs")}
    write_json(out, {**about(config, folder), "metrics": metrics, **lists})
    of_pairs = "no pair of a better and a worse response"
    if metrics["pairs"]:
        interval = f"[{metrics['low']:.1%}, {metrics['high']:.1%}]"
        of_pairs = f"A-accuracy {metrics['assessment_accuracy']:.1%} {interval} of {metrics['pairs']:,} pairs"
    nll = "no solution" if metrics["reference_nll"] is None else f"{metrics['reference_nll']:.3f}"
    print(f"{folder}: {of_pairs} on {metrics['problems']} problems; reference NLL {nll} -> {out}")


# ---- the script ----------------------------------------------------------------------------------


def main(config):
    on_toy = config.data in ("toy", "toy-pictures") and config.question is None
    check(config.reward == "correct" or on_toy, "--reward", config.reward, "correct, but for toy problems")
    check(config.question or not config.image, "--image", config.image, "nothing, without a question")
    style = config.style or style_of(config.data)
    check(style in STYLES, "--style", style, ", ".join(STYLES))
    for name, mode in (("truncate_words", "verifier"), ("token_scores", "verifier"), ("reference", "assess")):
        flag, value = "--" + name.replace("_", "-"), getattr(config, name)
        check(getattr(config, mode) or not value, flag, value, f"only with --{mode}")
    check(not (config.assess and config.verifier), "--assess", "given", "no --verifier beside it")
    device = pick_device(config.device)
    if config.assess or config.verifier:
        return assess_samples(config, device) if config.assess else verify(config, device)
    showing = not (config.evaluate or config.out)
    if config.question is not None:
        check(config.question.strip(), "the question", config.question, "some words")
        image = {"image": Path(config.image).name, "image_root": str(Path(config.image).resolve().parent)}
        problems = [Problem(id="typed", question=config.question, **image if config.image else {})]
    else:
        problems = read_problems(config.data, config.split, limit=config.limit or (5 if showing else 0))
    folder = find_model(config.model)
    print(f"model: {folder}")
    model, tokenizer, reader = load(folder, config, device)
    settings = dict(
        mode=config.mode,
        style=style,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens or default_length(config.data),
        grade=partial(grade_steps, mode=config.mode, style=style) if config.reward == "steps" else None,
        reader=reader and dataclasses.replace(reader, blind=config.blind),
    )

    default = 0.0 if showing and config.n == 1 else 1.0
    temperature = default if config.temperature is None else config.temperature

    def draw(problems, n=config.n, temperature=temperature):
        return sample_groups(model, tokenizer, problems, n=n, temperature=temperature, **settings)

    if config.evaluate:
        evaluate(config, draw, problems, folder)
    elif config.out:
        free = ("out", "overwrite", "limit", "batch_size")  # may change when sampling goes on
        recorded = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
        recorded |= {
            "model": str(folder),
            "weights": weights_digest(folder),
            "tokenizer": tokenizer.fingerprint,
        }
        sampled = write_samples(config.out, draw, problems, recorded, config.overwrite)
        graded = [r.correct for samples in sampled for r in samples.responses if r.correct is not None]
        share = f", {sum(graded) / len(graded):.1%} of them right" if graded else ""
        print(f"{len(sampled)} problems, {config.n} responses each{share} -> {config.out}")
        report_unread(sampled)
    else:
        show(draw(problems))


if __name__ == "__main__":
    run(main, SampleConfig)
