"""paper/figures.py: what it computes, against sums written out; every figure can be drawn."""

import json
import math

import numpy as np
import pytest
import torch

from fope import FoPE, RoPE
from model import GPT, GPTConfig
from paper import figures


@pytest.mark.parametrize("n", [1, 7, 512])
def test_dirichlet_is_the_mean_of_the_window(n):
    for delta in (-3.0, -2 * math.pi, 0.0, 1e-14, 0.01, 2 * math.pi / n, 1.0, 2 * math.pi, 4.0):
        expected = sum(complex(math.cos(delta * x), -math.sin(delta * x)) for x in range(n)) / n
        center = complex(math.cos(delta * (n - 1) / 2), math.sin(delta * (n - 1) / 2))
        assert figures.dirichlet(np.array(delta), n) == pytest.approx((expected * center).real, abs=1e-9)


def test_spectrum_returns_amplitudes():
    n = np.arange(64)
    signal = 0.5 + 2 * np.cos(2 * np.pi * 5 * n / 64) - 3 * np.sin(2 * np.pi * 9 * n / 64) + 0.25 * np.cos(np.pi * n)
    expected = np.zeros(33)
    expected[[0, 5, 9, 32]] = 0.5, 2, 3, 0.25
    assert figures.spectrum(signal) == pytest.approx(expected, abs=1e-12)


def test_silu_creates_even_mixtures_only():
    """SiLU(x) - x / 2 is an even function, so of j w1 + k w2 only those with j + k even are new."""
    n = 2 * np.pi * np.arange(8192) / 8192
    found = figures.spectrum(figures.silu(1.3 * np.cos(101 * n) + 0.7 * np.sin(211 * n)))
    even = {abs(j * 101 + k * 211) for j in range(-9, 10) for k in range(-9, 10) if (j + k) % 2 == 0}
    assert set(np.flatnonzero(found > 1e-4)) <= even | {101, 211}
    assert min(found[[110, 312, 202, 422, 101, 211]]) > 0.01  # w2 - w1, w2 + w1, 2 w1, 2 w2, w1, w2


def test_mixture_is_two_pairs_with_their_series():
    fope, rope = figures.mixture(0.2, 6, 512), figures.mixture(0.0, 0, 512)
    shape = dict(n_head=1, head_dim=4, train_len=512, theta=100.0, coef_init="normal", sigma=0.2, seed=6)
    a = FoPE(**shape).coef[0, 0].double()
    for n in (0, 1, 17, 511):
        own = math.cos(n), math.cos(0.1 * n)
        series = sum(a[w, m].item() * own[w] for w in (0, 1) for m in (0, 1))
        assert rope[n] == pytest.approx(sum(own), abs=1e-9) and fope[n] == pytest.approx(sum(own) + series, abs=1e-6)


def test_mean_logit_is_that_of_the_module():
    position = RoPE(head_dim=64)
    q, k = 0.7 + torch.randn(2, 20_000, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    for n in (0, 5, 60):
        logits = (position(q, k, n)[0] * position(q, k, 0)[1]).sum(-1) / 8
        error = 4 * logits.std().item() / 20_000**0.5
        assert logits.mean().item() == pytest.approx(figures.mean_logit(0.7, np.array([n]))[0], abs=error)


def variance_along_diagonals(position, T):
    """From the logits of every two unit vectors at every two positions, one diagonal at a time."""
    d, off, total = position.head_dim, 0.0, 0.0
    rotated = torch.stack([position(*[unit.expand(1, 2, T, d)] * 2)[0][0] for unit in torch.eye(d)]).double()
    logit = torch.einsum("ahic,bhjc->hijab", rotated, rotated)  # (2 heads, T, T, d, d)
    for h in range(2):
        for n in range(T):
            along = logit[h].diagonal(-n)  # (d, d, T - n)
            off += along.var(-1, correction=0).sum().item()
            total += along.square().mean(-1).sum().item()
    return math.sqrt(off / total)


@pytest.mark.parametrize(
    "options", [{}, dict(coef_init="normal"), dict(clip_floor=False, sigma=1.0), dict(n_freqs=9)], ids=str
)
def test_departure_is_the_variance_along_diagonals(options):
    position = FoPE(**dict(n_head=2, head_dim=16, train_len=24, theta=10.0, seed=0) | options)
    assert figures.departure(position, 24) == pytest.approx(variance_along_diagonals(position, 24), rel=1e-4)
    without = FoPE(n_head=2, head_dim=16, train_len=24, theta=10.0, seed=0, sigma=0.0)
    assert figures.departure(without, 24) < 1e-6 < figures.departure(position, 24)


def test_measured_means_are_those_of_q_and_k(tmp_path, monkeypatch):
    cfg = GPTConfig(pos="rope", n_layer=1, vocab_size=64, n_hidden=16)
    model = GPT(cfg)
    (tmp_path / "run").mkdir()
    tokens = np.random.default_rng(0).integers(0, 64, 64 * 512 + 1).astype(np.uint16)
    for name in ("train", "val"):
        tokens.tofile(tmp_path / f"{name}.bin")
    config = vars(cfg) | {"data": str(tmp_path)}
    checkpoint = {"step": 7, "config": config, "tokenizer": "gpt2", "model": model.state_dict()}
    torch.save(checkpoint, tmp_path / "run/ckpt.pt")
    monkeypatch.setattr(figures, "QK_MEANS", tmp_path / "means.json")
    figures.measure_qk([str(tmp_path / "run")])
    found = json.loads((tmp_path / "means.json").read_text())["rope"]

    x = model.embedding.weight[torch.from_numpy(tokens[: 64 * 512].astype(np.int64))]
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-6) ** -0.5
    q, k, _ = (normed @ model.blocks[0].attention.qkv.weight.T).split(128, dim=-1)
    for name, expected in (("q", q), ("k", k)):
        assert np.array(found[name]).reshape(128) == pytest.approx(expected.abs().mean(0).detach().numpy(), abs=6e-4)
    assert (found["step"], found["seed"]) == (7, 0)


@pytest.mark.parametrize("theta, n_clipped", [(10_000.0, 16), (500_000.0, 21)])
def test_the_first_figure_counts_the_pairs_below_the_floor(theta, n_clipped):
    """theta^(-2m/64) < 2 pi / 512."""
    assert n_clipped == sum(theta ** (-m / 32) < 2 * math.pi / 512 for m in range(32))
    assert figures.frequencies(theta=theta).get_suptitle().startswith(f"{n_clipped} of RoPE's 32 pairs")


@pytest.mark.parametrize("draw", [figures.truncation, figures.mixing, figures.both_positions, figures.trained_pairs])
def test_the_other_figures_can_be_drawn_for_another_n(draw, tmp_path):
    draw(N=256).savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
