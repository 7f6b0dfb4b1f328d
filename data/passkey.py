"""The passkey document: a key hidden in filler text, and the question for it. Also drills that teach retrieval.

Source: Mohtashami & Jaggi, arXiv 2305.16300. The strings are the benchmark's own.
"""

import numpy as np

from common import UserError

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INFORMATION = "The pass key is {k}. Remember it. {k} is the pass key."
QUESTION = "What is the pass key? The pass key is"
ANSWER = " {k}"


def encode_inside(tokenizer, text: str) -> list[int]:
    """The tokens that `text` has inside a longer text.

    Some tokenizers (Llama 2's) put a mark in front of a text, as if a space stood there. So the text is encoded after
    one more character, whose tokens are then cut off. Another character is tried if the tokenizer merges the two.
    """
    for before in ".\n?a0":
        front, both = tokenizer.encode_ordinary(before), tokenizer.encode_ordinary(before + text)
        if front and both[: len(front)] == front:
            return both[len(front) :]
    return tokenizer.encode_ordinary(text)


def passkey_document(tokenizer, length: int, key: int, depth: float) -> tuple[list[int], int]:
    """Return (document, n): a list of exactly `length` tokens, of which the last n are the answer.

    The document has five lines: task, filler, information, filler, and the question with its answer. The filler is
    cut, token by token, to fill the length. `depth` in [0, 1] is the share of the filler that stands before the
    information. Question and answer are encoded together, so that the answer's tokens are those of running text:
    they begin where the question alone has other tokens. If a tokenizer merges the end of the question with the
    answer, the merged token belongs to the answer. Raises UserError if `length` is too short for the fixed strings.
    """
    head = tokenizer.bos + tokenizer.encode_ordinary(TASK + "\n")
    info = encode_inside(tokenizer, "\n" + INFORMATION.format(k=key) + "\n")
    question = encode_inside(tokenizer, "\n" + QUESTION)
    tail = encode_inside(tokenizer, "\n" + QUESTION + ANSWER.format(k=key))
    shared = next((i for i, (ours, theirs) in enumerate(zip(question, tail)) if ours != theirs), len(question))
    room = length - len(head + info + tail)
    if room < 0:
        raise UserError(f"length {length} is too short for a passkey: its fixed strings take {length - room} tokens")
    text, filler = FILLER, encode_inside(tokenizer, FILLER)
    while len(filler) < room:
        text += " " + text
        filler = encode_inside(tokenizer, text)
    before = round(depth * room)
    return head + filler[:before] + info + filler[: room - before] + tail, len(tail) - shared


def byte_tokens(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def drill(rng: np.random.Generator, length: int, text: np.ndarray) -> np.ndarray:
    """Return (length,) byte tokens that repeat one key, with `text` in between: retrieval at every distance.

    A passkey document has only six bytes that need retrieval, too few for a small model to learn from. In a drill, up
    to one byte in eight needs it. Half of the keys have digits only. The others have letters too, which seldom repeat
    within a key, so the model learns to copy sooner. Each drill draws one limit for the length of its pieces: 16, 32,
    .. 256 tokens. `text` must be longer than 256 tokens.
    """
    characters = "0123456789abcdefghijklmnopqrstuvwxyz"[: rng.choice([10, 36])]
    key, longest = "".join(rng.choice(list(characters), 5)), 2 ** rng.integers(4, 9)
    lines = (INFORMATION, QUESTION + ANSWER, "The pass key is {k}.")
    lines = [byte_tokens(f"{line}\n".format(k=key)) for line in lines]
    skipped, parts = rng.integers(100), []
    while sum(map(len, parts)) < skipped + length:
        start, n = rng.integers(len(text) - longest), rng.integers(longest)
        parts += [lines[rng.integers(len(lines))], text[start : start + n], byte_tokens("\n")]
    return np.concatenate(parts)[skipped : skipped + length]
