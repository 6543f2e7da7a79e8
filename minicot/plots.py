"""The figures. matplotlib is imported only here, and only when a figure is drawn."""

import io
from pathlib import Path


def figure(width=6, height=3.5, panels=1):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "path.simplify_threshold": 1.0})  # small files
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


def score_histograms(pools, path):
    """{model: (scores of right responses, scores of wrong ones)} -> one panel a model on shared axes."""
    fig, panels = figure(3.2 * len(pools), 3, len(pools))
    everything = sorted(s for pool in pools.values() for scores in pool for s in scores)
    low = everything[len(everything) // 100]  # the lowest hundredth would squeeze the rest
    bins = [low + (everything[-1] - low) * i / 40 for i in range(41)]
    for axes, (name, (right, wrong)) in zip(panels, pools.items()):
        axes.hist(
            [right, wrong],
            bins,
            histtype="stepfilled",
            alpha=0.55,
            density=True,
            color=["tab:green", "tab:red"],
            label=["right", "wrong"],
        )
        axes.set(title=name, xlabel="score (mean log-probability a token)", yticks=[])
    panels[0].legend(frameon=False)
    save(fig, path)


def scores_over_training(histories, path, window=15):
    """{method: metrics.jsonl lines of align.py} -> running means of the scores of right (solid) and wrong
    (dashed)."""
    fig, axes = figure()
    for (name, lines), colour in zip(histories.items(), ("tab:red", "tab:blue", "tab:green", "tab:orange")):
        for key, style in (("score_right", "-"), ("score_wrong", "--")):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            means = [
                sum(v for _, v in points[max(0, i - window) : i + 1])
                / len(points[max(0, i - window) : i + 1])
                for i in range(len(points))
            ]
            thin = slice(None, None, max(1, len(points) // 60))  # a figure of some kilobytes
            steps = [step for step, _ in points]
            label = name if style == "-" else None
            axes.plot(steps[thin], means[thin], style, color=colour, label=label)
    axes.set(xlabel="step", ylabel="score (nats a token); right -, wrong - -")
    axes.legend(frameon=False)
    save(fig, path)


def best_of_n(seeds, path):
    """[{n: {way of choosing: share of each problem}}, one a seed] -> accuracy over n, a line a way."""
    fig, axes = figure(6, 4)
    for way in next(iter(seeds[0].values())):
        shares = [[sum(seed[n][way]) / len(seed[n][way]) for n in seed] for seed in seeds]
        means = [100 * sum(column) / len(seeds) for column in zip(*shares)]
        axes.plot([int(n) for n in seeds[0]], means, marker="o", label=way)
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(n) for n in seeds[0]], list(seeds[0]))
    axes.set(xlabel="samples n", ylabel="accuracy (%)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(fig, path)


def log_ratios_along(tokens, path, title=""):
    """[(token, log pi - log pi_ref)] along one response -> a bar a token."""
    fig, axes = figure(max(6, 0.22 * len(tokens)), 3)
    values = [value for _, value in tokens]
    axes.bar(range(len(values)), values, color=["tab:green" if value > 0 else "tab:red" for value in values])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(tokens)), [text for text, _ in tokens], rotation=90, fontsize=8)
    axes.set(ylabel="log-ratio (nats)", title=title)
    save(fig, path)
