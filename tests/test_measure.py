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

SHAPE = dict(n_layer=2, n_head=2, n_embd=32, n_hidden=32, vocab_size=320, init_std=0.3)
TOKENS = np.random.default_rng(0).integers(0, 64, 64 * 32 + 1)


def run(folder, **options):
    """Makes a run folder with a random model, and beside it a data folder. Returns the model."""
    data = make_data(folder / "data", TOKENS, TOKENS)
    return make_run(folder / "run", GPT(GPTConfig(**SHAPE | options)), step=7, data=data)


def test_measured_means_are_those_of_q_and_k(tmp_path, monkeypatch):
    model = run(tmp_path, train_len=32, pos="rope", n_layer=1)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.main(["qk", str(tmp_path / "run")])
    found = json.loads((tmp_path / "qk_means.json").read_text())["run"]
    x = model.embedding.weight[torch.from_numpy(TOKENS[:-1])]
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-6) ** -0.5
    q, k, _ = (normed @ model.blocks[0].attention.qkv.weight.T).split(32, dim=-1)
    for name, expected in (("q", q), ("k", k)):
        assert np.array(found[name]).reshape(32) == pytest.approx(expected.abs().mean(0).detach().numpy(), abs=6e-4)
    assert (found["pos"], found["step"], found["seed"]) == ("rope", 7, 0)


@torch.no_grad()
def test_attention_on_the_key_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = run(tmp_path, train_len=256, logn=2.0)
    convert.main(["to", str(tmp_path / "run"), str(tmp_path / "hf")])
    options = dict(trust_remote_code=True, attn_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **options).eval()
    rows = measure.attention_on_key(ours, {"tokenizer": "bytes", "folder": "", "config": {"data": ""}}, trials=2)
    rows = {(row["length"] // 256, *row["p"]): row for row in rows}
    for row in (rows[1, 0, 0], rows[2, 2, 2]):  # the exported model has p = 2, which acts beyond N only
        documents, _, _ = passkey_trials(get_tokenizer("bytes"), row["length"], 2, 0)
        found = []
        for document in documents:
            text, T = bytes(document.tolist()).decode(), len(document) - 1
            first = text.index(text[-5:])
            digits = [i for start in (first, text.index(text[-5:], first + 1)) for i in range(start, start + 5)]
            others = [j for j in range(T - 4) if j not in digits]
            weights = theirs(torch.tensor(document[None, :-1]), output_attentions=True).attentions
            weights = torch.cat(weights)[:, :, -5:].double()  # (n_layer, n_head, 5, T)
            logits = weights.log()  # up to a constant in each row, which no difference has
            own, rest = ((weights * logits)[..., j].sum(-1) / weights[..., j].sum(-1) for j in (digits, others))
            near = torch.stack([weights[:, :, i, T - 20 + i : T - 4 + i].sum(-1) for i in range(5)], -1)
            lead = own - logits[..., others].mean(-1)
            numbers = (weights[..., digits].sum(-1), near, lead, own - rest)
            found.append(torch.stack([x.mean(-1) for x in numbers]))  # (4, n_layer, n_head)
        for name, values in zip(("share", "near", "lead", "gap"), torch.stack(found).mean(0).numpy()):
            assert np.array(row[name]) == pytest.approx(values, abs=2e-3)
    none, both, first, last = (np.array(rows[4, *p]["share"]) for p in ((0, 0), (2, 2), (2, 0), (0, 2)))
    assert (first[0] == both[0]).all() and (last[0] == none[0]).all() and (last[1] != none[1]).any()


@torch.no_grad()
def test_a_learned_bias_is_part_of_the_attention_on_the_key():
    position, digits, T = KERPLE(n_head=2, seed=0), torch.arange(10) + 20, 64
    q = k = torch.zeros(1, 2, T, 4)
    share, *_ = measure.head_numbers(position, q, k, digits, 4)
    r1, r2 = (r.double().view(2, 1) for r in (position.r1, position.r2))
    weights = [(-r1 * torch.log(1 + r2 * torch.arange(i, -1, -1))).softmax(-1) for i in range(T - 5, T)]
    assert share == pytest.approx((sum(w[:, digits].sum(-1) for w in weights) / 5).tolist(), rel=1e-5)


@torch.no_grad()
def test_loss_by_position_is_the_mean_over_texts(tmp_path):
    model = run(tmp_path, train_len=32)
    found = measure.loss_by_position(model, str(tmp_path / "data"), "val", 96, 2, bins=4)
    x, y = (torch.from_numpy(TOKENS[i : i + 2 * 96].astype(np.int64)).view(2, 96) for i in (0, 1))
    losses = -model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]
    assert found == pytest.approx(losses.view(2, 4, 24).mean((0, 2)).tolist(), abs=1e-4)
