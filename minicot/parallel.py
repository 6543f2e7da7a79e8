"""Many processes on one run, as torchrun starts them: data parallel, by DDP or, with --shard, by FSDP2.

    torchrun --standalone --nproc-per-node 8 train.py --init SmolLM2 --data gsm8k:PATH --dtype bfloat16

Every process (rank) makes the same plan from the same flags, does its share of each step and learns the sums
of all; rank 0 alone writes files and prints. Without torchrun there is one rank, and nothing communicates.
A step's loss is a sum over its rows divided by what the whole step holds, so its gradient is the sum over the
ranks: as DDP and FSDP2 take the mean, the loops multiply by their number before `backward`.

On CUDA a rank has the GPU of its LOCAL_RANK. Collectives of CPU tensors go over gloo, of CUDA's over NCCL.
"""

import os
import re
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from minicot.errors import InputError

TIMEOUT = timedelta(minutes=30)  # a rank that waits longer for the others ends the run
PROJECTOR = "multi_modal_projector."
EYES = PROJECTOR, "vision_tower."  # parameters that a picture alone reaches
LOST = "closed by peer|reset by peer|Broken pipe|[Tt]imed? ?out|remote process|connection closed"


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first():
    """Is this the rank that writes and prints?"""
    return rank() == 0


def said(device):
    """A device, and how many processes work on one like it, as the scripts print them."""
    return f"{device}, {size()} processes" if size() > 1 else str(device)


def to_stderr(text):
    print(text, file=sys.stderr)


def quiet():
    """tqdm's `disable`: on rank 0 None (a bar on a terminal alone), else True."""
    return None if first() else True


@contextmanager
def joined():
    """Within the block this process is one of torchrun's; yields a function that says a last word on stderr
    unless another rank has said its own: of what all ranks find wrong, or of one that is lost, a person reads
    one line."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield to_stderr
        return
    try:
        store, number, ranks = next(dist.rendezvous("env://", timeout=TIMEOUT))
    except dist.DistNetworkError as error:  # rank 0 alone listens: the others say nothing of its port
        where, reason = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ), str(error).split(". ")[0]
        to_stderr(f"error: processes cannot meet at {where} ({reason}); allowed: a free port, MASTER_PORT")
        raise SystemExit(2) from None
    dist.init_process_group(
        store=dist.PrefixStore("ranks", store), rank=number, world_size=ranks, timeout=TIMEOUT
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    spoken = sys.stdout
    if number:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")

    def say_once(text):
        try:
            if store.add("said", 1) > 1:
                return
        except RuntimeError:  # the store went with the process that held it
            pass
        to_stderr(text)

    try:
        yield say_once
        dist.barrier()  # rank 0 may still be writing: none leaves before it is done
        dist.destroy_process_group()
    except RuntimeError as error:  # of a lost process: what ended it, it has said itself
        if not re.search(LOST, str(error)):
            raise
        reason, minutes = str(error).splitlines()[0], round(TIMEOUT.total_seconds() / 60)
        say_once(
            f"error: another process ended, or did not answer for {minutes} minutes ({reason}); where it "
            "says nothing itself it was killed, often for memory; training goes on with --resume"
        )
        raise SystemExit(2) from None
    finally:
        sys.stdout = spoken


# ---- what the ranks tell each other --------------------------------------------------------------


def total(*numbers):
    """The sum of each over the ranks: a list of floats."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if size() > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def largest(number):
    """The largest of all ranks' integers."""
    if size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def means(tables):
    """{name: tensors} -> {name: the mean of their entries over all ranks, None where there are none}."""
    counted = lambda parts: (sum(p.double().sum().item() for p in parts), sum(p.numel() for p in parts))
    sums = total(*(number for parts in tables.values() for number in counted(parts)))
    return {name: s / n if n else None for name, s, n in zip(tables, sums[::2], sums[1::2])}


def from_first(work):
    """What work() returns on rank 0, on every rank."""
    if size() == 1:
        return work()
    found = [work() if first() else None]
    dist.broadcast_object_list(found)
    return found[0]


def spread(work, items, chunk):
    """Yield what work(items) yields, one result an item: the ranks work on `chunk` items each at a time, and
    every rank gets all results in the order of the items."""
    if size() == 1:
        yield from work(items)
        return
    chunk = min(chunk, -(-len(items) // size())) or 1
    for start in range(0, len(items), chunk * size()):
        mine, parts = items[start + rank() * chunk :][:chunk], [None] * size()
        dist.all_gather_object(parts, list(work(mine)) if mine else [])
        for part in parts:
            yield from part


def share(items, parts):
    """This rank's items of a step in at most `parts` micro-batches: [(items, weight), ...], as many on every
    rank. Where a rank has too few, it works on another's for the sake of the collectives, with weight 0."""
    own, n = items[rank() :: size()], min(parts, -(-len(items) // size()))
    return [(part, 1.0) if (part := own[a::n]) else (items[:1], 0.0) for a in range(n)]


# ---- models --------------------------------------------------------------------------------------


class Parallel(nn.Module):
    """A model's forward pass as one module, which is what DDP and FSDP2 wrap."""

    def __init__(self, model, forward):
        super().__init__()
        self.trained, self.read = model, forward

    def forward(self, batch):
        return self.read(self.trained, batch)


def wrap(model, forward, config):
    """forward(model, batch) as a function of the batch, whose backward leaves the mean over the ranks in the
    gradients. --shard cuts the model's parameters in place: each rank holds a part of each."""
    if size() == 1:
        if config.shard:
            raise InputError("--shard is given to one process; allowed: with torchrun, two or more")
        return lambda batch: forward(model, batch)
    module = Parallel(model, forward)
    if not config.shard:
        where = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
        return DistributedDataParallel(module, device_ids=where, find_unused_parameters=sees(model))
    looks = any(p.requires_grad and name.startswith(EYES) for name, p in model.named_parameters())
    if looks and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise InputError(f"--shard with --train all needs torch 2.13, this is {torch.__version__}")
    narrow = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = narrow if config.dtype == "bfloat16" else MixedPrecisionPolicy()
    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (size(),))
    for block in language_of(model).layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    module = fully_shard(module, mesh=mesh, mp_policy=policy)
    if looks:
        module.set_reduce_scatter_unused_params(True)
    return module


def sees(model):
    """Has it a picture encoder? A batch without pictures then leaves parameters without a gradient."""
    return hasattr(model, "vision_tower")


def drop_unused(model):
    """Let go of the gradients of a sharded model's eyes where no rank has seen a picture: FSDP2 makes zeros
    of them, which AdamW's momentum would go on with. One process has none then, and leaves these parameters
    alone."""
    if not sees(model) or not isinstance(next(model.parameters()), DTensor):
        return
    eyes, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            (eyes if name.startswith(EYES) else others).append(parameter)
    count = lambda parameters: sum(p.grad.to_local().count_nonzero() for p in parameters)
    seen, used = total(count(eyes), count(others))
    for parameter in eyes if used and not seen else ():
        parameter.grad = None


def language_of(model):
    """The ModuleDict of embed_tokens, layers and norm."""
    return getattr(model, "language_model", model).model


def whole(tensor):
    """A tensor of which every rank holds a part, put together (a collective); others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(named):
    """(name, tensor) pairs -> {name: the whole tensor, on the CPU} on rank 0, {} on the others, which take
    part: one tensor at a time is whole on a device."""
    found = ((name, whole(tensor.detach())) for name, tensor in named)
    return {name: tensor.cpu().contiguous() for name, tensor in found if first()}


def placed(tensor, like):
    """A whole tensor, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def put_together(model, load):
    """A function that gives the model as a plain one, which can generate and be saved: the model itself, or,
    where it is sharded, a copy (`load` makes one like it) with the weights of the moment."""
    if not isinstance(next(model.parameters()), DTensor):
        return lambda: model
    copy = []

    @torch.no_grad()
    def plain():
        if not copy:
            copy.append(load())
        for mine, part in zip(copy[0].parameters(), model.parameters(), strict=True):
            mine.copy_(whole(part))
        return copy[0]

    return plain
