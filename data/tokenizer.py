"""Tokenizers with one interface, whichever library they come from.

- name: what meta.json keeps; get_tokenizer(name, folder) finds the tokenizer again
- n_vocab, eot, bos: the number of tokens, the token that ends a document, and the list of those that begin one
- encode_ordinary(text): the tokens of any text
- pieces(blocks), encode_batch(pieces): the same for text of any size, piece by piece, on all cores
- decode(ids): the text
- files: {name: content} of the files that belong beside the tokens
"""

import base64
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from common import UserError

END = "<|endoftext|>"  # ends a document
# GPT-2 splits a text into contractions, words, numbers, other signs and white space, and merges bytes within each.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s in that pattern; Python's \s has more
CUT = re.compile(f"[{WHITE}](?=[^{WHITE}])")
PIECE = 2**18  # characters
# what belongs to a tokenizer.json
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
          "generation_config.json")  # fmt: skip


class TiktokenTokenizer:
    """A tiktoken.Encoding with GPT-2's pattern, or with one token per byte."""

    def __init__(self, encoding: tiktoken.Encoding, files: dict[str, bytes]):
        self.encoding, self.files = encoding, files
        self.name, self.n_vocab, self.eot, self.bos = encoding.name, encoding.n_vocab, encoding.eot_token, []
        self.decode = encoding.decode

    def pieces(self, blocks):
        """Yield (piece, whether it is the last) of a text in blocks. Their tokens, joined, are those of the text.

        A piece ends before the first white-space character that follows PIECE characters and precedes a word or sign.
        GPT-2's pattern always begins a new match there. So no piece has 999,999 white-space characters before another
        character, on which tiktoken panics. A run without such a place, one endless word for example, stays one piece:
        tiktoken takes a few minutes and 2 GB of memory for 60 MB of it.
        """
        text, start, look = "", 0, PIECE  # the piece begins at `start`; the next cut is at `look` or after it
        for block in blocks:
            text, start, look = text[start:] + block, 0, look - start
            while place := CUT.search(text, look):
                yield text[start : place.start()], False
                start = place.start()
                look = start + PIECE
            look = max(look, len(text) - 1)  # what follows the last character is still to come
        yield text[start:], True

    def encode_array(self, text: str) -> np.ndarray:
        """The tokens of a piece. tiktoken makes an array faster than a list, and other threads run meanwhile."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
            return np.array(self.encoding.encode_ordinary(text))

    def encode_batch(self, pieces: list[str]) -> list[np.ndarray]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(self.encode_array, pieces))

    def encode_ordinary(self, text: str) -> list[int]:
        return [token for piece, _ in self.pieces([text]) for token in self.encoding.encode_ordinary(piece)]


class JsonTokenizer:
    """The tokenizer.json of a Hugging Face model. Text that spells out a special token becomes that token.

    Where its texts may be cut is not known (Llama 2's tokenizer marks the beginning of a text): each stays whole.
    """

    def __init__(self, path: Path, eot: str | None):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(f"{path} needs the package tokenizers: pip install tokenizers") from None
        try:
            content = path.read_bytes()
            self.tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # tokenizers raises Exception itself
            raise UserError(f"{path} is not a tokenizer.json: {error}") from None
        eot = eot or end_token(path.parent, self.tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.eot = self.tokenizer.token_to_id(eot or "")
        if self.eot is None:
            raise UserError(f"{path} needs a token that ends a document, and {eot!r} is not one: name it with --eot")
        self.n_vocab = max(self.tokenizer.get_vocab().values()) + 1
        plain, whole = self.encode_ordinary("a"), self.tokenizer.encode("a").ids
        self.bos = next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])
        config = {"eos_token": eot}
        self.name = "json-" + hashlib.sha256(content + json.dumps(config).encode()).hexdigest()[:16]
        config = json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}).encode()
        self.files = {"tokenizer.json": content, "tokenizer_config.json": config}

    def pieces(self, blocks):
        yield "".join(blocks), True

    def encode_batch(self, pieces: list[str]) -> list[list[int]]:
        # Half of a surrogate pair, which JSON can hold, becomes U+FFFD, as in tiktoken.
        pieces = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in pieces]
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False)]

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def end_token(folder: Path, tokenizer) -> str | None:
    """The end-of-document token that a config beside a tokenizer.json names: as a string, an object, or by its id."""
    for name, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        path = folder / name
        try:
            token = json.loads(path.read_text(encoding="utf-8")).get(key) if path.exists() else None
            token = token[0] if isinstance(token, list) else token["content"] if isinstance(token, dict) else token
        except (ValueError, AttributeError, KeyError, IndexError):
            raise UserError(f"{path} is damaged: repair it, or name the end-of-document token with --eot") from None
        if token is not None:
            return tokenizer.id_to_token(token) if isinstance(token, int) else token
    return None


def ranks_tokenizer(path: Path) -> TiktokenTokenizer:
    """A tokenizer with GPT-2's pattern from a file of ranks: on each line, a token's bytes in base64 and its rank."""
    try:
        content = path.read_bytes()
        lines = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a file of tokenizer ranks: {error}") from None
    if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([b]) in ranks for b in range(256)):
        raise UserError(f"{path} is not a file of tokenizer ranks, which has 0, 1, 2 .. once each and all 256 bytes")
    name, special = "ranks-" + hashlib.sha256(content).hexdigest()[:16], {END: len(ranks)}
    encoding = tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return TiktokenTokenizer(encoding, {"tokenizer.tiktoken": content})


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Copy a folder's tokenizer file, and the files that belong to it, unchanged."""
    for name in ("tokenizer.json", "tokenizer.tiktoken", *BESIDE):
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, target / name)


def get_tokenizer(name: str, *folders: str | Path, eot: str | None = None):
    """The tokenizer `name`: "bytes", "gpt2", a FILE.tiktoken, a tokenizer.json, or what meta.json names.

    Of the last kind, the file is in one of the folders: beside the tokens, or beside the checkpoint. `eot` is the
    end-of-document token of a tokenizer.json that has none in a config beside it. Raises UserError.
    """
    for prefix, file in (("ranks-", "tokenizer.tiktoken"), ("json-", "tokenizer.json")):
        if name.startswith(prefix):
            found = [get_tokenizer(str(Path(folder) / file)) for folder in folders if (Path(folder) / file).is_file()]
            for tokenizer in found:
                if tokenizer.name == name:
                    return tokenizer
            raise UserError(f"the tokenizer {name} is not in {' or '.join(map(str, folders))}: copy its {file} there")
    if name.endswith(".json"):
        return JsonTokenizer(Path(name), eot)
    if eot is not None:
        raise UserError(f"--eot is for a tokenizer.json: {name} has its own end-of-document token")
    if name.endswith(".tiktoken"):
        return ranks_tokenizer(Path(name))
    if name == "bytes":
        ranks = {bytes([b]): b for b in range(256)}
        encoding = tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={END: 256})
        return TiktokenTokenizer(encoding, {})
    if name != "gpt2":
        raise UserError(f"tokenizer {name!r} is unknown: use gpt2, bytes, a FILE.tiktoken or a model's tokenizer.json")
    try:
        return TiktokenTokenizer(tiktoken.get_encoding("gpt2"), {})
    except (OSError, ValueError):  # no network, or a download that is not GPT-2's file
        raise UserError("tiktoken cannot download GPT-2's files: connect once, or set TIKTOKEN_CACHE_DIR") from None
