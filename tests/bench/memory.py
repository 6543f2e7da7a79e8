"""Peak memory of one training step: python -m tests.bench.memory '{"work": ..., "side": ...}' prints bytes.

On a CPU each side needs a process of its own, in which nothing larger ran before."""

import json
import subprocess
import sys

import torch

from tests.bench.sides import make_batch, make_sides, step


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


def peak_here(work, model, lengths, side, device):
    """Bytes that a step holds at its highest above what stood before it (weights, batch): activations,
    gradients and logits. A small step goes before it, so that libraries have set themselves up."""
    device = torch.device(device)
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


if __name__ == "__main__":
    print(peak_here(**json.loads(sys.argv[1])))
