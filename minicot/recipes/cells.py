"""What the recipes share: cells (commands that run once), claims (judged by the interval), the results file.

A cell is a list of commands of the three scripts in a folder of its own under runs/. They are printed, so
that any cell can be run by hand; a cell whose cell.json names the same commands and inputs is not run again.
"""

import hashlib
import json
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from minicot.errors import InputError
from minicot.metrics import mean_interval, paired_difference, verdict
from minicot.training import write_json

LOCKS, DIGITS = {}, "0123456789abcdefghijklmnopqrstuvwxyz"


def command(script, *switches, **flags):
    """command("train.py", "--overwrite", lr=1e-3) -> ["train.py", "--overwrite", "--lr", "0.001"]; None is
    left out."""
    words = [script, *switches]
    for name, value in flags.items():
        if value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


def run_cell(folder, commands, inputs=(), *, fresh=False):
    """Run the commands, their output going to <folder>/log.txt, unless cell.json says that these commands, on
    input files of this content, are done. A command that fails ends the recipe with its own last line."""
    with LOCKS.setdefault(str(folder), threading.Lock()):  # two jobs must not make one cell
        _run_cell(folder, commands, inputs, fresh)


def _run_cell(folder, commands, inputs, fresh):
    digest = {str(path): hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] for path in inputs}
    done = {"commands": [shlex.join(["python", *words]) for words in commands], "inputs": digest}
    mark, log = folder / "cell.json", folder / "log.txt"
    if mark.is_file() and not fresh and json.loads(mark.read_text()) == done:
        return
    folder.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    for line, words in zip(done["commands"], commands):
        print(line, flush=True)
        with open(log, "a") as file:
            code = subprocess.run(
                [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code:
            raise InputError(
                f"{line}: exit code {code}; {log} ends with {log.read_text().strip().splitlines()[-1:]}"
            )
    write_json(mark, done)


def made_by(args, started):
    """What a results file says of its making; minutes of this call alone, without cells that were there."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    gpu = args.device == "cuda" and torch.cuda.get_device_name()
    return {
        "commit": commit.stdout.strip(),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "device": gpu or f"CPU, {args.jobs} jobs of one thread",
    }


def claims_of(table, fields):
    """Lines "a|b|c" -> a dict a claim."""
    return [dict(zip(fields, map(str.strip, line.split("|")))) for line in table.strip().splitlines()]


INTERVAL = "{:+.1%} [{:+.1%}, {:+.1%}]"


def markdown(head, rows):
    """Cells of the head, rows of cells -> the lines of a Markdown table."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return [line(head), "|---" * len(head) + "|", *map(line, rows)]


def claims_table(claims):
    """Judged claims -> the lines of their Markdown table."""
    return markdown(
        ("claim", "difference [95 %]", "verdict"),
        [
            (
                f"{one['id']}. {one['text']}",
                "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**one),
                one["verdict"],
            )
            for one in claims
        ],
    )


def to_hex(bits):
    """0/1 a problem -> hex digits (a leading 1 keeps the zeros in front)."""
    return f"{int('1' + ''.join(map(str, bits)), 2):x}"


def from_hex(digits):
    return [int(bit) for bit in f"{int(digits, 16):b}"[1:]]


def pack_pairs(pairs):
    """[[right, pairs] of each problem], both below 36 -> two characters a problem."""
    return "".join(DIGITS[number] for pair in pairs for number in pair)


def unpack_pairs(packed):
    """The inverse; lists are taken as they are."""
    if not isinstance(packed, str):
        return packed
    return [[DIGITS.index(right), DIGITS.index(n)] for right, n in zip(packed[::2], packed[1::2])]


def judge(claim, ours, other=None):
    """claim {id, text, rule}, numbers (seeds, problems) of two cells -> the claim with its verdict and
    interval.

    rule: "up" | "down" (the difference ours - other), "level" (it does not lie below minus 2 points), or
    "below X" (the difference, or without an other ours alone, lies below X). Principle: written down before
    the run; holds, not seen or reversed by the 95 % interval."""
    rule = claim["rule"]
    difference, low, high = paired_difference(other, ours) if other else mean_interval(ours)
    if rule in ("up", "down"):
        found = verdict(low, high, direction=rule)
    elif rule == "level":
        found = verdict(low, high, at_least=-0.02)
    else:
        found = verdict(-high, -low, at_least=-float(rule.removeprefix("below ")))
    return {
        **claim,
        "verdict": found,
        "difference": round(difference, 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "seeds": len(ours),
        "problems": len(ours[0]),
    }
