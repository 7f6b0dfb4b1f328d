"""paper/figures.py: what the figures show, against sums written out."""

import math

import matplotlib.text
import numpy as np
import pytest
import torch

from fope import FoPE, RoPE
from paper import figures


def lines(axis):
    """The values of each line, without those that are left out."""
    values = [np.array(line.get_ydata(), dtype=float) for line in axis.get_lines()]
    return [y[~np.isnan(y)] for y in values]


def test_the_title_counts_the_pairs_below_the_floor():
    n_clipped = sum(500_000 ** (-m / 32) < 2 * math.pi / 512 for m in range(32))
    assert figures.frequencies(theta=500_000.0).get_suptitle().startswith(f"{n_clipped} of RoPE's 32 pairs")


def test_factors_of_a_kept_and_of_a_clipped_pair():
    w = [10_000 ** (-m / 32) for m in range(32)]
    a = FoPE(n_head=1, head_dim=64, train_len=512, sigma=0.5, seed=0).coef[0, 0].tolist()
    fope, rope, *_, fope_17, _, unseen_17 = lines(figures.frequencies(sigma=0.5).axes[1])[:9]
    for n in (0, 1, 700):  # pair 12, the first that is drawn
        assert rope[n] == pytest.approx(math.cos(w[12] * n), abs=1e-9)
        assert fope[n] == pytest.approx(rope[n] + sum(a[m][12] * math.cos(w[m] * n) for m in range(16)), abs=1e-6)
    assert set(fope_17 + 6) == {1.0}  # the third pair, which stands 6 lower
    assert len(unseen_17) == sum(w[17] * n < 2 * math.pi for n in range(513, 1025))


@pytest.mark.parametrize("n", [1, 7, 512])
def test_dirichlet_is_the_mean_of_the_window(n):
    x = np.arange(n)
    for delta in (-3.0, -2 * math.pi, 0.0, 1e-14, 0.01, 2 * math.pi / n, 1.0, 2 * math.pi, 4.0):
        expected = np.mean(np.exp(-1j * delta * (x - (n - 1) / 2))).real  # the phase is that of the window's center
        assert figures.dirichlet(np.array(delta), n) == pytest.approx(expected, abs=1e-9)


def test_truncation_shows_the_overlap_of_each_pair_with_a_constant():
    kept, clipped = lines(figures.truncation().axes[1])[1:3]
    for m in (0, 15, 16, 31):
        component = np.exp(1j * 10_000 ** (-m / 32) * np.arange(512))
        assert [*kept, *clipped][m] == pytest.approx(abs(sum(component)) / 512, abs=1e-9)


def test_silu_creates_sums_and_differences_of_the_two_frequencies():
    """SiLU(x) is x / 2 plus an even function, so of 19 j + 50 k only those with j + k even are new."""
    (pair,), two, many = (
        {int(x): top for (x, _), (_, top) in axis.collections[0].get_segments()} for axis in figures.mixing().axes
    )
    even = {abs(19 * j + 50 * k) for j in range(-9, 10) for k in range(-9, 10) if (j + k) % 2 == 0}
    assert pair == 19 and set(two) == {19, 50} and set(two) | {31, 69, 38, 100} <= set(many) <= set(two) | even


def test_mixture_is_two_pairs_with_their_series():
    fope, rope = figures.mixture(0.2, 6, 512), figures.mixture(0.0, 0, 512)
    shape = dict(n_head=1, head_dim=4, train_len=512, theta=100.0, coef_init="normal", sigma=0.2, seed=6)
    a = FoPE(**shape).coef[0, 0].tolist()
    for n in (0, 1, 17, 511):
        own = math.cos(n), math.cos(0.1 * n)
        series = sum(a[w][m] * own[w] for w in (0, 1) for m in (0, 1))
        assert rope[n] == pytest.approx(sum(own), abs=1e-9) and fope[n] == pytest.approx(sum(own) + series, abs=1e-6)


def test_the_title_counts_the_draws_in_which_fope_is_closer():
    def error(sigma, draw):
        return sum((figures.mixture(sigma, 2 * draw, 64) - figures.mixture(0.3, 2 * draw + 1, 64)) ** 2)

    closer = sum(error(0.3, draw) < error(0.0, draw) for draw in range(20))
    assert figures.blind_coefficients(N=64, draws=20).get_suptitle().endswith(f"in {closer / 20:.0%} of 20 draws")


def test_mean_logit_is_that_of_the_module():
    position, curve = RoPE(head_dim=64), lines(figures.decay().axes[0])[0]
    q, k = 1 + torch.randn(2, 20_000, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    for n in (0, 5, 60):
        logits = (position(q, k, n)[0] * position(q, k, 0)[1]).sum(-1) / 8
        assert logits.mean().item() == pytest.approx(curve[n], abs=4 * logits.std().item() / 20_000**0.5)


def share_off_diagonals(position, T):
    """From the logits of every two unit vectors at every two positions, one diagonal at a time."""
    d, off, total = position.head_dim, 0.0, 0.0
    rotated = torch.stack([position(*[unit.expand(1, 2, T, d)] * 2)[0][0] for unit in torch.eye(d)]).double()
    logit = torch.einsum("ahic,bhjc->hijab", rotated, rotated)  # (2 heads, T, T, d, d)
    for diagonal in (logit[h].diagonal(-n) for h in range(2) for n in range(T)):  # (d, d, T - n)
        off += diagonal.var(-1, correction=0).sum().item()
        total += diagonal.square().mean(-1).sum().item()
    return math.sqrt(off / total)


OPTIONS = [{}, dict(coef_init="normal"), dict(clip_floor=False, sigma=1.0), dict(n_freqs=9), dict(sigma=0.0)]


@pytest.mark.parametrize("options", OPTIONS)
def test_departure_is_the_share_of_the_logit_that_is_no_function_of_distance(options):
    position = FoPE(**dict(n_head=2, head_dim=16, train_len=24, theta=10.0, seed=0) | options)
    expected = share_off_diagonals(position, 24)
    assert (expected > 0.01) == (position.coef.abs().max() > 0)  # without coefficients, FoPE is RoPE
    assert figures.departure(position, 24) == pytest.approx(expected, rel=1e-4, abs=1e-6)


OTHER_VALUES = [
    (figures.frequencies, dict(N=4096, theta=5e5, head_dim=128, sigma=1.0)),
    (figures.truncation, dict(N=128, theta=100.0, head_dim=16)),
    (figures.mixing, dict(N=256)),
    (figures.blind_coefficients, dict(N=64, sigma=0.25, draws=5)),
    (figures.both_positions, dict(N=256, theta=5e5, head_dim=32, sigma=0.6)),
    (figures.decay, dict(N=64, head_dim=16)),
    (figures.trained_pairs, dict(N=256)),
]


@pytest.mark.parametrize("draw, options", OTHER_VALUES)
def test_a_notebook_can_draw_with_other_values_and_a_phone_can_show_it(draw, options, tmp_path):
    fig = draw(**options)
    fig.savefig(tmp_path / "a.png")
    texts = [text for text in fig.findobj(matplotlib.text.Text) if text.get_text()]
    assert fig.get_figwidth() == 6.4 and len(texts) > 5 and min(text.get_fontsize() for text in texts) >= 12
