"""The work of a recipe's cells: commands and functions, the mark of what is done, how a recipe ends early.

cell.json, {command, inputs, commit, minutes}, is written when a cell is whole, and deleted before it is made
again: a cell that was cut off has none.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from minicot.errors import InputError
from minicot.runs import write_json
from minicot.training import ROOT, resolve, weights_digest
from minicot.weights import read_json


class Worker:
    """Does the work of cells, several at once. After a failure no cell begins; those at work are finished,
    for they cost much, but not where a signal ends the recipe: then they are ended too."""

    def __init__(self):
        self.lock, self.failure, self.children = threading.Lock(), None, []
        self.one_thread = True  # a script takes one thread: the others are for those beside it
        self.worked = False  # was a cell made, other than found whole

    def once(self, folder, line, inputs, work, *, fresh):
        """Call work(log file) unless the folder's mark names the same command and inputs already."""
        mark, start = folder / "cell.json", time.perf_counter()
        done = read_json(mark) if mark.is_file() and not fresh else {}
        if (done.get("command"), done.get("inputs")) == (line, inputs):
            return
        if self.failure:
            raise self.failure
        self.worked = True
        folder.mkdir(parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)
        print(line, flush=True)
        try:
            work(folder / "log.txt")
        except InputError as error:
            raise error if error is self.failure else InputError(f"{line}: {error}") from None
        minutes = round((time.perf_counter() - start) / 60, 2)
        write_json(mark, {"command": line, "inputs": inputs, "commit": commit(), "minutes": minutes})

    def command(self, words, log):
        """Run a script, or "-m" and a module, its output going to a file; one that fails ends the recipe with
        its own last line."""
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if self.one_thread else {})
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with open(log, "a") as file:
            script = words[0] if words[0] == "-m" else str(ROOT / words[0])
            python = [sys.executable, script, *words[1:]]
            with self.lock:  # none begins behind the back of end()
                if self.failure:
                    raise self.failure
                child = subprocess.Popen(python, stdout=file, stderr=file, env=environment)
                self.children.append(child)
        if code := child.wait():
            last = log.read_text().strip().splitlines()[-1:]
            raise InputError(f"exit code {code}; {log} ends with {last}")

    def end(self, error):
        with self.lock:
            self.failure = self.failure or error
            for child in self.children if isinstance(error, KeyboardInterrupt) else ():
                child.terminate()


def digest(path):
    """16 hex digits of a model folder, a data set's folder or a file; None where there is none of these."""
    path = resolve(str(path).rpartition(":")[2])
    if (path / "config.json").is_file():
        return weights_digest(path)[:16]
    hashes = b""
    for file in filter(Path.is_file, sorted(path.iterdir()) if path.is_dir() else [path]):
        with open(file, "rb") as stream:
            hashes += hashlib.file_digest(stream, "sha256").digest()
    return hashlib.sha256(hashes).hexdigest()[:16] if hashes else None


def commit():
    """Of the code, "-dirty" where it was changed since; "unknown" where git can't tell."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = shutil.which("git") and subprocess.run(git, capture_output=True, text=True, check=False)
    return done and done.stdout.strip() or "unknown"


def take(path, wanted):
    """{metric: "a.b"} -> {metric: the number or list that stands there in a JSON file}; None: all of it."""
    found = read_json(Path(path))
    at = lambda key: functools.reduce(lambda part, name: part[name], key.split("."), found)
    try:
        return found if wanted is None else {name: at(key) for name, key in wanted.items()}
    except KeyError as error:
        raise InputError(f"{path}: has no {error}, which one of {', '.join(wanted.values())} names") from None
