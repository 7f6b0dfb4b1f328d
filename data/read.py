"""Source files -> pieces of text. Which files are read, what each is for, and what becomes of bad records."""

import codecs
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.files import fail, say

FORMATS = ".txt, .jsonl, .ndjson or .json (one record per line), each of them also as .gz, and .parquet"
TRAIN, VALIDATION = {"train", "training"}, {"validation", "valid", "val", "dev"}
TEST = {"test", "testing", "eval", "evaluation"}
VAL_SHARE = 0.01  # of the documents, where the source has no validation set
BLOCK = 2**20  # bytes or characters read at once


class Source(NamedTuple):
    name: str  # for messages and meta.json
    path: str  # on the hub: the path in the repository
    split: str | None  # "train", "val", or None: each document goes where its hash says


def format_of(path: str | Path) -> str | None:
    """Return "txt", "json" or "parquet", or None for a file that is not read. Suffixes count in any case."""
    match = re.search(r"\.(?:(txt)|(?:json|jsonl|ndjson))(?:\.gz)?$|\.(parquet)$", str(path).lower())
    return match and (match[1] or match[2] or "json")


def split_of(path: Path) -> set | None:
    """Return TRAIN, VALIDATION or TEST by the first such word in a file's name, else in its folders' names."""
    for part in reversed(path.parts):
        for word in re.findall(r"[^\W\d_]+", part.lower()):
            for words in (TRAIN, VALIDATION, TEST):
                if word in words:
                    return words
    return None


def folder_sources(folder: Path) -> list[Source]:
    """The sources in a folder, which may be a data set as the hub lays it out. Prints what each file is taken for."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    splits = {path: split_of(path) for path in paths if format_of(path)}

    def of(words: set | None) -> list[Path]:
        return [path for path, split in splits.items() if split is words]

    train, val = of(TRAIN) or of(None), of(VALIDATION) or of(TEST)
    if not train:
        fail(f"{folder} has no file to train on: give a folder that has some of {FORMATS}")
    unused = [path for path in paths if path not in train + val]
    for what, some in (("training", train), ("validation", val), ("not used", unused)):
        say(f"{what}: {', '.join(map(str, some)) or 'no file'}")
    sources = [Source(str(path), str(folder / path), "val") for path in val]
    return sources + [Source(str(path), str(folder / path), "train" if val else None) for path in train]


def local_sources(names: list[str], column: str) -> list[Source]:
    """The sources for files and folders. What cannot be read is refused here, before any work."""
    sources = []
    for name in names:
        path = Path(name).absolute()
        if path.is_dir():
            sources += folder_sources(path)
        elif not path.is_file():
            fail(f"there is no file or folder {name}: give builtin, c4, gutenberg, files or a folder")
        elif not format_of(path):
            fail(f"{name} has none of the formats that prepare.py reads: {FORMATS}")
        else:
            sources.append(Source(path.name, str(path), None))
    for name, path, _ in sources:
        if format_of(path) == "parquet":
            open_parquet(name, path, column)
    if len(sources) == 1 and format_of(sources[0].path) == "txt":
        return [sources[0]._replace(split="train")]  # one document: its end will be held out
    return sources


def import_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        fail("Parquet files need the package pyarrow: pip install pyarrow")
    return pyarrow.parquet


def open_parquet(name: str, path: str, column: str):
    """Return (file, the name of `column` in it, where upper and lower case do not matter)."""
    parquet = import_parquet()
    try:
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK)
    except (OSError, ValueError) as error:
        fail(f"{name} is no Parquet file, or a damaged one: {error}")
    names = file.schema_arrow.names
    found = [column] * (column in names) or [other for other in names if other.lower() == column.lower()]
    if not found:
        fail(f"{name} has no column {column}: name one with --text_column ({', '.join(names)})")
    return file, found[0]


def open_text(path: str):
    """Open a text file for its bytes, unpacked and without a byte-order mark."""
    file = io.BufferedReader(gzip.open(path), BLOCK) if path.lower().endswith(".gz") else open(path, "rb")
    if file.peek(3).startswith(codecs.BOM_UTF8):
        file.read(3)
    return file


def records(name: str, path: str, column: str):
    """Yield (line or row number, function) of every record. The function returns the record's text, or raises."""
    if format_of(path) == "parquet":
        file, column = open_parquet(name, path, column)
        batches = file.iter_batches(16, columns=[column], use_threads=False)
        rows = (row for batch in batches for row in batch.column(0))
        yield from ((number, row.as_py) for number, row in enumerate(rows, 1))
    else:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, lambda line=line: json.loads(line.decode("utf-8", "surrogatepass"))[column]


def text_of(record) -> tuple[str | None, str]:
    """Return (text, "good" or "empty"), or (None, what is wrong with the record)."""
    try:
        text = record()
    except UnicodeDecodeError:
        return None, "broken UTF-8"
    except (ValueError, RecursionError):
        return None, "broken JSON"
    except (KeyError, TypeError):
        return None, "no text"
    if not isinstance(text, str):
        return None, "no text"
    return text, "good" if text else "empty"


def held_out(sha256: bytes, share: float) -> bool:
    """Whether a document is for validation. Its hash alone decides, so equal texts are in the same split."""
    return int.from_bytes(sha256[:4], "big") < share * 2**32


def documents(source: Source, path: str, column: str, counts: Counter):
    """Yield (the blocks of a document's text, its sha256), and count good, empty and bad records by kind."""
    if format_of(path) == "txt":  # one document, of any size
        with open_text(path) as file:
            sha256 = hashlib.file_digest(file, "sha256").digest()
        with io.TextIOWrapper(open_text(path), encoding="utf-8", newline="") as file:
            first = file.read(BLOCK)
            counts["good" if first else "empty"] += 1
            if first:
                yield itertools.chain([first], iter(lambda: file.read(BLOCK), "")), sha256
        return
    for number, record in records(source.name, path, column):
        text, kind = text_of(record)
        counts[kind] += 1
        if text:
            yield [text], hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        elif kind != "empty" and counts[kind] == 1:
            tqdm.write(f"{source.name}, line {number}: {kind}. Such records are skipped and counted.")


def pieces(source: Source, path: str, column: str, tokenizer, counts: Counter):
    """Yield (split, piece of text, whether a document ends with it) for the source, whose file lies at `path`."""
    try:
        for blocks, sha256 in documents(source, path, column, counts):
            split = source.split or ("val" if held_out(sha256, VAL_SHARE) else "train")
            for piece, last in tokenizer.pieces(blocks):
                yield split, piece, last
    except (OSError, EOFError, ValueError, zlib.error) as error:
        fail(f"{source.name} is damaged ({error}): mend or replace it, then run the same command again")
    bad = counts.total() - counts["good"] - counts["empty"]
    if bad == counts.total() or (bad >= 100 and bad * 100 > counts.total()):
        kinds = ", ".join(f"{kind}: {n:,}" for kind, n in counts.items())
        fail(f"{source.name} has too many bad records ({kinds or 'none at all'}): mend it, then run this again")


def load(folder, split, check=True):  # INTERIM
    from data.prepare import load

    return load(folder, split)
