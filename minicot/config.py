"""The flags of the three scripts: one frozen dataclass each, one small `parse`.

A field is a flag (`batch_size` -> `--batch-size`), its default is the default, its text and its group are
those of `--help`, and a `Literal` lists what is allowed. Unknown flags are refused. What train.py and
align.py share stands once, in LoopConfig. Every script ends with `run(main, ItsConfig)`.
"""

import argparse
import dataclasses
import math
import operator
import re
import signal
import threading
import types
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from minicot import parallel
from minicot.errors import InputError

INSIDE = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
GROUPS = ("data", "model", "method", "loop", "output")  # the headings of --help, in this order


def flag(group, default, text, *, positional=False, least=None, above=None, most=None, below=None):
    """A dataclass field that carries its help text, its group and the range of its numbers."""
    limits = {"at least": least, "above": above, "at most": most, "below": below}
    limits = {kind: limit for kind, limit in limits.items() if limit is not None}
    metadata = {"group": group, "help": text, "positional": positional, "limits": limits}
    return dataclasses.field(default=default, metadata=metadata)


def changed(field, default, text=None):
    """A field of the class above with another default (and another text)."""
    metadata = field.metadata | {"help": text or field.metadata["help"]}
    return dataclasses.field(default=default, metadata=metadata)


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


CHAT_TEMPLATE = flag("model", "", "chat template: the folder's own, or plain (none), or a jinja FILE")
DEVICE = flag("model", "auto", "auto = cuda where there is one")
COMPILE = flag("model", False, "fuse kernels by torch.compile: faster on a GPU, after a minute or so")
LENGTH = flag("data", 0, "longest response in tokens (0 = 96 on toy, 256 elsewhere)", least=0)
STYLE = flag("data", "", "how a final answer is marked (default: the set's own; see answers.py)")


@dataclass(frozen=True)
class LoopConfig(Flags):
    """The flags of a training loop."""

    data: str = flag("data", "toy", "toy | toy-pictures | gsm8k:PATH | aqua:PATH | ... | file.jsonl")
    split: str = flag("data", "train", "split to learn from; a slice is written train[:7000]")
    limit: int = flag("data", 0, "use the first N problems (0 = all)", least=0)
    style: str = STYLE
    max_new_tokens: int = LENGTH
    eval_split: str = flag("data", "", "held-out split, measured before and after ('' = none)")
    eval_limit: int = flag("data", 200, "problems of --eval-split (0 = all)", least=0)
    eval_batch_size: int = flag("data", 128, "sequences decoded together", least=1)
    init: str = flag("model", "toy", "model folder to start from; toy, toy-vision, toy-judge = shipped")
    chat_template: str = CHAT_TEMPLATE
    train: Literal["all", "language", "projector"] = flag(
        "model", "all", "what learns; language = the language model alone"
    )
    device: Literal["auto", "cpu", "cuda"] = DEVICE
    dtype: Literal["float32", "bfloat16"] = flag(
        "model", "float32", "bfloat16 = autocast; weights stay float32"
    )
    compile: bool = COMPILE
    shard: bool = flag(
        "model", False, "torchrun: a rank trains a part (FSDP2), and samples with a copy of all"
    )
    checkpoint_activations: bool = flag(
        "model", False, "keep each layer's input alone and compute it again in backward"
    )
    epochs: float = flag("loop", 1.0, "passes over the data (not used with --steps)", above=0, most=10**4)
    steps: int = flag("loop", 0, "optimizer steps (0 = as --epochs says)", least=0, most=10**6)
    batch_size: int = flag("loop", 32, "rows a step", least=1)
    accumulate: int = flag("loop", 1, "micro-batches a step; same gradient, less memory", least=1)
    lr: float = flag("loop", 2e-3, "peak learning rate (real models: about 2e-5)", above=0)
    warmup: float = flag(
        "loop", 0.03, "share of the steps with linear warm-up; a cosine to a tenth follows", least=0, most=1
    )
    weight_decay: float = flag("loop", 0.0, "AdamW's, never on norms and biases", least=0)
    clip: float = flag("loop", 1.0, "largest gradient norm (0 = no clipping)", least=0)
    seed: int = flag("loop", 0, "data order and random weights", least=0, most=2**31)
    out: str = flag("output", "", "folder for the model, metrics.jsonl and checkpoints")
    save_every: int = flag("output", 200, "steps between checkpoints (0 = none)", least=0)
    stop_at: int = flag("output", 0, "stop after this step with a checkpoint (0 = run to the end)", least=0)
    resume: bool = flag("output", False, "go on from the newest checkpoint in --out")
    overwrite: bool = flag("output", False, "replace the run in --out (other files stay)")
    peek: int = flag("output", 0, "print N rows, trained tokens coloured, before training", least=0)


LOOP = {field.name: field for field in dataclasses.fields(LoopConfig)}


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """Fine-tune (or pretrain) a model on written solutions and save it as a Hugging Face folder."""

    task: Literal["sft", "prm", "orm"] = flag(
        "method", "sft", "prm, orm = a reward model of --samples, for each step or the whole response"
    )
    samples: str = flag("data", "", "prm, orm: samples.jsonl with step_labels, or with correct")
    eval_samples: str = flag("data", "", "prm, orm: held-out ones, measured before and after ('' = none)")
    reduce: Literal["sum", "mean"] = flag("method", "sum", "prm: over the steps of a response")
    mode: Literal["cot", "direct", "both", "plain"] = flag(
        "method", "cot", "taught: a chain, the bare answer, each once; plain = cot, question as it is"
    )
    eval_split: str = changed(
        LOOP["eval_split"], "auto", "held-out split, measured before and after (auto = the toys' test)"
    )
    max_length: int = flag("data", 0, "longest row in tokens (0 = the model's context)", least=0)
    overlong: Literal["refuse", "skip"] = flag("data", "refuse", "longer rows: stop, or leave out and count")
    init: str = changed(
        LOOP["init"],
        "toy",
        "folder to start from, or a config.json: random weights; toy, toy-vision, toy-judge = shipped",
    )
    tokenizer: str = flag("model", "", "folder of the tokenizer (default: that of --init)")
    vision: str = flag(
        "model",
        "",
        "give a text model this picture encoder: folder of a CLIP, SigLIP or Llava model, "
        "with preprocessor_config.json; a config.json: random weights",
    )
    feature_layer: int = flag("model", -2, "--vision: hidden state of the encoder that is read (-1 = last)")
    vision_lr: float | None = flag(
        "loop", None, "learning rate of the picture encoder (default: --lr)", least=0
    )
    group_by_length: bool = flag(
        "loop",
        True,
        "rows of like length share a batch: less padding; where length tells the kind of row, a batch "
        "is of one kind, which can slow learning much",
    )
    out: str = changed(LOOP["out"], "runs/sft", "folder for the model, metrics.jsonl, loss.svg, checkpoints")


@dataclass(frozen=True)
class AlignConfig(LoopConfig):
    """Align a model on groups of graded responses to the same question."""

    data: str = changed(
        LOOP["data"], "", "problems to sample and to hold out (default: toy, or none with --samples)"
    )
    split: str = changed(LOOP["split"], "train", "split to sample")
    limit: int = changed(LOOP["limit"], 8000, "problems to sample (0 = all; --samples are used whole)")
    samples: str = flag("data", "", "samples.jsonl, or {prompt, chosen, rejected} rows (default: sample now)")
    k: int = flag("data", 4, "responses a problem when sampling", least=2, most=10**4)
    temperature: float = flag("data", 1.0, "of the sampling", above=0)
    eval_split: str = changed(LOOP["eval_split"], "test")
    eval_limit: int = changed(LOOP["eval_limit"], 2000)
    probe_every: int = flag("data", 25, "steps between looks at held-out problems (0 = never)", least=0)
    probe_limit: int = flag("data", 32, "problems of such a look", least=1)
    init: str = changed(LOOP["init"], "", "model to align (default: runs/sft, made by train.py if absent)")
    train: Literal["all", "language", "projector"] = changed(LOOP["train"], "language")
    ref: str = flag("model", "", "reference model (default: --init)")
    ref_logps: str = flag("model", "", "file that keeps its log-probabilities (default: in --out)")
    method: str = flag("method", "aft", "the loss; a row of METHODS in align.py")
    constraint: Literal["default", "none", "detached", "boundary"] = flag(
        "method", "default", "what keeps wrong responses up (default = as in the method's paper)"
    )
    margin: float | None = flag("method", None, "boundary's, in nats a token (the AFT paper's beta)", least=0)
    beta: float = flag("method", 0.1, "DPO's and IPO's", above=0)
    label_smoothing: float = flag(
        "method", 0.0, "DPO: probability that a label is wrong (cDPO)", least=0, below=1
    )
    sft_weight: float | None = flag("method", None, "of the SFT term (default: the method's own)", least=0)
    normalisation: Literal["grpo", "dr-grpo", "dapo"] = flag(
        "method", "grpo", "GRPO: of advantages and loss, see grpo_loss in losses.py"
    )
    updates: int = flag("method", 1, "GRPO: optimizer steps on each batch of rollouts", least=1, most=10**4)
    clip_low: float = flag("method", 0.2, "GRPO: the ratio is cut below 1 - this", least=0, most=1)
    clip_high: float = flag("method", 0.2, "GRPO: ... and above 1 + this (DAPO: 0.28)", least=0)
    kl: float = flag("method", 0.0, "GRPO: weight of the KL term (0 = no reference is loaded)", least=0)
    resample: int = flag(
        "method", 0, "GRPO: rounds in which other problems replace dead groups (DAPO; 0 = none)", least=0
    )
    reward: Literal["outcome", "ps-grpo", "mean", "steps"] = flag(
        "method",
        "outcome",
        "GRPO: of a response or its steps; all but outcome need --verifier, see rewards.py",
    )
    verifier: str = flag("model", "", "GRPO: a PRM (train.py --task prm); with --reward outcome only logged")
    rho: float = flag("method", 0.3, "ps-grpo: the relative drop of step scores that costs", least=0, most=1)
    gamma: float = flag("method", 0.5, "ps-grpo: what it costs", least=0, most=1)
    mode: Literal["cot", "direct", "plain"] = flag("method", "cot", "how the responses are asked for")
    reference: bool = flag("method", True, "put a problem's own solution into its group")
    reference_in_positives: bool = flag(
        "method", True, "... and rank it as a right response (else SFT's target alone)"
    )
    max_pairs: int = flag("method", 3, "DPO, IPO: pairs a problem", least=1)
    pair_low: float = flag(
        "method", 0.25, "DPO, IPO: least share of right responses of a problem used", least=0, most=1
    )
    pair_high: float = flag("method", 0.85, "DPO, IPO: largest share", least=0, most=1)
    truncate_words: int = flag(
        "method", 0, "train on a response's first N words, without EOS (0 = all of it)", least=0
    )
    batch_size: int = changed(LOOP["batch_size"], 8, "groups a step")
    lr: float = changed(LOOP["lr"], 2e-4, "peak learning rate")
    seed: int = changed(LOOP["seed"], 0, "sampling, pairs and data order")
    out: str = changed(LOOP["out"], "", "folder for all that is written (default: runs/METHOD)")
    save_every: int = changed(LOOP["save_every"], 100)
    peek: int = changed(LOOP["peek"], 0, "print N groups with rewards, trained tokens coloured")


@dataclass(frozen=True)
class SampleConfig(Flags):
    """Answer a question, write graded samples, or evaluate a model."""

    question: str | None = flag("data", None, "a question typed by hand", positional=True)
    image: str = flag("data", "", "a picture that the question typed by hand is about")
    data: str = flag("data", "toy", "toy | toy-pictures | gsm8k:PATH | aqua:PATH | ... | file.jsonl")
    split: str = flag("data", "test", "split to sample; a slice is written test[:100]")
    limit: int = flag("data", 0, "use the first N problems (0 = all; 5 when only showing)", least=0)
    style: str = STYLE
    blind: bool = flag("data", False, "control: grey pictures instead of the problems' own")
    samples: tuple[str, ...] = flag(
        "data", (), "samples.jsonl that --verifier or --assess scores, one or several that --html shows"
    )
    model: str = flag("model", "", "model folder (default: runs/aft, else runs/sft, made if absent)")
    endpoint: str = flag(
        "model", "", "URL of an OpenAI-compatible server, whose --model is asked (its key: MINICOT_API_KEY)"
    )
    chat_template: str = CHAT_TEMPLATE
    verifier: str = flag(
        "model", "", "scores --samples -> --out: a DPO model, by log pi - log pi_ref, or a reward model"
    )
    ref: str = flag("model", "", "--verifier: a DPO model's reference, the folder that DPO started from")
    prune: str = flag("model", "", "a pruner's folder, which cuts the problems' shots down (see pruner.py)")
    shots: str = flag("data", "", "--prune: a pool of shots, rows with question and solution, to choose from")
    budget: int = flag("method", 0, "--prune: most tokens of the shots (0 = the pruner's target)", least=0)
    encoder: str = flag("model", "", "--prune: the folder of the pruner's encoder, where it has moved")
    device: Literal["auto", "cpu", "cuda"] = DEVICE
    dtype: Literal["float32", "bfloat16", "float64"] = flag("model", "float32", "of weights and arithmetic")
    compile: bool = COMPILE
    evaluate: bool = flag("method", False, "greedy accuracy and, with --n over 1, majority@k and pass@k")
    assess: bool = flag("method", False, "the model's own scores of --samples: A-accuracy, reference NLL")
    reference: bool = flag("method", False, "--assess: the written solution is one of the right responses")
    mode: Literal["cot", "direct", "plain"] = flag(
        "method", "cot", "ask for a chain, for the bare answer, or the question as it is"
    )
    n: int = flag("method", 1, "responses a problem", least=1, most=10**4)
    temperature: float | None = flag(
        "method", None, "0 is greedy (default: 1; 0 when one response is only shown)", least=0
    )
    top_k: int = flag("method", 0, "keep the k likeliest tokens (0 = all)", least=0)
    top_p: float = flag(
        "method", 1.0, "keep the likeliest tokens that hold this share of the probability", above=0, most=1
    )
    max_new_tokens: int = LENGTH
    truncate_words: int = flag(
        "method", 0, "--verifier: score the first N words alone, as align.py trains (0 = all)", least=0
    )
    aggregate: Literal["mean", "min", "last", "product"] = flag(
        "method", "mean", "--verifier, a PRM: a solution's score from those of its steps"
    )
    token_scores: bool = flag("method", False, "--verifier: also the log-ratio of each token")
    reward: Literal["correct", "steps"] = flag(
        "method", "correct", "of a response; steps = the toy step oracle's grade"
    )
    batch_size: int = flag("loop", 64, "sequences decoded together (a problem's n always are)", least=1)
    concurrency: int = flag("loop", 8, "--endpoint: requests under way at a time", least=1, most=64)
    timeout: float = flag("loop", 120.0, "--endpoint: seconds without a byte, then again", above=0)
    seed: int = flag("loop", 0, "each problem derives its own from it and its id", least=0, most=2**31)
    dry_run: bool = flag("output", False, "--endpoint: print the requests and send nothing")
    cache: str = flag("output", "runs/chat", "--endpoint: folder of replies, not asked for twice ('' = none)")
    html: str = flag("output", "", "a page to read --samples in, scored by --verifier where it is given")
    out: str = flag("output", "", "samples (jsonl), or results with --evaluate (MODEL/results.json)")
    overwrite: bool = flag("output", False, "start --out again instead of going on with it")


class Help(argparse.HelpFormatter):
    """One line a flag where it fits."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action):
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.dest.replace('_', '-')}" if action.default else action.option_strings[0]
        return super()._format_action_invocation(action)


def parse(config_class, argv=None, **choices):
    """argv (default sys.argv) -> a `config_class`; InputError where a flag is wrong. `choices` names what a
    flag allows where only the script knows it: method=METHODS."""
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [--flag value ...]",
        description=f"{config_class.__doc__} Defaults stand in [].",
        allow_abbrev=False,
        formatter_class=Help,
    )

    def refuse(message):
        raise InputError(f"{message} (see --help)")

    parser.error = refuse
    sections = {name: parser.add_argument_group(name) for name in GROUPS}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, default, section = hints[field.name], field.default, sections[field.metadata["group"]]
        text, name = field.metadata["help"], "--" + field.name.replace("_", "-")
        text += f" [{default:g}]" if isinstance(default, float) else f" [{default}]" if default else ""
        allowed = choices.get(field.name) or (
            typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        )
        if field.metadata["positional"]:
            section.add_argument(field.name, nargs="?", default=default, help=text)
        elif kind is bool:
            text = field.metadata["help"]
            section.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=text)
        elif kind == tuple[str, ...]:
            section.add_argument(name, nargs="+", default=default, metavar="FILE", help=text)
        elif allowed:
            section.add_argument(name, choices=tuple(allowed), default=default, help=text)
        else:
            kind = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind  # X | None
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            section.add_argument(name, type=kind, default=default, metavar=metavar, help=text)
    return config_class(**vars(parser.parse_args(argv)))


def check(condition, name, value, allowed):
    """Refuse a flag's value: `check(0 < lr, "--lr", lr, "a number above 0")`."""
    if not condition:
        raise InputError(f"{name} is {value!r}; allowed: {allowed}")


LESS_MEMORY = ("batch_size", "max_new_tokens", "accumulate", "checkpoint_activations", "shard", "dtype")


def run(main, config_class, argv=None, **choices):
    """Run a script, see `one_line_ends`; as one of torchrun's processes where it started this one. Where
    memory runs out, on a GPU or off it, the line names the flags that take less."""
    with parallel.joined() as say, one_line_ends(say):
        config = parse(config_class, argv, **choices)
        try:
            main(config)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one
            known = isinstance(error, MemoryError) or re.search("out of memory|can't allocate", str(error))
            if not known:
                raise
            flags = [f"--{name.replace('_', '-')}" for name in LESS_MEMORY if hasattr(config, name)]
            raise InputError(
                f"out of memory ({str(error).split('. ')[0] or 'of the machine'}); what takes less: smaller "
                f"{' or '.join(flags[:2])}, {', '.join(flags[2:])}"
            ) from None


@contextmanager
def one_line_ends(say=parallel.to_stderr):
    """Within the block bad input (InputError, OSError) ends in one line and exit code 2; SIGTERM and SIGINT
    end in one line and exit code 128 + signal (in a training loop: see runs.Run). Any other exception is a
    bug of ours and keeps its traceback."""

    def interrupt(number, _frame):
        handle_signals(signal.SIG_IGN)  # what has begun to end is not interrupted again
        raise KeyboardInterrupt(number)

    before = handle_signals(interrupt)
    try:
        yield
    except (InputError, OSError) as error:
        message = " ".join(str(error).split())
        say(f"error: {message}")
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        number = signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
        say(f"ended by {number.name}")
        raise SystemExit(128 + number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def handle_signals(handler):
    """Let SIGTERM and SIGINT call it, but where they are ignored or this is no main thread -> {number: the
    handler before}."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}
