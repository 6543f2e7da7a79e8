"""Running the scripts in a test."""

import contextlib
import io
import os
import types

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


def assert_one_line_error(done, *parts):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
