"""Passkey accuracy and perplexity against length (the paper's Figure 1): eval.json, a table and a figure.

    python eval_passkey.py out/tiny-*/                       eval.json in each folder; one table and one figure for all
    python eval_passkey.py out/60M-fope-s0 --trials=1000
    python eval_passkey.py out/books-s0 --data=data/c4       other text than it was trained on (the paper's Figure 5)
    python eval_passkey.py out/tiny-*/ --behind_text         prompts of the training length behind validation text
    python eval_passkey.py out/tiny-*/ --logn=0,2            q times (log n / log N)^2 beyond N too: eval-logn2.json

Passkey: a prompt of exactly L tokens, answer included, hides a five-digit key at a uniformly drawn depth. A trial is
right if greedy decoding yields the answer. One forward pass over prompt and answer decides that: greedy decoding yields
the answer if and only if every answer token is the argmax. Up to the first wrong token, both see the same input.

A long prompt differs from training in two ways: more filler and larger positions. --behind_text changes the positions
alone: the prompt keeps the training length N, and validation text stands before it, up to L tokens in all.

Perplexity: the same validation tokens at every L, cut into chunks of L. Every token counts, also those at the start of
a chunk, which see little context. With --data, the result also has the ratio to the perplexity on the training data's
own validation text (the paper's Figure 6a), if that is there.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import plot
from baselines import scaled
from common import UserError, command, find_device, replace_file, say
from common import UserError as fail_type
from data.passkey import passkey_document
from data.read import load
from data.tokenizer import get_tokenizer
from fope import RoPE
from model import GPT, load_model

# ---------------------------------------------------------------------------------------------------------------------
# The two measurements


def passkey_trials(tokenizer, length: int, trials: int, seed: int, text=()) -> tuple[np.ndarray, ...]:
    """Documents (trials, length), token counts of their answers (trials,) and depths of their keys (trials,) in [0, 1).

    `text` (tokens) stands first in every document, and counts in its length. Raises ValueError for a length that is
    too short for the prompt.
    """
    rng = np.random.default_rng((seed, length))
    keys, depths = rng.integers(10_000, 100_000, trials), rng.random(trials)
    documents = [passkey_document(tokenizer, length - len(text), int(k), d) for k, d in zip(keys, depths)]
    return np.array([[*text, *tokens] for tokens, _ in documents]), np.array([n for _, n in documents]), depths


@torch.no_grad()
def passkey_right(model, documents: np.ndarray, answers: np.ndarray, batch_tokens: int, autocast) -> np.ndarray:
    """Whether each trial is right, (trials,) bool. Documents (trials, L) end in answers of `answers` tokens."""
    device, longest = model.head.weight.device, int(answers.max())
    rows = max(1, batch_tokens // documents.shape[1])
    right = []
    for i in tqdm(range(0, len(documents), rows), f"passkey at {documents.shape[1]}", leave=False, disable=None):
        tokens = torch.from_numpy(documents[i : i + rows].astype(np.int64)).to(device)
        with autocast():
            guess = model(tokens[:, :-1], last=longest).argmax(-1)
        matches = (guess == tokens[:, -longest:]).cpu().numpy()
        matches |= np.arange(longest) < longest - answers[i : i + rows, None]  # tokens before a shorter answer are free
        right.append(matches.all(1))
    return np.concatenate(right)


@torch.no_grad()
def perplexity(model, tokens: np.ndarray, length: int, batch_tokens: int, autocast) -> float:
    """exp of the mean loss over tokens[1:], each predicted from its chunk of `length` tokens; inf if exp overflows."""
    device, total = model.head.weight.device, 0.0
    tokens = torch.from_numpy(tokens.astype(np.int64))
    inputs, targets = tokens[:-1].view(-1, length), tokens[1:].view(-1, length)
    rows = max(1, batch_tokens // length)
    for i in tqdm(range(0, len(inputs), rows), f"perplexity at {length}", leave=False, disable=None):
        x, y = inputs[i : i + rows].to(device), targets[i : i + rows].to(device)
        with autocast():
            loss = model(x, y)
        total += loss.item() * len(x)
    return torch.tensor(total / len(inputs), dtype=torch.float64).exp().item()


# ---------------------------------------------------------------------------------------------------------------------
# What can be wrong is found here, before the measurements


def scale_frequencies(model: GPT, scaling: str, scale: float) -> None:
    """Scale the frequencies of RoPE or FoPE, without training (linear is position interpolation). Raises ValueError."""
    if scaling == "none":
        return
    if model.cfg.scaling != "none":
        raise ValueError(f"the model was trained with --scaling={model.cfg.scaling}: leave --scaling out")
    N, d, theta = model.cfg.train_len, model.cfg.d, model.cfg.theta
    for block in model.blocks:
        position = block.attention.position
        if not isinstance(position, RoPE):
            raise ValueError(f"--scaling changes frequencies, and {model.cfg.pos} has none: use it with rope or fope")
        position.omega = scaled(position.omega, scaling, scale, N, head_dim=d, theta=theta)


def validation(data: str, checkpoint: dict, lengths: list[int], at_most: int) -> tuple[np.ndarray, dict]:
    """The folder's validation tokens, cut to a multiple of every length and one more, and its meta.json."""
    val, meta = load(data, "val")
    if meta["tokenizer"] != checkpoint["tokenizer"]:
        ours, theirs = meta["tokenizer"], checkpoint["tokenizer"]
        raise fail_type(f"{data} has {ours} tokens, the checkpoint was trained on {theirs} tokens: name other --data")
    whole = math.lcm(*lengths)  # the same tokens must fill chunks of every length
    if len(val) <= whole:
        raise fail_type(f"{data}/val.bin has {len(val)} tokens, these lengths take {whole + 1}: use smaller --lengths")
    val = val[: max(min(at_most, len(val) - 1) // whole, 1) * whole + 1]
    if val.max() >= checkpoint["config"]["vocab_size"]:
        raise fail_type(
            f"{data}/val.bin has token {val.max()}, outside the vocabulary of {checkpoint['config']['vocab_size']}"
        )
    return val, meta


def check_destination(file: Path, result: dict) -> None:
    """Raises OSError if the file cannot be written, ValueError if a larger evaluation's result is in it."""
    tempfile.TemporaryFile(dir=file.parent).close()
    if not file.exists():
        return
    old = plot.read_result(file)
    flags = [f"--{name}={old[name]}" for name in ("trials", "eval_tokens") if old.get(name, 0) > result[name]]
    if not set(old["lengths"]) <= set(result["lengths"]):
        flags.append("--lengths=" + ",".join(map(str, sorted({*old["lengths"], *result["lengths"]}))))
    if flags:
        raise ValueError(f"{file} holds a larger evaluation: use {' '.join(flags)}, or move it elsewhere first")


def plan(path: Path, args, lengths: list[int] | None, dtype: str) -> tuple[list[dict], list[np.ndarray], object]:
    """The results of a checkpoint, one for each p of --logn, without measurements; its texts; its tokenizer.

    The texts are the validation tokens and, with --data, those of the training data. Raises ValueError, OSError.
    """
    if path.suffix == ".json":
        raise ValueError(f"{path} is a result, not a checkpoint: python plot.py {path} draws it")
    model, checkpoint = load_model(path)
    scale_frequencies(model, args.scaling, args.scale)
    config, N = checkpoint["config"], model.cfg.train_len
    lengths = lengths or [N * m for m in (1, 2, 4, 8, 16)]
    data = args.data or config["data"]
    val, meta = validation(data, checkpoint, lengths, args.eval_tokens)
    texts = [val]
    if args.data and (Path(config["data"]) / "val.bin").is_file():
        texts.append(validation(config["data"], checkpoint, lengths, args.eval_tokens)[0])
    tokenizer = get_tokenizer(checkpoint["tokenizer"], data)
    for length in lengths:
        passkey_document(tokenizer, min(length, N) if args.behind_text else length, 12_345, 0.5)
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    run, dash, seed = folder.name.rpartition("-s")
    run, seed = (run, dash + seed) if seed.isdigit() else (folder.name, "")
    results = []
    for p in args.logn or [model.logn]:
        stem = args.stem + (f"-logn{p:g}" if p else "")
        results.append({
            "name": run + stem.removeprefix("eval") + seed,  # NAME-yarn4-s0 is another model than NAME-s0
            "file": str(folder / f"{stem}.json"),
            "train_len": N, "step": checkpoint["step"], "config": config, "data": meta.get("source", str(data)),
            "behind_text": args.behind_text, "scaling": args.scaling, "scale": args.scale, "logn": p,
            "lengths": lengths, "trials": args.trials, "eval_tokens": len(val) - 1, "seed": args.seed,
            "dtype": dtype, "torch": torch.__version__,
            "perplexity": [], "perplexity_ratio": [], "passkey": [], "by_depth": [],
        })  # fmt: skip
        check_destination(Path(results[-1]["file"]), results[-1])
    return results, texts, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# The command


def measure(path: Path, results: list[dict], texts: list[np.ndarray], tokenizer, args, device, autocast) -> None:
    """Fill in the measurements of a checkpoint's results. Each length is printed as soon as it is measured."""
    model, _ = load_model(path)
    scale_frequencies(model, args.scaling, args.scale)
    model.to(device)
    for length in results[0]["lengths"]:
        before = texts[0][: max(length - model.cfg.train_len, 0)] if args.behind_text else ()
        documents, answers, depths = passkey_trials(tokenizer, length, args.trials, args.seed, before)
        tenths = np.minimum((depths * 10).astype(int), 9)
        for result in results:
            if length <= model.cfg.train_len and result is not results[0]:  # log n acts beyond N only
                for name in ("passkey", "by_depth", "perplexity", "perplexity_ratio"):
                    result[name] += results[0][name][-1:]
                continue
            model.logn = result["logn"]
            right = passkey_right(model, documents, answers, args.batch_tokens, autocast)
            perplexities = [perplexity(model, text, length, args.batch_tokens, autocast) for text in texts]
            result["passkey"].append(int(right.sum()))
            result["by_depth"].append([[int(right[tenths == t].sum()), int((tenths == t).sum())] for t in range(10)])
            result["perplexity"].append(round(perplexities[0], 4))
            line = f"{result['name']}  length {length}: perplexity {perplexities[0]:.3f}"
            if len(texts) > 1:
                result["perplexity_ratio"].append(round(perplexities[0] / perplexities[1], 4))
                line += f" ({perplexities[0] / perplexities[1]:.3f} times that on {result['config']['data']})"
            low, high = plot.wilson(int(right.sum()), args.trials)
            say(f"{line}, passkey {right.mean():.2f} [{low:.2f}, {high:.2f}]")


def numbers(flag: str, text: str, at_least: int, kind=int) -> list:
    """The numbers in a flag like --lengths=512,1024, each once."""
    try:
        found = list(dict.fromkeys(kind(x) for x in text.split(",")))
    except ValueError:
        found = []
    if not found or not all(at_least <= x < math.inf for x in found):
        raise fail_type(f"{flag} {text} is not a list of numbers of at least {at_least}, like 1,2")
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, help="folders or files that train.py wrote")
    add("--lengths", help="comma-separated (default: the first checkpoint's training length times 1, 2, 4, 8, 16)")
    add("--trials", type=int, default=100, help="passkey trials per length (default: 100; the paper: 1000)")
    add("--behind_text", action="store_true", help="prompts of the training length behind validation text")
    scalings = ("none", "linear", "yarn", "llama3")
    add("--scaling", default="none", choices=scalings, help="scale the frequencies of RoPE or FoPE (default: none)")
    add("--scale", type=float, default=16.0, help="factor of --scaling (default: 16)")
    add("--logn", help="comma-separated: p of (log n / log N)^p on q beyond N (default: the checkpoint's, often 0)")
    add("--data", help="folder with val.bin (default: each checkpoint's own)")
    add("--eval_tokens", type=int, default=131_072, help="maximum validation tokens for perplexity (default: 131072)")
    add("--batch_tokens", type=int, default=16_384, help="tokens per forward pass, for less memory (default: 16384)")
    add("--out", type=Path, help="folder for the table and the figure (default: the one that holds all checkpoints)")
    add("--reference", nargs="*", type=Path, default=[], help="results of other runs: dashed lines in the figure")
    add("--seed", type=int, default=0, help="seed of the keys and their depths (default: 0)")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--dtype", default="auto", help="auto, bfloat16 or float32")
    args = parser.parse_args(argv)
    # There are 90 000 five-digit keys.
    limits = {"trials": (1, 90_000), "eval_tokens": (1, 2**40), "batch_tokens": (1, 2**40), "seed": (0, 2**63)}
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise fail_type(f"--{name} must be from {low} to {high}")
    if not 0 < args.scale < math.inf:
        raise fail_type("--scale must be above 0 and finite")
    args.lengths = args.lengths and sorted(numbers("--lengths", args.lengths, at_least=1))
    args.logn = args.logn and numbers("--logn", args.logn, at_least=0, kind=float)
    args.stem = "eval"
    args.stem += f"-on-{Path(args.data).resolve().name}" if args.data else ""
    args.stem += "-behind-text" if args.behind_text else ""
    args.stem += f"-{args.scaling}{args.scale:g}" if args.scaling != "none" else ""
    return args


@command
def main(argv: list[str]) -> None:
    args = parse(argv)
    plans, lengths = [], args.lengths
    try:
        device, dtype, autocast = find_device(args.device, args.dtype)
        for path in args.checkpoints:
            plans.append(plan(path, args, lengths, dtype))
            lengths = plans[-1][0][0]["lengths"]
        results = [result for some, _, _ in plans for result in some]
        plot.group(results)
        references = [plot.read_result(file) for file in args.reference]
        plot.group(references)
        for other in (reference["file"] for reference in references if reference["lengths"] != lengths):
            raise ValueError(f"{other} has other lengths than {results[0]['file']}: leave it out of --reference")
        out = args.out or Path(os.path.commonpath([Path(result["file"]).parent for result in results]))
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except (OSError, ValueError, UserError) as error:
        raise fail_type(str(error))

    problems = []
    for path, (some, texts, tokenizer) in zip(args.checkpoints, plans):
        try:
            measure(path, some, texts, tokenizer, args, device, autocast)
        except torch.OutOfMemoryError:
            raise fail_type(
                f"{path} needs more memory than {device} has: use a smaller --batch_tokens or shorter --lengths"
            )
        for result in some:
            content = json.dumps({name: value for name, value in result.items() if name != "file"}).encode() + b"\n"
            try:
                replace_file(Path(result["file"]), lambda f, content=content: f.write(content))
            except OSError as error:
                problems.append(f"{result['file']} could not be written: {error}")
    text, written = plot.table(results), []
    try:
        replace_file(out / f"{args.stem}.md", lambda f: f.write(text.encode() + b"\n"))
        written.append(f"{out}/{args.stem}.md")
    except OSError as error:
        problems.append(f"{out}/{args.stem}.md could not be written: {error}")
    if plot.figure(results, out / f"{args.stem}.png", reference=references):
        written.append(f"{out}/{args.stem}.png")
    say(f"\n{text}\n\nwritten: {', '.join(written)}")
    if problems:
        raise fail_type("; ".join(problems))


if __name__ == "__main__":
    main()
