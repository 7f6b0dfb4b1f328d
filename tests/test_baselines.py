"""baselines.py against transformers' frequencies, and against float64 formulas written out here."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from baselines import FIRE, KERPLE, llama3, position_interpolation, scaled, whole_cycles, yarn
from fope import rope_frequencies

THEIR_OPTIONS = {
    "linear": {},
    "yarn": dict(beta_fast=32, beta_slow=1),
    "llama3": dict(low_freq_factor=1.0, high_freq_factor=4.0),
}


@pytest.mark.parametrize("head_dim, N, scale", [(64, 512, 16.0), (128, 8192, 8.0)])
@pytest.mark.parametrize("scaling", THEIR_OPTIONS)
def test_scaled_frequencies_are_those_of_transformers(scaling, head_dim, N, scale):
    rope = dict(rope_type=scaling, factor=scale, original_max_position_embeddings=N, rope_theta=1e4)
    shape = dict(hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=int(N * scale))
    llama = LlamaConfig(**shape, rope_parameters=rope | THEIR_OPTIONS[scaling])
    want, _ = ROPE_INIT_FUNCTIONS[scaling](llama, "cpu")
    got = scaled(rope_frequencies(head_dim), scaling, scale, N, head_dim=head_dim, theta=1e4)
    torch.testing.assert_close(got.float(), want, atol=0, rtol=1e-6)


def test_whole_cycles_are_the_nearest_ones():
    omega = rope_frequencies(64)
    got = whole_cycles(omega, 512) * 512 / (2 * math.pi)
    assert got.tolist() == pytest.approx([round(w * 512 / (2 * math.pi)) for w in omega.tolist()])
    assert got[0] == 81 and got[-1] == 0


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda omega: position_interpolation(omega, 0.0), "scale 0"),
        (lambda omega: yarn(whole_cycles(omega, 512), 4, 512, head_dim=64, theta=1e4), "no frequency zero"),
        (lambda omega: llama3(omega, 4, 0), "length 0"),
        (lambda omega: llama3(omega, 4, 512, low=4, high=1), "less than high"),
    ],
)
def test_what_would_give_wrong_frequencies_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(rope_frequencies(64))


# ----------------------------------------------------------------------------------------------------------------------
# KERPLE and FIRE


def formula(module, i, j):
    """The bias of each head at float64 positions i (Tq, 1) and j (Tk,), from the module's parameters."""
    p = {name: value.double() for name, value in module.named_parameters()}
    distance = (i - j).clamp(min=0)
    if isinstance(module, KERPLE):
        return torch.stack([-r1 * torch.log(1 + r2 * distance) for r1, r2 in zip(p["r1"].flatten(), p["r2"].flatten())])
    c, L = p["c"].abs(), 512 * p["L"].abs()
    share = torch.log(1 + c * distance) / torch.log(1 + c * torch.maximum(i, L))
    hidden = [(p["w1"][unit] * share + p["b1"][unit]).clamp(min=0) for unit in range(32)]
    return torch.stack([b + sum(w * x for w, x in zip(row, hidden)) for row, b in zip(p["w2"], p["b2"])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [KERPLE, FIRE])
def test_bias_and_its_gradient_are_those_of_the_formula_at_3000_distances_in_every_dtype(kind, dtype):
    module = kind(n_head=2, seed=4).to(dtype)
    if kind is FIRE:  # only the sizes of c and L count
        module.c.data.neg_()
        module.L.data.neg_()
    i, j = torch.tensor([[2999], [100]]), torch.arange(3000)
    bias, want = module.bias(i, j)[:, j <= i], formula(module, i.double(), j.double())[:, j <= i]
    assert bias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(bias.double(), want, atol=2e-5, rtol=1e-5)
    if dtype == torch.float64:
        weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        got, want = (torch.autograd.grad((b * weight).sum(), list(module.parameters())) for b in (bias, want))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [KERPLE, FIRE])
def test_draws_depend_on_the_seed_alone(kind):
    def draw(seed):
        return torch.cat([p.detach().flatten() for p in kind(n_head=2, seed=seed).parameters()])

    want = draw(0)
    torch.manual_seed(5)
    assert torch.equal(draw(0), want) and not torch.equal(draw(1), want)
