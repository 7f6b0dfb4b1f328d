"""Text -> token files: train.bin and val.bin, which hold tokens and nothing else, and meta.json, which describes them.

    python data/prepare.py builtin                  real text that every machine has; no download
    python data/prepare.py c4 --tokens=10e9         the paper's web text, from the Hugging Face hub
    python data/prepare.py gutenberg --tokens=5e9   the paper's books, from the hub too
    python data/prepare.py FILE.. or FOLDER         your own .txt, .jsonl, .ndjson, .json, .parquet; .gz too

Each source file becomes one part, a folder that is written beside its place and renamed. At the end the parts are
joined. A run that was stopped resumes at the source file it was in. The bytes depend on the arguments alone.
data/README.md says more.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python data/prepare.py`

from data.files import fail, lock, replace_file, say
from data.passkey import FILLER, byte_tokens, drill, passkey_document
from data.read import BLOCK, FORMATS, VAL_SHARE, Source, held_out, import_parquet, local_sources, pieces
from data.tokenizer import get_tokenizer

HUB = {"c4": "allenai/c4", "gutenberg": "sedthh/gutenberg_english"}
TOKENS = {"c4": 10e9, "gutenberg": 5e9}  # what the paper trains on
BATCH = 2**22  # characters tokenized at once


# ---------------------------------------------------------------------------------------------------------------------
# The built-in corpus


def standard_library() -> tuple[str, list[tuple[str, str]]]:
    """What it is, and (name, text) of every module of the running Python's standard library but the tests, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if "site-packages" in folders or "dist-packages" in folders or any("test" in f for f in folders):
            continue
        documents.append((path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    return f"standard library of {platform.python_implementation()} {platform.python_version()}", documents


def builtin(out: Path, length: int = 512, share: float = 0.75, seed: int = 0) -> dict:
    """Write Python's standard library in byte tokens to the folder `out`. Returns what meta.json holds.

    The training split consists of windows of `length` tokens. `share` of them are passkey text, and three in four of
    these are drills: a model of 1 M parameters does not learn retrieval from text alone. Half of the drills have
    filler between the keys, and half have text from the training split. The validation split is text only, whole
    modules that the training split does not have.
    """
    with workspace(out, ["builtin"]) as work:
        source, documents = standard_library()
        tokenizer = get_tokenizer("bytes")
        splits = {False: [], True: []}
        for name, text in documents:
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
        facts = {"source": source, "documents": len(documents), "passkey_share": share, "window": length}
        return save(work, out, tokenizer, train, val, facts)


# ---------------------------------------------------------------------------------------------------------------------
# Corpora of any size


def hub_sources(corpus: str, work: Path) -> tuple[str, list[Source]]:
    """The commit and the sources of a corpus on the hub. They are read once, and `work` keeps them for later runs."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, utils

    utils.logging.set_verbosity_error()  # not a line on stderr for each time that it tries again
    kept, repository = work / "hub.json", HUB[corpus]
    if not kept.exists():
        if corpus == "c4":
            sources = [(f"en/c4-validation.{i:05d}-of-00008.json.gz", "val") for i in range(8)]
            sources += [(f"en/c4-train.{i:05d}-of-01024.json.gz", "train") for i in range(1024)]
        else:
            names = HfApi().list_repo_files(repository, repo_type="dataset")
            sources = [(name, None) for name in sorted(names) if name.endswith(".parquet")]
            if not sources:
                fail(f"{repository} on the hub has no .parquet file")
        commit = get_hf_file_metadata(hf_hub_url(repository, sources[0][0], repo_type="dataset")).commit_hash
        replace_file(kept, lambda f: f.write(json.dumps([commit, sources]).encode()))
    commit, sources = json.loads(kept.read_text())
    return commit, [Source(Path(name).name, name, split) for name, split in sources]


def from_hub(function, corpus: str, *args):
    """Call a function that uses the hub. Its client and its HTTP library have exceptions of many kinds: one line."""
    try:
        return function(corpus, *args)
    except Exception as error:
        fail(f"{HUB[corpus]} could not be read from the hub ({error!r}): run the same command again")


def download(corpus: str, name: str, commit: str, work: Path) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(HUB[corpus], name, repo_type="dataset", revision=commit, local_dir=work / "download")


def token_type(tokenizer) -> np.dtype:
    return np.dtype("uint16" if tokenizer.n_vocab <= 65_536 else "uint32")


def batches(pieces):
    """Lists of pieces that have about BATCH characters together."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1]) + 64  # a piece takes memory, however short its text is
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def tokenized(pieces, tokenizer):
    """Yield ((split, text, last), tokens) of every piece. A thread tokenizes one batch while the next one is read."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for batch in batches(pieces):
            upcoming = batch, thread.submit(tokenizer.encode_batch, [text for _, text, _ in batch])
            if waiting:
                yield zip(waiting[0], waiting[1].result())
            waiting = upcoming
        yield zip(waiting[0], waiting[1].result())


def write_part(part: Path, source: Source, path: str, tokenizer, column: str, limit: int | None, bar) -> dict:
    """Tokenize a source, whose file lies at `path`, into the new folder `part`: at most `limit` training tokens.

    Returns its counts: tokens and documents of each split, and records by kind.
    """
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    records, dtype = Counter(), token_type(tokenizer)
    end = np.array([tokenizer.eot], dtype).tobytes()
    counts = {split: {"tokens": 0, "documents": 0} for split in ("train", "val")}
    with open(part / "train.bin", "wb") as train, open(part / "val.bin", "wb") as val:
        files = {"train": train, "val": val}
        for batch in tokenized(pieces(source, path, column, tokenizer, records), tokenizer):
            for (split, _, last), tokens in batch:
                files[split].write(np.array(tokens, dtype))
                files[split].write(end * last)
                counts[split]["documents"] += last
                counts[split]["tokens"] += len(tokens) + last
                bar.update(len(tokens) + last if split == "train" else 0)
            if limit and counts["train"]["tokens"] >= limit:
                counts["train"]["tokens"] = limit
                train.truncate(limit * dtype.itemsize)
                break
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return counts | {"records": records}


def write_parts(work: Path, corpus: str, commit: str | None, sources: list, tokenizer, column: str, limit: int | None):
    """Make the parts that `work` does not have yet, up to `limit` training tokens. Returns the counts of all parts."""
    parts, n_train = [], 0
    with tqdm(total=limit, unit=" tokens", unit_scale=True, disable=None) as bar:
        for number, source in enumerate(sources):
            bar.set_description(source.name)
            part, temporary, left = work / f"{number:05d}", work / "part", limit and limit - n_train
            version = commit or [os.stat(source.path).st_size, os.stat(source.path).st_mtime_ns]
            counts = json.loads((part / "counts.json").read_text()) if part.exists() else {}
            if counts.get("made_from") == [version, left]:
                bar.update(counts["train"]["tokens"])
            else:  # it is not there, or its file has changed, or how much is left to do
                shutil.rmtree(part, ignore_errors=True)
                path = from_hub(download, corpus, source.path, commit, work) if commit else source.path
                try:
                    counts = write_part(temporary, source, path, tokenizer, column, left, bar)
                finally:  # if it was damaged, the next run downloads it again
                    if commit:
                        os.unlink(path)
                counts["made_from"] = [version, left]
                (temporary / "counts.json").write_text(json.dumps(counts))
                temporary.rename(part)
            parts.append(counts)
            n_train += counts["train"]["tokens"]
            if n_train == limit:
                break
    if limit and n_train < limit:
        say(f"this is all there is: fewer than the {limit:,} training tokens asked for")
    return parts


def join(work: Path, parts: list[dict], dtype: np.dtype) -> dict:
    """Join the parts' token files in work/done. Returns {split: its tokens and documents}."""
    done, counts = work / "done", {}
    shutil.rmtree(done, ignore_errors=True)
    done.mkdir()
    for split in ("train", "val"):
        with open(done / f"{split}.bin", "wb") as joined:
            for number in range(len(parts)):
                with open(work / f"{number:05d}" / f"{split}.bin", "rb") as file:
                    shutil.copyfileobj(file, joined, BLOCK)
        counts[split] = {what: sum(part[split][what] for part in parts) for what in ("tokens", "documents")}
    train, val = counts["train"], counts["val"]
    if train["tokens"] and not val["tokens"]:  # a few long documents: the end of the last one is held out
        val["tokens"] = max(1, round(VAL_SHARE * train["tokens"]))
        train["tokens"] -= val["tokens"]
        with open(done / "train.bin", "r+b") as file:
            file.seek(train["tokens"] * dtype.itemsize)
            (done / "val.bin").write_bytes(file.read())
            file.truncate(train["tokens"] * dtype.itemsize)
    return counts


def large(out: Path, corpus: str, args) -> dict:
    """Write a corpus of the hub, or files of any size, to the folder `out`. Returns what meta.json holds."""
    tokenizer = get_tokenizer(args.tokenizer, eot=args.eot)
    commit, sources = None, [] if corpus in HUB else local_sources(args.source, args.text_column)
    if corpus == "gutenberg":
        import_parquet()
    limit = int(args.tokens or TOKENS.get(corpus, 0)) or None
    with workspace(out, [corpus, sources, limit, tokenizer.name, args.text_column]) as work:
        if corpus in HUB:
            commit, sources = from_hub(hub_sources, corpus, work)
        parts = write_parts(work, corpus, commit, sources, tokenizer, args.text_column, limit)
        counts = join(work, parts, token_type(tokenizer))
        if not counts["train"]["tokens"]:
            fail("there is no text to train on")
        records = sum((Counter(part["records"]) for part in parts), Counter())
        facts = {"source": corpus, "shards": [source.name for source in sources[: len(parts)]], "records": records}
        return finish(work, out, tokenizer, facts | ({"revision": commit} if commit else {}), counts)


# ---------------------------------------------------------------------------------------------------------------------
# The folder


@contextlib.contextmanager
def workspace(out: Path, arguments: list):
    """The folder OUT.partial, locked, in which `out` is made. One that other arguments began is refused."""
    work = out.with_name(out.name + ".partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with lock(work / "lock"):
            kept, text = work / "arguments.json", json.dumps(arguments)
            if kept.exists() and kept.read_text() != text:
                fail(f"{work} was begun with other arguments or files: repeat those, or remove it")
            replace_file(kept, lambda f: f.write(text.encode()))
            yield work
    except OSError as error:
        fail(f"{out} could not be made ({error}): the same command resumes")


def finish(work: Path, out: Path, tokenizer, facts: dict, counts: dict) -> dict:
    """Describe the token files in work/done, and rename that folder to `out`. Returns what meta.json holds."""
    done, dtype = work / "done", token_type(tokenizer)
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab, "dtype": dtype.name, **facts}
    for split in ("train", "val"):
        meta[split] = counts[split] | {"sha256": file_hash(done / f"{split}.bin")}
    for name, content in tokenizer.files.items():
        (done / name).write_bytes(content)
    replace_file(done / "meta.json", lambda f: f.write(json.dumps(meta, indent=1).encode() + b"\n"))
    done.rename(out)
    shutil.rmtree(work, ignore_errors=True)
    return meta


def save(work: Path, out: Path, tokenizer, train: np.ndarray, val: np.ndarray, facts: dict) -> dict:
    """Save two arrays of tokens in `work`, the work folder of `out`, and finish it. Returns what meta.json holds."""
    (work / "done").mkdir(exist_ok=True)
    for split, tokens in (("train", train), ("val", val)):
        tokens.astype(token_type(tokenizer)).tofile(work / "done" / f"{split}.bin")
    return finish(work, out, tokenizer, facts, {"train": {"tokens": len(train)}, "val": {"tokens": len(val)}})


def write(out: Path, tokenizer, train: np.ndarray, val: np.ndarray, facts: dict) -> dict:
    """Make the folder `out` of two arrays of tokens of your own. Returns what meta.json holds."""
    with workspace(out, [facts]) as work:
        return save(work, out, tokenizer, train, val, facts)


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def nanogpt_facts(folder: Path, path: Path) -> dict:
    """What meta.json would say of a folder of nanoGPT's, if its tokens are GPT-2's. Any other is refused."""
    tokens, why = np.memmap(path, np.uint16, mode="r"), None
    if (folder / "meta.pkl").exists():
        why = "its vocabulary is in meta.pkl, a pickle, which is not opened"
    elif len(tokens) > 1 and not tokens[1::2].any():
        why = f"{path.name} has a 0 in every second place, as tokens in uint32 do"
    elif tokens.max() >= 50_257:
        why = f"{path.name} has token {tokens.max()}, and GPT-2's end at 50256"
    if why:
        example = '{"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint32"}'
        fail(f"{folder} has no meta.json, and {why}: say what it is in {folder}/meta.json, for example {example}")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"{folder} has no meta.json: {path.name} is read as nanoGPT's, GPT-2 tokens in uint16")
    return {"tokenizer": "gpt2", "vocab_size": 50_257, "dtype": "uint16"}


def load(folder: str | Path, split: str) -> tuple[np.ndarray, dict]:
    """Return (the tokens of a split, mapped from its file; the facts of meta.json, always with meta[split]["sha256"]).

    Reads the file once, to see that it is the one that meta.json describes. A meta.json written by hand needs only
    tokenizer, vocab_size and dtype.
    """
    folder = Path(folder)
    path, meta_path = folder / f"{split}.bin", folder / "meta.json"
    if not path.is_file():
        fail(f"there is no {path}: make it with data/prepare.py, or name another folder with --data")
    size = path.stat().st_size
    if not size or size % 2:
        fail(f"{path} is empty or was cut off: run data/prepare.py again")
    sha256 = file_hash(path)
    try:
        meta = json.loads(meta_path.read_text()) if meta_path.exists() else nanogpt_facts(folder, path)
        dtype = {"uint16": np.dtype("uint16"), "uint32": np.dtype("uint32")}[meta.get("dtype", "uint16")]
        meta["tokenizer"]
        if meta["vocab_size"] > 2 ** (8 * dtype.itemsize):
            fail(f"{meta_path} says {meta['vocab_size']} tokens in {dtype}, which cannot hold them: set its dtype")
        facts = meta.setdefault(split, {"tokens": size // dtype.itemsize, "sha256": sha256})
        if size != facts["tokens"] * dtype.itemsize:
            fail(f"{path} has {size} bytes, and meta.json says {facts['tokens']} tokens: run data/prepare.py again")
        if sha256 != facts["sha256"]:
            fail(f"{path} does not have the sha256 that meta.json says: run data/prepare.py again")
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f"{meta_path} is damaged: run data/prepare.py again")
    return np.memmap(path, dtype, mode="r"), meta


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("source", nargs="+", help=f"builtin, c4, gutenberg, a folder, or files: {FORMATS}")
    parser.add_argument("--out", type=Path, help="folder to make (default: data/builtin, c4, gutenberg or mine)")
    parser.add_argument("--tokens", type=float, help="maximum training tokens (default: 10e9 of c4, 5e9 of gutenberg)")
    parser.add_argument("--tokenizer", help="gpt2 (default), bytes, a FILE.tiktoken, or a model's tokenizer.json")
    parser.add_argument("--eot", help="end-of-document token of a tokenizer.json, where no config beside it has one")
    parser.add_argument("--text_column", help="name of each record's text (default: text)")
    args = parser.parse_args(argv)
    name = args.source[0] if args.source[0] in ("builtin", *HUB) else "files"
    out = args.out or Path("data") / ("mine" if name == "files" else name)
    if out.exists():
        fail(f"{out} exists: remove it, or name another folder with --out")
    if name != "files" and len(args.source) > 1:
        fail(f"{name} stands alone: prepare files in another folder")
    if name == "builtin" and (args.tokens or args.tokenizer or args.eot or args.text_column):
        fail("builtin takes no option but --out")
    if args.tokens is not None and not 1 <= args.tokens < float("inf"):
        fail("--tokens must be a number of at least 1")
    args.tokenizer, args.text_column = args.tokenizer or "gpt2", args.text_column or "text"
    try:
        meta = builtin(out) if name == "builtin" else large(out, name, args)
    except KeyboardInterrupt:
        say("\nstopped: the same command resumes")
        raise SystemExit(130) from None
    if "records" in meta:
        say(f"records: {', '.join(f'{n:,} {kind}' for kind, n in meta['records'].items())}")
    for split in ("train", "val"):
        say(f"{out}/{split}.bin: {meta[split]['tokens']:,} tokens, sha256 {meta[split]['sha256']}")


if __name__ == "__main__":
    main(sys.argv[1:])
