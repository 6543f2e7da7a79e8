"""What the training loops share: learning rate, optimizer, checkpoints, the run folder. No loop lives here.

A run folder holds settings.json (the flags), metrics.jsonl (one line a step), checkpoint-<step>/ (weights,
optimizer state, both safetensors, and state.json) and, at the end, a Hugging Face model folder's files.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minicot.errors import InputError
from minicot.weights import read_json

ROOT = Path(__file__).parent.parent
PEAK_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense, from the vendor's data sheets


def pick_device(name):
    """auto, cpu or cuda -> torch.device; CUDA asked for and absent is an error."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but this machine has no CUDA device; allowed here: auto, cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def train_first(out="runs/sft"):
    """The folder that train.py leaves; where there is none, run train.py first and say so."""
    if Path(out).exists() and not (Path(out) / "model.safetensors").is_file():
        raise InputError(f"{out} holds an unfinished run; allowed: python train.py --resume (or --overwrite)")
    if not Path(out).exists():
        print(f"{out} is not there yet: running `python train.py` first", flush=True)
        code = subprocess.run([sys.executable, str(ROOT / "train.py"), "--out", out], check=False).returncode
        if code:
            raise InputError(f"python train.py ended with exit code {code}")
    return out


def resolve(init):
    """--init: "toy" and "toy-vision" are the shipped base models; anything else is a path."""
    shipped = {"toy": "base", "toy-vision": "vision_base"}
    return ROOT / "minicot" / "toy" / shipped[init] if init in shipped else Path(init)


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
            "projector": name.startswith("multi_modal_projector."),
            "all": True,
            "language": not name.startswith(("multi_modal_projector.", "vision_tower.")),
        }[part]
        parameter.requires_grad_(parameter.requires_grad and inside)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"--train is {part!r}, which this model does not have; allowed: language, all")


def make_optimizer(model, lr, weight_decay, vision_lr=None):
    """AdamW, betas (0.9, 0.95); matrices decay, norms and biases (parameters of one dimension) do not. A
    group's "peak" is its learning rate at the top of the schedule: lr, or vision_lr in the vision tower."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for tower, peak in ((False, lr), (True, lr if vision_lr is None else vision_lr)):
        part = [p for name, p in named if name.startswith("vision_tower.") == tower]
        for matrices, decay in ((True, weight_decay), (False, 0.0)):
            chosen = [p for p in part if (p.ndim >= 2) == matrices]
            groups += [{"params": chosen, "weight_decay": decay, "peak": peak}] if chosen else []
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def set_lr(optimizer, step, total, warmup):
    """Give every group its learning rate of this step; returns the first's."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, total, group["peak"], warmup)
    return optimizer.param_groups[0]["lr"]


def clip_gradients(model, largest):
    """Scale the gradients down to a total norm of `largest` (0 = never); returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf).item()


def refuse_non_finite(value, what, step, problem_ids):
    """Stop the run on a NaN or an infinity; the last checkpoint stays."""
    if not math.isfinite(value):
        raise InputError(
            f"step {step}: {what} is {value}; problems {', '.join(problem_ids[:8])}; "
            "the last checkpoint is kept; a lower --lr is the usual remedy"
        )


# ---- run folder and checkpoints --------------------------------------------------------------------

PER_CALL = ("resume", "overwrite", "stop_at", "save_every", "peek")  # may differ when a run is resumed


def digest_of(tokenizer, groups):
    """Hex hash of what a run trains on: the tokenizer, every row's ids, its pictures' names."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for row in (row for group in groups for row in group):
        digest.update(f"{row.problem_id}:{row.n_prompt}:{row.reward}:{row.ids}{row.images or ''};".encode())
    return digest.hexdigest()


def weights_digest(folder):
    """Hex hash of a model folder: its config.json and its safetensors files."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for file in sorted(Path(folder).glob("*.safetensors")):
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def check_out(config, inputs=()):
    """Refuse an --out that may not be written, before any work: an existing run needs --resume or
    --overwrite, and what --overwrite replaces must not hold one of `inputs`."""
    out = Path(config.out)
    if config.resume and config.overwrite:
        raise InputError("--resume and --overwrite are both given; allowed: one of them")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, expected a folder")
    if config.resume:
        read_json(out / "settings.json")
        if not checkpoints(out):
            raise InputError(f"--resume: {out} holds no checkpoint")
    elif out.is_dir() and any(out.iterdir()):
        if not (out / "settings.json").is_file():
            raise InputError(f"--out {out} holds files that are no run of ours")
        if not config.overwrite:
            raise InputError(f"--out {out} already holds a run; allowed: --overwrite, --resume")
        for path in inputs:
            if out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
                raise InputError(f"--overwrite would replace {out}, which holds {path}, an input of this run")


def open_run(config, data_digest, inputs=()):
    """Make --out ready (see check_out) and write settings.json; --resume needs the same settings and data.
    What --overwrite replaces stands in <out>.old until close_run."""
    check_out(config, inputs)
    out, settings = Path(config.out), {"data_digest": data_digest}
    settings |= {name: value for name, value in dataclasses.asdict(config).items() if name not in PER_CALL}
    if config.resume:
        before = read_json(out / "settings.json")
        changed = sorted(name for name in settings if settings[name] != before.get(name))
        if changed:
            raise InputError(
                f"--resume: {changed[0]} is {settings[changed[0]]!r}, the run in {out} has "
                f"{before.get(changed[0])!r}; allowed: the same settings and data"
            )
        return out
    if out.is_dir() and any(out.iterdir()):
        old = Path(f"{out}.old")  # of a run that failed, keep what stood there before it
        shutil.rmtree(out) if old.exists() else os.replace(out, old)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", settings)
    return out


def close_run(out):
    """The run is whole: what it replaced goes."""
    shutil.rmtree(f"{out}.old", ignore_errors=True)


def write_json(path, value, indent=1):
    """Atomic: the file is whole or as it was before. indent None: no blanks either."""
    part = Path(f"{path}.part")
    separators = (",", ":") if indent is None else None
    part.write_text(json.dumps(value, indent=indent, separators=separators) + "\n", encoding="utf-8")
    os.replace(part, path)


def write_jsonl(path, rows):
    """Atomic, as write_json."""
    part = Path(f"{path}.part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, path)


def checkpoints(out):
    """{step: folder} of a run's whole checkpoints."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(out).glob("checkpoint-*")}
    return {int(match[1]): path for path, match in found.items() if match}


def save_checkpoint(out, step, model, optimizer):
    """out/checkpoint-<step>/, written beside and renamed when whole; then older checkpoints go."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {
        f"{names[parameter]}.{key}": value if value.ndim else value.reshape(1)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    part, final = out / f"checkpoint-{step}.part", out / f"checkpoint-{step}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: p.detach().contiguous() for p, name in names.items()}, part / "weights.safetensors")
    save_file({name: value.contiguous() for name, value in state.items()}, part / "optimizer.safetensors")
    write_json(part / "state.json", {"step": step})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for other in out.glob("checkpoint-*"):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def load_checkpoint(out, model, optimizer):
    """Put the newest checkpoint of a run folder into model and optimizer, strictly; returns its step."""
    folder = checkpoints(out)[max(checkpoints(out))]
    step, shapes = read_json(folder / "state.json").get("step"), {"weights": {}, "optimizer": {}}
    if folder.name != f"checkpoint-{step}":
        raise InputError(f"{folder / 'state.json'}: step is {step!r}, the folder is {folder.name}")
    for name, parameter in model.named_parameters():
        shapes["weights"][name] = parameter.shape
        if parameter.requires_grad:
            keys = {"step": (1,), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            shapes["optimizer"] |= {f"{name}.{key}": shape for key, shape in keys.items()}
    weights, state = (read_exactly(folder / f"{kind}.safetensors", shapes[kind]) for kind in shapes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
            if parameter.requires_grad:
                keys = {key: state[f"{name}.{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": state[f"{name}.step"].reshape(()), **keys}
    return step


def read_exactly(path, shapes):
    """The tensors of a safetensors file, which must have exactly these names and shapes and finite values."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete the checkpoint") from None
    if tensors.keys() != shapes.keys():
        other = sorted(tensors.keys() ^ shapes.keys())
        raise InputError(f"{path}: holds other tensors than the model, e.g. {other[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != torch.Size(shapes[name]) or not tensor.isfinite().all():
            raise InputError(
                f"{path}: tensor {name} has shape {tuple(tensor.shape)}, expected finite values "
                f"of shape {tuple(shapes[name])}"
            )
    return tensors


class Log:
    """metrics.jsonl: one JSON object a step. Resuming at a step drops the lines written after it."""

    def __init__(self, path, resume_step=0):
        self.path, self.start, self.tokens = Path(path), time.perf_counter(), 0
        lines = self.read() if resume_step and self.path.is_file() else []
        write_jsonl(self.path, [line for line in lines if line["step"] <= resume_step])

    def write(self, step, n_tokens, **values):
        """Append {step, tokens_per_s (mean so far, prompt tokens included), ...}; returns the object."""
        self.tokens += n_tokens
        line = {
            "step": step,
            **values,
            "tokens_per_s": round(self.tokens / (time.perf_counter() - self.start), 1),
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def read(self):
        """The lines as objects; a last line that was cut off while being written is left out."""
        lines = self.path.read_text().split("\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise InputError(f"{self.path}: a line is not JSON ({error})") from None


def mfu(model, tokens_per_s, device):
    """Model FLOPs utilisation: 6 * parameters * tokens/s over the GPU's dense bf16 peak (attention not
    counted; Chowdhery et al. 2022, appendix B); None on a device whose peak is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for gpu, flops in PEAK_BF16_FLOPS.items() if gpu in name), None)
    return peak and 6 * sum(p.numel() for p in model.parameters()) * tokens_per_s / peak
