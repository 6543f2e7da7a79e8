"""Learn from written solutions: supervised fine-tuning, and pretraining as SFT on rows with an empty prompt.

    python train.py                                             # toy world, base weights -> runs/sft
    python train.py --init SmolLM2-135M --data gsm8k:PATH --lr 2e-5 --out runs/gsm8k

Loss: mean over the batch's target tokens of -log p(token | before); the prompt is read, not trained.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: waiting threads sleep, not spin

import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from minicot import plots
from minicot.config import TrainConfig, check, run
from minicot.data import collate, encode_row, fit, peek, read_problems, schedule, seed_of, target
from minicot.losses import sft_loss
from minicot.metrics import paired_difference
from minicot.scoring import score
from minicot.tokenizer import Tokenizer
from minicot.training import (
    Log,
    clip_gradients,
    load_checkpoint,
    lr_at,
    make_optimizer,
    mfu,
    open_run,
    pick_device,
    refuse_non_finite,
    resolve,
    save_checkpoint,
    write_json,
)
from minicot.weights import load_model, save_model


def make_rows(tokenizer, problems, mode):
    modes = ("cot", "direct") if mode == "both" else (mode,)
    return [encode_row(tokenizer, problem, target(problem, m), mode=m) for problem in problems for m in modes]


@torch.no_grad()
def solution_nlls(model, rows, pad_id, device):
    """Mean token loss of each row, (len(rows),)."""
    nlls = []
    for start in range(0, len(rows), 8):
        batch = collate([[row] for row in rows[start : start + 8]], pad_id).to(device)
        logps = score(model, batch)
        nlls += [-logp[mask].mean().item() for logp, mask in zip(logps, batch.loss_mask)]
    return nlls


def main(config):
    for name, ok in {
        "batch_size": config.batch_size > 0,
        "accumulate": 0 < config.accumulate <= config.batch_size,
        "lr": config.lr > 0,
        "epochs": config.epochs > 0,
        "steps": config.steps >= 0,
        "warmup": 0 <= config.warmup < 1,
        "clip": config.clip >= 0,
        "limit": config.limit >= 0,
    }.items():
        check(ok, "--" + name.replace("_", "-"), getattr(config, name), "see --help")
    device = pick_device(config.device)
    init = resolve(config.init)
    tokenizer = Tokenizer(
        resolve(config.tokenizer) if config.tokenizer else init.parent if init.is_file() else init
    )
    model = load_model(init, dtype=torch.float32, device=device, seed=config.seed)
    max_length = config.max_length or model.config.max_position_embeddings
    check(
        max_length <= model.config.max_position_embeddings,
        "--max-length",
        max_length,
        f"at most the model's max_position_embeddings, {model.config.max_position_embeddings}",
    )

    problems = read_problems(config.data, config.split, limit=config.limit)
    rows, n_overlong = fit(make_rows(tokenizer, problems, config.mode), max_length, config.overlong)
    eval_rows = []
    if config.eval_split:
        held_out = read_problems(config.data, config.eval_split, limit=config.eval_limit)
        eval_rows, _ = fit(make_rows(tokenizer, held_out, config.mode), max_length, config.overlong)
    n_rows = config.steps * config.batch_size or int(config.epochs * len(rows))
    check(n_rows > 0, "--epochs", config.epochs, f"enough for one of the {len(rows)} rows")
    batches = schedule(
        [len(row.ids) for row in rows], config.batch_size, n_rows, seed_of(config.seed, "order")
    )
    if config.peek:
        peek(tokenizer, [[row] for row in rows[: config.peek]])

    out = open_run(config)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    first = load_checkpoint(out, model, optimizer) if config.resume else 0
    log = Log(out / "metrics.jsonl", first)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}; {len(rows):,} rows "
        f"({n_overlong} over {max_length} tokens left out); steps {first + 1} to {len(batches)}"
    )
    if eval_rows and not first:
        write_json(out / "eval.json", {"before": solution_nlls(model, eval_rows, tokenizer.pad_id, device)})

    start = time.perf_counter()
    progress = tqdm(range(first + 1, len(batches) + 1), unit="step", disable=None)
    for step in progress:
        chosen = [rows[i] for i in batches[step - 1]]
        lr = lr_at(step, len(batches), config.lr, config.warmup)
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        n_target = sum(len(row.ids) - row.n_prompt for row in chosen)
        loss = 0.0
        for micro in [chosen[i :: config.accumulate] for i in range(min(config.accumulate, len(chosen)))]:
            batch = collate([[row] for row in micro], tokenizer.pad_id).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                logps = score(model, batch)
            micro_loss = sft_loss(logps, batch.loss_mask, n_tokens=n_target)
            micro_loss.backward()
            loss += micro_loss.item()
        refuse_non_finite(loss, "the loss", step, [row.problem_id for row in chosen])
        grad_norm = clip_gradients(model, config.clip)
        refuse_non_finite(grad_norm, "the gradient norm", step, [row.problem_id for row in chosen])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        line = log.write(step, sum(len(row.ids) for row in chosen), loss=loss, lr=lr, grad_norm=grad_norm)
        progress.set_postfix_str(f"loss {loss:.3f}, {line['tokens_per_s']:,.0f} tokens/s")
        if step == config.stop_at or (
            config.save_every and step % config.save_every == 0 and step < len(batches)
        ):
            save_checkpoint(out, step, model, optimizer)
        if step == config.stop_at:
            print(f"stopped after step {step}; go on with --resume")
            return

    save_model(model, out)
    tokenizer.save(out)
    plots.loss_curve(log.read(), out / "loss.svg")
    report(model, log, out, time.perf_counter() - start, device)
    if eval_rows:
        report_eval(out, solution_nlls(model, eval_rows, tokenizer.pad_id, device), config)


def report(model, log, out, seconds, device):
    lines = log.read()
    last = [line["loss"] for line in lines[-20:]]
    share = mfu(model, lines[-1]["tokens_per_s"], device)
    print(
        f"loss {lines[0]['loss']:.3f} -> {sum(last) / len(last):.3f} (mean of the last {len(last)} steps), "
        f"{lines[-1]['tokens_per_s']:,.0f} tokens/s{f', MFU {share:.1%}' if share else ''}, "
        f"{seconds:.0f} s -> {out}"
    )


def report_eval(out, after, config):
    before = json.loads((Path(out) / "eval.json").read_text())["before"]
    difference, low, high = paired_difference([before], [after])
    write_json(
        out / "eval.json",
        {"before": before, "after": after, "difference": difference, "low": low, "high": high},
    )
    print(
        f"NLL of {len(after)} {config.eval_split} solutions: {sum(before) / len(before):.4f} -> "
        f"{sum(after) / len(after):.4f} nats a token, difference {difference:+.4f} [{low:+.4f}, {high:+.4f}]"
    )


if __name__ == "__main__":
    run(main, TrainConfig)
