"""The figures that explain RoPE and FoPE in the frequency domain. One function draws and returns one figure.

    python paper/figures.py            draw all of them into paper/figures, and bring lesson/index.html up to date

The last two figures show what measure.py found in trained models.

In all figures, FoPE is the thick colored line and RoPE is black. N is the training length in tokens, theta the base of
the frequencies, and sigma the size of FoPE's coefficients. A notebook can call each function with other values.
"""

import inspect
import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot
from fope import FoPE, RoPE, rope_frequencies
from model import PRESETS, GPTConfig

FOLDER, RESULTS, PAGE = ROOT / "paper/figures", ROOT / "paper/results", ROOT / "lesson/index.html"
FOPE = dict(color="#d55e00", linewidth=4)
matplotlib.rcParams.update(
    {"font.size": 12, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False}
)


def panels(count: int, title: str, height: float = 3.2) -> tuple[Figure, list]:
    """A figure with `count` axes in one column, 6.4 inches wide, so that a phone can show it."""
    fig = Figure((6.4, count * height + 0.5), layout="constrained")
    fig.suptitle(title, fontweight="bold", fontsize=14)
    return fig, list(np.atleast_1d(fig.subplots(count)))


def kept_pairs(N: int, theta: float, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """RoPE's frequencies (head_dim / 2,), and which of them FoPE keeps."""
    omega = rope_frequencies(head_dim, theta)
    return omega.numpy(), np.isin(omega, FoPE(n_head=1, head_dim=head_dim, train_len=N, omega=omega, seed=0).omega)


# ----------------------------------------------------------------------------------------------------------------------
# Why RoPE breaks beyond N, and what FoPE does about it


def frequencies(N: int = 512, theta: float = 10_000.0, head_dim: int = 64, sigma: float = 0.3) -> Figure:
    """Equations (1), (4) and 13 of fope.py: which pairs FoPE clips, and the real part of four pairs' factors."""
    omega, kept = kept_pairs(N, theta, head_dim)
    title = f"{(~kept).sum()} of RoPE's {len(omega)} pairs complete no cycle within\nN = {N} tokens. "
    fig, (top, bottom) = panels(2, f"{title}FoPE makes them constant", 3.6)
    for mask, fill, name in ((kept, "full", "kept"), (~kept, "none", "clipped")):
        cycles = omega[mask] * N / (2 * np.pi)
        top.plot(np.flatnonzero(mask), cycles, "o", color="black", fillstyle=fill, label=f"{mask.sum()} {name} pairs")
    top.axhline(1, color="0.5", linestyle=":", label="floor: one cycle within N")
    top.set(yscale="log", xlabel="pair m", ylabel="cycles within N tokens")
    top.legend()

    t, M = torch.arange(2 * N + 1), int(kept.sum())
    rope = RoPE(head_dim=head_dim, theta=theta).cos_sin(t, torch.float64)[0][0].numpy()  # (2 N + 1, head_dim / 2)
    position = FoPE(n_head=1, head_dim=head_dim, train_len=N, theta=theta, sigma=sigma, seed=0)
    cos = position.cos_sin(t, torch.float64)[0][0]  # with the ones of the clipped pairs, or without, as in Eq. 13
    fope = np.ones_like(rope)
    fope[:, : cos.shape[-1]] = cos
    shown = [m for m in (M - 4, M - 1, M + 1, M + 6) if 0 <= m < len(omega)]
    for row, m in enumerate(shown):
        unseen = (t > N) & (omega[m] * t < 2 * np.pi)
        (fope_line,) = bottom.plot(t, fope[:, m] - 3 * row, **FOPE)
        (seen_line,) = bottom.plot(t, np.where(unseen, np.nan, rope[:, m]) - 3 * row, "k", linewidth=2)
        (unseen_line,) = bottom.plot(t, np.where(unseen, rope[:, m], np.nan) - 3 * row, "k:", linewidth=2)
        bottom.annotate(f"pair {m}", (2 * N * 1.02, -3 * row), annotation_clip=False, va="center")
    bottom.vlines(N, 1.5 - 3 * len(shown), 1.5, color="0.5", linewidth=1)
    bottom.set_xticks([0, N, 2 * N], ["0", f"N = {N}", f"2N = {2 * N}"])
    bottom.set(xlim=(0, 2 * N), ylim=(1.5 - 3 * len(shown), 6.5), yticks=[], xlabel="position t in tokens")
    bottom.set_ylabel("real part of the factor")
    labels = ["FoPE", "RoPE", "RoPE, at angles unseen in training"]
    bottom.legend([fope_line, seen_line, unseen_line], labels, loc="upper left", frameon=False)
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
    title = "Within N tokens, a frequency far below the floor\ncannot be distinguished from a constant"
    fig, (top, bottom) = panels(2, title)
    at = np.linspace(-3, 10, 2001)
    for cycles, look in ((3.0, dict(color="black")), (0.4, dict(color="0.5", linewidth=2.5, linestyle="--"))):
        top.plot(at, np.abs(dirichlet((at - cycles) * floor, N)), label=f"{cycles:g} cycles within N", **look)
    top.axvline(0, color="0.5", linestyle=":")
    top.set(xlabel="frequency in units of the floor 2π/N", ylabel="|spectrum| / N", title="spectra of two sinusoids")
    top.legend()
    omega, kept = kept_pairs(N, theta, head_dim)
    at = np.geomspace(0.02, 80, 4000)
    bottom.plot(at, np.abs(dirichlet(at * floor, N)), color="0.5", linewidth=1)
    for mask, fill, name in ((kept, "full", "kept pairs"), (~kept, "none", "clipped pairs")):
        overlap = np.abs(dirichlet(omega[mask], N))
        bottom.plot(omega[mask] / floor, overlap, "o", color="black", fillstyle=fill, label=name)
    bottom.axvline(1, color="0.5", linestyle=":")
    bottom.set(xscale="log", xlabel="frequency in units of the floor 2π/N", ylabel="overlap with a constant")
    bottom.set_title("RoPE's frequencies")
    bottom.legend()
    return fig


def mixing(N: int = 512) -> Figure:
    """Eq. 7: a linear layer mixes frequencies. Eq. 8, 14-18: an activation adds j w1 + k w2, for integers j and k."""
    angle = 2 * np.pi * np.outer((19, 50), np.arange(N)) / N  # 19 and 50 cycles within N
    pairs = np.concatenate([np.cos(angle), np.sin(angle)])
    mixed = (2 * np.random.default_rng(0).standard_normal((4, 4)) @ pairs)[0]
    stages = {"a pair": pairs[0], "after a random linear layer": mixed, "then after SiLU": mixed / (1 + np.exp(-mixed))}
    fig, axes = panels(3, "A linear layer mixes frequencies.\nAn activation function creates new ones", 2.2)
    for axis, (name, signal) in zip(axes, stages.items()):
        amplitude = np.abs(np.fft.rfft(signal)) / N
        amplitude[1:-1] *= 2  # the other half is at negative frequencies
        lines = np.flatnonzero(amplitude > 1e-3)
        axis.vlines(lines, 1e-5, amplitude[lines], color="black", linewidth=2.5)
        axis.set(yscale="log", ylim=(5e-4, 20), xlim=(-6, N / 2), ylabel="amplitude")
        axis.set_title(f"{name}: {len(lines)} " + ("frequency" if len(lines) == 1 else "frequencies"))
    axes[-1].set_xlabel("frequency (cycles within N)")
    return fig


# ----------------------------------------------------------------------------------------------------------------------
# What FoPE's coefficients do


def mixture(sigma: float, seed: int, N: int) -> np.ndarray:
    """h(n) (N,) for two pairs with w = 1 and 0.1 and H = 1, and coefficients N(0, sigma). sigma 0 is RoPE."""
    shape = dict(n_head=1, head_dim=4, train_len=N, theta=100.0)
    cos, _ = FoPE(**shape, coef_init="normal", sigma=sigma, seed=seed).cos_sin(torch.arange(N), torch.float64)
    return cos[0].sum(-1).numpy()


def blind_coefficients(N: int = 512, sigma: float = 0.3, draws: int = 200) -> Figure:
    """The paper's Figure 3, with coefficients that are drawn without knowledge of the true mixture, as in use."""
    sigmas = sorted({0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, sigma})
    errors = np.zeros((len(sigmas), draws))
    for draw in range(draws):
        truth = mixture(sigma, 2 * draw + 1, N)
        errors[:, draw] = [np.sqrt(np.mean((mixture(own, 2 * draw, N) - truth) ** 2)) for own in sigmas]
    closer = (errors[sigmas.index(sigma)] < errors[0]).mean()
    title = f"Random coefficients do not model a mixture:\nFoPE is closer than RoPE in {closer:.0%} of {draws} draws"
    fig, (axis,) = panels(1, title)
    axis.plot(sigmas, np.median(errors, 1), "o-", **FOPE, label="FoPE: median, 5% to 95%")
    axis.fill_between(sigmas, *np.percentile(errors, [5, 95], axis=1), color=FOPE["color"], alpha=0.2)
    axis.plot(0, np.median(errors[0]), "s", color="black", markersize=9, zorder=3, label="RoPE")
    axis.set(xlabel="σ of FoPE's coefficients", ylabel="rms error of the logit", ylim=(0, None))
    axis.legend(loc="upper left")
    return fig


def departure(position: FoPE, T: int) -> float:
    """How far the logit is from a function of distance: 0 for RoPE, 1 for no dependence on distance at all.

    Let z_t be a pair's factor cos + i sin at position t. A query at s and a key at t contribute z_s conj(z_t). For
    q and k of independent standard normals, the mean square of the logit is the sum of its |.|^2 over the pairs. The
    result is exact: the root of the variance along the diagonals s - t = n over the mean square, for all heads.
    """
    cos, sin = position.cos_sin(torch.arange(T), torch.float64)  # (n_kv_head, T, M)
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
    """The logit of one q and one k at every pair of positions. A function of distance is constant along diagonals."""
    shape = dict(n_head=1, head_dim=head_dim, train_len=N, theta=theta, seed=0, sigma=sigma)
    fig, axes = panels(2, "FoPE's logit is not exactly a function of distance:\nits diagonals are not constant", 4)
    q, k = torch.randn(2, 1, 1, 1, head_dim, generator=torch.Generator().manual_seed(0))
    panel = {
        f"the default, σ {sigma:g}": FoPE(**shape),
        f"the paper's text, N(0, {sigma:g})": FoPE(**shape, coef_init="normal"),
    }
    for axis, (name, position) in zip(axes, panel.items()):
        qs, ks = position(q.expand(1, 1, 128, head_dim), k.expand(1, 1, 128, head_dim))
        past = np.where(np.tri(128, dtype=bool), (qs @ ks.mT / head_dim**0.5)[0, 0], np.nan)  # attention is causal
        image = axis.imshow((past - np.nanmean(past)) / np.nanstd(past), cmap="gray", vmin=-2.5, vmax=2.5)
        axis.set(xlabel="position of the key (tokens)", ylabel="position of the query (tokens)")
        axis.set_title(f"{name}: departure {departure(position, N):.2f}")
    fig.colorbar(image, ax=axes, label="logit (standard deviations)", shrink=0.6)
    return fig


# ----------------------------------------------------------------------------------------------------------------------
# The paper's Figures 8 and 7


def decay(N: int = 512, theta: float = 10_000.0, head_dim: int = 64) -> Figure:
    """The paper's Figure 8. For q and k of independent N(mean, 1), E h(n) = 2 mean^2 sum_m cos w_m n."""
    fig, (axis,) = panels(1, "RoPE's logit decays with distance only\nif the mean of q and k is not zero")
    n = torch.arange(4 * N)
    cos = RoPE(head_dim=head_dim, theta=theta).cos_sin(n, torch.float64)[0][0].numpy()  # (4 N, head_dim / 2)
    for mean, look in ((1.0, dict(color="0.6", linewidth=1)), (0.0, dict(color="black", linewidth=3))):
        axis.plot(n, 2 * mean**2 * cos.sum(-1) / head_dim**0.5, label=f"mean {mean:g}", **look)
    axis.set(xlabel="distance n in tokens", ylabel="mean logit")
    axis.legend()
    return fig


def trained_pairs(N: int = 512, theta: float = 10_000.0) -> Figure:
    """The paper's Figure 7 (there in Llama-2-7B)."""
    fig, axes = panels(2, "After training, |q| and |k| are smaller\nbelow the floor, on average", 2.8)
    for axis, run in zip(axes, json.loads((RESULTS / "qk_means.json").read_text(encoding="utf-8")).values()):
        pos = run["pos"]
        q, k = (np.array(run[name]) for name in ("q", "k"))  # (layers, heads, head_dim)
        q, k = (x.reshape(-1, 2, x.shape[-1] // 2).mean((0, 1)) for x in (q, k))  # pair m is (m, m + head_dim / 2)
        axis.plot(q, color="0.6", label="|q|")
        axis.plot(k, label="|k|", **(FOPE if pos == "fope" else dict(color="black", linewidth=2)))
        _, kept = kept_pairs(N, theta, 2 * len(k))
        axis.axvspan(kept.sum() - 0.5, len(kept) - 0.5, color="0.9")
        axis.set(xlabel="pair m (shaded: below the floor)", ylabel="mean")
        axis.set_title(f"{pos}, {run['step']} steps, seed {run['seed']}")
        axis.legend()
    return fig


def attention_on_key(runs: list[dict] | None = None) -> Figure:
    """The head whose share is largest at N, kept for all lengths. Mean over the seeds, and a band over their range.

    runs: what measure.attention_on_key() found in each model, by default the committed results.
    """
    finding = "" if runs else ". With it, FoPE's attention stays"
    fig, (axis,) = panels(1, f"Without log-n scaling, attention on the key\nfades beyond N{finding}", 4)
    runs = runs or json.loads((RESULTS / "attention.json").read_text(encoding="utf-8")).values()
    for pos, look in (("rope", dict(color="black", linewidth=2)), ("fope", FOPE)):
        for p in (0.0, 2.0):
            points = {}  # length: one share per seed
            for run in (run for run in runs if run["pos"] == pos):
                at_n = np.array(run["rows"][0]["share"])
                layer, head = np.unravel_index(at_n.argmax(), at_n.shape)
                for row in run["rows"]:
                    if set(row["p"]) == {p} or row["length"] == run["train_len"]:  # up to N, log n changes nothing
                        points.setdefault(row["length"], []).append(row["share"][layer][head])
            values, dash = list(points.values()), {} if p else dict(linestyle="--", linewidth=1.5)
            label = f"{pos}, p = 2" if p else f"{pos}, without log n"
            axis.plot(list(points), [np.mean(v) for v in values], label=label, marker="o", **look | dash)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(list(points), low, high, color=look["color"], alpha=0.15, linewidth=0)
    axis.set_title(f"mean of {len(values[0])} seeds; band: lowest to highest" if len(values[0]) > 1 else "one seed")
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(points), [str(length) for length in points])
    axis.set(xlabel="length in tokens", ylabel="share of the attention\non the key's digits", ylim=(-0.03, 1.03))
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    return fig


def page() -> str:
    """lesson/index.html with FoPE's defaults and the records of the tiny runs that differ in the embedding alone."""
    parameters = inspect.signature(FoPE).parameters
    defaults = {name: parameters[name].default for name in ("theta", "sigma", "coef_init", "zero_phase")}
    records = [record for record in plot.read(RESULTS / "tiny/eval.jsonl") if record["run"] == record["pos"]]
    lengths, runs = sorted({record["length"] for record in records}), []
    for some in plot.group(records).values():
        run = {"pos": some[0]["pos"], "p": some[0]["logn"], "seeds": len({record["seed"] for record in some})}
        for name in ("right", "perplexity"):  # at each length: mean, lowest and highest seed, or nothing
            seeds = [plot.values_of([r for r in some if r["length"] == length], name) for length in lengths]
            run[name] = [[round(float(f(x)), 2) for f in (np.mean, min, max)] if x else [] for x in seeds]
        runs.append(run)
    data = {"defaults": defaults, "N": records[0]["train_len"], "lengths": lengths, "runs": runs}
    text = re.sub(r"\.0\b", "", json.dumps(data, separators=(",", ":")))
    lines = re.sub("(.{1,119},)", r"\1\n", text)
    before, start, rest = PAGE.read_text(encoding="utf-8").partition('id="data">\n')
    return before + start + lines + "\n" + rest[rest.index("</script>") :]


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
    torch.set_num_threads(1)  # many small operations: more threads would wait for each other
    FOLDER.mkdir(exist_ok=True)
    explain = (frequencies, truncation, mixing, blind_coefficients, both_positions, decay)
    for draw in (*explain, trained_pairs, attention_on_key):
        draw().savefig(FOLDER / f"{draw.__name__}.png", dpi=200)
        print(f"written: {FOLDER / draw.__name__}.png")
    print("\ndeparture of the logit from a function of distance, N = 512, five draws: mean (range)")
    print("| model | σ | xavier (release) | normal (paper) |\n|---|---|---|---|")
    for name, preset in PRESETS.items():
        cfg, cells = GPTConfig(**preset), []
        for coef_init in ("xavier", "normal"):
            shape = dict(n_head=cfg.n_head, head_dim=cfg.d, sigma=cfg.sigma, coef_init=coef_init, train_len=512)
            found = [departure(FoPE(**shape, seed=seed), 512) for seed in range(5)]
            cells.append(f"{np.mean(found):.3f} ({min(found):.3f}-{max(found):.3f})")
        print(f"| {name} | {cfg.sigma} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
