"""sample.py as a command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_run

import sample
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of nothing but embedding and head, made by hand: each byte is followed by the next one."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=128, n_hidden=8, vocab_size=320, train_len=16))
    with torch.no_grad():
        model.embedding.weight.copy_(torch.randn(320, 128, generator=torch.Generator().manual_seed(0)).sign())
        model.head.weight.copy_(model.embedding.weight.roll(1, dims=0))
        model.blocks[0].attention.out.weight.zero_()
        model.blocks[0].mlp.down.weight.zero_()
    make_run(tmp_path, model)
    return str(tmp_path)


def test_the_command_continues_the_prompt_and_replaces_what_the_terminal_lacks(folder):
    command = [sys.executable, ROOT / "sample.py", folder, "\xe9abc", "--tokens=5", "--temperature=1000", "--top_k=1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "?abcdefgh\n", "")


def test_the_seed_decides_the_sample(folder, capsys):
    texts = []
    for seed in (1, 1, 2):
        sample.main([folder, "a", "--temperature=1000", f"--seed={seed}"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["/nowhere", "abc"], "no checkpoint /nowhere"),
        (["MODEL", ""], "the prompt needs at least one character"),
        (["MODEL", "abc", "--tokens=-1"], "--tokens"),
        (["MODEL", "abc", "--temperature=-1"], "--temperature -1"),
        (["MODEL", "abc", "--logn=nan"], "--logn nan"),
        (["MODEL", "abc", "--device=nonsense"], "nonsense"),
    ],
)
def test_bad_input_gets_one_line(folder, refused, arguments, words):
    assert words in refused(sample.main, *[folder if a == "MODEL" else a for a in arguments])
