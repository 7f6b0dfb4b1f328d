"""What fope.py guarantees: Eq. 13 of the paper at any position, in any dtype, whatever happens to the module.

FoPE multiplies pair m of q and k, a complex number, by f(w_m, t): a constant for pairs below the floor 2 pi / N, else
exp(i w_m t) and a random series. The oracle does so in float64. It shares nothing with fope.py but the coefficients.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from fope import ALiBi, FoPE, RoPE, log_n


def random_qk(B, n_head, T, d, dtype=torch.float32, n_kv_head=None):
    """Random q (B, n_head, T, d) and k (B, n_kv_head, T, d)."""
    generator = torch.Generator().manual_seed(1)
    shapes = (B, n_head, T, d), (B, n_kv_head or n_head, T, d)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def make(name, n_head=2, **options):
    if name == "fope":
        return FoPE(n_head=n_head, **dict(head_dim=16, train_len=64, sigma=0.5, seed=3) | options)
    return RoPE(head_dim=16) if name == "rope" else ALiBi(n_head=n_head, head_dim=16)


def near(got, want, atol=5e-6, rtol=1e-6):
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol)


# ----------------------------------------------------------------------------------------------------------------------
# FoPE is Eq. 13: for any shape, option, position and dtype


def eq13(coef, t, head_dim, train_len, theta, fourier_series, clip_floor, n_freqs, zero_phase):
    """f(w_m, t) at t (B, T): complex (B, n_kv_head, T, head_dim / 2). zero_phase: the paper's 1, not 1 + i."""
    omega, floor = [theta ** (-2 * m / head_dim) for m in range(head_dim // 2)], 2 * math.pi / train_len
    kept = [w for w in omega if w >= floor or not clip_floor]
    extra = max(n_freqs - len(kept), 0)
    series = kept + [math.exp(math.log(floor) + (i + 0.5) / extra * math.log(math.pi / floor)) for i in range(extra)]
    heads = coef.shape[1] if fourier_series else 1
    f = np.full((len(t), heads, t.shape[1], head_dim // 2), 1 if zero_phase else 1 + 1j, dtype=complex)
    for m, w in enumerate(kept):
        f[..., m] = np.exp(1j * w * t)[:, None]
        for i, other in enumerate(series if fourier_series else []):
            for h in range(heads):
                f[:, h, :, m] += float(coef[0, h, i, m]) * np.cos(other * t)
                f[:, h, :, m] += float(coef[1, h, i, m]) * np.sin(other * t) * 1j
    return torch.from_numpy(f)


def rotated_by(x, f):
    """Pair m of x (B, heads, T, d), which is dimensions m and m + d / 2, times the factor of its key head."""
    a, b = x.double().chunk(2, dim=-1)
    z = torch.complex(a, b) * f.repeat_interleave(x.shape[1] // f.shape[1], dim=1)
    return torch.cat([z.real, z.imag], dim=-1)


POSITION = st.integers(0, 8191)
ROW = st.lists(POSITION, min_size=3, max_size=3)
POSITIONS = POSITION | ROW.map(torch.tensor) | st.lists(ROW, min_size=2, max_size=2).map(torch.tensor)
TOLERANCES = {torch.float64: (1e-10, 0), torch.float32: (3e-5, 0), torch.bfloat16: (3e-5, 2**-8)}


@settings(max_examples=300)
@given(
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),  # key heads, and query heads of each
    head_dim=st.integers(2, 12).map(lambda pairs: 2 * pairs),
    train_len=st.integers(7, 300),
    theta=st.sampled_from([100.0, 1e4, 5e5]),
    series=st.booleans(),
    clip=st.booleans(),
    more=st.none() | st.integers(0, 5),  # frequencies in the series beyond the pairs of a head
    zero_phase=st.booleans(),
    positions=POSITIONS,
    dtype=st.sampled_from(list(TOLERANCES)),
    autocast=st.booleans(),
)
def test_fope_is_eq13(heads, head_dim, train_len, theta, series, clip, more, zero_phase, positions, dtype, autocast):
    n_kv_head, group = heads
    options = dict(head_dim=head_dim, train_len=train_len, theta=theta, fourier_series=series, clip_floor=clip)
    options |= dict(zero_phase=zero_phase, n_freqs=0 if more is None or not series else head_dim // 2 + more)
    position = FoPE(n_head=group * n_kv_head, n_kv_head=n_kv_head, seed=5, sigma=0.3, coef_init="normal", **options)
    q, k = random_qk(2, group * n_kv_head, 3, head_dim, dtype, n_kv_head)
    position(q, k, 0)  # an earlier call changes nothing
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rotated = position(q, k, positions)
    t = positions if isinstance(positions, torch.Tensor) else torch.arange(positions, positions + 3)
    f = eq13(position.coef, t.expand(2, 3).numpy(), **options)
    for x, y in zip((q, k), rotated):
        assert y.dtype == dtype
        near(y, rotated_by(x, f), *TOLERANCES[dtype])


def test_a_pair_that_completes_exactly_one_cycle_is_kept():
    omega = 2 * math.pi / 64 * torch.tensor([8.0, 2.0, 1.0, 0.99], dtype=torch.float64)
    position = FoPE(n_head=1, head_dim=8, train_len=64, seed=0, omega=omega)
    assert torch.equal(position.omega, omega[:3]) and position.coef.shape == (2, 1, 3, 3)


def test_fope_with_sigma_0_and_no_clipping_is_rope_bit_for_bit_and_starts_at_position_0():
    q, k = random_qk(2, 3, 200, 32)
    position = FoPE(n_head=3, head_dim=32, train_len=64, seed=0, clip_floor=False, sigma=0.0)
    for got, want in zip(position(q, k), RoPE(head_dim=32)(q, k, 0)):
        assert torch.equal(got, want)


def test_gradients_reach_q_and_k():
    q, k = (x.requires_grad_() for x in random_qk(1, 2, 3, 16, torch.float64))
    assert torch.autograd.gradcheck(make("fope"), (q, k))


def test_angles_drift_by_at_most_2_to_the_minus_41_of_a_cycle_per_token():
    """Each frequency is rounded so, and far positions multiply that. Within it, float32 does not matter."""
    t = torch.tensor([8_191, 1_000_000, 2**23 - 1])
    angle = t[:, None] * 1e4 ** (-torch.arange(32).double() / 32)
    cos_sin = RoPE(head_dim=64).cos_sin(t)[:, 0]  # (2, T, 32)
    error = cos_sin - torch.stack([angle.cos(), angle.sin()])
    assert (error.abs().amax((0, 2)) < 5e-7 + t * math.pi / 2**40).all()


# ----------------------------------------------------------------------------------------------------------------------
# Its coefficients are random, and the seed alone decides


def draws(seeds, **options):
    """The coefficients of several seeds, (2 seeds, n_kv_head, D, M): cosine and sine of each."""
    return torch.cat([FoPE(head_dim=64, train_len=512, seed=seed, **options).coef for seed in range(seeds)])


@pytest.mark.parametrize("coef_init, std", [("normal", 0.6), ("xavier", 0.6 * math.sqrt(2 / ((24 + 2) * 16)))])
def test_coefficients_of_seeds_heads_cosine_and_sine_are_uncorrelated_normal_numbers(coef_init, std):
    """Xavier's fans of a tensor (heads, D, M) are D M and heads M. Only key heads count."""
    options = dict(n_head=8, n_kv_head=2, n_freqs=24, sigma=0.6)
    rows = draws(8, coef_init=coef_init, **options).flatten(0, 1).flatten(1)  # 32 of 384 numbers
    assert (torch.corrcoef(rows) - torch.eye(32)).abs().max() < 0.3
    assert rows.std().item() == pytest.approx(std, rel=0.03) and abs(rows.mean()) < 4 * std / math.sqrt(rows.numel())
    assert (rows / std).pow(4).mean().item() == pytest.approx(3, abs=0.3)  # of a uniform distribution, 1.8


def test_the_seed_alone_decides_the_coefficients_which_are_saved_and_never_trained():
    want = make("fope").coef
    torch.manual_seed(1)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    position = make("fope")
    torch.set_default_dtype(torch.float32)
    assert torch.equal(position.coef, want) and torch.equal(before, torch.get_rng_state())
    assert list(position.state_dict()) == ["coef"] and not list(position.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Use: casts and loading leave it exact, no call waits for the device, and what does not fit is refused


def made_without_memory(name, position):
    """As from_pretrained of transformers does."""
    with torch.device("meta"):
        other = make(name)
    other.load_state_dict(position.state_dict())
    return other


FATES = {
    "cast": lambda name, position: position.to(torch.bfloat16),
    "on the meta device and back": lambda name, position: position.to("meta").to_empty(device="cpu"),
    "made on the meta device and loaded": made_without_memory,
}


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_casting_moving_or_loading_changes_nothing(name, fate):
    (q, k), position, untouched = random_qk(1, 2, 200, 16), make(name), make(name)
    if name == "fope":  # as if loaded: not the coefficients that the seed would give again
        position.coef.mul_(2)
        untouched.coef.mul_(2)
    assert position(q.to("meta"), k.to("meta"))[0].shape == position(q, k)[0].shape
    for got, want in zip(FATES[fate](name, position)(q, k), untouched(q, k)):
        assert torch.equal(got, want)


LEFT_PADDED = torch.tensor([[0] * 5 + list(range(35)), range(40)])


class NoWait(TorchDispatchMode):
    """Fails at an operation that waits for a value, or copies one to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name() not in ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_no_call_waits_for_a_value_or_copies_one_to_the_device(name):
    position, (q, k) = make(name, 4, n_kv_head=2), random_qk(2, 4, 40, 16, n_kv_head=2)
    with NoWait():
        for positions in (5, LEFT_PADDED):
            log_n(position(q, k, positions)[0], positions, train_len=16, p=2.0)


@pytest.mark.parametrize(
    "words, call",
    [
        ("train_len 6 is too short", lambda: make("fope", train_len=6)),
        ("n_freqs 24", lambda: make("fope", n_freqs=24, fourier_series=False)),
        ("omega has 3 values", lambda: make("fope", omega=torch.ones(3))),
        ("descending", lambda: make("fope", omega=torch.arange(8) + 1.0)),
        ("head_dim 16", lambda: make("fope")(*random_qk(1, 2, 40, 32))),
        ("n_kv_head 2", lambda: make("fope")(*random_qk(1, 1, 40, 16))),  # torch would broadcast it
        ("positions.*shape", lambda: make("fope")(*random_qk(1, 2, 40, 16), torch.tensor([3]))),  # and this
        (
            "of integers",
            lambda: make("rope")(*random_qk(1, 2, 40, 16), torch.arange(40) / 4),
        ),  # angles() would round them
        ("n_head 2", lambda: make("alibi")(*random_qk(1, 1, 40, 16))),
    ],
)
def test_options_and_inputs_that_do_not_fit_are_refused(words, call):
    with pytest.raises(ValueError, match=words):
        call()


# ----------------------------------------------------------------------------------------------------------------------
# ALiBi and log n


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (torch.bfloat16, 2**-15)])
def test_alibi_slopes_are_those_of_bloom_up_to_200_000_tokens(dtype, rtol):
    t = torch.stack([torch.arange(0, 200_000, 37), torch.arange(200_000, 0, -37)])  # (B, T)
    slopes = build_alibi_tensor(torch.ones(1, 2), 12, torch.float64)[:, 0, 1:]
    zero = torch.zeros(2, 12, t.shape[1], 8, dtype=dtype)
    q, k = ALiBi(n_head=12, head_dim=8)(zero[:, :, :1], zero, t)
    assert q.shape[-1] == k.shape[-1] == 16  # fused kernels require a multiple of eight
    near((q.double() * k.double()).sum(-1) / math.sqrt(8), slopes * t[:, None], atol=0, rtol=rtol)


def test_log_n_counts_the_visible_keys_of_each_position():
    q = random_qk(2, 4, 40, 16)[0]
    factor = [[max(1.0, math.log(t + 1) / math.log(16)) ** 1.5 for t in row] for row in LEFT_PADDED.tolist()]
    near(log_n(q, LEFT_PADDED, train_len=16, p=1.5), q * torch.tensor(factor)[:, None, :, None])
