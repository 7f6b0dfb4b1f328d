"""Muon (Jordan et al. 2024): the update of a matrix is its momentum, made orthogonal by five Newton-Schulz steps.

This is torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (Liu et al., arXiv 2502.16982). The factor 0.2 sqrt(n), n
the longer side, gives the update the size of AdamW's, so both take the same lr and weight decay. torch's version always
multiplies in bfloat16, which makes a step of `tiny` 2.5 times slower on a CPU without it. Here, autocast decides.
"""

import torch


class Muon(torch.optim.Optimizer):
    """For matrices only. A matrix without a gradient (a frozen one) is left alone."""

    def __init__(self, params, lr: float, weight_decay: float):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}  # matrices of one shape are multiplied as one batch: fewer launches on a GPU
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for matrices in shapes.values():
                updates = orthogonal(torch.stack([self.nesterov(p) for p in matrices]))
                size = 0.2 * max(updates.shape[1:]) ** 0.5
                for p, update in zip(matrices, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update, alpha=size * group["lr"])

    def nesterov(self, p: torch.Tensor) -> torch.Tensor:
        if "momentum" not in self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p.grad)
        momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
        return p.grad.lerp(momentum, 0.95)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Brings every singular value of the matrices x (matrices, rows, columns) to about 1."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the shorter side first: smaller products
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.mT if tall else x
