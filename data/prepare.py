"""Text -> token files: train.bin and val.bin (uint16 tokens and nothing else, nanoGPT's layout) and meta.json.

    python data/prepare.py builtin        real text that every machine has; no download
    python data/prepare.py FILE [FILE..]  your own text files, GPT-2 tokens, <|endoftext|> after each

The built-in corpus is the running Python's own standard library (no site-packages, no tests) in byte tokens. Half of
its training windows are passkey documents: a model of 1 M parameters meets too little text to learn retrieval from
text alone, as the paper's models do. Validation is text only, whole files that training never sees.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
import tiktoken

DATA = Path(__file__).resolve().parent
END = "<|endoftext|>"  # after every document


def fail(message: str):
    """How every command here ends on bad input: one line on stderr and exit status 2 (one process a machine speaks)."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def byte_tokenizer() -> tiktoken.Encoding:
    """A token a byte, and one for the end of a document: 257 tokens."""
    ranks = {bytes([b]): b for b in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={END: 256})


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer that meta.json names: "bytes" or "gpt2"."""
    if name == "bytes":
        return byte_tokenizer()
    try:
        return tiktoken.get_encoding(name)
    except ValueError:
        fail(f"tokenizer {name!r} is unknown: use bytes or gpt2")
    except OSError:
        fail(f"tiktoken could not download the {name} tokenizer: connect once, or point TIKTOKEN_CACHE_DIR at a cache")


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
# Corpora


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


def held_out(name: str, share: float) -> bool:
    """Whether a document is for validation: a function of its name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < share * 2**32


def join(tokenizer, texts: list[str]) -> np.ndarray:
    end = tokenizer.encode_single_token(END)
    batches = tokenizer.encode_ordinary_batch(texts)
    return np.concatenate([np.array(tokens + [end], dtype=np.uint16) for tokens in batches])


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
    text = join(tokenizer, [t for name, t in documents if not held_out(name, 0.03)])
    val = join(tokenizer, [t for name, t in documents if held_out(name, 0.03)])
    text = text[: len(text) // length * length].reshape(-1, length)
    rng = np.random.default_rng(seed)
    passkey = np.empty((round(len(text) * share / (1 - share)), length), dtype=np.uint16)
    for window in passkey:
        document, _ = passkey_document(tokenizer, length, int(rng.integers(10_000, 100_000)), rng.random())
        window[:] = drill(rng, length) if rng.random() < 0.75 else document
    train = rng.permutation(np.concatenate([text, passkey])).ravel()
    facts = {"source": source, "documents": len(documents), "passkey_share": share, "window": length}
    return write(out, tokenizer, train, val, facts)


def text_files(out: Path, paths: list[str], val_share: float = 0.01) -> dict:
    """Each file is a document; the last val_share of all tokens is for validation."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            fail(f"{path} is no text file that can be read: {error}")
    tokenizer = get_tokenizer("gpt2")
    tokens = join(tokenizer, texts)
    split = len(tokens) - max(1, round(len(tokens) * val_share))
    return write(out, tokenizer, tokens[:split], tokens[split:], {"source": ", ".join(paths), "documents": len(paths)})


def write(out: Path, tokenizer, train: np.ndarray, val: np.ndarray, facts: dict) -> dict:
    """Make the folder, whole or not at all. Returns what meta.json holds."""
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab, **facts}
    temporary = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tokens in (("train", train), ("val", val)):
            tokens.tofile(temporary / f"{name}.bin")
            meta[name] = {"tokens": len(tokens), "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        fail(f"{out} could not be written: {error}")
    return meta


def load(folder: str | Path, split: str) -> tuple[np.ndarray, dict]:
    """The tokens of a split, mapped from the file, and meta.json's facts. nanoGPT's folders have no meta.json: GPT-2."""
    path, meta_path = Path(folder) / f"{split}.bin", Path(folder) / "meta.json"
    if not path.is_file():
        fail(f"there is no {path}: make it with data/prepare.py, or name another folder with --data")
    meta = {"tokenizer": "gpt2", "vocab_size": 50_257}
    if meta_path.exists():
        try:
            meta = json.loads(meta_path.read_text())
            expected = 2 * meta[split]["tokens"]
        except (ValueError, KeyError, TypeError):
            fail(f"{meta_path} is damaged: run data/prepare.py again")
        if path.stat().st_size != expected:
            fail(f"{path} has {path.stat().st_size} bytes, meta.json says {expected}: run data/prepare.py again")
    if path.stat().st_size < 2:
        fail(f"{path} is empty: run data/prepare.py again")
    return np.memmap(path, dtype=np.uint16, mode="r"), meta


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("source", nargs="+", help="builtin, or text files")
    parser.add_argument("--out", type=Path, help="folder to write; data/builtin or data/mine unless told")
    args = parser.parse_args(argv)
    if args.source == ["builtin"]:
        meta = builtin(args.out or DATA / "builtin")
    else:
        meta = text_files(args.out or DATA / "mine", args.source)
    print(f"{meta['source']}: {meta['train']['tokens']:,} training and {meta['val']['tokens']:,} validation tokens ({meta['tokenizer']})")
    print(f"sha256 of train.bin: {meta['train']['sha256']}")


if __name__ == "__main__":
    main(sys.argv[1:])
