"""Passkey accuracy and perplexity against length (the paper's Figure 1): a table, eval.json, a figure.

    python eval_passkey.py out/tiny-*/                 every run in one table and one figure
    python eval_passkey.py out/*/eval.json             the same from results already there
    python eval_passkey.py out/60M-fope-s0 --trials=1000
    python eval_passkey.py out/books/ --data=data/c4   other text than it was trained on: see below
    python eval_passkey.py out/tiny-*/ --behind_text   a probe: see below

Passkey: a prompt of exactly L tokens, answer included (data/passkey.py), the key's place uniform. A trial counts when
greedy decoding yields the answer. With the right answer fed in, it does exactly when every answer token is the arg max
(by induction: up to the first wrong token both see the same input), so one forward pass decides a trial.

A long prompt is new in two ways: its filler is longer than any in training, and its positions are. --behind_text keeps
the first away: the prompt has the training length, and validation text stands before it up to L.

Perplexity at length L: the same validation tokens at every L, cut into chunks of L. Every token counts, also the ones
at a chunk's start that see little: a model that looks at one token alone scores the same at every L. With --data (the
paper's Figure 5: trained on books, tested on C4) it is that folder's, and its ratio to the perplexity on the data of
training is given too (Figure 6a), where that is at hand.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

from data import prepare
from data.files import fail
from data.passkey import passkey_document
from data.tokenizer import get_tokenizer
from fope import RoPE
from model import find_device, load_model


def wilson(right: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson 1927): honest at 0 and at 1, where the normal one has width 0."""
    z, p = 1.96, right / trials
    centre, spread = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return max((centre - spread) / (1 + z * z / trials), 0.0), min((centre + spread) / (1 + z * z / trials), 1.0)


def passkey_trials(tokenizer, length: int, trials: int, seed: int, text=()) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents (trials, length), their answers' token counts, and the depths of the keys, uniform in [0, 1).

    With `text` (tokens), that stands first, and the document fills only what is left of the length.
    """
    rng = np.random.default_rng((seed, length))
    keys, depths = rng.integers(10_000, 100_000, trials), rng.random(trials)
    documents = [passkey_document(tokenizer, length - len(text), int(k), d) for k, d in zip(keys, depths)]
    return np.array([[*text, *tokens] for tokens, _ in documents]), np.array([n for _, n in documents]), depths


class Progress:
    """A line on stderr that says how far a long work is, once a second at most."""

    def __init__(self, what: str):
        self.what, self.shown = what, time.time()

    def __call__(self, share: float):
        if time.time() - self.shown > 1 and sys.stderr.isatty():
            print(f"\r{self.what}: {share:.0%}", end="\r", file=sys.stderr, flush=True)
            self.shown = time.time()


@torch.no_grad()
def passkey_right(model, documents: np.ndarray, answers: np.ndarray, batch_tokens: int, autocast, progress) -> np.ndarray:
    """One forward pass a trial: whether each is right, (trials,) bool. Documents (trials, L) end in their answers."""
    device, longest = model.head.weight.device, answers.max()
    right = []
    rows = max(1, batch_tokens // documents.shape[1])
    for i in range(0, len(documents), rows):
        tokens = torch.from_numpy(documents[i : i + rows].astype(np.int64)).to(device)
        with autocast():
            guess = model(tokens[:, :-1], last=int(longest)).argmax(-1)
        matches = (guess == tokens[:, -longest:]).cpu().numpy()
        matches |= np.arange(longest) < longest - answers[i : i + rows, None]  # before a shorter answer anything goes
        right.append(matches.all(1))
        progress((i + len(tokens)) / len(documents))
    return np.concatenate(right)


@torch.no_grad()
def perplexity(model, tokens: np.ndarray, length: int, batch_tokens: int, autocast, progress) -> float:
    """exp of the mean loss over all of tokens[1:], each predicted from its chunk of `length` tokens."""
    device, total = model.head.weight.device, 0.0
    tokens = torch.from_numpy(tokens.astype(np.int64))
    inputs, targets = tokens[:-1].view(-1, length), tokens[1:].view(-1, length)
    rows = max(1, batch_tokens // length)
    for i in range(0, len(inputs), rows):
        x, y = inputs[i : i + rows].to(device), targets[i : i + rows].to(device)
        with autocast():
            total += model(x, y)[1].item() * len(x)
        progress((i + len(x)) / len(inputs))
    return math.exp(total / len(inputs))


def validation(data: str, checkpoint: dict, lengths: list[int], at_most: int) -> tuple[np.ndarray, dict]:
    """The validation tokens of a folder, a multiple of every length and one more, and its meta.json."""
    val, meta = prepare.load(data, "val")
    if meta["tokenizer"] != checkpoint["tokenizer"]:
        fail(f"{data} has {meta['tokenizer']} tokens, the checkpoint was trained on {checkpoint['tokenizer']} tokens: name other --data")
    whole = math.lcm(*lengths)  # the same tokens must make whole chunks of every length
    if len(val) <= whole:
        fail(f"{data}/val.bin has {len(val)} tokens, fewer than the {whole + 1} that these lengths take: name smaller --lengths")
    val = val[: max(min(at_most, len(val) - 1) // whole, 1) * whole + 1]
    if val.max() >= checkpoint["config"]["vocab_size"]:
        fail(f"{data}/val.bin has token {val.max()}, outside the vocabulary of {checkpoint['config']['vocab_size']}")
    return val, meta


def evaluate(path: Path, args, lengths: list[int] | None) -> dict:
    """One checkpoint at every length (None: 1 to 16 times N). The result is also written beside it, as eval.json."""
    start = time.time()
    try:
        model, checkpoint = load_model(path)
        device, dtype, autocast = find_device(args.device, args.dtype)
        if args.scaling != "none":
            if model.cfg.scaling != "none":
                raise ValueError(f"{path} was trained with --scaling={model.cfg.scaling}: its waves are stretched already")
            options = dataclasses.replace(model.cfg, scaling=args.scaling, scale=args.scale, original_len=model.cfg.train_len)
            for block in model.blocks:
                if not isinstance(block.attention.position, RoPE):
                    raise ValueError(f"--scaling changes frequencies, and {model.cfg.pos} has none: it works on rope and fope")
                block.attention.position.stretch(options)
    except ValueError as error:
        fail(str(error))
    model.to(device)
    lengths = lengths or [model.cfg.train_len * m for m in (1, 2, 4, 8, 16)]
    config = checkpoint["config"]
    data = args.data or config["data"]
    val, meta = validation(data, checkpoint, lengths, args.eval_tokens)
    own = None
    if args.data and (Path(config["data"]) / "val.bin").is_file():
        own, _ = validation(config["data"], checkpoint, lengths, args.eval_tokens)
    tokenizer = get_tokenizer(checkpoint["tokenizer"], data)
    name, kind = path.resolve().name if path.is_dir() else path.resolve().parent.name, args.stem.removeprefix("eval")
    result = {
        "name": re.sub(r"(-s\d+)?$", rf"{kind}\1", name, count=1),  # NAME-yarn4-s0 is another thing than NAME-s0
        "train_len": model.cfg.train_len, "step": checkpoint["step"], "config": config,
        "data": meta.get("source", str(data)), "behind_text": args.behind_text, "scaling": args.scaling, "scale": args.scale, "eval_tokens": len(val) - 1, "trials": args.trials, "seed": args.seed,
        "dtype": dtype, "torch": torch.__version__, "lengths": lengths, "perplexity": [], "perplexity_ratio": [], "passkey": [], "by_depth": [],
    }  # fmt: skip
    for length in lengths:
        try:
            text = val[: max(length - model.cfg.train_len, 0)] if args.behind_text else ()
            documents, answers, depths = passkey_trials(tokenizer, length, args.trials, args.seed, text)
        except ValueError as error:
            fail(str(error))
        ppl = perplexity(model, val, length, args.batch_tokens, autocast, Progress(f"perplexity {length}"))
        if own is not None:
            own_ppl = perplexity(model, own, length, args.batch_tokens, autocast, Progress(f"perplexity {length}, own data"))
            result["perplexity_ratio"].append(round(ppl / own_ppl, 4))
        right = passkey_right(model, documents, answers, args.batch_tokens, autocast, Progress(f"passkey {length}"))
        bins = np.minimum((depths * 10).astype(int), 9)
        result["perplexity"].append(round(ppl, 4))
        result["passkey"].append(int(right.sum()))
        result["by_depth"].append([[int(right[bins == b].sum()), int((bins == b).sum())] for b in range(10)])
        low, high = wilson(right.sum(), args.trials)
        ratio = f" ({ppl / own_ppl:.3f} times that on {config['data']})" if own is not None else ""
        print(f"{result['name']}  length {length}: perplexity {ppl:.3f}{ratio}, passkey {right.mean():.2f} [{low:.2f}, {high:.2f}]", flush=True)
    result["minutes"] = round((time.time() - start) / 60, 2)
    file = (path if path.is_dir() else path.parent) / f"{args.stem}.json"
    try:
        file.write_text(json.dumps(result) + "\n")
    except OSError as error:
        fail(f"{file} cannot be written: {error}")
    return result


def group(results: list[dict]) -> dict[str, list[dict]]:
    """Runs that differ in their seed alone (NAME-s0, NAME-s1, ..) belong together."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(re.sub(r"-s\d+$", "", result["name"]), []).append(result)
    return groups


def table(results: list[dict]) -> str:
    """Markdown. One seed: accuracy with its Wilson interval. Several: the mean and, in brackets, the range of the seeds."""
    lengths = results[0]["lengths"]
    rows = ["| | seeds | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 2) + "|"]

    def cell(values: list[float], digits: int) -> str:
        text = f"{np.mean(values):.{digits}f}"
        return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}-{max(values):.{digits}f})"

    for name, runs in group(results).items():
        cells = [cell([run["perplexity"][i] for run in runs], 2) for i in range(len(lengths))]
        rows.append(f"| {name}: perplexity | {len(runs)} | " + " | ".join(cells) + " |")
    for name, runs in group(results).items():
        if all(run.get("perplexity_ratio") for run in runs):
            cells = [cell([run["perplexity_ratio"][i] for run in runs], 2) for i in range(len(lengths))]
            rows.append(f"| {name}: ratio to perplexity on own data | {len(runs)} | " + " | ".join(cells) + " |")
    for name, runs in group(results).items():
        cells = [cell([run["passkey"][i] / run["trials"] for run in runs], 2) for i in range(len(lengths))]
        if len(runs) == 1:
            intervals = [wilson(right, runs[0]["trials"]) for right in runs[0]["passkey"]]
            cells = [f"{c} [{low:.2f}, {high:.2f}]" for c, (low, high) in zip(cells, intervals)]
        rows.append(f"| {name}: passkey | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def figure(results: list[dict], path: Path, xlabel: str = "length in tokens: look beyond N, dotted", varied: dict | None = None) -> bool:
    """Accuracy and perplexity against length, a line a group, a band over its seeds, the training length marked.

    With `varied` {group: value}, against that, a line a length. False where matplotlib, which nothing else needs, is missing.
    """
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed")
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, dict] = {}  # label: x: (accuracy, perplexity) of each seed
    for name, runs in group(results).items():
        for run in runs:
            for length, right, ppl in zip(run["lengths"], run["passkey"], run["perplexity"]):
                label, x = (f"length {length}", varied[name]) if varied else (f"{name} (n={len(runs)})", length)
                lines.setdefault(label, {}).setdefault(x, []).append((right / run["trials"], ppl))
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.4), layout="constrained")
    styles = list(zip("os^Dvx", ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))))
    for i, (label, points) in enumerate(lines.items()):
        marker, style = styles[i % len(styles)]
        for j, axis in enumerate(axes):
            seeds = [[both[j] for both in found] for found in points.values()]
            axis.plot(list(points), [np.mean(s) for s in seeds], marker=marker, linestyle=style, label=label)
            axis.fill_between(list(points), [min(s) for s in seeds], [max(s) for s in seeds], alpha=0.2)
    for axis, title in zip(axes, ("passkey accuracy", "validation perplexity")):
        axis.set(xlabel=xlabel, title=title)
    axes[0].set_ylim(-0.03, 1.03)
    if not varied:
        for axis in axes:
            axis.set_xscale("log", base=2)
            axis.set_xticks(results[0]["lengths"], map(str, results[0]["lengths"]))
            for train_len in sorted({result["train_len"] for result in results}):
                axis.axvline(train_len, color="gray", linewidth=1, linestyle=":")
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_formatter("{x:g}")
        axes[1].yaxis.set_minor_formatter("{x:g}")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return True


def numbers(flag: str, text: str, at_least: int) -> list[int]:
    """What a flag like --lengths=512,1024 lists."""
    try:
        found = [int(x) for x in text.split(",")]
    except ValueError:
        found = []
    if min(found, default=at_least - 1) < at_least:
        fail(f"{flag} {text} is no list of numbers from {at_least} up, like 1,2")
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders or files that train.py wrote; or eval.json files")
    parser.add_argument("--lengths", help="comma-separated; the first one's training length times 1, 2, 4, 8, 16 unless told")
    parser.add_argument("--trials", type=int, default=100, help="passkey trials a length (the paper: 1000)")
    parser.add_argument("--behind_text", action="store_true", help="a prompt of the training length behind validation text")
    parser.add_argument("--scaling", default="none", help="none, or linear or yarn: stretch the waves of RoPE or FoPE, without training")
    parser.add_argument("--scale", type=float, default=16.0, help="how many times")
    parser.add_argument("--data", help="folder with val.bin; each checkpoint's own unless told")
    parser.add_argument("--eval_tokens", type=int, default=131_072, help="validation tokens for the perplexity, at most")
    parser.add_argument("--batch_tokens", type=int, default=16_384, help="tokens at once: less of it for less memory")
    parser.add_argument("--out", type=Path, help="folder for eval.md and eval.png; where the checkpoints are unless told")
    parser.add_argument("--seed", type=int, default=0, help="of the keys and their places")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    args = parser.parse_args(argv)
    args.stem = "eval" + (f"-on-{Path(args.data).absolute().name}" if args.data else "") + ("-behind-text" if args.behind_text else "")
    args.stem += f"-{args.scaling}{args.scale:g}" if args.scaling != "none" else ""
    if args.trials < 1:
        fail("--trials must be at least 1")

    results = []
    lengths = numbers("--lengths", args.lengths, at_least=1) if args.lengths else None
    for path in args.checkpoints:
        if path.suffix == ".json":
            try:
                results.append(json.loads(path.read_text()))
                results[-1]["passkey"], results[-1]["perplexity"]
            except (OSError, ValueError, TypeError, KeyError):
                fail(f"{path} is no result of this command")
        else:
            results.append(evaluate(path, args, lengths))
            lengths = results[-1]["lengths"]
    if any(result["lengths"] != results[0]["lengths"] for result in results):
        fail("the results are of different lengths: evaluate them with the same --lengths")
    folders = [path.resolve() if path.is_dir() else path.resolve().parent for path in args.checkpoints]
    out = args.out or Path(os.path.commonpath(folders))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{args.stem}.md").write_text(table(results) + "\n")
        drawn = figure(results, out / f"{args.stem}.png")
    except OSError as error:
        fail(f"{out} cannot be written: {error}")
    print(f"\n{table(results)}\n\nwritten: {out}/{args.stem}.md" + f", {out}/{args.stem}.png" * drawn)


if __name__ == "__main__":
    main(sys.argv[1:])
