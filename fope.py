"""Fourier Position Embedding (FoPE), and the embeddings it builds on or competes with: RoPE, ALiBi, NoPE.

Read this file from top to bottom: each equation comes before the code that computes it.
To use it in your own model, copy the file and apply one module per layer to the queries and keys:

    position = FoPE(n_head=32, n_kv_head=8, head_dim=128, train_len=4096, sigma=0.3, seed=layer)  # layer: 0, 1, ..
    q, k = position(q, k)                       # q (B, n_head, T, head_dim), k (B, n_kv_head, T, head_dim)
    q, k = position(q, k, positions=past)       # the T tokens after `past` cached ones; put the returned k in the cache
    q, k = position(q, k, positions=positions)  # any positions: integer tensor (T,) or (B, T)

With left padding, positions is (mask.cumsum(-1) - 1).clamp(min=0)[:, -T:], where mask is 1 for real tokens. Train the
model with the module in place, or fine-tune it: a model trained with RoPE relies on the factors that FoPE replaces.

Notation: B sequences of T tokens, head_dim d, N the training length in tokens, t a position. For a pair of tokens, s is
the position of the query and t that of the key, and n = s - t is their distance. "Eq. 13" is that of the FoPE paper
(Hua et al., ICML 2025, arXiv 2412.17739). "The release" is the paper's code (github.com/TsinghuaC3I).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# ----------------------------------------------------------------------------------------------------------------------
# RoPE (Su et al., arXiv 2104.09864)
#
# Attention compares a query with a key through their dot product, the logit. The dot product alone does not depend on
# how far apart the two tokens are. RoPE groups the d dimensions into pairs. Pair m gets a frequency, from 1 down to
# about 1/theta, where the base theta is usually 10,000:
#
#     w_m = theta^(-2m/d),   m = 0 .. d/2-1                                                                     (1)


def rope_frequencies(head_dim: int, theta: float = 10_000.0) -> torch.Tensor:
    """Equation (1): the d/2 frequencies in radians per token, highest first. float64 on the CPU."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim {head_dim} must be an even number: RoPE rotates pairs of dimensions")
    if not 0 < theta < math.inf:
        raise ValueError(f"theta {theta} must be a positive number")
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)


# At position t, RoPE rotates pair m by the angle w_m t. Treat the pair (a, b) as the complex number z = a + ib:
#
#     z  ->  z exp(i w_m t),   that is,   (a, b)  ->  (a cos w_m t - b sin w_m t,  b cos w_m t + a sin w_m t)       (2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Equation (2) for x (..., T, d), with cos and sin (..., T, P). Computes in cos.dtype and returns x.dtype.

    Pair m consists of dimensions m and m + d/2, as in Hugging Face's Llama and in the release. Pairs from P on are
    returned unchanged. Meta's Llama and rotary-embedding-torch pair dimensions 2m and 2m + 1 instead. To use weights of
    such a model, reorder the rows of W_q (H = n_head) and W_k (H = n_kv_head):
    W.view(H, d // 2, 2, -1).transpose(1, 2).reshape(W.shape).
    """
    P = cos.shape[-1]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)  # (..., T, d/2) each
    a, b = first[..., :P], second[..., :P]
    return torch.cat([a * cos - b * sin, first[..., P:], b * cos + a * sin, second[..., P:]], dim=-1).to(x.dtype)


def angles(omega: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The angles w t of frequencies omega (P,) at positions (..., T): shape (..., T, P), in float32 or float64.

    A product w t in float32 would be off by up to 5e-4 radians at position 8191, and float64, which only float64 inputs
    get, is slow or missing on accelerators. So a cycle is divided into 2^40 steps. The product of whole steps per token
    and positions, modulo 2^40, is exact. The result is within 5e-7 radians, and at position 1,000,000 within 4e-6.
    """
    if dtype == torch.float64:
        return positions[..., None].double() * omega.to(positions.device)
    cycle = 2**40
    steps = (omega * (cycle / (2 * math.pi))).round().long().to(positions.device)
    phase = (positions[..., None].long() * steps) & (cycle - 1)
    return phase.float() * (2 * math.pi / cycle)


def token_positions(x: torch.Tensor, positions) -> torch.Tensor:
    """The positions of the T tokens of x (B, heads, T, d), from an offset (None is 0) or a tensor (T,) or (B, T)."""
    if not isinstance(positions, torch.Tensor):
        return torch.arange(positions or 0, (positions or 0) + x.shape[-2], device=x.device)
    if positions.shape[-1:] != x.shape[-2:-1] or positions.is_floating_point():
        shape = tuple(positions.shape)
        raise ValueError(f"positions has shape {shape} and {positions.dtype}: it must be (T,) or (B, T), of integers")
    return positions


class PositionEmbedding(nn.Module):
    """What RoPE, FoPE and ALiBi share: .to(device) moves the tensors named in `exact`; .half() does not round them."""

    exact = ()

    def _apply(self, fn, recurse=True):
        device, kept = fn(torch.empty(0, device="cpu")).device, [(name, getattr(self, name)) for name in self.exact]
        super()._apply(fn, recurse)
        for name, x in kept:
            no_float64 = x is not None and x.dtype == torch.float64 and device.type == "mps"
            setattr(self, name, x if x is None or device.type == "meta" or no_float64 else x.to(device))
        return self


# Before rotation, let the complex numbers q_m and k_m be pair m of the query and of the key. Rotating the query at
# position s and the key at position t multiplies q_m conj(k_m) by exp(i w_m s) conj(exp(i w_m t)) = exp(i w_m (s - t)).
# So only the distance n = s - t remains. The logit is a sum of sinusoids, an inverse Fourier transform whose
# frequencies are unevenly spaced:
#
#     h(n) = Re sum_m H_m exp(i w_m n),   H_m = q_m conj(k_m)                                                       (3)


class RoPE(PositionEmbedding):
    """Rotates every pair of q and k by equation (2). omega (d/2,) replaces the frequencies of (1)."""

    exact = ("omega",)

    def __init__(self, *, head_dim: int, theta: float = 10_000.0, omega: torch.Tensor | None = None):
        super().__init__()
        self.head_dim, self.n_kv_head = head_dim, None  # None: any number of heads
        self.omega = rope_frequencies(head_dim, theta) if omega is None else omega.double().cpu()
        if self.omega.shape != (head_dim // 2,):
            raise ValueError(f"omega has {len(self.omega)} values: head_dim {head_dim} needs {head_dim // 2}")

    def cos_sin(self, positions: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
        """cos and sin of (2) at positions (T,) or (B, T): one tensor of shape (2, 1, T, d/2) or (2, B, 1, T, d/2)."""
        angle = angles(self.omega, positions, dtype).unsqueeze(-3)
        # One tensor, because torch.compile would recompute two separate ones for every head and sequence.
        return torch.stack([angle.cos(), angle.sin()])

    def forward(self, q, k, positions=None):
        """Returns q (B, n_head, T, d) and k (B, n_kv_head, T, d), rotated. positions: see the top of this file."""
        d, heads = self.head_dim, self.n_kv_head or k.shape[1]
        if (q.shape[-1], k.shape[-1], k.shape[1]) != (d, d, heads):
            raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit head_dim {d} and n_kv_head {heads}")
        cos, sin = self.cos_sin(token_positions(q, positions), torch.promote_types(q.dtype, torch.float32))
        q = q.unflatten(1, (heads, -1))  # (B, n_kv_head, group, T, d): query heads grouped by key head
        return rotate(q, cos.unsqueeze(-3), sin.unsqueeze(-3)).flatten(1, 2), rotate(k, cos, sin)


# ----------------------------------------------------------------------------------------------------------------------
# FoPE (Hua et al., arXiv 2412.17739)
#
# Each sinusoid in (3) repeats forever, so one might expect RoPE to extrapolate to any length. Still, RoPE models break
# soon after the training length N. The paper blames two problems:
#
#   1. Truncation: training shows only a part of a cycle of the lowest frequencies. A pair completes a cycle within N
#      tokens only if its frequency is at least the floor
#
#         w_floor = 2 pi / N                                                                                        (4)
#
#      With N = 512 and d = 64, half of the pairs lie below the floor. Pair 8 (w = 0.1) completes 8 cycles in training.
#      Pair 24 (w = 0.001) rotates by only half a radian. Beyond N it reaches angles that the model has never seen.
#   2. Spectral leakage and distortion: RoPE assumes that, apart from its own rotation, pair m does not vary
#      periodically with position. This fails from the second layer on. Values are not rotated, but as s grows, the
#      attention weight of a token at t rises and falls with h(s - t). So the average of the values varies with
#      position, at the frequencies in h. The matrices that follow mix dimensions of different frequencies (leakage),
#      and the activation functions create sums and differences of these frequencies (distortion).
#
# FoPE multiplies each pair of q and k by f(w_m, t) instead of exp(i w_m t). Clipping addresses the first problem, and a
# Fourier series the second. Let M be the number of kept pairs, those with w_m at or above the floor:
#
#     f(w_m, t) = 1                                   if w_m < w_floor: the pair is clipped to frequency zero
#     f(w_m, t) = cos w_m t + sum_w a_w cos w t                                                                (Eq. 13)
#            + i (sin w_m t + sum_w b_w sin w t)      otherwise: the pair is kept, and gets a series
#
# The paper's text has this form. Its pseudo-code and the release give clipped pairs the factor 1 + i instead, with
# cos = sin = 1: a rotation by 45 degrees and a factor of sqrt(2). In the logit, the two rotations cancel and the two
# factors multiply. So clipped pairs, which compare content regardless of distance, count twice. This form is
# the default here, and zero_phase=True is Eq. 13. Our small models show no clear difference.
#
# The sums run over D frequencies w: the M kept ones, w_m included, and, if D > M, others between the floor and pi. Each
# kept pair of each key head and layer has its own a_w and b_w, drawn once from a normal distribution and never trained.
#
# Why this helps: a clipped pair contributes the same at every distance. A kept pair has completed the circle
# within N tokens. So without the series, no single pair meets an unseen angle beyond N. (Clipping alone is known as
# p-RoPE, whose share p of kept pairs is chosen by hand: Barbero et al., arXiv 2410.06205.) With the series, every kept
# pair holds all D frequencies from the first layer on. So the model learns to work with mixed frequencies, and those
# that lower layers introduce should disturb it less. Random coefficients suffice, because W_q and W_k adapt to them.


class FoPE(RoPE):
    """Multiplies q and k by the factor of Eq. 13: RoPE's code with a cos and sin that also scale the pair.

    The logit is not exactly a function of the distance s - t. The series adds terms that depend on s + t, or on s and t
    at two different frequencies. For small sigma they are proportional to sigma. The paper does not mention this.
    omega (D,) holds the series' frequencies. coef (2, n_kv_head, D, M) holds a_w and b_w and is saved with the weights.
    """

    exact = ("omega", "coef")

    def __init__(
        self,
        *,
        n_head: int,  # query heads
        head_dim: int,  # d
        train_len: int,  # N in (4). Keep it the same at test time, even for longer text
        seed: int,  # seed of the coefficients. Use a different one in each layer
        n_kv_head: int | None = None,  # key heads, by default n_head. Queries use their key head's coefficients
        theta: float = 10_000.0,  # base in (1)
        omega: torch.Tensor | None = None,  # (d/2,) replaces the frequencies of (1), in descending order
        sigma: float = 0.3,  # scale of the coefficients: see std below
        fourier_series: bool = True,  # False: kept pairs get no series
        clip_floor: bool = True,  # False: pairs below the floor are kept. If both are False, FoPE is RoPE
        n_freqs: int = 0,  # D, the number of frequencies in the series. 0: M, the kept ones
        coef_init: str = "xavier",  # or "normal"
        zero_phase: bool = False,  # clipped pairs: False is the release (cos = sin = 1), True is Eq. 13 (sin = 0)
    ):
        super().__init__(head_dim=head_dim, theta=theta, omega=omega)
        n_kv = n_kv_head or n_head
        if train_len < 1 or n_head % n_kv:
            raise ValueError(f"train_len {train_len} must be positive; n_kv_head {n_kv} must divide n_head {n_head}")
        if (self.omega.diff() > 0).any():
            raise ValueError("omega must be in descending order: the kept pairs are the first ones")
        floor = 2 * math.pi / train_len  # (4)
        kept = self.omega[self.omega >= floor] if clip_floor else self.omega
        M, D = len(kept), n_freqs or len(kept)
        if M == 0:
            raise ValueError(f"train_len {train_len} is too short: the floor 2 pi / {train_len} clips every frequency")
        if D < M or (n_freqs and not fourier_series):
            raise ValueError(f"n_freqs {n_freqs} must be 0, or at least the {M} kept ones and used with a series")
        if coef_init not in ("xavier", "normal") or not 0 <= sigma < math.inf:
            raise ValueError(f"coef_init {coef_init!r} must be xavier or normal, and sigma {sigma} must be 0 or more")

        # If D > M, the series gets D - M additional frequencies, evenly spaced in log w between the floor and pi.
        share = (torch.arange(D - M, dtype=torch.float64, device="cpu") + 0.5) / max(D - M, 1)
        self.omega = torch.cat([kept, floor * (math.pi / floor) ** share])  # (D,)

        # "normal" follows the paper's text: sigma is the standard deviation. "xavier" follows the release:
        # xavier_normal_(gain=sigma) on a tensor (n_kv, D, M), whose fan_in is D M and fan_out n_kv M. With n_kv = 8 and
        # D = M = 16, the standard deviation is sigma / 14.
        std = sigma if coef_init == "normal" else sigma * math.sqrt(2 / (D * M + n_kv * M))
        generator = torch.Generator().manual_seed(seed)  # of its own, so that the other weights start as with RoPE
        coef = torch.randn(2, n_kv, D, M, generator=generator, dtype=torch.float32, device="cpu") * std
        self.register_buffer("coef", coef if fourier_series else None)  # a_w = coef[0], b_w = coef[1]
        self.n_kv_head = n_kv if fourier_series else None  # None: any number of heads

        self.n_ones = 0 if zero_phase else head_dim // 2 - M  # the clipped pairs that get cos = sin = 1

    def cos_sin(self, positions, dtype=torch.float32):
        """Real and imaginary parts of Eq. 13, (2, n_kv_head, T, M) or (2, B, n_kv_head, T, M); positions as in RoPE.

        Without a series, n_kv_head is 1. Unless zero_phase, ones for the clipped pairs follow: the last size is d/2.
        """
        both = super().cos_sin(positions, dtype)  # (2, 1, T, D) or (2, B, 1, T, D): one column per frequency
        if self.coef is not None:
            coef = self.coef.to(both.device, dtype)  # (2, n_kv_head, D, M)
            coef = coef if positions.dim() == 1 else coef.unsqueeze(1)
            device = "cpu" if both.is_meta else both.device.type
            with torch.autocast(device, enabled=False):  # bfloat16 sums would be off by up to 1e-2
                both = both[..., : coef.shape[-1]] + both @ coef
        return F.pad(both, (0, self.n_ones), value=1.0) if self.n_ones else both


# ----------------------------------------------------------------------------------------------------------------------
# ALiBi (Press et al., arXiv 2108.12409) does not rotate. It lowers each logit in proportion to the distance:
#
#     logit - slope_h (s - t),   slope_h = 2^(-8h/n_head) in head h = 1 .. n_head, if n_head is a power of two


class ALiBi(PositionEmbedding):
    """Appends eight channels to q and k whose dot product is slope * t, so that attention needs no T x T mask.

    The term slope * s is the same for all keys, and softmax ignores it. bfloat16 represents every integer exactly only
    up to 256. So three channels of k hold the digits of t in base 128, which is exact below 2^21. slope is split into a
    rounded value and its remainder, which gives it 16 bits in bfloat16. Six channels pair each of the two with each of
    the three digits. Two channels of zeros follow, because fused kernels require a multiple of eight.

    Call attention with scale=head_dim ** -0.5, pad v by eight channels too, and drop them from the result.
    """

    exact = ("slopes",)

    def __init__(self, *, n_head: int, head_dim: int):
        super().__init__()
        p = 2 ** int(math.log2(n_head))  # if n_head > p, every second slope of 2p heads is added, as the authors do
        slopes = [2 ** (-8 * h / p) for h in range(1, p + 1)] + [2 ** (-4 * h / p) for h in range(1, 2 * p, 2)]
        slopes = torch.tensor(slopes[:n_head], dtype=torch.float32, device="cpu")
        self.slopes = slopes * head_dim**0.5  # attention multiplies by head_dim ** -0.5

    def forward(self, q, k, positions=None):
        """Returns q (B, n_head, T, d + 8) and k (B, n_kv_head, T, d + 8). positions as in RoPE.forward."""
        if q.shape[1] != len(self.slopes):
            raise ValueError(f"q has {q.shape[1]} heads: this module was made for n_head {len(self.slopes)}")
        t = token_positions(k, positions)
        digits = (t // 16_384 * 128, t // 128 % 128 * 128, t % 128)  # t = 128 digits[0] + digits[1] + digits[2]
        zero = torch.zeros_like(t)
        on_k = torch.stack([*digits, *digits, zero, zero], dim=-1).to(k.dtype).unsqueeze(-3)  # (1, T, 8), (B, 1, T, 8)

        slope = self.slopes.to(q.device)
        high = slope.to(q.dtype)
        low = (slope - high).to(q.dtype)
        zero = torch.zeros_like(high)
        on_q = torch.stack([128 * high, high, high, 128 * low, low, low, zero, zero], dim=-1)[:, None]  # (n_head, 1, 8)
        both = ((q, on_q), (k, on_k))
        return tuple(torch.cat([x, channels.expand(*x.shape[:-1], 8)], dim=-1) for x, channels in both)


class NoPE(nn.Module):
    """No position embedding. A causal model can still infer positions (Kazemnejad et al., arXiv 2305.19466)."""

    def forward(self, q, k, positions=None):
        return q, k


# ----------------------------------------------------------------------------------------------------------------------
# Log-n scaling is not a position embedding. Longer text gives softmax more keys to spread over, so a query that sees
# more than N keys is multiplied by
#
#     (log(keys) / log N)^p,   keys = its position + 1
#
# The paper does not use it. It needs no training. p = 1 is Chiang & Cholak's (arXiv 2202.12172); for the models that
# we trained, README.md uses p = 2.


def log_n(q: torch.Tensor, positions, train_len: int, p: float) -> torch.Tensor:
    """Returns q (B, n_head, T, d), scaled, for the position embedding. positions as in RoPE.forward."""
    keys = (token_positions(q, positions) + 1).float()[..., None, :, None]  # (1, T, 1) or (B, 1, T, 1)
    return (q * (keys.log() / math.log(max(train_len, 2))).clamp(min=1) ** p).to(q.dtype)
