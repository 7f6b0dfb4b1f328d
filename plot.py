"""Tables and figures from the records of eval_passkey.py, and loss curves from the logs of train.py.

    python plot.py out/tiny-fope-s0                         one run: loss.png, eval.md, eval.png
    python plot.py out/tiny-*/ --out=compare                many runs in one table and one figure of each kind

A record is one line of eval.jsonl: a model's configuration, the conditions of a measurement, and what was measured.
Records that agree in everything but the seed and the length belong to one run. The table gives the mean over the seeds
and, in parentheses, their range. A single seed's accuracy comes with its 95 % interval in brackets.
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

METRICS = {  # what is measured: the field of a record, its name, and whether it counts right trials
    "perplexity": ("perplexity", False),
    "loss": ("loss", False),  # in place of perplexity, as in the paper's Table 2
    "ratio": ("perplexity / that of the training text", False),
    "right": ("passkey accuracy", True),
}
NO_EFFECT = {  # fields that do not tell two runs apart, because they change no result beyond rounding
    *("run", "out", "resume", "micro_tokens", "recompute", "compile", "log_every", "eval_every", "save_every", "wandb"),
    *("eval_trials", "train_eval_tokens", "train_device", "device", "threads", "torch", "right_by_depth"),
}
OFF = {"logn": 0, "scaling": "none", "committed": None}  # values that no label mentions

# ---------------------------------------------------------------------------------------------------------------------
# Records and logs


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
    """The records in an eval.jsonl."""
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
    """What tells a record from others, apart from what was measured: (field, value) pairs, in the order of fields."""
    left_out = NO_EFFECT | METRICS.keys() | set(without)
    return tuple(sorted((field, value) for field, value in record.items() if field not in left_out))


def group(records: list[dict]) -> dict[str, list[dict]]:
    """The records of each run, by its label. The last one counts of those that differ in the measured numbers alone."""
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
    values = {field: [run.get(field) for run in runs] for field in set().union(*runs)}
    differ = {field: values[field] for field in sorted(values) if len(set(values[field])) > 1}
    by = sorted(differ, key=lambda field: (field != "logn", field != "pos"))
    ordered = sorted(zip(runs, groups.values()), key=lambda pair: [(str(type(v := pair[0].get(f))), v) for f in by])
    return {label(run, differ): some for run, some in ordered}


def label(run: dict, differ: dict[str, list]) -> str:
    """The embedding, and the fields in which runs differ, with the values of all runs. What most have is left out."""
    parts = [str(run.get("pos"))]
    for field in (field for field in differ if field != "pos"):
        usual, count = Counter(differ[field]).most_common(1)[0]
        value, hidden = run.get(field), OFF.get(field, usual if 2 * count > len(differ[field]) else None)
        words = f"{field} {value:g}" if isinstance(value, float) else f"{field} {value}"
        if isinstance(value, bool):
            words = field if value else f"no {field}"
        parts += [words] * (value != hidden)
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def wilson(right: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson 1927). Unlike the normal interval, it has a width at 0 and at 1 too."""
    z, p = 1.96, right / trials
    center, spread = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return max((center - spread) / (1 + z * z / trials), 0.0), min((center + spread) / (1 + z * z / trials), 1.0)


def values_of(records: list[dict], metric: str) -> list[float]:
    """The values of a metric, one for each record that has it."""
    some = [record for record in records if record.get(metric) is not None]
    return [record[metric] / (record["trials"] if METRICS[metric][1] else 1) for record in some]


def cell(records: list[dict], metric: str) -> str:
    """Mean and range of a metric over records that differ in the seed. One accuracy has an interval instead."""
    values, counted = values_of(records, metric), METRICS[metric][1]
    if len(values) > 1:
        return f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"
    interval = (
        " [{:.2f}, {:.2f}]".format(*wilson(records[0][metric], records[0]["trials"])) if values and counted else ""
    )
    return f"{values[0]:.2f}{interval}" if values else ""


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
# The figures


def panels(count: int, title: str, subtitle: str):
    """A figure with its axes in one column, so that a phone can show it."""
    from matplotlib.figure import Figure

    fig = Figure((6.4, 3.4 * count + 1), layout="constrained")
    fig.suptitle(textwrap.fill(title, 50), fontsize=14, fontweight="bold")
    axes = fig.subplots(count, squeeze=False)[:, 0]
    axes[0].set_title(subtitle, fontsize=11)
    return fig, axes


def figure(records: list[dict], title: str = ""):
    """Each metric against length: the mean of each run, and a band over the range of its seeds.

    FoPE is orange, RoPE black, both thick. Others, and where log n is shown the lines without it, are thin.
    """
    groups, highest = group(records), max(record["logn"] for record in records)
    alike = Counter((some[0]["pos"], some[0]["logn"]) for some in groups.values())  # variants of one are thin too
    seeds = sorted({len({record["seed"] for record in some}) for some in groups.values()})
    subtitle = f"mean of {seeds[0]}{f' to {seeds[-1]}' * (len(seeds) > 1)} seeds; band: lowest to highest"
    metrics = [metric for metric in reversed(METRICS) if values_of(records, metric)]
    fig, axes = panels(len(metrics), title, subtitle if seeds[-1] > 1 else "")
    lengths, train_lens = ({record[field] for record in records} for field in ("length", "train_len"))
    for axis, metric in zip(axes, metrics):
        for i, (label, some) in enumerate(groups.items()):
            points = {length: [r for r in some if r["length"] == length] for length in sorted(lengths)}
            points = {length: values_of(some, metric) for length, some in points.items() if values_of(some, metric)}
            pos, logn = some[0]["pos"], some[0]["logn"]
            color, width = {"fope": ("#d55e00", 3.5), "rope": ("black", 2)}.get(pos, ("0.45", 1))
            look = dict(color=color, marker="o^sDv<>Pd*Xp"[i % 12], zorder=3 - (width > 3))  # the thickest lies below
            look |= dict(linewidth=width if alike[pos, logn] == 1 and logn == highest else 1, markersize=5)
            look |= dict(linestyle="--" if some[0].get("committed") else "-")
            axis.plot(points.keys(), [np.mean(values) for values in points.values()], label=label, **look)
            low, high = ([end(values) for values in points.values()] for end in (min, max))
            axis.fill_between(list(points), low, high, color=color, alpha=0.2, linewidth=0)
        ticks = sorted(lengths | train_lens)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{n}\n= N" if n in train_lens else str(n) for n in ticks])
        axis.set(xlabel="length in tokens", ylabel=METRICS[metric][0])
        if METRICS[metric][1]:
            axis.set_ylim(-0.03, 1.03)
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=11, frameon=False)
    return fig


def loss_figure(logs: list[Path], title: str = ""):
    """Training and validation loss against the step, for each log.jsonl; its folder names the line."""
    fig, (axis,) = panels(1, title, "pale: training batches; with markers: validation")
    axis.set(xlabel="step", ylabel="loss (nats per token)")
    for i, log in enumerate(logs):
        curves, name = read_log(log), log.resolve().parent.name
        axis.plot(*zip(*curves["loss"]), color=f"C{i}", alpha=0.5, label=None if curves["val_loss"] else name)
        axis.plot(*zip(*curves["val_loss"]), color=f"C{i}", marker="o", label=name)
    fig.legend(loc="outside lower center", fontsize=11, frameon=False)
    return fig


def save(path: Path, draw, *arguments) -> bool:
    """Writes the figure that draw(*arguments) returns. Without matplotlib or room on the disk, it prints one line.

    Any other error is a bug in this file, and keeps its traceback.
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


# ---------------------------------------------------------------------------------------------------------------------
# The command


def write(records: list[dict], out: Path, title: str = "", committed: list[dict] = ()) -> str:
    """Writes eval.md and eval.png in the folder `out`. Returns the table and the names of what was written.

    The figure shows the `committed` records too.
    """
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
    parser.add_argument("--title", default="", help="the result that the figures show")
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
