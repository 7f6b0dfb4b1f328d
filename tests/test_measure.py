"""paper/measure.py: against sums written out and against attention weights that transformers computes."""

import json

import numpy as np
import pytest
import torch
from conftest import make_data, make_run

from baselines import KERPLE
from data.tokenizer import get_tokenizer
from eval_passkey import passkey_trials
from hf import convert
from model import GPT, GPTConfig
from paper import measure

SHAPE = dict(n_layer=2, n_head=2, n_embd=32, n_hidden=32, vocab_size=320, train_len=512, init_std=0.3)


def run(folder, tokens=(), **options):
    """A run folder with a random model, and beside it a data folder with these tokens. Returns the model."""
    if len(tokens):
        make_data(folder.parent / "data", tokens, tokens)
    return make_run(folder, GPT(GPTConfig(**SHAPE | options)), step=7, data=folder.parent / "data")


def test_measured_means_are_those_of_q_and_k(tmp_path, monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 64, 64 * 512 + 1)
    model = run(tmp_path / "run", tokens, pos="rope", n_layer=1)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.main(["qk", str(tmp_path / "run")])
    found = json.loads((tmp_path / "qk_means.json").read_text())["run"]
    x = model.embedding.weight[torch.from_numpy(tokens[:-1])]
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-6) ** -0.5
    q, k, _ = (normed @ model.blocks[0].attention.qkv.weight.T).split(32, dim=-1)
    for name, expected in (("q", q), ("k", k)):
        assert np.array(found[name]).reshape(32) == pytest.approx(expected.abs().mean(0).detach().numpy(), abs=6e-4)
    assert (found["pos"], found["step"], found["seed"]) == ("rope", 7, 0)


def test_attention_on_the_key_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    N = 256
    ours = run(tmp_path / "run", train_len=N, logn=2.0)
    convert.main(["to", str(tmp_path / "run"), str(tmp_path / "hf")])
    options = dict(trust_remote_code=True, attn_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **options).eval()
    with torch.no_grad():
        rows = measure.attention_on_key(ours, {"tokenizer": "bytes", "folder": "", "config": {"data": ""}}, trials=2)
    settings = [(row["length"] // N, *row["p"]) for row in rows]
    expected = [(1, 0, 0), *((2, p, p) for p in range(3)), *((4, p, p) for p in range(3)), (4, 2, 0), (4, 0, 2)]
    assert settings[:9] == expected and len(rows) == 15
    for row in (rows[0], rows[3]):  # the exported model has p = 2, which acts beyond N only
        documents, _, _ = passkey_trials(get_tokenizer("bytes"), row["length"], 2, 0)
        found = []
        for document in documents:
            with torch.no_grad():
                weights = theirs(torch.tensor(document[None, :-1]), output_attentions=True).attentions
            text = bytes(document.tolist()).decode()
            first = text.index(text[-5:])
            digits = [first + i for i in range(5)] + [text.index(text[-5:], first + 1) + i for i in range(5)]
            others = [j for j in range(len(text) - 5) if j not in digits]
            layers = []
            for layer in weights:
                last = layer[0, :, -5:].double()  # (n_head, 5, T)
                logits = last.log()  # up to a constant in each row, which no difference has
                own, rest = last[..., digits], last[..., others]
                own_mean = (own * logits[..., digits]).sum(-1) / own.sum(-1)
                gap = own_mean - (rest * logits[..., others]).sum(-1) / rest.sum(-1)
                lead = own_mean - logits[..., others].mean(-1)
                near = torch.stack(
                    [last[:, i, len(text) - 5 - 16 + i : len(text) - 5 + i].sum(-1) for i in range(5)], -1
                )
                layers.append(torch.stack([x.mean(-1) for x in (own.sum(-1), near, lead, gap)]))
            found.append(torch.stack(layers, 1))  # (4, n_layer, n_head)
        for name, values in zip(("share", "near", "lead", "gap"), torch.stack(found).mean(0).numpy()):
            assert np.array(row[name]) == pytest.approx(values, abs=2e-3)


def test_log_n_acts_in_the_layers_that_have_an_exponent(tmp_path):
    """One layer is the last layer too: p = 2 in all but the last is p = 0, and 2 in the last is p = 2."""
    model = run(tmp_path / "run", train_len=256, n_layer=1)
    with torch.no_grad():
        rows = measure.attention_on_key(model, {"tokenizer": "bytes", "folder": "", "config": {"data": ""}}, trials=1)
    p0, p2, below, last = rows[4], rows[6], rows[7], rows[8]
    assert (below["p"], last["p"]) == ([0.0], [2.0]) and below["share"] == p0["share"] != p2["share"] == last["share"]


def test_a_learned_bias_is_part_of_the_attention_on_the_key():
    position, digits, T = KERPLE(n_head=2, seed=0), torch.arange(10) + 20, 64
    q = k = torch.zeros(1, 2, T, 4)
    with torch.no_grad():
        share, *_ = measure.head_numbers(position, q, k, digits, 4)
    r1, r2 = (r.detach().double().view(2, 1) for r in (position.r1, position.r2))
    expected = torch.zeros(2)
    for query in range(T - 5, T):
        weights = (-r1 * torch.log(1 + r2 * (query - torch.arange(query + 1)))).softmax(-1)
        expected += weights[:, digits].sum(-1) / 5
    assert share == pytest.approx(expected.tolist(), rel=1e-5)


def test_loss_by_position_is_the_mean_over_texts(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 64, 2 * 96 + 1).astype(np.uint16)
    model = run(tmp_path / "run", tokens, train_len=32)
    with torch.no_grad():
        found = measure.loss_by_position(model, str(tmp_path / "data"), "val", 96, 2, bins=4)
        x = torch.from_numpy(tokens[:-1].astype(np.int64)).view(2, 96)
        y = torch.from_numpy(tokens[1:].astype(np.int64)).view(2, 96)
        losses = -model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]
    assert found == pytest.approx(losses.view(2, 4, 24).mean((0, 2)).tolist(), abs=1e-4)
