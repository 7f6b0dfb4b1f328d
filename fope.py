"""Position embeddings in the frequency domain: FoPE, and what it is compared with. Written to be read from top to bottom.

    1. RoPE       turns each pair of dimensions by a wave of its own, and why that breaks beyond the training length
    2. FoPE       drops the waves too slow to learn, and makes of every other one a Fourier series
    3. the rest   ALiBi, NoPE; waves stretched for longer text; the biases KERPLE and FIRE, which are learned

Attention compares a query at position i with a key at position j. Without help it cannot see i - j. A position
embedding here is a module: forward(q, k, offset) takes q and k of shape (B, n_head, T, head_dim) that stand at positions
offset .. offset+T-1, and returns them positioned. Attention stays one fused call for all of them,
scaled_dot_product_attention(q, k, v, is_causal=True, scale=head_dim ** -0.5): no T x T tensor is built. Only KERPLE
and FIRE, which learn what to add to the logit at each distance, need one, in training.

d is head_dim, N the training length, n a position or a distance in tokens. Equations (a) to (d) are numbered by us; "Eq. 13"
is the FoPE paper's number. "The release" is the code that its authors published.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

# The options, to be skipped at a first reading: each is explained where it is used.


@dataclass
class PositionOptions:
    """What can be changed. RoPE reads the frequencies' options alone."""

    # The frequencies, of RoPE and FoPE
    theta: float = 10_000.0  # their base
    whole_cycles: bool = False  # RoPE-A: each moved to the nearest whole number of cycles in N; under half a cycle: 0
    scaling: str = "none"  # stretch the waves for longer text: "linear" (position interpolation) or "yarn"
    scale: float = 16.0  # how many times longer
    original_len: int = 512  # YaRN: the training length before that
    # FoPE
    fourier_series: bool = True  # FS: False leaves every kept pair its own wave only
    clip_floor: bool = True  # CF: False keeps the frequencies below the floor
    sigma: float = 0.3  # size of the a_w; what it means is coef_init's to say
    n_freqs: int = 0  # D, the frequencies in a series; 0: the kept ones and no others
    coef_init: str = "xavier"  # "xavier": the authors' code, gain sigma; "normal": the paper's text, standard deviation sigma
    zero_phase: bool = True  # clipped pairs: True is Eq. 13 (cos 1, sin 0); False the authors' code (cos 1, sin 1)


# ---------------------------------------------------------------------------------------------------------------------
# 1. RoPE (Su et al., arXiv 2104.09864)
#
# Pair m of every query and key gets a frequency. From one radian a token down to nearly 1 / theta, evenly in log w:
#
#     w_m = theta^(-2m/d),   m = 0 .. d/2-1                                                                  (a)


def rope_frequencies(head_dim: int, theta: float = 10_000.0) -> torch.Tensor:
    """(a): the head_dim/2 frequencies in radians a token, highest first, float64."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


# At position n the pair is turned by the angle w_m n. As a complex number z = x_m + i x_{m+d/2}, by a factor:
#
#     z  ->  z exp(i w_m n),   that is   (x_m cos w_m n - x_{m+d/2} sin w_m n,  x_{m+d/2} cos w_m n + x_m sin w_m n)   (b)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(b) on x (B, n_head, T, head_dim) with float32 tables of shape (T, M) or (n_head, T, M).

    Pair m is (m, m + head_dim/2), the half-split layout of the release, Llama and vLLM. Pairs from M on are under
    the floor and pass through untouched. Computed in float32, returned in x's dtype.
    """
    M = cos.shape[-1]
    first, second = x.float().chunk(2, dim=-1)
    a, b = first[..., :M], second[..., :M]
    return torch.cat([a * cos - b * sin, first[..., M:], b * cos + a * sin, second[..., M:]], dim=-1).to(x.dtype)


# A query turned at n' meets a key turned at n'': exp(i w_m n') conj(exp(i w_m n'')) = exp(i w_m (n' - n'')). The logit is a
# function of the distance n = n' - n'' alone,
#
#     h(n) = Re sum_m H_m exp(i w_m n),   H_m = q_m conj(k_m)                                                (c)
#
# an inverse Fourier transform at frequencies that are not evenly spaced. Each wave is periodic, and could go on for ever.


class RoPE(nn.Module):
    """(b) for every pair, from cos and sin tables that grow when a longer sequence comes.

    Angles are computed in float64 (in float32 the angle of position 8191 is off by up to 5e-4) on the CPU (not
    every accelerator has float64), and kept as float32 tables.
    """

    def __init__(self, n_head: int, head_dim: int, train_len: int, options=PositionOptions(), seed: int = 0):
        super().__init__()
        self.omega, self.head_dim = frequencies(head_dim, train_len, options), head_dim  # (a), unless the options change it
        self.build(train_len)

    def tables(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for positions 0 .. T-1, float64, (T, M)."""
        angle = torch.outer(torch.arange(T, dtype=torch.float64), self.omega)
        return angle.cos(), angle.sin()

    @torch.inference_mode(False)  # a table first grown in inference mode must still serve training
    @torch.no_grad()
    def build(self, T: int, device: torch.device | None = None) -> None:
        """Make the tables for positions 0 .. T-1. Not saved: they follow from omega and the coefficients."""
        for name, table in zip(("cos", "sin"), self.tables(T)):
            self.register_buffer(name, table.float().to(device), persistent=False)

    def stretch(self, options: PositionOptions) -> None:
        """At test time, without training: other frequencies for the same pairs, with the same coefficients."""
        self.omega = stretched(self.omega, self.head_dim, options)
        self.build(self.cos.shape[-2], self.cos.device)

    def forward(self, q, k, offset: int = 0):
        end = offset + q.shape[-2]
        if end > self.cos.shape[-2]:
            self.build(max(end, 2 * self.cos.shape[-2]), self.cos.device)
        assert self.cos.dtype == torch.float32, "the tables were cast: use autocast, not model.to(bfloat16)"
        cos, sin = self.cos[..., offset:end, :], self.sin[..., offset:end, :]
        return rotate(q, cos, sin), rotate(k, cos, sin)


# ---------------------------------------------------------------------------------------------------------------------
# 2. FoPE (Hua et al., arXiv 2412.17739)
#
# Why does RoPE break beyond N? Two things spoil its spectrum:
#
#   - Truncation. Training shows N tokens. A wave slower than the floor
#
#         w_l = 2 pi / N                                                                                     (d)
#
#     finishes no cycle in them, and the distances beyond N bring angles that training never showed. With N = 512, pair 8
#     (w = 0.1) has made 8 turns by N; pair 24 (w = 0.001) turns by 0.5 rad in training, and by 1.0 at 2N.
#   - Leakage and distortion. The waves enter the hidden states through the attention weights; the next layer's matrices
#     mix them, its activations make sums and differences of their frequencies, and the next q and k carry all of them.
#     Yet RoPE turns a pair as if it held one.
#
# FoPE answers with what it multiplies a pair by at position n:
#
#     f(w_m, n) = 1                                   if w_m < w_l   CF: clipped to frequency zero, not turned at all
#     f(w_m, n) = cos w_m n + sum_w a_w cos w n                      FS: its own wave, plus a little of the others.
#            + i (sin w_m n + sum_w b_w sin w n)      otherwise      a_w, b_w are drawn once and fixed         (Eq. 13)
#
# (The paper writes one a_w for both and draws cosine's and sine's apart.) A clipped pair means the same at every distance,
# and a kept wave has shown all of its angles within N: no single pair meets anything new beyond N, only their combination
# is new. The series puts a little of every kept frequency into every pair, so that the network is trained on mixtures; why
# random ones should help is the paper's argument, and not shown here.


class FoPE(RoPE):
    """Eq. 13. The coefficients never change, so each series is summed once, into tables of shape (n_head, T, M):
    from there on FoPE *is* RoPE with other tables, and costs what RoPE costs.

    M pairs are kept: those with w_m >= 2 pi / N. N is the training length, also where the test is longer.
    A series has D frequencies: the M kept ones, and D - M more, evenly spaced in log w between the floor and pi.
    The coefficients are drawn per layer (by seed), per head, and for cos and sin apart. They come from a generator
    of their own, so that all other weights start as RoPE's do, and are saved with the model.

    The own wave of a query's pair also meets the other waves in its key's series: a_w exp(i w_m n') exp(-i w n'') is no
    function of n' - n''. So the logit is not exactly a function of distance, in proportion to sigma. The paper does
    not say so.

    Raises ValueError: 0 < n_freqs < M, or n_freqs without a series; an unknown coef_init; a negative sigma; N so
    short that every pair is clipped (N < 7).
    """

    def __init__(self, n_head: int, head_dim: int, train_len: int, options=PositionOptions(), seed: int = 0):
        nn.Module.__init__(self)
        floor = 2 * math.pi / train_len  # (d)
        self.head_dim, omega = head_dim, frequencies(head_dim, train_len, options)
        kept = omega[omega >= floor] if options.clip_floor else omega  # the others are Eq. 13's first case
        M, D = len(kept), options.n_freqs or len(kept)
        self.check(options, train_len, M, D)
        # The paper: "others anywhere in [0, pi]". Midpoints of D - M equal steps of log w.
        step = (torch.arange(D - M, dtype=torch.float64) + 0.5) / max(D - M, 1)
        self.omega = torch.cat([kept, floor * (math.pi / floor) ** step])
        # The release clips by zeroing the angle *after* cos and sin, so cos = sin = 1: a turn by 45 degrees and a
        # stretch by sqrt(2), which makes these pairs count twice in the logit. Eq. 13 is "leave it alone".
        self.n_ones = 0 if options.zero_phase else head_dim // 2 - M

        # The paper's text says N(0, sigma). The release says xavier_normal_(gain=sigma) on an (n_head, D, M) tensor,
        # whose fans torch counts as D M and n_head M: about a fourteenth of sigma at 60M.
        std = {"normal": options.sigma, "xavier": options.sigma * math.sqrt(2 / (D * M + n_head * M))}
        generator = torch.Generator().manual_seed(seed)
        coef = torch.randn(2, n_head, D, M, generator=generator) * std[options.coef_init]
        self.register_buffer("coef", coef if options.fourier_series else None)  # [0] for cos, [1] for sin
        self.build(train_len)

    @staticmethod
    def check(options: PositionOptions, train_len: int, M: int, D: int) -> None:
        """Raises ValueError for what cannot be built."""
        if M == 0:
            raise ValueError(f"train_len {train_len} is so short (or scale so large) that the floor 2 pi / {train_len} clips every frequency")
        if options.n_freqs and not options.fourier_series:
            raise ValueError("n_freqs is the length of the Fourier series: leave it 0 where fourier_series is false")
        if D < M:
            raise ValueError(f"n_freqs {D} is fewer than the {M} frequencies kept at train_len {train_len}: use 0 or >= {M}")
        if not 0 <= options.sigma < math.inf:
            raise ValueError(f"sigma {options.sigma} must be a number from 0 up")
        if options.coef_init not in ("normal", "xavier"):
            raise ValueError(f"coef_init {options.coef_init!r} is unknown: use normal or xavier")

    def tables(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The M series at positions 0 .. T-1, float64, (n_head, T, M); without FS (T, M)."""
        cos, sin = super().tables(T)  # (T, D): the waves
        if self.coef is not None:
            weight = self.coef.double().cpu()
            weight = weight + torch.eye(*weight.shape[-2:], dtype=torch.float64)  # own wave: column m has a 1 at w_m
            cos, sin = cos @ weight[0], sin @ weight[1]  # Eq. 13's second case: (T, D) @ (n_head, D, M)
        if self.n_ones:
            cos, sin = (torch.cat([x, x.new_ones(*x.shape[:-1], self.n_ones)], dim=-1) for x in (cos, sin))
        return cos, sin

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.build(self.cos.shape[-2], self.cos.device)  # the tables follow the coefficients just loaded


# ---------------------------------------------------------------------------------------------------------------------
# 3. What it is compared with


class ALiBi(nn.Module):
    """Press et al., arXiv 2108.12409: logit - slope_h (i - j), slope_h = 2^(-8h/n_head), h = 1 .. n_head.

    No mask is needed. softmax over j does not change by slope * i, the same for all j; what is left, slope * j, is
    a product: channels on q that hold slope / scale against channels on k that hold j. bfloat16 has 8 bits, so j
    is split into 128 * (j // 128) and j % 128, both exact up to 32 768, and the slope into a rounded value and its
    remainder: 2 x 2 channels. Padded to 8, which fused kernels on a GPU ask for. The caller pads v alike and cuts
    the output (GPT does), since those kernels also ask that q, k and v have one size.
    """

    def __init__(self, n_head: int, head_dim: int, train_len: int, options=PositionOptions(), seed: int = 0):
        super().__init__()
        p = 2 ** int(math.log2(n_head))  # where n_head is no power of two: the paper's own code fills in
        slopes = [2 ** (-8 * h / p) for h in range(1, p + 1)] + [2 ** (-4 * h / p) for h in range(1, 2 * p, 2)]
        slopes = torch.tensor(slopes[:n_head], dtype=torch.float64) * head_dim**0.5  # attention multiplies by scale
        self.register_buffer("slopes", slopes.float(), persistent=False)

    def forward(self, q, k, offset: int = 0):
        B, _, T, _ = q.shape
        j = torch.arange(offset, offset + T, device=k.device)
        coarse, fine, zero = j // 128 * 128, j % 128, torch.zeros_like(j)
        on_k = torch.stack([coarse, fine, coarse, fine, zero, zero, zero, zero], dim=-1).to(k.dtype)  # (T, 8)
        assert self.slopes.dtype == torch.float32, "the slopes were cast: use autocast, not model.to(bfloat16)"
        high = self.slopes.to(q.dtype)
        low = (self.slopes - high.float()).to(q.dtype)
        zero = torch.zeros_like(high)
        on_q = torch.stack([high, high, low, low, zero, zero, zero, zero], dim=-1)[:, None]  # (n_head, 1, 8)
        return torch.cat([q, on_q.expand(B, -1, T, -1)], dim=-1), torch.cat([k, on_k.expand(B, len(high), -1, -1)], dim=-1)


class NoPE(nn.Module):
    """No position embedding: a causal model can still count (Kazemnejad et al., arXiv 2305.19466)."""

    def __init__(self, n_head: int, head_dim: int, train_len: int, options=PositionOptions(), seed: int = 0):
        super().__init__()

    def forward(self, q, k, offset: int = 0):
        return q, k


# Frequencies changed on purpose


def frequencies(head_dim: int, train_len: int, options: PositionOptions) -> torch.Tensor:
    """(a) with the options for it: what RoPE and FoPE start from. Raises ValueError."""
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd: a rotation needs pairs of dimensions")
    omega = rope_frequencies(head_dim, options.theta)
    if options.whole_cycles:  # a wave under half a cycle in N becomes no wave: the paper does not say, nearest is 0
        cycle = 2 * math.pi / train_len
        omega = (omega / cycle).round() * cycle
    return stretched(omega, head_dim, options)


def stretched(omega: torch.Tensor, head_dim: int, options: PositionOptions) -> torch.Tensor:
    """Frequencies omega made fit for a text `scale` times as long as training's. Raises ValueError for an unknown scaling.

    linear (Chen et al., arXiv 2306.15595): w / scale, so that no position reaches an angle beyond training's.
    yarn (Peng et al., arXiv 2309.00071): w / scale only where the wave does not finish a cycle in original_len, w where it
    finishes 32 or more, and between the two a mixture, linear in the index m. Constants and ramp are those of the
    authors' code, which FoPE's release took over, without their factor on the logit.
    """
    if options.scaling == "none":
        return omega
    if not options.scale > 0 or options.original_len < 1:
        raise ValueError(f"scale {options.scale} must be above 0, original_len {options.original_len} at least 1")
    if options.scaling == "linear":
        return omega / options.scale
    if options.scaling != "yarn":
        raise ValueError(f"scaling {options.scaling!r} is unknown: use none, linear or yarn")
    if options.whole_cycles or options.theta <= 1:
        raise ValueError("yarn needs frequencies that fall with m: use it without whole_cycles, and with theta above 1")

    def index(w):  # m of (a)
        return -head_dim / 2 * math.log(w) / math.log(options.theta)

    fast, slow = (2 * math.pi * cycles / options.original_len for cycles in (32, 1))
    low, high = max(math.floor(index(fast)), 0), min(math.ceil(index(slow)), head_dim - 1)
    m = torch.tensor([index(w) for w in omega.tolist()], dtype=torch.float64)
    slowed = ((m - low) / max(high - low, 0.001)).clamp(0, 1)
    return omega / options.scale * slowed + omega * (1 - slowed)


# Biases that are learned


class LearnedBias(NoPE):
    """What is added to the logit at each pair of positions is learned: bias(i, j), broadcast over i (Tq, 1) and j (Tk,).

    The caller adds it and masks the future (GPT does, some queries at a time). Parameters are drawn per layer, by seed.
    """

    def bias(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """(n_head, Tq, Tk) float32."""
        raise NotImplementedError


class KERPLE(LearnedBias):
    """Chi et al., arXiv 2205.09921, logarithmic: bias = -r1 log(1 + r2 |i - j|), r1, r2 > 0 per head.

    They start uniform in (0, 2) and (0, 1), and are kept from 0.01 up, as in the authors' code.
    """

    def __init__(self, n_head: int, head_dim: int, train_len: int, options=PositionOptions(), seed: int = 0):
        nn.Module.__init__(self)
        start = torch.rand(2, n_head, 1, 1, generator=torch.Generator().manual_seed(seed))
        self.r1, self.r2 = nn.Parameter(2 * start[0]), nn.Parameter(start[1])

    def bias(self, i, j):
        # At the bound the gradient must go on, or a parameter that reached it would never leave.
        r1, r2 = (r + (r.clamp(min=0.01) - r).detach() for r in (self.r1, self.r2))
        return -r1 * torch.log1p(r2 * (i - j).abs())


class FIRE(LearnedBias):
    """Li et al., arXiv 2310.04418: bias = f(psi(i - j) / psi(max(i, L))), psi(x) = log(1 + c x).

    f is an MLP from one number to n_head, with 32 hidden units and ReLU; c starts at 0.1, L at 512 times a learned 1. So
    distance is measured in parts of the query's own position, which never leaves [0, 1] however long the text.
    """

    def __init__(self, n_head: int, head_dim: int, train_len: int, options=PositionOptions(), seed: int = 0):
        nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(seed)

        def uniform(bound, *shape):  # as nn.Linear starts: 1 / sqrt(inputs)
            return nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)

        self.w1, self.b1 = uniform(1, 32), uniform(1, 32)
        self.w2, self.b2 = uniform(32**-0.5, n_head, 32), uniform(32**-0.5, n_head)
        self.c, self.L = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(1.0))

    def bias(self, i, j):
        def psi(x):
            return torch.log1p((self.c * x).abs())

        share = psi((i - j).clamp(min=0)) / (psi(torch.maximum(i, (512 * self.L).abs())) + 1e-6)
        with torch.autocast(share.device.type, enabled=False):  # bfloat16 would tell only 256 distances apart
            return ((share[..., None] * self.w1 + self.b1).relu() @ self.w2.T + self.b2).movedim(-1, 0)


POSITIONS = {"fope": FoPE, "rope": RoPE, "alibi": ALiBi, "kerple": KERPLE, "fire": FIRE, "nope": NoPE}
