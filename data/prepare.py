"""Text -> token files: train.bin and val.bin (uint16 tokens and nothing else, nanoGPT's layout) and meta.json.

    python data/prepare.py builtin                  real text that every machine has; no download
    python data/prepare.py c4 --tokens=10e9         the paper's web text, from the Hugging Face hub
    python data/prepare.py gutenberg --tokens=5e9   the paper's books
    python data/prepare.py FILE [FILE..]            your own .txt, .jsonl, .parquet, and the first two as .gz

The built-in corpus is the running Python's own standard library (no site-packages, no tests) in byte tokens. Three in
four of its training windows are passkey text: a model of 1 M parameters meets too little text to learn retrieval from
text alone, as the paper's models do. Validation is text only, whole files that training never sees.

Everything else goes through one pipeline: threads download, this process unpacks and writes, worker processes parse and
tokenize. What is written depends on the arguments alone, not on how many workers there are or how often it was stopped.
"""

import argparse
import base64
import contextlib
import errno
import gzip
import hashlib
import http.client
import io
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import tiktoken

DATA = Path(__file__).resolve().parent
END = "<|endoftext|>"  # after every document


def fail(message: str):
    """How every command here ends on bad input: one line on stderr and exit status 2 (one process a machine speaks)."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.splitlines())}", file=sys.stderr)  # it may quote more
    raise SystemExit(2)


def replace_file(path: Path, write) -> None:
    """Whole or not at all: write(f) goes beside the old file, is synced to the disk, then renamed over it."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace(path: Path, text: str) -> None:
    replace_file(path, lambda f: f.write(text.encode()))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

# What GPT-2 cuts a text into before it merges bytes: contractions, words, numbers, other signs, spaces.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def byte_tokenizer() -> tiktoken.Encoding:
    """A token a byte, and one for the end of a document: 257 tokens."""
    ranks = {bytes([b]): b for b in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={END: 256})


def ranks_tokenizer(path: Path) -> tiktoken.Encoding:
    """A tokenizer from tiktoken's file format, a line a token: its bytes in base64, its rank. Named by its hash."""
    try:
        content = path.read_bytes()
        lines = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        fail(f"{path} is no file of tokenizer ranks: {error}")
    if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([b]) in ranks for b in range(256)):
        fail(f"{path} is no file of tokenizer ranks: 0, 1, 2 .. once each, the 256 bytes among its tokens")
    if len(ranks) + 1 > 65_536:
        fail(f"{path} has {len(ranks) + 1} tokens with {END}: uint16 holds 65536")
    name = "ranks-" + hashlib.sha256(content).hexdigest()[:16]
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def get_tokenizer(name: str, folder: str | Path = ".") -> tiktoken.Encoding:
    """The tokenizer that meta.json in `folder` names: "bytes", "gpt2", or "ranks-HASH", whose ranks lie beside it."""
    if name == "bytes":
        return byte_tokenizer()
    if name.startswith("ranks-"):
        tokenizer = ranks_tokenizer(Path(folder) / "tokenizer.tiktoken")
        if tokenizer.name != name:
            fail(f"{folder}/tokenizer.tiktoken is not the tokenizer {name} that this needs: name the data it was trained on")
        return tokenizer
    if name != "gpt2":  # tiktoken's later ones do not fit into uint16
        fail(f"tokenizer {name!r} is unknown: use bytes, gpt2 or a FILE.tiktoken")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError):  # no network; another file than GPT-2's came
        fail(f"tiktoken could not download the {name} tokenizer: connect once, or point TIKTOKEN_CACHE_DIR at a cache")


def encode(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """encode_ordinary without a Python list in between, which is a tenth of its time."""
    try:
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold: U+FFFD, as tiktoken's own encode does
        return encode(tokenizer, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


# ---------------------------------------------------------------------------------------------------------------------
# The passkey document (Mohtashami & Jaggi, arXiv 2305.16300; the strings are the benchmark's own)

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INFORMATION = "The pass key is {k}. Remember it. {k} is the pass key."
QUESTION = "What is the pass key? The pass key is"
ANSWER = " {k}"


def passkey_document(tokenizer, length: int, key: int, depth: float) -> tuple[list[int], int]:
    """Exactly `length` tokens, answer included, and how many tokens the answer has.

    Five lines: task, filler, information, filler, question and answer. The filler is cut in tokens to fill the length;
    depth in [0, 1] is the share of it that stands before the information. Raises ValueError if the length cannot hold
    the fixed strings (253 bytes).
    """
    encode = tokenizer.encode_ordinary
    head, tail = encode(TASK + "\n"), encode("\n" + QUESTION)
    info, answer = encode("\n" + INFORMATION.format(k=key) + "\n"), encode(ANSWER.format(k=key))
    room = length - len(head) - len(info) - len(tail) - len(answer)
    if room < 0:
        raise ValueError(f"length {length} is too short for a passkey prompt: its fixed strings take {length - room} tokens")
    filler = encode(FILLER + (" " + FILLER) * (room // len(encode(" " + FILLER)) + 1))
    before = round(depth * room)
    return head + filler[:before] + info + filler[: room - before] + tail + answer, len(answer)


# ---------------------------------------------------------------------------------------------------------------------
# The built-in corpus


def standard_library() -> tuple[str, list[tuple[str, str]]]:
    """What it is, and (name, text) of every module of the running Python's standard library, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if "site-packages" in folders or "dist-packages" in folders or any("test" in f for f in folders):
            continue
        documents.append((path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    return f"standard library of {platform.python_implementation()} {platform.python_version()}", documents


def held_out(sha256: bytes, share: float) -> bool:
    """Whether a document is for validation, by the hash of its name or its text alone: no text is on both sides."""
    return int.from_bytes(sha256[:4], "big") < share * 2**32


def join(tokenizer: tiktoken.Encoding, texts: list[str]) -> np.ndarray:
    end = [tokenizer.encode_single_token(END)]
    return np.concatenate([part for text in texts for part in (encode(tokenizer, text), end)]).astype(np.uint16)


def drill(rng, length: int) -> np.ndarray:
    """Byte tokens that say one key again and again, with cuts of filler between: retrieval at every distance.

    In the document above six bytes of `length` can be learned from, too few for a small model to find among the rest.
    Here it is up to one in eight: each drill draws how long its cuts may be, from 16 to 256 bytes.
    """
    key, longest = rng.integers(10_000, 100_000), 2 ** rng.integers(4, 9)
    lines = [INFORMATION, QUESTION + ANSWER, "The pass key is {k}."]
    start, text = rng.integers(100), ""
    while len(text) < start + length:
        text += lines[rng.integers(len(lines))].format(k=key) + "\n" + " ".join([FILLER] * 3)[: rng.integers(longest)] + "\n"
    return np.frombuffer(text[start : start + length].encode(), dtype=np.uint8)


def builtin(out: Path, length: int = 512, share: float = 0.75, seed: int = 0) -> dict:
    """Training windows of `length` byte tokens: text, and a share of passkey windows, three in four of them drills."""
    source, documents = standard_library()
    tokenizer = byte_tokenizer()
    sides: dict[bool, list[str]] = {False: [], True: []}
    for name, content in documents:
        sides[held_out(hashlib.sha256(name.encode()).digest(), 0.03)].append(content)
    text, val = join(tokenizer, sides[False]), join(tokenizer, sides[True])
    text = text[: len(text) // length * length].reshape(-1, length)
    rng = np.random.default_rng(seed)
    passkey = np.empty((round(len(text) * share / (1 - share)), length), dtype=np.uint16)
    for window in passkey:
        document, _ = passkey_document(tokenizer, length, int(rng.integers(10_000, 100_000)), rng.random())
        window[:] = drill(rng, length) if rng.random() < 0.75 else document
    train = rng.permutation(np.concatenate([text, passkey])).ravel()
    facts = {"source": source, "documents": len(documents), "passkey_share": share, "window": length}
    return write(out, tokenizer, train, val, facts)


# ---------------------------------------------------------------------------------------------------------------------
# Corpora of any size. A shard is a file, of the hub's or your own: (name, path or address, its split or None: by document)

HUB = "https://huggingface.co"
HUB_TOKENS = {"c4": 10e9, "gutenberg": 5e9}  # what the paper trains on
VAL_SHARE = 0.01  # of the documents, where the source has no validation set of its own
CHUNK = 2**20  # characters or bytes that a worker gets at once
DOWNLOADS = 3  # shards fetched ahead, side by side
TRIES, PAUSE, TIMEOUT = 8, 1.0, 60.0  # attempts, seconds between the first two (then doubled), seconds of silence


class Broken(Exception):
    """Something outside this program is wrong. Its message is the line that says what, and what to do."""


class Damaged(Exception):
    """A shard cannot be read to its end."""


def hub_shards(corpus: str, base_url: str, work: Path, stop) -> list[tuple[str, str, str | None]]:
    """Where the paper's corpora lie on the Hugging Face hub, or a mirror of its paths."""
    if corpus == "c4":
        folder = f"{base_url}/datasets/allenai/c4/resolve/main/en"
        names = [("val", f"c4-validation.{i:05d}-of-00008.json.gz") for i in range(8)]
        names += [("train", f"c4-train.{i:05d}-of-01024.json.gz") for i in range(1024)]
        return [(name, f"{folder}/{name}", split) for split, name in names]
    repository = "datasets/sedthh/gutenberg_english"
    listing = work / "listing.json"
    download(f"{base_url}/api/{repository}/tree/main/data", listing, stop)
    try:
        paths = sorted(entry["path"] for entry in json.loads(listing.read_text()) if entry["path"].endswith(".parquet"))
        if not paths:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        listing.unlink()
        raise Broken(f"{base_url} did not answer with a list of the corpus's files") from None
    return [(Path(path).name, f"{base_url}/{repository}/resolve/main/{path}", None) for path in paths]


def download(url: str, path: Path, stop: threading.Event) -> None:
    """Fetch url to path, whole. A cut download is gone on with where it ended, now or in another run.

    Raises Broken after TRIES attempts in a row that got no further, or at once for an answer like 404.
    """
    part = path.with_name(path.name + ".part")
    failures = furthest = 0
    while not path.exists():
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                if answer.status == 206:
                    total = int(answer.headers.get("Content-Range", "").rpartition("/")[2])
                else:  # the whole file, asked for or not
                    have, total = 0, int(answer.headers.get("Content-Length", -1))
                with open(part, "ab" if have else "wb") as file:
                    while block := answer.read1(CHUNK):  # what has come: a read() that times out loses it
                        file.write(block)
                        have += len(block)
                        if have > furthest:
                            furthest, failures = have, 0
                        if stop.is_set():
                            return
            if have < total:
                raise ConnectionError(f"the connection ended after {have} of {total} bytes")
            if have > total >= 0:
                part.unlink()
                raise ConnectionError(f"{have} bytes came where {total} were announced")
            os.replace(part, path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            code = getattr(error, "code", None)
            if code == 416 and have:  # nothing is behind what we have: the end, unless the file is another one by now
                if error.headers.get("Content-Range") == f"bytes */{have}":
                    os.replace(part, path)
                else:
                    part.unlink()
                continue
            if code and code < 500 and code not in (408, 429):
                raise Broken(f"{url} cannot be downloaded: {error}") from None
            failures += 1
            if failures == TRIES:
                raise Broken(f"{url} could not be downloaded in {TRIES} attempts ({error}): the same command goes on from here") from None
            pause = PAUSE * 2 ** (failures - 1)
            print(f"\r{url}: {error}; again in {pause:.0f} s", flush=True)
            if stop.wait(pause):
                return


def in_background(function, *args) -> Future:
    """A call in a thread that the end of this process does not wait for, however long a server is silent."""
    future: Future = Future()

    def call() -> None:
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def pieces(file: io.TextIOBase):
    """One long text in pieces of about CHUNK, each with whether it is the last.

    Cut before a space or newline that follows no other: there GPT-2's pattern always ends one token and begins
    another, so that the tokens of the pieces are the tokens of the whole.
    """
    rest = ""
    while block := file.read(CHUNK):
        rest += block
        cut = next((i for i in range(len(rest) - 1, 0, -1) if rest[i] in " \n" and not rest[i - 1].isspace()), 0)
        if cut:
            yield rest[:cut], False
            rest = rest[cut:]
    yield rest, True


def is_text(name: str) -> bool:
    """Whether a file is one document, and not a list of them."""
    return not name.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet"))


def records(name: str, raw, split: str | None):
    """What a shard holds, one record after another: (JSON line as bytes or text, whether a document ends, its split).

    A split of None is to be found from the document's text.
    """
    if name.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError:
            raise Broken(f"{name} needs pyarrow to be read: pip install pyarrow") from None
        file = pyarrow.parquet.ParquetFile(raw)
        column = next((f.name for f in file.schema_arrow if f.name.lower() == "text" and "string" in str(f.type)), None)
        if column is None:
            raise Broken(f"{name} has no column of strings named text")
        for batch in file.iter_batches(batch_size=16, columns=[column], use_threads=False):
            for text in batch.column(0).to_pylist():
                yield text, True, split
        return
    unpacked = io.BufferedReader(gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw, CHUNK)
    if not is_text(name):
        for line in unpacked:
            yield line, True, split
        return
    if split is None:  # one text, too long to be held: read twice
        digest = hashlib.sha256()
        while block := unpacked.read(CHUNK):
            digest.update(block)
        split = "val" if held_out(digest.digest(), VAL_SHARE) else "train"
        unpacked.seek(0)
    for piece, last in pieces(io.TextIOWrapper(unpacked, encoding="utf-8", newline="")):
        yield piece, last, split


def chunks(records):
    """Lists of records of about CHUNK together, each with the number of its first one, from 1."""
    chunk, size, first = [], 0, 1
    try:
        for number, record in enumerate(records, 1):
            chunk.append(record)
            size += len(record[0] or "")
            if size >= CHUNK:
                yield first, chunk
                chunk, size, first = [], 0, number + 1
    except (OSError, EOFError, ValueError, zlib.error) as error:  # what gzip, UTF-8 and Parquet raise for a damaged file
        raise Damaged(str(error) or type(error).__name__) from None
    if chunk:
        yield first, chunk


def start_worker(tokenizer: tiktoken.Encoding) -> None:
    """In each worker process, once."""
    global worker_tokenizer
    worker_tokenizer = tokenizer
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # it may be killed


def tokenize(first: int, chunk: list) -> dict:
    """In a worker: a chunk's tokens and number of documents by split, and how many documents had an empty text."""
    end = np.array([worker_tokenizer.encode_single_token(END)], dtype=np.uint16)
    tokens, documents = {"train": [end[:0]], "val": [end[:0]]}, {"train": 0, "val": 0, "empty": 0}
    for number, (text, last, split) in enumerate(chunk, first):
        if isinstance(text, bytes):
            try:
                text = json.loads(text)["text"]
            except (ValueError, TypeError, KeyError):
                raise Damaged(f'line {number} is no JSON object with a "text"') from None
        if not isinstance(text, str):
            raise Damaged(f"document {number} has no text: {json.dumps(text)[:40]}")
        if not text:
            documents["empty"] += 1
            continue
        sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        split = split or ("val" if held_out(sha256, VAL_SHARE) else "train")
        tokens[split] += [encode(worker_tokenizer, text), end] if last else [encode(worker_tokenizer, text)]
        documents[split] += last
    return {"documents": documents, "tokens": {k: np.concatenate(v).astype(np.uint16) for k, v in tokens.items()}}


def submit(pool: ProcessPoolExecutor, *task):
    """pool.submit. Workers that it starts ignore Ctrl-C from birth, as this process does meanwhile: the parent ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return pool.submit(*task)
    finally:
        signal.signal(signal.SIGINT, before)


def in_order(pool: ProcessPoolExecutor, chunks, ahead: int):
    """tokenize's results in the order of the chunks, of which `ahead` at most are on their way: memory stays flat."""
    waiting: deque = deque()
    for first, chunk in chunks:
        waiting.append(submit(pool, tokenize, first, chunk))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Progress:
    """Shards, tokens, tokens/s and the time left: every second on a terminal, every half minute elsewhere."""

    def __init__(self, state: dict, shards: int, limit: int | None):
        self.shards, self.limit = shards, limit
        self.start = self.shown = time.time()
        self.tokens, self.share = self.done(len(state["shards"]), state)

    def done(self, read: float, state: dict) -> tuple[int, float]:
        """Tokens, and the share of the work that is done."""
        train = state["train"]["tokens"]
        return train + state["val"]["tokens"], max(read / self.shards, train / self.limit if self.limit else 0)

    def __call__(self, read: float, state: dict) -> None:
        """`read` shards are read, the last of them in part."""
        terminal, now = sys.stdout.isatty(), time.time()
        if now - self.shown > (1 if terminal else 30):
            tokens, share = self.done(read, state)
            elapsed, gained = now - self.start, share - self.share
            line = f"{read:.1f} of {'at most ' if self.limit else ''}{self.shards} shards  {tokens:,} tokens  "
            line += f"{(tokens - self.tokens) / elapsed:,.0f} tokens/s"
            line += f"  {elapsed * (1 - share) / gained / 60:.1f} min left" if gained > 0 else ""
            print(f"\r{line:<100}" if terminal else line, end="" if terminal else "\n", flush=True)
            self.shown = now


def convert(work: Path, state: dict, shards: list, tokenizer: tiktoken.Encoding, limit: int | None, workers: int, stop) -> dict:
    """Every shard's tokens, in order, into work/train.bin and work/val.bin, up to `limit` training tokens.

    state, kept in work/state.json, counts what whole shards brought, and is replaced after each, once their tokens are on the disk.
    Started again, this cuts the files back to it and goes on with the next shard. Returns the counts.
    """
    files = {split: open(work / f"{split}.bin", "ab") for split in ("train", "val")}
    for split, file in files.items():
        file.truncate(2 * state[split]["tokens"])

    def commit() -> None:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        replace(work / "state.json", json.dumps(state))

    def take(chunk: dict) -> None:
        for split, tokens in chunk["tokens"].items():
            if limit and split == "train":
                tokens = tokens[: limit - state["train"]["tokens"]]
            files[split].write(tokens.tobytes())
            state[split]["tokens"] += len(tokens)
            state[split]["documents"] += chunk["documents"][split]
        state["empty"] += chunk["documents"]["empty"]

    progress, fetched = Progress(state, len(shards), limit), {}
    # Spawned, not forked: a process with threads must not be forked.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (tokenizer,))
    try:
        while not state["done"]:
            number = len(state["shards"])
            for i, (name, place, _) in enumerate(shards[number : number + DOWNLOADS], number):
                if "://" in place and i not in fetched:
                    fetched[i] = in_background(download, place, work / name, stop)
            name, place, split = shards[number]
            if number in fetched:
                fetched.pop(number).result()
                place = work / name
            try:
                with open(place, "rb") as raw:
                    size = max(os.fstat(raw.fileno()).st_size, 1)
                    for chunk in in_order(pool, chunks(records(name, raw, split)), 3 * workers):
                        take(chunk)
                        progress(number + (1 if raw.closed else raw.tell() / size), state)
                        if state["train"]["tokens"] == limit:
                            break
            except Damaged as error:
                if place != work / name:
                    raise Broken(f"{place} is damaged ({error}): mend it or leave it out, remove {work} and start again") from None
                place.unlink()
                raise Broken(f"{name} came damaged ({error}): the same command downloads it again") from None
            state["shards"].append(name)
            state["done"] = number + 1 == len(shards) or state["train"]["tokens"] == limit
            commit()
            if state["done"] and limit and state["train"]["tokens"] < limit:
                print(f"\nall that there is: fewer than the {limit:,} training tokens asked for")
            if place == work / name:
                place.unlink()
    except BrokenProcessPool:
        for worker in multiprocessing.active_children():  # the pool may wait for ever for one that it was just starting
            worker.kill()
        raise Broken("a worker was killed, for want of memory perhaps: the same command goes on, --workers=N takes less") from None
    except OSError:
        for file in files.values():  # now: when Python collects them, it says once more that they do not fit
            with contextlib.suppress(OSError):
                file.close()
        raise
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)

    if state["train"]["tokens"] and not state["val"]["tokens"]:  # a few long documents: the end of the last is held out
        cut = state["train"]["tokens"] - max(1, round(VAL_SHARE * state["train"]["tokens"]))
        with open(work / "train.bin", "rb") as file:
            file.seek(2 * cut)
            files["val"].write(file.read())
        state["val"]["tokens"], state["train"]["tokens"] = state["train"]["tokens"] - cut, cut
        commit()
        files["train"].truncate(2 * cut)
    for file in files.values():
        file.close()
    return state


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def finish(work: Path, out: Path, tokenizer: tiktoken.Encoding, facts: dict, counts: dict) -> dict:
    """work has the token files: describe them, and make it `out` in one step. Returns what meta.json holds."""
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab, **facts}
    for split in ("train", "val"):
        meta[split] = counts[split] | {"sha256": file_hash(work / f"{split}.bin")}
    replace(work / "meta.json", json.dumps(meta, indent=1) + "\n")
    for path in work.iterdir():  # shards fetched but not needed
        if path.name not in ("train.bin", "val.bin", "meta.json", "tokenizer.tiktoken", "state.json"):
            path.unlink()
    work.rename(out)
    (out / "state.json").unlink(missing_ok=True)
    return meta


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def write(out: Path, tokenizer: tiktoken.Encoding, train: np.ndarray, val: np.ndarray, facts: dict) -> dict:
    """Make the folder from arrays, whole or not at all; one that is there is replaced. Returns what meta.json holds."""
    work = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        train.tofile(work / "train.bin")
        val.tofile(work / "val.bin")
        shutil.rmtree(out, ignore_errors=True)
        return finish(work, out, tokenizer, facts, {"train": {"tokens": len(train)}, "val": {"tokens": len(val)}})
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        fail(f"{out} could not be written: {error}")


def load(folder: str | Path, split: str) -> tuple[np.ndarray, dict]:
    """The tokens of a split, mapped from the file, and meta.json's facts. nanoGPT's folders have no meta.json: GPT-2.

    Reads the file once, to see that it is the one that meta.json describes.
    """
    path, meta_path = Path(folder) / f"{split}.bin", Path(folder) / "meta.json"
    if not path.is_file():
        fail(f"there is no {path}: make it with data/prepare.py, or name another folder with --data")
    meta = {"tokenizer": "gpt2", "vocab_size": 50_257}
    if path.stat().st_size < 2 or path.stat().st_size % 2:
        fail(f"{path} is empty or was cut off: run data/prepare.py again")
    if meta_path.exists():
        try:
            meta = json.loads(meta_path.read_text())
            expected, sha256 = 2 * meta[split]["tokens"], meta[split]["sha256"]
        except (ValueError, KeyError, TypeError):
            fail(f"{meta_path} is damaged: run data/prepare.py again")
        if path.stat().st_size != expected:
            fail(f"{path} has {path.stat().st_size} bytes, meta.json says {expected}: run data/prepare.py again")
        if file_hash(path) != sha256:
            fail(f"{path} does not have the sha256 that meta.json says: run data/prepare.py again")
    return np.memmap(path, dtype=np.uint16, mode="r"), meta


def large(out: Path, args) -> dict:
    """The hub's corpora and files of any size, resumably. Returns what meta.json holds."""
    corpus = args.source[0] if args.source[0] in HUB_TOKENS else None
    limit = int(args.tokens or HUB_TOKENS.get(corpus, 0)) or None
    tokenizer = ranks_tokenizer(Path(args.tokenizer)) if args.tokenizer.endswith(".tiktoken") else get_tokenizer(args.tokenizer)
    arguments = {"source": corpus or [], "tokens": limit, "tokenizer": tokenizer.name}
    if not corpus:
        for path in map(Path, args.source):
            if not path.is_file():
                raise Broken(f"there is no file {path}: give builtin, c4, gutenberg or files")
            arguments["source"].append([path.name, path.stat().st_size, path.stat().st_mtime_ns])

    work, stop = out.with_name(out.name + ".partial"), threading.Event()
    work.mkdir(parents=True, exist_ok=True)
    state_path = work / "state.json"
    if not state_path.exists():
        splits = {split: {"tokens": 0, "documents": 0} for split in ("train", "val")}
        replace(state_path, json.dumps({"arguments": arguments, "shards": [], "done": False, **splits, "empty": 0}))
    state = json.loads(state_path.read_text())
    if state["arguments"] != arguments:
        raise Broken(f"{work} was begun with other arguments or files: repeat those, or remove it")
    if args.tokenizer.endswith(".tiktoken"):
        shutil.copyfile(args.tokenizer, work / "tokenizer.tiktoken")
    if corpus:
        shards = hub_shards(corpus, args.base_url.rstrip("/"), work, stop)
    else:
        # One text alone is split by the end of it, not held out as a whole.
        shards = [(Path(path).name, path, "train" if len(args.source) == 1 and is_text(path) else None) for path in args.source]
    state = convert(work, state, shards, tokenizer, limit, args.workers, stop)
    if not state["train"]["tokens"]:
        raise Broken("there is no text to train on")
    facts = {"source": corpus or "files", "shards": state["shards"], "empty_documents": state["empty"]}
    return finish(work, out, tokenizer, facts, state)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("source", nargs="+", help="builtin, c4, gutenberg, or files: text, .jsonl, .parquet; .gz too")
    parser.add_argument("--out", type=Path, help="folder to make; data/builtin, data/c4, data/gutenberg or data/mine unless told")
    parser.add_argument("--tokens", type=float, help="training tokens, at most; 10e9 of c4, 5e9 of gutenberg, all of files unless told")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes, or FILE.tiktoken: ranks for GPT-2's pattern")
    parser.add_argument("--base_url", default=HUB, help="a mirror with the hub's paths")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that tokenize; any number writes the same bytes")
    args = parser.parse_args(argv)
    name = args.source[0] if args.source[0] in ("builtin", *HUB_TOKENS) else "mine"
    out = args.out or DATA / name
    if out.exists():
        fail(f"{out} exists: remove it, or name another folder with --out")
    if name != "mine" and len(args.source) > 1:
        fail(f"{name} stands alone: prepare files in another folder")
    if args.workers < 1 or (args.tokens is not None and not 1 <= args.tokens < float("inf")):
        fail("--workers and --tokens must be numbers of at least 1")
    if "://" not in args.base_url:
        fail(f"--base_url {args.base_url} is no address: give its https:// or http:// too")
    try:
        meta = builtin(out) if name == "builtin" else large(out, args)
    except Broken as error:
        fail(str(error))
    except OSError as error:
        fail(f"{out} could not be made ({error}): the same command goes on from here")
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here")
        raise SystemExit(130) from None
    print(f"\n{out}, {meta['source']}: {meta['train']['tokens']:,} training and {meta['val']['tokens']:,} validation tokens ({meta['tokenizer']})")
    print(f"sha256 of train.bin: {meta['train']['sha256']}")


if __name__ == "__main__":
    main(sys.argv[1:])
