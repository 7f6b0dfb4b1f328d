"""sample.py as a command."""

import torch
from conftest import make_run
from runs import command

import sample
from model import GPT, GPTConfig


def test_the_command_continues_the_prompt_and_the_seed_decides_the_sample(tmp_path, capsys):
    """With a model of nothing but embedding and head, made by hand: each byte is followed by the next one."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=128, n_hidden=8, vocab_size=320, train_len=16))
    with torch.no_grad():
        model.embedding.weight.copy_(torch.randn(320, 128, generator=torch.Generator().manual_seed(0)).sign())
        model.head.weight.copy_(model.embedding.weight.roll(1, dims=0))
        model.blocks[0].attention.out.weight.zero_()
        model.blocks[0].mlp.down.weight.zero_()
    make_run(tmp_path, model)

    argv = [str(tmp_path), "\xe9abc", "--tokens=5", "--temperature=1000", "--device=cpu"]
    said = command("sample.py", *argv, "--top_k=1", PYTHONIOENCODING="ascii")
    assert said == (0, "?abcdefgh\n", "")  # what the terminal lacks is replaced
    texts = []
    for seed in (1, 1, 2):
        sample.main([*argv, f"--seed={seed}"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
