"""paper/figures.py: what the figures show, against sums written out."""

import math

import numpy as np
import pytest
import torch

from fope import FoPE
from paper import figures


def lines(axis):
    """The values of each line, without those that are left out."""
    values = [np.array(line.get_ydata(), dtype=float) for line in axis.get_lines()]
    return [y[~np.isnan(y)] for y in values]


def test_factors_of_a_kept_and_of_a_clipped_pair():
    w = [10_000 ** (-m / 32) for m in range(32)]
    a = FoPE(n_head=1, head_dim=64, train_len=512, sigma=0.5, seed=0).coef[0, 0].tolist()
    fig = figures.frequencies(sigma=0.5)
    assert fig.get_suptitle().startswith(f"{sum(x < 2 * math.pi / 512 for x in w)} of RoPE's 32 pairs")
    fope, rope, *_, fope_17, _, unseen_17 = lines(fig.axes[1])[:9]
    for n in (0, 1, 700):  # pair 12, the first that is drawn
        assert rope[n] == pytest.approx(math.cos(w[12] * n), abs=1e-9)
        assert fope[n] == pytest.approx(rope[n] + sum(a[m][12] * math.cos(w[m] * n) for m in range(16)), abs=1e-6)
    assert set(fope_17 + 6) == {1.0}  # the third pair, which stands 6 lower
    assert len(unseen_17) == sum(w[17] * n < 2 * math.pi for n in range(513, 1025))


def test_truncation_shows_the_overlap_of_each_pair_with_a_constant():
    kept, clipped = lines(figures.truncation().axes[1])[1:3]
    for m in (0, 15, 16, 31):
        component = np.exp(1j * 10_000 ** (-m / 32) * np.arange(512))
        assert [*kept, *clipped][m] == pytest.approx(abs(sum(component)) / 512, abs=1e-9)


def test_the_title_counts_the_draws_in_which_fope_is_closer():
    cos, shape = np.cos(np.outer(np.arange(64), (1, 0.1))), dict(n_head=1, head_dim=4, train_len=64, theta=100.0)

    def series(draw):  # what the coefficients add to two pairs
        return (cos @ FoPE(**shape, coef_init="normal", sigma=0.3, seed=draw).coef[0, 0].numpy()).sum(-1)

    pairs = [(series(2 * draw), series(2 * draw + 1)) for draw in range(20)]
    closer = sum(sum((own - truth) ** 2) < sum(truth**2) for own, truth in pairs)
    assert figures.blind_coefficients(N=64, draws=20).get_suptitle().endswith(f"in {closer / 20:.0%} of 20 draws")


@pytest.mark.parametrize("options", [{}, dict(coef_init="normal"), dict(zero_phase=True), dict(sigma=0.0)])
def test_departure_is_the_share_of_the_logit_that_is_no_function_of_distance(options):
    """From the logits of every two unit vectors at every two positions, one diagonal at a time."""
    T, d, off, total = 24, 16, 0.0, 0.0
    position = FoPE(**dict(n_head=2, head_dim=d, train_len=T, theta=10.0, seed=0) | options)
    rotated = torch.stack([position(*[unit.expand(1, 2, T, d)] * 2)[0][0] for unit in torch.eye(d)]).double()
    logit = torch.einsum("ahic,bhjc->hijab", rotated, rotated)  # (2 heads, T, T, d, d)
    for diagonal in (logit[h].diagonal(-n) for h in range(2) for n in range(T)):  # (d, d, T - n)
        off += diagonal.var(-1, correction=0).sum().item()
        total += diagonal.square().mean(-1).sum().item()
    expected = math.sqrt(off / total)
    assert (expected > 0.01) == (position.coef.abs().max() > 0)  # without coefficients, FoPE is RoPE
    assert figures.departure(position, T) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", "frequencies truncation mixing blind_coefficients both_positions decay".split())
def test_a_notebook_can_draw_with_other_values(name, tmp_path):
    draws = dict(draws=5) if name == "blind_coefficients" else {}
    getattr(figures, name)(N=256, **draws).savefig(tmp_path / "a.png")
