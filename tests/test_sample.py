"""sample.py as a command."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent


def successor_model(folder):
    """Nothing but embedding and head, made by hand: each byte is followed by the next one."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=128, n_hidden=8, vocab_size=320, train_len=16))
    with torch.no_grad():
        model.embedding.weight.copy_(torch.randn(320, 128, generator=torch.Generator().manual_seed(0)).sign())
        model.head.weight.copy_(model.embedding.weight.roll(1, dims=0))
        model.blocks[0].attention.out.weight.zero_()
        model.blocks[0].mlp.down.weight.zero_()
    facts = {"step": 7, "config": asdict(model.cfg) | {"data": "data/builtin"}, "tokenizer": "bytes"}
    torch.save({**facts, "model": model.state_dict()}, folder / "ckpt.pt")
    return folder


def sample(*arguments, encoding="utf-8"):
    command, env = [sys.executable, ROOT / "sample.py", *arguments], {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, encoding=encoding, env=env)
    return done.returncode, done.stdout, done.stderr


def test_sample_continues_the_prompt(tmp_path):
    assert sample(successor_model(tmp_path), "abc", "--tokens=5", "--temperature=0") == (0, "abcdefgh\n", "")


def test_a_terminal_that_lacks_a_character_shows_a_replacement(tmp_path):
    assert sample(successor_model(tmp_path), "\xe9", "--tokens=0", encoding="ascii")[:2] == (0, "?\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["/nowhere", "abc"], "no checkpoint /nowhere"),
        (["MODEL", ""], "prompt"),
        (["MODEL", "abc", "--tokens=-1"], "--tokens"),
        (["MODEL", "abc", "--temperature=-1"], "temperature -1"),
        (["MODEL", "abc", "--device=nonsense"], "nonsense"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, arguments, words):
    arguments = [successor_model(tmp_path) if a == "MODEL" else a for a in arguments]
    status, out, err = sample(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("sample.py: ") and words in err
