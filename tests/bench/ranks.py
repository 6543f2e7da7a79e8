"""SFT steps in one process or, by torchrun, in several: python -m tests.bench.ranks '{"model": ...}'

Prints the seconds of each step: forward, backward, clipping, AdamW, as train.py makes it. Every process has
one thread, so that two of them against one say what a second core gives.
"""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import torch

from minicot import parallel
from minicot.losses import sft_loss
from minicot.scoring import score
from minicot.training import clip_gradients, make_optimizer
from tests.bench import sides
from tests.bench.sides import gsm8k_lengths, make_batch, our_model


def steps(model, rows, count, compile=False):
    """Seconds of each of `count` steps on `rows` rows in all, with lengths as in GSM8K."""
    sides.COMPILE = compile
    policy = our_model(model, torch.device("cpu"))
    forward = parallel.wrap(policy, score, SimpleNamespace(shard=False, dtype="float32"))
    optimizer, seconds = make_optimizer(policy, 1e-4, 0.0), []
    lengths = [[P, [R]] for P, R in gsm8k_lengths(rows)]
    n_tokens = sum(R for _, (R,) in lengths)
    [(mine, weight)] = parallel.share(lengths, 1)
    batch = make_batch(model, mine, torch.device("cpu"))
    for _ in range(count):
        parallel.total(0)  # all begin together
        start = time.perf_counter()
        loss = sft_loss(forward(batch), batch.loss_mask, n_tokens=n_tokens)
        (weight * parallel.size() * loss).backward()
        clip_gradients(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        parallel.total(0)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(processes, **job):
    """`steps` in so many new processes of one thread each."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), "-m", "tests.bench.ranks", json.dumps(job)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    with parallel.joined():
        print(json.dumps(steps(**json.loads(sys.argv[1]))), flush=True)
