"""Learn from written solutions: supervised fine-tuning, and pretraining as SFT on rows with an empty prompt.

    python train.py                                             # toy world, base weights -> runs/sft
    python train.py --init SmolLM2-135M --data gsm8k:PATH --lr 2e-5 --out runs/gsm8k

Loss: mean over the batch's target tokens of -log p(token | before); the prompt is read, not trained.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: waiting threads sleep, not spin

import json
from pathlib import Path

import torch
from tqdm import tqdm

from minicot import plots
from minicot.config import TrainConfig, check, run
from minicot.data import IMAGE, check_pictures, collate, encode_row, fit, image_reader, peek
from minicot.sets import read_problems
from minicot.data import longest_row, schedule, seed_of, target
from minicot.sets import refuse_shared
from minicot.losses import sft_loss
from minicot.metrics import paired_difference
from minicot.scoring import score
from minicot.tokenizer import Tokenizer
from minicot.training import Log, check_out, clip_gradients, close_run, digest_of, load_checkpoint
from minicot.training import make_optimizer, mfu, open_run, pick_device, refuse_non_finite, resolve
from minicot.training import save_checkpoint, set_lr, train_only, write_json
from minicot.weights import attach_vision, load_model, save_model


def make_rows(tokenizer, problems, config, max_length):
    """Rows of problems, one each (two with --mode both), and how many were too long."""
    modes = ("cot", "direct") if config.mode == "both" else (config.mode,)
    rows = [
        encode_row(tokenizer, problem, target(problem, mode), mode=mode)
        for problem in problems
        for mode in modes
    ]
    return fit(rows, max_length, config.overlong)


def open_eyes(model, tokenizer, config):
    """Attach --vision's tower and a random projector; a placeholder token is added where there is none."""
    token = tokenizer.add_token(IMAGE)
    if token >= model.config.vocab_size:
        model.grow_vocabulary(token + 1)
    return attach_vision(
        model, config.vision, image_token_id=token, feature_layer=config.feature_layer, seed=config.seed
    )


@torch.no_grad()
def row_losses(model, rows, pad_id, reader, device):
    """Mean token loss of each row, (len(rows),)."""
    losses = []
    for start in range(0, len(rows), 8):
        batch = collate([[row] for row in rows[start : start + 8]], pad_id, reader).to(device)
        losses += [-logps[mask].mean().item() for logps, mask in zip(score(model, batch), batch.loss_mask)]
    return losses


def main(config):
    device, init = pick_device(config.device), resolve(config.init)
    folder = init.parent if init.is_file() else init
    check_out(config, [folder, *config.data.split(":")[-1:]])
    tokenizer = Tokenizer(resolve(config.tokenizer) if config.tokenizer else folder)
    model = load_model(init, dtype=torch.float32, device=device, seed=config.seed)
    if config.vision:
        model = open_eyes(model, tokenizer, config)
    eyes = Path(config.vision) if config.vision else folder
    reader = image_reader(model, tokenizer, eyes.parent if eyes.is_file() else eyes)
    train_only(model, config.train)
    context = model.config.max_position_embeddings
    check(config.max_length <= context, "--max-length", config.max_length, f"at most the context, {context}")
    check(
        tokenizer.vocab_size <= model.config.vocab_size,
        "--tokenizer",
        str(tokenizer.folder),
        f"one with ids below the model's vocab_size, {model.config.vocab_size}",
    )
    problems = read_problems(config.data, config.split, limit=config.limit)
    max_length = min(config.max_length or context, longest_row(context, problems, reader))
    rows, n_overlong = make_rows(tokenizer, problems, config, max_length)
    held_out, n_lost = [], 0
    if config.eval_split:
        unseen = read_problems(config.data, config.eval_split, limit=config.eval_limit)
        refuse_shared(problems, unseen, "--eval-split")
        held_out, n_lost = make_rows(tokenizer, unseen, config, max_length)
    check_pictures([rows, held_out], reader, config.data)
    n_rows = config.steps * config.batch_size or int(config.epochs * len(rows))
    check(n_rows > 0, "--epochs", config.epochs, f"enough for one of the {len(rows)} rows")
    lengths = [len(row.ids) if config.group_by_length else 0 for row in rows]
    batches = schedule(lengths, config.batch_size, n_rows, seed_of(config.seed, "order"))
    if config.peek:
        peek(tokenizer, [[row] for row in rows[: config.peek]])

    out = open_run(config, digest_of(tokenizer, [rows, held_out]), [folder])
    optimizer = make_optimizer(model, config.lr, config.weight_decay, config.vision_lr)
    first = load_checkpoint(out, model, optimizer) if config.resume else 0
    log = Log(out / "metrics.jsonl", first)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}; {len(rows):,} rows and "
        f"{len(held_out)} held out ({n_overlong + n_lost} over {max_length} tokens left out); "
        f"steps {first + 1} to {len(batches)}"
    )
    if held_out and not first:
        before = row_losses(model, held_out, tokenizer.pad_id, reader, device)
        write_json(out / "eval.json", {"before": before})

    progress = tqdm(range(first + 1, len(batches) + 1), unit="step", disable=None)
    for step in progress:
        lr = set_lr(optimizer, step, len(batches), config.warmup)
        chosen = [rows[i] for i in batches[step - 1]]
        n_target = sum(len(row.ids) - row.n_prompt for row in chosen)  # of the whole step
        loss = 0.0
        for micro in [part for a in range(config.accumulate) if (part := chosen[a :: config.accumulate])]:
            batch = collate([[row] for row in micro], tokenizer.pad_id, reader).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                logps = score(model, batch)
            part = sft_loss(logps, batch.loss_mask, n_tokens=n_target)
            part.backward()
            loss += part.item()
        refuse_non_finite(loss, "the loss", step, [row.problem_id for row in chosen])
        grad_norm = clip_gradients(model, config.clip)
        refuse_non_finite(grad_norm, "the gradient norm", step, [row.problem_id for row in chosen])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        n_tokens = sum(len(row.ids) for row in chosen)
        line = log.write(step, n_tokens, loss=loss, lr=lr, grad_norm=grad_norm)
        progress.set_postfix_str(f"loss {loss:.3f}, {line['tokens_per_s']:,.0f} tokens/s")
        due = config.save_every and step % config.save_every == 0 and step < len(batches)
        if due or step == config.stop_at:
            save_checkpoint(out, step, model, optimizer)
        if step == config.stop_at:
            print(f"stopped after step {step}; go on with --resume")
            return

    save_model(model, out)
    tokenizer.save(out)
    if reader:
        reader.processor.save(out)
    plots.loss_curve(log.read(), out / "loss.svg")
    close_run(out)
    report(model, log.read(), out, device)
    if held_out:
        report_held_out(out, row_losses(model, held_out, tokenizer.pad_id, reader, device), config.eval_split)


def report(model, lines, out, device):
    last, speed = [line["loss"] for line in lines[-20:]], lines[-1]["tokens_per_s"]
    share = mfu(model, speed, device)
    print(
        f"loss {lines[0]['loss']:.3f} -> {sum(last) / len(last):.3f} (mean of the last {len(last)} steps), "
        f"{speed:,.0f} tokens/s{f', MFU {share:.1%}' if share else ''} -> {out}"
    )


def report_held_out(out, after, split):
    """Mean token loss of held-out solutions before and after, paired -> eval.json and a line."""
    before = json.loads((out / "eval.json").read_text())["before"]
    difference, low, high = paired_difference([before], [after])
    write_json(
        out / "eval.json",
        {"before": before, "after": after, "difference": difference, "low": low, "high": high},
    )
    print(
        f"NLL of {len(after)} solutions of {split}: {sum(before) / len(before):.4f} -> "
        f"{sum(after) / len(after):.4f} nats a token, difference {difference:+.4f} "
        f"[{low:+.4f}, {high:+.4f}]"
    )


if __name__ == "__main__":
    run(main, TrainConfig)
