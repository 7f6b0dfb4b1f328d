"""Fourier Position Embedding (FoPE), and the embeddings it builds on or competes with: RoPE, ALiBi, NoPE.

Read this file from top to bottom: each equation comes before the code that computes it.
To use it in your own model, copy the file and apply one module per layer to the queries and keys:

    position = FoPE(n_head=32, n_kv_head=8, head_dim=128, train_len=4096, sigma=0.3, seed=layer)
    q, k = position(q, k)                       # q (B, n_head, T, head_dim), k (B, n_kv_head, T, head_dim)
    q, k = position(q, k, positions=past)       # the T tokens that follow a cache of `past` tokens; then cache k
    q, k = position(q, k, positions=positions)  # any positions: integer tensor (T,) or (B, T)

With left padding, positions is (mask.cumsum(-1) - 1).clamp(min=0), where mask (B, T) is 1 for real tokens.

Notation: d is head_dim. N is the training length in tokens. n is a position or a distance in tokens.
Equations (1) to (4) use this file's own numbers. "Eq. 13" is an equation of the FoPE paper (Hua et al., ICML 2025,
arXiv 2412.17739). "The release" is the code published by the paper's authors.
"""

import math

import torch
from torch import nn

# ----------------------------------------------------------------------------------------------------------------------
# RoPE (Su et al., arXiv 2104.09864)
#
# Attention compares a query with a key through their dot product. By itself, this product does not depend on how far
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


# At position n, RoPE rotates pair m by the angle w_m n. Treat the pair (a, b) as the complex number z = a + ib:
#
#     z  ->  z exp(i w_m n),   that is,   (a, b)  ->  (a cos w_m n - b sin w_m n,  b cos w_m n + a sin w_m n)       (2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Equation (2) for x (..., T, d), with cos and sin (..., T, M). Computes in the dtype of cos, returns that of x.

    Pair m consists of dimensions m and m + d/2, as in Hugging Face's Llama and in the release. Pairs from M on are
    returned unchanged: FoPE clips them.
    """
    M = cos.shape[-1]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)  # (..., T, d/2) each
    a, b = first[..., :M], second[..., :M]
    return torch.cat([a * cos - b * sin, first[..., M:], b * cos + a * sin, second[..., M:]], dim=-1).to(x.dtype)


# Rotate the query at position s and the key at position t. Their dot product multiplies exp(i w_m s) by the conjugate
# of exp(i w_m t), so only the distance n = s - t remains. The result is a sum of sinusoids. It is an inverse Fourier
# transform whose frequencies are not evenly spaced:
#
#     h(n) = Re sum_m H_m exp(i w_m n),   H_m = q_m conj(k_m)                                                       (3)


class RoPE(nn.Module):
    """Rotates every pair of q and k by equation (2).

    omega (d/2,) replaces the frequencies of (1).

    cos and sin come from tables. The tables are float32 (float64 for float64 inputs) whatever dtype the module is cast
    to. They are made at first use and grow with the text. Compiled code never changes them. So load the weights, move
    the model, and call reserve(T, device) before torch.compile. Without it, compiled code recomputes cos and sin in
    every call and refuses tensor positions. Compiled code does not check tensor positions: keep them below T.
    """

    def __init__(self, *, head_dim: int, theta: float = 10_000.0, omega: torch.Tensor | None = None):
        super().__init__()
        self.head_dim, self.n_kv_head = head_dim, None  # None: any number of heads
        self.omega = rope_frequencies(head_dim, theta) if omega is None else omega.double().cpu()
        if self.omega.shape != (head_dim // 2,):
            raise ValueError(f"omega has {len(self.omega)} values: head_dim {head_dim} needs {head_dim // 2}")
        self.tables = {}  # (device, dtype): cos and sin. A plain dict, so that casts, DDP and state_dict ignore it

    def cos_sin(self, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The cos and sin of (2) at positions n (T,), float64, (1, T, M) each."""
        angle = n.double()[None, :, None] * self.omega  # a float32 angle would be off by up to 5e-4 at position 8191
        return angle.cos(), angle.sin()

    def forward(self, q, k, positions=None):
        """Returns q (B, n_head, T, d) and k (B, n_kv_head, T, d), rotated. positions: see the top of this file."""
        d, heads = self.head_dim, self.n_kv_head or k.shape[1]
        if (q.shape[-1], k.shape[-1], k.shape[1]) != (d, d, heads):
            raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit head_dim {d} and n_kv_head {heads}")
        cos, sin = self.lookup(q, positions)
        q = q.unflatten(1, (k.shape[1], -1))  # (B, n_kv_head, group, T, d): query heads grouped by key head
        return rotate(q, cos.unsqueeze(-3), sin.unsqueeze(-3)).flatten(1, 2), rotate(k, cos, sin)

    # The rest of this class manages the tables. Skip it on a first reading.

    @torch.inference_mode(False)  # tables made in inference mode must also work in training
    @torch.no_grad()
    def reserve(self, T: int, device="cpu", dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes the tables for positions 0 .. T-1 on the device, (1, T, M) or (n_kv_head, T, M) each."""
        cos, sin = (x.to(device, dtype) for x in self.cos_sin(torch.arange(T, device="cpu")))
        self.tables[cos.device, dtype] = cos, sin
        return cos, sin

    def lookup(self, x: torch.Tensor, positions) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for x (B, heads, T, d): (h, T, M), or (B, h, T, M) for positions (B, T). h is 1 or n_kv_head."""
        dtype, compiled = torch.promote_types(x.dtype, torch.float32), torch.compiler.is_compiling()
        cos, sin = self.tables.get((x.device, dtype), (None, None))
        length = 0 if cos is None else cos.shape[1]

        if isinstance(positions, torch.Tensor):
            if positions.shape[-1:] != x.shape[-2:-1]:
                raise ValueError(f"positions has shape {tuple(positions.shape)}: it must be (T,) or (B, T)")
            if compiled and not length:
                raise ValueError("tensor positions in compiled code need tables: call reserve(T, device) before")
            if not compiled:  # compiled code cannot branch on the values
                low, high = (int(end) for end in positions.aminmax())
                if low < 0:
                    raise ValueError(f"position {low} is negative: use position 0 for padding")
                if high >= length:
                    cos, sin = self.reserve(max(high + 1, 2 * length), x.device, dtype)
            cos, sin = cos[:, positions], sin[:, positions]  # (heads, T, M) or (heads, B, T, M)
            return (cos, sin) if positions.dim() == 1 else (cos.transpose(0, 1), sin.transpose(0, 1))

        start = positions or 0
        end = start + x.shape[-2]
        if start < 0:
            raise ValueError(f"position {start} is negative")
        if end > length:
            if compiled:
                return tuple(t.to(x.device, dtype) for t in self.cos_sin(torch.arange(start, end, device="cpu")))
            cos, sin = self.reserve(max(end, 2 * length), x.device, dtype)
        return cos[:, start:end], sin[:, start:end]


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
#      Pair 24 (w = 0.001) rotates by only half a radian. At 2N it reaches angles that the model has never seen.
#   2. Spectral leakage and distortion: each layer's matrices mix the pairs (leakage), and its activation functions
#      create sums and differences of their frequencies (distortion). So every pair of the next layer's q and k carries
#      many frequencies, while RoPE treats it as if it held one.
#
# FoPE multiplies each pair of q and k by f(w_m, n) instead of exp(i w_m n). Clipping addresses the first problem. A
# Fourier series addresses the second:
#
#     f(w_m, n) = 1                                   if w_m < w_floor: the pair is clipped to frequency zero
#     f(w_m, n) = cos w_m n + sum_w a_w cos w n                                                                (Eq. 13)
#            + i (sin w_m n + sum_w b_w sin w n)      otherwise: the pair is kept, and gets a series
#
# A clipped pair contributes the same at every distance. A kept pair has gone through all its angles within N tokens. So
# without the series, no single pair meets an unseen angle beyond N. (Clipping alone is known as p-RoPE, where p, the
# share of kept pairs, is chosen by hand: Barbero et al., arXiv 2410.06205.)
#
# The sums run over D frequencies, among them all kept ones. Each kept pair of each key head has its own a_w and b_w.
# They are random, drawn once, and never trained. So the model learns to work with mixtures of frequencies.


class FoPE(RoPE):
    """Multiplies q and k by the factor of Eq. 13. FoPE is RoPE with other tables, so a step costs what RoPE's costs.

    The logit is not exactly a function of the distance s - t. The series adds products such as cos w s cos v t with
    w != v, which depend on more. For small sigma they grow in proportion to it. The paper does not mention this.
    """

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
        n_freqs: int = 0,  # D, the number of frequencies in the series. 0: the kept ones
        coef_init: str = "xavier",  # or "normal"
        zero_phase: bool = True,  # False: clipped pairs get cos 1, sin 1, as in the release
    ):
        super().__init__(head_dim=head_dim, theta=theta, omega=omega)
        n_kv = n_kv_head or n_head
        if train_len < 1 or n_head % n_kv:
            raise ValueError(
                f"train_len {train_len} must be at least 1, and n_kv_head {n_kv} must divide n_head {n_head}"
            )
        if (self.omega.diff() > 0).any():
            raise ValueError("omega must be in descending order: the kept pairs are the first ones")
        floor = 2 * math.pi / train_len  # (4)
        kept = self.omega[self.omega >= floor] if clip_floor else self.omega
        M, D = len(kept), n_freqs or len(kept)
        if M == 0:
            raise ValueError(f"train_len {train_len} is too short: the floor 2 pi / {train_len} clips every frequency")
        if D < M or (n_freqs and not fourier_series):
            raise ValueError(
                f"n_freqs {n_freqs} must be 0, or at least the {M} kept frequencies and used with a series"
            )
        if coef_init not in ("xavier", "normal") or not 0 <= sigma < math.inf:
            raise ValueError(
                f"coef_init must be xavier or normal, not {coef_init!r}; sigma must be 0 or more, not {sigma}"
            )

        # If D > M, the series gets D - M additional frequencies, evenly spaced in log w between the floor and pi.
        step = (torch.arange(D - M, dtype=torch.float64, device="cpu") + 0.5) / max(D - M, 1)
        self.omega = torch.cat([kept, floor * (math.pi / floor) ** step])  # (D,)

        # "normal" follows the paper's text: N(0, sigma). "xavier" follows the release: xavier_normal_(gain=sigma) on a
        # tensor (n_kv, D, M), whose fans are D M and n_kv M. With n_kv = 8 and D = M = 16, the result is sigma / 14.
        std = sigma if coef_init == "normal" else sigma * math.sqrt(2 / (D * M + n_kv * M))
        # A separate generator leaves the initial values of all other weights as they are with RoPE.
        generator = torch.Generator().manual_seed(seed)
        coef = torch.randn(2, n_kv, D, M, generator=generator, dtype=torch.float32, device="cpu") * std
        self.register_buffer("coef", coef if fourier_series else None)  # a_w = coef[0], b_w = coef[1]
        self.n_kv_head = n_kv if fourier_series else None  # None: any number of heads

        # Eq. 13 leaves clipped pairs alone: cos 1, sin 0. The release has cos 1, sin 1. This rotates them by 45 degrees
        # and scales them by sqrt(2), so that they count twice in the logit.
        self.n_ones = 0 if zero_phase else head_dim // 2 - M

    def cos_sin(self, n):
        """Real and imaginary parts of Eq. 13 at positions n (T,): (n_kv_head, T, M), or (1, T, M) without a series."""
        cos, sin = super().cos_sin(n)  # (1, T, D): one column per frequency
        if self.coef is not None:
            D, M = self.coef.shape[-2:]
            own = torch.eye(D, M, dtype=torch.float64, device="cpu")  # cos w_m n is the term with coefficient 1
            a, b = self.coef.double().cpu() + own  # (n_kv_head, D, M) each
            cos, sin = cos[0] @ a, sin[0] @ b  # (T, D) @ (n_kv_head, D, M): the sums of Eq. 13
        if self.n_ones:
            ones = cos.new_ones(*cos.shape[:-1], self.n_ones)
            cos, sin = torch.cat([cos, ones], dim=-1), torch.cat([sin, ones], dim=-1)
        return cos, sin

    def _apply(self, fn, recurse=True):
        """Keeps coef in float32: .to(device) moves it, casts and to_empty() leave it alone."""
        device = fn(torch.empty(0, device="cpu")).device
        if self.coef is not None and device.type != "meta":
            self.coef = self.coef.to(device)
        return self

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.tables.clear()  # they were computed from the old coefficients


# ----------------------------------------------------------------------------------------------------------------------
# ALiBi (Press et al., arXiv 2108.12409) does not rotate. It lowers each logit in proportion to the distance:
#
#     logit(i, j) - slope_h (i - j),   slope_h = 2^(-8h/n_head),   h = 1 .. n_head, a power of two


class ALiBi(nn.Module):
    """Appends eight channels to q and k whose product is the bias, so that attention needs no T x T mask.

    softmax over j ignores the term slope * i, which is the same for all j. The rest, slope * j, is the product of a
    channel of q that holds slope and a channel of k that holds j. bfloat16 represents every integer exactly only up to
    256. So three channels hold j in base 128, two of them times 128. j is exact below 2^21. slope is split into a
    rounded value and its remainder, which gives it 16 bits. Two channels of zeros follow, because fused kernels require
    a multiple of eight.

    Call attention with scale=head_dim ** -0.5, pad v by eight channels too, and drop them from the result.
    """

    def __init__(self, *, n_head: int, head_dim: int):
        super().__init__()
        p = 2 ** int(math.log2(n_head))  # if n_head is not a power of two, the authors' code adds slopes of 2p heads
        slopes = [2 ** (-8 * h / p) for h in range(1, p + 1)] + [2 ** (-4 * h / p) for h in range(1, 2 * p, 2)]
        self.slopes = [slope * head_dim**0.5 for slope in slopes[:n_head]]  # attention multiplies by head_dim ** -0.5

    def forward(self, q, k, positions=None):
        """q (B, n_head, T, d) and k (B, n_kv_head, T, d) with d + 8 channels. positions as in RoPE.forward."""
        if q.shape[1] != len(self.slopes):
            raise ValueError(f"q has {q.shape[1]} heads: this module was made for n_head {len(self.slopes)}")
        T, j = k.shape[-2], positions
        if not isinstance(j, torch.Tensor):
            j = torch.arange(T, device=k.device) + (positions or 0)
        digits = (j // 16_384 * 128, j // 128 % 128 * 128, j % 128)  # j = 128 digits[0] + digits[1] + digits[2]
        zero = torch.zeros_like(j)
        on_k = torch.stack([*digits, *digits, zero, zero], dim=-1).to(k.dtype)  # (T, 8) or (B, T, 8)
        on_k = on_k.view(-1, 1, T, 8).expand(*k.shape[:-1], 8)

        slope = torch.tensor(self.slopes, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        high = slope.to(q.dtype)
        low = (slope - high).to(q.dtype)
        zero = torch.zeros_like(high)
        on_q = torch.stack([128 * high, high, high, 128 * low, low, low, zero, zero], dim=-1)  # (n_head, 8)
        on_q = on_q[:, None].expand(*q.shape[:-1], 8)
        return torch.cat([q, on_q], dim=-1), torch.cat([k, on_k], dim=-1)


class NoPE(nn.Module):
    """No position embedding. A causal model can still count (Kazemnejad et al., arXiv 2305.19466)."""

    def forward(self, q, k, positions=None):
        return q, k


# ----------------------------------------------------------------------------------------------------------------------
# log n is no position embedding. softmax spreads over more keys as a text grows. A larger q keeps it focused beyond N:
#
#     q * max(1, log n / log N)^p,   n = the number of keys that the query sees


def log_n(q: torch.Tensor, positions, train_len: int, p: float) -> torch.Tensor:
    """Returns q (B, n_head, T, d), scaled. positions: an offset, or a tensor (T,) or (B, T). n = position + 1."""
    if not isinstance(positions, torch.Tensor):
        positions = torch.arange(positions, positions + q.shape[-2], device=q.device)
    n = (positions + 1).float()[..., None, :, None]  # (1, T, 1) or (B, 1, T, 1)
    return (q * (n.log() / math.log(max(train_len, 2))).clamp(min=1) ** p).to(q.dtype)
