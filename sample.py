"""Answer a question, write K graded responses a problem, or evaluate a model.

    python sample.py                                            # worked solutions of held-out toy problems
    python sample.py "Tom has 3 apples. Ana has 4 more apples than Tom. How many apples does Ana have?"
    python sample.py --model runs/sft --split train --n 8 --out runs/samples.jsonl    # K = 8; may be resumed
    python sample.py --model runs/sft --evaluate --n 8             # accuracy, majority@8, pass@k
    python sample.py --image picture.png "How many apples does Tom have?"        # a vision-language model
    python sample.py --verifier runs/dpo --ref runs/sft --samples runs/samples.jsonl --out runs/scored.jsonl
    python sample.py --verifier runs/prm --samples runs/samples.jsonl --out runs/scored.jsonl  # a PRM
    python sample.py --samples runs/samples.jsonl --html page.html  # a page to read them in
    python sample.py --assess --model runs/sft --samples runs/samples.jsonl --out runs/assessed.json
    python sample.py --evaluate --model LM --data FILE --prune runs/pruner --shots pool.jsonl --budget 256
    python sample.py --endpoint http://localhost:8000/v1 --model NAME --n 8 --out runs/samples.jsonl

`samples` is one problem's Samples, `sampled` a list or a stream of them.
"""

import os

# before torch loads: waiting threads spin briefly, then sleep (tests/bench/README.md says what it is worth)
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import dataclasses
import itertools
import json
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from minicot.answers import STYLES
from minicot.chat import Endpoint, describe_failures, many, picture
from minicot.config import SampleConfig, check, run
from minicot.data import IMAGE, grade_answers, image_reader, open_pictures, readable, render, seed_of
from minicot.errors import InputError
from minicot.metrics import accuracy, assessment, degeneration, majority_accuracy, pass_at_k
from minicot.parallel import first, from_first, quiet, size, spread
from minicot.pruner import prune_by
from minicot.records import Problem, Response, Samples, read_samples, samples_to_row
from minicot.sampling import sample_groups
from minicot.sets import TOYS, default_length, read_problems, style_of
from minicot.tokenizer import Tokenizer
from minicot.toy import pictures
from minicot.runs import open_model, write_json, write_jsonl, write_text
from minicot.training import pick_device, report_unreadable, resolve, set_layers, train_first
from minicot.training import weights_digest
from minicot.verifier import assess, curves, log_ratio_scores, reward_scores
from minicot.view import page
from minicot.weights import is_reward_model, read_json


def find_model(folder):
    """--model, or what the step before left under runs/; without one, train.py is run first."""
    aligned = Path("runs/aft/model.safetensors").is_file()
    return resolve(folder or ("runs/aft" if aligned else train_first()))


def load(folder, config, device, reward=False):
    """(model, tokenizer, reader of pictures or None) of a folder; reward: of a reward model's."""
    model, tokenizer = open_model(folder, config, device, reward)
    set_layers(model, compile=config.compile)
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


def report_unanswered(sampled, then=""):
    """Say which problems got no response: a picture that can't be read, a server that does not answer."""
    unanswered = [samples for samples in sampled if samples.error]
    if unanswered:
        print(
            f"{len(unanswered)} of {len(sampled)} problems without a response{then}; "
            f"the first is {unanswered[0].problem.id!r}: {unanswered[0].error}"
        )


# ---- a server's responses ------------------------------------------------------------------------


def messages_of(problem, mode):
    """A problem's turns as a server takes them, each picture in the place of its placeholder."""
    turns = [*(problem.history or []), {"role": "user", "content": render(problem, mode)}]
    if not problem.images:
        return turns
    try:
        opened = list(map(picture, open_pictures(problem.images)))
    except OSError as error:
        raise InputError(str(error)) from None
    texts = [re.split(f"({IMAGE})", turn["content"]) for turn in turns]
    places = sum(text.count(IMAGE) for text in texts)
    if places != len(opened):
        raise InputError(f"{places} {IMAGE} in the text, {len(opened)} pictures; allowed: one for each")
    part = lambda text: opened.pop(0) if text == IMAGE else {"type": "text", "text": text.strip()}
    contents = [[part(piece) for piece in text if piece.strip()] for text in texts]
    return [{"role": turn["role"], "content": content} for turn, content in zip(turns, contents)]


def sample_server(server, problems, *, n, mode, seed, grade, limit, dry_run=False):
    """Graded Samples of the problems, n responses each from an Endpoint but for those whose request failed;
    where all did, `error` says why. Says what was asked, and what failed. InputError where nothing was
    answered. dry_run prints the requests and sends nothing."""
    jobs = [(problem, j) for problem in problems for j in range(n)]

    def ask(job, how=server.answer):
        problem, j = job
        return how(messages_of(problem, mode), seed=seed_of(seed, problem.id, j) % 2**31)

    if dry_run:
        for job in jobs:
            print(ask(job, server.preview))
        return print(
            f"{len(jobs)} requests, {server.events.count('cached')} of them cached; nothing was sent"
        )
    replies, sampled = list(many(ask, jobs, limit=limit)), []
    for i, problem in enumerate(problems):
        own = replies[i * n : (i + 1) * n]
        responses = [Response(one.text, finish=one.finish) for one in own if not isinstance(one, InputError)]
        sampled += grade([Samples(problem, responses, error=None if responses else str(own[0]))])
    failed, counts = describe_failures(replies), Counter(server.events)
    missing = sum(not samples.responses for samples in sampled)
    print(
        f"{counts['sent']} requests sent, {counts['again']} of them again; {counts['cached']} replies from "
        f"the cache, {counts['corrupt']} corrupt ones in it"
        + (f"\n{failed}\n{missing} of {len(sampled)} problems without a response" if failed else "")
    )
    if missing == len(sampled):
        raise InputError(f"no response from {server.address}; {sampled[0].error}")
    return sampled


# ---- samples.jsonl -------------------------------------------------------------------------------


def write_samples(path, draw, problems, settings, overwrite, whole):
    """Stream draw(problems) to a JSON-lines file; problems that it holds already are not sampled again.
    Settings stand beside it in <path>.settings.json; going on with other settings or another model is
    refused. `whole`: what draw makes is all of the file, but for problems without a response. With torchrun
    every rank draws and rank 0 writes."""
    path, beside = Path(path), Path(f"{path}.settings.json")
    done = from_first(partial(sampled_before, path, beside, settings, overwrite, whole))
    left = [problem for problem in problems if problem.id not in done]
    if not whole:
        print(f"{len(left)} problems to sample, {len(done)} are in {path} already")
    stream = iter(draw(left))
    one = next(stream, None)  # what is there is only replaced once there is something new
    stream = itertools.chain([one] if one else [], stream)
    if not first():
        return list(stream)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(beside, settings)
    with open(path, "a" if done else "w", encoding="utf-8") as file:
        for samples in tqdm(stream, total=len(left), unit="problem", disable=None):
            if samples.responses or not whole:
                file.write(json.dumps(samples_to_row(samples), ensure_ascii=False) + "\n")
                file.flush()
    return read_samples(path)


def sampled_before(path, beside, settings, overwrite, whole):
    """Ids of the problems that the file holds; refuses one that was made in another way."""
    if path.is_dir():
        raise InputError(f"--out {path} is a folder, expected a file")
    if overwrite or not (path.is_file() and path.stat().st_size):
        return set()
    if not beside.is_file() or read_json(beside) != settings:
        raise InputError(
            f"--out {path} was made with other settings or another model ({beside}); "
            "allowed: the same, --overwrite, or another file"
        )
    if whole:
        return set()
    drop_unfinished_line(path)
    return {samples.problem.id for samples in read_samples(path)} if path.stat().st_size else set()


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
    spoken = [r.text.split() if r.ids is None else r.ids for r in responses]  # a server keeps its ids: words
    metrics = {
        "accuracy": share,
        "low": low,
        "high": high,
        "problems": len(responses),
        **degeneration(spoken, [response.answer for response in responses]),
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


def evaluate(config, draw, problems, source):
    """Greedy accuracy and, with --n over 1, majority@n and pass@k of the problems -> a file and two lines."""
    without = [problem.id for problem in problems if problem.answer is None]
    check(not without, "--evaluate", "given", f"problems with an answer ({len(without)} have none)")
    out, start = Path(config.out or source / "results.json"), time.perf_counter()
    ours = from_first(lambda: out.suffix == ".json" and (not out.exists() or "metrics" in read_json(out)))
    if out.exists() and not ours and not config.overwrite:
        raise InputError(f"--out {out} holds no results of sample.py; allowed: another file, --overwrite")
    watch = lambda stream: list(tqdm(stream, total=len(problems), unit="problem", disable=quiet()))
    greedy = watch(draw(problems, n=1, temperature=0.0))
    sampled = watch(draw(problems)) if config.n > 1 else []
    metrics = summarise(greedy, sampled, config.n)
    lists = {
        "problem_ids": [problem.id for problem in problems],
        "correct": [int(samples.first.correct) for samples in greedy],
        "right": [[sum(r.correct for r in samples.responses), config.n] for samples in sampled],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {**about(config, source), "metrics": metrics, **lists})
    interval = f"[{metrics['low']:.1%}, {metrics['high']:.1%}]"
    unit = "words" if config.endpoint else "tokens"
    print(
        f"{source}: greedy accuracy {metrics['accuracy']:.1%} {interval} on {len(problems)} problems; "
        f"missing answers {metrics['missing_answers']:.1%}, mean length {metrics['mean_length']:.1f} {unit}"
        f", repeated 4-grams {metrics['repeated_4grams']:.1%}"
    )
    if config.n > 1:
        passes = ", ".join(f"pass@{k} {share:.1%}" for k, share in metrics["pass"].items())
        print(f"majority@{config.n} {metrics['majority']:.1%}; {passes}")
    report_unanswered(greedy, " (they count as wrong)")
    print(f"{time.perf_counter() - start:.0f} s -> {out}")


# ---- scores of samples: by a DPO model, by a reward model, a model's own -------------------------


def files_of(config, flag, names):
    """--out, which must be new, and the --samples that `flag` scores."""
    for name in names:
        check(getattr(config, name), f"--{name}", getattr(config, name), f"a path, with {flag}")
    check(len(config.samples) == 1, "--samples", config.samples, f"one file, with {flag}")
    out = Path(config.out)
    check(config.overwrite or not out.exists(), "--out", config.out, "a new file, or --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out, read_samples(config.samples[0])[: config.limit or None]


def by_log_ratio(config, device, folder):
    """(name, a function from Samples to the same with scores) of a DPO model: log pi - log pi_ref; for a page
    without a --ref, log pi."""
    allowed = "the folder that DPO started from; a reward model alone needs none"
    check(config.ref or config.html, "--ref", "", allowed)
    check(config.aggregate == "mean", "--aggregate", config.aggregate, "only with a reward model")
    model, tokenizer, reader = load(folder, config, device)
    ref, its_tokenizer, _ = (
        load(resolve(config.ref), config, device) if config.ref else (None, tokenizer, None)
    )
    same = its_tokenizer.fingerprint == tokenizer.fingerprint
    check(same, "--ref", config.ref, "a model with the verifier's tokenizer")
    name = ("dpo" if ref else "log p") + ("-cut" if config.truncate_words else "")
    tokens = config.token_scores or bool(config.html)
    options = dict(name=name, mode=config.mode, words=config.truncate_words, tokens=tokens)
    options |= dict(reader=reader, batch_size=config.batch_size)
    return name, partial(log_ratio_scores, model, ref, tokenizer, **options)


def by_reward_model(config, device, folder):
    """The same of a PRM or an ORM."""
    for flag, value in {
        "--ref": config.ref,
        "--truncate-words": config.truncate_words,
        "--token-scores": config.token_scores,
    }.items():
        check(not value, flag, value, f"nothing, as --verifier {folder} is a reward model")
    model, tokenizer, reader = load(folder, config, device, reward=True)
    name = model.kind if config.aggregate == "mean" else f"{model.kind}-{config.aggregate}"
    options = dict(mode=config.mode, how=config.aggregate, reader=reader, batch_size=config.batch_size)
    return name, partial(reward_scores, model, tokenizer, name=name, **options)


def scored_by(config, device, sampled):
    """(name, scored Samples) of --verifier."""
    folder = resolve(config.verifier)
    name, judge = (by_reward_model if is_reward_model(folder) else by_log_ratio)(config, device, folder)
    return name, spread(judge, sampled, config.batch_size)


def look(config, device):
    """--samples, scored by --verifier where one is given -> --html, a page to read them in."""
    out, names = Path(config.html), config.samples
    check(out.suffix == ".html", "--html", config.html, "a path that ends in .html")
    check(names, "--samples", names, "one or several files, with --html")
    check(len({*names}) == len(names), "--samples", names, "each file once")
    check(not config.out, "--out", config.out, "nothing, with --html: the page alone is written")
    files = {name: read_samples(name)[: config.limit or None] for name in names}
    if config.verifier:
        everything = list(itertools.chain(*files.values()))
        _, scored = scored_by(config, device, everything)
        scored = iter(tqdm(scored, total=len(everything), unit="problem", disable=quiet()))
        files = {name: list(itertools.islice(scored, len(sampled))) for name, sampled in files.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(files))
    counts = sum(map(len, files.values())), sum(len(one.responses) for file in files.values() for one in file)
    print("{:,} problems, {:,} responses -> {}".format(*counts, out))


def verify(config, device):
    """Score --samples by --verifier -> --out, and show how well choosing by its scores does."""
    out, whole = files_of(config, "--verifier", ("samples", "out"))
    sampled = [samples for samples in whole if samples.responses]
    check(sampled, "--samples", config.samples, "samples with responses")
    name, scored = scored_by(config, device, sampled)
    scored = list(tqdm(scored, total=len(sampled), unit="problem", disable=quiet()))
    of_id = {samples.problem.id: samples for samples in [*whole, *scored]}
    write_jsonl(out, map(samples_to_row, of_id.values()))
    most = min(len(samples.responses) for samples in scored)
    if all(samples.problem.answer is not None for samples in scored):
        for n, ways in curves(scored, name, sizes=[2**i for i in range(14) if 2**i <= most]).items():
            print(f"n = {n}: " + ", ".join(f"{way} {sum(v) / len(v):.1%}" for way, v in ways.items()))
    responses = [response for samples in scored for response in samples.responses]
    if blank := sum((r.step_scores or {}).get(name) == [] for r in responses):
        why = "they have no step, or are longer than the model's context"
        print(f"{blank} of {len(responses)} responses were not judged and have the score 0: {why}")
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

ASKS_A_SERVER = ("concurrency", "timeout", "dry_run", "cache")  # flags that a model folder has no use for
ASKS_A_FOLDER = ("verifier", "assess", "chat_template", "device", "dtype", "batch_size", "blind")  # a server
ASKS_A_FOLDER += ("prune", "compile")


def of_folder(config, device, *, temperature, length, **asking):
    """(its name, what its samples depend on, draw) of a model folder; draw(problems, n, temperature) ->
    Samples."""
    folder = find_model(config.model)
    print(f"model: {folder}")
    model, tokenizer, reader = load(folder, config, device)
    asking |= dict(top_k=config.top_k, top_p=config.top_p, batch_size=config.batch_size)
    asking |= dict(max_new_tokens=length, reader=reader and dataclasses.replace(reader, blind=config.blind))
    made_by = {"model": str(folder), "weights": weights_digest(folder), "tokenizer": tokenizer.fingerprint}

    def draw(problems, n=config.n, temperature=temperature):
        return sample_groups(model, tokenizer, problems, n=n, temperature=temperature, **asking)

    return folder, made_by, draw


def of_server(config, *, temperature, length, style, **asking):
    """The same of an --endpoint's model."""
    settings = dict(top_p=config.top_p, top_k=config.top_k, max_tokens=length, timeout=config.timeout)
    server = Endpoint(config.endpoint, config.model, cache=config.cache or None, **settings)
    print(f"model: {config.model} at {server.address}")
    asking |= dict(limit=config.concurrency, dry_run=config.dry_run)

    def draw(problems, n=config.n, temperature=temperature):
        return sample_server(dataclasses.replace(server, temperature=temperature), problems, n=n, **asking)

    return config.model, {"endpoint": server.address}, draw


def main(config):
    on_toy = config.data in TOYS and config.question is None
    check(config.reward == "correct" or on_toy, "--reward", config.reward, "correct, but for toy problems")
    check(config.question or not config.image, "--image", config.image, "nothing, without a question")
    style = config.style or style_of(config.data)
    check(style in STYLES, "--style", style, ", ".join(STYLES))
    owners = dict.fromkeys(("truncate_words", "token_scores", "aggregate", "ref"), "verifier")
    owners |= dict.fromkeys(("shots", "budget", "encoder"), "prune")
    for name, mode in (owners | {"reference": "assess"}).items():
        flag, value = "--" + name.replace("_", "-"), getattr(config, name)
        unset = value == getattr(SampleConfig, name)
        check(getattr(config, mode) or unset, flag, value, f"only with --{mode}")
    check(not (config.assess and config.verifier), "--assess", "given", "no --verifier beside it")
    for name in ASKS_A_FOLDER if config.endpoint else ASKS_A_SERVER:
        flag, value = "--" + name.replace("_", "-"), getattr(config, name)
        allowed = f"only with{'out' if config.endpoint else ''} --endpoint"
        check(value == getattr(SampleConfig, name), flag, value, allowed)
    if config.endpoint:
        check(config.model, "--model", config.model, "the name that --endpoint has for its model")
        check(config.out or not config.evaluate, "--out", "", "a file, for --evaluate with --endpoint")
        check(not (config.evaluate and config.dry_run), "--dry-run", "given", "without --evaluate")
    used = config.html or config.verifier or config.assess
    check(used or not config.samples, "--samples", config.samples, "only with --html, --verifier or --assess")
    check(not (used and config.prune), "--prune", config.prune, "nothing, where --samples are read")
    beside = config.assess or config.evaluate
    check(not (config.html and beside), "--html", config.html, "no --assess or --evaluate beside it")
    for flag in ("assess", "endpoint") if size() > 1 else ():
        value = getattr(config, flag)
        check(not value, f"--{flag}", value, "nothing with torchrun: one process does it")
    device = pick_device(config.device)
    if config.html:
        return look(config, device)
    if config.assess or config.verifier:
        return assess_samples(config, device) if config.assess else verify(config, device)
    showing = not (config.evaluate or config.out)
    if config.question is not None:
        check(config.question.strip(), "the question", config.question, "some words")
        image = {"image": Path(config.image).name, "image_root": str(Path(config.image).resolve().parent)}
        problems = [Problem(id="typed", question=config.question, **image if config.image else {})]
    else:
        problems = read_problems(config.data, config.split, limit=config.limit or (5 if showing else 0))
    if config.prune:
        tokenizer = Tokenizer(find_model(config.model), config.chat_template)
        how = dict(encoder=config.encoder, device=device, dtype=getattr(torch, config.dtype))
        kept = prune_by(config.prune, problems, config.shots, config.budget, tokenizer=tokenizer, **how)
        problems = [one.problem for one in kept]
    default = 0.0 if showing and config.n == 1 else 1.0
    grader = grade_steps if config.reward == "steps" else grade_answers
    asking = dict(
        mode=config.mode,
        style=style,
        seed=config.seed,
        temperature=default if config.temperature is None else config.temperature,
        length=config.max_new_tokens or default_length(config.data),
        grade=partial(grader, mode=config.mode, style=style),
    )
    of_model = partial(of_server, config) if config.endpoint else partial(of_folder, config, device)
    source, made_by, draw = of_model(**asking)
    if config.dry_run:
        draw(problems)
    elif config.evaluate:
        evaluate(config, draw, problems, source)
    elif config.out:
        # what may change when sampling goes on
        free = ("endpoint", "samples", "html", "out", "overwrite", "limit", "batch_size", "compile")
        free += ASKS_A_SERVER
        recorded = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
        whole = bool(config.endpoint)  # what it has answered comes from the cache
        sampled = write_samples(config.out, draw, problems, recorded | made_by, config.overwrite, whole)
        responses = [response for samples in sampled for response in samples.responses]
        graded = [response.correct for response in responses if response.correct is not None]
        share = f", {sum(graded) / len(graded):.1%} of them right" if graded else ""
        print(f"{len(sampled)} problems, {len(responses)} responses{share} -> {config.out}")
        report_unanswered(sampled)
    else:
        show(draw(problems))


if __name__ == "__main__":
    run(main, SampleConfig)
