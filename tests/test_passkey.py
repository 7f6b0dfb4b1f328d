"""The passkey document: the benchmark's own strings, cut to an exact length."""

import pytest
import tiktoken

from data import prepare

# The strings of Mohtashami & Jaggi, typed again.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INFORMATION = "The pass key is 31415. Remember it. 31415 is the pass key."
QUESTION = "What is the pass key? The pass key is 31415"


def bpe_tokenizer(*words):
    """GPT-2's pattern and 256 bytes, with the merges that make each of the words one token."""
    pieces = [bytes([b]) for b in range(256)]
    for word in words:
        pieces += [word[:n].encode() for n in range(2, len(word) + 1) if word[:n].encode() not in pieces]
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    return tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={prepare.END: len(ranks)})


BYTES = prepare.byte_tokenizer()
TOKENIZERS = {
    "bytes": BYTES,
    "bpe": bpe_tokenizer(" grass", " key", "The", " The", " pass", " sky", " 31", "41", " is", " important", " There"),
    "bpe, a word costs less after a space": bpe_tokenizer(" The", " Here", " There", " grass"),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_document_has_exactly_the_length(tokenizer, depth):
    for length in [*range(256, 300, 7), 511, 512, 513, 1000, 1001, 4096, 8192]:
        tokens, n_answer = prepare.passkey_document(TOKENIZERS[tokenizer], length, 31415, depth)
        assert len(tokens) == length
        assert TOKENIZERS[tokenizer].decode(tokens[-n_answer:]) == " 31415"


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_document_is_the_benchmark_verbatim(tokenizer):
    tokens, _ = prepare.passkey_document(TOKENIZERS[tokenizer], 700, 31415, 0.4)
    text = TOKENIZERS[tokenizer].decode(tokens)
    task, before, information, after, question = text.split("\n")
    assert (task, information, question) == (TASK, INFORMATION, QUESTION)
    filler = " ".join([FILLER] * 100)
    assert before and filler.startswith(before)
    assert after and after in filler
    assert set(TOKENIZERS[tokenizer].encode_ordinary(INFORMATION)) <= set(tokens)


def test_fixed_strings_take_253_bytes():
    tokens, n_answer = prepare.passkey_document(BYTES, 253, 31415, 0.5)
    assert BYTES.decode(tokens) == "\n".join([TASK, "", INFORMATION, "", QUESTION])
    assert n_answer == 6
    with pytest.raises(ValueError, match="253"):
        prepare.passkey_document(BYTES, 252, 31415, 0.5)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_depth_is_the_share_of_filler_before_the_information(depth):
    tokens, _ = prepare.passkey_document(BYTES, 1253, 31415, depth)
    _, before, _, after, _ = BYTES.decode(tokens).split("\n")
    assert (len(before), len(after)) == (1000 * depth, 1000 - 1000 * depth)
