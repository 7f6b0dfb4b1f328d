"""fope.py against float64 formulas that are written out here and share nothing with it but the coefficients drawn."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from fope import ALiBi, FoPE, NoPE, RoPE


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def two(*shape, dtype=torch.float32, n_kv_head=None):
    """q (B, n_head, T, d) and k (B, n_kv_head, T, d)."""
    B, n_head, T, d = shape
    return randn(B, n_head, T, d, seed=1, dtype=dtype), randn(B, n_kv_head or n_head, T, d, seed=2, dtype=dtype)


def rotated(x, positions, theta=10_000.0):
    """RoPE of x (B, heads, T, d) at positions (T,) or (B, T), in complex float64."""
    d = x.shape[-1]
    omega = np.array([theta ** (-2 * m / d) for m in range(d // 2)])
    angle = np.expand_dims(np.asarray(positions, dtype=np.float64)[..., None] * omega, -3)
    x = x.double().numpy()
    z = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * np.exp(1j * angle)
    return torch.tensor(np.concatenate([z.real, z.imag], axis=-1))


def eq13(coef, head_dim, N, n, theta=1e4, fourier_series=True, clip_floor=True, n_freqs=0, zero_phase=True, **_):
    """What Eq. 13 multiplies each pair by, as cosine and sine: (n_kv_head, T, head_dim / 2), float64."""
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
    """x (B, heads, T, d) times the tables (n_kv_head, T, d / 2) of its key heads."""
    cos, sin = (t.repeat_interleave(x.shape[1] // len(t), dim=0) for t in (cos, sin))
    a, b = x.double().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def make(name, n_head=2, head_dim=16, N=64, n_kv_head=None):
    if name == "fope":
        return FoPE(n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, train_len=N, sigma=0.5, seed=3)
    return RoPE(head_dim=head_dim) if name == "rope" else ALiBi(n_head=n_head, head_dim=head_dim)


def near(got, want, atol=5e-6, rtol=1e-6):
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol)


# ----------------------------------------------------------------------------------------------------------------------
# The formulas


@pytest.mark.parametrize("theta", [1e4, 500.0])
def test_rope_is_its_formula_at_8192_positions(theta):
    q, k = two(1, 1, 8192, 16)
    for x, y in zip((q, k), RoPE(head_dim=16, theta=theta)(q, k)):
        near(y, rotated(x, np.arange(8192), theta), atol=2e-6, rtol=0)  # float32 angles would be off by 5e-4


LOUD = dict(coef_init="normal")
CASES = [  # n_head, n_kv_head, head_dim, N, options. Heads, D and M differ, so that a swapped axis shows
    (3, 3, 32, 64, {}),
    (3, 3, 32, 64, dict(fourier_series=False)),
    (3, 3, 32, 64, dict(clip_floor=False)),
    (3, 3, 32, 64, dict(sigma=2.0)),
    (3, 3, 32, 64, dict(sigma=0.4, **LOUD)),
    (3, 3, 32, 64, dict(n_freqs=13, **LOUD)),
    (3, 3, 32, 64, dict(n_freqs=21, clip_floor=False, **LOUD)),
    (3, 3, 32, 64, dict(zero_phase=False, n_freqs=13, **LOUD)),
    (3, 3, 32, 64, dict(fourier_series=False, zero_phase=False)),
    (3, 3, 32, 64, dict(theta=100.0, **LOUD)),
    (8, 2, 32, 64, LOUD),
    (6, 3, 48, 128, dict(n_freqs=20, **LOUD)),
    (6, 1, 32, 64, LOUD),
    (2, 2, 6, 7, dict(n_freqs=3, **LOUD)),  # the shortest N: one pair kept
    (2, 2, 64, 1024, LOUD),  # 18 kept pairs, more than head_dim / 4
]


@pytest.mark.parametrize("n_head, n_kv_head, head_dim, N, options", CASES, ids=str)
def test_fope_is_eq13_within_and_beyond_the_training_length(n_head, n_kv_head, head_dim, N, options):
    T = 3 * N + 5 if N < 1000 else N
    position = FoPE(n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, train_len=N, seed=5, **options)
    cos, sin = eq13(position.coef, head_dim, N, np.arange(T), **options)
    q, k = two(2, n_head, T, head_dim, n_kv_head=n_kv_head)
    for x, y in zip((q, k), position(q, k)):
        near(y, multiplied(x, cos, sin))


@pytest.mark.parametrize("options", [dict(sigma=0.0, clip_floor=False), dict(fourier_series=False, clip_floor=False)])
def test_fope_without_its_parts_is_rope_bit_for_bit(options):
    q, k = two(2, 3, 200, 32)
    position = FoPE(n_head=3, head_dim=32, train_len=64, seed=0, **options)
    for got, want in zip(position(q, k), RoPE(head_dim=32)(q, k)):
        assert torch.equal(got, want)


def test_only_the_series_makes_the_logit_depend_on_absolute_position():
    def spread(position):
        """How much logits of one distance differ, when the same q and k stand at every position."""
        q, k = position(*(x.expand(1, 2, 1024, 64) for x in two(1, 2, 1, 64)))
        logits = q[0].double() @ k[0].double().mT / 8
        return max((x.amax(-1) - x.amin(-1)).max() for x in (logits.diagonal(-n, 1, 2) for n in range(0, 1024, 7)))

    shape = dict(n_head=2, head_dim=64, train_len=512, seed=0)
    assert spread(RoPE(head_dim=64)) < 1e-5 and spread(FoPE(**shape, fourier_series=False)) < 1e-5
    assert spread(FoPE(**shape)) > 0.05 and spread(FoPE(**shape, coef_init="normal")) > 1.0


# ----------------------------------------------------------------------------------------------------------------------
# Coefficients


@pytest.mark.parametrize("n_head, n_kv_head, D", [(8, 8, 16), (8, 8, 48), (8, 2, 16)])
def test_spread_is_that_of_torchs_xavier_with_the_key_heads_as_fan_or_sigma(n_head, n_kv_head, D):
    shape = dict(n_head=n_head, n_kv_head=n_kv_head, head_dim=64, train_len=512, n_freqs=D)
    coef = torch.cat([FoPE(**shape, sigma=0.3, seed=seed).coef for seed in range(32 // n_kv_head)])
    generator = torch.Generator().manual_seed(0)
    theirs = [nn.init.xavier_normal_(torch.empty(n_kv_head, D, 16), 0.3, generator=generator) for _ in range(32)]
    assert coef.shape[1:] == (n_kv_head, D, 16)
    assert coef.std().item() == pytest.approx(0.3 * math.sqrt(2 / (16 * D + 16 * n_kv_head)), rel=0.03)
    assert coef.std().item() == pytest.approx(torch.stack(theirs).std().item(), rel=0.04)
    normal = torch.cat([FoPE(**shape, sigma=0.6, coef_init="normal", seed=seed).coef for seed in range(8)])
    assert normal.std().item() == pytest.approx(0.6, rel=0.02)
    assert max(abs(c.mean() / c.std()) * math.sqrt(c.numel()) for c in (coef, normal)) < 4


def test_draws_differ_by_seed_head_cosine_and_sine_and_by_nothing_else():
    def draw(seed):
        return FoPE(n_head=4, head_dim=64, train_len=512, seed=seed).coef

    parts = torch.cat([draw(seed).flatten(0, 1).flatten(1) for seed in range(4)])  # 32 of 256 numbers
    assert (torch.corrcoef(parts) - torch.eye(32)).abs().max() < 0.35
    want = draw(3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(draw(3), want) and draw(3).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before, torch.get_rng_state())


def test_state_dict_and_ddp_see_the_coefficients_and_no_table():
    for position, names in ((make("fope"), ["coef"]), (make("rope"), []), (make("alibi"), [])):
        position(*two(1, 2, 100, 16))
        assert list(position.state_dict()) == [name for name, _ in position.named_buffers()] == names
        assert not list(position.parameters())


def test_loaded_coefficients_replace_the_tables():
    q, k = two(1, 2, 150, 32)
    shape = dict(n_head=2, head_dim=32, train_len=64, coef_init="normal")
    source, other = (nn.ModuleList([FoPE(**shape, seed=seed)]) for seed in (1, 2))
    assert not torch.allclose(other[0](q, k)[0], source[0](q, k)[0], atol=0.1)
    other.load_state_dict(source.state_dict())
    assert torch.equal(other[0](q, k)[0], source[0](q, k)[0])


# ----------------------------------------------------------------------------------------------------------------------
# Positions, dtypes, devices


POSITIONS = [
    5,
    torch.arange(40) * 3 + 1,
    torch.arange(40).flip(0),
    torch.tensor([[0] * 5 + list(range(35)), range(40)]),
]


@pytest.mark.parametrize("positions", POSITIONS, ids=["offset", "spaced", "reversed", "left-padded"])
def test_positions_are_where_the_tokens_stand(positions):
    q, k = two(2, 4, 40, 16, n_kv_head=2)
    n = np.arange(5, 45) if isinstance(positions, int) else positions.numpy()
    for x, y in zip((q, k), make("rope")(q, k, positions)):
        near(y, rotated(x, n), atol=2e-6)
    position = make("fope", 4, n_kv_head=2)
    got = position(q, k, positions)
    for b, row in enumerate(n if n.ndim == 2 else [n, n]):
        for x, y in zip((q, k), got):
            near(y[b], multiplied(x[b : b + 1], *eq13(position.coef, 16, 64, row))[0])
    q, k = make("alibi", 4)(q * 0, k * 0, positions)
    bias = q.double().unflatten(1, (2, 2)) @ k.double().mT.unsqueeze(2) / 4  # (B, key heads, group, T, T)
    for b, row in enumerate(n if n.ndim == 2 else [n, n]):
        for h in range(4):
            near(bias[b, h // 2, h % 2, 0], 2 ** (-8 * (h + 1) / 4) * torch.tensor(row))


@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_one_token_at_a_time_is_the_whole_at_once(name):
    q, k = two(2, 3, 150, 32)
    position = make(name, 3, 32)
    steps = [position(q[:, :, t : t + 1], k[:, :, t : t + 1], t) for t in range(150)]
    for got, want in zip(zip(*steps), make(name, 3, 32)(q, k)):
        torch.testing.assert_close(torch.cat(got, dim=2), want, atol=1e-6, rtol=0)


CASTS = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "bfloat16 and back": lambda m: m.to(torch.bfloat16).float(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "copied": copy.deepcopy,
    "meta and back": lambda m: m.to("meta").to_empty(device="cpu"),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_casting_or_emptying_the_module_changes_nothing(name, cast):
    q, k = two(1, 2, 200, 16)
    position = nn.Sequential(make(name))
    if name == "fope":  # loaded coefficients, not the ones that the seed would give again
        position.load_state_dict({"0.coef": randn(*position[0].coef.shape)})
    want = position[0](q, k)
    for got, x in zip(CASTS[cast](position)[0](q, k), want):
        assert torch.equal(got, x)


@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_a_module_made_on_the_meta_device_works_after_loading(name):
    q, k = two(1, 2, 200, 16)
    with torch.device("meta"):
        position = make(name)
    position.load_state_dict(make(name).state_dict())
    for got, want in zip(position(q, k), make(name)(q, k)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["rope", "fope"])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 2**-23), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_low_precision_is_rounded_once_at_the_end(name, dtype, rtol):
    q, k = two(1, 2, 8192, 16, dtype=dtype)
    position = make(name, N=512)
    for x, y in zip((q, k), position(q, k)):
        assert y.dtype == dtype
        n = np.arange(8192)
        want = rotated(x, n) if name == "rope" else multiplied(x, *eq13(position.coef, 16, 512, n))
        near(y, want, atol=3e-6, rtol=rtol)


@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_float64_is_computed_in_float64(name):
    position = make(name)
    q, k = (x.requires_grad_() for x in two(1, 2, 9, 16, dtype=torch.float64))
    assert torch.autograd.gradcheck(position, (q, k))
    if name == "rope":
        near(position(q, k)[0], rotated(q.detach(), np.arange(9)), atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", ["rope", "fope"])
def test_tables_made_in_inference_mode_serve_training(name):
    position, (q, k) = make(name), two(1, 2, 200, 16)
    with torch.inference_mode():
        position(q, k)
    q.requires_grad_()
    position(q, k)[0].sum().backward()
    assert q.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("reserved", [0, 64])
@pytest.mark.parametrize("name", ["rope", "fope"])
def test_growing_text_costs_at_most_two_compilations(name, reserved):
    torch._dynamo.reset()
    position, counter = make(name), CompileCounter()
    if reserved:
        position.reserve(reserved)
    compiled = torch.compile(position, backend=counter, fullgraph=True)
    for T in (32, 40, 60, 70, 100, 200, 199, 400, 1000, 2000, 4000, 50):
        q, k = two(1, 2, T, 16)
        near(compiled(q, k)[1], make(name)(q, k)[1])
    assert counter.frame_count <= 1 + 2


@pytest.mark.parametrize("name", ["rope", "fope", "alibi"])
def test_a_decoding_step_compiles_whole(name):
    torch._dynamo.reset()
    position, counter = make(name), CompileCounter()
    compiled = torch.compile(position, backend=counter, fullgraph=True)
    for t in range(90, 110):
        q, k = two(1, 2, 1, 16)
        near(compiled(q, k, t)[1], make(name)(q, k, t)[1])
    assert counter.frame_count <= 2


def test_compiled_code_with_tensor_positions_takes_what_was_reserved():
    torch._dynamo.reset()
    position, (q, k) = make("fope"), two(2, 2, 40, 16)
    compiled = torch.compile(position, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="reserve"):
        compiled(q, k, POSITIONS[3])
    position.reserve(40)
    near(compiled(q, k, POSITIONS[3])[0], position(q, k, POSITIONS[3])[0])


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
        (dict(n_freqs=-1), "n_freqs -1"),
        (dict(n_freqs=24, fourier_series=False), "n_freqs 24"),
        (dict(coef_init="uniform"), "xavier or normal, not 'uniform'"),
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


MISFITS = [
    (2, 32, None, "head_dim 16"),
    (1, 16, None, "n_kv_head 2"),
    (2, 16, -1, "-1 is"),
    (2, 16, torch.arange(-1, 39), "-1 is"),
    (2, 16, torch.tensor(3), "shape"),
]


@pytest.mark.parametrize("heads, head_dim, positions, words", MISFITS, ids=str)
def test_fope_refuses_tensors_that_do_not_fit(heads, head_dim, positions, words):
    with pytest.raises(ValueError, match=words):
        make("fope")(*two(1, heads, 40, head_dim), positions)


# ----------------------------------------------------------------------------------------------------------------------
# ALiBi and NoPE


@pytest.mark.parametrize("n_head", [1, 2, 6, 8, 12, 16])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (torch.bfloat16, 2**-15), (torch.float16, 2**-15)])
def test_alibi_slopes_are_those_of_bloom_and_exact_at_200_000_tokens(n_head, dtype, rtol):
    T = 200_000
    want = build_alibi_tensor(torch.ones(1, 2), n_head, torch.float64)[:, 0, 1:] * torch.arange(T)  # slope * j
    zero = torch.zeros(1, n_head, T, 8, dtype=dtype)
    q, k = ALiBi(n_head=n_head, head_dim=8)(zero[:, :, :1], zero)
    near((q[0].double() * k[0].double()).sum(-1) / math.sqrt(8), want, atol=0, rtol=rtol)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 3e-5), (torch.bfloat16, 2e-2)])
def test_alibi_without_a_mask_is_attention_with_the_bias(dtype, atol):
    (q, k), v = two(2, 6, 300, 64, dtype=dtype, n_kv_head=3), randn(2, 3, 300, 64, dtype=dtype)
    distance = (torch.arange(300)[:, None] - torch.arange(300)).double()
    slopes = build_alibi_tensor(torch.ones(1, 2), 6, torch.float64)[:, 0, 1, None, None]
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT / 8 - slopes * distance
    want = logits.masked_fill(distance < 0, -math.inf).softmax(-1) @ v.double().repeat_interleave(2, 1)
    q, k = ALiBi(n_head=6, head_dim=64)(q, k)
    assert q.shape[-1] == k.shape[-1] == 72
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # refused, attention would build the T x T matrix
        y = F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), is_causal=True, scale=64**-0.5, enable_gqa=True)
    near(y[..., :64], want, atol=atol)


def test_nope_returns_what_it_gets():
    q, k = two(1, 2, 8, 16)
    got = NoPE()(q, k, 3)
    assert got[0] is q and got[1] is k


# ----------------------------------------------------------------------------------------------------------------------
# A model that we did not write


class Stranger(nn.Module):
    """Plain attention with 8 query heads and 2 key heads of 16. The two lines about `position` are all it needs."""

    def __init__(self, name):
        super().__init__()
        self.q, self.o = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
        self.k, self.v = nn.Linear(128, 32, bias=False), nn.Linear(128, 32, bias=False)
        self.position = make(name, 8, n_kv_head=2)  # the first

    def forward(self, x, positions, mask):
        q, k, v = (f(x).unflatten(-1, (-1, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.position(q, k, positions=positions)  # the second
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["rope", "fope"])
def test_a_strangers_model(name):
    """Grouped heads, bfloat16 weights, left padding, made and loaded on the meta device, compiled whole."""
    torch._dynamo.reset()
    pads, T = torch.tensor([5, 0]), 100
    positions = (torch.arange(T) - pads[:, None]).clamp(min=0)
    causal, real = torch.ones(T, T).tril().bool(), torch.arange(T) >= pads[:, None]
    mask = causal & (real[:, None] | torch.eye(T).bool())  # (B, T, T)
    x = randn(2, T, 128, dtype=torch.bfloat16)

    torch.manual_seed(0)
    weights = Stranger(name).to(torch.bfloat16).state_dict()
    with torch.device("meta"):
        model = Stranger(name).to(torch.bfloat16)
    model.load_state_dict(weights, assign=True)
    model.position.reserve(T)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(x, positions, mask[:, None])

    w = {key: value.double() for key, value in weights.items()}
    q, k, v = ((x.double() @ w[f"{n}.weight"].T).unflatten(-1, (-1, 16)).transpose(1, 2) for n in "qkv")
    for b in range(2):
        n = positions[b].numpy()
        if name == "rope":
            q[b], k[b] = rotated(q[b : b + 1], n)[0], rotated(k[b : b + 1], n)[0]
        else:
            tables = eq13(w["position.coef"], 16, 64, n)
            q[b], k[b] = multiplied(q[b : b + 1], *tables)[0], multiplied(k[b : b + 1], *tables)[0]
    logits = q @ k.repeat_interleave(4, 1).mT / 4
    want = logits.masked_fill(~mask[:, None], -math.inf).softmax(-1) @ v.repeat_interleave(4, 1)
    want = want.transpose(1, 2).flatten(2) @ w["o.weight"].T
    near(got, want, atol=0.02 * want.abs().max().item(), rtol=0)
