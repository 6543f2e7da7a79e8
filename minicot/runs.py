"""The run folder: files that are whole or as they were, a lock, signals, checkpoints, the log.

It holds settings.json (the flags), metrics.jsonl (one line a step), checkpoint-<step>/ (weights, optimizer
state, both safetensors, and state.json), lock.json while a process writes into it and, at the end, a Hugging
Face model folder's files.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minicot.config import check, handle_signals
from minicot.errors import InputError
from minicot.parallel import first, from_first, gathered, largest, placed
from minicot.tokenizer import FILES, Tokenizer
from minicot.training import mfu, resolve, weights_digest
from minicot.weights import load_model, read_json, save_model


# ---- what is written is whole ------------------------------------------------------------------------


@contextmanager
def written_beside(path, folder=False):
    """Yields the place beside `path` where its new content is written; the block then moves it. Where that
    fails (a full disk) `path` is as it was, what was written goes, and the error says so in one line."""
    part = Path(f"{path}.part")
    try:
        remove(part)
        if folder:
            part.mkdir(parents=True)
        yield part
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be written ({error}); what was there before is kept") from None
    finally:
        with suppress(OSError):
            remove(part)


def remove(path):
    """Delete a file or a folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path, text):
    """A whole file or none; with torchrun rank 0 alone writes."""
    if not first():
        return
    with written_beside(path) as part:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


def write_json(path, value, indent=1):
    """indent None: no blanks either."""
    separators = (",", ":") if indent is None else None
    write_text(path, json.dumps(value, indent=indent, separators=separators) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---- the run folder ----------------------------------------------------------------------------------

PER_CALL = ("resume", "overwrite", "stop_at", "save_every", "peek")  # may differ when a run is resumed
PER_CALL += ("shard", "compile", "checkpoint_activations")
OURS = {
    *("settings.json", "metrics.jsonl", "eval.json", "comparison.json", "samples.jsonl", "loss.svg"),
    *("ref_logps.safetensors", "config.json", "model.safetensors", "preprocessor_config.json", *FILES),
}
REPLACED = "replaced-by-overwrite"  # marks <out>.old as made here


def ours(name):
    """Is it the name of a file or folder that a run writes? Whatever else lies in a run folder is left."""
    name = re.sub(r"\.part(ial)?$", "", name)
    return name in OURS or bool(re.fullmatch(r"checkpoint-\d+|model-folder", name))


def check_out(config, inputs=()):
    """Refuse an --out that may not be written, before any work: an existing run needs --resume or
    --overwrite, what --overwrite replaces must not hold one of `inputs`, and no other process may be
    writing there. With torchrun rank 0 looks."""
    if not first():
        return
    out, old = Path(config.out), Path(f"{config.out}.old")
    if config.resume and config.overwrite:
        raise InputError("--resume and --overwrite are both given; allowed: one of them")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, expected a folder")
    refuse_locked(out / "lock.json")
    if config.resume:
        read_json(out / "settings.json")
        if not checkpoints(out):
            raise InputError(f"--resume: {out} holds no checkpoint")
    elif out.is_dir() and any(path.name != "lock.json" for path in out.iterdir()):
        if not (out / "settings.json").is_file():
            raise InputError(f"--out {out} holds files that are no run of ours")
        if not config.overwrite:
            raise InputError(f"--out {out} already holds a run; allowed: --overwrite, --resume")
        if old.exists() and not (old / REPLACED).is_file():
            raise InputError(f"--overwrite keeps the old run in {old}, which is there; allowed: move it away")
        for path in map(Path, inputs):
            for folder in (out.resolve(), old.resolve()):
                inside = path.resolve().is_relative_to(folder)
                parts = path.resolve().relative_to(folder).parts if inside else ("another",)
                if not parts or ours(parts[0]):
                    raise InputError(
                        f"--overwrite would replace {out}, which holds {path}, an input of this run"
                    )


def refuse_locked(lock):
    """Refuse a run folder whose lock file's owner lives: a process of this machine that is at work, or any
    of another machine. A process that has our own number is dead: we are it."""
    try:
        owner = json.loads(lock.read_text())
        pid, host = int(owner["pid"]), str(owner["host"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        pid, host = "unknown", "an unknown machine"
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        except PermissionError:
            pass  # somebody else's: it lives
        if pid == os.getpid():
            return
    raise InputError(
        f"--out {lock.parent}: process {pid} on {host} is writing there; allowed: another --out; "
        f"where that process is no run any more, delete {lock}"
    )


class Run:
    """A run folder while this process writes into it: `with Run(config, inputs) as run:`.

    It is locked (lock.json: process id and host) from the first to the last line of the block, whatever ends
    it. begin() moves what --overwrite replaces to <out>.old, where it stands until finish(). With torchrun
    rank 0 does all that, and the others read."""

    def __init__(self, config, inputs=()):
        self.config, self.inputs, self.out = config, inputs, Path(config.out)
        self.old, self.lock = Path(f"{config.out}.old"), self.out / "lock.json"
        self.signal, self.handlers, self.begun, self.started = 0, {}, False, time.perf_counter()

    def __enter__(self):
        from_first(self.lock_folder)
        return self

    def lock_folder(self):
        self.out.mkdir(parents=True, exist_ok=True)
        refuse_locked(self.lock)
        self.lock.unlink(missing_ok=True)  # a dead process's
        try:
            with open(self.lock, "x", encoding="utf-8") as file:
                json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        except FileExistsError:  # another process was a moment faster
            raise InputError(f"--out {self.out}: another process has just begun to write there") from None
        try:
            check_out(self.config, self.inputs)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        self.stop_listening()
        if not first():
            return
        self.lock.unlink(missing_ok=True)
        if self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()

    def begin(self, init, data_digest=None):
        """Before anything is written: settings.json. --resume needs the same settings, data and weights in
        the folder `init`, --ref and --verifier. (The data's digest is None while samples are being drawn.)"""
        digests = {"init_digest": weights_digest(init), "data_digest": data_digest}
        for name in ("ref", "verifier"):
            if folder := getattr(self.config, name, ""):
                digests[f"{name}_digest"] = weights_digest(resolve(folder))
        settings = dataclasses.asdict(self.config) | digests
        settings = {name: value for name, value in settings.items() if name not in PER_CALL}
        if self.config.resume:
            before = read_json(self.out / "settings.json")
            for name in sorted(settings):
                if settings[name] != before.get(name):
                    raise InputError(
                        f"--resume: {name} is {settings[name]!r}, the run in {self.out} has "
                        f"{before.get(name)!r}; allowed: the same settings, data and weights"
                    )
            return
        if not first():
            return
        if not self.begun:
            self.make_room()
        self.begun = True
        write_json(self.out / "settings.json", settings)

    def make_room(self):
        """Move the files of the run that was here to <out>.old; those of a run that failed after another
        one's were moved there are deleted."""
        files = [path for path in self.out.iterdir() if ours(path.name)]
        first = bool(files) and not self.old.exists()
        if first:
            self.old.mkdir()
            (self.old / REPLACED).touch()
        for path in files:
            os.replace(path, self.old / path.name) if first else remove(path)

    def listen(self):
        """From here on SIGTERM and SIGINT wait for the end of the step, see end_step."""

        def note(number, _frame):
            self.signal = number

        self.handlers = handle_signals(note)

    def asked_to_stop(self):
        """The signal that has come, to this rank or another (0: none); all ranks have to ask."""
        self.signal = largest(self.signal)
        return self.signal

    def stop_listening(self):
        """From here on they end the process at once, as before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def end_step(self, step, last, model, optimizer, together=1):
        """Save a checkpoint where one is due. Where the run ends here (--stop-at, SIGTERM, SIGINT), save one,
        say how to go on and exit: with code 0, or 128 + signal. `together` steps at a time share what a
        checkpoint does not hold (responses drawn from the policy): all this waits for the last of them."""
        if step % together:
            return
        config, ends = self.config, self.asked_to_stop() or step == self.config.stop_at
        if ends or (config.save_every and step % config.save_every < together and step < last):
            save_checkpoint(self.out, step, model, optimizer)
        if ends:
            largest(0)  # none leaves before rank 0 has written: torchrun would end it soon
            name = f" by {signal.Signals(self.signal).name}" if self.signal else ""
            print(f"stopped{name} after step {step}; go on with --resume", flush=True)
            raise SystemExit(128 + self.signal if self.signal else 0)

    def finish(self, model, tokenizer, reader, log, device):
        """The end of a run: save the model folder (of a model that is not sharded), drop what the run has
        replaced, report. A signal that comes meanwhile waits until the model is saved."""
        if not first():
            return self.stop_listening()
        with written_beside(self.out / "model-folder", folder=True) as part:
            save_model(model, part)
            tokenizer.save(part)
            if reader:
                reader.processor.save(part)
            for file in sorted(part.iterdir(), key=lambda file: file.name == "model.safetensors"):
                os.replace(file, self.out / file.name)  # the weights last: with them the folder is whole
        if (self.old / REPLACED).is_file():
            for path in self.old.iterdir():
                if ours(path.name) or path.name == REPLACED:
                    remove(path)
            if not any(self.old.iterdir()):
                self.old.rmdir()
        self.stop_listening()
        if self.signal:
            print(f"stopped by {signal.Signals(self.signal).name}; the model is saved in {self.out}")
            raise SystemExit(128 + self.signal)
        lines = log.read()
        begin, end = ([line["loss"] for line in part] for part in (lines[:20], lines[-20:]))
        speed = lines[-1]["tokens_per_s"]
        share = mfu(model, speed, device)
        print(
            f"loss {sum(begin) / len(begin):.3f} -> {sum(end) / len(end):.3f} (means of the first and last "
            f"{len(end)} steps), {speed:,.0f} tokens/s{f', MFU {share:.1%}' if share else ''}, "
            f"{(time.perf_counter() - self.started) / 60:.1f} minutes -> {self.out}"
        )


def checkpoints(out):
    """{step: folder} of a run's whole checkpoints."""
    matches = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(out).glob("checkpoint-*")}
    return {int(match[1]): path for path, match in matches.items() if match}


def open_model(folder, config, device, reward=False):
    """(model, tokenizer) of a folder that is read, not trained: --dtype, --chat-template; reward: of a reward
    model's."""
    tokenizer = Tokenizer(folder, config.chat_template)
    model = load_model(folder, dtype=getattr(torch, config.dtype), device=device, reward=reward).eval()
    allowed = f"one whose tokenizer has at most {model.config.vocab_size} ids"
    check(tokenizer.vocab_size <= model.config.vocab_size, "the model", str(folder), allowed)
    return model, tokenizer


def save_checkpoint(out, step, model, optimizer):
    """out/checkpoint-<step>/, written beside and renamed when whole; then older checkpoints go. state.json
    names what has no optimizer state, as no gradient has reached it yet (a projector before the first
    picture)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in names if parameter.requires_grad]
    state = gathered(
        (f"{names[parameter]}.{key}", value if value.ndim else value.reshape(1))
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    )
    weights = gathered((name, parameter) for parameter, name in names.items())
    if not first():
        return
    final = out / f"checkpoint-{step}"
    with written_beside(final, folder=True) as part:
        save_file(weights, part / "weights.safetensors")
        save_file(state, part / "optimizer.safetensors")
        untouched = [names[parameter] for parameter in trained if parameter not in optimizer.state]
        about = {"step": step, "untouched": untouched, "torch": torch.__version__}
        write_json(part / "state.json", about)
        remove(final)
        os.replace(part, final)
    for other in out.glob("checkpoint-*"):
        if other != final and ours(other.name):
            remove(other)


def load_checkpoint(out, model, optimizer):
    """Put the newest checkpoint of a run folder into model and optimizer, strictly; returns its step."""
    folder = checkpoints(out)[max(checkpoints(out))]
    about = read_json(folder / "state.json")
    step, untouched = about.get("step"), about.get("untouched", [])
    if folder.name != f"checkpoint-{step}":
        raise InputError(f"{folder / 'state.json'}: step is {step!r}, the folder is {folder.name}")
    if (version := about.get("torch", torch.__version__)) != torch.__version__:
        print(f"{folder} is of torch {version}, this is {torch.__version__}: the last digits may differ")
    touched = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in untouched
    }
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights = read_exactly(folder / "weights.safetensors", shapes)
    moments = {f"{name}.{key}": p.shape for name, p in touched.items() for key in ("exp_avg", "exp_avg_sq")}
    state = read_exactly(
        folder / "optimizer.safetensors", moments | {f"{name}.step": (1,) for name in touched}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(placed(weights[name], parameter))
    for name, parameter in touched.items():
        keys = {key: placed(state[f"{name}.{key}"], parameter) for key in ("exp_avg", "exp_avg_sq")}
        where = parameter.device if optimizer.defaults["fused"] else "cpu"  # as AdamW makes it
        optimizer.state[parameter] = {"step": state[f"{name}.step"].reshape(()).to(where), **keys}
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
        if first():
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
