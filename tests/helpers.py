"""Running the scripts in a test."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import align
import sample
import train
from minicot.config import AlignConfig, SampleConfig, TrainConfig, run

SCRIPTS = {
    "train.py": (train, TrainConfig, {}),
    "sample.py": (sample, SampleConfig, {}),
    "align.py": (align, AlignConfig, {"method": align.METHODS}),
}


def script(name, *argv, cwd):
    """Run a script's main as `python name argv` would in the folder cwd, without starting a process."""
    module, config_class, choices = SCRIPTS[name]
    before, out, err, code = os.getcwd(), io.StringIO(), io.StringIO(), 0
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(module.main, config_class, [str(word) for word in argv], **choices)
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(before)
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def start(name, *argv, cwd, ready="", home=Path(__file__).parent.parent):
    """Start a script as a process of its own, and wait until the file cwd/ready, if named, is there."""

    def as_from_a_terminal():  # a shell in the background starts its children deaf to SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    words = [sys.executable, home / name, *map(str, argv)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(words, cwd=cwd, preexec_fn=as_from_a_terminal, **pipes)
    deadline = time.time() + 60
    while ready and not (cwd / ready).is_file():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)
    return process


def finished(process, timeout=60):
    """Wait for a started script -> its returncode, stdout and stderr."""
    out, err = process.communicate(timeout=timeout)
    return types.SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


def assert_one_line_error(done, *parts):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


def assert_value_named(call, message):
    """It raises a ValueError of one line that says so."""
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def assert_shapes_named(call, shapes):
    with pytest.raises(AssertionError) as error:
        call()
    for shape in shapes:
        error.match(shape)


def jsonl(path, *rows):
    """Write rows (objects, or lines as they are) to a JSON-lines file -> its path."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
