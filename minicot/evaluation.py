"""Held-out problems before and after training: greedy accuracy, and the token loss of written solutions; of a
reward model, how well it tells the labels of held-out responses.

Both are kept problem by problem in the run folder's eval.json, so that the difference is a paired one and a
resumed run has its "before".
"""

import torch

from minicot.data import collate
from minicot.losses import prm_loss
from minicot.metrics import accuracy, paired_difference
from minicot.parallel import first, spread
from minicot.sampling import sample_groups
from minicot.scoring import score, step_logits
from minicot.sets import default_length, style_of
from minicot.runs import write_json
from minicot.training import autocast
from minicot.weights import read_json


SAID = {  # how `compare` says a mean: of what, its format, its unit
    "nll": ("NLL of {} held-out solutions", ".4f", " nats a token"),
    "labels": ("labels of {} held-out responses told right", ".1%", ""),
    "bce": ("loss of {} held-out responses", ".4f", " nats a step"),
}


def how_to_ask(config, mode, reader):
    """What sample_groups is told of a run's problems."""
    return dict(
        mode=mode,
        reader=reader,
        style=config.style or style_of(config.data),
        batch_size=config.eval_batch_size,
        max_new_tokens=config.max_new_tokens or default_length(config.data),
    )


@torch.no_grad()
def measure(model, tokenizer, problems, rows, asking, config):
    """{"accuracy": 1 or 0 for each of the problems (they have gold answers), answered greedily, "nll": the
    mean token loss of each of the rows}."""
    device, reader = next(model.parameters()).device, asking["reader"]

    def nll(part):
        for batch in by_eight(part, tokenizer, reader, device):
            scored = zip(score(model, batch), batch.loss_mask)
            yield from [-logps[mask].mean().item() for logps, mask in scored]

    with autocast(config, device):
        answered = sample_groups(model, tokenizer, problems, n=1, temperature=0.0, **asking)
        right = [int(bool(samples.first.correct)) for samples in answered]
        return {"accuracy": right, "nll": list(spread(nll, rows, 8))}


@torch.no_grad()
def measure_steps(model, tokenizer, problems, rows, asking, config):
    """Of a reward model, for each of the rows: {"labels": the share of its steps whose label lies on the
    model's side of 1/2, "bce": the mean loss of its steps}. No problem is answered."""
    device = next(model.parameters()).device

    def told(part):
        for batch in by_eight(part, tokenizer, asking["reader"], device):
            logits, there = step_logits(model, batch), batch.step_ends >= 0
            right = (logits > 0) == batch.step_labels
            shares = [row[mask].double().mean().item() for row, mask in zip(right, there)]
            yield from zip(shares, prm_loss(logits, batch.step_labels, there, reduce="mean").tolist())

    with autocast(config, device):
        shares, losses = zip(*spread(told, rows, 8)) if rows else ([], [])
    return {"labels": list(shares), "bce": list(losses)}


def by_eight(rows, tokenizer, reader, device):
    """Rows -> Batches of eight."""
    for start in range(0, len(rows), 8):
        yield collate([[row] for row in rows[start : start + 8]], tokenizer.pad_id, reader).to(device)


def keep_before(out, before):
    write_json(out / "eval.json", {"before": before})


def compare(out, after):
    """What `measure` found before (in eval.json) and after training, paired -> eval.json and a line each."""
    if not first():
        return
    before, differences = read_json(out / "eval.json")["before"], {}
    for name in (name for name in after if after[name]):
        difference, low, high = paired_difference([before[name]], [after[name]])
        differences[name] = {"difference": difference, "low": low, "high": high}
        n, means = len(after[name]), [sum(values[name]) / len(values[name]) for values in (before, after)]
        if name == "accuracy":
            _, lowest, highest = accuracy(after[name])
            print(
                f"greedy accuracy on {n} held-out problems: {means[0]:.1%} -> {means[1]:.1%} "
                f"[{lowest:.1%}, {highest:.1%}], difference {difference:+.1%} [{low:+.1%}, {high:+.1%}]"
            )
        else:
            what, form, unit = SAID[name]
            print(
                f"{what.format(n)}: {means[0]:{form}} -> {means[1]:{form}}{unit}, "
                f"difference {difference:+{form}} [{low:+{form}}, {high:+{form}}]"
            )
    write_json(out / "eval.json", {"before": before, "after": after, "difference": differences})
