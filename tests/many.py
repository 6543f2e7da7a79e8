"""Runs scripts one after the other in one of torchrun's processes, as tests/test_parallel.py asks:

torchrun --standalone --nproc-per-node 2 -m tests.many JOBS.json

JOBS.json: a list of argv, the script's name first. One start of torch serves many runs.
"""

import importlib
import json
import sys
from pathlib import Path

from minicot import config, parallel

CONFIGS = {"train": config.TrainConfig, "align": config.AlignConfig, "sample": config.SampleConfig}


def main(jobs):
    with parallel.joined():
        for name, *argv in json.loads(Path(jobs).read_text()):
            script = importlib.import_module(name)
            choices = {"method": script.METHODS} if name == "align" else {}
            try:
                config.run(script.main, CONFIGS[name], argv, **choices)
            except SystemExit as stop:  # --stop-at
                if stop.code:
                    raise


if __name__ == "__main__":
    main(sys.argv[1])
