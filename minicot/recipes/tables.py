"""What a results file says: numbers, verdicts, tables and the page. experiment.py writes the file.

Results: {command, commits, device, minutes, cell_minutes, world, looks, sizes, grid, claims, extra, cells:
[{name, seed, settings, metrics: {name: number}, lists: {name: packed numbers of single problems}, table}]}.
"""

import re

from minicot.errors import InputError
from minicot.metrics import judge, paired_difference, ratio_values
from minicot.weights import read_json

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
INTERVAL = "{:+.1%} [{:+.1%}, {:+.1%}]"
BY_HAND = "<!-- written by hand, kept when the page is made again -->"


# ---- claims --------------------------------------------------------------------------------------


def claims(table, fields=("id", "metric", "ours", "other", "rule", "text")):
    """Lines "b1* | accuracy | aft | vft | up | text" -> a dict a claim. A star marks a primary claim.

    ours, other: names of models; "model/metric" where its metric is another one. rule: "up" | "down" (the
    difference ours - other), "level X, CONTROL", "within X, CONTROL" (see metrics.judge; CONTROL is a model,
    without which equal models would hold the claim), "below X" (the difference, or without an other ours
    alone, lies below X)."""
    lines = [[word.strip() for word in line.split("|")] for line in table.strip().splitlines()]
    found = [dict(zip(fields, words, strict=True)) for words in lines]
    allowed = r"up|down|(level|within) [.\d]+, \S+|below [-.\d]+"
    for one in found:
        assert re.fullmatch(allowed, one["rule"]), f"claim {one['id']}: {one['rule']}"
    return found


def sides(claim):
    """[(model, metric)] of a claim: ours, the other if there is one, the control if its rule names one."""
    control = claim["rule"].partition(", ")[2]
    named = [one.partition("/") for one in (claim["ours"], claim["other"], control) if one]
    return [(model, metric or claim["metric"]) for model, _, metric in named]


# ---- numbers of single problems, as the results file keeps them ----------------------------------


def pack(values):
    """A number a problem -> 0/1 as hex (a leading 1 keeps the zeros in front), pairs [right, of how many]
    below 36 as two characters each, anything else as it is."""
    if values and all(value in (0, 1) for value in values):
        return f"{int('1' + ''.join(str(int(value)) for value in values), 2):x}"
    if values and all(isinstance(value, list) and max(value) < len(DIGITS) for value in values):
        return "pairs " + "".join(DIGITS[number] for pair in values for number in pair)
    return [value if isinstance(value, list) else round(value, 4) for value in values]


def unpack(packed):
    if not isinstance(packed, str):
        return packed
    if packed.startswith("pairs "):
        digits = [DIGITS.index(digit) for digit in packed.removeprefix("pairs ")]
        return [list(pair) for pair in zip(digits[::2], digits[1::2])]
    return [int(bit) for bit in f"{int(packed, 16):b}"[1:]]


def per_problem(values):
    """Numbers whose mean is the metric; of [right, of how many] the ratio of the sums (linearised)."""
    return ratio_values(values) if values and isinstance(values[0], list) else values


def mean_of(values):
    """The metric; None where there is nothing to take a mean of: no problem, or no pair in any."""
    if not values or (isinstance(values[0], list) and not sum(whole for _, whole in values)):
        return None
    return sum(per_problem(values)) / len(values)


def numbers(results, model, metric):
    """(seeds, problems) numbers of a metric, whose mean it is; [] where the model was not run. InputError
    where a seed is missing. A metric of several ("direct+cot") is their mean."""
    if "+" in metric:
        parts = [numbers(results, model, part) for part in metric.split("+")]
        return [[sum(column) / len(parts) for column in zip(*rows)] for rows in zip(*parts)]
    rows = sorted((c for c in results["cells"] if c["name"] == model), key=lambda cell: cell["seed"])
    if [row["seed"] for row in rows] != list(range(len(rows))):
        raise InputError(f"cell {model} has the seeds {[row['seed'] for row in rows]}; allowed: 0, 1, 2, ...")
    lists = [row["lists"].get(metric) for row in rows]
    lists = [] if None in lists else [per_problem(unpack(packed)) for packed in lists]
    if len(lengths := {len(one) for one in lists}) > 1:
        raise InputError(f"{model}/{metric} is of {sorted(lengths)} problems; allowed: as many at each seed")
    return lists


def judge_all(results, all_claims):
    """The claims whose cells are there, judged; as "one_rate" again (or, where a run has none but those, that
    alone) where models of the claim have a twin "<model>@one-rate", whose rate was not chosen for it."""
    judged, models = [], {cell["name"] for cell in results["cells"]}
    for claim in all_claims:
        own = sides(claim)
        twins = [(twin if (twin := f"{model}@one-rate") in models else model, name) for model, name in own]
        found = judge_one(results, claim, own) or {}
        again = judge_one(results, claim, twins) if twins != own else None
        if found or again:
            judged.append(claim | found | ({"one_rate": again} if again else {}))
    return judged


def judge_one(results, claim, named):
    """The verdict of a claim on these [(model, metric)], over the seeds that all of them have; None where one
    is missing."""
    lists = [numbers(results, *one) for one in named]
    if not all(lists):
        return None
    if len(problems := {len(one[0]) for one in lists}) > 1:
        raise InputError(f"claim {claim['id']} compares numbers of {sorted(problems)} problems")
    seeds = min(map(len, lists))
    return judge(claim["rule"].partition(",")[0], *(one[:seeds] for one in lists))


# ---- tables and the page -------------------------------------------------------------------------


def markdown(head, rows):
    """Words of the head, rows of words -> the lines of a Markdown table, and an empty one."""
    line = lambda words: f"| {' | '.join(map(str, words))} |"
    return [line(head), "|---" * len(head) + "|", *map(line, rows), ""]


def entry(results, model, column):
    """One entry of a table. column: a format of the metrics' means over the seeds; (metric, other model), the
    paired difference; or a dict of words by the model's name."""
    if isinstance(column, dict):
        return column.get(model, "")
    if isinstance(column, tuple):
        ours, other = (numbers(results, name, column[0]) for name in (model, column[1]))
        there, seeds = ours and other and model != column[1], min(len(ours), len(other))
        return INTERVAL.format(*paired_difference(other[:seeds], ours[:seeds])) if there else ""
    rows = [cell["metrics"] for cell in results["cells"] if cell["name"] == model]
    try:
        return column.format(**{key: sum(row[key] for row in rows) / len(rows) for key in rows[0]})
    except KeyError:  # this model was not read out so
        return ""


def tables(results, columns, pivots=()):
    """Results -> the lines of their tables.

    columns: {head: {head: column}}: a table for each group of models, the first for those without a group.
    pivots: (head, model, names of rows, points): the model's metrics "name@point", a row a name, a column a
    point."""
    lines, first = [], next(iter(columns))
    for group, heads in columns.items():
        read = [c for c in results["cells"] if c["metrics"] and c.get("table", first) == group]
        rows = [
            (model, *(entry(results, model, one) for one in heads.values()))
            for model in dict.fromkeys(c["name"] for c in read)
        ]
        lines += markdown((group, *heads), rows) if rows else []
    there = {cell["name"] for cell in results["cells"]}
    for head, model, names, points in (pivot for pivot in pivots if pivot[1] in there):
        rows = [(name, *(entry(results, model, f"{{{name}@{p}:.1%}}") for p in points)) for name in names]
        lines += markdown((f"{model}: {head}", *(f"n = {point}" for point in points)), rows)
    head, rows = ["claim (* primary)", "difference [95 %]", "verdict"], []
    difference = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    shown = lambda one: [difference.format(**one), one["verdict"]] if "verdict" in one else ["", ""]
    twice = any("one_rate" in claim for claim in results["claims"])
    for claim in results["claims"]:
        again = shown(claim.get("one_rate", {}))
        rows.append([f"{claim['id']}. {claim['text']}", *shown(claim), *(again if twice else ())])
    head += ["all at one rate", "verdict"] if twice else []
    lines += markdown(head, rows) if rows else []
    scores = {}
    for one in results["grid"]:
        rate, *rest = (f"{flag} {value:g}" for flag, value in one["settings"].items())
        scores.setdefault(", ".join([one["name"], *rest]), {})[rate] = f"{one['score']:.1%}"
    rates = list(dict.fromkeys(rate for row in scores.values() for rate in row))
    rows = [(name, *(row.get(rate, "") for rate in rates)) for name, row in scores.items()]
    lines += markdown(("grid, first seed, validation", *rates), rows) if rows else []
    return lines + [line for note in results["extra"].get("notes", []) for line in (note, "")]


def read_results(file, world):
    """A results file, if it is whole and of this world (a hash; None: not of a built-in one)."""
    if not file.is_file():
        raise InputError(f"{file}: no such results; allowed: the recipe without --table makes them")
    results, seeds = read_json(file), {}
    try:
        if results["world"] != world:
            raise InputError(f"is of the world {results['world']}, this is {world} (see --data)")
        for cell in results["cells"]:
            seeds.setdefault(cell["name"], []).append(cell["seed"])
            for metric in cell["metrics"].keys() & cell["lists"].keys():
                numbers(results, cell["name"], metric)
        for name, found in seeds.items():
            if sorted(found) != list(range(results["seeds"][name])):
                raise InputError(f"model {name} has the seeds {found}; allowed: {results['seeds'][name]}")
        [
            results[name]
            for name in ("command", "commits", "device", "cell_minutes", "looks", "grid", "extra", "claims")
        ]
    except KeyError as error:
        raise InputError(f"{file}: has no {error}; run the recipe again") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: {error}; run the recipe again") from None
    return results


def write_page(file, title, results, lines):
    """The page of a results file: title, how it was made, tables, figures; what was written by hand below
    them is kept -> its path."""
    page, by_hand = file.with_suffix(".md"), "\n"
    if page.is_file():
        _, mark, by_hand = page.read_text().partition(BY_HAND)
        if not mark:
            raise InputError(f"{page}: its hand-written part is gone; allowed: below the line {BY_HAND}")
    others = tuple(f"{one.stem}_" for one in file.parent.glob(f"{file.stem}_*.json"))  # aft_4000 beside aft
    figures = [
        one for one in sorted(file.parent.glob(f"{file.stem}_*.svg")) if not one.name.startswith(others)
    ]
    figures = [f"![{one.stem}]({one.name})" for one in figures]
    sizes = ", ".join(f"{size} {value}" for size, value in results["sizes"].items())
    looks = ", ".join(f"{split} {count}" for split, count in results["looks"].items())
    made = (
        f"`{results['command']}`, {results['device']}; {results['cell_minutes']} minutes of work, commits "
        f"{', '.join(results['commits'])}. Numbers of single problems are in [{file.name}]({file.name}). "
        f"Sizes: {sizes}. Looks at the test problems: {looks}."
    )
    page.write_text("\n".join([f"# {title}", "", made, "", *lines, *figures, "", BY_HAND]) + by_hand)
    return page
