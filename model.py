"""The GPT of the paper (Table 3): pre-norm RMSNorm, SwiGLU, no biases, no dropout, untied output.

    x = x + Attention(RMSNorm(x))        attention with the position embedding of fope.py on q and k
    x = x + MLP(RMSNorm(x))              MLP(x) = W_down (silu(W_gate x) * W_up x)
"""

import argparse
import ctypes
import functools
import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fope import POSITIONS, LearnedBias, PositionOptions

PRESETS = {  # the paper's names: its counts hold one of the two embedding matrices
    # init_std 0.02 is 0.45 / sqrt(width) at 60M. At width 128 it leaves attention so flat that retrieval starts late.
    "tiny": dict(n_layer=3, n_head=2, n_embd=128, n_hidden=512, init_std=0.06),
    "60M": dict(n_layer=8, n_head=8, n_embd=512, n_hidden=2048, sigma=0.3),
    "180M": dict(n_layer=8, n_head=8, n_embd=1024, n_hidden=4096, sigma=0.4),
    "1.2B": dict(n_layer=16, n_head=16, n_embd=2048, n_hidden=8192, sigma=0.6),
}


@dataclass
class GPTConfig(PositionOptions):
    """A model's shape, and, inherited, the options of its position embedding."""

    pos: str = "fope"  # position embedding: fope, rope, alibi, kerple, fire or nope
    qk_norm: bool = False  # q and k to mean 0 and variance 1 per head, before they are positioned
    n_layer: int = 3  # blocks
    n_head: int = 2  # attention heads
    n_embd: int = 128  # width
    n_hidden: int = 512  # width inside the MLP
    vocab_size: int = 50_304  # tokens, padded to a multiple of 64
    init_std: float = 0.02  # of every matrix at the start
    train_len: int = 512  # N, the training length in tokens; FoPE's floor is 2 pi / N
    seed: int = 0  # of weights, coefficients and data order

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


class Attention(nn.Module):
    def __init__(self, cfg: GPTConfig, layer: int):
        super().__init__()
        self.n_head, self.head_dim, self.qk_norm = cfg.n_head, cfg.head_dim, cfg.qk_norm
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        seed = cfg.seed * cfg.n_layer + layer + 1  # every layer has a draw of its own, and none shares the weights' seed
        self.position = POSITIONS[cfg.pos](cfg.n_head, cfg.head_dim, cfg.train_len, cfg, seed)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, self.head_dim).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = (F.layer_norm(x, [self.head_dim]).to(v.dtype) for x in (q, k))  # on a GPU, autocast norms in float32
        past = cache[0].shape[-2] if cache else 0
        assert past == 0 or T == 1, "with a cache, tokens come one by one"
        q, k = self.position(q, k, offset=past)
        if cache is not None:
            if past:
                k, v = torch.cat([cache[0], k], dim=-2), torch.cat([cache[1], v], dim=-2)
            cache[:] = k, v
        if isinstance(self.position, LearnedBias):
            y = torch.cat([self.biased(q, k, v, past, start) for start in range(0, T, 256)], dim=-2)
        else:
            if q.shape[-1] > v.shape[-1]:  # ALiBi's channels: q, k and v must have one size
                v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
            # The causal mask of this call is aligned to the upper left: a single query against a cache must see all of it.
            y = F.scaled_dot_product_attention(q, k, v, is_causal=past == 0, scale=self.head_dim**-0.5)
        return self.out(y[..., : self.head_dim].transpose(1, 2).reshape(B, T, C))

    def biased(self, q, k, v, past, start):
        """256 queries from `start` on, with the bias of KERPLE or FIRE: without gradients, a T x T tensor exists in such pieces alone."""
        q = q[..., start : start + 256, :]
        i = torch.arange(past + start, past + start + q.shape[-2], device=q.device)[:, None]
        j = torch.arange(past + start + q.shape[-2], device=q.device)
        bias = self.position.bias(i, j).masked_fill(j > i, -math.inf).to(q.dtype)
        return F.scaled_dot_product_attention(q, k[..., : len(j), :], v[..., : len(j), :], attn_mask=bias, scale=self.head_dim**-0.5)


class MLP(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.gate_up = nn.Linear(cfg.n_embd, 2 * cfg.n_hidden, bias=False)
        self.down = nn.Linear(cfg.n_hidden, cfg.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, cfg: GPTConfig, layer: int):
        super().__init__()
        self.norm1 = nn.RMSNorm(cfg.n_embd, eps=1e-6)
        self.attention = Attention(cfg, layer)
        self.norm2 = nn.RMSNorm(cfg.n_embd, eps=1e-6)
        self.mlp = MLP(cfg)

    def forward(self, x, cache=None):
        x = x + self.attention(self.norm1(x), cache)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """GPT(cfg)(tokens) -> logits (B, T, vocab_size); with targets (B, T) also the mean cross-entropy in nats.

    Every matrix starts from a normal with std init_std cut at three standard deviations, drawn under cfg.seed; the
    RMSNorm weights start at 1. Raises ValueError: unknown cfg.pos, n_head that does not divide n_embd, what fope.py refuses.
    """

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        if cfg.pos not in POSITIONS:
            raise ValueError(f"pos {cfg.pos!r} is unknown: use {', '.join(POSITIONS)}")
        if min(cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.n_hidden, cfg.vocab_size, cfg.train_len) < 1:
            raise ValueError("n_layer, n_head, n_embd, n_hidden, vocab_size and train_len must be at least 1")
        if cfg.n_embd % cfg.n_head:
            raise ValueError(f"n_head {cfg.n_head} does not divide n_embd {cfg.n_embd}")
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd, eps=1e-6)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        generator = torch.Generator().manual_seed(cfg.seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and ".position." not in name:
                nn.init.trunc_normal_(weight, std=cfg.init_std, a=-3 * cfg.init_std, b=3 * cfg.init_std, generator=generator)

    def n_params(self) -> int:
        """Parameters with one embedding matrix counted: the number in the paper's names, and in its 6 n D FLOPs."""
        return sum(p.numel() for p in self.parameters()) - self.embedding.weight.numel()

    def forward(self, tokens, targets=None, last: int = 0, cache: list | None = None):
        """tokens (B, T) int64. last=n: logits of the last n positions only. cache: new_cache(), filled in place."""
        x = self.embedding(tokens)
        for block, block_cache in zip(self.blocks, cache or [None] * len(self.blocks)):
            x = block(x, block_cache)
        logits = self.head(self.norm(x[:, -last:]))
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def new_cache(self) -> list:
        """An empty key-value cache: one list for each block, which becomes [keys, values]. Keys are positioned."""
        return [[] for _ in self.blocks]

    @torch.no_grad()
    def generate(self, tokens, n: int, temperature: float = 0.0, generator=None):
        """tokens (B, T) continued by n tokens: (B, T + n). temperature 0 takes the likeliest token each time."""
        cache = self.new_cache()
        step = tokens
        for _ in range(n):
            logits = self(step, last=1, cache=cache)[:, -1].float()
            if temperature:
                step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                step = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, step], dim=1)
        return tokens


def load_checkpoint(path: str | Path) -> dict:
    """What train.py saved in a file, or in a folder as ckpt.pt: step, config, tokenizer, model, optimizer.

    Raises ValueError for a file that is missing, damaged or something else.
    """
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}: train.py writes one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the zip reader and the unpickler each raise their own
        raise ValueError(f"{path} is not a whole checkpoint ({type(error).__name__}): copy or train it again") from error
    if not isinstance(checkpoint, dict) or not {"step", "config", "tokenizer", "model"} <= checkpoint.keys():
        raise ValueError(f"{path} is no checkpoint of train.py")
    return checkpoint


def load_model(path: str | Path) -> tuple[GPT, dict]:
    """The model of a checkpoint, ready to evaluate on the CPU, and the checkpoint. Raises ValueError."""
    checkpoint = load_checkpoint(path)
    names = {f.name for f in fields(GPTConfig)}
    try:
        model = GPT(GPTConfig(**{name: value for name, value in checkpoint["config"].items() if name in names}))
        model.load_state_dict(checkpoint["model"])
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the weights in {path} do not fit its own configuration: train it again") from error
    return model.eval(), checkpoint


def find_device(device: str = "auto", dtype: str = "auto"):
    """The device to use, the name of its arithmetic, and the autocast context for it. Raises ValueError.

    auto: cuda, else mps, else cpu; bfloat16 where the hardware computes in it, else float32 (always on mps).
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":  # one card a process: torchrun numbers the processes of a machine
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        found = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} does not work here: {str(error).splitlines()[0][:100]}") from error
    if found.type == "cpu" and sys.platform == "linux":
        # glibc gives a large tensor's memory back to the kernel at once, which zeroes the next one's page by page: a third
        # of a 60M step. Keep it: no memory maps (M_MMAP_MAX 0), no trimming (M_TRIM_THRESHOLD -1).
        keep = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have no such call, or no such habit
        if keep:
            keep(-4, 0)
            keep(-1, -1)
    if found.type == "cuda":
        torch.cuda.set_device(found)
        has_bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    else:
        flags = getattr(torch.cpu, "get_capabilities", dict)() if found.type == "cpu" else {}
        has_bfloat16 = flags.get("avx512_bf16") or flags.get("amx_bf16")
    if dtype == "auto":
        dtype = "bfloat16" if has_bfloat16 else "float32"
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype {dtype!r} is unknown: use auto, bfloat16 or float32")
    return found, dtype, functools.partial(torch.autocast, found.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def main(argv: list[str]) -> None:
    """python model.py CHECKPOINT PROMPT: continue a text, to see what a model learned."""
    from data.files import fail  # nothing but this command needs a tokenizer
    from data.tokenizer import get_tokenizer

    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.error = fail
    parser.add_argument("checkpoint", help="folder or file that train.py wrote")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="how many tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        model, checkpoint = load_model(args.checkpoint)
    except ValueError as error:
        fail(str(error))
    tokenizer = get_tokenizer(checkpoint["tokenizer"], checkpoint["config"]["data"])
    prompt = tokenizer.encode_ordinary(args.prompt)
    if not prompt:
        fail("the prompt is empty: give it at least one character")
    generator = torch.Generator().manual_seed(args.seed)
    tokens = model.generate(torch.tensor([prompt]), args.tokens, args.temperature, generator)[0].tolist()
    print(tokenizer.decode([t for t in tokens if t < tokenizer.n_vocab]))


if __name__ == "__main__":
    main(sys.argv[1:])
