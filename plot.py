"""Tables and figures from eval.json files, and loss curves from log.jsonl files.

    python plot.py out/tiny-fope-s0                         one run: loss.png, eval.md, eval.png
    python plot.py out/tiny-*/ --out=compare                many runs in one table and one figure of each kind
    python plot.py out/*/eval.json --title="FoPE extrapolates better than RoPE"

A run folder stands for its eval.json, eval-logn*.json and log.jsonl. Runs named NAME-s0, NAME-s1, .. are seeds of one
run. The table gives their mean and, in parentheses, their range. A single seed's accuracy comes with its 95 % interval
in brackets.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path

import numpy as np

# The seeds of one run agree in these fields of eval.json, and in the config except for fields that change no result.
MEASURED = ("train_len", "step", "data", "behind_text", "scaling", "scale", "logn", "eval_tokens", "trials", "dtype")
SEEDS_MAY_DIFFER = {"seed", "out", "resume", "micro_tokens", "log_every", "eval_every", "save_every", "eval_tokens",
                    "eval_trials", "device", "dtype", "compile", "wandb"}  # fmt: skip
LOOK = {"font.size": 13, "savefig.dpi": 200, "axes.spines.top": False, "axes.spines.right": False}


def read_result(path: Path) -> dict:
    """An eval.json and, as "file", its path. A file of another name names the run. Raises ValueError."""
    try:
        result = json.loads(path.read_text())
        result["trials"], result["train_len"], result["config"]["seed"]
        if len({len(result[name]) for name in ("lengths", "passkey", "perplexity")}) > 1:
            raise ValueError
        name = result["name"] if path.name.startswith("eval") else path.stem
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a whole result of eval_passkey.py: name another, or evaluate again") from error
    return result | {"name": name, "file": str(path)}


def read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """{"loss": [(step, nats), ..], "val_loss": [..]} from a log.jsonl. Raises ValueError."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        records = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # half a line: a killed run left it, or train.py is writing it
                continue
            if "resumed" in record:  # the lines beyond that step are written again
                records = [r for r in records if r["step"] <= record["resumed"]]
            else:
                records.append(record)
        curves = {kind: [(r["step"], r[kind]) for r in records if kind in r] for kind in ("loss", "val_loss")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a log of train.py: name a log.jsonl or a run folder") from error
    if not curves["loss"]:
        raise ValueError(f"{path} has no loss yet: wait until train.py has logged a step")
    return curves


# ---------------------------------------------------------------------------------------------------------------------
# The table


def wilson(right: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson 1927). Unlike the normal interval, it has a width at 0 and at 1 too."""
    z, p = 1.96, right / trials
    center, spread = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return max((center - spread) / (1 + z * z / trials), 0.0), min((center + spread) / (1 + z * z / trials), 1.0)


def accuracy(result: dict) -> list[float]:
    """The passkey accuracy at each length."""
    return [right / result["trials"] for right in result["passkey"]]


def differences(a: dict, b: dict) -> list[str]:
    """What keeps two results from being seeds of one run. A field that only one of them has is an older version's."""
    found = [f"{k} {a[k]} and {b[k]}" for k in MEASURED if k in a and k in b and a[k] != b[k]]
    for k in sorted(a["config"].keys() & b["config"].keys() - SEEDS_MAY_DIFFER):
        # init_from is a path: each seed continues the run of its own seed.
        ours, theirs = (re.sub(r"-s\d+", "", str(result["config"][k])) for result in (a, b))
        found += [f"--{k} {ours} and {theirs}"] * (ours != theirs)
    return found


def group(results: list[dict]) -> dict[str, list[dict]]:
    """The seeds of each run, by its name without -sSEED. Raises ValueError for results that must not be averaged."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        if result["lengths"] != results[0]["lengths"]:
            both, a, b = f"{results[0]['file']} and {result['file']}", results[0]["lengths"], result["lengths"]
            raise ValueError(f"{both} have different lengths, {a} and {b}: use the same --lengths")
        seeds = groups.setdefault(re.sub(r"-s\d+$", "", result["name"]), [])
        for other in seeds:
            both = f"{other['file']} and {result['file']}"
            if other["config"]["seed"] == result["config"]["seed"]:
                raise ValueError(f"{both} have the same name and seed {other['config']['seed']}: leave one out")
            if unlike := differences(other, result):
                raise ValueError(f"{both} are not two seeds of one run: {', '.join(unlike)}; leave one out")
        seeds.append(result)
    return groups


def table(results: list[dict]) -> str:
    """Perplexity and passkey accuracy of each group at each length, in Markdown. Raises ValueError as group() does."""
    groups, lengths = group(results), results[0]["lengths"]
    rows = ["| | seeds | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 2) + "|"]

    def add(name: str, values: list[list[float]], intervals=()) -> None:
        """A row from values[seed][length]. intervals[length] belong to a single seed."""
        cells = [f"{np.mean(seeds):.2f}" for seeds in zip(*values)]
        if len(values) > 1:
            cells = [f"{cell} ({min(seeds):.2f}-{max(seeds):.2f})" for cell, seeds in zip(cells, zip(*values))]
        elif intervals:
            cells = [f"{cell} [{low:.2f}, {high:.2f}]" for cell, (low, high) in zip(cells, intervals)]
        rows.append(f"| {name} | {len(values)} | " + " | ".join(cells) + " |")

    for name, runs in groups.items():
        add(f"{name}: perplexity", [run["perplexity"] for run in runs])
    for name, runs in groups.items():
        if all(run.get("perplexity_ratio") for run in runs):
            add(f"{name}: ratio to perplexity on own data", [run["perplexity_ratio"] for run in runs])
    for name, runs in groups.items():
        intervals = [wilson(right, runs[0]["trials"]) for right in runs[0]["passkey"]]
        add(f"{name}: passkey", [accuracy(run) for run in runs], intervals)
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------------------------------
# The figures


def best_effort(draw):
    """A figure never costs a result: where matplotlib is missing or fails, draw() prints one line and returns False."""

    @functools.wraps(draw)
    def attempt(*args, **kwargs) -> bool:
        try:
            import matplotlib

            with matplotlib.rc_context(LOOK):
                draw(*args, **kwargs)
        except Exception as error:  # a missing package, a broken one, a full disk: each raises its own
            with contextlib.suppress(OSError):
                print(f"no figure: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
            return False
        return True

    return attempt


def panels(count: int, lines: int, title: str):
    """A figure with its axes in one column, so that a phone can show it, and room for the labels of the lines."""
    from matplotlib.figure import Figure

    fig = Figure((6.4, count * max(3.4, 0.9 + 0.3 * lines)), layout="constrained")
    fig.suptitle(textwrap.fill(title, 50), fontsize=14, fontweight="bold")
    return fig, fig.subplots(count, squeeze=False)[:, 0]


def style(name: str, i: int, logn: bool = False) -> dict:
    """FoPE is the thick colored line, RoPE black. The others are thin and grey, with a marker of their own.

    logn: the figure has lines of --logn. Then only these are thick.
    """
    method = re.fullmatch(r"([^-]+-)?(fope|rope)(-on-.+|-behind-text)?(-logn[\d.]+)?(-s\d+)?", name)
    if method is None:
        return dict(color="0.45", linewidth=1, marker="^Dv<>Pd*Xp"[i % 10], markersize=5, zorder=3)
    rope, thin = method[2] == "rope", logn and not method[4]
    if rope:
        return dict(color="black", linewidth=1 if thin else 1.8, marker="s", markersize=5, zorder=4)
    look = dict(color="#d55e00", marker="o", zorder=2)  # below: a thick line would hide the others
    return look | (dict(linewidth=1.2, markersize=5) if thin else dict(linewidth=3.5, markersize=7))


def label_ends(axis, lines: list) -> None:
    """Write each line's label to the right of its last finite point. Labels that would overlap are moved apart."""
    axis.autoscale_view()
    gap = 0.34 * len(axis.figure.axes) / axis.figure.get_figheight()  # of the axis' height
    to_axes = axis.transData + axis.transAxes.inverted()
    ends = [(line, line.get_xydata()[np.isfinite(line.get_ydata())]) for line in lines]
    ends = sorted((end for end in ends if len(end[1])), key=lambda end: end[1][::-1, 1].tolist())  # lowest first
    heights = [to_axes.transform(points[-1])[1] for _, points in ends]
    for i in range(1, len(heights)):  # push up from the lowest, then down from the top of the axis
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], 1 - gap * (len(heights) - 1 - i))
    joint = dict(arrowstyle="-", color="0.7", shrinkB=4, relpos=(0, 0.5))
    for (line, points), height in zip(ends, heights):
        place = dict(xytext=(1.04, height), textcoords="axes fraction", va="center")
        axis.annotate(line.get_label(), points[-1], color=line.get_color(), arrowprops=joint, **place)


@best_effort
def figure(results: list[dict], path: Path, title="", xlabel="length in tokens", varied=None, reference=()) -> None:
    """Passkey accuracy and perplexity against length: each group's mean, and a band over the range of its seeds.

    With `varied` {group: value}, both are drawn against that value instead, with a line for each length. `reference`:
    results of other runs at the same lengths, drawn dashed to compare with.
    """
    from matplotlib.ticker import LogFormatter

    groups, lengths = group(results), results[0]["lengths"]
    groups |= {f"{name} reference": runs for name, runs in group(list(reference)).items()}
    train_lens = sorted({result["train_len"] for result in results})
    fig, axes = panels(2, len(lengths if varied else groups), title)
    for axis, ylabel in zip(axes, ("passkey accuracy", "validation perplexity")):
        curves: dict[str, dict] = {}  # label: x: one value per seed
        for name, runs in groups.items():
            for run in runs:
                for length, value in zip(lengths, accuracy(run) if axis is axes[0] else run["perplexity"]):
                    label, x = f"{name} ({len(runs)} seed{'s' * (len(runs) > 1)})", length
                    if varied:
                        label, x = f"{length} tokens" + " = N" * (train_lens == [length]), varied[name]
                    curves.setdefault(label, {}).setdefault(x, []).append(value)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        if varied:
            axis.set_xticks(list(varied.values()))
        else:
            ticks = sorted({*lengths, *train_lens})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{x}\n= N" if x in train_lens else str(x) for x in ticks])
            for train_len in train_lens:
                axis.axvline(train_len, color="0.6", linewidth=1, linestyle=":")
        if axis is axes[0]:
            axis.set_ylim(-0.03, 1.03)
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        lines = []
        for i, (label, points) in enumerate(curves.items()):
            look = style(label.split()[0], i, any("-logn" in name for name in groups))
            if " reference" in label:
                look |= dict(linewidth=1, linestyle="--")
            lines += axis.plot(points.keys(), [np.mean(seeds) for seeds in points.values()], label=label, **look)
            low, high = zip(*((min(seeds), max(seeds)) for seeds in points.values()))
            axis.fill_between(list(points), low, high, color=look["color"], alpha=0.2, linewidth=0)
        label_ends(axis, lines)
    fig.savefig(path)


@best_effort
def loss_figure(logs: list[Path], path: Path, title: str = "") -> None:
    """Training and validation loss against the step, for each log.jsonl; its folder names the run."""
    fig, (axis,) = panels(1, len(logs), title)
    axis.set(xlabel="step", ylabel="loss (nats per token)")
    axis.set_title("pale: training batches; with markers: validation", fontsize=11)
    lines = []
    for i, log in enumerate(logs):
        name, curves = log.resolve().parent.name, read_log(log)
        look = style(name, i)
        (last,) = axis.plot(*zip(*curves["loss"]), label=name, color=look["color"], linewidth=1, alpha=0.5)
        if curves["val_loss"]:
            (last,) = axis.plot(*zip(*curves["val_loss"]), label=name, **look)
        lines.append(last)
    label_ends(axis, lines)
    fig.savefig(path)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"plot.py: {message}")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, eval.json files or log.jsonl files")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the one that holds all runs)")
    parser.add_argument("--title", default="", help="the result that the figures show")
    args = parser.parse_args(argv)
    files = []
    for path in args.runs:
        inside = [*path.glob("eval.json"), *sorted(path.glob("eval-logn*.json")), *path.glob("log.jsonl")]
        if not path.exists():
            parser.error(f"there is no {path}: name the folder of a run, or a file in it")
        if path.is_dir() and not inside:
            parser.error(f"{path} has no eval.json and no log.jsonl: name the folder of a run")
        if [file.name for file in inside] == ["log.jsonl"]:
            print(f"{path} has no eval.json: only its loss is drawn")
        files += inside or [path]
    try:
        logs = [file for file in files if file.suffix == ".jsonl"]
        results = [read_result(file) for file in files if file not in logs]
        for log in logs:
            read_log(log)
        text = table(results) if results else ""
        out = args.out or Path(os.path.commonpath([file.resolve().parent for file in files]))
        out.mkdir(parents=True, exist_ok=True)
        if results:
            (out / "eval.md").write_text(text + "\n")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    drawn = {"eval.md": True} if results else {}
    if results:
        drawn["eval.png"] = figure(results, out / "eval.png", args.title)
    if logs:
        drawn["loss.png"] = loss_figure(logs, out / "loss.png", args.title)
    written = ", ".join(f"{out}/{name}" for name, well in drawn.items() if well)
    print(f"{text}\n\nwritten: {written}".strip())
    sys.exit(not all(drawn.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
