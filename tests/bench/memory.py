"""Peak memory of one training step: python -m tests.bench.memory '{"work": ..., "side": ...}' prints bytes.

On a CPU each side needs a process of its own, in which nothing larger ran before.

    python -m tests.bench.memory --train '{"model": "Llama 1.1B", "tokens": 2048, "steps": 2}'

trains with --checkpoint-activations, AdamW included, and says what the whole process held at its highest."""

import json
import subprocess
import sys
import time

import torch

from minicot.losses import sft_loss
from minicot.scoring import score
from minicot.training import clip_gradients, make_optimizer, set_layers
from tests.bench import sides
from tests.bench.sides import make_batch, make_sides, our_model, step


def resident(field):
    """VmRSS (now) or VmHWM (the highest since it was last reset) of this process, in bytes (Linux). Not
    ru_maxrss: Linux hands a parent's down to its child."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_of(work):
    """(what work() returns, the most bytes that this process held meanwhile above those it held before)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets VmHWM to VmRSS
    before = resident("VmRSS")
    result = work()
    return result, resident("VmHWM") - before


def peak_here(work, model, lengths, side, device, compile=False):
    """Bytes that a step holds at its highest above what stood before it (weights, batch): activations,
    gradients and logits. A small step goes before it, so that libraries have set themselves up."""
    device, sides.COMPILE = torch.device(device), compile
    small = [[4, [8] * len(responses)] for _, responses in lengths[:1]]
    step(*make_sides(work, model, make_batch(model, small, device), [side])[side])
    policy, loss = make_sides(work, model, make_batch(model, lengths, device), [side])[side]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(policy, loss)
        return torch.cuda.max_memory_allocated() - before
    return peak_of(lambda: step(policy, loss))[1]


def peak(**job):
    """peak_here in a child process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.memory", json.dumps(job)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return int(done.stdout.split()[-1])


def train(model, tokens, steps):
    """SFT steps in float32 on one row of so many tokens, half of them scored, activations checkpointed ->
    what is said: the process's peak, and what weights, gradients and AdamW's two moments take of it."""
    policy = our_model(model, torch.device("cpu"))
    set_layers(policy, compile=False, checkpoint_activations=True)
    optimizer, seconds = make_optimizer(policy, 1e-5, 0.0), []
    batch = make_batch(model, [[tokens // 2, [tokens - tokens // 2]]], torch.device("cpu"))
    for _ in range(steps):
        start = time.perf_counter()
        loss = sft_loss(score(policy, batch), batch.loss_mask)
        loss.backward()
        clip_gradients(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    numbers = sum(p.numel() for p in policy.parameters())
    return (
        f"{model}, {numbers / 1e6:,.0f}M parameters, T {tokens}, {steps} steps: loss {loss.item():.3f}, "
        f"{min(seconds):.3g} s a step, peak {resident('VmHWM') / 2**30:.2f} GiB, of which weights, gradients "
        f"and moments {16 * numbers / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    if sys.argv[1] == "--train":
        print(train(**json.loads(sys.argv[2])))
    else:
        print(peak_here(**json.loads(sys.argv[1])))
