"""Text -> token files: train.bin and val.bin, which hold tokens and nothing else, and meta.json, which describes them.

    python data/prepare.py builtin                  real text that every machine has; no download
    python data/prepare.py c4 --tokens=10e9         the paper's web text, from the Hugging Face hub
    python data/prepare.py gutenberg --tokens=5e9   the paper's books, from the hub too
    python data/prepare.py FILE.. or FOLDER         your own .txt, .jsonl, .ndjson, .json, .parquet; .gz too

The tokens of the source files are appended one file after another. A run that was stopped resumes at the source file
it was in. The same sources and arguments give the same bytes. data/README.md says more.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python data/prepare.py`

from common import Parser, UserError, command, lock, replace_file, say
from data.passkey import FILLER, byte_tokens, drill, passkey_document
from data.read import FORMATS, VAL_SHARE, documents, file_hash, find_files, format_of, held_out
from data.tokenizer import get_tokenizer

# The repository, the field of the text, and the training tokens of the paper
HUB = {"c4": ("allenai/c4", "text", 10e9), "gutenberg": ("sedthh/gutenberg_english", "TEXT", 5e9)}
BATCH = 2**22  # characters tokenized at once


def standard_library() -> tuple[str, list[tuple[str, str]]]:
    """The name of this Python's standard library, and (path, text) of each of its modules but the tests, by path."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if "site-packages" in folders or "dist-packages" in folders or any("test" in f for f in folders):
            continue
        modules.append((path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    return f"standard library of {platform.python_implementation()} {platform.python_version()}", modules


def builtin(out: Path, length: int = 512, share: float = 0.75, seed: int = 0) -> dict:
    """Write Python's standard library as byte tokens to the folder `out`. Returns what meta.json holds.

    The training split consists of windows of `length` tokens. `share` of them are passkey text, and three in four of
    these are drills: a model of 1 M parameters does not learn retrieval from text alone. Half of the drills have
    filler between the keys, and half have text from the training split. The validation split is text only, whole
    modules that the training split does not have.
    """
    source, modules = standard_library()
    tokenizer = get_tokenizer("bytes")
    splits = {False: [], True: []}
    for name, text in modules:
        split = splits[held_out(hashlib.sha256(name.encode()).digest(), 0.03)]
        split += [byte_tokens(text), np.array([tokenizer.eot], np.uint16)]
    text, val = np.concatenate(splits[False]), np.concatenate(splits[True])
    text = text[: len(text) // length * length].reshape(-1, length)
    rng = np.random.default_rng(seed)
    between = [byte_tokens(f"{FILLER} " * 10), text.ravel()]
    passkey = np.empty((round(len(text) * share / (1 - share)), length), dtype=np.uint16)
    for window in passkey:
        key, depth = int(rng.integers(10_000, 100_000)), rng.random()
        if rng.random() < 0.75:
            window[:] = drill(rng, length, between[rng.integers(2)])
        else:
            window[:] = passkey_document(tokenizer, length, key, depth)[0]
    train = rng.permutation(np.concatenate([text, passkey])).ravel()
    facts = {"source": source, "documents": len(modules), "passkey_share": share, "window": length}
    return write(out, tokenizer, train, val, facts)


def ask_hub(call, *args, **options):
    """Call a function of the hub's client. Its errors share no base class, so any exception becomes a UserError."""
    huggingface_hub.utils.logging.set_verbosity_error()  # not a line on stderr for each time that it tries again
    try:
        return call(*args, **options)
    except Exception as error:
        raise UserError(f"the Hugging Face hub could not be read ({error!r}): run the same command again") from None


def hub_sources(corpus: str) -> tuple[str, list]:
    """The commit of a corpus on the hub, and the (path, split) of its files."""
    expand = ["sha"] if corpus == "c4" else ["sha", "siblings"]
    info = ask_hub(huggingface_hub.HfApi().dataset_info, HUB[corpus][0], expand=expand)
    if corpus == "c4":
        sources = [(f"en/c4-validation.{i:05d}-of-00008.json.gz", "val") for i in range(8)]
        sources += [(f"en/c4-train.{i:05d}-of-01024.json.gz", "train") for i in range(1024)]
    else:
        names = sorted(file.rfilename for file in info.siblings)
        sources = [(name, None) for name in names if format_of(name) == "parquet"]
    return info.sha, sources


def own_sources(args) -> list[tuple[str, str | None]]:
    """The (path, split) of the user's files. If split is None, each document goes where its hash says."""
    val = find_files(args.val or [])
    excluded = {os.path.realpath(path) for path in val}  # a folder for training may contain them
    train = [path for path in find_files(args.source) if os.path.realpath(path) not in excluded]
    one_text = len(train) == 1 and format_of(train[0]) == "txt"  # its end will be held out
    return [(path, "val") for path in val] + [(path, "train" if val or one_text else None) for path in train]


def token_type(tokenizer) -> np.dtype:
    return np.dtype("uint16" if tokenizer.n_vocab <= 65_536 else "uint32")


def take_batch(pieces) -> list:
    """The next pieces, which have about BATCH characters together. At the end, an empty list."""
    batch, size = [], 0
    while size < BATCH and (piece := next(pieces, None)):
        batch.append(piece)
        size += len(piece[-1]) + 64  # a piece takes memory, however short its text is
    return batch


def append(done: Path, path: str, split: str | None, tokenizer, column: str, limit: int | None, counts: Counter, bar):
    """Append the tokens of a file to the token files in `done`, which get at most `limit` training tokens.

    Adds to `counts`: tokens by split, and good, bad and empty records. A thread reads one batch of pieces while the
    one before it is tokenized.
    """
    dtype, records = token_type(tokenizer), Counter()
    begin, end = (np.array(tokens, dtype).tobytes() for tokens in (tokenizer.bos, [tokenizer.eot]))
    pieces = (
        (split or ("val" if held_out(sha256, VAL_SHARE) else "train"), i == 0, last, piece)
        for sha256, blocks in documents(path, column, records)
        for i, (piece, last) in enumerate(tokenizer.pieces(blocks))
    )
    with open(done / "train.bin", "ab") as train, open(done / "val.bin", "ab") as val, ThreadPoolExecutor(1) as thread:
        files, batch = {"train": train, "val": val}, take_batch(pieces)
        while batch and (limit is None or counts["train"] < limit):
            upcoming = thread.submit(take_batch, pieces)
            for (goes_to, first, last, _), tokens in zip(batch, tokenizer.encode_batch([piece for *_, piece in batch])):
                files[goes_to].write(begin * first + np.array(tokens, dtype).tobytes() + end * last)
                counts[goes_to] += first * len(tokenizer.bos) + len(tokens) + last
            bar.update(counts["train"] - bar.n)
            batch = upcoming.result()
        if limit and counts["train"] > limit:
            counts["train"] = limit
            train.truncate(limit * dtype.itemsize)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    counts += records


def truncate(done: Path, counts: Counter, dtype: np.dtype) -> None:
    """Cut both token files to the tokens that are counted."""
    for split in ("train", "val"):
        with open(done / f"{split}.bin", "ab") as file:
            file.truncate(counts[split] * dtype.itemsize)


def tokenize(out: Path, corpus: str, args) -> dict:
    """Write a corpus of the hub, or files of any size, to the folder `out`. Returns what meta.json holds."""
    tokenizer = get_tokenizer(args.tokenizer or "gpt2", eot=args.eot)
    _, column, limit = HUB.get(corpus, (None, "text", 0))
    column, limit, dtype = args.text_column or column, int(args.tokens or limit) or None, token_type(tokenizer)
    commit, sources = None, [] if corpus in HUB else own_sources(args)
    if corpus == "gutenberg" or any(format_of(path) == "parquet" for path, _ in sources):
        if not importlib.util.find_spec("pyarrow"):
            raise UserError("Parquet files need the package pyarrow: pip install pyarrow")
    with workspace(out, [corpus, sources, limit, tokenizer.name, column]) as (work, state, save_state):
        if corpus in HUB:  # the first run decides on the commit
            state["hub"] = state.get("hub") or hub_sources(corpus)
            commit, sources = state["hub"]
            save_state()
        versions = [commit or [os.stat(path).st_size, os.stat(path).st_mtime_ns] for path, _ in sources]
        finished = state.setdefault("finished", [])  # for each file: its version, and the counts after it
        while [version for version, _ in finished] != versions[: len(finished)]:
            finished.pop()  # its file has changed
        counts = Counter(finished[-1][1] if finished else {})
        truncate(work / "done", counts, dtype)
        with tqdm(total=limit, initial=counts["train"], unit=" tokens", unit_scale=True, disable=None) as bar:
            for (path, split), version in list(zip(sources, versions))[len(finished) :]:
                if limit and counts["train"] == limit:
                    break
                bar.set_description(Path(path).name)
                if commit:
                    place = {"repo_type": "dataset", "revision": commit, "local_dir": work / "download"}
                    path = ask_hub(huggingface_hub.hf_hub_download, HUB[corpus][0], path, **place)
                try:
                    append(work / "done", path, split, tokenizer, column, limit, counts, bar)
                finally:  # if it was damaged, the next run downloads it again
                    if commit:
                        os.unlink(path)
                finished.append([version, dict(counts)])
                save_state()
        if not counts["train"] or (args.val and not counts["val"]):
            raise UserError(f"there is no text to {'validate' if counts['train'] else 'train'} on: name other files")
        if limit and counts["train"] < limit:
            say(f"this is all there is: fewer than the {limit:,} training tokens asked for")
        facts = {"source": corpus, "shards": [path for path, _ in sources[: len(finished)]]}
        if not counts["val"]:  # a few long documents: the end of the last one is held out
            counts["val"] = max(1, round(VAL_SHARE * counts["train"]))
            counts["train"] -= counts["val"]
            end = np.fromfile(work / "done/train.bin", dtype, offset=counts["train"] * dtype.itemsize)
            state["finished"] = []  # a run that is killed from here on starts anew
            save_state()
            truncate(work / "done", counts, dtype)
            end.tofile(work / "done/val.bin")
        tokens = {split: counts.pop(split) for split in ("train", "val")}
        facts |= {"records": counts} | ({"revision": commit} if commit else {})
        return finish(work, out, tokenizer, facts, tokens)


@contextlib.contextmanager
def workspace(out: Path, arguments: list):
    """Yield the locked folder OUT.partial, the state that an earlier run with these arguments saved, and save_state."""
    work = out.with_name(out.name + ".partial")
    kept, state = work / "state.json", {"arguments": json.loads(json.dumps(arguments))}
    try:
        (work / "done").mkdir(parents=True, exist_ok=True)
        with lock(work / "lock"):
            saved = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else state
            if saved["arguments"] != state["arguments"]:
                raise UserError(f"{work} was begun with other arguments or files: repeat those, or remove this folder")
            yield work, saved, lambda: replace_file(kept, lambda f: f.write(json.dumps(saved).encode()))
    except OSError as error:
        raise UserError(f"{out} could not be made ({error}): the same command resumes") from None


def finish(work: Path, out: Path, tokenizer, facts: dict, n_tokens: dict) -> dict:
    """Describe the token files in work/done, and rename that folder to `out`. Returns what meta.json holds."""
    done = work / "done"
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab, "dtype": token_type(tokenizer).name, **facts}
    for split, n in n_tokens.items():
        meta[split] = {"tokens": n, "sha256": file_hash(done / f"{split}.bin")}
    for name, content in tokenizer.files.items():
        (done / name).write_bytes(content)
    replace_file(done / "meta.json", lambda f: f.write(json.dumps(meta, indent=1).encode() + b"\n"))
    (work / "state.json").unlink(missing_ok=True)  # it describes the tokens in work/done, which moves
    done.rename(out)
    shutil.rmtree(work, ignore_errors=True)
    return meta


def write(out: Path, tokenizer, train: np.ndarray, val: np.ndarray, facts: dict) -> dict:
    """Make the folder `out` from two arrays of tokens. Returns what meta.json holds."""
    with workspace(out, [facts]) as (work, _, _):
        for split, tokens in (("train", train), ("val", val)):
            tokens.astype(token_type(tokenizer)).tofile(work / "done" / f"{split}.bin")
        return finish(work, out, tokenizer, facts, {"train": len(train), "val": len(val)})


@command
def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", nargs="+", help=f"builtin, c4, gutenberg, a folder, or files: {FORMATS}")
    parser.add_argument("--val", nargs="+", help="files or folders for validation (default: 1%% of the documents)")
    parser.add_argument("--out", type=Path, help="folder to make (default: data/builtin, c4, gutenberg or mine)")
    parser.add_argument("--tokens", type=float, help="maximum training tokens (default: c4 10e9, gutenberg 5e9)")
    parser.add_argument("--tokenizer", help="gpt2 (default), bytes, a FILE.tiktoken, or a model's tokenizer.json")
    parser.add_argument("--eot", help="end-of-document token of a tokenizer.json, where no config beside it has one")
    parser.add_argument("--text_column", help="field with each record's text (default: text; TEXT for gutenberg)")
    args = parser.parse_args(argv)
    name = args.source[0] if args.source[0] in ("builtin", *HUB) else "files"
    out = args.out or Path("data") / ("mine" if name == "files" else name)
    if out.exists():
        raise UserError(f"{out} exists: remove it, or name another folder with --out")
    if name != "files" and (len(args.source) > 1 or args.val):
        raise UserError(f"{name} stands alone, without files or --val: prepare those in another folder")
    if name == "builtin" and (args.tokens or args.tokenizer or args.eot or args.text_column):
        raise UserError("builtin takes no option but --out")
    if args.tokens is not None and not 1 <= args.tokens < float("inf"):
        raise UserError("--tokens must be a number of at least 1")
    try:
        meta = builtin(out) if name == "builtin" else tokenize(out, name, args)
    except KeyboardInterrupt:
        say("\nstopped: the same command resumes")
        raise SystemExit(130) from None
    if "records" in meta:
        say(f"records: {', '.join(f'{n:,} {kind}' for kind, n in meta['records'].items())}")
    for split in ("train", "val"):
        say(f"{out}/{split}.bin: {meta[split]['tokens']:,} tokens, sha256 {meta[split]['sha256']}")


if __name__ == "__main__":
    main(sys.argv[1:])
