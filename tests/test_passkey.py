"""data/passkey.py: a document has exactly its length and the benchmark's strings; a drill is text about one key."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from common import UserError
from data.passkey import drill, passkey_document
from data.tokenizer import END, GPT2_PATTERN, TiktokenTokenizer, get_tokenizer

# The benchmark's own strings, typed again.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INFORMATION = "The pass key is {k}. Remember it. {k} is the pass key."
QUESTION = "What is the pass key? The pass key is {k}"
BYTES = get_tokenizer("bytes")


def gpt2(*words):
    """GPT-2's pattern, with one token for each byte and each of the words."""
    ranks = {token: rank for rank, token in enumerate([bytes([b]) for b in range(256)] + [w.encode() for w in words])}
    toy = tiktoken.Encoding("toy", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
    return TiktokenTokenizer(toy, {})


def marked(*merged, prepend=False, metaspace=False):
    """Each character is a token, with ▁ for a space, as are the `merged` ones, built up from the left."""
    letters, merges = sorted({*TASK, *FILLER, *INFORMATION, *QUESTION, *"\n▁0123456789"} - {" "}), []
    for token in merged:
        merges += [pair for n in range(1, len(token)) if (pair := (token[:n], token[n])) not in merges]
    vocabulary = dict.fromkeys([*letters, *map("".join, merges)])
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    mark = [normalizers.Prepend("▁")] if prepend else []
    made.normalizer = None if metaspace else normalizers.Sequence([*mark, normalizers.Replace(" ", "▁")])
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prepend or metaspace else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), *strip])
    return SimpleNamespace(bos=[], encode_ordinary=lambda text: made.encode(text).ids, decode=made.decode)


WORDS = ["▁The", "▁is", "▁pass", "▁key", "grass", "▁There", "▁3", "▁1"]
SEAMS = [*WORDS, ".▁T", ".▁H", ".\n", "\nT", "\nW", "?▁T", "s▁3", "s▁12"]
PLAIN = {"bytes": BYTES, "GPT-2": gpt2(" The", " Here", " There", " grass", " key", " important", " 12", "345")}
TOKENIZERS = PLAIN | {
    "Llama 2": marked(*WORDS, prepend=True),
    "Metaspace": marked(*WORDS, metaspace=True),
    "merges across the seams": marked(*SEAMS),
    "merges across the seams, with a mark": marked(*SEAMS, prepend=True),
}


def apart(tokenizer, length, key, depth):
    """The document of a tokenizer that neither marks the beginning of a text nor merges across lines: five lines."""
    head, info, filler = TASK + "\n", f"\n{INFORMATION.format(k=key)}\n", " ".join([FILLER] * (length // 20 + 1))
    question, answer = "\n" + QUESTION.removesuffix(" {k}"), f" {key}"
    head, info, filler, question, answer = map(tokenizer.encode_ordinary, (head, info, filler, question, answer))
    room = length - len(head + info + question + answer)
    before = round(depth * room)
    return head + filler[:before] + info + filler[: room - before] + question + answer, len(answer)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    length=some.integers(300, 1500) | some.just(8192),
    depths=some.lists(some.sampled_from([0.0, 0.5, 1.0]) | some.floats(0, 1), min_size=2, max_size=4),
    key=some.integers(10_000, 99_999) | some.sampled_from([12_345, 31_415]),
)
def test_a_document_is_the_benchmark_verbatim_and_has_exactly_the_length(name, length, depths, key):
    tokenizer = TOKENIZERS[name]
    documents, n_answers = zip(*(passkey_document(tokenizer, length, key, depth) for depth in depths))
    assert np.array(documents).shape == (len(depths), length)
    for tokens, n_answer, depth in zip(documents, n_answers, depths):
        text, answer = tokenizer.decode(tokens), tokenizer.decode(tokens[-n_answer:])
        task, before, information, after, question = text.split("\n")
        assert (task, information, question) == (TASK, INFORMATION.format(k=key), QUESTION.format(k=key))
        assert " ".join([FILLER] * 200).startswith(before) and " ".join([FILLER] * 200).startswith(after)
        assert answer.strip() == str(key) or ("merges" in name and re.fullmatch(f"s {key}", answer))
        assert tokenizer.encode_ordinary(text)[-n_answer:] == tokens[-n_answer:]  # what the text as a whole has
        if name in PLAIN:
            assert (tokens, n_answer) == apart(tokenizer, length, key, depth)


def test_the_fixed_strings_take_253_bytes():
    tokens, n_answer = passkey_document(BYTES, 253, 31415, 0.5)
    assert BYTES.decode(tokens) == "\n".join([TASK, "", INFORMATION, "", QUESTION]).format(k=31415)
    assert n_answer == 6
    with pytest.raises(UserError, match="253"):
        passkey_document(BYTES, 252, 31415, 0.5)


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
