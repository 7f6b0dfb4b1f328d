"""data/passkey.py: a document has exactly its length and the benchmark's strings; a drill is text about one key."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import Tokenizer, decoders, models, normalizers

from data.passkey import drill, passkey_document
from data.tokenizer import get_tokenizer

# The benchmark's own strings, typed again.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INFORMATION = "The pass key is {k}. Remember it. {k} is the pass key."
QUESTION = "What is the pass key? The pass key is {k}"


def marked(*merged):
    """Llama 2's way: a text begins with a token <s> and with ▁, which stands for a space.

    Each character is a token. So are the `merged` ones, built up from the left, and the first of them win.
    """
    letters, merges = sorted({*TASK, *FILLER, *INFORMATION, *QUESTION, *"\n▁0123456789"} - {" "}), []
    for token in merged:
        merges += [pair for n in range(1, len(token)) if (pair := (token[:n], token[n])) not in merges]
    vocabulary = dict.fromkeys([*letters, *map("".join, merges)])
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    bos = [len(vocabulary)]
    return SimpleNamespace(bos=bos, encode_ordinary=lambda text: made.encode(text).ids, decode=made.decode)


WORDS = ["▁The", "▁is", "▁pass", "▁key", "grass", "▁There", "▁3", "▁1"]
TOKENIZERS = {
    "bytes": get_tokenizer("bytes"),
    "Llama 2": marked(*WORDS),
    "merges across the seams": marked("s▁3", "s▁12", ".▁T", ".▁H", ".\n", "\nT", "\nW", "?▁T", *WORDS),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25)
@given(
    length=some.integers(255, 1500) | some.just(8192),
    depth=some.sampled_from([0.0, 0.5, 1.0]) | some.floats(0, 1),
    key=some.integers(10_000, 99_999) | some.sampled_from([12_345, 31_415]),
)
def test_a_document_is_the_benchmark_verbatim_and_has_exactly_the_length(name, length, depth, key):
    tokenizer = TOKENIZERS[name]
    tokens, n = passkey_document(tokenizer, length, key, depth)
    bos, tokens = tokens[: len(tokenizer.bos)], tokens[len(tokenizer.bos) :]
    assert bos == tokenizer.bos and len(bos + tokens) == length
    text, answer = tokenizer.decode(tokens), tokenizer.decode(tokens[-n:])
    assert (
        tokenizer.encode_ordinary(text)[-n:] == tokens[-n:]
    )  # the answer has the tokens that it has in the whole text
    assert answer == (" is" if "merges" in name else "") + f" {key}"  # from where the question alone has other tokens
    task, before, information, after, question = text.removeprefix(" ").split("\n")
    assert (task, information, question) == (TASK, INFORMATION.format(k=key), QUESTION.format(k=key))
    assert " ".join([FILLER] * 200).startswith(before) and " ".join([FILLER] * 200).startswith(after)
    if name == "bytes":  # a token is a character
        assert len(before) == round(depth * len(before + after))


def test_a_drill_repeats_one_key_between_pieces_of_the_text():
    text = np.arange(1000, 2000, dtype=np.uint16)  # no byte has such values
    keys = set()
    for seed in range(50):
        tokens = drill(np.random.default_rng(seed), 512, text)
        assert len(tokens) == 512
        text_of_lines = bytes(tokens[tokens < 256].astype(np.uint8)).decode()
        (key,) = set(re.findall(r"(?<=pass key is )(\w{5})(?=[.\n])", text_of_lines))
        keys.add(key)
        piece = np.diff(tokens.astype(int))[(tokens[:-1] >= 1000) & (tokens[1:] >= 1000)]
        assert (piece == 1).all()
    assert len(keys) > 45 and 15 < sum(key.isdigit() for key in keys) < 35
