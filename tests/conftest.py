"""What several test files share: one way to make a run, a data folder and a random Llama, and to see a refusal."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from data import prepare
from data.tokenizer import get_tokenizer
from model import GPT
from train import TrainConfig

torch.set_num_threads(1)  # small models compute faster so, and two processes of pytest share the cores

# The same examples in every run, however slow the machine is.
checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile("repository", deadline=None, derandomize=True, suppress_health_check=checks)
settings.load_profile("repository")


def make_data(folder, train, val):
    """A data folder with these tokens, which are bytes."""
    train, val = (np.asarray(tokens, dtype=np.uint16) for tokens in (train, val))
    prepare.write(folder, get_tokenizer("bytes"), train, val, {"source": "a test"})
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


def make_llama(folder, **options):
    """A random Llama as a Hugging Face folder, N = 64, with a tokenizer of 257 bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf.convert import byte_level_bpe

    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=257)
    more = dict(max_position_embeddings=64, initializer_range=0.1, eos_token_id=256)
    model = LlamaForCausalLM(LlamaConfig(**shape | more | options)).eval()
    model.save_pretrained(folder)
    byte_level_bpe(get_tokenizer("bytes"), folder)
    return model


@pytest.fixture(autouse=True)
def this_process(monkeypatch):
    """train.py's handlers of signals are not for pytest."""
    monkeypatch.setattr("train.on_stop", lambda handler: {})


@pytest.fixture
def refused(capsys):
    """refused(main, *argv): the line on stderr of a command that must refuse its input."""

    def run(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(x) for x in argv])
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1, error
        return error

    return run
