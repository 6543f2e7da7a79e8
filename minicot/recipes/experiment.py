"""The engine of the recipes: an experiment is declared; the engine runs it, judges its claims, writes a page.

    def declare(E):
        sft = E.model("sft", "train.py", init=E.init, data=E.data, split=E.train)
        samples = E.samples("samples", sft, split=E.train, limit=E.size.problems, n=8)
        E.model("dpo", "align.py", init=sft, samples=samples, method="dpo", grid=dict(lr=(1e-5, 1e-4)))
        E.choose_by("metrics.accuracy", split=E.validation, limit=E.size.validation)
        E.read("test", split=E.test, limit=E.size.test, take={"accuracy": "correct"})

    Experiment("name", title, sizes, fast).main(declare, CLAIMS, {"model": {"accuracy": "{accuracy:.1%}"}})

A cell is a command of train.py, sample.py or align.py, or a function that makes a file of others, at one
seed, in a folder of its own below runs/recipes/<name>/. Commands are printed: a cell can be run by hand. A
cell whose cell.json names the same command and inputs is not run again. A flag whose value is a cell stands
for what that cell makes, which is made first.

A model with a grid is made at every setting at the first seed; the one that reads out best on validation
problems is made at every seed and meets the test problems once. Claims are written down before the run.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import re
import shlex
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

from minicot.config import one_line_ends
from minicot.errors import InputError
from minicot.recipes.tables import judge_all, mean_of, pack, read_results, sides, tables, write_page
from minicot.recipes.work import Worker, digest, take
from minicot.records import fields_of, read_samples
from minicot.sets import TOYS, default_length, read_problems, refuse_shared
from minicot.runs import write_json, write_jsonl, write_text
from minicot.training import ROOT, resolve, weights_digest
from minicot.view import page
from minicot.weights import read_json

RESULTS = ROOT / "minicot" / "recipes" / "results"
SHOWN = 250  # problems of the page samples.html beside each samples.jsonl of the first seed
SPLITS = ("train", "validation", "test")
SWITCH = {"action": "store_true"}
ARGUMENTS = {
    "--data": {"help": "toy, toy-pictures, gsm8k:PATH, ..., FILE.jsonl"},
    "--init": {"help": "base model folder"},
    "--others": {
        "nargs": "+",
        "default": [],
        "metavar": "DATA",
        "help": "more test sets, for recipes that say so",
    },
    "--splits": {"nargs": 3, "help": "of data"},
    "--set": {"nargs": "+", "default": [], "metavar": "SIZE=VALUE", "help": "other sizes, see SIZES"},
    "--seeds": {"help": "how many"},
    "--only": {"nargs": "+", "metavar": "MODEL", "help": "a part of the models; with --name or --fast"},
    "--name": {"help": "of run folder, results and page (default: the recipe's, with _SET on other data)"},
    "--fast": {**SWITCH, "help": "a small part of the work; its results stay in the run folder"},
    "--fresh": {**SWITCH, "help": "make every cell again"},
    "--jobs": {"type": int, "default": 2, "help": "cells at once (CPU: of one thread each)"},
    "--device": {"default": "cpu", "choices": ("cpu", "cuda")},
    "--dtype": {"default": "float32", "choices": ("float32", "bfloat16")},
    "--train-flags": {"default": "", "help": "more flags of train.py, such as '--lr 2e-5'"},
    "--table": {**SWITCH, "help": "print the results that are there, make figures and page again"},
}


@dataclass(frozen=True, eq=False)
class Cell:
    """A command or a function, at each seed, and what it makes."""

    name: str
    work: tuple  # (script or module, *switches), (function, *inputs); () for another name of the cell `of`
    makes: str  # a file, or a model folder, in the cell's own folder
    flags: dict = field(default_factory=dict)  # of a command; None is left out
    of: "Cell | None" = None  # the cell in whose folder, and at whose setting, this one lives
    grid: dict = field(default_factory=dict)  # flag -> its values
    at: tuple = ()  # (model, *flags): these flags as they were chosen for that model
    seeds: int = 10**6  # at most so many
    table: str | None = None  # which table shows it (None: the first)
    root: Path | None = None  # where its folders lie (None: in those of its `of`)


@dataclass(frozen=True)
class Next:
    """A cell at the next seed: another model of the same kind."""

    cell: Cell


class Experiment(Worker):
    """One paper's experiment. E.size.<name> are its sizes; E.data, E.init, E.train, E.validation, E.test the
    data, base model and splits that the command line may change; E.toy: is it a built-in world?"""

    def __init__(
        self,
        name,
        title,
        sizes,
        fast,
        *,
        elsewhere=None,
        data="toy",
        init="toy",
        splits=SPLITS,
        results=RESULTS,
    ):
        """sizes: {name: value}, "seeds" among them, and "first_seed" where it is not 0; fast: what --fast
        changes on the built-in world, and `elsewhere` on other data."""
        super().__init__()
        self.title, self.sizes, self.fast, self.elsewhere = title, sizes, fast, elsewhere or fast
        self.defaults = {"name": name, "--data": data, "--init": init, "--splits": list(splits)}
        self.results = Path(results)
        self.models, self.reads, self.validations, self.chosen, self.made = [], {}, {}, {}, {}
        self.start = time.perf_counter()

    # -- declaring

    def model(self, name, script, *switches, grid=None, at=(), seeds=10**6, table=None, **flags):
        """A model that train.py, align.py or a module makes: a row of the tables. A name "aft@twin" shares
        its folders with "aft" where their settings agree."""
        assert name not in [cell.name for cell in self.models], f"two models are called {name}"
        work = script, *switches
        self.models.append(Cell(name, work, "model", flags, None, grid or {}, at, seeds, table, self.root))
        return self.models[-1]

    def borrow(self, other, declare, names):
        """Models of another recipe, an Experiment that `declare` declares: at the settings that are chosen
        there, in the folders that it left; what is absent is made there. -> {name: model} of all it has."""
        other.parse(["--fast"] if self.args.fast else [])
        declare(other)
        found = {cell.name: cell for cell in other.models}
        self.models += [found[name] for name in names]
        self.validations |= {name: one for name, one in other.validations.items() if name in names}
        return found

    def alias(self, name, model, table=None):
        """Another name of a model, to be read out in another way."""
        self.models.append(Cell(name, (), "", of=model, table=table))
        return self.models[-1]

    def samples(self, name, model, *switches, **flags):
        """What sample.py draws from a model, or with verifier=, how it scores samples by it."""
        flags = flags if "verifier" in flags else {"model": model, "data": self.data, **DRAW, **flags}
        return Cell(name, ("sample.py", *switches), "samples.jsonl", flags, of=model)

    def file(self, name, function, *inputs):
        """The file that function(out, *paths of the inputs, seed=seed) writes."""
        return Cell(name, (function, *inputs), f"{name}.jsonl", of=inputs[0])

    def part(self, split, start, stop):
        """The problems start to stop of a split, which may be a slice itself, "train[7000:]"."""
        if not (match := re.fullmatch(r"([\w-]+)(?:\[(\d*):(\d*)\])?", split)):
            raise InputError(f"--splits has {split!r}; allowed: a name, or a slice such as train[7000:]")
        first = int(match[2] or 0)
        last = min(first + stop, int(match[3] or first + stop))
        return f"{match[1]}[{first + start}:{last}]"

    def problems(self, split, limit):
        """Flags for the first problems of a split. A built-in world, which every process would make anew for
        seconds, is written into a file once."""
        if not self.toy:
            return dict(data=self.data, split=split, limit=limit)
        rows = map(fields_of, read_problems(self.data, split, limit=limit))
        data = self.write(re.sub(r"\W+", "-", f"{split} {limit}") + ".jsonl", rows)
        return dict(data=data, max_new_tokens=default_length(self.data))

    def write(self, name, rows):
        """A JSON-lines file for all seeds, written at once -> its path."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_jsonl(self.root / name, rows)
        return self.root / name

    def read(self, name, *work, take=None, of=None, **flags):
        """Read models out (None: all): by `sample.py --evaluate`, by other switches of sample.py, or by a
        function (see `file`).

        take: {metric: where it stands in the JSON that was written, such as "metrics.majority"}; None: all
        that is there. A list holds a number, or [right, of how many], for each problem."""
        for model in self.models if of is None else of:
            self.reads.setdefault(model.name, []).append((self.reading(name, model, work, flags), take))

    def choose_by(self, score, *work, of=None, **flags):
        """Which number of a reading (see `read`) chooses among the settings of a grid."""
        for model in self.models if of is None else of:
            self.validations[model.name] = self.reading("validation", model, work, flags), score

    def reading(self, name, model, work, flags):
        if work and callable(work[0]):
            return Cell(name, work, "results.json", of=model)
        flags = {"model": model, **({} if "samples" in flags else {"data": self.data, **DRAW}), **flags}
        return Cell(name, ("sample.py", *(work or ("--evaluate",))), "results.json", flags, of=model)

    # -- making cells

    def setting(self, cell):
        """The setting that was chosen for a model, {flag: value}."""
        if cell.at:
            return {flag: self.setting(cell.at[0])[flag] for flag in cell.at[1:]}
        return self.chosen.get(cell.name, {})

    def folder(self, cell, seed, setting=None):
        if cell.of:
            return self.folder(cell.of, seed, setting) / cell.name
        setting = self.setting(cell) if setting is None else setting
        label = cell.name.partition("@")[0] + "".join(f"-{flag}{v:g}" for flag, v in setting.items())
        return cell.root / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', label)}-s{self.seed(seed)}"

    def seed(self, place):
        """The seed that the scripts get, of the first (0), second ... seed of the experiment."""
        return int(getattr(self.size, "first_seed", 0)) + place

    def path(self, cell, seed, setting=None):
        """Make a cell, and first all that it needs -> the path of what it makes. Once, whoever asks."""
        if isinstance(cell, Next):
            return self.path(cell.cell, (seed + 1) % max(2, self.size.seeds))
        if not isinstance(cell, Cell) or not cell.work:
            return self.path(cell.of, seed, setting) if isinstance(cell, Cell) else cell
        folder = self.folder(cell, seed, setting)
        with self.lock:
            mine = folder not in self.made
            maker, future = self.made.setdefault(folder, (cell, Future()))
        told = lambda one: [one.work, {k: v for k, v in one.flags.items() if not isinstance(v, (Cell, Next))}]
        assert told(maker) == told(cell), f"two cells make {folder}: {told(maker)}, {told(cell)}"
        if mine:
            try:
                future.set_result(self.make(cell, seed, setting, folder))
            except BaseException as error:
                self.end(error)
                future.set_exception(error)
        return future.result()

    def make(self, cell, seed, setting, folder):
        get = lambda value, of=cell.of: self.path(
            value, seed, setting if of and of in (value, getattr(value, "of", None)) else None
        )
        out, (script, *rest) = folder / cell.makes, cell.work
        if callable(script):
            needs = paths = [get(one) for one in rest]
            line = f"{script.__name__}({', '.join(map(str, [out, *paths]))})"
            inputs = {"code": hashlib.sha256(inspect.getsource(script).encode()).hexdigest()[:16]}
            work = lambda log: script(out, *paths, seed=self.seed(seed))
        else:
            chosen = {} if cell.of else self.setting(cell) if setting is None else setting
            flags = {**cell.flags, **chosen, "seed": self.seed(seed), "out": out, "device": self.args.device}
            flags |= {"dtype": self.args.dtype} if self.args.dtype != "float32" else {}
            flags = {flag: get(value) for flag, value in flags.items() if value is not None}
            words = [(f"--{flag.replace('_', '-')}", str(value)) for flag, value in flags.items()]
            more = self.train_flags if script == "train.py" else []
            start = (
                [script, "--overwrite", *rest]
                if script.endswith(".py")
                else ["-m", script, *rest, "--overwrite"]
            )
            words = [*start, *itertools.chain(*words), *more]
            line, inputs = shlex.join(["python", *words]), {}
            needs = [flags[flag] for flag in INPUTS if flag in flags]
            work = lambda log: self.command(words, log)
        inputs |= {str(need): found for need in needs if (found := digest(need))}
        self.once(folder, line, inputs, work, fresh=self.args.fresh)
        return out

    def output(self, model, name, seed=0):
        """What a model's reading of this name wrote, as JSON."""
        [reading] = [one for one, _ in self.reads[model.name] if one.name == name]
        return take(self.path(reading, seed), None)

    def choose(self, pool):
        """Every setting of every grid at the first seed -> the grid as it reads out; the best is chosen. A
        model that takes another one, whose setting is to be chosen too, comes after it."""
        jobs, grid = [], []
        for cell in self.models:
            settings = [dict(zip(cell.grid, values)) for values in itertools.product(*cell.grid.values())]
            self.chosen[cell.name] = settings[0]
            jobs += [(cell, setting) for setting in settings] if len(settings) > 1 else []
        waits = lambda cell: any(cell is not other and other in cell.flags.values() for other, _ in jobs)

        def validate(job):
            reading, score = self.validations[job[0].name]
            found = take(self.path(reading, 0, job[1]), {"score": score})
            return {"name": job[0].name, "settings": job[1], "score": round(found["score"], 4)}

        for late in (False, True):
            found = list(pool.map(validate, [job for job in jobs if waits(job[0]) == late]))
            for one in sorted(found[::-1], key=lambda one: one["score"]):  # the first of equals
                self.chosen[one["name"]] = one["settings"]
            grid += found
        return grid

    def row(self, cell, seed):
        """A model at a seed, read out."""
        metrics, lists = {}, {}
        for reading, wanted in self.reads.get(cell.name, []):
            for name, value in take(self.path(reading, seed), wanted).items():
                if isinstance(value, list):
                    lists[name], value = value, mean_of(value)
                metrics |= {} if value is None else {name: round(value, 5)}
        row = {"name": cell.name, "seed": seed, "settings": self.setting(cell), "metrics": metrics}
        row["lists"] = {name: values for name, values in lists.items() if name in metrics}
        return row | ({"table": cell.table} if cell.table else {})

    # -- from the command line to the page

    def main(self, declare, claims, columns, *, pivots=(), extra=None, draw=None, argv=None):
        """Run the recipe: make all cells, judge the claims, write results, figures and page, print tables.

        columns, pivots: see tables.tables. extra(self) -> more of the results, {name: JSON}, "notes" among
        them: lines of text below the tables. draw(results, stem) makes the figures <stem>_*.svg, of the
        results alone. argv: None is the command line's."""
        with one_line_ends():
            self.parse(sys.argv[1:] if argv is None else argv)
            file = self.results / f"{self.name}.json"
            if not self.args.table:
                declare(self)
                self.check(claims)
                results = self.run(claims, columns, extra, file)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, results, indent=None)
                for folder, (cell, _) in self.made.items():
                    if (folder, cell.makes) == (self.folder(cell, 0), "samples.jsonl"):
                        files = {str(folder / cell.makes): read_samples(folder / cell.makes)[:SHOWN]}
                        write_text(folder / "samples.html", page(files))
            results = read_results(file, self.world())
            if draw:
                draw(results, file.with_suffix(""))
            lines = tables(results, columns, pivots)
            print("\n".join([*lines, f"{file}, {write_page(file, self.title, results, lines)}"]))

    def parse(self, argv):
        parser = argparse.ArgumentParser(description=self.title, allow_abbrev=False)
        for flag, options in ARGUMENTS.items():
            parser.add_argument(flag, **{"default": self.defaults.get(flag), **options})
        parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
        self.args = args = parser.parse_args(argv)
        self.line = shlex.join(["python", "-m", f"minicot.recipes.{self.defaults['name']}", *argv])
        own = args.data == self.defaults["--data"]
        name = self.defaults["name"] + ("" if own else f"_{Path(args.data.partition(':')[0]).stem}")
        if args.only and args.name in (None, name) and not args.fast:
            raise InputError("--only is given; allowed: with --name or --fast, as a part is not the whole")
        self.name = name if args.name is None else args.name
        self.data, self.init, self.others = args.data, args.init, args.others
        self.toy = args.data in TOYS
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise InputError(f"--name is {self.name!r}; allowed: letters, digits, _ . -")
        try:
            self.train_flags = shlex.split(args.train_flags)
        except ValueError as error:
            raise InputError(f"--train-flags is {args.train_flags!r}: {error}") from None
        self.train, self.validation, self.test = args.splits
        fast = {} if not args.fast else self.fast if self.toy else self.elsewhere
        sizes, given = {**self.sizes, **fast}, dict(pair.partition("=")[::2] for pair in args.set)
        given |= {"seeds": args.seeds} if args.seeds else {}
        if unknown := given.keys() - sizes.keys():
            raise InputError(f"--set has {', '.join(sorted(unknown))}; allowed: {', '.join(sizes)}")
        for size, words in given.items():
            kind = type(sizes[size])
            try:
                sizes[size] = tuple(map(number, words.split(","))) if kind is tuple else kind(words)
            except ValueError:
                raise InputError(f"--set {size} is {words!r}; allowed: such as {sizes[size]!r}") from None
            if not all(value >= 0 for value in (sizes[size] if kind is tuple else [sizes[size]])):
                raise InputError(f"--set {size} is {words}; allowed: 0 or more")
        if min(args.jobs, sizes["seeds"]) < 1:
            raise InputError(f"--jobs is {args.jobs}, seeds {sizes['seeds']}; allowed: 1 or more")
        self.size = SimpleNamespace(**sizes)
        self.one_thread = args.jobs > 1
        self.root = Path("runs/recipes") / (self.name + ("-fast" if args.fast else ""))
        self.results = self.root / "results" if args.fast else self.results

    def check(self, claims):
        """Before the first cell: the splits are there and share nothing, the claims name what is read."""
        apart = self.toy and len({split.partition("[")[0] for split in self.args.splits}) == 3
        parts = [read_problems(self.data, split, limit=int(apart)) for split in self.args.splits]
        for i, j in itertools.combinations(range(3), 2):
            refuse_shared(parts[i], parts[j], f"--splits: {self.args.splits[j]} of {self.args.splits[i]}")
        names = [cell.name for cell in self.models]
        own = self.defaults["--data"]  # the data that the claims are about; others may lack cells
        for claim, (model, metric) in ((c, side) for c in claims if self.data == own for side in sides(c)):
            takes = [wanted for _, wanted in self.reads.get(model, [])]
            if None not in takes and not {*metric.split("+")} <= {name for one in takes for name in one}:
                raise InputError(f"claim {claim['id']} names {model}/{metric}, which no cell of this gives")
        if unknown := {*(self.args.only or ())} - {*names}:
            raise InputError(f"--only has {', '.join(sorted(unknown))}; allowed: {', '.join(names)}")
        self.models = [cell for cell in self.models if cell.name in (self.args.only or names)]

    def run(self, claims, columns, extra, before=Path()):
        """Make and read out all cells, judge the claims -> results. before: the results of the run before."""
        if self.args.device == "cpu":
            torch.set_num_threads(1)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            try:
                jobs = [(cell, s) for cell in self.models for s in range(self.size.seeds) if s < cell.seeds]
                # what the others wait for, side by side
                list(pool.map(lambda job: job[0].grid or job[0].at or self.path(*job), jobs))
                grid = self.choose(pool)
                cells = list(pool.map(lambda job: self.row(*job), jobs))
                more = extra(self) if extra else {}
            except BaseException as error:
                self.end(error)
                raise
        kept = {(model, part) for one in claims for model, metric in sides(one) for part in metric.split("+")}
        kept |= {(f"{model}@one-rate", part) for model, part in kept}
        shown = {one[0] for heads in columns.values() for one in heads.values() if isinstance(one, tuple)}
        for cell in cells:  # the numbers of single problems that a claim or a difference needs
            wanted = {name for name in cell["lists"] if name in shown or (cell["name"], name) in kept}
            cell["lists"] = {name: pack(cell["lists"][name]) for name in cell["lists"] if name in wanted}
        marks = [take(folder / "cell.json", None) for folder in self.made]
        results = {
            "command": self.line,
            "commits": sorted({mark["commit"] for mark in marks}),
            "device": torch.cuda.get_device_name()
            if self.args.device == "cuda"
            else f"CPU, {self.args.jobs} jobs of one thread",
            "minutes": round((time.perf_counter() - self.start) / 60, 1),
            "cell_minutes": round(sum(mark["minutes"] for mark in marks), 1),
            "world": self.world(),
            "looks": self.looks(before),
            "sizes": vars(self.size),
            "seeds": {cell.name: min(cell.seeds, self.size.seeds) for cell in self.models},
            "grid": grid,
            "extra": more,
            "cells": cells,
        }
        return results | {"claims": judge_all(results, claims)}

    def looks(self, file):
        """How often the recipe's runs of this name have met the test problems, {split: runs}: this one counts
        where it made a cell."""
        before = read_json(file).get("looks", {}) if file.is_file() else {}
        return before | {self.test: before.get(self.test, 0) + bool(self.worked)}

    def world(self):
        """A hash of the built-in world and of its base model; None of other data."""
        if not self.toy:
            return None
        told = [(p.question, p.answer, p.solution) for p in read_problems(self.data, "test", limit=50)]
        return hashlib.sha256(json.dumps([told, weights_digest(resolve(self.init))]).encode()).hexdigest()[
            :16
        ]


number = lambda words: int(words) if words.isdigit() else float(words)
DRAW = {"batch_size": 256}  # sequences decoded together
INPUTS = ("init", "model", "ref", "verifier", "samples", "data", "vision", "pruner")
