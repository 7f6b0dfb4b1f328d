"""The paper's other baselines: frequencies that replace RoPE's, and learned biases.

Each function in the first part takes frequencies, a float64 tensor on the CPU, and returns new ones:

    position = RoPE(head_dim=128, omega=position_interpolation(rope_frequencies(128), scale=4))

Each module in the second part returns a bias that attention adds to its logits. It leaves q and k unchanged.
"""

import math

import torch
from torch import nn

from fope import NoPE

# ----------------------------------------------------------------------------------------------------------------------
# Frequencies for text that is `scale` times as long as in training


def position_interpolation(omega: torch.Tensor, scale: float) -> torch.Tensor:
    """Chen et al., arXiv 2306.15595: w / scale, so that no angle exceeds those of training."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale {scale} must be a positive number")
    return omega / scale


def cycles(omega: torch.Tensor, length: int) -> torch.Tensor:
    """How many cycles a component completes within `length` tokens."""
    if length < 1:
        raise ValueError(f"length {length} must be at least 1")
    return omega * length / (2 * math.pi)


def yarn(omega: torch.Tensor, scale: float, original_len: int, *, head_dim: int, theta: float) -> torch.Tensor:
    """YaRN (Peng et al., arXiv 2309.00071), without its factor on the logit, as in FoPE's release.

    Frequencies with at least 32 cycles in original_len stay; those with at most one are divided by scale. In between,
    the result is a mixture that is linear in the index m of equation (1), which is why head_dim and theta are needed.
    """
    slowed = position_interpolation(omega, scale)
    if original_len < 1 or not theta > 1 or not (omega > 0).all():
        raise ValueError("yarn needs original_len >= 1, theta above 1, and no frequency zero (whole_cycles makes one)")

    def index(n_cycles):
        """m of the frequency w_m that completes this many cycles in original_len."""
        return head_dim / 2 * math.log(original_len / (2 * math.pi * n_cycles)) / math.log(theta)

    low = max(math.floor(index(32)), 0)
    high = min(math.ceil(index(1)), head_dim - 1)
    m = head_dim / 2 * -omega.log() / math.log(theta)
    share = ((m - low) / max(high - low, 0.001)).clamp(0, 1)
    return slowed * share + omega * (1 - share)


def llama3(omega: torch.Tensor, scale: float, original_len: int, low: float = 1.0, high: float = 4.0) -> torch.Tensor:
    """Llama 3.1's scaling (`rope_type: "llama3"`): YaRN's idea with a mixture that is linear in the number of cycles.

    Frequencies with more than `high` cycles in original_len stay; those with fewer than `low` are divided by scale.
    """
    if not 0 < low < high:
        raise ValueError(f"low {low} must be positive and less than high {high}")
    share = ((cycles(omega, original_len) - low) / (high - low)).clamp(0, 1)
    return omega * share + position_interpolation(omega, scale) * (1 - share)


def whole_cycles(omega: torch.Tensor, train_len: int) -> torch.Tensor:
    """The paper's RoPE-A (Table 2): each frequency moves to the nearest whole number of cycles in train_len.

    Less than half a cycle becomes zero, the nearest whole number. The paper does not say what it does there.
    """
    return cycles(omega, train_len).round() * (2 * math.pi / train_len)


def scaled(omega, scaling: str, scale: float, original_len: int, *, head_dim: int, theta: float) -> torch.Tensor:
    """Applies the function above that --scaling names: none, linear, yarn or llama3."""
    if scaling == "none":
        return omega
    if scaling == "linear":
        return position_interpolation(omega, scale)
    if scaling == "yarn":
        return yarn(omega, scale, original_len, head_dim=head_dim, theta=theta)
    if scaling == "llama3":
        return llama3(omega, scale, original_len)
    raise ValueError(f"scaling {scaling!r} is unknown: use none, linear, yarn or llama3")


# ----------------------------------------------------------------------------------------------------------------------
# Learned biases
#
# Attention adds bias(i, j) to its logits and masks the future (model.py). i (..., Tq, 1) are the positions of queries,
# j (..., 1, Tk) those of keys. The result is (n_head, Tq, Tk), or (B, n_head, Tq, Tk) for positions (B, Tq, 1).


class LearnedBias(NoPE):
    """What KERPLE and FIRE have in common: q and k pass through, and attention asks for bias(i, j)."""

    def precise(self):
        """The parameters in at least float32, because bfloat16 can tell only 256 distances apart."""
        return (p.to(torch.promote_types(p.dtype, torch.float32)) for p in self.parameters())


class KERPLE(LearnedBias):
    """Chi et al., arXiv 2205.09921, logarithmic form: bias = -r1 log(1 + r2 |i - j|), with r1, r2 > 0 per head.

    r1 and r2 start uniform in (0, 2) and (0, 1). As in the authors' code, a parameter that a step takes below 0.01 is
    set to 0.01.
    """

    def __init__(self, *, n_head: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = torch.rand(2, n_head, 1, 1, generator=generator, dtype=torch.float32, device="cpu")
        self.r1, self.r2 = nn.Parameter(2 * start[0]), nn.Parameter(start[1])
        self.constrain()

    @torch.no_grad()
    def constrain(self):
        self.r1.clamp_(min=0.01)
        self.r2.clamp_(min=0.01)

    def bias(self, i, j):
        r1, r2 = self.precise()
        return -r1 * torch.log1p(r2 * (i - j).abs().unsqueeze(-3))


class FIRE(LearnedBias):
    """Li et al., arXiv 2310.04418: bias = f(psi(i - j) / psi(max(i, L))), psi(x) = log(1 + c x).

    f is an MLP from one number to n_head numbers, with 32 hidden units and ReLU. c starts at 0.1 and L at 512. Both are
    learned. The argument of f is a distance relative to the query's position, so it stays in [0, 1] for any length.
    """

    def __init__(self, *, n_head: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def uniform(bound, *shape):  # nn.Linear's default: bound = 1 / sqrt(inputs)
            draw = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
            return nn.Parameter((2 * draw - 1) * bound)

        self.w1, self.b1 = uniform(1, 32), uniform(1, 32)
        self.w2, self.b2 = uniform(32**-0.5, n_head, 32), uniform(32**-0.5, n_head)
        self.c, self.L = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(1.0))

    def bias(self, i, j):
        w1, b1, w2, b2, c, L = self.precise()

        def psi(x):
            return torch.log1p((c * x).abs())

        share = psi((i - j).clamp(min=0)) / (psi(torch.maximum(i, (512 * L).abs())) + 1e-6)  # (..., Tq, Tk)
        with torch.autocast(share.device.type, enabled=False):
            return ((share[..., None] * w1 + b1).relu() @ w2.T + b2).movedim(-1, -3)
