"""Fourier Position Embedding (FoPE), and the embeddings it builds on or competes with: RoPE, ALiBi, NoPE.

Read this file from top to bottom: each equation comes before the code that computes it.
To use it in your own model, copy the file and apply one module per layer to the queries and keys:

    position = FoPE(n_head=32, n_kv_head=8, head_dim=128, train_len=4096, sigma=0.3, seed=layer)
    q, k = position(q, k)                       # q (B, n_head, T, head_dim), k (B, n_kv_head, T, head_dim)
    q, k = position(q, k, positions=past)       # the T tokens that follow a cache of `past` tokens; then cache k
    q, k = position(q, k, positions=positions)  # any positions: integer tensor (T,) or (B, T)

With left padding, positions is (mask.cumsum(-1) - 1).clamp(min=0), where mask (B, T) is 1 for real tokens.

Notation: d is head_dim, N the training length in tokens, s and t the positions of a query and a key, n = s - t their
distance. "Eq. 13" is that of the FoPE paper (Hua et al., ICML 2025, arXiv 2412.17739). "The release" is its code.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# ----------------------------------------------------------------------------------------------------------------------
# RoPE (Su et al., arXiv 2104.09864)
#
# Attention compares a query with a key through their dot product, the logit. By itself, it does not depend on how far
# apart the two tokens are. RoPE groups the d dimensions into pairs. Pair m gets a frequency, from 1 to about 1/theta:
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
    """Equation (2) for x (..., T, d), with cos and sin (..., T, M). Computes in the dtype of cos, returns that of x.

    Pair m consists of dimensions m and m + d/2, as in Hugging Face's Llama and in the release. Pairs from M on are
    returned unchanged. Meta's Llama and rotary-embedding-torch pair dimensions 2m and 2m + 1 instead. To move such
    weights here, reorder the rows of W_q and W_k: w.view(heads, d // 2, 2, -1).transpose(1, 2).reshape(w.shape).
    """
    M = cos.shape[-1]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)  # (..., T, d/2) each
    a, b = first[..., :M], second[..., :M]
    return torch.cat([a * cos - b * sin, first[..., M:], b * cos + a * sin, second[..., M:]], dim=-1).to(x.dtype)


def angles(omega: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The angles w t for omega (M,) and positions (..., T), up to whole cycles: (..., T, M) in float32 or float64.

    A float32 product w t is off by up to 5e-4 radians at position 8191, and accelerators lack fast float64. So 2^40
    steps make a cycle, as in a synthesizer: an integer product modulo 2^40 is exact at any position.
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
        return torch.arange(x.shape[-2], device=x.device) + (positions or 0)
    if positions.shape[-1:] != x.shape[-2:-1]:
        raise ValueError(f"positions has shape {tuple(positions.shape)}: it must be (T,) or (B, T)")
    return positions


class PositionEmbedding(nn.Module):
    """What RoPE, FoPE and ALiBi share: .to(device) moves the tensors named in `exact`, and no cast rounds them."""

    exact = ()

    def _apply(self, fn, recurse=True):
        device = fn(torch.empty(0, device="cpu")).device
        for name, x in ((name, getattr(self, name)) for name in self.exact):
            if x is not None and device.type != "meta" and (device.type, x.dtype) != ("mps", torch.float64):
                setattr(self, name, x.to(device))  # mps has no float64
        return self


# Write q_m and k_m for pair m of the query and of the key, as complex numbers. Rotating the query at position s and the
# key at position t multiplies q_m conj(k_m) by exp(i w_m s) conj(exp(i w_m t)) = exp(i w_m (s - t)). So only the
# distance n = s - t remains. The logit is a sum of sinusoids, an inverse Fourier transform with uneven frequencies:
#
#     h(n) = Re sum_m H_m exp(i w_m n),   H_m = q_m conj(k_m)                                                       (3)


class RoPE(PositionEmbedding):
    """Rotates every pair of q and k by equation (2). omega (d/2,) replaces the frequencies of (1)."""

    exact = ("omega",)

    def __init__(self, *, head_dim: int, theta: float = 10_000.0, omega: torch.Tensor | None = None):
        super().__init__()
        self.head_dim, self.n_kv_head = head_dim, None  # None: any number of heads
        self.omega = rope_frequencies(head_dim, theta) if omega is None else omega.double().cpu()  # not a buffer: exact
        if self.omega.shape != (head_dim // 2,):
            raise ValueError(f"omega has {len(self.omega)} values: head_dim {head_dim} needs {head_dim // 2}")

    def cos_sin(self, positions: torch.Tensor, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """The cos and sin of (2) at positions (T,) or (B, T), shape (1, T, M) or (B, 1, T, M) each."""
        angle = angles(self.omega, positions, dtype).unsqueeze(-3)
        # One tensor for both: otherwise, the compiler computes cos and sin again for every head and sequence.
        return torch.stack([angle.cos(), angle.sin()]).unbind()

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
# soon after the training length N, because of two problems:
#
#   1. Truncation: training shows only a part of a cycle of the lowest frequencies. A pair completes a cycle within N
#      tokens only if its frequency is at least the floor
#
#         w_floor = 2 pi / N                                                                                        (4)
#
#      With N = 512 and d = 64, half of the pairs lie below the floor. Pair 8 (w = 0.1) completes 8 cycles in training.
#      Pair 24 (w = 0.001) rotates by only half a radian. Beyond N it reaches angles that the model has never seen.
#   2. Spectral leakage and distortion: RoPE treats pair m of every layer as if it held the single frequency w_m, and
#      from the second layer on it does not. Values are not rotated, but attention averages them with weights that
#      depend on h(n). So what a layer passes on varies with position, at all the frequencies in h(n). The matrices of
#      the next layer mix them (leakage), and its activation functions create their sums and differences (distortion).
#
# FoPE multiplies each pair of q and k by f(w_m, t) instead of exp(i w_m t). Clipping addresses the first problem. A
# Fourier series addresses the second. Let M be the number of kept pairs, those with w_m at or above the floor:
#
#     f(w_m, t) = 1                                   if w_m < w_floor: the pair is clipped to frequency zero
#     f(w_m, t) = cos w_m t + sum_w a_w cos w t                                                                (Eq. 13)
#            + i (sin w_m t + sum_w b_w sin w t)      otherwise: the pair is kept, and gets a series
#
# The sums run over D >= M frequencies w: the M kept ones and, if D > M, others between the floor and pi. Each kept pair
# of each key head has its own a_w and b_w, drawn once from a normal distribution and never trained.
#
# Why this helps: a clipped pair contributes the same at every distance. A kept pair has gone through all its angles
# within N tokens. So without the series, no single pair meets an unseen angle beyond N. (Clipping alone is known as
# p-RoPE, whose share p of kept pairs is chosen by hand: Barbero et al., arXiv 2410.06205.) With the series, every kept
# pair carries all D frequencies from the first layer on, so training never shows a pair that holds one frequency alone.


class FoPE(RoPE):
    """Multiplies q and k by the factor of Eq. 13: a rotation like RoPE's, with other cos and sin.

    The logit is not exactly a function of the distance s - t: the series adds products such as cos w s cos v t with
    w != v, which grow in proportion to a small sigma. The paper does not mention this.
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
        zero_phase: bool = True,  # False: clipped pairs get cos 1, sin 1, as in the release
    ):
        super().__init__(head_dim=head_dim, theta=theta, omega=omega)
        n_kv = n_kv_head or n_head
        if train_len < 1 or n_head % n_kv:
            raise ValueError(f"train_len {train_len} must be positive, n_kv_head {n_kv} must divide n_head {n_head}")
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

        # "normal" follows the paper's text: N(0, sigma). "xavier" follows the release: xavier_normal_(gain=sigma) on a
        # tensor (n_kv, D, M), whose fans are D M and n_kv M. With n_kv = 8 and D = M = 16, the result is sigma / 14.
        std = sigma if coef_init == "normal" else sigma * math.sqrt(2 / (D * M + n_kv * M))
        generator = torch.Generator().manual_seed(seed)  # of its own: all other weights start as they do with RoPE
        coef = torch.randn(2, n_kv, D, M, generator=generator, dtype=torch.float32, device="cpu") * std
        self.register_buffer("coef", coef if fourier_series else None)  # a_w = coef[0], b_w = coef[1]
        self.n_kv_head = n_kv if fourier_series else None  # None: any number of heads

        # Eq. 13 leaves clipped pairs alone: cos 1, sin 0. The release has cos 1, sin 1, a rotation by 45 degrees and a
        # factor of sqrt(2): clipped pairs, which compare content regardless of distance, count twice in the logit.
        self.n_ones = 0 if zero_phase else head_dim // 2 - M

    def cos_sin(self, positions, dtype=torch.float32):
        """Real and imaginary parts of Eq. 13 at positions (T,) or (B, T): (n_kv_head, T, M) or (B, n_kv_head, T, M).

        Without a series, n_kv_head is 1. With zero_phase=False, the clipped pairs follow the M kept ones.
        """
        cos, sin = super().cos_sin(positions, dtype)  # (1, T, D) or (B, 1, T, D): one column per frequency
        if self.coef is not None:
            a, b = self.coef.to(cos.device, dtype)  # (n_kv_head, D, M) each
            M = a.shape[-1]
            with torch.autocast(cos.device.type, enabled=False):  # bfloat16 sums would be off by up to 1e-2
                cos, sin = cos[..., :M] + cos @ a, sin[..., :M] + sin @ b
        if self.n_ones:
            cos, sin = F.pad(cos, (0, self.n_ones), value=1.0), F.pad(sin, (0, self.n_ones), value=1.0)
        return cos, sin


# ----------------------------------------------------------------------------------------------------------------------
# ALiBi (Press et al., arXiv 2108.12409) does not rotate. It lowers each logit in proportion to the distance:
#
#     logit - slope_h (s - t),   slope_h = 2^(-8h/n_head),   h = 1 .. n_head, a power of two


class ALiBi(PositionEmbedding):
    """Appends eight channels to q and k whose product is the bias, so that attention needs no T x T mask.

    softmax over t ignores the term slope * s, which is the same for all keys. The rest, slope * t, is the product of a
    channel of q that holds slope and a channel of k that holds t. bfloat16 represents every integer exactly only up to
    256. So three channels hold t in base 128, two of them times 128. t is exact below 2^21. slope is split into a
    rounded value and its remainder, which gives it 16 bits. Two channels of zeros follow, because fused kernels require
    a multiple of eight.

    Call attention with scale=head_dim ** -0.5, pad v by eight channels too, and drop them from the result.
    """

    exact = ("slopes",)

    def __init__(self, *, n_head: int, head_dim: int):
        super().__init__()
        p = 2 ** int(math.log2(n_head))  # if n_head is not a power of two, the authors' code adds slopes of 2p heads
        slopes = [2 ** (-8 * h / p) for h in range(1, p + 1)] + [2 ** (-4 * h / p) for h in range(1, 2 * p, 2)]
        slopes = torch.tensor(slopes[:n_head], dtype=torch.float32, device="cpu")
        self.slopes = slopes * head_dim**0.5  # attention multiplies by head_dim ** -0.5

    def forward(self, q, k, positions=None):
        """q (B, n_head, T, d) and k (B, n_kv_head, T, d) with d + 8 channels. positions as in RoPE.forward."""
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
    """No position embedding. A causal model can still count (Kazemnejad et al., arXiv 2305.19466)."""

    def forward(self, q, k, positions=None):
        return q, k


# ----------------------------------------------------------------------------------------------------------------------
# Log-n scaling is not a position embedding. Longer text gives softmax more keys to spread over. A larger q keeps it
# focused beyond N:
#
#     q * max(1, log(keys) / log N)^p,   keys = the number of keys that the query sees, its position + 1


def log_n(q: torch.Tensor, positions, train_len: int, p: float) -> torch.Tensor:
    """Returns q (B, n_head, T, d), scaled. positions as in RoPE.forward. Call it before the position embedding."""
    keys = (token_positions(q, positions) + 1).float()[..., None, :, None]  # (1, T, 1) or (B, 1, T, 1)
    return (q * (keys.log() / math.log(max(train_len, 2))).clamp(min=1) ** p).to(q.dtype)
