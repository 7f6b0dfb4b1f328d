"""The figures that explain RoPE and FoPE in the frequency domain. No training is needed.

    python paper/figures.py                                      draw all of them into paper/figures
    python paper/figures.py out/tiny-rope-s0 out/tiny-fope-s0    measure |q| and |k| in these two models first

Each function draws one figure and returns it. N is the training length in tokens. sigma is the size of FoPE's
coefficients.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.files import fail
from data.prepare import load
from fope import FoPE, RoPE, rope_frequencies
from model import load_model

FOLDER = ROOT / "paper/figures"
QK_MEANS = ROOT / "paper/results/qk_means.json"
FOPE, GREY = "#d55e00", "0.55"


def panels(count: int, title: str, height: float = 3.2) -> tuple[Figure, list]:
    """A figure with `count` axes in one column, 6.4 inches wide, so that a phone can show it."""
    matplotlib.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    fig = Figure((6.4, count * height + 0.4), layout="constrained")
    fig.suptitle(title, fontweight="bold", fontsize=13)
    return fig, list(np.atleast_1d(fig.subplots(count)))


def kept_pairs(N: int, theta: float, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """RoPE's frequencies (head_dim / 2,), and which of them FoPE keeps."""
    omega = rope_frequencies(head_dim, theta)
    position = FoPE(n_head=1, head_dim=head_dim, train_len=N, omega=omega, seed=0)
    return omega.numpy(), np.isin(omega, position.omega)


# ----------------------------------------------------------------------------------------------------------------------
# Why RoPE breaks beyond N


def frequencies(N: int = 512, theta: float = 10_000.0, head_dim: int = 64) -> Figure:
    """Equations (1) and (4) of fope.py: RoPE's frequencies, and the angles that training shows of some of them."""
    omega, kept = kept_pairs(N, theta, head_dim)
    title = f"{(~kept).sum()} of RoPE's {len(omega)} pairs complete no cycle\nwithin the training length N = {N}"
    fig, (top, bottom) = panels(2, title)
    cycles = omega * N / (2 * np.pi)
    for mask, fill, name in ((kept, "full", "kept by FoPE"), (~kept, "none", "clipped by FoPE")):
        top.plot(np.flatnonzero(mask), cycles[mask], "o", color="black", fillstyle=fill, markersize=5, label=name)
    top.axhline(1, color=FOPE, linewidth=2.5, label="floor: one cycle")
    top.set(yscale="log", xlabel="pair m", ylabel="cycles within N")
    top.legend()
    last = int(kept.sum()) - 1
    shown = [m for m in (last - 3, last, last + 2, last + 7) if 0 <= m < len(omega)]
    n = np.arange(2 * N + 1)
    for row, m in enumerate(shown):
        curve, new = np.cos(omega[m] * n) - 2.6 * row, (n > N) & (omega[m] * n < 2 * np.pi)
        bottom.plot(n, curve, color="black", linewidth=1.5)
        bottom.plot(n, np.where(new, curve, np.nan), color=FOPE, linewidth=4)
        bottom.annotate(f"pair {m}", (2 * N * 1.02, curve[-1]), annotation_clip=False, va="center")
    bottom.axvline(N, color=GREY, linestyle=":")
    bottom.set(yticks=[], xlabel=f"distance n (tokens); dotted: N = {N}", ylabel="cos ωn", xlim=(0, 2 * N))
    bottom.set_title("thick: angles that training never shows", fontsize=12)
    return fig


def dirichlet(delta: np.ndarray, n: int) -> np.ndarray:
    """Mean of exp(-i delta x) over x = 0 .. n-1, without its phase: sin(n delta / 2) / (n sin(delta / 2))."""
    half = np.asarray(delta) / 2
    flat = np.abs(np.sin(half)) < 1e-12
    kernel = np.sin(n * half) / (n * np.where(flat, 1, np.sin(half)))
    return np.where(flat, np.cos(n * half) * np.cos(half), kernel)


def truncation(N: int = 512, theta: float = 10_000.0, head_dim: int = 64) -> Figure:
    """Eq. 9 and 10: N tokens of a sinusoid are the sinusoid times a window, which widens its spectral line.

    Eq. 10 has the first zero of the window's spectrum at pi / N. For N samples it is at 2 pi / N, the floor.
    """
    floor = 2 * np.pi / N
    fig, (top, bottom) = panels(2, "Within N tokens, a frequency far below the floor\ncannot be told from a constant")
    at = np.linspace(-3, 7, 2001)
    for cycles, look in ((3.0, dict(color="black")), (0.4, dict(color=FOPE, linewidth=2.5, linestyle="--"))):
        top.plot(at, np.abs(dirichlet((at - cycles) * floor, N)), label=f"{cycles:g} cycles within N", **look)
    top.axvline(0, color=GREY, linestyle=":")
    top.set(xlabel="frequency (in units of the floor 2π/N)", ylabel="|spectrum| / N", title="two sinusoids")
    top.legend()
    omega, kept = kept_pairs(N, theta, head_dim)
    curve = np.geomspace(0.02, 80, 4000)
    bottom.plot(curve, np.abs(dirichlet(curve * floor, N)), color=GREY, linewidth=1)
    for mask, fill, name in ((kept, "full", "kept"), (~kept, "none", "clipped")):
        overlap = np.abs(dirichlet(omega[mask], N))
        bottom.plot(omega[mask] / floor, overlap, "o", color="black", fillstyle=fill, label=name)
    bottom.axvline(1, color=FOPE, linewidth=2)
    bottom.set(xscale="log", xlabel="frequency (in units of the floor)", ylabel="overlap with a constant")
    bottom.set_title("RoPE's frequencies")
    bottom.legend()
    return fig


def spectrum(x: np.ndarray) -> np.ndarray:
    """Amplitude of each whole number of cycles, 0 .. n/2, in a real signal of n samples (last axis)."""
    amplitude = np.abs(np.fft.rfft(x)) / x.shape[-1]
    amplitude[..., 1:-1] *= 2
    return amplitude


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def mixing(N: int = 512) -> Figure:
    """Eq. 7: a linear layer mixes frequencies. Eq. 8, 14-18: an activation adds j w1 + k w2, j and k of both signs."""
    angle = 2 * np.pi * np.outer((19, 50), np.arange(N)) / N  # 19 and 50 cycles within N
    pairs = np.concatenate([np.cos(angle), np.sin(angle)])
    mixed = (2 * np.random.default_rng(0).standard_normal((4, 4)) @ pairs)[0]
    fig, axes = panels(3, "A linear layer mixes frequencies,\nan activation function creates new ones", 2.2)
    stages = (("one frequency", pairs[0]), ("after a random linear layer", mixed), ("then after SiLU", silu(mixed)))
    for axis, (title, signal) in zip(axes, stages):
        found = spectrum(signal)
        lines = np.flatnonzero(found > 1e-3)
        axis.vlines(lines, 1e-5, found[lines], color="black", linewidth=2)
        axis.set(yscale="log", ylim=(5e-4, 20), xlim=(-6, 215), ylabel="amplitude")
        axis.set_title(f"{title}: {len(lines)}", fontsize=12)
    axes[-1].set_xlabel("frequency (cycles within N)")
    return fig


# ----------------------------------------------------------------------------------------------------------------------
# What FoPE's coefficients do


def mixture(sigma: float, seed: int, N: int) -> np.ndarray:
    """h(n) (N,) for two pairs with w = 1 and 0.1 and H = 1, each with a series of coefficients N(0, sigma).

    sigma 0 is RoPE.
    """
    shape = dict(n_head=1, head_dim=4, train_len=N, theta=100.0)
    cos, _ = FoPE(**shape, coef_init="normal", sigma=sigma, seed=seed).cos_sin(torch.arange(N))
    return cos[0].sum(-1).numpy()


def mixture_errors(sigma: float, sigmas, draws: int, N: int) -> np.ndarray:
    """Root mean square error of FoPE with each of `sigmas`, against mixtures with sigma: (len(sigmas), draws)."""
    truths = [mixture(sigma, 2 * draw + 1, N) for draw in range(draws)]
    return np.array([
        [np.sqrt(np.mean((mixture(own, 2 * draw, N) - truth) ** 2)) for draw, truth in enumerate(truths)]
        for own in sigmas
    ])  # fmt: skip


def blind_coefficients(N: int = 512, sigma: float = 0.3, draws: int = 200) -> Figure:
    """The paper's Figure 3, with coefficients that are drawn without knowledge of the true mixture, as in use."""
    sigmas = np.arange(0, 0.61, 0.1)
    errors = mixture_errors(sigma, sigmas, draws, N)
    closer = (mixture_errors(sigma, [sigma], draws, N)[0] < errors[0]).mean()
    title = f"Random coefficients do not model a mixture:\nFoPE is closer than RoPE in {closer:.0%} of {draws} draws"
    fig, (axis,) = panels(1, title)
    axis.plot(sigmas, np.median(errors, 1), "o-", color=FOPE, linewidth=3)
    axis.fill_between(sigmas, *np.percentile(errors, [5, 95], axis=1), color=FOPE, alpha=0.2)
    axis.plot(0, np.median(errors[0]), "s", color="black", markersize=9, zorder=3)
    axis.annotate("RoPE", (0, np.median(errors[0])), xytext=(8, -16), textcoords="offset points")
    axis.set(xlabel="σ of FoPE's coefficients", ylabel="rms error of the logit", ylim=(0, None))
    return fig


def departure(position: FoPE, T: int) -> float:
    """How far the logit is from a function of distance: 0 for RoPE, 1 for no dependence on distance at all.

    Let z_n = cos + i sin of a pair's factor at position n. Query s and key t contribute z_s conj(z_t). For
    q and k of independent standard normals, the mean square of the logit is the sum of its |.|^2 over the pairs. The
    result is exact: the root of the variance along the diagonals s - t = n over the mean square, for all heads.
    """
    cos, sin = position.cos_sin(torch.arange(T))  # (n_kv_head, T, M)
    z = torch.complex(cos, sin)

    def along_diagonals(x: torch.Tensor) -> torch.Tensor:
        """Mean of x_s conj(x_t) over s - t = n, for n = 0 .. T-1: the autocorrelation, by FFT."""
        power = torch.fft.fft(x, 2 * T, dim=1).abs() ** 2
        return torch.fft.ifft(power, dim=1)[:, :T] / torch.arange(T, 0, -1)[:, None]

    square = along_diagonals(z.abs().square().to(z.dtype)).real
    off = (square - along_diagonals(z).abs().square()).sum(-1).mean().item()
    clipped = position.head_dim // 2 - cos.shape[-1]
    return (max(off, 0.0) / (square.sum(-1).mean().item() + clipped)) ** 0.5


def both_positions(N: int = 512, theta: float = 10_000.0, head_dim: int = 64, sigma: float = 0.3) -> Figure:
    """The logit of one q and one k at every two positions. A function of distance is constant along diagonals."""
    shape = dict(n_head=1, head_dim=head_dim, train_len=N, theta=theta, seed=0)
    panel = {
        f"the default, σ {sigma:g}": FoPE(**shape, sigma=sigma),
        f"the paper's text, N(0, {sigma:g})": FoPE(**shape, sigma=sigma, coef_init="normal"),
    }
    fig, axes = panels(2, "FoPE's logit is not exactly a function of distance:\nfollow a diagonal", 4)
    q, k = torch.randn(2, 1, 1, 1, head_dim, generator=torch.Generator().manual_seed(0))
    for axis, (title, position) in zip(axes, panel.items()):
        qs, ks = position(q.expand(1, 1, 128, head_dim), k.expand(1, 1, 128, head_dim))
        past = np.where(np.tri(128, dtype=bool), (qs @ ks.mT / head_dim**0.5)[0, 0], np.nan)  # attention is causal
        image = axis.imshow((past - np.nanmean(past)) / np.nanstd(past), cmap="gray", vmin=-2.5, vmax=2.5)
        axis.set(xlabel="position of the key (tokens)", ylabel="position of the query (tokens)")
        axis.set_title(f"{title}: departure {departure(position, N):.2f}", fontsize=12)
    fig.colorbar(image, ax=axes, label="logit (standard deviations)", shrink=0.6)
    return fig


# ----------------------------------------------------------------------------------------------------------------------
# Trained models, and the paper's Figure 8


def mean_logit(mean: float, distances: np.ndarray, theta: float = 10_000.0, head_dim: int = 64) -> np.ndarray:
    """E h(n) / sqrt(d) for q and k of independent N(mean, 1): 2 mean^2 sum_m cos w_m n / sqrt(d)."""
    omega = rope_frequencies(head_dim, theta).numpy()
    return mean**2 * 2 * np.cos(np.outer(distances, omega)).sum(-1) / head_dim**0.5


def decay(theta: float = 10_000.0, head_dim: int = 64, draws: int = 10_000) -> Figure:
    """The paper's Figure 8: the "long-term decay" of RoPE comes from the mean of q and k, not from the rotation."""
    generator, position = torch.Generator().manual_seed(0), RoPE(head_dim=head_dim, theta=theta)
    distances = np.arange(0, 2048, 32)
    fig, (axis,) = panels(1, "Without a mean of q and k, RoPE does not decay")
    noise = torch.randn(2, draws, 1, 1, head_dim, generator=generator)
    for mean, look in ((1.0, dict(color="black")), (0.0, dict(color=FOPE, linewidth=3))):
        q, k = noise + mean
        found = [(position(q, k, int(n))[0] * k).sum(-1).mean().item() / head_dim**0.5 for n in distances]
        axis.plot(distances, found, ".", color=GREY)
        axis.plot(mean_logit(mean, np.arange(2048), theta, head_dim), label=f"mean {mean:g}", **look)
    axis.set(xlabel=f"distance n (tokens); dots: {draws} draws", ylabel="mean logit")
    axis.legend()
    return fig


@torch.no_grad()
def measure_qk(folders: list[str]) -> None:
    """Writes the mean |q| and |k| before rotation, by layer, head and dimension, over 64 validation sequences."""
    means = {}
    for folder in folders:
        try:
            model, checkpoint = load_model(folder)
        except ValueError as error:
            fail(str(error))
        N, seen = model.cfg.train_len, []  # (q, k) of each layer, each (n_head, head_dim)
        tokens, _ = load(checkpoint["config"]["data"], "val")
        for block in model.blocks:
            block.attention.position.register_forward_pre_hook(
                lambda module, args, seen=seen: seen.append([x.abs().mean((0, 2)) for x in args[:2]])
            )
        model(torch.from_numpy(tokens[: 64 * N].astype(np.int64)).view(64, N))
        q, k = (np.round([layer[i].tolist() for layer in seen], 3).tolist() for i in (0, 1))
        means[model.cfg.pos] = {"q": q, "k": k, "step": checkpoint["step"], "seed": model.cfg.seed}
    QK_MEANS.write_text(json.dumps(means) + "\n")


def trained_pairs(N: int = 512, theta: float = 10_000.0) -> Figure:
    """The paper's Figure 7 (there in Llama-2-7B), from what measure_qk() wrote."""
    fig, axes = panels(2, "After training, the largest |k| stands\nnext to the floor", 2.8)
    for axis, (pos, run) in zip(axes, json.loads(QK_MEANS.read_text()).items()):
        for name, look in (("q", dict(color=GREY)), ("k", dict(color="black", linewidth=2))):
            values = np.array(run[name])  # (layers, heads, head_dim); pair m is dimensions m and m + head_dim / 2
            values = values.reshape(-1, 2, values.shape[-1] // 2).mean((0, 1))
            axis.plot(values, label=f"|{name}|", **look)
        _, kept = kept_pairs(N, theta, 2 * len(values))
        axis.axvspan(kept.sum() - 0.5, len(kept) - 0.5, color="0.9")
        axis.set(xlabel="pair m (shaded: below the floor)", ylabel="mean")
        axis.set_title(f"{pos}, {run['step']} steps, seed {run['seed']}", fontsize=12)
    axes[0].legend()
    return fig


def main(folders: list[str]) -> None:
    torch.set_num_threads(1)  # many small operations: more threads would wait for each other
    if folders:
        measure_qk(folders)
    FOLDER.mkdir(exist_ok=True)
    for draw in (frequencies, truncation, mixing, blind_coefficients, both_positions, decay, trained_pairs):
        draw().savefig(FOLDER / f"{draw.__name__}.png", dpi=200)
        print(f"written: {FOLDER / draw.__name__}.png")
    print("\ndeparture of the logit from a function of distance, N = 512, five draws: mean (range)")
    print("| model | σ | xavier (release) | normal (text) |\n|---|---|---|---|")
    models = (("tiny", 2, 64, 0.3), ("60M", 8, 64, 0.3), ("180M", 8, 128, 0.4), ("1.2B", 16, 128, 0.6))
    for name, n_head, head_dim, sigma in models:
        cells = []
        for coef_init in ("xavier", "normal"):
            shape = dict(n_head=n_head, head_dim=head_dim, train_len=512, sigma=sigma, coef_init=coef_init)
            found = [departure(FoPE(**shape, seed=seed), 512) for seed in range(5)]
            cells.append(f"{np.mean(found):.3f} ({min(found):.3f}-{max(found):.3f})")
        print(f"| {name} | {sigma} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
