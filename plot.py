"""Tables and figures from the records of eval_passkey.py, and loss curves from the logs of train.py.

    python plot.py out/tiny-fope-s0                         one run: loss.png, eval.md, eval.png
    python plot.py out/tiny-*/ --out=compare                many runs in one table and one figure of each kind

A record is one line of eval.jsonl: a model's configuration, the conditions of a measurement, and what was measured.
Records that agree in everything but the seed and the length belong to one run. The table gives the mean over the seeds
and, in parentheses, their range. A single seed's accuracy comes with its 95% interval in brackets.
"""

import contextlib
import json
import math
import os
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np

from common import Parser, UserError, command, replace_file, say

# The measured fields of a record: the name of each, and whether it counts right trials. To add one, fill it in
# eval_passkey.measure() and name it here. Records without it stay valid.
METRICS = {
    "perplexity": ("perplexity", False),
    "loss": ("loss", False),  # in place of perplexity, as in the paper's Table 2
    "ratio": ("ratio to perplexity on the training text", False),
    "right": ("passkey accuracy", True),
}
NO_EFFECT = {  # fields that do not tell two runs apart, because they change no result beyond rounding
    *("run", "out", "resume", "micro_tokens", "recompute", "compile", "log_every", "eval_every", "save_every", "wandb"),
    *("eval_trials", "train_eval_tokens", "train_device", "device", "threads", "torch", "right_by_depth"),
}
LOOKS = {  # of the runs that a figure is about; the others are thin
    "fope": dict(color="#d55e00", linewidth=3.5, marker="o", markersize=7, zorder=2),  # below: it would hide the others
    "rope": dict(color="black", linewidth=1.8, marker="s", markersize=5, zorder=4),
}
OFF = {"logn": 0, "scaling": "none", "committed": None}  # values that no label mentions

# ---------------------------------------------------------------------------------------------------------------------
# Records, tables


def read_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines. A broken line, which a full disk or a killed run left, is skipped."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def read(path: Path) -> list[dict]:
    """The records in an eval.jsonl. Raises UserError."""
    return [line for line in read_lines(path) if {"seed", "length", "trials"} <= line.keys()]


def read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """{"loss": [(step, nats), ..], "val_loss": [..]} from a log.jsonl."""
    lines = []
    for line in read_lines(path):
        if "resumed" in line:  # the lines beyond that step are written again
            lines = [earlier for earlier in lines if earlier["step"] <= line["resumed"]]
        elif "step" in line:
            lines.append(line)
    return {kind: [(line["step"], line[kind]) for line in lines if kind in line] for kind in ("loss", "val_loss")}


def identity(record: dict, *without: str) -> tuple:
    """What tells a record from other records, apart from what was measured: (field, value) pairs, sorted by field."""
    left_out = NO_EFFECT | METRICS.keys() | set(without)
    return tuple(sorted((field, value) for field, value in record.items() if field not in left_out))


def any_dtype(record: dict) -> dict:
    """The record with dtypes "any", for a mean over seeds that were measured in float32 and in bfloat16."""
    return record | {"dtype": "any", "train_dtype": "any"}


def group(records: list[dict]) -> dict[str, list[dict]]:
    """The records of each run, by its label. Of those that differ in measured numbers alone, the last counts."""
    latest = {(record.get("run"), identity(record)): record for record in records}.values()
    groups: dict[tuple, list[dict]] = {}
    for record in sorted(latest, key=lambda record: (record["seed"], record["length"])):
        groups.setdefault(identity(record, "seed", "length"), []).append(record)
    for key, some in list(groups.items()):
        if len({(record["seed"], record["length"]) for record in some}) < len(some):
            # Two folders have one configuration and one seed: the code was changed between them.
            for record in groups.pop(key):
                groups.setdefault((*key, ("run", record.get("run"))), []).append(record)
    runs = [dict(key) for key in groups]
    differ = sorted({f for run in runs for f in run if any(run[f] != other.get(f) for other in runs)} - {"pos"})
    for field in sorted(reversed(differ), key=lambda field: field in OFF):
        fewer = [other for other in differ if other != field]
        if len({(*pick(run, fewer), run.get(field)) for run in runs}) == len({pick(run, fewer) for run in runs}):
            differ = fewer  # what the other fields imply is not mentioned, nor is what most runs have
    usual = {}
    for field in differ:
        value, count = Counter(run.get(field) for run in runs).most_common(1)[0]
        usual[field] = OFF.get(field, value if 2 * count > len(runs) else None)

    def label(run: dict) -> str:
        parts = [str(run["pos"])]
        for field in (field for field in differ if run.get(field) != usual[field]):
            value = run.get(field)
            words = f"{field} {value}".removesuffix(".0")
            parts.append(words if not isinstance(value, bool) else field if value else f"no {field}")
        return ", ".join(parts)

    def order(pair) -> list:
        values = pick(pair[0], sorted(["pos", *differ], key=lambda field: (field != "logn", field != "pos")))
        return [(str(type(value)), value) for value in values]

    return {label(run): some for run, some in sorted(zip(runs, groups.values()), key=order)}


def pick(run: dict, fields: list[str]) -> tuple:
    return tuple(run.get(field) for field in fields)


def wilson(right: int, trials: int) -> tuple[float, float]:
    """The 95% interval of an accuracy (Wilson 1927). Unlike the normal interval, it has a width even at 0 and at 1."""
    z, p = 1.96, right / trials
    center, spread = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return max((center - spread) / (1 + z * z / trials), 0.0), min((center + spread) / (1 + z * z / trials), 1.0)


def values_of(records: list[dict], metric: str) -> list[float]:
    """The values of a metric, one for each record that has the field.

    If one of the seeds was not measured (None), the list is empty: a mean over the other seeds would mislead.
    """
    some = [record for record in records if metric in record]
    if any(record[metric] is None for record in some):
        return []
    return [record[metric] / (record["trials"] if METRICS[metric][1] else 1) for record in some]


def cell(records: list[dict], metric: str) -> str:
    """Mean and range of a metric over records that differ in the seed. A single accuracy gets its interval instead."""
    values = values_of(records, metric)
    if not values:
        return "not measured" if any(metric in record for record in records) else ""
    if len(values) > 1:
        return f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"
    (record,) = (record for record in records if metric in record)
    interval = " [{:.2f}, {:.2f}]".format(*wilson(record[metric], record["trials"])) if METRICS[metric][1] else ""
    return f"{values[0]:.2f}{interval}"


def table(records: list[dict]) -> str:
    """Every metric of every run at each length, in Markdown."""
    groups, lengths = group(records), sorted({record["length"] for record in records})
    rows = ["| | seeds | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 2) + "|"]
    for metric, (name, _) in METRICS.items():
        for label, some in groups.items():
            cells = [cell([record for record in some if record["length"] == length], metric) for length in lengths]
            if any(cells):
                rows.append(f"| {label}: {name} | {len({r['seed'] for r in some})} | {' | '.join(cells)} |")
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def panels(count: int, lines: int, title: str, subtitle: str):
    """A figure with its axes in one column, so that a phone can show it, and room for the labels of the lines."""
    from matplotlib.figure import Figure

    fig = Figure((6.4, count * max(3.4, 0.9 + 0.3 * lines)), layout="constrained")
    fig.suptitle(textwrap.fill(title, 50), fontsize=14, fontweight="bold")
    axes = fig.subplots(count, squeeze=False)[:, 0]
    axes[0].set_title(subtitle, fontsize=11)
    return fig, axes


def label_ends(axis) -> None:
    """Write each line's label to the right of its last finite point. Labels that would overlap are moved apart."""
    axis.autoscale_view()
    gap = 0.34 * len(axis.figure.axes) / axis.figure.get_figheight()  # as a share of the axis height
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    ends = [(line, line.get_xydata()[np.isfinite(line.get_ydata())]) for line in lines]
    ends = sorted((end for end in ends if len(end[1])), key=lambda end: end[1][::-1, 1].tolist())  # lowest first
    heights = [(axis.transData + axis.transAxes.inverted()).transform(points[-1])[1] for _, points in ends]
    for i in range(1, len(heights)):  # push up from the lowest, then down from the top of the axis
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], 1 - gap * (len(heights) - 1 - i))
    for (line, points), height in zip(ends, heights):
        place = dict(xytext=(1.04, height), textcoords="axes fraction", va="center", fontsize=12)
        joint = dict(arrowstyle="-", color="0.7", shrinkB=4, relpos=(0, 0.5))
        axis.annotate(line.get_label(), points[-1], color=line.get_color(), arrowprops=joint, **place)


def figure(records: list[dict], title: str = ""):
    """Each metric against length: the mean of each run, and a band over the range of its seeds.

    Thin lines are committed records (dashed), variants of one embedding and, beside log-n scaling, runs without it.
    """
    from matplotlib.ticker import LogFormatter

    groups, highest = group(records), max(record["logn"] for record in records)
    own = [some[0] for some in groups.values() if not some[0].get("committed")]
    variants = Counter((record["pos"], record["logn"]) for record in own)
    seeds = sorted({len({record["seed"] for record in some}) for some in groups.values()})
    subtitle = f"mean of {seeds[0]}{f' to {seeds[-1]}' * (len(seeds) > 1)} seeds; band: lowest to highest"
    shown = [record for some in groups.values() for record in some]
    metrics = [metric for metric in reversed(METRICS) if any(values_of([record], metric) for record in shown)]
    fig, axes = panels(len(metrics), len(groups), title, subtitle if seeds[-1] > 1 else "")
    lengths, train_lens = (sorted({record[field] for record in records}) for field in ("length", "train_len"))
    for axis, (metric, (name, counted)) in zip(axes, ((metric, METRICS[metric]) for metric in metrics)):
        for i, (label, some) in enumerate(groups.items()):
            points = {length: values_of([r for r in some if r["length"] == length], metric) for length in lengths}
            points = {length: values for length, values in points.items() if values}
            pos, logn = some[0]["pos"], some[0]["logn"]
            look = LOOKS.get(pos, {"color": "0.45"})
            if pos not in LOOKS or logn < highest or variants[pos, logn] > 1 or some[0] not in own:
                look = dict(color=look["color"], linewidth=1, marker="^Dv<>Pd*Xp"[i % 10], markersize=5, zorder=3)
            look = look | dict(linestyle="--" if some[0].get("committed") else "-")
            axis.plot(points.keys(), [np.mean(values) for values in points.values()], label=label, **look)
            low, high = ([end(values) for values in points.values()] for end in (min, max))
            axis.fill_between(list(points), low, high, color=look["color"], alpha=0.2, linewidth=0)
        ticks = sorted({*lengths, *train_lens})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{n}\n= N" if n in train_lens else str(n) for n in ticks])
        axis.set(xlabel="length in tokens", ylabel=textwrap.fill(name, 24))
        if counted:
            axis.set_ylim(-0.03, 1.03)
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        label_ends(axis)
    return fig


def loss_figure(logs: list[Path], title: str = ""):
    """Training and validation loss against the step, for each log.jsonl; its folder names the line."""
    fig, (axis,) = panels(1, len(logs), title, "pale: training batches; with markers: validation")
    axis.set(xlabel="step", ylabel="loss (nats per token)")
    for i, log in enumerate(logs):
        curves, name = read_log(log), log.resolve().parent.name
        axis.plot(*zip(*curves["loss"]), color=f"C{i}", alpha=0.5, label="_" if curves["val_loss"] else name)
        axis.plot(*zip(*curves["val_loss"]), color=f"C{i}", marker="o", label=name)
    label_ends(axis)
    return fig


def save(path: Path, draw, *arguments) -> bool:
    """Writes the figure that draw(*arguments) returns. Without matplotlib or room on the disk, it prints one line.

    Returns whether it wrote one. Any other error is a bug in this file, and keeps its traceback.
    """
    try:
        import matplotlib.figure

        look = {"font.size": 13, "savefig.dpi": 200, "axes.spines.top": False, "axes.spines.right": False}
        with matplotlib.rc_context(look):
            draw(*arguments).savefig(path)
    except (ImportError, OSError) as error:
        say(f"no figure: {error}", sys.stderr)
        return False
    return True


def write(records: list[dict], out: Path, title: str = "", committed: list[dict] = ()) -> str:
    """Writes eval.md and eval.png, which shows the `committed` records too. Returns the table and what was written."""
    text = table(records)
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "eval.md", lambda file: file.write(f"{text}\n".encode()))
    except OSError as error:
        raise UserError(f"{out}/eval.md could not be written: {error}") from error
    drawn = save(out / "eval.png", figure, [*records, *committed], title)
    return f"{text}\n\nwritten: {out}/eval.md" + f", {out}/eval.png" * drawn


@command
def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the one that holds all runs)")
    parser.add_argument("--title", default="", help="title of the figures: the result that they show")
    args = parser.parse_args(argv)
    records = [record for run in args.runs if (run / "eval.jsonl").exists() for record in read(run / "eval.jsonl")]
    logs = [run / "log.jsonl" for run in args.runs if (run / "log.jsonl").exists()]
    logs = [log for log in logs if read_log(log)["loss"]]
    out = args.out or Path(os.path.commonpath([run.resolve() for run in args.runs]))
    if not records and not logs:
        raise UserError(f"no eval.jsonl and no log.jsonl with a loss in {out}: name the folders of runs")
    if records:
        say(write(records, out, args.title))
    if logs and save(out / "loss.png", loss_figure, logs, args.title):
        say(f"written: {out}/loss.png")


if __name__ == "__main__":
    main()
