"""data/passkey.py: a document has exactly its length and the benchmark's strings; a drill is text about one key."""

import re

import numpy as np
import pytest
import tiktoken

from data.passkey import drill, passkey_document
from data.tokenizer import GPT2_PATTERN, get_tokenizer

# The benchmark's own strings, typed again.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INFORMATION = "The pass key is 31415. Remember it. 31415 is the pass key."
QUESTION = "What is the pass key? The pass key is 31415"

BYTES = get_tokenizer("bytes")


def bpe(*words):
    """One token for each byte and each of the words."""
    ranks = {token: rank for rank, token in enumerate([bytes([b]) for b in range(256)] + [w.encode() for w in words])}
    return tiktoken.Encoding("toy", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})


TOKENIZERS = {"bytes": BYTES, "cheaper after a space": bpe(" The", " Here", " There", " grass", " key", " important")}


@pytest.mark.parametrize("length", [300, 511, 512, 1001, 8192])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_document_is_the_benchmark_verbatim_and_has_exactly_the_length(tokenizer, depth, length):
    tokens, n_answer = passkey_document(tokenizer, length, 31415, depth)
    assert len(tokens) == length
    assert tokenizer.decode(tokens[-n_answer:]) == " 31415"
    task, before, information, after, question = tokenizer.decode(tokens).split("\n")
    assert (task, information, question) == (TASK, INFORMATION, QUESTION)
    filler = " ".join([FILLER] * 200)
    assert filler.startswith(before) and after in filler


def test_the_fixed_strings_take_253_bytes():
    tokens, n_answer = passkey_document(BYTES, 253, 31415, 0.5)
    assert BYTES.decode(tokens) == "\n".join([TASK, "", INFORMATION, "", QUESTION])
    assert n_answer == 6
    with pytest.raises(ValueError, match="253"):
        passkey_document(BYTES, 252, 31415, 0.5)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_depth_is_the_share_of_filler_before_the_information(depth):
    tokens, _ = passkey_document(BYTES, 1253, 31415, depth)
    _, before, _, after, _ = BYTES.decode(tokens).split("\n")
    assert (len(before), len(after)) == (1000 * depth, 1000 - 1000 * depth)


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
