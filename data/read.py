"""Reads documents from source files and, in `load`, tokens from the folder made from them."""

import codecs
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import UserError, say

FORMATS = ".txt, .jsonl, .ndjson or .json (one record per line), each also as .gz, and .parquet"
VAL_SHARE = 0.01  # of the documents, where no validation files are given
BLOCK = 2**20  # bytes or characters read at once
META = '{"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint16"}'  # the least that a meta.json says


def format_of(path: str | Path) -> str | None:
    """Return "txt", "json" or "parquet", or None for a file that is not read. Case does not matter."""
    match = re.search(r"\.(?:(txt)|(?:json|jsonl|ndjson))(?:\.gz)?$|\.(parquet)$", str(path).lower())
    return match and (match[1] or match[2] or "json")


def find_files(names: list[str]) -> list[str]:
    """The files that the names stand for. A folder means all files below it but hidden ones. Raises UserError."""
    found = []
    for name in names:
        path = Path(name)
        if path.is_file() and format_of(path):
            found.append(name)
        elif path.is_dir():
            below = [other for other in sorted(path.rglob("*")) if "/." not in f"/{other.relative_to(path).as_posix()}"]
            files = [other for other in below if other.is_file() and format_of(other)]
            folders = [other for other in below if other.is_dir() and not other.is_symlink()]
            if rest := sorted({*below} - {*files, *folders}):
                say(f"not read (another format, or a link to a folder): {', '.join(map(str, rest))}")
            if not files:
                raise UserError(f"{name} has no file that can be read: give a folder that has some of {FORMATS}")
            found += map(str, files)
        else:
            what = "has none of the formats that prepare.py reads" if path.exists() else "is not a file or folder"
            raise UserError(f"{name} {what}: give builtin, c4, gutenberg, or files or folders of {FORMATS}")
    return found


def open_text(path: str):
    """Open a text file for its bytes, unpacked and without a byte-order mark."""
    file = io.BufferedReader(gzip.open(path), BLOCK) if path.lower().endswith(".gz") else open(path, "rb")
    if file.peek(3).startswith(codecs.BOM_UTF8):
        file.read(3)
    return file


def stored(path: str, column: str):
    """Yield what a file stores: blocks of text (.txt), lines as bytes (JSON), or the values of a Parquet column."""
    try:
        if format_of(path) == "parquet":
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK)
            if column not in (columns := file.schema_arrow.names):
                raise UserError(f"{path} has no column {column!r}: give one of {columns} as --text_column")
            for batch in file.iter_batches(16, columns=[column], use_threads=False):
                yield from batch.column(0)
        else:
            with open_text(path) as lines:
                if format_of(path) == "json":
                    yield from lines
                else:
                    text = io.TextIOWrapper(lines, encoding="utf-8", newline="")
                    yield from iter(lambda: text.read(BLOCK), "")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): replace it, then run the same command again") from None


def documents(path: str, column: str, counts: Counter):
    """Yield (sha256, blocks of text) of each document in a file, and count good, empty and bad records.

    A .txt file is one document, of any size, and is read twice. In other files, each record's text is one.
    """
    if format_of(path) == "txt":
        sha256, size = hashlib.sha256(), 0
        for block in stored(path, column):
            sha256.update(block.encode())
            size += len(block)
        counts["good" if size else "empty"] += 1
        if size:
            yield sha256.digest(), stored(path, column)
        return
    for number, record in enumerate(stored(path, column), 1):
        is_line = isinstance(record, bytes)
        if is_line and record.isspace():
            continue
        try:
            text = json.loads(record.decode("utf-8", "surrogatepass"))[column] if is_line else record.as_py()
            if not isinstance(text, str):
                raise TypeError(f"{column!r} is {type(text).__name__}, not text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            counts["bad"] += 1
            if counts["bad"] == 1:
                with tqdm.external_write_mode():
                    say(f"{path}, line {number}: {type(error).__name__}: {error}. Bad records are skipped and counted.")
            continue
        counts["good" if text else "empty"] += 1
        if text:
            yield hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), [text]
    bad, n = counts["bad"], counts.total()
    if bad == n or (bad >= 100 and bad * 100 > n):
        raise UserError(
            f"{path} has {n:,} records, and {bad:,} of them are bad. It needs one record per line, with its text in "
            f"{column!r}{fields(path)}: name another field with --text_column, or repair the file"
        )


def fields(path: str) -> str:
    """A phrase that lists the fields of the first record in a JSON file, even if the file holds one array."""
    with open_text(path) as file:
        start = file.read(BLOCK).decode("utf-8", "replace").lstrip("[ \t\r\n")
    try:
        return f". The first record has {', '.join(dict(json.JSONDecoder().raw_decode(start)[0]))}"
    except (ValueError, TypeError, RecursionError):
        return ""


def held_out(sha256: bytes, share: float) -> bool:
    """Whether a document is for validation. Its hash alone decides, so equal texts are in the same split."""
    return int.from_bytes(sha256[:4], "big") < share * 2**32


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(folder: str | Path, split: str, check: bool = True) -> tuple[np.memmap, dict]:
    """Return the tokens of a split, mapped from its file, and meta.json, always with meta[split]["sha256"].

    `check` reads the whole file, to see that it is the one that meta.json describes. Without it, sha256 is what
    meta.json says, or None. A meta.json written by hand needs tokenizer, vocab_size, dtype. Raises UserError.
    """
    folder = Path(folder)
    path, meta_path = folder / f"{split}.bin", folder / "meta.json"
    if not path.is_file():
        raise UserError(f"there is no {path}: make it with data/prepare.py, or name another folder with --data")
    if not meta_path.is_file():
        raise UserError(f"{folder} has no meta.json. If its tokens are nanoGPT's (GPT-2), write {META} to {meta_path}")
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        dtype = {"uint16": np.dtype("uint16"), "uint32": np.dtype("uint32")}[meta["dtype"]]
        _, vocab_size, facts = meta["tokenizer"], int(meta["vocab_size"]), meta.setdefault(split, {})
        size = path.stat().st_size
        n_tokens, sha256 = facts.setdefault("tokens", size // dtype.itemsize), facts.setdefault("sha256", None)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{meta_path} is damaged: run data/prepare.py again, or write at least {META}") from None
    if vocab_size > 2 ** (8 * dtype.itemsize):
        raise UserError(f"{meta_path} says {vocab_size} tokens in {dtype}, which cannot hold them: set its dtype")
    if not size or size != n_tokens * dtype.itemsize:
        raise UserError(f"{path} is empty or was cut off ({size} bytes, {n_tokens} tokens): run data/prepare.py again")
    if check:
        facts["sha256"] = file_hash(path)
        if sha256 not in (None, facts["sha256"]):
            raise UserError(f"{path} does not have the sha256 that meta.json says: run data/prepare.py again")
    return np.memmap(path, dtype, mode="r"), meta
