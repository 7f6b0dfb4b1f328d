"""fope.py against float64 formulas that are written out here and share nothing with it but the coefficients drawn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from fope import ALiBi, FoPE, RoPE, angles, log_n, rope_frequencies


def two(*shape, dtype=torch.float32, n_kv_head=None):
    """q (B, n_head, T, d) and k (B, n_kv_head, T, d)."""
    B, n_head, T, d = shape
    generator = torch.Generator().manual_seed(1)
    shapes = (B, n_head, T, d), (B, n_kv_head or n_head, T, d)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def make(name, n_head=2, head_dim=16, N=64, n_kv_head=None):
    if name == "fope":
        return FoPE(n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, train_len=N, sigma=0.5, seed=3)
    return RoPE(head_dim=head_dim) if name == "rope" else ALiBi(n_head=n_head, head_dim=head_dim)


def near(got, want, atol=5e-6, rtol=1e-6):
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol)


def eq13(coef, head_dim, N, n, theta=1e4, fourier_series=True, clip_floor=True, n_freqs=0, zero_phase=False):
    """What Eq. 13 multiplies each pair by at positions n (T,): cosine and sine, (n_kv_head, T, head_dim / 2) each."""
    omega = [theta ** (-2 * m / head_dim) for m in range(head_dim // 2)]
    floor = 2 * math.pi / N
    kept = [w for w in omega if w >= floor] if clip_floor else omega
    extra = (n_freqs or len(kept)) - len(kept)
    step = (math.log(math.pi) - math.log(floor)) / max(extra, 1)
    series = kept + [math.exp(math.log(floor) + (i + 0.5) * step) for i in range(extra)]
    heads = coef.shape[1] if fourier_series else 1
    cos = np.ones((heads, len(n), head_dim // 2))
    sin = np.zeros_like(cos) if zero_phase else np.ones_like(cos)
    for h in range(heads):
        for m, w in enumerate(kept):
            cos[h, :, m], sin[h, :, m] = np.cos(w * n), np.sin(w * n)
            if fourier_series:
                for i, other in enumerate(series):
                    cos[h, :, m] += float(coef[0, h, i, m]) * np.cos(other * n)
                    sin[h, :, m] += float(coef[1, h, i, m]) * np.sin(other * n)
    return torch.tensor(cos), torch.tensor(sin)


def multiplied(x, cos, sin):
    """x (B, heads, T, d) times the tables (n_kv_head, T, d / 2) of its key heads, in float64."""
    cos, sin = (t.repeat_interleave(x.shape[1] // len(t), dim=0) for t in (cos, sin))
    a, b = x.double().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def formula(position, x, n, N=64):
    """x (B, heads, T, d) at positions n (T,). RoPE is Eq. 13 without a series and without clipping."""
    if isinstance(position, FoPE):
        return multiplied(x, *eq13(position.coef, x.shape[-1], N, n))
    return multiplied(x, *eq13(None, x.shape[-1], N, n, fourier_series=False, clip_floor=False))


# ----------------------------------------------------------------------------------------------------------------------
# The formulas


CASES = [  # n_head, n_kv_head, head_dim, N, options. Heads, D and M differ, so that a swapped axis shows
    (3, 3, 32, 64, {}),
    (3, 3, 32, 64, dict(fourier_series=False)),
    (3, 3, 32, 64, dict(clip_floor=False, n_freqs=21)),
    (3, 3, 32, 64, dict(zero_phase=True)),
    (3, 3, 32, 64, dict(zero_phase=True, fourier_series=False)),
    (3, 3, 32, 64, dict(theta=100.0)),
    (6, 3, 48, 128, dict(n_freqs=20)),
    (2, 2, 6, 7, dict(n_freqs=3)),  # the shortest N: one pair kept
    (2, 2, 64, 1024, {}),  # 18 kept pairs, more than head_dim / 4
]


@pytest.mark.parametrize("n_head, n_kv_head, head_dim, N, options", CASES, ids=str)
def test_fope_is_eq13_within_and_beyond_the_training_length(n_head, n_kv_head, head_dim, N, options):
    n = np.arange(200)
    heads = dict(n_head=n_head, n_kv_head=n_kv_head)
    position = FoPE(**heads, head_dim=head_dim, train_len=N, seed=5, coef_init="normal", **options)
    cos, sin = eq13(position.coef, head_dim, N, n, **options)
    q, k = two(2, n_head, len(n), head_dim, n_kv_head=n_kv_head)
    for x, y in zip((q, k), position(q, k)):
        near(y, multiplied(x, cos, sin))


@pytest.mark.parametrize("options", [dict(sigma=0.0), dict(fourier_series=False)], ids=str)
def test_fope_without_series_and_clipping_is_rope_bit_for_bit(options):
    q, k = two(2, 3, 200, 32)
    position = FoPE(n_head=3, head_dim=32, train_len=64, seed=0, clip_floor=False, **options)
    for got, want in zip(position(q, k), RoPE(head_dim=32)(q, k)):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "dtype, atol, rtol",
    [
        (torch.float64, 1e-11, 0),
        (torch.float32, 3e-6, 2**-23),  # float32 angles would be off by 5e-4
        (torch.bfloat16, 3e-6, 2**-8),
        (torch.float16, 3e-6, 2**-11),
    ],
)
@pytest.mark.parametrize("name", ["rope", "fope"])
def test_8192_positions_are_rounded_once_at_the_end(name, dtype, atol, rtol):
    position, (q, k) = make(name, N=512), two(1, 2, 8192, 16, dtype=dtype)
    for x, y in zip((q, k), position(q, k)):
        assert y.dtype == dtype
        near(y, formula(position, x, np.arange(8192), N=512), atol, rtol)


# ----------------------------------------------------------------------------------------------------------------------
# Coefficients


def draws(seeds, **options):
    """The coefficients of several seeds, (2 seeds, n_kv_head, D, M): cosine and sine of each."""
    return torch.cat([FoPE(head_dim=64, train_len=512, seed=seed, **options).coef for seed in range(seeds)])


@pytest.mark.parametrize("n_head, n_kv_head, D", [(8, 8, 48), (8, 2, 16)])
def test_xavier_has_the_spread_of_torchs_xavier_with_the_key_heads_as_fan(n_head, n_kv_head, D):
    ours = draws(32 // n_kv_head, n_head=n_head, n_kv_head=n_kv_head, n_freqs=D, sigma=0.3)
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


def test_a_change_of_coefficients_or_frequencies_acts_on_the_next_call():
    q, k = two(1, 2, 150, 16)
    other = {"coef": torch.ones(2, 2, 3, 3)}
    for change in (lambda p: p.coef.mul_(2), lambda p: p.omega.mul_(0.5), lambda p: p.load_state_dict(other)):
        position = make("fope")
        before = position(q, k)[0]
        change(position)
        fresh = make("fope")
        fresh.omega, fresh.coef = position.omega.clone(), position.coef.clone()
        assert torch.equal(position(q, k)[0], fresh(q, k)[0]) and not torch.allclose(before, fresh(q, k)[0], atol=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Positions, dtypes, devices


LEFT_PADDED = torch.tensor([[0] * 5 + list(range(35)), range(40)])
BACKWARDS = torch.arange(40).flip(0) * 3
every_kind_of_positions = pytest.mark.parametrize(
    "positions, n",  # what the module is given, and where the tokens stand
    [(5, torch.arange(5, 45)), (BACKWARDS, BACKWARDS), (LEFT_PADDED, LEFT_PADDED)],
    ids=["offset", "backwards", "left-padded"],
)


@every_kind_of_positions
@pytest.mark.parametrize("name", ["rope", "fope"])
def test_positions_are_where_the_tokens_stand(name, positions, n):
    position, (q, k) = make(name, 4, n_kv_head=2), two(2, 4, 40, 16, n_kv_head=2)
    for x, y in zip((q, k), position(q, k, positions)):
        for b, row in enumerate(n.expand(2, 40).numpy()):
            near(y[b], formula(position, x[b : b + 1], row)[0])


def test_one_token_at_a_time_is_the_whole_at_once():
    q, k = two(2, 3, 150, 32)
    position = make("fope", 3, 32)
    steps = [position(q[:, :, t : t + 1], k[:, :, t : t + 1], t) for t in range(150)]
    for got, want in zip(zip(*steps), make("fope", 3, 32)(q, k)):
        near(torch.cat(got, dim=2), want)


CASTS = {
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "to_empty": lambda module: module.to_empty(device="cpu"),
    "meta and back": lambda module: module.to("meta").to_empty(device="cpu"),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_casting_or_emptying_the_module_changes_nothing(name, cast):
    (q, k), position, untouched = two(1, 2, 200, 16), make(name), make(name)
    if name == "fope":  # as if loaded: not the coefficients that the seed would give again
        position.coef.mul_(2)
        untouched.coef.mul_(2)
    for got, want in zip(cast(nn.Sequential(position))[0](q, k), untouched(q, k)):
        assert torch.equal(got, want)


def test_what_a_subclass_adds_is_cast_as_usual_and_meta_tensors_pass():
    class Mine(FoPE):
        def __init__(self):
            super().__init__(n_head=2, head_dim=16, train_len=64, seed=0)
            self.gain = nn.Parameter(torch.ones(2))

    position = Mine().to(torch.bfloat16)
    assert position.gain.dtype == torch.bfloat16 and position.coef.dtype == torch.float32
    assert make("fope").to("meta")(*(x.to("meta") for x in two(1, 2, 20, 16)))[0].shape == (1, 2, 20, 16)


@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_a_module_made_on_the_meta_device_works_after_loading(name):
    q, k = two(1, 2, 200, 16)
    with torch.device("meta"):
        position = make(name)
    position.load_state_dict(make(name).state_dict())
    for got, want in zip(position(q, k), make(name)(q, k)):
        assert torch.equal(got, want)


class Seen(TorchDispatchMode):
    """The names of all operations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = {*getattr(self, "names", ()), func.name()}
        return func(*args, **(kwargs or {}))


@every_kind_of_positions
@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_no_call_waits_for_a_value_or_copies_one_to_the_device(name, positions, n):
    position, (q, k) = make(name, 4, n_kv_head=2), two(2, 4, 40, 16, n_kv_head=2)
    with Seen() as seen:
        log_n(position(q, k, positions)[0], positions, 16, 2.0)
    assert not seen.names & {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero"} and len(seen.names) > 5


@pytest.mark.parametrize("n", [8_191, 1_000_000, 2**23 - 1])
def test_angles_are_exact_modulo_whole_cycles_at_any_position(n):
    """The frequencies are rounded to 2^-41 of a cycle per token, which far positions multiply."""
    omega = rope_frequencies(64)
    got = angles(omega, torch.tensor([n]), torch.float32)[0].double()
    want = torch.tensor([math.remainder(w * n - x, 2 * math.pi) for w, x in zip(omega.tolist(), got.tolist())])
    assert want.abs().max() < 5e-7 + n * math.pi / 2**40


def test_autocast_leaves_cos_and_sin_alone():
    position = make("fope", N=512)
    with torch.autocast("cpu", torch.bfloat16):
        cast = position.cos_sin(torch.arange(2000))
    for got, want in zip(cast, position.cos_sin(torch.arange(2000))):
        near(got, want, atol=1e-6)


@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_gradients_are_those_of_float64(name):
    position, (q, k) = make(name), two(1, 2, 9, 16, dtype=torch.float64)
    assert torch.autograd.gradcheck(position, (q.requires_grad_(), k.requires_grad_()))


@pytest.mark.parametrize("positions", [3, LEFT_PADDED], ids=["offset", "left-padded"])
def test_log_n_is_its_formula(positions):
    q, _ = two(2, 3, 40, 16)
    rows = LEFT_PADDED if isinstance(positions, torch.Tensor) else torch.arange(3, 43).expand(2, 40)
    factor = [[max(1.0, math.log(t + 1) / math.log(16)) ** 1.5 for t in row] for row in rows.tolist()]
    near(log_n(q, positions, 16, 1.5), q * torch.tensor(factor)[:, None, :, None])


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile


def compiled_whole(position):
    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(position, backend=counter, fullgraph=True), counter


def test_growing_text_costs_at_most_two_more_compilations():
    compiled, counter = compiled_whole(make("fope"))
    for T in (32, 40, 60, 70, 100, 200, 199, 400, 1000, 50):
        q, k = two(1, 2, T, 16)
        near(compiled(q, k)[1], make("fope")(q, k)[1])
    assert counter.frame_count <= 1 + 2


@pytest.mark.parametrize("name", ["fope", "alibi"])
def test_decoding_compiles_at_most_twice(name):
    compiled, counter = compiled_whole(make(name))
    for t in range(90, 100):
        q, k = two(1, 2, 1, 16)
        near(compiled(q, k, t)[1], make(name)(q, k, t)[1])
    assert counter.frame_count <= 2


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


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(head_dim=7), "7 must be an even"),
        (dict(theta=0.0), "theta 0"),
        (dict(theta=math.nan), "theta nan"),
        (dict(train_len=0), "train_len 0"),
        (dict(train_len=6), "train_len 6 is too short"),
        (dict(n_kv_head=2, n_head=3), "2 must divide n_head 3"),
        (dict(n_freqs=15), "n_freqs 15.*16"),
        (dict(n_freqs=24, fourier_series=False), "n_freqs 24"),
        (dict(coef_init="uniform"), "'uniform' must be xavier or normal"),
        (dict(sigma=-1.0), "sigma.*-1"),
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
        ("fope", 1, 16, None, "n_kv_head 2"),
        ("fope", 2, 16, torch.tensor(3), "shape"),
        ("rope", 2, 16, torch.arange(40) / 4, "of integers"),  # position interpolation divides the frequencies instead
        ("alibi", 1, 16, None, "n_head 2"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_refused(name, heads, head_dim, positions, words):
    with pytest.raises(ValueError, match=words):
        make(name)(*two(1, heads, 40, head_dim), positions)


# ----------------------------------------------------------------------------------------------------------------------
# ALiBi


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


@every_kind_of_positions
def test_alibi_counts_from_the_positions_it_is_given(positions, n):
    q, k = torch.zeros(2, 4, 40, 16), torch.zeros(2, 2, 40, 16)
    q, k = ALiBi(n_head=4, head_dim=16)(q, k, positions)
    bias = q.double() @ k.double().repeat_interleave(2, dim=1).mT / 4  # (B, n_head, T, T)
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    near(bias[:, :, 0], slopes[:, None] * n.expand(2, 40)[:, None])
