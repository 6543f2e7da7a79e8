"""Learn from groups of responses: RFT, DPO, IPO, RRHF, PRO and AFT, each with or without a constraint.

    python align.py                                             # AFT on what train.py left; before and after
    python align.py --method dpo --beta 0.1 --init runs/sft --samples runs/samples.jsonl --out runs/dpo
    python align.py --method rrhf --constraint boundary --margin 0.1 --out runs/rrhf

A new loss is one pure function in minicot/losses.py and one row in METHODS below; the loop does not change.
B groups (problems), K responses of the largest, N rows (all responses), T tokens.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: waiting threads sleep, not spin

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from minicot.config import AlignConfig, check, run
from minicot.data import check_pictures, collate, encode_row, image_reader, make_groups, pairs
from minicot.errors import InputError
from minicot.sets import default_length
from minicot.data import peek, schedule, seed_of
from minicot.records import read_samples, samples_to_row
from minicot.sets import read_problems, refuse_shared
from minicot.data import longest_row, target, to_groups, truncate_words
from minicot.sets import style_of
from minicot.losses import aft_loss, better_than, dpo_loss, ipo_loss, pro_loss, rrhf_loss, sequence_logps
from minicot.losses import sft_loss
from minicot.metrics import accuracy, paired_difference, repeated_4grams
from minicot.sampling import sample_groups
from minicot.scoring import score
from minicot.tokenizer import Tokenizer
from minicot.training import Log, check_out, clip_gradients, close_run, digest_of, load_checkpoint
from minicot.training import make_optimizer, open_run, pick_device, refuse_non_finite, resolve
from minicot.training import save_checkpoint, set_lr, train_first, train_only, weights_digest, write_json
from minicot.training import write_jsonl
from minicot.weights import load_model, save_model


# ---- the methods ---------------------------------------------------------------------------------


class Groups(NamedTuple):
    """What a loss may look at: tables over B questions and up to K responses each."""

    scores: torch.Tensor  # (B,K) mean log-probability a token: s_i of RRHF, PRO and AFT
    logps: torch.Tensor  # (B,K) summed log-probability: log pi(y|x) of DPO
    ref_logps: torch.Tensor  # (B,K) the same under the reference model (0 where the method needs none)
    rewards: torch.Tensor  # (B,K)
    present: torch.Tensor  # (B,K) bool: takes part in the ranking
    better: torch.Tensor  # (B,K,K) bool: response i is strictly better than response j


@dataclass(frozen=True)
class Method:
    """A loss and the SFT term that its paper adds to it."""

    loss: Callable | None  # (Groups, AlignConfig) -> (B,); None: the SFT term alone
    sft_on: str | None  # rows of the SFT term: "reference", "best", "right" or None
    sft_mean: str = "tokens"  # mean over the step's trained tokens, or over its "groups"
    sft_weight: Callable = lambda l: 1.0  # the paper's weight, given a group's number of responses l
    on_pairs: bool = False  # groups are right x wrong pairs, the chosen one first
    needs_ref: bool = False


def held(c):
    return {"constraint": c.constraint, "margin": c.margin}


METHODS = {
    "rft": Method(None, "right"),
    "dpo": Method(
        lambda g, c: dpo_loss(
            g.logps, g.ref_logps, beta=c.beta, label_smoothing=c.label_smoothing, **held(c)
        ),
        None,
        on_pairs=True,
        needs_ref=True,
    ),
    "ipo": Method(
        lambda g, c: ipo_loss(g.logps, g.ref_logps, beta=c.beta), None, on_pairs=True, needs_ref=True
    ),
    "rrhf": Method(lambda g, c: rrhf_loss(g.scores, g.better, **held(c)), "best"),
    "pro": Method(
        lambda g, c: pro_loss(g.scores, g.rewards, g.present, **held(c)),
        "best",
        sft_mean="groups",
        sft_weight=lambda l: 0.05 * (l - 1) ** 2,
    ),
    "aft": Method(lambda g, c: aft_loss(g.scores, g.better, **held(c)), "reference"),
}
UNCONSTRAINED = ("rft", "ipo")


def tabulate(logps, batch, ref_logps, reference_in_positives):
    """Token log-probabilities (N,T) of a batch -> Groups. ref_logps: (N,) sums, or None."""
    present = batch.present
    if not reference_in_positives:
        present = present & ~to_groups(batch.is_reference.long(), batch).bool()
    sums = to_groups(sequence_logps(logps, batch.loss_mask, reduce="sum"), batch)
    return Groups(
        scores=to_groups(sequence_logps(logps, batch.loss_mask, reduce="mean"), batch),
        logps=sums,
        ref_logps=torch.zeros_like(sums) if ref_logps is None else to_groups(ref_logps, batch),
        rewards=batch.rewards,
        present=present,
        better=better_than(batch.rewards, present),
    )


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


def sft_term(logps, batch, method, weight, n_tokens, n_groups):
    """The SFT term of a micro-batch; n_tokens, n_groups count the whole step's. weight None: the paper's."""
    rows = sft_rows(batch, method.sft_on)
    if not rows.any():
        return logps.new_zeros(())
    sizes = batch.present.sum(1).tolist()
    weights = logps.new_tensor([method.sft_weight(l) if weight is None else weight for l in sizes])
    return sft_loss(
        logps * weights[batch.group][:, None],
        batch.loss_mask & rows[:, None],
        n_tokens=n_tokens if method.sft_mean == "tokens" else n_groups,
    )


# ---- reference log-probabilities: computed once, kept --------------------------------------------


@torch.no_grad()
def reference_logps(path, folder, tokenizer, groups, config, reader, device):
    """Summed log-probabilities under the reference model, a tensor (responses,) a group. Read from `path`
    where it holds those of the same weights, tokenizer and rows; refused where of others; else computed."""
    key = weights_digest(folder) + digest_of(tokenizer, groups)
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                kept, flat = (file.metadata() or {}).get("key"), file.get_tensor("logps")
        except SafetensorError as error:
            raise InputError(f"{path}: not a file of reference log-probabilities ({error})") from None
        if kept != key:
            raise InputError(
                f"{path} holds reference log-probabilities of other weights, data or tokenizer; "
                "allowed: another --ref-logps file, or delete it"
            )
    else:
        model, sums = load_model(folder, dtype=torch.float32, device=device), []
        for start in tqdm(range(0, len(groups), config.batch_size), desc="reference", disable=None):
            batch = collate(groups[start : start + config.batch_size], tokenizer.pad_id, reader).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                logps = score(model, batch)
            sums.append(sequence_logps(logps, batch.loss_mask, reduce="sum").cpu())
        flat = torch.cat(sums)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": flat}, f"{path}.part", metadata={"key": key})
        os.replace(f"{path}.part", path)
    return flat.split([len(group) for group in groups])


# ---- watching: what a collapse would show in -----------------------------------------------------


def watch(tables, correct):
    """Mean score of right and of wrong responses, the gap of the pairs, the share of pairs in right order;
    each over all of a step's tables, None where there are none."""

    def mean(values):
        values = torch.cat(values)
        return values.mean().item() if len(values) else None

    scores = [table.scores.detach() for table in tables]
    gaps = [(s[:, :, None] - s[:, None, :])[table.better] for s, table in zip(scores, tables)]
    return {
        "score_right": mean([s[c == 1] for s, c in zip(scores, correct)]),
        "score_wrong": mean([s[c == 0] for s, c in zip(scores, correct)]),
        "margin": mean(gaps),
        "ranking_accuracy": mean([(gap > 0).float() for gap in gaps]),
    }


@torch.no_grad()
def probe(model, tokenizer, problems, settings, device):
    """On held-out problems: accuracy, missing answers, repeated 4-grams, NLL of reference solutions."""
    groups = sample_groups(model, tokenizer, problems, n=1, temperature=0.0, **settings)
    responses = [group.first for group in groups]
    found = {
        "held_out_accuracy": sum(bool(r.correct) for r in responses) / len(responses),
        "held_out_missing_answers": sum(r.answer is None for r in responses) / len(responses),
        "held_out_repeated_4grams": sum(repeated_4grams(r.ids) for r in responses) / len(responses),
    }
    mode = settings["mode"]
    rows = [encode_row(tokenizer, p, target(p, mode), mode=mode) for p in problems if p.solution]
    if rows:
        batch = collate([[row] for row in rows], tokenizer.pad_id, settings["reader"]).to(device)
        found["held_out_reference_nll"] = sft_loss(score(model, batch), batch.loss_mask).item()
    return found


# ---- the script ----------------------------------------------------------------------------------


def check_flags(c, method):
    """What one flag's range cannot say."""
    if c.method in UNCONSTRAINED:
        check(c.constraint == "none", "--constraint", c.constraint, f"none, for {c.method}")
    boundary = c.constraint == "boundary"
    check(
        boundary == (c.margin is not None),
        "--margin",
        c.margin,
        "a number with --constraint boundary, and nothing without",
    )
    smoothed = c.label_smoothing and c.constraint != "none"
    check(not smoothed, "--label-smoothing", c.label_smoothing, "0 with a --constraint")
    if method.sft_on == "reference":
        check(c.reference, "--reference", c.reference, f"true: {c.method} trains its SFT term on it")


def read_groups(config, method, samples, tokenizer, context):
    """Samples -> groups of Rows: pairs for DPO and IPO, right responses for RFT, else all distinct ones."""
    if method.on_pairs:
        window = (config.pair_low, config.pair_high)
        samples = pairs(samples, max_pairs=config.max_pairs, window=window, seed=config.seed)
    if config.truncate_words:
        samples = truncate_words(samples, config.truncate_words)
    groups, counts = make_groups(
        tokenizer,
        samples,
        mode=config.mode,
        max_length=context,
        reference=config.reference and not method.on_pairs,
    )
    if method.on_pairs:  # a pair that lost a member is none
        whole = [group for group in groups if len(group) == 2]
        counts["broken pairs"], groups = len(groups) - len(whole), whole
    if method.loss is None:
        groups = [right for group in groups if (right := [row for row in group if row.correct])]
    check(groups, "--samples", config.samples, f"samples that {config.method} can use; left out: {counts}")
    return groups, counts


def main(config):
    method, started = METHODS[config.method], time.perf_counter()
    if config.constraint == "default":
        config = replace(config, constraint="detached" if config.method == "aft" else "none")
    check_flags(config, method)
    device = pick_device(config.device)
    data = config.data or ("" if config.samples else "toy")
    inputs = [path for path in (config.init, config.ref, config.samples, config.ref_logps) if path]
    check_out(config, inputs)
    evaluated = data and config.eval_split
    held_out = read_problems(data, config.eval_split, limit=config.eval_limit) if evaluated else []
    without = [problem.id for problem in held_out if problem.answer is None]
    check(
        not without, "--eval-split", config.eval_split, f"problems with an answer, {len(without)} have none"
    )
    kept = config.samples or (Path(config.out) / "samples.jsonl" if config.resume else "")
    samples = read_samples(kept) if kept else []
    problems = [group.problem for group in samples] or read_problems(data, config.split, limit=config.limit)
    refuse_shared(problems, held_out, "--eval-split")

    folder = resolve(config.init or train_first())
    tokenizer, model = Tokenizer(folder), load_model(folder, dtype=torch.float32, device=device)
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    check(
        tokenizer.vocab_size <= vocabulary, "--init", str(folder), f"a tokenizer of at most {vocabulary} ids"
    )
    reader = image_reader(model, tokenizer, folder)
    train_only(model, config.train)
    settings = dict(
        mode=config.mode,
        reader=reader,
        style=config.style or style_of(data),
        batch_size=config.eval_batch_size,
        max_new_tokens=config.max_new_tokens or default_length(data),
    )
    if not samples:
        drawn = sample_groups(model, tokenizer, problems, n=config.k, seed=config.seed, **settings)
        samples = list(tqdm(drawn, total=len(problems), desc="sampling", unit="problem", disable=None))
    room = longest_row(context, problems, reader)
    groups, counts = read_groups(config, method, samples, tokenizer, room)
    check_pictures(groups, reader, config.samples or data)
    check(
        max(max(row.ids) for group in groups for row in group) < vocabulary,
        "--samples",
        config.samples,
        f"samples of this tokenizer, with ids below {vocabulary}",
    )
    if config.peek:
        peek(tokenizer, groups[: config.peek])
    n_groups = config.steps * config.batch_size or int(config.epochs * len(groups))
    check(n_groups > 0, "--epochs", config.epochs, f"enough for one of the {len(groups)} groups")
    batches = schedule(
        [max(len(row.ids) for row in group) for group in groups],
        config.batch_size,
        n_groups,
        seed_of(config.seed, "order"),
    )

    out = open_run(config, digest_of(tokenizer, groups), inputs)
    if not config.samples:
        write_jsonl(out / "samples.jsonl", map(samples_to_row, samples))
    ref = None
    if method.needs_ref:
        path = Path(config.ref_logps or out / "ref_logps.safetensors")
        ref = reference_logps(path, resolve(config.ref or folder), tokenizer, groups, config, reader, device)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    first = load_checkpoint(out, model, optimizer) if config.resume else 0
    log = Log(out / "metrics.jsonl", first)
    print(
        f"{config.method}, constraint {config.constraint}: {len(groups)} groups, "
        f"{sum(map(len, groups))} responses; left out: {counts}; "
        f"steps {first + 1} to {len(batches)} on {device}"
    )

    progress = tqdm(range(first + 1, len(batches) + 1), unit="step", disable=None)
    for step in progress:
        lr = set_lr(optimizer, step, len(batches), config.warmup)
        chosen = batches[step - 1]
        micros = [part for a in range(config.accumulate) if (part := chosen[a :: config.accumulate])]
        parts = [collate([groups[i] for i in micro], tokenizer.pad_id, reader).to(device) for micro in micros]
        n_sft = sum(int((b.loss_mask & sft_rows(b, method.sft_on)[:, None]).sum()) for b in parts)
        loss, tables = 0.0, []
        for micro, batch in zip(micros, parts):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                logps = score(model, batch)
            ref_logps = torch.cat([ref[i] for i in micro]).to(device) if ref else None
            table = tabulate(logps, batch, ref_logps, config.reference_in_positives)
            part = sft_term(logps, batch, method, config.sft_weight, n_sft, len(chosen))
            if method.loss:
                part = part + method.loss(table, config).sum() / len(chosen)
            part.backward()
            loss += part.item()
            tables.append(table)
        ids = [problem_id for batch in parts for problem_id in batch.problem_ids]
        refuse_non_finite(loss, "the loss", step, ids)
        grad_norm = clip_gradients(model, config.clip)
        refuse_non_finite(grad_norm, "the gradient norm", step, ids)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seen = watch(tables, [batch.correct for batch in parts])
        if held_out and config.probe_every and (step % config.probe_every == 0 or step in (1, len(batches))):
            seen |= probe(model, tokenizer, held_out[: config.probe_limit], settings, device)
        n_tokens = sum(int(batch.pad_mask.sum()) for batch in parts)
        log.write(step, n_tokens, loss=loss, lr=lr, grad_norm=grad_norm, **seen)
        progress.set_postfix_str(f"loss {loss:.3f}, pairs in order {seen['ranking_accuracy'] or 0:.0%}")
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
    close_run(out)
    if held_out:
        compare(folder, model, tokenizer, held_out, settings, out, device)
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes -> {out}")


def compare(folder, model, tokenizer, problems, settings, out, device):
    """Greedy accuracy of the model before and after, on the same problems -> comparison.json and a line."""
    before, after = (
        [
            int(bool(group.first.correct))
            for group in sample_groups(one, tokenizer, problems, n=1, temperature=0.0, **settings)
        ]
        for one in (load_model(folder, dtype=torch.float32, device=device), model)
    )
    difference, low, high = paired_difference([before], [after])
    write_json(
        out / "comparison.json",
        {"before": before, "after": after, "difference": difference, "low": low, "high": high},
    )
    print(
        f"greedy accuracy on {len(problems)} held-out problems: {accuracy(before)[0]:.1%} -> "
        f"{accuracy(after)[0]:.1%}, difference {difference:+.1%} [{low:+.1%}, {high:+.1%}]"
    )


if __name__ == "__main__":
    run(main, AlignConfig)
