"""Held-out problems before and after training: greedy accuracy, and the token loss of written solutions.

Both are kept problem by problem in the run folder's eval.json, so that the difference is a paired one and a
resumed run has its "before".
"""

import torch

from minicot.data import collate
from minicot.metrics import accuracy, paired_difference
from minicot.sampling import sample_groups
from minicot.scoring import score
from minicot.sets import default_length, style_of
from minicot.runs import write_json
from minicot.training import autocast
from minicot.weights import read_json


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
    device, reader, losses = next(model.parameters()).device, asking["reader"], []
    with autocast(config, device):
        answered = sample_groups(model, tokenizer, problems, n=1, temperature=0.0, **asking)
        right = [int(bool(samples.first.correct)) for samples in answered]
        for start in range(0, len(rows), 8):
            batch = collate([[row] for row in rows[start : start + 8]], tokenizer.pad_id, reader).to(device)
            scored = zip(score(model, batch), batch.loss_mask)
            losses += [-logps[mask].mean().item() for logps, mask in scored]
    return {"accuracy": right, "nll": losses}


def keep_before(out, before):
    write_json(out / "eval.json", {"before": before})


def compare(out, after):
    """What `measure` found before (in eval.json) and after training, paired -> eval.json and a line each."""
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
            print(
                f"NLL of {n} held-out solutions: {means[0]:.4f} -> {means[1]:.4f} nats a token, "
                f"difference {difference:+.4f} [{low:+.4f}, {high:+.4f}]"
            )
    write_json(out / "eval.json", {"before": before, "after": after, "difference": differences})
