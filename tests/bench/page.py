"""results.json -> README.md: the measured table as a page, beside a part written by hand.

results.json holds {"cpu": run, "cuda": run}, each {command, commit, device, dtype, versions, note?, rows}; a
row that another commit measured has a commit of its own. Regeneration keeps what stands between the markers.
"""

import json
import statistics
from pathlib import Path

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- hand-written -->", "<!-- end of the hand-written part -->"
HEADER = (
    "| work | model | shape | peer | theirs / ours, min / median / max | bound: tokens / work "
    "| reached | minicot | peer |\n|---|---|---|---|---|---|---|---|---|"
)
TITLE = """# Speed and memory beside peers

Made from `results.json` by `python -m tests.bench --page`; `python -m tests.bench cpu --write` (or `cuda`)
measures anew and writes both, with `--only ROWS` those rows alone; `cuda --minutes 20` the rows of most
worth, as far as that goes; `--compile` compiles minicot's layers. TRL needs `pip install -r
tests/bench/requirements.txt`. What a 7B run costs, on paper: [PROJECTION.md](PROJECTION.md).

A row races minicot against a peer on the same weights and the same batch. All sides take turns in one process
(A B C A B C ...), so that a noisy machine hits all of them, and their losses and gradients are checked to
agree before a step is timed. What is shown is theirs / ours, min / median / max over the rounds: above 1,
minicot is faster, or takes less memory. A step is forward and backward, without an optimizer (of GRPO all of
it: rollouts, update, AdamW). Tokens a second count the prompt and response tokens of all rows of a step,
shared or not; of a generation, the new ones.

| side | what it computes (`sides.py`) |
|---|---|
| minicot | `score`: shared prompts and packing where they pay, logits of scored tokens alone |
| padded | minicot without shared prompts and packing, with the same savings at the head |
| plain | `score_plain`: one padded forward, all logits |
| transformers | Llama or Llava, one padded forward, all logits; its own loss for SFT, else ours |
| TRL | `DPOTrainer.compute_loss`, the reference's log-probabilities given; of GRPO `GRPOTrainer`'s step |
| naive | of a policy step (`pruner.py`): one prompt at a time, its shots encoded anew |
| one process | whole SFT steps with AdamW by one process of one thread, beside two by torchrun (`ranks.py`) |

Two bounds say what sharing prompts can give over "padded" at most, with K responses of R tokens to a prompt
of P: the token bound K(P+R)/(P+KR), as if all work were a token's own, and the work bound, which counts what
is not spared: the head on scored tokens, and each response's attention to the prompt. "Reached" is the median
over each bound. Memory is the peak of one step above weights and batch, each side in a process of its own.
"""


def line(result):
    """A result -> its line of the table."""
    low, middle, high = result["ratio"]
    bound = " / ".join(f"{bound:.2f}" for bound in result.get("bounds", {}).values())
    reached = " / ".join(f"{share:.0%}" for share in result.get("reached", {}).values())
    ours, theirs = (statistics.median(result[side]) for side in ("ours", "theirs"))
    if result["unit"] == "bytes":
        values = f"{middle:.2f} | | | {ours / 2**20:,.0f} MiB | {theirs / 2**20:,.0f} MiB |"
    else:
        values = (
            f"{low:.2f} / {middle:.2f} / {high:.2f} | {bound} | {reached} | {ours:.3g} s, "
            f"{result['tokens_per_second']:,.0f} tokens/s | {theirs:.3g} s |"
        )
    return f"| {result['work']} | {result['model']} | {result['shape']} | {result['peer']} | {values}"


def section(run):
    """A run -> its heading, where it comes from, and its table."""
    versions = ", ".join(
        f"{name} {version}" if version else f"no {name}, no rows of it"
        for name, version in run["versions"].items()
    )
    others = {}
    for row in run["rows"]:
        if "commit" in row:
            others.setdefault(row["commit"], []).append(" ".join((row["work"], row["model"], row["shape"])))
    measured = [
        f"Of commit {commit}: " + "; ".join(dict.fromkeys(names)) + "." for commit, names in others.items()
    ]
    return "\n\n".join(
        [
            f"## {run['device']}",
            f"`{run['command']}`, commit {run['commit']}, {run['dtype']}; {versions}.",
            "\n".join([HEADER, *map(line, run["rows"])]),
            *measured,
            *([run["note"]] if "note" in run else []),
        ]
    )


def render(results, hand_written):
    """results.json's runs and the part written by hand -> the page."""
    runs = "\n\n".join(section(results[kind]) for kind in sorted(results))
    return f"{TITLE}\n{runs}\n\n{BEGIN}{hand_written}{END}\n"


def hand_written():
    """What stands between the page's markers. ValueError where they are gone: it is not to be lost."""
    path = FOLDER / "README.md"
    head, begin, rest = path.read_text().partition(BEGIN)
    text, end, _ = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: no part between {BEGIN} and {END}, which regeneration keeps")
    return text


def read_results():
    path = FOLDER / "results.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def write_page():
    (FOLDER / "README.md").write_text(render(read_results(), hand_written()))


def write_results(kind, run, part=False):
    """Put the run of a kind of device in the place of the one before, and make the page anew. part: the rows
    of this run replace those of the same name, or stand behind the others; each says its commit."""
    before = read_results()
    if part:
        name = lambda row: tuple(row[key] for key in ("work", "model", "shape", "peer"))
        new = {name(row): row | {"commit": run["commit"]} for row in run["rows"]}
        rows = [new.pop(name(row), row) for row in before[kind]["rows"]]
        run = {**run, **before[kind], "rows": rows + list(new.values())}
    (FOLDER / "results.json").write_text(json.dumps(before | {kind: run}, indent=1) + "\n")
    write_page()
