"""What fope.py guarantees: Eq. 13 at any position, rounded once to the dtype of q and k, whatever happens to it.

The oracle multiplies complex numbers in float64. It shares nothing with fope.py but the coefficients drawn.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from fope import ALiBi, FoPE, RoPE, angles, log_n, rope_frequencies


def two(B, n_head, T, d, dtype=torch.float32, n_kv_head=None):
    """Random q (B, n_head, T, d) and k (B, n_kv_head, T, d)."""
    generator = torch.Generator().manual_seed(1)
    shapes = (B, n_head, T, d), (B, n_kv_head or n_head, T, d)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def make(name, n_head=2, n_kv_head=None):
    if name == "fope":
        return FoPE(n_head=n_head, n_kv_head=n_kv_head, head_dim=16, train_len=64, sigma=0.5, seed=3)
    return RoPE(head_dim=16) if name == "rope" else ALiBi(n_head=n_head, head_dim=16)


def near(got, want, atol=5e-6, rtol=1e-6):
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol)


# ----------------------------------------------------------------------------------------------------------------------
# Eq. 13


def eq13(coef, t, head_dim, train_len, theta, fourier_series, clip_floor, n_freqs, zero_phase):
    """f(w_m, t) for every key head at positions t (B, T): complex (B, n_kv_head, T, head_dim / 2)."""
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


def multiplied(x, f):
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
    q, k = two(2, group * n_kv_head, 3, head_dim, dtype, n_kv_head)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rotated = position(q, k, positions)
    t = positions if isinstance(positions, torch.Tensor) else torch.arange(positions, positions + 3)
    f = eq13(position.coef, t.expand(2, 3).numpy(), **options)
    for x, y in zip((q, k), rotated):
        assert y.dtype == dtype
        near(y, multiplied(x, f), *TOLERANCES[dtype])


@pytest.mark.parametrize("options", [dict(sigma=0.0), dict(fourier_series=False)], ids=str)
def test_fope_without_series_and_clipping_is_rope_bit_for_bit(options):
    q, k = two(2, 3, 200, 32)
    position = FoPE(n_head=3, head_dim=32, train_len=64, seed=0, clip_floor=False, **options)
    for got, want in zip(position(q, k), RoPE(head_dim=32)(q, k)):
        assert torch.equal(got, want)


def test_a_pair_that_completes_exactly_one_cycle_is_kept():
    omega = 2 * math.pi / 64 * torch.tensor([8.0, 2.0, 1.0, 0.99], dtype=torch.float64)
    position = FoPE(n_head=1, head_dim=8, train_len=64, seed=0, omega=omega)
    assert torch.equal(position.omega, omega[:3]) and position.coef.shape == (2, 1, 3, 3)


@pytest.mark.parametrize("n", [8_191, 1_000_000, 2**23 - 1])
def test_angles_are_exact_modulo_whole_cycles_at_any_position(n):
    """The frequencies are rounded to 2^-41 of a cycle per token, which far positions multiply."""
    omega = rope_frequencies(64)
    got = angles(omega, torch.tensor([n]), torch.float32)[0].double()
    want = torch.tensor([math.remainder(w * n - x, 2 * math.pi) for w, x in zip(omega.tolist(), got.tolist())])
    assert want.abs().max() < 5e-7 + n * math.pi / 2**40


@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_gradients_are_those_of_float64(name):
    position, (q, k) = make(name), two(1, 2, 9, 16, torch.float64)
    assert torch.autograd.gradcheck(position, (q.requires_grad_(), k.requires_grad_()))


# ----------------------------------------------------------------------------------------------------------------------
# Coefficients


def draws(seeds, **options):
    """The coefficients of several seeds, (2 seeds, n_kv_head, D, M): cosine and sine of each."""
    return torch.cat([FoPE(head_dim=64, train_len=512, seed=seed, **options).coef for seed in range(seeds)])


@pytest.mark.parametrize("n_kv_head, D", [(8, 48), (2, 16)])
def test_xavier_has_the_spread_of_torchs_xavier_with_the_key_heads_as_fan(n_kv_head, D):
    ours = draws(32 // n_kv_head, n_head=8, n_kv_head=n_kv_head, n_freqs=D, sigma=0.3, coef_init="xavier")
    generator = torch.Generator().manual_seed(0)
    theirs = [nn.init.xavier_normal_(torch.empty(n_kv_head, D, 16), 0.3, generator=generator) for _ in range(32)]
    assert ours.shape[1:] == (n_kv_head, D, 16)
    assert ours.std().item() == pytest.approx(torch.stack(theirs).std().item(), rel=0.04)


def test_normal_has_mean_zero_and_standard_deviation_sigma():
    coef = draws(8, n_head=8, coef_init="normal", sigma=0.6)
    assert coef.std().item() == pytest.approx(0.6, rel=0.02)
    assert abs(coef.mean()) < 4 * 0.6 / math.sqrt(coef.numel())


def test_seeds_heads_cosine_and_sine_have_independent_coefficients():
    rows = draws(4, n_head=4).flatten(0, 1).flatten(1)  # 32 of 256 numbers
    assert (torch.corrcoef(rows) - torch.eye(32)).abs().max() < 0.35


def test_coefficients_depend_on_the_seed_alone_and_leave_the_global_generator_alone():
    want = make("fope").coef
    torch.manual_seed(1)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(make("fope").coef, want) and make("fope").coef.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before, torch.get_rng_state())


def test_state_dict_and_ddp_see_the_coefficients_alone():
    position = make("fope")
    position(*two(1, 2, 100, 16))
    assert list(position.state_dict()) == [name for name, _ in position.named_buffers()] == ["coef"]
    assert not list(position.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# What may happen to a module


def made_without_memory(name, position):
    with torch.device("meta"):
        other = make(name)
    other.load_state_dict(position.state_dict())
    return other


FATES = {
    "cast": lambda name, position: position.to(torch.bfloat16),
    "emptied": lambda name, position: position.to_empty(device="cpu"),
    "on the meta device and back": lambda name, position: position.to("meta").to_empty(device="cpu"),
    "made on the meta device and loaded": made_without_memory,
}


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_casting_emptying_or_loading_changes_nothing(name, fate):
    (q, k), position, untouched = two(1, 2, 200, 16), make(name), make(name)
    position(q, k)
    if name == "fope":  # as if loaded: not the coefficients that the seed would give again
        position.coef.mul_(2)
        untouched.coef.mul_(2)
    for got, want in zip(FATES[fate](name, position)(q, k), untouched(q, k)):
        assert torch.equal(got, want)


def test_a_cast_reaches_what_a_subclass_adds_and_meta_tensors_pass():
    position = make("fope")
    position.gain = nn.Parameter(torch.ones(2))
    position.to(torch.bfloat16)
    assert (position.gain.dtype, position.coef.dtype) == (torch.bfloat16, torch.float32)
    assert position.to("meta")(*(x.to("meta") for x in two(1, 2, 20, 16)))[0].shape == (1, 2, 20, 16)


LEFT_PADDED = torch.tensor([[0] * 5 + list(range(35)), range(40)])


class Seen(TorchDispatchMode):
    """The names of all operations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = {*getattr(self, "names", ()), func.name()}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", [5, LEFT_PADDED], ids=["offset", "left-padded"])
@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_no_call_waits_for_a_value_or_copies_one_to_the_device(name, positions):
    position, (q, k) = make(name, 4, n_kv_head=2), two(2, 4, 40, 16, n_kv_head=2)
    with Seen() as seen:
        log_n(position(q, k, positions)[0], positions, 16, 2.0)
    assert not seen.names & {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero"} and len(seen.names) > 5


def test_growing_text_and_decoding_compile_at_most_three_times():
    torch._dynamo.reset()
    counter, position = CompileCounter(), make("fope")
    compiled = torch.compile(position, backend=counter, fullgraph=True)
    for length, offset in [(32, 0), (40, 0), (100, 0), (99, 0), (1000, 0), (50, 0), *((1, t) for t in range(90, 100))]:
        q, k = two(1, 2, length, 16)
        near(compiled(q, k, offset)[1], position(q, k, offset)[1])
    assert counter.frame_count <= 3


def test_a_compiled_left_padded_batch_with_grouped_heads_gives_what_each_row_gives_alone():
    """Attention that we did not write, compiled for real. The line about `position` is all that it needs."""
    torch._dynamo.reset()
    position = make("fope", 8, n_kv_head=2)

    def attend(q, k, v, positions, mask):
        q, k = position(q, k, positions=positions)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    q, k = two(2, 8, 40, 16, n_kv_head=2)
    causal = torch.ones(40, 40).tril().bool()
    real = torch.arange(40) >= torch.tensor([5, 0])[:, None]  # (B, T)
    mask = causal & (real[:, None] | torch.eye(40).bool())  # (B, T, T)
    got = torch.compile(attend, fullgraph=True)(q, k, k, LEFT_PADDED, mask[:, None])
    for b, pads in enumerate((5, 0)):
        row = slice(b, b + 1), slice(None), slice(pads, None)
        near(got[row], attend(q[row], k[row], k[row], None, causal[pads:, pads:]))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(theta=math.nan), "theta nan"),
        (dict(train_len=6), "train_len 6 is too short"),
        (dict(n_kv_head=2, n_head=3), "2 must divide n_head 3"),
        (dict(n_freqs=15), "n_freqs 15.*16"),
        (dict(n_freqs=24, fourier_series=False), "n_freqs 24"),
        (dict(sigma=math.nan), "sigma.*nan"),
        (dict(omega=torch.ones(3)), "omega has 3 values"),
        (dict(omega=torch.arange(32) + 1.0), "descending"),
    ],
    ids=str,
)
def test_fope_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        FoPE(**dict(n_head=2, head_dim=64, train_len=512, seed=0) | options)


@pytest.mark.parametrize(
    "name, heads, head_dim, positions, words",
    [
        ("fope", 2, 32, None, "head_dim 16"),
        ("fope", 1, 16, None, "n_kv_head 2"),  # torch would broadcast it
        ("fope", 2, 16, torch.tensor([3]), "shape"),  # and this
        ("rope", 2, 16, torch.arange(40) / 4, "of integers"),  # position interpolation divides the frequencies instead
        ("alibi", 1, 16, None, "n_head 2"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_refused(name, heads, head_dim, positions, words):
    with pytest.raises(ValueError, match=words):
        make(name)(*two(1, heads, 40, head_dim), positions)


# ----------------------------------------------------------------------------------------------------------------------
# ALiBi and log n


@pytest.mark.parametrize(
    "n_head, dtype, rtol",
    [(1, torch.float32, 1e-6), (12, torch.float32, 1e-6), (12, torch.bfloat16, 2**-15), (12, torch.float16, 2**-15)],
)
def test_alibi_slopes_are_those_of_bloom_and_exact_at_200_000_tokens(n_head, dtype, rtol):
    j = torch.arange(0, 200_000, 37)
    slopes = build_alibi_tensor(torch.ones(1, 2), n_head, torch.float64)[:, 0, 1:]
    zero = torch.zeros(1, n_head, len(j), 8, dtype=dtype)
    q, k = ALiBi(n_head=n_head, head_dim=8)(zero[:, :, :1], zero, j)
    assert q.shape[-1] == k.shape[-1] == 16  # fused kernels require a multiple of eight
    near((q[0].double() * k[0].double()).sum(-1) / math.sqrt(8), slopes * j, atol=0, rtol=rtol)


@pytest.mark.parametrize(
    "positions, t", [(5, torch.arange(5, 45)), (LEFT_PADDED, LEFT_PADDED)], ids=["offset", "padded"]
)
def test_alibi_and_log_n_count_from_the_positions_they_are_given(positions, t):
    zero, q = torch.zeros(2, 2, 40, 16), two(2, 4, 40, 16)[0]
    on_q, on_k = ALiBi(n_head=4, head_dim=16)(torch.zeros(2, 4, 40, 16), zero, positions)
    bias = on_q.double() @ on_k.double().repeat_interleave(2, dim=1).mT / 4  # (B, n_head, T, T)
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    near(bias[:, :, 0], slopes[:, None] * t.expand(2, 40)[:, None])
    factor = [[max(1.0, math.log(n + 1) / math.log(16)) ** 1.5 for n in row] for row in t.expand(2, 40).tolist()]
    near(log_n(q, positions, 16, 1.5), q * torch.tensor(factor)[:, None, :, None])
