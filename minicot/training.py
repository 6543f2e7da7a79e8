"""What the training loops share: device, learning rate, optimizer, refusals. No loop lives here; the run
folder is in runs.py.
"""

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import torch

from minicot.errors import InputError
from minicot.parallel import EYES, PROJECTOR, drop_unused, size, whole

ROOT = Path(__file__).parent.parent
PEAK_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense, from the vendor's data sheets


def pick_device(name):
    """auto, cpu or cuda -> torch.device, with torchrun this rank's; CUDA asked for and absent is an error."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but this machine has no CUDA device; allowed here: auto, cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if size() > 1 else torch.device("cuda")


def autocast(config, device):
    """--dtype bfloat16: matrix products in bfloat16, whatever the weights are stored in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def train_first(out="runs/sft"):
    """The folder that train.py leaves; where there is none, run train.py first and say so."""
    if size() > 1 and not (Path(out) / "model.safetensors").is_file():
        raise InputError(f"--init is not given and {out} is not there; with torchrun, run train.py before")
    if Path(out).exists() and not (Path(out) / "model.safetensors").is_file():
        raise InputError(f"{out} holds an unfinished run; allowed: python train.py --resume (or --overwrite)")
    if not Path(out).exists():
        print(f"{out} is not there yet: running `python train.py` first", flush=True)
        with subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--out", out]) as child:
            try:
                code = child.wait()
            except KeyboardInterrupt:  # it saves a checkpoint and ends, see Run.end_step
                child.terminate()
                child.wait()
                raise
        if code:
            raise InputError(f"python train.py ended with exit code {code}")
    return out


def resolve(init):
    """--init: "toy", "toy-vision" and "toy-judge" are the shipped base models; anything else is a path."""
    shipped = {"toy": "base", "toy-vision": "vision_base", "toy-judge": "judge_base"}
    return ROOT / "minicot" / "toy" / shipped[init] if init in shipped else Path(init)


def report_unreadable(reasons, problems):
    """Say how many problems are left out, as their picture can't be read; refuse to go on with none."""
    if reasons:
        print(f"{len(reasons)} problems left out, as their picture can't be read; the first is {reasons[0]}")
    if not problems:
        raise InputError(f"no problem has a picture that can be read; the first is {reasons[0]}")


def lr_at(step, total, peak, warmup):
    """Learning rate of step 1..total: linear warm-up over warmup * total steps, then a cosine to a tenth
    of the peak."""
    n_warm = max(1, math.ceil(warmup * total))
    if step <= n_warm:
        return peak * step / n_warm
    progress = (step - n_warm) / max(1, total - n_warm)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train_only(model, part):
    """Freeze what is not trained: "projector", "language" (the language model) or "all"."""
    for name, parameter in model.named_parameters():
        inside = {
            "projector": name.startswith(PROJECTOR),
            "all": True,
            "language": not name.startswith(EYES),
        }[part]
        parameter.requires_grad_(parameter.requires_grad and inside)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"--train is {part!r}, which this model does not have; allowed: language, all")


def set_layers(model, *, compile, checkpoint_activations=False):
    """--compile and --checkpoint-activations, of the language model's layers. Compiled, each half of a layer,
    before attention and behind it, is a few fused kernels; all layers and lengths share them."""
    text = getattr(model, "language_model", model)
    text.checkpoint_activations = checkpoint_activations
    for block in text.model.layers:
        block.compiled = compile


def make_optimizer(model, lr, weight_decay, vision_lr=None):
    """AdamW, betas (0.9, 0.95); matrices decay, norms and biases (parameters of one dimension) do not. A
    group's "peak" is its learning rate at the top of the schedule: lr, or vision_lr in the vision tower. On
    CUDA one kernel does a step (fused)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for tower, peak in ((False, lr), (True, lr if vision_lr is None else vision_lr)):
        part = [p for name, p in named if name.startswith("vision_tower.") == tower]
        for matrices, decay in ((True, weight_decay), (False, 0.0)):
            chosen = [p for p in part if (p.ndim >= 2) == matrices]
            groups += [{"params": chosen, "weight_decay": decay, "peak": peak}] if chosen else []
    fused = all(p.is_cuda for _, p in named)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


def set_lr(optimizer, step, total, warmup):
    """Give every group its learning rate of this step; returns the first's."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, total, group["peak"], warmup)
    return optimizer.param_groups[0]["lr"]


def clip_gradients(model, largest):
    """Scale the gradients down to a total norm of `largest` (0 = never), without those that no row has
    reached (parallel.drop_unused); returns the norm before."""
    drop_unused(model)
    return whole(torch.nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf)).item()


def refuse_non_finite(value, what, step, problem_ids):
    """Stop the run on a NaN or an infinity; the last checkpoint stays."""
    if not math.isfinite(value):
        raise InputError(
            f"step {step}: {what} is {value}; problems {', '.join(problem_ids[:8])}; "
            "the last checkpoint is kept; a lower --lr is the usual remedy"
        )


def digest_of(tokenizer, groups):
    """Hex hash of what a run trains on: the tokenizer, every row's ids, its pictures' names, its labels."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for row in (row for group in groups for row in group):
        digest.update(f"{row.problem_id}:{row.n_prompt}:{row.reward}:{row.ids}{row.images or ''};".encode())
        digest.update(f"{row.step_ends}{row.step_labels}".encode() if row.step_ends else b"")
    return digest.hexdigest()


def weights_digest(folder):
    """Hex hash of a model folder: its config.json and its safetensors files."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for file in sorted(Path(folder).glob("*.safetensors")):
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def mfu(model, tokens_per_s, device):
    """Model FLOPs utilisation: 6 * parameters * tokens/s over the GPU's dense bf16 peak (attention not
    counted; Chowdhery et al. 2022, appendix B); None on a device whose peak is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for gpu, flops in PEAK_BF16_FLOPS.items() if gpu in name), None)
    return peak and 6 * sum(p.numel() for p in model.parameters()) * tokens_per_s / peak
