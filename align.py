"""Learn from groups of responses: RFT, DPO, IPO, RRHF, PRO and AFT, each with or without a constraint.

    python align.py                                             # AFT on what train.py left; before and after
    python align.py --method dpo --beta 0.1 --init runs/sft --samples runs/samples.jsonl --out runs/dpo
    python align.py --method rrhf --constraint boundary --margin 0.1 --out runs/rrhf

A new loss is one pure function in minicot/losses.py and one row in METHODS below; the loop does not change.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: waiting threads sleep, not spin

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from minicot.config import AlignConfig, check, run
from minicot.data import (
    collate,
    encode_row,
    make_groups,
    pairs,
    peek,
    read_problems,
    read_samples,
    samples_to_row,
    schedule,
    seed_of,
    style_of,
    target,
    to_groups,
)
from minicot.losses import (
    aft_loss,
    better_than,
    dpo_loss,
    ipo_loss,
    pro_loss,
    rrhf_loss,
    sequence_logps,
    sft_loss,
)
from minicot.metrics import accuracy, paired_difference, repeated_4grams
from minicot.sampling import sample_groups
from minicot.scoring import score
from minicot.tokenizer import Tokenizer
from minicot.training import (
    Log,
    clip_gradients,
    load_checkpoint,
    lr_at,
    make_optimizer,
    open_run,
    pick_device,
    refuse_non_finite,
    save_checkpoint,
    train_first,
    write_json,
    write_jsonl,
)
from minicot.weights import load_model, save_model


class Groups(NamedTuple):
    """What a loss may look at: tables (B,K) over B questions and up to K responses each."""

    scores: torch.Tensor  # mean log-probability a token: s_i of RRHF, PRO and AFT
    logps: torch.Tensor  # summed log-probability: log pi(y|x) of DPO
    ref_logps: torch.Tensor  # the same under the reference model (zeros where the method needs none)
    rewards: torch.Tensor
    present: torch.Tensor
    better: torch.Tensor  # (B,K,K): response i is strictly better than response j


@dataclass(frozen=True)
class Method:
    """loss(groups, config) -> (B,), or None; the rows that the SFT term trains, how it is averaged, its
    default weight as a function of l, the number of responses of a group."""

    loss: Callable | None
    sft_on: str | None  # "reference" | "best" | "right" | None
    sft_reduce: str = (
        "tokens"  # "tokens": mean over the step's trained tokens; "groups": sum a response, mean over groups
    )
    sft_weight: Callable = lambda l: 1.0
    on_pairs: bool = False  # groups are right x wrong pairs, chosen first
    needs_ref: bool = False


def constraint(c):
    return {"constraint": c.constraint, "margin": c.margin}


METHODS = {
    "rft": Method(None, "right"),
    "dpo": Method(
        lambda g, c: dpo_loss(
            g.logps, g.ref_logps, beta=c.beta, label_smoothing=c.label_smoothing, **constraint(c)
        ),
        None,
        on_pairs=True,
        needs_ref=True,
    ),
    "ipo": Method(
        lambda g, c: ipo_loss(g.logps, g.ref_logps, beta=c.beta), None, on_pairs=True, needs_ref=True
    ),
    "rrhf": Method(lambda g, c: rrhf_loss(g.scores, g.better, **constraint(c)), "best"),
    "pro": Method(
        lambda g, c: pro_loss(g.scores, g.rewards, g.present, **constraint(c)),
        "best",
        sft_reduce="groups",
        sft_weight=lambda l: 0.05 * (l - 1) ** 2,
    ),
    "aft": Method(lambda g, c: aft_loss(g.scores, g.better, **constraint(c)), "reference"),
}


def sft_rows(batch, sft_on):
    """(N,) bool: the rows that the SFT term trains."""
    if sft_on == "reference":
        return batch.is_reference
    if sft_on == "right":
        return (batch.correct == 1)[batch.group, batch.slot]
    if sft_on == "best":  # the highest reward, the first of equals
        best = batch.rewards.masked_fill(~batch.present, -torch.inf).argmax(1)
        return batch.slot == best[batch.group]
    return torch.zeros_like(batch.is_reference)


def ranked(batch, reference_in_positives):
    """(B,K) bool: the responses that take part in the ranking."""
    if reference_in_positives:
        return batch.present
    return batch.present & ~to_groups(batch.is_reference.long(), batch).bool()


# ---- reference log-probabilities: computed once, kept --------------------------------------------


def fingerprint(weights, tokenizer, groups):
    """What reference log-probabilities depend on: the weights, the tokenizer and every row's ids."""
    digest = hashlib.sha256(Path(weights, "model.safetensors").read_bytes())
    digest.update(tokenizer.fingerprint.encode())
    for group in groups:
        for row in group:
            digest.update(f"{row.n_prompt}:{row.ids};".encode())
    return digest.hexdigest()


@torch.no_grad()
def reference_logps(path, folder, tokenizer, groups, config, device):
    """Summed log-probabilities of every row under the reference model, a list of tensors (responses,) a
    group; read from `path` where it holds those of the same weights, tokenizer and rows, else computed and
    written there."""
    key = fingerprint(folder, tokenizer, groups)
    if path.is_file():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                raise ValueError(
                    f"{path} holds reference log-probabilities of other weights, data or tokenizer; allowed: "
                    "another --ref-logps file, or delete it"
                )
            flat = file.get_tensor("logps")
    else:
        model = load_model(folder, dtype=torch.float32, device=device)
        flat = []
        for start in tqdm(
            range(0, len(groups), config.batch_size), desc="reference", unit="batch", disable=None
        ):
            batch = collate(groups[start : start + config.batch_size], tokenizer.pad_id).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                logps = score(model, batch)
            flat.append(sequence_logps(logps, batch.loss_mask, reduce="sum").cpu())
        flat = torch.cat(flat)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": flat}, path, metadata={"key": key})
    return list(flat.split([len(group) for group in groups]))


# ---- watching: what a collapse would show in -----------------------------------------------------


def watch(groups, better, batch):
    """Mean score of right and of wrong responses, the margin between a better and a worse one, the share of
    pairs in the right order; None where the batch has none."""
    scores, correct = groups.scores.detach(), batch.correct
    gaps = (scores[:, :, None] - scores[:, None, :])[better]
    mean = lambda values: values.mean().item() if len(values) else None
    return {
        "score_right": mean(scores[correct == 1]),
        "score_wrong": mean(scores[correct == 0]),
        "margin": mean(gaps),
        "ranking_accuracy": mean((gaps > 0).float()),
    }


@torch.no_grad()
def probe(model, tokenizer, problems, rows, settings, device):
    """On held-out problems: greedy accuracy, NLL of reference solutions (nats a token), missing answers,
    repeated 4-grams."""
    if not problems:
        return {}
    responses = [
        s.responses[0] for s in sample_groups(model, tokenizer, problems, n=1, temperature=0.0, **settings)
    ]
    found = {
        "accuracy": sum(bool(r.correct) for r in responses) / len(responses),
        "missing_answers": sum(r.answer is None for r in responses) / len(responses),
        "repeated_4grams": sum(repeated_4grams(r.ids) for r in responses) / len(responses),
    }
    if rows:
        batch = collate([[row] for row in rows], tokenizer.pad_id).to(device)
        found["reference_nll"] = sft_loss(score(model, batch), batch.loss_mask).item()
    return found


def greedy(model, tokenizer, problems, settings):
    return [
        int(bool(s.responses[0].correct))
        for s in sample_groups(model, tokenizer, problems, n=1, temperature=0.0, **settings)
    ]


def main(config):
    method = METHODS[config.method]
    for name, ok in {
        "batch_size": config.batch_size > 0,
        "accumulate": 0 < config.accumulate <= config.batch_size,
        "lr": config.lr > 0,
        "epochs": config.epochs > 0,
        "steps": config.steps >= 0,
        "k": config.k > 1,
        "beta": config.beta > 0,
        "max_pairs": config.max_pairs > 0,
        "sft_weight": config.sft_weight is None or config.sft_weight >= 0,
    }.items():
        check(ok, "--" + name.replace("_", "-"), getattr(config, name), "see --help")
    check(
        method.loss is not None or config.constraint == "none",
        "--constraint",
        config.constraint,
        "none for this method",
    )
    check(
        (config.constraint == "boundary") == (config.margin is not None),
        "--margin",
        config.margin,
        "a number >= 0 with --constraint boundary, and none without",
    )
    check(config.margin is None or config.margin >= 0, "--margin", config.margin, "a number >= 0")
    device, started = pick_device(config.device), time.perf_counter()

    folder = Path(config.init or train_first())
    tokenizer = Tokenizer(folder)
    model = load_model(folder, dtype=torch.float32, device=device)
    data = config.data or ("" if config.samples else "toy")
    style = config.style or style_of(data)
    settings = dict(
        mode=config.mode, style=style, max_new_tokens=config.max_new_tokens, batch_size=config.eval_batch_size
    )
    held_out = (
        read_problems(data, config.eval_split, limit=config.eval_limit) if data and config.eval_split else []
    )
    out = open_run(config)

    # Samples: K responses a training problem, from --samples or drawn from the model now.
    if config.samples:
        samples = read_samples(config.samples)
    else:
        problems = read_problems(data, config.split, limit=config.limit)
        drawn = sample_groups(model, tokenizer, problems, n=config.k, seed=config.seed, **settings)
        samples = list(tqdm(drawn, total=len(problems), desc="sampling", unit="problem", disable=None))
        write_jsonl(out / "samples.jsonl", map(samples_to_row, samples))

    # Groups: pairs for DPO and IPO, all distinct responses (and the reference solution) for the others.
    if method.on_pairs:
        groups, counts = make_groups(
            tokenizer,
            pairs(
                samples,
                max_pairs=config.max_pairs,
                seed=config.seed,
                window=(config.pair_low, config.pair_high),
            ),
            mode=config.mode,
            max_length=model.config.max_position_embeddings,
            reference=False,
        )
    else:
        groups, counts = make_groups(
            tokenizer,
            samples,
            mode=config.mode,
            reference=config.reference,
            max_length=model.config.max_position_embeddings,
        )
    if method.loss is None:  # RFT reads right responses alone
        groups = [kept for group in groups if (kept := [row for row in group if row.correct])]
        check(groups, "--samples", config.samples, "samples with a right response")
    ref = None
    if method.needs_ref:
        ref = reference_logps(
            Path(config.ref_logps or out / "ref_logps.safetensors"),
            config.ref or folder,
            tokenizer,
            groups,
            config,
            device,
        )
    if config.peek:
        peek(tokenizer, groups[: config.peek])

    largest = max(max(row.ids) for group in groups for row in group)
    check(
        largest < model.config.vocab_size,
        "--samples",
        config.samples,
        f"token ids below {model.config.vocab_size}",
    )
    n_groups = config.steps * config.batch_size or int(config.epochs * len(groups))
    check(n_groups > 0, "--epochs", config.epochs, f"enough for one of the {len(groups)} groups")
    batches = schedule(
        [max(len(row.ids) for row in group) for group in groups],
        config.batch_size,
        n_groups,
        seed_of(config.seed, "order"),
    )
    watched = held_out[: config.probe_limit]
    watched_rows = [
        encode_row(tokenizer, p, target(p, config.mode), mode=config.mode) for p in watched if p.solution
    ]
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    first = load_checkpoint(out, model, optimizer) if config.resume else 0
    log = Log(out / "metrics.jsonl", first)
    print(
        f"{config.method}, constraint {config.constraint}: {len(groups)} groups, "
        f"{sum(map(len, groups))} responses; "
        f"left out: {counts}; steps {first + 1} to {len(batches)} on {device}"
    )

    progress = tqdm(range(first + 1, len(batches) + 1), unit="step", disable=None)
    for step in progress:
        lr = lr_at(step, len(batches), config.lr, config.warmup)
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        line, loss, n_tokens = {}, 0.0, 0
        chosen = batches[step - 1]
        micros = [
            collate([groups[i] for i in part], tokenizer.pad_id).to(device)
            for part in (chosen[a :: config.accumulate] for a in range(min(config.accumulate, len(chosen))))
        ]
        n_sft = sum((b.loss_mask & sft_rows(b, method.sft_on)[:, None]).sum() for b in micros)
        for a, batch in enumerate(micros):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                logps = score(model, batch)
            present = ranked(batch, config.reference_in_positives)
            table = Groups(
                scores=to_groups(sequence_logps(logps, batch.loss_mask, reduce="mean"), batch),
                logps=to_groups(sequence_logps(logps, batch.loss_mask, reduce="sum"), batch),
                ref_logps=to_groups(
                    torch.cat([ref[i] for i in chosen[a :: config.accumulate]]).to(device), batch
                )
                if ref
                else torch.zeros_like(batch.rewards),
                rewards=batch.rewards,
                present=present,
                better=better_than(batch.rewards, present),
            )
            part = logps.new_zeros(())
            if method.loss:
                part = method.loss(table, config).sum() / len(chosen)
            trained = sft_rows(batch, method.sft_on)
            if trained.any():
                sizes = batch.present.sum(1)
                weights = torch.tensor(
                    [
                        method.sft_weight(l) if config.sft_weight is None else config.sft_weight
                        for l in sizes.tolist()
                    ],
                    device=device,
                )[batch.group]
                part = part + sft_loss(
                    logps * weights[:, None],
                    batch.loss_mask & trained[:, None],
                    n_tokens=n_sft if method.sft_reduce == "tokens" else len(chosen),
                )
            part.backward()
            loss += part.item()
            n_tokens += int(batch.pad_mask.sum())
            line = watch(table, table.better, batch)  # of the step's last micro-batch
        ids = [problem_id for batch in micros for problem_id in batch.problem_ids]
        refuse_non_finite(loss, "the loss", step, ids)
        line["grad_norm"] = clip_gradients(model, config.clip)
        refuse_non_finite(line["grad_norm"], "the gradient norm", step, ids)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if config.probe_every and (step % config.probe_every == 0 or step in (1, len(batches))):
            line |= {
                f"held_out_{name}": value
                for name, value in probe(model, tokenizer, watched, watched_rows, settings, device).items()
            }
        line = log.write(step, n_tokens, loss=loss, lr=lr, **line)
        progress.set_postfix_str(f"loss {loss:.3f}, ranking {line['ranking_accuracy'] or 0:.0%}")
        if step == config.stop_at or (
            config.save_every and step % config.save_every == 0 and step < len(batches)
        ):
            save_checkpoint(out, step, model, optimizer)
        if step == config.stop_at:
            print(f"stopped after step {step}; go on with --resume")
            return

    save_model(model, out)
    tokenizer.save(out)
    minutes = (time.perf_counter() - started) / 60
    if not held_out:
        print(f"{minutes:.1f} minutes -> {out}")
        return
    after = greedy(model, tokenizer, held_out, settings)
    before = greedy(load_model(folder, dtype=torch.float32, device=device), tokenizer, held_out, settings)
    difference, low, high = paired_difference([before], [after])
    write_json(
        out / "results.json",
        {"before": before, "after": after, "difference": difference, "low": low, "high": high},
    )
    print(
        f"greedy accuracy on {len(held_out)} held-out problems: {accuracy(before)[0]:.1%} -> "
        f"{accuracy(after)[0]:.1%}, "
        f"difference {difference:+.1%} [{low:+.1%}, {high:+.1%}]; {minutes:.1f} minutes -> {out}"
    )


if __name__ == "__main__":
    run(main, AlignConfig)
