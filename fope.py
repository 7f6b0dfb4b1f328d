"""Fourier Position Embedding (FoPE), and the embeddings it builds on or competes with: RoPE, ALiBi, NoPE.

Read this file from top to bottom: each equation stands directly above the code that computes it.
To use it in a model of your own, copy the file and apply one module per layer to the queries and keys:

    position = FoPE(n_head=32, n_kv_head=8, head_dim=128, train_len=4096, sigma=0.3, seed=layer)
    q, k = position(q, k)                       # q (B, n_head, T, head_dim), k (B, n_kv_head, T, head_dim)
    q, k = position(q, k, positions=past)       # the T tokens that follow a cache of `past` tokens
    q, k = position(q, k, positions=positions)  # any positions: integer tensor (T,) or (B, T)

Notation: d is head_dim. N is the training length in tokens. n is a position or a distance in tokens.
Numbers (1) to (4) are ours. "Eq. 13" is an equation of the FoPE paper (Hua et al., ICML 2025, arXiv 2412.17739).
"The release" is the code that its authors published.
"""

import math

import torch
from torch import nn

# ----------------------------------------------------------------------------------------------------------------------
# RoPE (Su et al., arXiv 2104.09864)
#
# Attention compares a query with a key through their dot product. By itself, this product does not depend on how far
# apart the two tokens are. RoPE groups the d dimensions into pairs. Pair m gets a frequency between 1 and 1 / theta:
#
#     w_m = theta^(-2m/d),   m = 0 .. d/2-1                                                                     (1)


def rope_frequencies(head_dim: int, theta: float = 10_000.0) -> torch.Tensor:
    """Equation (1): the d/2 frequencies in radians per token, highest first. float64 on the CPU."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim {head_dim} must be an even number: RoPE rotates pairs of dimensions")
    if not 0 < theta < math.inf:
        raise ValueError(f"theta {theta} must be a positive number")
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)


# At position n, RoPE rotates pair m by the angle w_m n. With the pair (a, b) read as the complex number z = a + ib:
#
#     z  ->  z exp(i w_m n),   that is,   (a, b)  ->  (a cos w_m n - b sin w_m n,  b cos w_m n + a sin w_m n)       (2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Equation (2) for x (..., T, d), with cos and sin (..., T, M). Returns x's dtype; computes in that of cos.

    Pair m is the dimensions (m, m + d/2), as in Llama and in the release. Pairs from M on are returned unchanged.
    """
    M = cos.shape[-1]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)  # (..., T, d/2) each
    a, b = first[..., :M], second[..., :M]
    return torch.cat([a * cos - b * sin, first[..., M:], b * cos + a * sin, second[..., M:]], dim=-1).to(x.dtype)


# Rotate the query at position s and the key at position t. In the dot product, exp(i w_m s) meets the conjugate of
# exp(i w_m t), and only the distance n = s - t remains. The result is a sum of sinusoids, an inverse Fourier transform:
#
#     h(n) = Re sum_m H_m exp(i w_m n),   H_m = q_m conj(k_m)                                                       (3)


class RoPE(nn.Module):
    """Rotates every pair of q and k by equation (2).

    omega (d/2,) replaces the frequencies of (1). baselines.py has functions that make other frequencies.

    cos and sin come from tables. The tables are float32 (float64 for float64 inputs) whatever dtype the module is cast
    to. They are made at first use and grow with the text. Compiled code never changes them, so call reserve(T) before
    torch.compile. Otherwise compiled code recomputes cos and sin in every call, and refuses tensor positions.
    """

    def __init__(self, *, head_dim: int, theta: float = 10_000.0, omega: torch.Tensor | None = None):
        super().__init__()
        self.head_dim, self.n_kv_head = head_dim, None  # RoPE does the same for any number of heads
        self.omega = rope_frequencies(head_dim, theta) if omega is None else omega.double().cpu()
        if self.omega.shape != (head_dim // 2,):
            raise ValueError(
                f"omega has shape {tuple(self.omega.shape)}: head_dim {head_dim} takes {head_dim // 2} values"
            )
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
        q = q.unflatten(1, (k.shape[1], -1))  # (B, n_kv_head, group, T, d): each query head beside its key head
        return rotate(q, cos.unsqueeze(-3), sin.unsqueeze(-3)).flatten(1, 2), rotate(k, cos, sin)

    # The rest of this class looks after the tables. Skip it at a first reading.

    @torch.inference_mode(False)  # a table made in inference mode must also serve training
    @torch.no_grad()
    def reserve(self, T: int, device="cpu", dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes the tables for positions 0 .. T-1 on the device, (1, T, M) or (n_kv_head, T, M) each."""
        cos, sin = (x.to(device, dtype) for x in self.cos_sin(torch.arange(T, device="cpu")))
        self.tables[cos.device, dtype] = cos, sin
        return cos, sin

    def lookup(self, x: torch.Tensor, positions) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for x (B, heads, T, d): (1 or n_kv_head, T, M), with a batch dimension in front for (B, T)."""
        dtype, compiled = torch.promote_types(x.dtype, torch.float32), torch.compiler.is_compiling()
        cos, sin = self.tables.get((x.device, dtype), (None, None))
        length = 0 if cos is None else cos.shape[1]

        if isinstance(positions, torch.Tensor):
            if compiled and not length:
                raise ValueError("compiled code with tensor positions needs the tables: call reserve(T) before it")
            if not compiled:  # compiled code cannot look at the values
                low, high = (int(end) for end in positions.aminmax())
                if low < 0:
                    raise ValueError(f"position {low} is negative: padding can take position 0")
                if high >= length:
                    cos, sin = self.reserve(max(high + 1, 2 * length), x.device, dtype)
            cos, sin = cos[:, positions], sin[:, positions]  # (heads, T, M) or (heads, B, T, M)
            return (cos, sin) if positions.dim() == 1 else (cos.transpose(0, 1), sin.transpose(0, 1))

        start, end = positions or 0, (positions or 0) + x.shape[-2]
        if start < 0:
            raise ValueError(f"position {start} is negative")
        if end > length and compiled:
            return tuple(t.to(x.device, dtype) for t in self.cos_sin(torch.arange(start, end, device="cpu")))
        if end > length:
            cos, sin = self.reserve(max(end, 2 * length), x.device, dtype)
        return cos[:, start:end], sin[:, start:end]


# ----------------------------------------------------------------------------------------------------------------------
# FoPE (Hua et al., arXiv 2412.17739)
#
# Sinusoids repeat forever, so (3) should extrapolate to any length. Still, RoPE models break soon after the training
# length N, for two reasons:
#
#   1. Truncation. A component completes a cycle within N tokens only if its frequency is at least the floor
#
#         w_floor = 2 pi / N                                                                                        (4)
#
#      With N = 512 and d = 64, half of the pairs lie below the floor. Pair 8 (w = 0.1) completes 8 cycles in training.
#      Pair 24 (w = 0.001) rotates by only half a radian. At 2N it reaches angles that the model has never seen.
#   2. Spectral leakage and distortion. Each layer's matrices mix the components, and its activation functions create
#      sums and differences of their frequencies. So every pair of the next layer's q and k carries many frequencies,
#      while RoPE treats it as if it held one.
#
# FoPE replaces the factor exp(i w_m n) of (2). It answers the first reason by clipping, the second by a Fourier series:
#
#     f(w_m, n) = 1                                   if w_m < w_floor: the pair is clipped to frequency zero
#     f(w_m, n) = cos w_m n + sum_w a_w cos w n                                                                (Eq. 13)
#            + i (sin w_m n + sum_w b_w sin w n)      otherwise: the pair is kept, and gets a series
#
# A clipped pair means the same at every distance. A kept pair has shown all of its angles within N. So no single pair
# meets an unseen angle beyond N. (Clipping alone is known as p-RoPE, where p, the share of kept pairs, is chosen by
# hand: Barbero et al., arXiv 2410.06205.) The series adds a little of every other frequency to each kept pair, so that
# the model learns to work with mixtures. The coefficients a_w and b_w are random, drawn once, and never trained.


class FoPE(RoPE):
    """Multiplies q and k by the factor of Eq. 13. FoPE is RoPE with other tables, so it costs what RoPE costs.

    The logit is not exactly a function of distance. It also contains products such as a_w exp(i w_m s) exp(-i w t),
    whose two frequencies differ. They grow in proportion to sigma. The paper does not mention this.
    """

    def __init__(
        self,
        *,
        n_head: int,  # query heads
        head_dim: int,  # d
        train_len: int,  # N of (4). It stays the same at test time, also for longer text
        seed: int,  # of the coefficients. Give every layer its own
        n_kv_head: int
        | None = None,  # key heads, by default n_head. Query heads of one key head share its coefficients
        theta: float = 10_000.0,  # of (1)
        omega: torch.Tensor | None = None,  # (d/2,) frequencies in place of (1)
        sigma: float = 0.3,  # size of the coefficients
        fourier_series: bool = True,  # False: kept pairs get no series
        clip_floor: bool = True,  # False: pairs below the floor are kept too. Without both, FoPE is RoPE
        n_freqs: int = 0,  # D, the frequencies in a series. 0: the M kept ones
        coef_init: str = "xavier",  # or "normal"
        zero_phase: bool = True,  # False: clipped pairs as in the release
    ):
        super().__init__(head_dim=head_dim, theta=theta, omega=omega)
        H = n_kv_head or n_head
        if train_len < 1 or n_head % H:
            raise ValueError(f"train_len {train_len} must be at least 1, and n_kv_head {H} must divide n_head {n_head}")
        floor = 2 * math.pi / train_len  # (4)
        kept = self.omega[self.omega >= floor] if clip_floor else self.omega
        M, D = len(kept), n_freqs or len(kept)
        if M == 0:
            raise ValueError(f"train_len {train_len} is too short: the floor 2 pi / {train_len} clips every frequency")
        if D < M or (n_freqs and not fourier_series):
            raise ValueError(
                f"n_freqs {n_freqs} must be 0, or at least the {M} kept frequencies and used with a series"
            )

        # "normal" is the paper's text: N(0, sigma). "xavier" is the release: xavier_normal_(gain=sigma) on a tensor
        # (H, D, M). torch counts its fans as D M and H M. At 60M, the result is a fourteenth of sigma.
        std = {"normal": sigma, "xavier": sigma * math.sqrt(2 / (D * M + H * M))}
        if coef_init not in std or not 0 <= sigma < math.inf:
            raise ValueError(
                f"coef_init must be xavier or normal, not {coef_init!r}; sigma must be 0 or more, not {sigma}"
            )
        # A generator of its own: all other weights of a model start as they do with RoPE.
        generator = torch.Generator().manual_seed(seed)
        coef = torch.randn(2, H, D, M, generator=generator, dtype=torch.float32, device="cpu") * std[coef_init]
        self.register_buffer("coef", coef if fourier_series else None)  # a_w = coef[0], b_w = coef[1]

        self.n_kv_head = H if fourier_series else None
        # A series longer than M takes D - M more frequencies, evenly spaced in log w between the floor and pi.
        step = (torch.arange(D - M, dtype=torch.float64, device="cpu") + 0.5) / max(D - M, 1)
        self.omega = torch.cat([kept, floor * (math.pi / floor) ** step])  # (D,)
        # Eq. 13 leaves clipped pairs alone: cos 1, sin 0. The release has cos 1, sin 1. This rotates them by 45 degrees
        # and scales them by sqrt(2), so that they count twice in the logit.
        self.n_ones = 0 if zero_phase else head_dim // 2 - M

    def cos_sin(self, n):
        """Real and imaginary part of Eq. 13 at positions n (T,), (n_kv_head, T, M) each; (1, T, M) without series."""
        cos, sin = super().cos_sin(n)  # (1, T, D): one column per frequency
        if self.coef is not None:
            own = torch.eye(*self.coef.shape[-2:], dtype=torch.float64, device="cpu")  # the pair's own frequency, w_m
            a, b = self.coef.double().cpu() + own  # (n_kv_head, D, M) each
            cos, sin = cos[0] @ a, sin[0] @ b  # (T, D) @ (n_kv_head, D, M): the sums of Eq. 13
        if self.n_ones:
            cos, sin = (torch.cat([x, x.new_ones(*x.shape[:-1], self.n_ones)], dim=-1) for x in (cos, sin))
        return cos, sin

    def _apply(self, fn, recurse=True):
        """Lets .to(device) move the coefficients. Casts and to_empty() do not change them."""
        device = fn(torch.empty(0, device="cpu")).device
        if self.coef is not None and device.type != "meta":
            self.coef = self.coef.to(device)
        return self

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.tables.clear()  # they belong to the coefficients that were there before


# ----------------------------------------------------------------------------------------------------------------------
# ALiBi (Press et al., arXiv 2108.12409) does not rotate. It lowers each logit in proportion to the distance:
#
#     logit(i, j) - slope_h (i - j),   slope_h = 2^(-8h/n_head),   h = 1 .. n_head


class ALiBi(nn.Module):
    """Appends eight channels to q and k whose product is the bias, so that attention needs no T x T mask.

    softmax over j ignores the term slope i, which is the same for all j. The rest, slope j, is the product of a channel
    of q that holds slope and a channel of k that holds j. bfloat16 represents integers exactly only up to 256. So three
    channels hold the digits of j to base 128, and slope is split into a rounded value and its remainder. This takes six
    channels and is exact for j < 2^21. Two channels of zeros follow, as fused kernels want a multiple of eight.

    Call attention with scale=head_dim ** -0.5, pad v by eight channels too, and drop them from the result.
    """

    def __init__(self, *, n_head: int, head_dim: int):
        super().__init__()
        p = 2 ** int(math.log2(n_head))  # where n_head is not a power of two, the authors' code adds slopes of 2p heads
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
