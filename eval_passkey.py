"""Passkey accuracy and perplexity against length (the paper's Figure 1): eval.jsonl, a table and a figure.

    python eval_passkey.py out/tiny-*/                       eval.jsonl in each folder; one table and figure for all
    python eval_passkey.py out/60M-fope-s0 --trials=1000
    python eval_passkey.py out/books-s0 --data=data/c4       text that it was not trained on (the paper's Figure 5)
    python eval_passkey.py out/tiny-*/ --behind_text         prompts of the training length after validation text
    python eval_passkey.py out/tiny-*/ --logn=0,2            without and with log-n scaling, p = 2

Passkey: a prompt of exactly L tokens, answer included, hides a five-digit key at a uniformly drawn depth. A trial is
right if greedy decoding yields the answer. One forward pass over prompt and answer decides that: greedy decoding yields
the answer if and only if every answer token is the argmax. Up to the first wrong token, both see the same input.

A long prompt differs from training in two ways: more filler and larger positions. --behind_text changes the positions
alone: the prompt keeps the training length N, and validation text stands before it, up to L tokens in all.

Perplexity: the same validation tokens at every L, cut into chunks of L. Every token counts, even those at the start of
a chunk, which see little context.

A record is one line of eval.jsonl, appended as soon as it is measured: one model, one length, one p of log-n scaling.
"""

import json
import math
import os
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import plot
from common import Parser, UserError, at_least, command, find_device, one_of, say
from data.passkey import passkey_document
from data.read import load
from data.tokenizer import get_tokenizer
from model import SCALINGS, load_model, scale_frequencies


def numbers(name: str, text: str, least: float, kind=int) -> list:
    """The numbers in a flag like --lengths=512,1024, each once, in ascending order. Raises UserError."""
    try:
        found = sorted({kind(part) for part in text.split(",")}) if text else []
    except ValueError:
        found = [math.nan]
    if not all(least <= number < math.inf for number in found):
        raise UserError(f"--{name} {text} is not a list of numbers of at least {least}, like 1,2")
    return found


@dataclass
class Options:
    """What is measured, and how. Every field is a flag, and the comment beside it is the flag's help."""

    # measurement
    lengths: str = ""  # comma-separated; empty: the training length N times 1, 2, 4, 8, 16
    trials: int = 100  # passkey trials per length (the paper has 1000)
    skip_lost: bool = False  # stop looking for keys beyond a length at which none was found
    behind_text: bool = False  # prompts of the training length after validation text
    scaling: str = "none"  # scale the frequencies of RoPE or FoPE without training: linear, yarn or llama3
    scale: float = 16.0  # factor of --scaling
    logn: str = ""  # comma-separated exponents p of log-n scaling; empty: the checkpoint's p, often 0
    data: str = ""  # folder with val.bin; empty: the one that the model was trained on
    eval_tokens: int = 131_072  # maximum validation tokens for perplexity; 0: no perplexity, and no data needed
    key_seed: int = 0  # seed of the keys and their depths
    # machine
    batch_tokens: int = 16_384  # tokens per forward pass; fewer take less memory
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: str = "auto"  # auto, bfloat16 or float32

    def __post_init__(self):
        at_least(self, 1, "trials scale batch_tokens")
        at_least(self, 0, "key_seed eval_tokens")
        one_of(self, scaling=SCALINGS)
        if self.behind_text and not self.eval_tokens:
            raise UserError("--behind_text needs validation text: leave out --eval_tokens=0")


# ---------------------------------------------------------------------------------------------------------------------
# The two measurements


def passkey_trials(tokenizer, length: int, trials: int, seed: int, text=()) -> tuple[np.ndarray, ...]:
    """Documents (trials, length), token counts of their answers (trials,) and depths of their keys (trials,) in [0, 1).

    `text` (tokens) stands first in every document, and counts in its length. Raises UserError for a length that is
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
        matches |= np.arange(longest) < longest - answers[i : i + rows, None]  # ignore what precedes a shorter answer
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
# Records


def validation(data: str, checkpoint: dict, lengths: list[int], at_most: int) -> tuple[np.ndarray, dict]:
    """The folder's validation tokens, cut to one more than a multiple of every length, and its meta.json."""
    val, meta = load(data, "val")
    ours, theirs = meta["tokenizer"], checkpoint["tokenizer"]
    if ours != theirs:
        raise UserError(f"{data} has {ours} tokens, the checkpoint was trained on {theirs} tokens: change --data")
    whole = math.lcm(*lengths)  # the same tokens must fill chunks of every length
    if len(val) <= whole:
        raise UserError(f"{data}/val.bin has {len(val)} tokens, these lengths take {whole + 1}: use shorter --lengths")
    if at_most < whole:
        say(f"--eval_tokens is raised from {at_most} to {whole}, which every length divides")
    val = val[: max(min(at_most, len(val) - 1) // whole, 1) * whole + 1]
    if val.max() >= (size := checkpoint["config"]["vocab_size"]):
        raise UserError(f"{data}/val.bin has token {val.max()}, outside the vocabulary of {size}: change --data")
    return val, meta


def measure(path: Path, options: Options):
    """Yields the records of a checkpoint, for each length and p of log-n scaling. Bad input is found before the first.

    A record holds logn, scaling, scale, original_len, data, dtype, device and eval_tokens as they are used here. The
    training configuration's values of the same names are in fields train_logn, train_scaling, .. Raises UserError.
    """
    lengths, powers = numbers("lengths", options.lengths, 1), numbers("logn", options.logn, 0, float)
    device, dtype, autocast = find_device(options.device, options.dtype)
    model, checkpoint = load_model(path)
    config, N = checkpoint["config"], model.cfg.train_len
    run = path.stem if path.is_file() and path.name != "ckpt.pt" else folder_of(path).name
    lengths, powers = lengths or [N * m for m in (1, 2, 4, 8, 16)], powers or [model.logn]
    if options.scaling != "none":
        scale_frequencies(model, options.scaling, options.scale)
    model.to(device)
    data = str(Path(options.data or config["data"]))
    text, meta = validation(data, checkpoint, lengths, options.eval_tokens) if options.eval_tokens else ([0], {})
    tokenizer = get_tokenizer(checkpoint["tokenizer"], checkpoint["folder"], data)

    def prompts(length: int, trials: int) -> tuple[np.ndarray, ...]:
        before = text[: max(length - N, 0)] if options.behind_text else ()
        return passkey_trials(tokenizer, length, trials, options.key_seed, before)

    prompts(lengths[0], 1)  # the shortest length must have room for the prompt
    facts = {
        "step": checkpoint["step"], "data": data, "source": meta.get("source"), "behind_text": options.behind_text,
        "scaling": model.cfg.scaling, "scale": model.cfg.scale, "original_len": model.cfg.original_len,
        "trials": options.trials, "key_seed": options.key_seed, "eval_tokens": len(text) - 1, "dtype": dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    own = {f"train_{name}" if name in facts or name == "logn" else name: value for name, value in config.items()}
    own["train_data"] = str(Path(config["data"]))  # without the slash that a shell may add
    lost = set()  # the p that found no key at a shorter length
    for length in lengths:
        documents, answers, depths = prompts(length, options.trials)
        tenths = np.minimum((depths * 10).astype(int), 9)
        measured = {}
        for model.logn in powers:
            if not measured or length > N:  # log n acts beyond N only
                measured = {"right": None}
                if not options.skip_lost or model.logn not in lost:
                    right = passkey_right(model, documents, answers, options.batch_tokens, autocast)
                    by_depth = [[int(right[tenths == t].sum()), int((tenths == t).sum())] for t in range(10)]
                    measured = {"right": int(right.sum()), "right_by_depth": by_depth}
                if options.eval_tokens:
                    ppl = perplexity(model, text, length, options.batch_tokens, autocast)
                    measured["perplexity"] = round(ppl, 4)
            if not measured["right"]:
                lost.add(model.logn)
            yield {"run": run} | own | facts | {"logn": model.logn, "length": length} | measured


# ---------------------------------------------------------------------------------------------------------------------
# The command


def folder_of(path: Path) -> Path:
    return path.resolve() if path.is_dir() else path.resolve().parent


def append(file: Path, record: dict) -> None:
    """Adds a record on a line of its own, even after half a line that a full disk left. Raises UserError."""
    line = json.dumps(record).encode() + b"\n"
    try:
        with open(file, "ab+") as f:
            if f.tell():
                f.seek(-1, os.SEEK_END)
                line = line if f.read() == b"\n" else b"\n" + line
            f.write(line)
    except OSError as error:
        raise UserError(f"{file} could not be written ({error}): free space, or set permissions") from error


def alike(committed: list[dict], record: dict) -> list[dict]:
    """The committed records whose run and conditions differ from those of `record` in may_differ at most."""
    may_differ = ("pos", "seed", "length", "logn", "source", "dtype", "train_dtype")
    ours = plot.identity(record, *may_differ)
    same = [other for other in committed if plot.identity(other, *may_differ) == ours]
    return [plot.any_dtype(other) | {"committed": True} for other in same]


def evaluate(paths: list[Path], options: Options, out: Path | None = None, committed: list[dict] = ()) -> None:
    """Measures checkpoints. Each record is appended to eval.jsonl and printed at once. Raises UserError.

    The table and the figure are in `out`, by default the folder that holds all checkpoints. The figure also shows the
    `committed` records that are comparable. Both are written again after each length, from the second on.
    """
    out, records = out or Path(os.path.commonpath([folder_of(path) for path in paths])), []
    try:
        for path, record in ((some, record) for some in paths for record in measure(some, options)):
            records.append(record)
            found = (f"{name} {plot.cell([record], key)}" for key, (name, _) in plot.METRICS.items() if key in record)
            try:
                append(folder_of(path) / "eval.jsonl", record)
            finally:  # a full disk must not hide a result
                say(f"{record['run']}, {record['length']} tokens, p = {record['logn']:g}: {', '.join(found)}")
            lengths = [record["length"] for record in records]
            if lengths[-1] != lengths[0] and lengths.count(lengths[-1]) == lengths.count(lengths[0]):  # a whole length
                try:
                    plot.write(records, out, committed=alike(committed, records[0]))
                except UserError:
                    raise
                except Exception:  # a bug in plot.py is shown, but costs no measurement
                    traceback.print_exc()
    except torch.OutOfMemoryError:
        raise UserError("not enough memory: use a smaller --batch_tokens or shorter --lengths") from None
    say("\n" + plot.write(records, out, committed=alike(committed, records[0])))


@command
def main(argv: list[str]) -> None:
    parser = Parser(__doc__, Options)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders or files that train.py wrote")
    parser.add_argument("--out", type=Path, help="folder for table and figure (default: their common folder)")
    flags = vars(parser.parse_args(argv))
    evaluate(flags.pop("checkpoints"), out=flags.pop("out"), options=Options(**flags))


if __name__ == "__main__":
    main()
