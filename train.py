"""Learn from labels. From written solutions: supervised fine-tuning, and pretraining as SFT on rows with an
empty prompt. From labelled responses: a reward model, for each step (PRM) or the whole response (ORM).

    python train.py                                             # toy world, base weights -> runs/sft
    python train.py --init SmolLM2-135M --data gsm8k:PATH --lr 2e-5 --out runs/gsm8k
    python train.py --task prm --init runs/sft --samples labelled.jsonl --lr 3e-4 --out runs/prm

Loss of SFT: mean over the batch's target tokens of -log p(token | before); the prompt is read, not trained.
Of a reward model: mean over the batch's responses of losses.prm_loss at the ends of their steps.
"""

import os

# before torch loads: waiting threads spin briefly, then sleep (tests/bench/README.md says what it is worth)
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

from minicot import plots
from minicot.config import TrainConfig, check, run
from minicot.data import IMAGE, ahead, check_pictures, collate, encode_labelled, encode_row, fit, image_reader
from minicot.data import longest_row, peek, readable, schedule, seed_of, target
from minicot.evaluation import compare, how_to_ask, keep_before, measure, measure_steps
from minicot.losses import prm_loss, sft_loss
from minicot.model import RewardModel
from minicot.parallel import first, put_together, quiet, said, share, size, total, wrap
from minicot.records import read_samples
from minicot.scoring import score, step_logits
from minicot.sets import TOYS, read_problems, refuse_shared
from minicot.tokenizer import Tokenizer
from minicot.runs import Log, Run, check_out, load_checkpoint
from minicot.training import autocast, clip_gradients, digest_of, make_optimizer, pick_device
from minicot.training import refuse_non_finite, report_unreadable, resolve, set_layers, set_lr, train_only
from minicot.weights import attach_vision, load_model


def load_start(config, init, folder, device):
    """(model, tokenizer, reader of pictures or None) that --init, --tokenizer and --vision name."""
    tokenizer = Tokenizer(resolve(config.tokenizer) if config.tokenizer else folder, config.chat_template)
    model = load_model(init, dtype=torch.float32, device=device, seed=config.seed)
    set_layers(model, compile=config.compile, checkpoint_activations=config.checkpoint_activations)
    if config.vision:
        model, vision = attach_encoder(model, tokenizer, config), Path(config.vision)
        folder = vision.parent if vision.is_file() else vision
    train_only(model, config.train)
    if config.task != "sft":  # with a new head
        model = RewardModel(model, config.task, torch.Generator().manual_seed(config.seed))
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings
    allowed = f"one with ids below the model's vocab_size, {vocabulary}"
    check(tokenizer.vocab_size <= vocabulary, "--tokenizer", str(tokenizer.folder), allowed)
    check(config.max_length <= context, "--max-length", config.max_length, f"at most the context, {context}")
    return model, tokenizer, image_reader(model, tokenizer, folder)


def attach_encoder(model, tokenizer, config):
    """Give a text model --vision's picture encoder and a random projector; a placeholder token is added where
    there is none."""
    token = tokenizer.add_token(IMAGE)
    if token >= model.config.vocab_size:
        model.grow_vocabulary(token + 1)
    return attach_vision(
        model, config.vision, image_token_id=token, feature_layer=config.feature_layer, seed=config.seed
    )


def read_data(config, reader):
    """(problems to train on, held-out problems), without those whose picture can't be read."""
    problems, unreadable = readable(read_problems(config.data, config.split, limit=config.limit), reader)
    split, held_out, more = config.eval_split, [], []
    if split == "auto":  # of the built-in worlds the test split, unless it is what is trained on
        split = "test" if config.data in TOYS and not config.split.startswith("test") else ""
    if split:
        held_out, more = readable(read_problems(config.data, split, limit=config.eval_limit), reader)
        refuse_shared(problems, held_out, "--eval-split")
    report_unreadable(unreadable + more, problems)
    return problems, held_out


def make_rows(tokenizer, problems, modes, max_length, overlong):
    """Rows of problems, one for each mode, and how many were too long."""
    encode = lambda problem, mode: encode_row(tokenizer, problem, target(problem, mode), mode=mode)
    rows = [encode(problem, mode) for problem in problems for mode in modes]
    return fit(rows, max_length, overlong) if rows else ([], 0)


def solved_rows(config, model, tokenizer, reader):
    """SFT: (rows of written solutions, held-out rows, held-out problems with an answer, what is left out)."""
    problems, held_out = read_data(config, reader)
    modes = ("cot", "direct") if config.mode == "both" else (config.mode,)
    lacks = lambda problem, mode: (problem.answer if mode == "direct" else problem.solution) is None
    solved = [problem for problem in held_out if not any(lacks(problem, mode) for mode in modes)]
    how = (modes, most_tokens(config, model, problems + held_out, reader), config.overlong)
    rows, n_overlong = make_rows(tokenizer, problems, *how)
    held_out_rows, n_more = make_rows(tokenizer, solved, *how)
    graded = [problem for problem in held_out if problem.answer is not None]
    return rows, held_out_rows, graded, {"overlong": n_overlong + n_more}


def judged_rows(config, model, tokenizer, reader):
    """PRM, ORM: the same of labelled responses, which need no answers."""
    check(config.samples, "--samples", config.samples, f"a samples.jsonl, for --task {config.task}")
    check(config.mode != "both", "--mode", config.mode, f"cot, direct or plain, for --task {config.task}")
    files = [(config.samples, config.limit), (config.eval_samples, config.eval_limit)]
    sampled = [read_samples(file)[: limit or None] if file else [] for file, limit in files]
    problems = [[samples.problem for samples in part] for part in sampled]
    refuse_shared(*problems, "--eval-samples")
    left, unreadable = readable(sum(problems, []), reader)
    report_unreadable(unreadable, left)
    ids, longest = {problem.id for problem in left}, most_tokens(config, model, left, reader)
    parts, left_out = [], Counter()
    for part in ([samples for samples in part if samples.problem.id in ids] for part in sampled):
        rows, counts = encode_labelled(tokenizer, part, mode=config.mode, kind=config.task)
        rows, n_overlong = fit(rows, longest, config.overlong) if rows else ([], 0)
        parts.append(rows)
        left_out += Counter(counts | {"overlong": n_overlong})
    check(parts[0], "--samples", config.samples, f"responses with labels; left out: {dict(left_out)}")
    return *parts, [], dict(left_out)


def most_tokens(config, model, problems, reader):
    """How long a row may be."""
    context = model.config.max_position_embeddings
    return min(config.max_length or context, longest_row(context, problems, reader))


# ---- the tasks -----------------------------------------------------------------------------------


class Task(NamedTuple):
    """What is learned: the rows, the forward pass, the loss, and how a held-out set is measured."""

    rows: Callable  # (config, model, tokenizer, reader) -> rows, held-out rows, problems to answer, left out
    forward: Callable  # (model, Batch) -> values of the tokens (N,T) or of the steps (N,S)
    loss: Callable  # (values, Batch, config, rows of the step, target tokens of the step) -> its part of it
    measure: Callable  # of evaluation.py
    held_out: str  # what is measured
    unused: tuple  # flags that belong to the other task


def solution_loss(values, batch, config, n_rows, n_tokens):
    return sft_loss(values, batch.loss_mask, n_tokens=n_tokens)


def label_loss(values, batch, config, n_rows, n_tokens):
    losses = prm_loss(values, batch.step_labels, batch.step_ends >= 0, reduce=config.reduce)
    return losses.sum() / n_rows


SFT = Task(solved_rows, score, solution_loss, measure, "problems", ("samples", "eval_samples", "reduce"))
LABELS = Task(judged_rows, step_logits, label_loss, measure_steps, "responses", ("data", "eval_split"))
TASKS = {"sft": SFT, "prm": LABELS, "orm": LABELS}


def main(config):
    task = TASKS[config.task]
    for name in task.unused:
        value, unset = getattr(config, name), getattr(TrainConfig, name)
        allowed = f"its default, {unset!r}: --task {config.task} does not use it"
        check(value == unset, "--" + name.replace("_", "-"), value, allowed)
    device, init = pick_device(config.device), resolve(config.init)
    folder = init.parent if init.is_file() else init
    inputs = [folder, config.data.split(":")[-1], config.tokenizer or folder, config.vision or folder]
    inputs += [file for file in (config.samples, config.eval_samples) if file]
    check_out(config, inputs)
    model, tokenizer, reader = load_start(config, init, folder, device)
    rows, held_out_rows, graded, left_out = task.rows(config, model, tokenizer, reader)
    check_pictures([rows, held_out_rows], reader, config.samples or config.data)
    blind = [row.problem_id for row in rows if not row.images] if config.train == "projector" else []
    check(not blind, "--train", config.train, f"all or language, as rows have no picture: {blind[:3]}")
    if config.peek:
        peek(tokenizer, [[row] for row in rows[: config.peek]])
    n_rows = config.steps * config.batch_size or int(config.epochs * len(rows))
    check(n_rows > 0, "--epochs", config.epochs, f"enough for one of the {len(rows)} rows")
    lengths = [len(row.ids) if config.group_by_length else 0 for row in rows]
    batches = schedule(lengths, config.batch_size, n_rows, seed_of(config.seed, "order"))
    asking = how_to_ask(config, "cot" if config.mode == "both" else config.mode, reader)
    evaluate = partial(
        task.measure, tokenizer=tokenizer, rows=held_out_rows, problems=graded, config=config, asking=asking
    )
    held_out = graded or held_out_rows

    def micro_batches(step):
        """A step's rows, and this rank's share of them as batches, each with its weight."""
        chosen = [rows[i] for i in batches[step - 1]]
        parts = share(chosen, config.accumulate)
        return chosen, [
            (collate([[row] for row in part], tokenizer.pad_id, reader), weight) for part, weight in parts
        ]

    with Run(config, inputs) as run:
        run.begin(folder, digest_of(tokenizer, [rows, held_out_rows]))
        forward = wrap(model, task.forward, config)
        optimizer = make_optimizer(model, config.lr, config.weight_decay, config.vision_lr)
        done = load_checkpoint(run.out, model, optimizer) if config.resume else 0
        log = Log(run.out / "metrics.jsonl", done)
        plain = put_together(model, lambda: load_start(config, init, folder, device)[0])
        print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters on {said(device)}; "
            f"{len(rows):,} rows and {len(held_out)} held-out {task.held_out}; left out: {left_out}; "
            f"steps {done + 1} to {len(batches)}"
        )
        if held_out and not done:
            keep_before(run.out, evaluate(plain()))

        run.listen()
        steps = range(done + 1, len(batches) + 1)
        progress = tqdm(steps, unit="step", disable=quiet())
        for step, (chosen, parts) in zip(progress, ahead(micro_batches, steps)):
            lr = set_lr(optimizer, step, len(batches), config.warmup)
            n_target = sum(len(row.ids) - row.n_prompt for row in chosen)  # of the whole step
            loss = 0.0
            for batch, weight in parts:
                batch = batch.to(device)
                with autocast(config, device):
                    values = forward(batch)
                part = weight * task.loss(values, batch, config, len(chosen), n_target)
                (part * size()).backward()  # the gradients of all ranks are averaged, their sum is meant
                loss += part.item()
            (loss,) = total(loss)
            ids = [row.problem_id for row in chosen]
            refuse_non_finite(loss, "the loss", step, ids)
            grad_norm = clip_gradients(model, config.clip)
            refuse_non_finite(grad_norm, "the gradient norm", step, ids)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            n_tokens = sum(len(row.ids) for row in chosen)
            line = log.write(step, n_tokens, loss=loss, lr=lr, grad_norm=grad_norm)
            progress.set_postfix_str(f"loss {loss:.3f}, {line['tokens_per_s']:,.0f} tokens/s")
            run.end_step(step, len(batches), model, optimizer)

        trained = plain()
        run.finish(trained, tokenizer, reader, log, device)
        if first():
            plots.loss_curve(log.read(), run.out / "loss.svg")
        if held_out:
            compare(run.out, evaluate(trained))


if __name__ == "__main__":
    run(main, TrainConfig)
