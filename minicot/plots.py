"""The figures. matplotlib is imported only here, and only when a figure is drawn."""

import io
import json
from pathlib import Path

import numpy as np


def figure(width=6, height=3.5, panels=1):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "path.simplify_threshold": 1.0, "svg.hashsalt": "minicot"}
    )  # small files
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(width, height), layout="constrained", sharex=panels > 1)


def save(fig, path):
    from matplotlib import pyplot

    svg = io.StringIO()
    fig.savefig(svg, format="svg", metadata={"Date": None})
    pyplot.close(fig)
    Path(path).write_text("".join(line.strip() + "\n" for line in svg.getvalue().splitlines()))  # no indents


def loss_curve(lines, path):
    """Training loss over steps (metrics.jsonl as a list of dicts) -> an SVG; the bold line is a running
    mean."""
    fig, axes = figure()
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    window = max(1, len(losses) // 40)
    means = [
        sum(losses[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window)) for i in range(len(losses))
    ]
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window + 1} steps")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend(frameon=False)
    save(fig, path)


def differences(rows, label, path):
    """(name, difference, low, high) rows -> horizontal intervals around 0; differences of rates, drawn in
    points."""
    fig, axes = figure(6.5, 1 + 0.26 * len(rows))
    for y, (_, difference, low, high) in enumerate(rows):
        colour = "tab:green" if low > 0 else "tab:red" if high < 0 else "tab:gray"
        axes.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=2)
        axes.plot(100 * difference, y, "o", color=colour, markersize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    axes.set(xlabel=f"{label} (points, 95 % interval)")
    save(fig, path)


def points(rows, labels, path):
    """(name, x, y) rows of rates -> a dot each, its name beside it; labels of the two axes."""
    fig, axes = figure(6.5, 4.5)
    for name, x, y in rows:
        axes.plot(100 * x, 100 * y, "o", color="tab:blue", markersize=5)
        axes.annotate(name, (100 * x, 100 * y), xytext=(5, 4), textcoords="offset points")
    axes.margins(0.15)
    axes.set(**{f"{axis}label": f"{label} (%)" for axis, label in zip("xy", labels)})
    save(fig, path)


def score_histograms(pools, path):
    """{model: (scores of right responses, scores of wrong ones)} -> one panel a model on shared axes."""
    fig, panels = figure(3.2 * len(pools), 3, len(pools))
    everything = sorted(s for pool in pools.values() for scores in pool for s in scores)
    low = everything[len(everything) // 100]  # the lowest hundredth would squeeze the rest
    bins = [low + (everything[-1] - low) * i / 40 for i in range(41)]
    shape = dict(histtype="stepfilled", alpha=0.55, density=True)
    for axes, (name, both) in zip(panels, pools.items()):
        axes.hist(both, bins, color=["tab:green", "tab:red"], label=["right", "wrong"], **shape)
        axes.set(title=name, xlabel="score (mean log-probability a token)", yticks=[])
    panels[0].legend(frameon=False)
    save(fig, path)


def smooth(log, keys, *, window=15, points=60):
    """metrics.jsonl -> {key: [[step, running mean over `window` steps]]}, at most about `points` each."""
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    found = {}
    for key in keys:
        there = [line for line in lines if line.get(key) is not None]
        steps, values = ([line[name] for line in there] for name in ("step", key))
        means = [sum(values[max(0, i - window) : i + 1]) / min(window + 1, i + 1) for i in range(len(values))]
        found[key] = [[step, round(mean, 4)] for step, mean in zip(steps, means)][
            :: max(1, len(steps) // points)
        ]
    return found


def collapse(training, accuracy, path):
    """Scores of right (solid) and wrong (dashed) responses over training, one panel a name; beside them the
    accuracy over training. training, accuracy: {name: what `smooth` made of its log}."""
    fig, (*panels, last) = figure(3 * len(training) + 3, 3, len(training) + 1)
    colours = dict(zip(training, ("tab:red", "tab:blue", "tab:green", "tab:orange")))
    values = [value for history in training.values() for key in history for _, value in history[key]]
    room = 0.05 * (max(values) - min(values))
    for (name, history), axes in zip(training.items(), panels):
        for key, style in (("score_right", "-"), ("score_wrong", "--")):
            axes.plot(*np.array(history[key]).reshape(-1, 2).T, style, color=colours[name], label=key[6:])
        axes.set(title=name, xlabel="step", ylim=(min(values) - room, max(values) + room))
    panels[0].set(ylabel="score (nats a token)")
    panels[0].legend(frameon=False)
    for name, history in accuracy.items():
        steps, shares = np.array(history["held_out_accuracy"]).T
        last.plot(steps, 100 * shares, "o-", color=colours[name], markersize=4, label=name)
    last.set(title="answers", xlabel="step", ylabel="accuracy (%)")
    save(fig, path)


def over_steps(training, labels, path):
    """{model: what `smooth` made of its log} -> a panel for each {key of the log: label}, a line a model."""
    fig, panels = figure(3 * len(labels), 3, len(labels))
    for axes, (key, label) in zip(panels, labels.items()):
        for name, history in training.items():
            axes.plot(*np.array(history[key]).reshape(-1, 2).T, label=name)
        axes.set(xlabel="step", title=label)
    panels[0].legend(frameon=False)
    save(fig, path)


def step_scores(chains, path):
    """{title: {steps: texts, scores: of each, wrong: its first wrong step or None}} -> a bar a step."""
    fig, panels = figure(
        7 * len(chains), 0.8 + 0.3 * max(len(one["steps"]) for one in chains.values()), len(chains)
    )
    for axes, (title, one) in zip(panels, chains.items()):
        wrong = len(one["steps"]) if one["wrong"] is None else one["wrong"]
        colours = ["tab:green" if j < wrong else "tab:red" for j in range(len(one["steps"]))]
        axes.barh(range(len(colours)), one["scores"], color=colours)
        axes.set_yticks(range(len(colours)), one["steps"], fontsize=8)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), title=title, xlabel="green: right so far")
    save(fig, path)


def best_of_n(rows, path, xlabel="samples n"):
    """Metrics of models, those called "<way of choosing>@<n>" -> accuracy over n, a line a way: means over
    the rows that have them."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row if "@" in name):
        way, n = name.split("@")
        values = [100 * row[name] for row in rows if name in row]
        found.setdefault(way, []).append((int(n), sum(values) / len(values)))
    fig, axes = figure(6, 4)
    for way, points in found.items():
        axes.plot(*zip(*sorted(points)), marker="o", label=way)
    ticks = sorted({n for points in found.values() for n, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.set(xlabel=xlabel, ylabel="accuracy (%)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(fig, path)


def log_ratios_along(chain, path):
    """A wrong chain {tokens, ratios: log pi - log pi_ref of each, wrong: its first wrong step} -> a bar a
    token."""
    tokens, values = [token.replace("\n", "/") for token in chain["tokens"]], chain["ratios"]
    fig, axes = figure(max(6, 0.22 * len(tokens)), 3)
    axes.bar(range(len(values)), values, color=["tab:green" if value > 0 else "tab:red" for value in values])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
    axes.set(ylabel="log-ratio (nats)", title=f"step {chain['wrong'] + 1} is the first wrong one")
    save(fig, path)
