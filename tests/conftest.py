"""What several test files share: one way to make a run, a data folder and a random Llama, and to see a refusal."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from data import prepare
from data.tokenizer import get_tokenizer
from model import GPT
from train import TrainConfig


def make_data(folder, train, val, tokenizer="bytes"):
    """A data folder with these tokens."""
    train, val = (np.asarray(tokens, dtype=np.uint16) for tokens in (train, val))
    prepare.write(folder, get_tokenizer(tokenizer), train, val, {"source": "a test"})
    return folder


def make_run(folder, model=None, step=1, tokenizer="bytes", **config):
    """A run folder as train.py leaves it, with the given model or a random one. Returns the model."""
    data, config = str(config.pop("data", "data/builtin")), {"vocab_size": 257} | config
    model = model or GPT(TrainConfig(**config))
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"step": step, "config": asdict(TrainConfig()) | asdict(model.cfg) | {"data": data}, "tokenizer": tokenizer}
    torch.save(facts | {"model": model.state_dict(), "optimizer": [], "data": None}, folder / "ckpt.pt")
    return model.eval()


def llama_of(ours):
    """Our RoPE model as transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf.convert import in_llama_names

    c = ours.cfg
    heads = dict(num_attention_heads=c.n_head, num_key_value_heads=c.kv_heads, head_dim=c.d)
    shape = dict(hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer, **heads)
    more = dict(rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=c.vocab_size, **shape, **more))
    llama.load_state_dict(in_llama_names(c, ours.state_dict()), strict=not c.tied)  # tied: lm_head is the embedding
    return llama


@pytest.fixture
def refused(capsys):
    """refused(main, argv): the line on stderr of a command that must refuse its input."""

    def run(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(x) for x in argv])
        out, error = capsys.readouterr()
        assert end.value.code == 2 and not out and error.count("\n") == 1, error
        return error

    return run
