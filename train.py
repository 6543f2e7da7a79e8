"""Learn from written solutions: supervised fine-tuning, and pretraining as SFT on rows with an empty prompt.

    python train.py                                             # toy world, base weights -> runs/sft
    python train.py --init SmolLM2-135M --data gsm8k:PATH --lr 2e-5 --out runs/gsm8k

Loss: mean over the batch's target tokens of -log p(token | before); the prompt is read, not trained.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: waiting threads sleep, not spin

from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from minicot import plots
from minicot.config import TrainConfig, check, run
from minicot.data import IMAGE, ahead, check_pictures, collate, encode_row, fit, image_reader, peek, readable
from minicot.data import schedule, seed_of, target, longest_row
from minicot.evaluation import compare, how_to_ask, keep_before, measure
from minicot.losses import sft_loss
from minicot.scoring import score
from minicot.sets import TOYS, read_problems, refuse_shared
from minicot.tokenizer import Tokenizer
from minicot.runs import Log, Run, check_out, load_checkpoint
from minicot.training import autocast, clip_gradients, digest_of, make_optimizer, pick_device
from minicot.training import refuse_non_finite, report_unreadable, resolve, set_lr, train_only
from minicot.weights import attach_vision, load_model


def load_start(config, init, folder, device):
    """(model, tokenizer, reader of pictures or None) that --init, --tokenizer and --vision name."""
    tokenizer = Tokenizer(resolve(config.tokenizer) if config.tokenizer else folder, config.chat_template)
    model = load_model(init, dtype=torch.float32, device=device, seed=config.seed)
    if config.vision:
        model, vision = attach_encoder(model, tokenizer, config), Path(config.vision)
        folder = vision.parent if vision.is_file() else vision
    train_only(model, config.train)
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


def main(config):
    device, init = pick_device(config.device), resolve(config.init)
    folder = init.parent if init.is_file() else init
    inputs = [folder, config.data.split(":")[-1], config.tokenizer or folder, config.vision or folder]
    check_out(config, inputs)
    model, tokenizer, reader = load_start(config, init, folder, device)
    problems, held_out = read_data(config, reader)
    context = model.config.max_position_embeddings
    max_length = min(config.max_length or context, longest_row(context, problems + held_out, reader))
    modes = ("cot", "direct") if config.mode == "both" else (config.mode,)
    lacks = lambda problem, mode: (problem.answer if mode == "direct" else problem.solution) is None
    solved = [problem for problem in held_out if not any(lacks(problem, mode) for mode in modes)]
    how = (modes, max_length, config.overlong)
    rows, n_overlong = make_rows(tokenizer, problems, *how)
    held_out_rows, n_more = make_rows(tokenizer, solved, *how)
    check_pictures([rows, held_out_rows], reader, config.data)
    if config.peek:
        peek(tokenizer, [[row] for row in rows[: config.peek]])
    n_rows = config.steps * config.batch_size or int(config.epochs * len(rows))
    check(n_rows > 0, "--epochs", config.epochs, f"enough for one of the {len(rows)} rows")
    lengths = [len(row.ids) if config.group_by_length else 0 for row in rows]
    batches = schedule(lengths, config.batch_size, n_rows, seed_of(config.seed, "order"))
    asking = how_to_ask(config, modes[0], reader)
    graded = [problem for problem in held_out if problem.answer is not None]
    held_out_too = dict(problems=graded, rows=held_out_rows, asking=asking, config=config)
    evaluate = partial(measure, tokenizer=tokenizer, **held_out_too)

    def micro_batches(step):
        """A step's rows, and the same as batches."""
        chosen = [rows[i] for i in batches[step - 1]]
        micros = [part for a in range(config.accumulate) if (part := chosen[a :: config.accumulate])]
        return chosen, [collate([[row] for row in micro], tokenizer.pad_id, reader) for micro in micros]

    with Run(config, inputs) as run:
        run.begin(folder, digest_of(tokenizer, [rows, held_out_rows]))
        optimizer = make_optimizer(model, config.lr, config.weight_decay, config.vision_lr)
        first = load_checkpoint(run.out, model, optimizer) if config.resume else 0
        log = Log(run.out / "metrics.jsonl", first)
        print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}; {len(rows):,} rows and "
            f"{len(held_out)} held-out problems ({n_overlong + n_more} rows over {max_length} tokens "
            f"left out); steps {first + 1} to {len(batches)}"
        )
        if held_out and not first:
            keep_before(run.out, evaluate(model))

        run.listen()
        steps = range(first + 1, len(batches) + 1)
        progress = tqdm(steps, unit="step", disable=None)
        for step, (chosen, parts) in zip(progress, ahead(micro_batches, steps)):
            lr = set_lr(optimizer, step, len(batches), config.warmup)
            n_target = sum(len(row.ids) - row.n_prompt for row in chosen)  # of the whole step
            loss = 0.0
            for batch in (part.to(device) for part in parts):
                with autocast(config, device):
                    logps = score(model, batch)
                part = sft_loss(logps, batch.loss_mask, n_tokens=n_target)
                part.backward()
                loss += part.item()
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

        run.finish(model, tokenizer, reader, log, device)
        plots.loss_curve(log.read(), run.out / "loss.svg")
        if held_out:
            compare(run.out, evaluate(model))


if __name__ == "__main__":
    run(main, TrainConfig)
