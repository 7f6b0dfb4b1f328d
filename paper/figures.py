"""The lesson's figures: position embeddings in the frequency domain, from fope.py and numpy. Seconds on a CPU.

    python paper/figures.py                                      all of them, to paper/figures/
    python paper/figures.py out/tiny-rope-s0 out/tiny-fope-s0    first measure |q| and |k| in these trained models

One function draws one figure; what it says is printed too. README has the lines that go with each. Black, grey and
line styles only, since they are read on paper; the results' own figure is eval_passkey.py's.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.files import fail
from data.prepare import load
from fope import FoPE, RoPE, rope_frequencies
from model import load_model
from paper import experiments

FOLDER = ROOT / "paper/figures"
QK_MEANS = ROOT / "paper/results/qk_means.json"
N, HEAD_DIM = 512, 64  # of the tiny and the 60M model
FLOOR = 2 * np.pi / N
OMEGA = rope_frequencies(HEAD_DIM).numpy()
KEPT = np.arange(len(OMEGA)) < len(FoPE(n_head=1, head_dim=HEAD_DIM, train_len=N, omega=rope_frequencies(HEAD_DIM), seed=0).omega)  # as fope.py decides, so that the figures follow a change there


def save(fig, name: str) -> None:
    fig.savefig(FOLDER / f"{name}.png", dpi=110)
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------------
# 1. RoPE as an inverse non-uniform DFT


def waves() -> None:
    """(a) and (d) of fope.py: which frequencies the logit (c) is sampled at, and which of them finish no cycle in training."""
    wavelength = 2 * np.pi / np.maximum(OMEGA, 1e-9)
    print(f"waves: {KEPT.sum()} of {len(OMEGA)} pairs are kept at N = {N}: wavelengths {wavelength[0]:.1f} to {wavelength[KEPT][-1]:.0f} of up to {wavelength[-1]:.0f} tokens")
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    fig.suptitle(f"Look left of the floor: {(~KEPT).sum()} of RoPE's {len(OMEGA)} waves finish no cycle in training")

    left.plot(2 * np.pi * np.arange(1, N // 2 + 1) / N, np.zeros(N // 2), "k|", markersize=12, label="DFT of N samples: 2πk/N")
    left.plot(OMEGA[KEPT], np.ones(KEPT.sum()), "ko", markersize=5, label="RoPE: kept")
    left.plot(OMEGA[~KEPT], np.ones((~KEPT).sum()), "ko", markersize=5, fillstyle="none", label="RoPE: clipped by FoPE")
    left.axvline(FLOOR, color="gray", linestyle=":")
    left.annotate("floor 2π/N", (FLOOR, 0.5), xytext=(4, 0), textcoords="offset points")
    left.set(xscale="log", ylim=(-0.5, 2.6), yticks=[], xlabel="frequency ω (radians a token)")
    left.secondary_xaxis("top", functions=(lambda w: 2 * np.pi / np.maximum(w, 1e-9),) * 2).set_xlabel("wavelength 2π/ω (tokens)")
    left.legend(fontsize=8, loc="upper left", ncols=2)

    for row, m in enumerate((24, 20, 17, 15, 12)):
        seen_again = min(max(N, round(wavelength[m])), 2 * N)  # its first cycle ends, or training does
        for start, end, colour, line in ((0, N, "black", "-"), (N, seen_again, "black", ":"), (seen_again, 2 * N, "gray", "-")):
            n = np.arange(start, end + 1)
            right.plot(n, 2.5 * row + np.cos(OMEGA[m] * n), color=colour, linestyle=line, linewidth=1.6)
        right.annotate(f"pair {m}", (2 * N + 12, 2.5 * row - 0.2), annotation_clip=False, fontsize=9)
    right.axvline(N, color="gray", linewidth=1)
    right.set(yticks=[], ylim=(-1.5, 12), xlabel="distance n (tokens), trained up to N = 512; cos ωn", title="beyond N: grey angles ωn were seen, dotted were not", xlim=(0, 2 * N))
    save(fig, "waves")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Truncation


def dirichlet(delta: np.ndarray, n: int) -> np.ndarray:
    """Mean of exp(-i delta x) over x = 0 .. n-1, without its phase: sin(n delta / 2) / (n sin(delta / 2)). First zero 2 pi / n."""
    half = np.asarray(delta) / 2
    flat = np.abs(np.sin(half)) < 1e-12
    return np.where(flat, np.cos(n * half) * np.cos(half), np.sin(n * half) / (n * np.where(flat, 1, np.sin(half))))


def truncation() -> None:
    """Eq. 9 and 10: N tokens of a wave are the wave times a window, so its spectrum is the wave's line times the window's.

    Eq. 10 gives that as a sinc whose first zero is at pi / N, as for 2N tokens; that of N samples is at 2 pi / N, the floor.
    """
    at, bins = np.linspace(-3, 7, 2001), np.arange(-3 * 8, 7 * 8 + 1)  # in floors; in eighths of one: an FFT padded to 8 N
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    fig.suptitle("Look at zero: a wave far below the floor is taken for a constant, one of whole cycles is not")
    for axis, cycles in zip(axes, (3.0, 0.4)):
        exact = np.abs(dirichlet((at - cycles) * FLOOR, N))
        fft = np.abs(np.fft.fft(np.exp(1j * cycles * FLOOR * np.arange(N)), 8 * N))[bins] / N
        loose = np.abs(np.sinc((at - cycles) * 2))  # np.sinc(x) is sin(pi x) / (pi x)
        axis.plot(at, exact, "k-", linewidth=1.2, label="exact: Dirichlet")
        axis.plot(bins / 8, fft, "k.", markersize=4, label="FFT")
        axis.plot(at, loose, color="gray", linestyle="--", linewidth=1, label="Eq. 10's width")
        axis.axvline(0, color="gray", linestyle=":")
        axis.set(xlabel="frequency (floors, 2π/N)", title=f"spectrum of a wave of {cycles:g} cycles in N")
        print(f"truncation, {cycles:g} cycles in N: the kernel is off the FFT by at most {np.abs(np.abs(dirichlet((bins / 8 - cycles) * FLOOR, N)) - fft).max():.0e},", end=" ")
        print(f"Eq. 10's width off the kernel by {np.abs(loose - exact).max():.2f}; at frequency 0: {np.abs(dirichlet(cycles * FLOOR, N)):.2f}")
    axes[0].set_ylabel("|spectrum| / N")
    axes[0].legend(fontsize=8)
    at = np.geomspace(0.02, 80, 4000) * FLOOR
    axes[2].plot(at / FLOOR, np.abs(dirichlet(at, N)), color="gray", linewidth=1)
    overlap = np.abs(dirichlet(OMEGA, N))
    for mask, fill, name in ((KEPT, "full", "kept"), (~KEPT, "none", "clipped")):
        axes[2].plot(OMEGA[mask] / FLOOR, overlap[mask], "ko", markersize=4, fillstyle=fill, label=name)
    axes[2].axvline(1, color="gray", linestyle=":")
    axes[2].set(xscale="log", xlabel="frequency (floors, 2π/N)", ylabel="overlap with a constant", title="RoPE's 32 frequencies")
    axes[2].legend(fontsize=8)
    print(f"    overlap with a constant: kept at most {overlap[KEPT].max():.2f}, clipped at least {overlap[~KEPT].min(initial=1):.2f}")
    save(fig, "truncation")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Leakage and distortion


def spectrum(x: np.ndarray) -> np.ndarray:
    """Amplitude of each whole number of cycles, 0 .. n/2, in a real signal of n samples (last axis)."""
    amplitude = np.abs(np.fft.rfft(x)) / x.shape[-1]
    amplitude[..., 1:-1] *= 2
    return amplitude


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def distortion() -> None:
    """Eq. 7: a linear layer mixes tones. Eq. 8, 14-18: what is not linear makes tones j w1 + k w2, j and k of both signs."""
    first, second = 19, 50  # cycles in N
    angle = 2 * np.pi * np.outer((first, second), np.arange(N)) / N
    pairs = np.concatenate([np.cos(angle), np.sin(angle)])  # the first dimension of each pair, then the second
    mixed = (2 * np.random.default_rng(0).standard_normal((4, 4)) @ pairs)[0]
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained", sharey=True)
    fig.suptitle("Count the lines: a linear layer mixes tones, an activation makes new ones, jω₁ + kω₂")
    for axis, (title, signal) in zip(axes, (("one tone", pairs[0]), ("after a random linear layer", mixed), ("after SiLU as well", silu(mixed)))):
        found = spectrum(signal)
        lines = np.flatnonzero(found > 1e-3)
        axis.vlines(lines, 1e-5, found[lines], color="black", linewidth=1.4)
        axis.set(title=title, xlabel="frequency (cycles in N)", yscale="log", ylim=(5e-4, 20), xlim=(-6, 215))
        for line in lines:
            j, k = min(((j, k) for j in range(-5, 6) for k in range(-5, 6) if j * first + k * second == line), key=lambda jk: abs(jk[0]) + abs(jk[1]))
            terms = [("+" if times > 0 else "−") + f"{abs(times)}"[abs(times) == 1 :] + tone for times, tone in sorted(((j, "ω₁"), (k, "ω₂")), reverse=True) if times]
            axis.annotate("".join(terms).lstrip("+") or "0", (line, found[line] * 1.15), rotation=90, ha="center", va="bottom", fontsize=8)
        print(f"distortion, {title}: {len(lines)} lines of amplitude above 0.001; energy off ω1 {1 - found[first] ** 2 / (found[1:] ** 2).sum():.2f}")
    axes[0].set_ylabel("amplitude")
    save(fig, "distortion")


# ---------------------------------------------------------------------------------------------------------------------
# 4. The paper's Figure 3


def mixture(sigma: float, seed: int) -> np.ndarray:
    """Re sum_m f(w_m, n) for two pairs, w = 1 and 0.1, (N,): the logit where every q_m conj(k_m) is 1, and the series stands on q alone.

    sigma 0 is RoPE; a larger one mixes the two waves by coefficients from N(0, sigma), drawn by seed.
    """
    cos, _ = FoPE(n_head=1, head_dim=4, train_len=N, theta=100.0, coef_init="normal", sigma=sigma, seed=seed).cos_sin(torch.arange(N))
    return cos[0].sum(-1).numpy()


def blind_coefficients() -> None:
    """The paper's Figure 3, with FoPE's coefficients drawn blind to the true mixture (sigma 0.3), and many times."""
    sigmas, draws = np.arange(0, 0.61, 0.1), 200
    truths = [mixture(0.3, 2 * draw + 1) for draw in range(draws)]
    errors = np.array([[np.sqrt(np.mean((mixture(sigma, 2 * draw) - truth) ** 2)) for draw, truth in enumerate(truths)] for sigma in sigmas])
    print(f"blind_coefficients: rms error over n < N, {draws} draws, median (5 % to 95 %); FoPE closer than RoPE (σ 0) in")
    for sigma, found in zip(sigmas, errors):
        low, middle, high = np.percentile(found, [5, 50, 95])
        print(f"    σ {sigma:.1f}: {middle:.2f} ({low:.2f}-{high:.2f}); {(found < errors[0]).mean():.0%}")
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained", width_ratios=(1.6, 1))
    fig.suptitle("Compare with σ = 0, RoPE: the larger the coefficients drawn blind, the larger the error")
    for values, style, name in (
        (truths[0], dict(color="lightgray", linewidth=6), "true mixture"),
        (mixture(0.0, 0), dict(color="black"), "RoPE"),
        (mixture(0.3, 0), dict(color="black", linestyle=":"), "FoPE, σ 0.3"),
    ):
        left.plot(values[:64], label=name, **style)
    left.set(xlabel="distance n (tokens)", ylabel="logit, all H = 1", title="one draw", ylim=(-3, 4))
    left.legend(fontsize=8, loc="upper right", ncols=3)
    right.plot(sigmas, np.median(errors, 1), "ko-", markersize=4)
    right.fill_between(sigmas, *np.percentile(errors, [5, 95], axis=1), color="gray", alpha=0.3)
    right.set(xlabel="σ of FoPE's coefficients", ylabel="rms error of the logit", title=f"{draws} draws: median, 5 % to 95 %", ylim=(0, None))
    save(fig, "blind_coefficients")


# ---------------------------------------------------------------------------------------------------------------------
# 5. The paper's Figure 8


def mean_logit(mean: float, distances: np.ndarray) -> np.ndarray:
    """E h(n) for q, k of independent N(mean, 1): mean^2 2 sum_m cos w_m n, over sqrt(head_dim)."""
    return mean**2 * 2 * np.cos(np.outer(distances, OMEGA)).sum(-1) / HEAD_DIM**0.5


def decay() -> None:
    """The paper's Figure 8: RoPE's "long-term decay" belongs to the mean of q and k, not to the rotation."""
    T, draws = 2048, 40_000
    generator, position, distances, means = torch.Generator().manual_seed(0), RoPE(1, HEAD_DIM, T), np.arange(0, T, 32), (0.0, 0.1, 1.0)
    found, errors = np.zeros((2, len(means), len(distances)))
    for i, n in enumerate(distances):
        noise = torch.randn(2, draws, 1, 1, HEAD_DIM, generator=generator)
        for j, (q, k) in enumerate(noise + mean for mean in means):  # the key stays at position 0, where nothing turns
            logits = (position(q, k, offset=int(n))[0] * k).sum(-1) / HEAD_DIM**0.5
            found[j, i], errors[j, i] = logits.mean(), logits.std() / draws**0.5
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    fig.suptitle("Look at μ = 0: for independent q and k, the rotation alone brings no decay")
    for axis, mean, middle, error in zip(axes, means, found, errors):
        exact = mean_logit(mean, np.arange(T))
        axis.fill_between(distances, middle - 2 * error, middle + 2 * error, color="gray", alpha=0.4, label=f"{draws} draws, ± 2 standard errors")
        axis.plot(exact, "k-", linewidth=1, label="exact")
        axis.set(title=f"μ = {mean:g}", xlabel="distance n (tokens)")
        print(f"decay, μ {mean:g}: mean logit {exact[1]:.3f} at n = 1, {exact[1024:].mean():.3f} on average from 1024 to 2047; off by up to {np.abs((middle - exact[::32]) / error).max():.1f} standard errors")
    axes[0].set_ylabel("mean logit")
    axes[2].legend(fontsize=8)
    save(fig, "decay")


# ---------------------------------------------------------------------------------------------------------------------
# 6. The paper's Figure 7


@torch.no_grad()
def measure_qk(folders: list[str]) -> None:
    """Mean |q| and |k|, before they are turned, by layer, head and dimension, over 64 validation sequences, to JSON."""
    means = {}
    for folder in folders:
        try:
            model, checkpoint = load_model(folder)
            if (model.cfg.head_dim, model.cfg.train_len) != (HEAD_DIM, N):
                raise ValueError(f"{folder} has head_dim {model.cfg.head_dim} and N = {model.cfg.train_len}: the figure is of {HEAD_DIM} and {N}")
        except ValueError as error:
            fail(str(error))
        tokens, _ = load(checkpoint["config"]["data"], "val")
        seen = []  # (q, k) of each layer, each (n_head, head_dim)
        for block in model.blocks:
            block.attention.position.register_forward_pre_hook(lambda module, qk, seen=seen: seen.append([x.abs().mean((0, 2)) for x in qk[:2]]))
        model(torch.from_numpy(tokens[: 64 * N].astype(np.int64)).view(64, N))
        q, k = (np.round([layer[i].tolist() for layer in seen], 3).tolist() for i in (0, 1))
        means[model.cfg.pos] = {"q": q, "k": k, "step": checkpoint["step"], "seed": model.cfg.seed}
    QK_MEANS.write_text(json.dumps(means) + "\n")
    print(f"written to {QK_MEANS}")


def undertrained() -> None:
    """The paper's Figure 7 (there: Llama-2-7B), in our own tiny models, RoPE and FoPE."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained", sharey=True)
    fig.suptitle("Look at |k|: RoPE's highest peak stands just below the floor, FoPE's just above")
    for axis, (pos, run) in zip(axes, json.loads(QK_MEANS.read_text()).items()):
        for half in (0, HEAD_DIM // 2):  # pair m is dimensions m and m + head_dim / 2
            axis.axvspan(half + KEPT.sum() - 0.5, half + HEAD_DIM // 2 - 0.5, color="gray", alpha=0.25)
        for name, style in (("q", "k-"), ("k", "k--")):
            values = np.array(run[name]).reshape(-1, 2, HEAD_DIM // 2)  # (layers x heads, the two of a pair, pairs)
            axis.plot(values.mean(0).flatten(), style, linewidth=1.2, label=f"|{name}|")
            above, under = values[..., KEPT].mean((1, 2)), values[..., ~KEPT].mean((1, 2))
            ratios = " ".join(f"{ratio:.2f}" for ratio in under / above)
            print(f"undertrained, {pos}, mean |{name}|: {above.mean():.2f} above the floor, {under.mean():.2f} below it; below / above by layer and head: {ratios}")
        axis.set(title=f"{pos}, {run['step']} steps, seed {run['seed']}", xlabel="dimension (grey: below the floor)")
    axes[0].set_ylabel("mean over layers, heads, tokens")
    axes[0].legend(fontsize=8)
    save(fig, "undertrained")


# ---------------------------------------------------------------------------------------------------------------------
# 7. The logit and both positions


def departure(position: FoPE, T: int) -> float:
    """How far the logit is from a function of distance alone: 0 is RoPE, 1 would be no function of it at all.

    With z_n = cos + i sin of a pair's series at position n, what q at i and k at j meet is z_i conj(z_j); for RoPE that is
    exp(i w (i - j)). For q and k of independent standard normals the logit's variance is its |.|^2, summed over the pairs and times 2.
    So what follows is exact, not sampled: the variance of z_i conj(z_j) along each diagonal i - j = n, against its mean square; the
    root of their ratio, over all heads and distances alike. The clipped pairs (z = 1) count in the logit and depart nowhere.
    """
    cos, sin = position.cos_sin(torch.arange(T))  # (n_head, T, M)
    z = torch.complex(cos, sin)

    def along_diagonals(x: torch.Tensor) -> torch.Tensor:
        """Mean of x_i conj(x_j) over i - j = n, for n = 0 .. T-1: the autocorrelation, by FFT."""
        power = torch.fft.fft(x, 2 * T, dim=1).abs() ** 2
        return torch.fft.ifft(power, dim=1)[:, :T] / torch.arange(T, 0, -1)[:, None]

    square = along_diagonals(z.abs().square().to(z.dtype)).real
    off = (square - along_diagonals(z).abs().square()).sum(-1).mean().item()
    clipped = position.head_dim // 2 - cos.shape[-1]
    return (max(off, 0.0) / (square.sum(-1).mean().item() + clipped)) ** 0.5


def both_positions() -> None:
    """How far FoPE's logit is from a function of distance, by sigma: a table, and one logit drawn at both positions."""
    sigmas, seeds = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6), range(5)
    print(f"both_positions: departure from a function of distance, N = {N}, {len(seeds)} draws: mean (range)")
    print("| model | coefficients | " + " | ".join(f"σ {sigma}" for sigma in sigmas) + " |\n" + "|---" * (2 + len(sigmas)) + "|")
    for name, n_head, head_dim in (("tiny", 2, 64), ("60M", 8, 64), ("180M", 8, 128), ("1.2B", 16, 128)):
        for coef_init in ("xavier", "normal"):
            cells = []
            for sigma in sigmas:
                shape = dict(n_head=n_head, head_dim=head_dim, train_len=N, sigma=sigma, coef_init=coef_init)
                found = [departure(FoPE(**shape, seed=seed), N) for seed in seeds]
                cells.append(f"{np.mean(found):.3f} ({min(found):.3f}-{max(found):.3f})")
            print(f"| {name} | {coef_init} | " + " | ".join(cells) + " |", flush=True)

    fig, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained", sharey=True)
    fig.suptitle("Follow a diagonal: where its grey changes, the logit depends on more than the distance")
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64, generator=generator)
    for axis, (title, options) in zip(axes, [
        ("σ 0: a function of i − j alone", dict(sigma=0.0)),
        ("the default: xavier, σ 0.3", {}),
        ("normal, σ 0.3", dict(coef_init="normal")),
    ]):  # fmt: skip
        position = FoPE(n_head=1, head_dim=64, train_len=N, seed=0, **options)
        qs, ks = position(q.expand(1, 1, 128, 64), k.expand(1, 1, 128, 64))
        past = np.where(np.tri(128, dtype=bool), (qs @ ks.mT / 8)[0, 0], np.nan)  # attention is causal
        image = axis.imshow((past - np.nanmean(past)) / np.nanstd(past), cmap="gray", vmin=-2.5, vmax=2.5)
        axis.set(title=title, xlabel="position j of the key (tokens)")
    axes[0].set_ylabel("position i of the query (tokens)")
    fig.colorbar(image, ax=axes, label="logit (standard deviations)")
    save(fig, "both_positions")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    torch.set_num_threads(1)  # much small work: more threads would wait for each other
    if sys.argv[1:]:
        measure_qk(sys.argv[1:])
    for draw in (waves, truncation, distortion, blind_coefficients, decay, undertrained, both_positions):
        draw()
    experiments.report("fig1", "tiny5k")  # 8. the results
    print(f"written to {FOLDER}")
