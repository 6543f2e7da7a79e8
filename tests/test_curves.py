"""Golden loss curves: a change that is no change of method leaves 20 steps of training where they were.

After a deliberate change: `python -m tests.test_curves` writes tests/golden/curves.json anew.
"""

import json
import tempfile
from pathlib import Path

import pytest

from minicot.records import Response, Samples, samples_to_row
from minicot.sets import read_problems
from tests.helpers import script

GOLDEN = Path(__file__).parent / "golden" / "curves.json"
COMMON = ["--steps", 20, "--device", "cpu", "--save-every", 0, "--out", "out"]
RUNS = {
    "sft": ["train.py", "--limit", 400, "--batch-size", 8, "--warmup", 0.2],
    "aft-boundary": ["align.py", "--constraint", "boundary", "--margin", 0.1],
    "aft-detached": ["align.py"],
    "rrhf": ["align.py", "--method", "rrhf"],
    "pro": ["align.py", "--method", "pro"],
    "dpo": ["align.py", "--method", "dpo", "--pair-low", 0, "--pair-high", 1],
    "rft": ["align.py", "--method", "rft"],
    "prm": ["train.py", "--task", "prm", "--lr", 1e-4],
}


def samples(path):
    """Made-up responses: the solution with its steps reversed (right) and with a slip (wrong); labels of
    their steps."""
    groups = []
    for problem in read_problems("toy", "train", limit=40):
        *steps, last = problem.solution.split("\n")
        right = [Response("\n".join([*steps[::-1], last]), True, step_labels=[True] * len(steps))]
        slips = [f"{steps[0]}\n#### {int(problem.answer) + k}" for k in (1, 2)]
        wrong = [Response(text, False, step_labels=[False]) for text in slips]
        groups.append(Samples(problem, right + wrong))
    path.write_text("".join(json.dumps(samples_to_row(group)) + "\n" for group in groups))


def curve(name, folder):
    script_name, *argv = RUNS[name]
    if script_name == "align.py" or "prm" in argv:
        samples(folder / "samples.jsonl")
        argv = ["--init", "toy", "--samples", "samples.jsonl", "--batch-size", 4, "--lr", 3e-4, *argv]
    done = script(script_name, *argv, *COMMON, cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [round(json.loads(line)["loss"], 6) for line in lines]


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_follow_the_golden_curve(name, tmp_path):
    assert curve(name, tmp_path) == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=1e-3)


if __name__ == "__main__":
    curves = {}
    for run in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            curves[run] = curve(run, Path(folder))
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
