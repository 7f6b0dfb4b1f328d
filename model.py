"""The GPT of the paper (Table 3): pre-norm RMSNorm, SwiGLU, no biases, no dropout.

    x = x + Attention(RMSNorm(x))        attention, with a position embedding on q and k
    x = x + MLP(RMSNorm(x))              MLP(x) = W_down (silu(W_gate x) * W_up x)

Shapes: B sequences, T tokens, C = n_embd channels, H = n_head query heads, K = n_kv_head key heads, d = head_dim.
"""

import functools
import math
import pickle
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from baselines import FIRE, KERPLE, scaled, whole_cycles
from common import UserError, at_least, one_of
from fope import ALiBi, FoPE, NoPE, RoPE, log_n, rope_frequencies

POSITIONS = ("fope", "rope", "alibi", "kerple", "fire", "nope")
SCALINGS = ("none", "linear", "yarn", "llama3")
PRESETS = {  # the paper's names count one embedding matrix
    # The paper's init_std 0.02 is 0.45 / sqrt(n_embd) at 60M. At width 128 it is too small: retrieval starts late.
    "tiny": dict(n_layer=3, n_head=2, n_embd=128, n_hidden=256, init_std=0.06),  # heads of 64, as in 60M
    "60M": dict(n_layer=8, n_head=8, n_embd=512, n_hidden=2048, sigma=0.3),
    "180M": dict(n_layer=8, n_head=8, n_embd=1024, n_hidden=4096, sigma=0.4),
    "1.2B": dict(n_layer=16, n_head=16, n_embd=2048, n_hidden=8192, sigma=0.6),
}
PRESETS["60M-short"] = PRESETS["60M"]  # train.py has another recipe for it


@dataclass
class GPTConfig:
    """A model's shape and its position embedding: all that model.py reads. A checkpoint's model is rebuilt from it."""

    # model
    n_layer: int = 3  # blocks
    n_head: int = 4  # query heads
    n_kv_head: int = 0  # key-value heads; 0: as many as query heads
    head_dim: int = 0  # d, size of a head; 0: n_embd / n_head
    n_embd: int = 128  # width
    n_hidden: int = 512  # width inside the MLP
    vocab_size: int = 50_304  # tokens, padded to a multiple of 64
    tied: bool = False  # use the embedding matrix as the output matrix
    norm_eps: float = 1e-6  # epsilon of RMSNorm
    init_std: float = 0.02  # standard deviation of every matrix at the start
    train_len: int = 512  # N, the training length in tokens
    seed: int = 0  # seed of weights, coefficients and data order
    # position
    pos: str = "fope"  # position embedding: fope, rope, alibi, kerple, fire or nope
    theta: float = 10_000.0  # base of RoPE's and FoPE's frequencies
    sigma: float = 0.3  # size of FoPE's random coefficients
    coef_init: str = "xavier"  # what sigma is: xavier (the release's gain) or normal (the standard deviation)
    n_freqs: int = 0  # D, frequencies in FoPE's series; 0: the kept ones
    fourier_series: bool = True  # FoPE's series (FS in the paper)
    clip_floor: bool = True  # FoPE's clipping (CF in the paper)
    zero_phase: bool = False  # clipped pairs: false is the release (cos = sin = 1), true is Eq. 13 (sin = 0)
    whole_cycles: bool = False  # RoPE-A: move each frequency to a whole number of cycles in N
    scaling: str = "none"  # scale the frequencies: none, linear (position interpolation), yarn or llama3
    scale: float = 16.0  # factor of --scaling: how many times longer the text is than in training
    original_len: int = 512  # the training length before scaling, for yarn and llama3
    qk_norm: bool = False  # normalize q and k to mean 0 and variance 1 per head
    logit_scale: float = 1.0  # factor on q, for example YaRN's inverse temperature, (0.1 ln(scale) + 1)^2
    logn: float = 0.0  # p: a query that sees n > N keys is multiplied by (log n / log N)^p; 0: off

    @property
    def d(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    def __post_init__(self):
        """Raises UserError for a model that cannot be built."""
        at_least(self, 1, "n_layer n_head n_embd n_hidden train_len theta scale original_len")
        at_least(self, 0, "seed sigma logn n_kv_head head_dim n_freqs vocab_size norm_eps init_std logit_scale")
        one_of(self, pos=POSITIONS, scaling=SCALINGS, coef_init=("xavier", "normal"))
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(f"--n_head {self.n_head} must divide --n_embd {self.n_embd}, unless --head_dim is given")
        if self.n_head % self.kv_heads:
            raise UserError(f"--n_kv_head {self.n_kv_head} must divide --n_head {self.n_head}")
        if self.pos in ("fope", "rope") and self.d % 2:
            raise UserError(f"--head_dim {self.d} must be even: {self.pos} rotates pairs of dimensions")
        if self.scaling == "yarn" and (self.theta <= 1 or self.whole_cycles):
            raise UserError("--scaling=yarn needs --theta above 1, and no --whole_cycles")
        if self.pos == "fope":
            floor = 2 * math.pi / self.train_len if self.clip_floor else 0
            kept = int((frequencies(self) >= floor).sum())
            if not kept:
                raise UserError(f"--train_len {self.train_len} is too short: use a longer one, or --clip_floor=false")
            if self.n_freqs and (self.n_freqs < kept or not self.fourier_series):
                raise UserError(f"--n_freqs {self.n_freqs} must be 0, or at least the {kept} kept ones, with a series")


FOPE_OPTIONS = ("train_len", "sigma", "coef_init", "n_freqs", "fourier_series", "clip_floor", "zero_phase")


def frequencies(cfg: GPTConfig) -> torch.Tensor:
    """The (d/2,) frequencies of RoPE or FoPE, before FoPE clips any."""
    omega = rope_frequencies(cfg.d, cfg.theta)
    if cfg.whole_cycles:
        omega = whole_cycles(omega, cfg.train_len)
    return scaled(omega, cfg.scaling, cfg.scale, cfg.original_len, head_dim=cfg.d, theta=cfg.theta)


def position_seed(cfg: GPTConfig, layer: int) -> int:
    """Differs from layer to layer, and from the seed of the weights."""
    return cfg.seed * cfg.n_layer + layer + 1


def position_embedding(cfg: GPTConfig, layer: int) -> nn.Module:
    """The position embedding of one layer. To add your own, name it in POSITIONS and build it here.

    `q, k = position(q, k, positions)` is called before the cache, and may append channels to q and k. Two methods
    are optional, as in baselines.py. `position.bias(i, j)` is added to the logits of queries i and keys j: integer
    tensors (Tq, 1) and (Tk,) give (n_head, Tq, Tk); with left padding, a batch dimension comes first. Keys with j > i
    are masked afterwards. `position.constrain()` is called after each optimizer step. Draw parameters with a
    generator seeded with `seed`: init_std does not apply to them.
    """
    seed = position_seed(cfg, layer)
    if cfg.pos == "nope":
        return NoPE()
    if cfg.pos == "alibi":
        return ALiBi(n_head=cfg.n_head, head_dim=cfg.d)
    if cfg.pos == "kerple":
        return KERPLE(n_head=cfg.n_head, seed=seed)
    if cfg.pos == "fire":
        return FIRE(n_head=cfg.n_head, seed=seed)
    omega = frequencies(cfg)
    if cfg.pos == "rope":
        return RoPE(head_dim=cfg.d, omega=omega)
    if cfg.pos == "fope":
        options = {name: getattr(cfg, name) for name in FOPE_OPTIONS}
        heads = dict(n_head=cfg.n_head, n_kv_head=cfg.kv_heads, head_dim=cfg.d)
        return FoPE(**heads, omega=omega, seed=seed, **options)
    raise NotImplementedError(f"{cfg.pos!r} is in POSITIONS, but position_embedding() does not build it")


class Attention(nn.Module):
    def __init__(self, cfg: GPTConfig, layer: int):
        super().__init__()
        self.cfg = cfg
        self.qkv = nn.Linear(cfg.n_embd, (cfg.n_head + 2 * cfg.kv_heads) * cfg.d, bias=False)
        self.out = nn.Linear(cfg.n_head * cfg.d, cfg.n_embd, bias=False)
        self.position = position_embedding(cfg, layer)

    def forward(self, x, positions=None, logn=0.0, pads=None, cache=None):
        (B, T, _), cfg, d = x.shape, self.cfg, self.cfg.d
        heads = self.qkv(x).view(B, T, -1, d).transpose(1, 2)  # (B, H + 2 K, T, d)
        q, k, v = heads.split([cfg.n_head, cfg.kv_heads, cfg.kv_heads], dim=1)
        if cfg.qk_norm:
            # On a GPU, autocast makes layer_norm return float32.
            q, k = (F.layer_norm(x, [d]).to(v.dtype) for x in (q, k))
        if cfg.logit_scale != 1:
            q = q * cfg.logit_scale
        if logn:  # a bias (ALiBi, KERPLE, FIRE) is added later and stays as it is
            q = log_n(q, positions, cfg.train_len, logn)
        q, k = self.position(q, k, positions)
        if cache:  # [] is a cache that is still empty
            k, v = torch.cat([cache[0], k], dim=-2), torch.cat([cache[1], v], dim=-2)  # (B, K, past + T, d)
        if cache is not None:
            cache[:] = k, v
        v = F.pad(v, (0, q.shape[-1] - d))  # ALiBi appends channels; fused kernels want q, k and v of one size

        past, bias = k.shape[-2] - T, getattr(self.position, "bias", None)
        options = dict(scale=d**-0.5, enable_gqa=cfg.n_head != cfg.kv_heads)
        if bias or pads is not None or (past and T > 1):
            y = self.masked(q, k, v, past, pads, bias, options)
        else:  # a single query sees all keys of a cache; is_causal would let it see the first key only
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, **options)
        return self.out(y[..., :d].transpose(1, 2).reshape(B, T, -1))

    def masked(self, q, k, v, past, pads, bias, options):
        """Attention where the fused causal call does not fit: left padding, later chunks of a cache, biases.

        It takes 256 queries at a time, so that evaluation never holds a mask for all of them.
        """
        pieces, first = [], 0 if pads is None else pads.view(-1, 1, 1)
        for start in range(past, k.shape[-2], 256):
            piece = q[..., start - past : start - past + 256, :]
            end = start + piece.shape[-2]
            i = torch.arange(start, end, device=q.device)[:, None]  # (Tq, 1)
            j = torch.arange(end, device=q.device)  # (Tk,)
            visible = (j <= i) & ((j >= first) | (j == i))  # pads see themselves: a row without any key would be NaN
            mask = visible.unsqueeze(-3)  # (1, Tq, Tk) or (B, 1, Tq, Tk)
            if bias:
                added = bias(i - first, j - first)
                if added.shape[-3:] != (q.shape[1], *mask.shape[-2:]):  # another shape might broadcast silently
                    raise ValueError(f"bias(i, j) is {tuple(added.shape)}, not (.., {q.shape[1]}, {len(i)}, {len(j)})")
                mask = added.masked_fill(~mask, -math.inf).to(q.dtype)
            pieces.append(F.scaled_dot_product_attention(piece, k[..., :end, :], v[..., :end, :], mask, **options))
        return torch.cat(pieces, dim=-2)


class MLP(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.gate_up = nn.Linear(cfg.n_embd, 2 * cfg.n_hidden, bias=False)
        self.down = nn.Linear(cfg.n_hidden, cfg.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, n_hidden) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, cfg: GPTConfig, layer: int):
        super().__init__()
        self.norm1 = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.attention = Attention(cfg, layer)
        self.norm2 = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, positions=None, logn=0.0, pads=None, cache=None):
        x = x + self.attention(self.norm1(x), positions, logn, pads, cache)
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def draw_weights(weight: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Draws from a normal distribution, and redraws values beyond three standard deviations.

    These are the numbers of nn.init.trunc_normal_ in torch 2.13. Older versions draw different ones from the same seed.
    """
    weight.normal_(0, std, generator=generator)
    while (far := weight.abs() > 3 * std).any():
        weight[far] = torch.empty_like(weight).normal_(0, std, generator=generator)[far]


class GPT(nn.Module):
    """GPT(cfg)(tokens) returns logits (B, T, vocab_size). GPT(cfg)(tokens, targets) returns the mean loss in nats.

    Every matrix is drawn with cfg.seed from a normal distribution of standard deviation init_std, truncated at three
    times that. RMSNorm weights start at 1. `logn` is the exponent of log-n scaling, which may be changed at test time.
    """

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg, self.logn, self.recompute = cfg, cfg.logn, False
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tied:
            self.head.weight = self.embedding.weight
        generator = torch.Generator().manual_seed(cfg.seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and ".position." not in name and not weight.is_meta:
                draw_weights(weight, cfg.init_std, generator)

    def n_params(self) -> int:
        """Parameters, counting one embedding matrix, as in the paper's names and in 6 FLOPs per parameter and token."""
        both = self.embedding.weight is not self.head.weight
        return sum(p.numel() for p in self.parameters()) - both * self.embedding.weight.numel()

    def forward(self, tokens, targets=None, last: int = 0, cache: list | None = None, pads=None):
        """tokens, targets (B, T) int64. last=n: logits of the last n positions only.

        cache: new_cache(), filled in place. Each call appends its T tokens; T may vary.
        pads: (B,) int64, how many tokens at the start of each row are left padding. Attention does not see them.
        """
        T, past = tokens.shape[1], cache[0][0].shape[-2] if cache and cache[0] else 0
        positions = torch.arange(past, past + T, device=tokens.device)
        if pads is not None:
            positions = (positions - pads[:, None]).clamp(min=0)  # (B, T)
        x = self.embedding(tokens)  # (B, T, C)
        for block, layer_cache in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            if self.recompute and torch.is_grad_enabled() and cache is None:
                block = functools.partial(torch.utils.checkpoint.checkpoint, block, use_reentrant=False)
            x = block(x, positions, self.logn, pads, layer_cache)
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, -last:])  # (B, last, vocab_size); -0: takes all T
        x, targets = x.flatten(0, 1), targets.flatten()  # (B T, C), (B T,)
        if torch.is_grad_enabled():
            return F.cross_entropy(self.head(x).float(), targets)
        # Evaluation takes 256 positions at a time: the logits of a long text would take gigabytes.
        loss = torch.zeros((), device=x.device)
        for piece, target in zip(x.split(256), targets.split(256)):
            loss += F.cross_entropy(self.head(piece).float(), target) * (len(target) / len(targets))
        return loss

    def constrain(self) -> None:
        """Brings the parameters of the position embeddings back within bounds. Call it after each optimizer step."""
        for block in self.blocks:
            getattr(block.attention.position, "constrain", lambda: None)()

    def new_cache(self) -> list:
        """An empty key-value cache: a list per block, which becomes [keys, values], (B, K, tokens so far, d) each."""
        return [[] for _ in self.blocks]

    @torch.no_grad()
    def generate(self, tokens, n: int, *, pads=None, temperature=0.0, top_k=0, seed=0):
        """Appends n tokens to tokens (B, T). Returns (B, T + n).

        pads: (B,) tokens of left padding per row.
        temperature: 0 takes the most likely token. top_k: sample only from the k most likely tokens; 0 is all.
        """
        if not 0 <= temperature < math.inf or top_k < 0:
            raise ValueError(f"temperature {temperature} and top_k {top_k} must be 0 or more")
        generator = torch.Generator(tokens.device).manual_seed(seed)
        cache, step = self.new_cache(), tokens
        for _ in range(n):
            logits = self(step, last=1, cache=cache, pads=pads)[:, -1].float()  # (B, vocab_size)
            if top_k:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature:
                logits = logits - logits.amax(-1, keepdim=True)  # so that a tiny temperature cannot overflow
                step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                step = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, step], dim=1)
        return tokens


def load_checkpoint(path: str | Path) -> dict:
    """The dict that train.py saved in a file, or as ckpt.pt in a folder, with that folder added as "folder".

    The tensors are mapped from the file, so they take no memory until they are used. Raises UserError.
    """
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train.py writes one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a whole checkpoint ({type(error).__name__}): train again") from error
    if not isinstance(checkpoint, dict) or not {"step", "config", "tokenizer", "model"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of train.py: name a run folder")
    return checkpoint | {"folder": str(path.parent)}


def load_model(path: str | Path) -> tuple[GPT, dict]:
    """The model of a checkpoint, ready to evaluate on the CPU, and the checkpoint. Raises UserError."""
    checkpoint = load_checkpoint(path)
    names = {f.name for f in fields(GPTConfig)}
    model = GPT(GPTConfig(**{name: value for name, value in checkpoint["config"].items() if name in names}))
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint


@torch.no_grad()
def keep_coefficients(coef: torch.Tensor, trained: torch.Tensor) -> None:
    """Copy FoPE's coefficients (2, n_kv_head, D, M) of the pairs and frequencies that both tensors have.

    A different N keeps a different number of frequencies. Both lists begin with the highest frequency, so the shared
    coefficients are in the upper left corner, as in the release.
    """
    M = min(coef.shape[-1], trained.shape[-1])
    coef[..., :M, :M] = trained[..., :M, :M]


def scale_frequencies(model: GPT, scaling: str, scale: float) -> None:
    """Scale the frequencies of a trained model with RoPE or FoPE. Raises UserError.

    The order is that of position_embedding: frequencies are scaled, then FoPE clips those below the floor of N. A pair
    that is kept before and after keeps its coefficients.
    """
    if model.cfg.pos not in ("rope", "fope") or model.cfg.scaling != "none":
        raise UserError(
            f"--scaling needs a model with rope or fope that was trained without it, not {model.cfg.pos} "
            f"with --scaling={model.cfg.scaling}"
        )
    model.cfg = replace(model.cfg, scaling=scaling, scale=scale, original_len=model.cfg.train_len)
    for layer, block in enumerate(model.blocks):
        trained, block.attention.position = block.attention.position, position_embedding(model.cfg, layer)
        if (coef := getattr(block.attention.position, "coef", None)) is not None:
            keep_coefficients(coef, trained.coef)
