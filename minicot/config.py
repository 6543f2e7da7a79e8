"""The flags of the three scripts: one frozen dataclass each, one small `parse`.

A field is a flag (`batch_size` -> `--batch-size`), its default is the default, its text is the text of
`--help`, and a `Literal` lists what is allowed. Unknown flags are refused. Every script ends with `run(main,
ItsConfig)`.
"""

import argparse
import dataclasses
import math
import operator
import sys
import types
import typing
from dataclasses import dataclass
from typing import Literal

from minicot.errors import InputError


INSIDE = {"at least": operator.ge, "above": operator.gt, "at most": operator.le}


def flag(default, text, *, positional=False, least=None, above=None, most=None):
    """A dataclass field that carries its help text and the range of its numbers."""
    limits = {"at least": least, "above": above, "at most": most}
    return dataclasses.field(
        default=default,
        metadata={
            "help": text,
            "positional": positional,
            "limits": {k: v for k, v in limits.items() if v is not None},
        },
    )


class Flags:
    """Refuses a number out of its field's range, whoever makes the config."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata["limits"]
            finite = not isinstance(value, float) or math.isfinite(value)
            inside = value is None or all(INSIDE[kind](value, limit) for kind, limit in limits.items())
            if not (finite and inside):
                allowed = " and ".join(f"{kind} {limit:g}" for kind, limit in limits.items())
                name, allowed = "--" + field.name.replace("_", "-"), allowed or "a finite number"
                raise InputError(f"{name} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True)
class TrainConfig(Flags):
    """Fine-tune (or pretrain) a model on written solutions and save it as a Hugging Face folder."""

    task: Literal["sft"] = flag("sft", "what to learn: sft = next-token loss on the solution's tokens")
    init: str = flag(
        "toy",
        "model folder to start from; a config.json means random weights; toy, toy-vision = the shipped bases",
    )
    tokenizer: str = flag("", "folder of the tokenizer (default: the folder of --init)")
    vision: str = flag(
        "",
        "give a text model eyes: folder of a CLIP or SigLIP tower, with its "
        "preprocessor_config.json, or of a Llava model (tower and projector); a config.json: random weights",
    )
    feature_layer: int = flag(-2, "--vision: which hidden state of the tower is read (-1 = the last)")
    train: Literal["all", "language", "projector"] = flag(
        "all", "what learns; language = the language model alone"
    )
    data: str = flag("toy", "toy | toy-pictures | gsm8k:PATH | aqua:PATH | ... | file.jsonl")
    split: str = flag("train", "split to train on; a slice is written train[:7000]")
    limit: int = flag(0, "use the first LIMIT problems (0 = all)", least=0)
    mode: Literal["cot", "direct", "both", "plain"] = flag(
        "cot", "taught: a worked solution, the bare answer, each once; plain = cot, but the question as it is"
    )
    out: str = flag("runs/sft", "folder for the model, metrics.jsonl, loss.svg and checkpoints")
    epochs: float = flag(1.0, "passes over the data (ignored when --steps is given)", above=0, most=10**4)
    steps: int = flag(0, "optimizer steps (0 = as many as --epochs says)", least=0, most=10**6)
    batch_size: int = flag(32, "rows a step", least=1)
    accumulate: int = flag(1, "micro-batches a step; the gradient stays that of the whole batch", least=1)
    group_by_length: bool = flag(
        True,
        "rows of like length share a batch: less padding; but where the "
        "length tells the kind of row, a batch is of one kind, which can slow learning much",
    )
    lr: float = flag(2e-3, "peak learning rate (real models: about 2e-5)", above=0)
    vision_lr: float | None = flag(None, "the vision tower's own (default: --lr)", least=0)
    warmup: float = flag(
        0.03, "share of the steps with linear warm-up; cosine decay to a tenth follows", least=0, most=1
    )
    weight_decay: float = flag(0.0, "AdamW weight decay (never on norms and biases)", least=0)
    clip: float = flag(1.0, "largest gradient norm (0 = no clipping)", least=0)
    max_length: int = flag(0, "longest row in tokens (0 = the model's max_position_embeddings)", least=0)
    overlong: Literal["refuse", "skip"] = flag(
        "refuse", "rows over --max-length: stop, or leave out and report"
    )
    eval_split: str = flag("", "split whose mean token loss is reported before and after")
    eval_limit: int = flag(64, "problems of --eval-split", least=0)
    save_every: int = flag(200, "steps between checkpoints (0 = only the final model)", least=0)
    stop_at: int = flag(
        0, "stop after this step with a checkpoint, as if interrupted (0 = run to the end)", least=0
    )
    resume: bool = flag(False, "go on from the newest checkpoint in --out")
    overwrite: bool = flag(False, "replace what --out holds")
    peek: int = flag(0, "print PEEK rows, trained tokens coloured, before training", least=0)
    seed: int = flag(0, "data order and random weights", least=0, most=2**31)
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto = cuda where there is one")
    dtype: Literal["float32", "bfloat16"] = flag(
        "float32", "bfloat16 = autocast on CUDA; weights stay float32"
    )


@dataclass(frozen=True)
class SampleConfig(Flags):
    """Answer a question, write graded samples, or evaluate a model."""

    question: str | None = flag(None, "a question typed by hand", positional=True)
    model: str = flag(
        "", "model folder (default: runs/aft where it is, else runs/sft, made by train.py if absent)"
    )
    image: str = flag("", "a picture that the question typed by hand is about")
    data: str = flag("toy", "toy | toy-pictures | gsm8k:PATH | aqua:PATH | ecqa:PATH | ... | file.jsonl")
    split: str = flag("test", "split to sample; a slice is written test[:100]")
    limit: int = flag(0, "use the first LIMIT problems (0 = all; 5 when only showing)", least=0)
    mode: Literal["cot", "direct", "plain"] = flag(
        "cot", "ask for a worked solution, for the bare answer, or the question as it is"
    )
    style: str = flag(
        "", "how the final answer is marked (default: the data set's own; see minicot/answers.py)"
    )
    evaluate: bool = flag(
        False, "greedy accuracy and, with --n over 1, majority@k and pass@k -> results.json"
    )
    n: int = flag(1, "responses a problem", least=1, most=10**4)
    temperature: float = flag(1.0, "sampling temperature; 0 is greedy", least=0)
    top_k: int = flag(0, "keep the k likeliest tokens (0 = all)", least=0)
    top_p: float = flag(
        1.0, "keep the likeliest tokens that hold this share of the probability", above=0, most=1
    )
    max_new_tokens: int = flag(0, "longest response in tokens (0 = 96 on toy, 256 elsewhere)", least=0)
    blind: bool = flag(False, "control: show grey pictures instead of the problems' own")
    samples: str = flag("", "samples.jsonl that --verifier or --assess scores")
    assess: bool = flag(False, "the model's own scores of --samples: A-accuracy, reference NLL -> --out")
    reference: bool = flag(False, "--assess: the written solution is one of a problem's right responses")
    verifier: str = flag("", "DPO model folder: add the scores log pi - log pi_ref to --samples -> --out")
    ref: str = flag("", "--verifier: its reference model, the folder that DPO started from")
    truncate_words: int = flag(
        0,
        "--verifier: score the first words alone, on which align.py --truncate-words trains (0 = all)",
        least=0,
    )
    reward: Literal["correct", "steps"] = flag(
        "correct", "reward of a response; steps = the toy step oracle's grade"
    )
    out: str = flag("", "file for the samples (jsonl), or for the results with --evaluate")
    overwrite: bool = flag(False, "start --out again instead of going on with it")
    batch_size: int = flag(
        64, "sequences scored or decoded together (a problem's n samples always are decoded so)", least=1
    )
    seed: int = flag(0, "sampling seed; each problem derives its own from it and its id", least=0, most=2**31)
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto = cuda where there is one")
    dtype: Literal["float32", "bfloat16", "float64"] = flag("float32", "dtype of weights and arithmetic")


@dataclass(frozen=True)
class AlignConfig(Flags):
    """Align a model on groups of graded responses to the same question."""

    method: Literal["rft", "dpo", "ipo", "rrhf", "pro", "aft"] = flag(
        "aft", "the loss; see METHODS in align.py"
    )
    constraint: Literal["default", "none", "detached", "boundary"] = flag(
        "default", "what holds wrong responses up (default: detached for aft, none for the others)"
    )
    margin: float | None = flag(None, "boundary's margin in nats a token (the AFT paper's beta)", least=0)
    beta: float = flag(0.1, "DPO's and IPO's beta", above=0)
    train: Literal["language", "projector", "all"] = flag(
        "language", "what learns; language = the language model alone, as LLaVA-Reasoner's DPO"
    )
    label_smoothing: float = flag(0.0, "DPO: probability that a label is wrong (cDPO)", least=0, most=1)
    sft_weight: float | None = flag(None, "weight of the SFT term (default: the method's own)", least=0)
    init: str = flag("", "model to align (default: runs/sft, made by train.py if absent)")
    ref: str = flag("", "reference model of DPO and IPO (default: --init)")
    ref_logps: str = flag("", "file that keeps the reference log-probabilities (default: in --out)")
    samples: str = flag(
        "", "samples.jsonl of sample.py, or {prompt, chosen, rejected} rows (default: sample now)"
    )
    k: int = flag(8, "responses a problem when sampling now", least=2, most=10**4)
    data: str = flag("", "problems to sample and to hold out (default: toy, or none with --samples)")
    split: str = flag("train", "split to sample")
    limit: int = flag(1000, "problems to sample (0 = all)", least=0)
    eval_split: str = flag("test", "held-out split, greedy accuracy before and after")
    eval_limit: int = flag(500, "problems of --eval-split", least=0)
    mode: Literal["cot", "direct", "plain"] = flag("cot", "how the responses were asked for")
    style: str = flag("", "how the final answer is marked (default: the data set's own)")
    reference: bool = flag(True, "put the problem's own solution into its group")
    reference_in_positives: bool = flag(
        True, "... and rank it as a right response (else it is only the SFT target)"
    )
    max_pairs: int = flag(3, "DPO, IPO: pairs a problem", least=1)
    pair_low: float = flag(
        0.25, "DPO, IPO: least share of right responses of a problem used", least=0, most=1
    )
    pair_high: float = flag(0.85, "DPO, IPO: largest share", least=0, most=1)
    truncate_words: int = flag(
        0, "train on the first WORDS words of a response, without EOS (0 = all of it, with EOS)", least=0
    )
    out: str = flag("runs/aft", "folder for the model, metrics.jsonl and checkpoints")
    epochs: float = flag(1.0, "passes over the groups (ignored when --steps is given)", above=0, most=10**4)
    steps: int = flag(0, "optimizer steps (0 = as many as --epochs says)", least=0, most=10**6)
    batch_size: int = flag(8, "groups a step", least=1)
    accumulate: int = flag(1, "micro-batches a step; the gradient stays that of the whole batch", least=1)
    lr: float = flag(3e-4, "peak learning rate", above=0)
    warmup: float = flag(
        0.03, "share of the steps with linear warm-up; cosine decay to a tenth follows", least=0, most=1
    )
    weight_decay: float = flag(0.0, "AdamW weight decay (never on norms and biases)", least=0)
    clip: float = flag(1.0, "largest gradient norm (0 = no clipping)", least=0)
    max_new_tokens: int = flag(0, "longest response in tokens (0 = 96 on toy, 256 elsewhere)", least=0)
    eval_batch_size: int = flag(128, "sequences decoded together (a problem's n samples always are)", least=1)
    probe_every: int = flag(25, "steps between looks at held-out problems (0 = never)", least=0)
    probe_limit: int = flag(32, "problems of such a look", least=1)
    save_every: int = flag(100, "steps between checkpoints (0 = only the final model)", least=0)
    stop_at: int = flag(
        0, "stop after this step with a checkpoint, as if interrupted (0 = run to the end)", least=0
    )
    resume: bool = flag(False, "go on from the newest checkpoint in --out")
    overwrite: bool = flag(False, "replace what --out holds")
    peek: int = flag(0, "print PEEK groups with rewards, trained tokens coloured, before training", least=0)
    seed: int = flag(0, "sampling, pairs and data order", least=0, most=2**31)
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto = cuda where there is one")
    dtype: Literal["float32", "bfloat16"] = flag(
        "float32", "bfloat16 = autocast on CUDA; weights stay float32"
    )


def parse(config_class, argv=None):
    """argv (default sys.argv) -> a `config_class`; an error is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=config_class.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, text = hints[field.name], field.metadata["help"]
        name = "--" + field.name.replace("_", "-")
        if field.metadata["positional"]:
            parser.add_argument(field.name, nargs="?", default=field.default, help=text)
        elif kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif typing.get_origin(kind) is Literal:
            parser.add_argument(name, choices=typing.get_args(kind), default=field.default, help=text)
        elif isinstance(kind, types.UnionType):  # X | None
            parser.add_argument(name, type=typing.get_args(kind)[0], default=field.default, help=text)
        else:
            parser.add_argument(name, type=kind, default=field.default, help=text)
    return config_class(**vars(parser.parse_args(argv)))


def check(condition, name, value, allowed):
    """Refuse a flag's value: `check(0 < lr, "--lr", lr, "a number above 0")`."""
    if not condition:
        raise InputError(f"{name} is {value!r}; allowed: {allowed}")


def run(main, config_class, argv=None):
    """Run a script: bad input (InputError, OSError) ends in one line and exit code 2, without a traceback."""
    try:
        main(parse(config_class, argv))
    except (InputError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; a checkpoint, where one was written, is kept (--resume)", file=sys.stderr)
        raise SystemExit(130) from None
