"""The commands of MME-CoT (arXiv 2502.09621): judge a model's predictions, score what the judges said.

    python -m minicot.mme_cot judge PREDICTIONS --prompt cot|dir --dataset DATASET.json --out CACHE
    python -m minicot.mme_cot score CACHE --dataset DATASET.json --out DIR

DIR gets the result files of the official scripts, DIR/coverage.json (how many replies each number rests on)
and DIR/per_sample.json. `--fixed`: a question without a usable reply counts 0, and stability and efficacy
compare the same questions. Exit code 0 where something was scored (judged), 2 where nothing could be.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from minicot.chat import Endpoint
from minicot.config import Flags, check, flag, run
from minicot.errors import InputError
from minicot.mme_cot.judge import make_cache, schema_of
from minicot.mme_cot.questions import METRICS, STEPS, read_dataset, read_predictions, summary
from minicot.mme_cot.scoring import COLUMNS, headline, score

ENDS = ("_results", "_errors", "_extrainfo", "")  # of the names of result files

# ---- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreConfig(Flags):
    """Score a cache of judges' replies as the official scripts do."""

    folder: str = flag("data", "", "the cache", positional=True)
    dataset: str = flag("data", "", "DATASET.json: the official rows, a list or one a line")
    fixed: bool = flag("method", False, "a question without a usable reply counts 0; cot and dir are paired")
    out: str = flag("output", "", "folder of the result files")


@dataclass(frozen=True)
class JudgeConfig(Flags):
    """Ask a judge about a model's predictions, and write its replies as an official cache."""

    predictions: str = flag("data", "", "JSON lines: official rows, or sample.py's", positional=True)
    prompt: str = flag("data", "", "the prompt that the predictions answer")
    dataset: str = flag("data", "", "DATASET.json: the official rows, a list or one a line")
    name: str = flag("data", "", "the model's name in the cache (default: the file's, without _cot and _dir)")
    endpoint: str = flag(
        "model", "", "URL of the judge's OpenAI-compatible server (its key: MINICOT_API_KEY)"
    )
    model: str = flag(
        "model",
        "",
        "the judge's name there (officially gpt-4o-2024-08-06, and gpt-4o-mini for extract,judge)",
    )
    steps: str = flag("method", ",".join(STEPS), "what is asked")
    concurrency: int = flag("loop", 8, "requests under way at a time", least=1, most=64)
    timeout: float = flag("loop", 120.0, "seconds without a byte, then again", above=0)
    cache: str = flag("output", "runs/chat", "folder of replies, not asked for twice ('' = none)")
    out: str = flag("output", "", "folder of the official cache")


def say(text, notes):
    """Print a text, and below it a line for each kind of note. File names may hold what no terminal takes."""
    kinds = dict.fromkeys(kind for kind, _ in notes)
    lines = [text, *(summary([note for note in notes if note[0] == kind]) for kind in kinds)]
    print("\n".join(filter(None, lines)).encode(errors="backslashreplace").decode())


def check_paths(config, *names):
    for name in names:
        check(
            getattr(config, name), f"--{name}" if name in ("dataset", "out") else name.upper(), "", "a path"
        )


def score_command(config):
    check_paths(config, "folder", "dataset", "out")
    inside = Path(config.folder).resolve() in (
        Path(config.out).resolve(),
        *Path(config.out).resolve().parents,
    )
    check(not inside, "--out", config.out, "a folder outside the cache, which is only read")
    notes = []
    questions = read_dataset(config.dataset, notes)
    files, before, zeros = score(config.folder, questions, notes, fixed=config.fixed)
    names = [f"{m}/{m}{end}.json" for m in ("robustness", "quality", "efficiency", *METRICS) for end in ENDS]
    for name in names:  # what an earlier run left
        Path(config.out, name).unlink(missing_ok=True)
    for name, made in files.items():
        Path(config.out, name).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out, name).write_text(json.dumps(made, indent=4))
    say("\n".join(describe(files, before, zeros, config.fixed)), notes)
    if not any(of["valid"] for models in files["coverage.json"].values() for of in models.values()):
        raise InputError(f"{config.folder}: no reply could be scored; see {config.out}/coverage.json")
    print(f"results: {config.out}")


def describe(files, before, zeros, fixed):
    """The paper's table in percent, the coverage, and what --fixed changed, as lines."""
    percent = lambda value: "-" if value is None else f"{100 * value:.1f}"
    models = headline(files)
    width = max([len(model) for model in models] + [5])
    yield f"{'model':{width}} " + " ".join(f"{name:>10}" for name in COLUMNS)
    for model, row in models.items():
        yield f"{model:{width}} " + " ".join(f"{percent(value):>10}" for value in row.values())
    yield "coverage, valid/files of questions:"
    for metric, of in files["coverage.json"].items():
        counts = [f"{model} {n['valid']}/{n['files']} of {n['questions']}" for model, n in of.items()]
        errors = sum(n["files"] - n["valid"] for n in of.values())
        yield f"  {metric}: {', '.join(counts)}" + f" ({errors} without a score)" * (errors > 0)
    if fixed:
        yield "--fixed changed:"
        for model, row in headline(before).items():
            for name, value in row.items():
                if value != (now := models.get(model, {}).get(name)):
                    yield f"  {model} {name}: {percent(value)} -> {percent(now)}"
        for metric, of in zeros.items():
            yield f"  {metric}: " + ", ".join(f"{model} {n} questions count 0" for model, n in of.items())


def judge_command(config):
    check_paths(config, "predictions", "dataset", "out")
    steps = config.steps.split(",")
    check(config.prompt in ("cot", "dir"), "--prompt", config.prompt, "cot, dir")
    check(set(steps) <= set(STEPS), "--steps", config.steps, f"of {','.join(STEPS)}")
    check(
        config.endpoint and config.model,
        "--endpoint and --model",
        config.endpoint,
        "a judge's server and name",
    )
    notes = []
    questions = read_dataset(config.dataset, notes)
    rows = read_predictions(config.predictions, questions, notes)
    name = config.name or Path(config.predictions).stem.removesuffix(f"_{config.prompt}")
    judge = Endpoint(
        config.endpoint,
        config.model,
        temperature=0.0,
        top_p=0.1,
        max_tokens=4096,
        cache=config.cache or None,
        timeout=config.timeout,
    )
    chats = {step: replace(judge, schema=schema_of(step)) for step in steps}
    there = 0
    for step, kept, written, failed in make_cache(
        rows, config.out, config.prompt, name, chats.get, steps=steps, limit=config.concurrency, notes=notes
    ):
        there += kept + written
        print(f"{step}: {written} written, {kept} were there{'; ' * bool(failed)}{failed}", flush=True)
    say("", notes)
    check(there, "--endpoint", config.endpoint, "a judge that replies; nothing was judged")
    print(f"cache: {config.out}")


def main(argv=None):
    """`score ...` or `judge ...`."""
    command, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    if command == "score":
        run(score_command, ScoreConfig, argv)
    elif command == "judge":
        run(judge_command, JudgeConfig, argv, prompt=("cot", "dir"))
    else:
        print(f"error: the command is {command!r}; allowed: score, judge (see score --help)", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    sys.argv[0] = "-m minicot.mme_cot"  # what --help says
    main()
