"""Train a GPT, on one process or on many through torchrun. Then evaluate it.

    python train.py                                  the tiny preset on the built-in corpus
    python train.py --pos=rope --seed=1              every field of TrainConfig and GPTConfig is a flag
    torchrun --standalone --nproc_per_node=4 train.py --model=60M --data=data/c4
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py --model=60M

The last command runs on each of two machines. Both need the data, and a disk that they share for --out. SIGTERM, SIGHUP
and SIGUSR1 save a checkpoint and stop. torchrun forwards all of them, if given
--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1.

The order of the data depends on the seed and the step alone. So a resumed run continues bit for bit, and 1, 2 or 4
processes train the same model up to rounding.
"""

import argparse
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import eval_passkey
import plot
from data import prepare
from data.files import LAUNCHER, fail, lock, replace_file, say
from data.passkey import passkey_document
from data.tokenizer import get_tokenizer
from model import GPT, PRESETS, GPTConfig, find_device, load_checkpoint

# How a preset is trained. The paper's recipe (App. A.3) is 10B tokens in steps of 524 288.
PAPER = dict(data="data/c4", batch_tokens=524_288, steps=19_073, lr=6e-4, warmup=10_000)
RECIPES = {
    "tiny": dict(optimizer="muon", final_lr=0.0, log_every=100),
    "60M": PAPER | dict(micro_tokens=65_536),  # what fits a card of 48 GB. Less does not change the result
    "180M": PAPER | dict(micro_tokens=16_384),
    "1.2B": PAPER | dict(micro_tokens=8192),
}
COMPARED = ("rope", "alibi", "kerple")  # whose committed results the miniature's figure shows
PEAK = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12, "RTX A6000": 154.8e12}  # dense bfloat16 FLOP/s


@dataclass
class TrainConfig(GPTConfig):
    """Every field is a flag, and the comment beside it is the flag's help. The same holds for GPTConfig in model.py."""

    # training
    model: str = "tiny"  # preset that sets the model's shape and the recipe: tiny, 60M, 180M or 1.2B
    vocab_size: int = 0  # tokens in the vocabulary; 0: those of the data, padded to a multiple of 64
    data: str = "data/builtin"  # folder with train.bin and val.bin
    out: str = ""  # folder for checkpoint, log and evaluation; empty: out/MODEL-POS-sSEED
    resume: bool = False  # continue from the checkpoint in out
    init_from: str = ""  # checkpoint to take the weights and the model's flags from; --pos may differ
    steps: int = 3000  # optimizer steps
    batch_tokens: int = 2048  # tokens per step, over all processes
    micro_tokens: int = 4096  # maximum tokens per micro-batch and process
    lr: float = 2e-3  # learning rate after warmup
    final_lr: float = 0.1  # share of lr that a cosine decays to
    warmup: int = 200  # steps of linear warmup
    optimizer: str = "adamw"  # adamw for all parameters (the paper's), or muon for the matrices in the blocks
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    weight_decay: float = 0.1  # on every parameter, as in the paper
    clip: float = 1.0  # maximum gradient norm
    # logging
    log_every: int = 10  # steps between log lines
    eval_every: int = 500  # steps between validations
    save_every: int = 500  # steps between checkpoints
    eval_tokens: int = 65_536  # validation tokens for the validation loss
    eval_trials: int = 50  # passkey trials per length in the evaluation after training; 0: no evaluation
    wandb: bool = False  # log to Weights & Biases too
    # machine
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: str = "auto"  # auto (bfloat16 autocast where the hardware has it), bfloat16 or float32
    recompute: bool = False  # recompute each block in the backward pass: less memory, a third more time
    compile: str = "auto"  # torch.compile: auto (where it works), on or off


# A resumed run may change these. Everything else changes what is computed.
FREE = {"resume", "init_from", "data", "out", "micro_tokens", "log_every", "eval_every", "save_every", "eval_tokens",
        "eval_trials", "device", "dtype", "compile", "recompute", "wandb"}  # fmt: skip
CHANGEABLE = ("steps", "lr", "warmup")  # and these, if the command line gives them again: a run can be made longer
AT_LEAST = {"n_layer": 1, "n_head": 1, "n_embd": 1, "n_hidden": 1, "train_len": 1, "steps": 1, "batch_tokens": 1,
            "micro_tokens": 1, "log_every": 1, "eval_every": 1, "save_every": 1, "seed": 0, "warmup": 0,
            "eval_trials": 0, "weight_decay": 0, "lr": 0, "final_lr": 0, "beta1": 0, "beta2": 0, "clip": 0,
            "logn": 0}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Flags


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parse_flags(argv: list[str]) -> dict:
    """The flags that the command line gives, as --name=value or --name value, and the folder `out` that they mean."""
    about = f"{__doc__.splitlines()[0]} --model changes some of these defaults: see RECIPES, and PRESETS in model.py."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; python train.py --help lists the flags")
    types, group = {f.name: f for f in fields(TrainConfig)}, None
    for line in [line for cls in (TrainConfig, GPTConfig) for line in inspect.getsource(cls).splitlines()]:
        if heading := re.fullmatch(r"    # (\w+)", line):
            group = parser.add_argument_group(heading[1])
        field = re.fullmatch(r"    (\w+): .*?  # (.*)", line)
        if not field or field[1] not in types:
            continue
        f = types.pop(field[1])
        kind = dict(type=boolean, nargs="?", const=True) if f.type is bool else dict(type=f.type)
        text = f"{field[2]} ({f.type.__name__}, default {f.default!r})".replace("%", "%%")
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar="", help=text, **kind)
    flags = vars(parser.parse_args(argv))
    named = {"model": "tiny", "pos": "fope", "seed": 0} | flags
    return flags | {"out": flags.get("out") or f"out/{named['model']}-{named['pos']}-s{named['seed']}"}


def configure(flags: dict, checkpoint: dict | None = None, source: dict | None = None) -> TrainConfig:
    """A flag wins over the preset, and the preset over the default.

    checkpoint: of the run that is resumed. It takes the place of the preset. source: the one that --init_from names. It
    takes the preset's place for the model's shape and position embedding.
    """
    preset = flags.get("model", "tiny")
    if preset not in PRESETS:
        fail(f"model {preset!r} is unknown: use {', '.join(PRESETS)}")
    saved = checkpoint["config"] if checkpoint else PRESETS[preset] | RECIPES[preset]
    if source:
        model = {f.name for f in fields(GPTConfig)} - {"seed"}
        saved = saved | {name: value for name, value in source["config"].items() if name in model}
    cfg = TrainConfig(**{f.name: saved[f.name] for f in fields(TrainConfig) if f.name in saved} | flags)
    for name, least in AT_LEAST.items():
        if not least <= getattr(cfg, name) < math.inf:
            fail(f"--{name} must be at least {least}")
    if not cfg.clip or max(cfg.beta1, cfg.beta2) >= 1:
        fail("--clip must be above 0, and --beta1 and --beta2 less than 1")
    if cfg.eval_tokens < cfg.train_len:
        fail(f"--eval_tokens must be at least --train_len, {cfg.train_len}")
    if cfg.compile not in ("auto", "on", "off"):
        fail(f"compile {cfg.compile!r} is unknown: use auto, on or off")
    if cfg.optimizer not in ("adamw", "muon"):
        fail(f"optimizer {cfg.optimizer!r} is unknown: use adamw or muon")
    return cfg


# ----------------------------------------------------------------------------------------------------------------------
# The machine


def one_line(error: Exception) -> str:
    """Type and first line of an error: some have no message, and some have pages."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].removesuffix(": ")


class Machine:
    """The device, the dtype, and this process among the others."""

    def __init__(self, cfg: TrainConfig):
        missing = [name for name in LAUNCHER if name not in os.environ]
        if 0 < len(missing) < len(LAUNCHER):
            fail(f"the environment has no {' and no '.join(missing)}: a launcher sets all of {', '.join(LAUNCHER)}")
        try:
            self.device, dtype, self.autocast = find_device(cfg.device, cfg.dtype)
        except ValueError as error:
            fail(str(error))
        cuda, why = self.device.type == "cuda", ""
        self.compile = cfg.compile == "on" or (cfg.compile == "auto" and self.device.type != "mps")
        if self.compile:
            try:
                torch.compile(torch.sin)(torch.zeros(8, device=self.device))
            except Exception as error:  # no C++ compiler, no Triton, a Python too new: each has its own exception
                self.compile, why = False, f"torch.compile does not work here: {one_line(error)}"
        if why and cfg.compile == "on":
            fail(why)
        self.rank, self.world = 0, 1
        if not missing:
            try:
                dist.init_process_group("nccl" if cuda else "gloo")
            except (ValueError, RuntimeError) as error:
                fail(f"the processes cannot find each other: {one_line(error)}")
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.main = self.rank == 0
        name = torch.cuda.get_device_name() if cuda else self.device.type
        self.peak = next((flops for card, flops in PEAK.items() if card in name and dtype == "bfloat16"), None)
        backend = f", {self.world} processes over {dist.get_backend()}" if dist.is_initialized() else ""
        self.say(f"device {name}, {dtype}, {'compiled' if self.compile else 'eager'}{why and f' ({why})'}{backend}")

    def say(self, text: str) -> None:
        if self.main:
            say(text)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes. This is also how they agree to stop."""
        if not dist.is_initialized():
            return list(values)
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        total = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Data


def load_data(cfg: TrainConfig, machine: Machine) -> tuple[np.ndarray, np.ndarray, dict]:
    """Training tokens, validation tokens and meta.json. Sets cfg.vocab_size. Refuses what would fail hours later."""
    folder = Path(cfg.data)
    if folder == Path("data/builtin") and not folder.exists() and os.environ.get("LOCAL_RANK", "0") == "0":
        machine.say("making the built-in corpus")
        prepare.builtin(folder)
    machine.sum(0)  # the other processes wait until it is there
    tokens, meta = prepare.load(cfg.data, "train")
    val_tokens, _ = prepare.load(cfg.data, "val")
    cfg.vocab_size = cfg.vocab_size or -(-meta["vocab_size"] // 64) * 64
    for name, array in (("train", tokens), ("val", val_tokens)):
        if len(array) <= cfg.train_len:
            fail(f"{cfg.data}/{name}.bin has {len(array)} tokens: a sequence takes --train_len plus one")
        if array.max() >= cfg.vocab_size:
            fail(f"{cfg.data}/{name}.bin has token {array.max()}, outside the vocabulary of {cfg.vocab_size}")
    if cfg.eval_trials:
        other = "use another --train_len, or --eval_trials=0 to train without the evaluation"
        try:
            passkey_document(get_tokenizer(meta["tokenizer"], cfg.data), cfg.train_len, 12_345, 0.5)
        except ValueError as error:
            fail(f"{error}: {other}")
        if len(val_tokens) <= 16 * cfg.train_len:
            fail(f"{cfg.data}/val.bin has {len(val_tokens)} tokens, the evaluation takes 16 x --train_len + 1: {other}")
    return tokens, val_tokens, meta


def split_batch(cfg: TrainConfig, machine: Machine) -> tuple[int, int]:
    """Sequences per step on this process, and how many of them make a micro-batch."""
    share, remainder = divmod(cfg.batch_tokens, cfg.train_len * machine.world)
    if remainder or not share:
        unit = f"{cfg.train_len} tokens x {machine.world} processes"
        fail(f"--batch_tokens {cfg.batch_tokens} is not a multiple of {unit}")
    largest = min(share, max(cfg.micro_tokens // cfg.train_len, 1))
    return share, next(micro for micro in range(largest, 0, -1) if share % micro == 0)


@functools.lru_cache(maxsize=2)  # a batch may contain the end of one epoch and the start of the next
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_sequences(seed: int, step: int, batch: int, n: int) -> np.ndarray:
    """Which of the n sequences are in global batch `step`. Each occurs once per epoch, reshuffled every epoch."""
    epoch, place = np.divmod(np.arange(step * batch, (step + 1) * batch), n)
    return np.concatenate([permutation(seed, int(e), n)[place[epoch == e]] for e in np.unique(epoch)])


def take(tokens: np.ndarray, sequences: np.ndarray, T: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T) int64: sequence i is tokens[i T : i T + T], and its targets are one further."""
    both = torch.from_numpy(tokens[sequences[:, None] * T + np.arange(T + 1)].astype(np.int64))
    if device.type == "cuda":
        both = both.pin_memory()
    both = both.to(device, non_blocking=True)
    return both[:, :-1], both[:, 1:]


def micro_batches(tokens: np.ndarray, step: int, cfg: TrainConfig, machine: Machine) -> list:
    """This process's part of global batch `step`: a list of (inputs, targets)."""
    share, micro = split_batch(cfg, machine)
    n_sequences = (len(tokens) - 1) // cfg.train_len
    mine = batch_sequences(cfg.seed, step, share * machine.world, n_sequences)[machine.rank * share :][:share]
    return [take(tokens, mine[i : i + micro], cfg.train_len, machine.device) for i in range(0, share, micro)]


# ----------------------------------------------------------------------------------------------------------------------
# Model, checkpoint and log


def initial_weights(model: GPT, source: dict, path: str) -> str:
    """Load a checkpoint's weights, and the state of its position embedding where both have it. Raises ValueError."""
    saved, own = source["model"], model.state_dict()
    weights = {name: x for name, x in saved.items() if ".position." not in name}
    expected = {name: x.shape for name, x in own.items() if ".position." not in name}
    if {name: x.shape for name, x in weights.items()} != expected or source["config"]["n_head"] != model.cfg.n_head:
        raise ValueError(f"{path} has another shape: leave out the flags that change the model")
    kept = {name: x for name, x in saved.items() if ".position." in name and name in own}
    for name, x in kept.items():
        if x.shape != own[name].shape:
            # FoPE's coefficients (.., D, M): at another N, another number of frequencies is kept. Both lists begin with
            # the highest one. Those in both lists keep their coefficients, as in the release. The rest is as drawn.
            M = min(x.shape[-1], own[name].shape[-1])
            kept[name] = own[name].clone()
            kept[name][..., :M, :M] = x[..., :M, :M]
    model.load_state_dict(own | weights | kept)
    drawn = any(name not in saved or saved[name].shape != x.shape for name, x in own.items() if ".position." in name)
    return f"weights from {path}" + (", missing position coefficients drawn anew" if drawn else "")


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): each update of a matrix is its momentum, made orthogonal by five Newton-Schulz steps.

    This is torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (Liu et al., arXiv 2502.16982). The factor 0.2 sqrt(n)
    gives the update the size of AdamW's, so that both take the same lr and weight decay. torch's products are always
    bfloat16, which makes a tiny step 2.5 times slower on a CPU without it. Ours follow autocast.
    """

    def __init__(self, params, lr: float, weight_decay: float):
        shapes = {}  # matrices of one shape are one parameter group, whose products are one batched call
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        super().__init__([{"params": some} for some in shapes.values()], dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            grad = torch.stack([p.grad for p in group["params"]])  # (matrices, rows, columns)
            momentum = self.state[group["params"][0]].setdefault("momentum", torch.zeros_like(grad))
            momentum.lerp_(grad, 0.05)
            x = grad.lerp(momentum, 0.95)  # Nesterov
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x  # the shorter side first: smaller products
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):  # takes every singular value to about 1
                gram = x @ x.mT
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
            x = x.mT if tall else x
            size = 0.2 * max(x.shape[1:]) ** 0.5
            for p, update in zip(group["params"], x):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=size * group["lr"])


def make_optimizers(model: GPT, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW. With --optimizer=muon, Muon takes the matrices in the blocks, and AdamW takes the rest."""
    named = model.blocks.named_parameters() if cfg.optimizer == "muon" else []
    matrices = [p for name, p in named if p.dim() == 2 and ".position." not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    options = dict(lr=cfg.lr, weight_decay=cfg.weight_decay)
    fused = model.head.weight.device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(rest, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=fused, **options)
    return [adamw, Muon(matrices, **options)] if matrices else [adamw]


def build_or_resume(cfg: TrainConfig, checkpoint, source, meta: dict, machine: Machine) -> tuple[GPT, list, int]:
    """The model, its optimizers and the step to start from. checkpoint, source: as in configure()."""
    out = Path(cfg.out)
    if out.exists() and not cfg.resume:
        fail(f"{out} exists: --resume continues it, --out=NAME starts another run")
    if cfg.resume and machine.sum(float(out.exists()))[0] == 0:  # no process sees it
        fail(f"there is no {out} to resume: check --out")
    try:
        model = GPT(cfg)
        if cfg.resume and not checkpoint:
            machine.say(f"{out} has no checkpoint yet: starting at step 0")
        if source:
            ours, theirs = meta["tokenizer"], source["tokenizer"]
            if ours != theirs:
                raise ValueError(f"{cfg.data} has {ours} tokens, and {cfg.init_from} was trained on {theirs} tokens")
            machine.say(initial_weights(model, source, cfg.init_from))
    except ValueError as error:
        fail(str(error))
    if checkpoint:
        may = FREE.union(CHANGEABLE)
        other = {k: v for k, v in checkpoint["config"].items() if k not in may and v != getattr(cfg, k, None)}
        if other:
            fail(f"{out} was trained with other settings: " + " ".join(f"--{k}={v}" for k, v in other.items()))
        if cfg.steps < checkpoint["step"]:
            fail(f"{out} has been trained for {checkpoint['step']} steps: --steps must be at least that")
        if checkpoint.get("data") != meta.get("train"):
            fail(f"{out} was trained on other data than {cfg.data}: use the same --data")
        model.load_state_dict(checkpoint["model"])
    model.to(machine.device).recompute = cfg.recompute
    model.reserve(cfg.train_len)  # before torch.compile
    optimizers = make_optimizers(model, cfg)
    if checkpoint:
        states = checkpoint["optimizer"]  # an older version saved AdamW's alone
        try:
            for optimizer, state in zip(optimizers, states if isinstance(states, list) else [states], strict=True):
                optimizer.load_state_dict(state)
        except ValueError:  # Muon once had a single parameter group
            fail(f"{out} has the optimizer state of another version: --out=NAME starts another run")
    start = checkpoint["step"] if checkpoint else 0
    first = machine.sum(float(start) if machine.main else 0.0)[0]
    if machine.sum(float(start != first))[0]:  # from here on, the main process may write
        fail(f"the machines do not see the same checkpoint in {out}: --out must be a folder that all of them share")
    return model, optimizers, start


def save(model: GPT, optimizers: list, step: int, cfg: TrainConfig, meta: dict, machine: Machine) -> None:
    """Replace the checkpoint as a whole. If that fails, every process stops at this step."""
    error = None
    if machine.main:
        facts = {"step": step, "config": asdict(cfg), "tokenizer": meta["tokenizer"], "data": meta.get("train")}
        state = {"model": model.state_dict(), "optimizer": [optimizer.state_dict() for optimizer in optimizers]}
        try:
            replace_file(Path(cfg.out) / "ckpt.pt", lambda f: torch.save(facts | state, f))
        except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
            error = one_line(e)
    if machine.sum(float(error is not None))[0]:
        fail(f"the checkpoint of step {step} could not be written ({error}): free the disk, then --resume")


class Log:
    """log.jsonl, and Weights & Biases with --wandb. Only the main process writes.

    The file is locked. Lines past `step` are cut off, since the run will write them again. A line that a full disk
    cannot take waits for the next one. `error` says what went wrong. A run that fails before its first line leaves no
    folder behind, so that the same command can start again.
    """

    def __init__(self, cfg: TrainConfig, step: int, machine: Machine):
        self.path, self.waiting, self.error = Path(cfg.out) / "log.jsonl", bytearray(), ""
        self.file = self.wandb = None
        self.new = not self.path.parent.exists()
        if not machine.main:
            return
        if cfg.wandb:
            try:
                import wandb

                self.wandb = wandb.init(project="fope", name=Path(cfg.out).name, config=asdict(cfg))
            except Exception as error:  # missing, broken, or without a login: each raises its own
                fail(f"--wandb does not work ({one_line(error)}): pip install wandb, or leave it out")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = lock(self.path)
            lines = self.path.read_bytes().splitlines(keepends=True)
            self.file.truncate(sum(len(x) for x in lines if x.endswith(b"}\n") and json.loads(x)["step"] <= step))
        except OSError as error:
            fail(f"{cfg.out} cannot be written: {error}")

    def __enter__(self):
        return self

    def __exit__(self, failed, *_) -> None:
        if self.wandb:
            self.wandb.finish()
        if self.file:
            self.file.close()
            if failed and self.new and not self.path.stat().st_size:
                self.path.unlink()
                self.path.parent.rmdir()

    def write(self, step: int, **values) -> None:
        if self.wandb:
            self.wandb.log(values, step=step)
        self.waiting += json.dumps({"step": step} | values).encode() + b"\n"
        try:
            while self.file and self.waiting:  # a full disk may take half a line
                del self.waiting[: self.file.write(self.waiting)]
        except OSError as error:
            self.error = f"{self.path} could not be written ({error}): free the disk, then --resume"


@torch.no_grad()
def validate(model: GPT, val_tokens: np.ndarray, cfg: TrainConfig, machine: Machine) -> float:
    """Mean loss in nats over the first eval_tokens of the validation text, in sequences of N."""
    mine = np.arange(min(cfg.eval_tokens, len(val_tokens) - 1) // cfg.train_len)[machine.rank :: machine.world]
    _, micro = split_batch(cfg, machine)
    total = 0.0
    for i in range(0, len(mine), micro):
        x, y = take(val_tokens, mine[i : i + micro], cfg.train_len, machine.device)
        with machine.autocast():
            total += model(x, y).item() * len(x)
    total, count = machine.sum(total, len(mine))
    return total / max(count, 1)


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Linear warmup to lr, then a cosine that would reach final_lr lr one step after the last."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(cfg.steps - cfg.warmup, 1)
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


# ----------------------------------------------------------------------------------------------------------------------
# The run


stop_signals = []  # the signals that have asked this process to stop


def ask_to_stop(number, frame) -> None:
    stop_signals.append(number)
    if number == signal.SIGINT:  # a second Ctrl-C ends the process at once; a scheduler may send SIGTERM twice
        signal.signal(number, signal.default_int_handler)


def on_stop(handler) -> dict:
    """Calls `handler` at Ctrl-C and at what schedulers send before they kill. Returns the handlers from before.

    A signal that is ignored when the program starts stays so: nohup ignores SIGHUP, a shell script's `&` Ctrl-C.
    """
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]  # Windows has two
    return {n: signal.signal(n, handler) for n in numbers if n and signal.getsignal(n) != signal.SIG_IGN}


def train(cfg: TrainConfig, checkpoint: dict | None, source: dict | None) -> bool:
    """The whole run up to its last checkpoint. False if a signal asked it to stop. The others: as in configure()."""
    stop_signals.clear()
    handlers = on_stop(ask_to_stop)
    # Everything that can be wrong with the input is found before anything is written.
    machine = Machine(cfg)
    tokens, val_tokens, meta = load_data(cfg, machine)
    share, micro = split_batch(cfg, machine)
    raw, optimizers, start = build_or_resume(cfg, checkpoint, source, meta, machine)
    model = torch.compile(raw) if machine.compile else raw
    if dist.is_initialized():
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # they never change; the argument of this name is deprecated since torch 2.13
    machine.say(
        f"{cfg.pos}, {raw.n_params():,} parameters (one embedding counted), N = {cfg.train_len}\n"
        f"{cfg.steps} steps of {cfg.batch_tokens:,} tokens, {cfg.batch_tokens * cfg.steps / len(tokens):.2f} epochs; "
        f"a step is {machine.world} processes x {share // micro} micro-batches x {micro} sequences\n"
        f"to {cfg.out}" + (f", from step {start}" if start else "")
    )

    changed = {k: getattr(cfg, k) for k in CHANGEABLE if start and checkpoint["config"][k] != getattr(cfg, k)}
    if changed:
        machine.say("changed from here on: " + " ".join(f"--{k}={v}" for k, v in changed.items()))
    with Log(cfg, start, machine) as log:
        if changed:
            log.write(step=start, changed=changed)
        upcoming = micro_batches(tokens, start, cfg, machine)
        done, logged_at, logged_step = start, time.perf_counter(), start
        for done in range(start + 1, cfg.steps + 1):
            # --------------------------------------------------------------------------------------------- batch, step
            rate = learning_rate(done - 1, cfg)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            loss = torch.zeros((), device=machine.device)
            for i, (x, y) in enumerate(upcoming):
                last = i == len(upcoming) - 1
                with nullcontext() if last or machine.world == 1 else model.no_sync():  # one all-reduce per step
                    with machine.autocast():
                        micro_loss = model(x, y) / len(upcoming)
                    micro_loss.backward()
                loss += micro_loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.clip)
            upcoming = micro_batches(tokens, done, cfg, machine)  # the next ones, while the accelerator works
            loss, stop = machine.sum(loss.item(), float(bool(stop_signals or log.error)))
            loss, norm = loss / machine.world, norm.item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                fail(f"loss {loss}, gradient norm {norm} at step {done}: the last checkpoint is from before")
            with machine.autocast():  # for Muon's products
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            stopping = stop > 0 or done == cfg.steps

            # ----------------------------------------------------------------------------------------------------- log
            if done % cfg.log_every == 0 or done == start + 1 or stopping:
                now, speed, mfu = time.perf_counter(), None, None
                if done > start + 1:  # the first step compiles
                    speed = round((done - logged_step) * cfg.batch_tokens / (now - logged_at))
                    mfu = machine.peak and 6 * raw.n_params() * speed / (machine.world * machine.peak)
                if done % cfg.log_every == 0 or done in (1, cfg.steps):  # the same lines, whether it was stopped or not
                    log.write(step=done, loss=loss, lr=rate, grad_norm=norm, tokens_per_s=speed, mfu=mfu)
                text = f"step {done}/{cfg.steps}  loss {loss:.4f}  lr {rate:.2e}  grad norm {norm:.2f}"
                if speed:
                    left = timedelta(seconds=round((cfg.steps - done) * cfg.batch_tokens / speed))
                    text += f"  {speed:,} tokens/s" + (f"  mfu {mfu:.1%}" if mfu else "") + f"  {left} left"
                machine.say(text)
                logged_at, logged_step = time.perf_counter(), done

            # ------------------------------------------------------------------------------------------------ validate
            if done % cfg.eval_every == 0 or done == cfg.steps:
                val_loss = validate(raw, val_tokens, cfg, machine)
                log.write(step=done, val_loss=val_loss)
                machine.say(f"step {done}/{cfg.steps}  validation loss {val_loss:.4f}")
                logged_at, logged_step = time.perf_counter(), done

            # ---------------------------------------------------------------------------------------------------- save
            if done % cfg.save_every == 0 or stopping:
                save(raw, optimizers, done, cfg, meta, machine)
            if stopping:
                break

    for number, handler in handlers.items():
        signal.signal(number, handler)
    if dist.is_initialized():
        del model  # DDP holds the process group: without this, the end of gloo sometimes hangs
        dist.barrier()
        dist.destroy_process_group()
    if done < cfg.steps:
        machine.say(f"stopped and saved at step {done}: --resume continues")
    if log.error:
        fail(log.error)
    return done == cfg.steps and not stop_signals


def main() -> None:
    flags = parse_flags(sys.argv[1:])
    checkpoint = source = None
    try:
        if flags.get("resume") and (Path(flags["out"]) / "ckpt.pt").exists():
            checkpoint = load_checkpoint(flags["out"])
        elif flags.get("init_from"):
            source = load_checkpoint(flags["init_from"])
    except ValueError as error:
        fail(str(error))
    cfg = configure(flags, checkpoint, source)
    try:
        import torch._dynamo  # eager training needs it too, and it makes torch.compile's cache folder
    except OSError as error:
        fail(f"PyTorch cannot make its cache folder ({error}): set TORCHINDUCTOR_CACHE_DIR to another one")
    try:
        finished = train(cfg, checkpoint, source)
    except (OSError, torch._dynamo.exc.TorchDynamoException) as error:  # such as a cache folder whose disk is full
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "the default one")
        fail(f"{one_line(error)}. If this is torch.compile's cache folder, {cache}, free it or use --compile=off")
    if os.environ.get("RANK", "0") == "0":
        plot.loss_figure([Path(cfg.out) / "log.jsonl"], Path(cfg.out) / "loss.png")
        if finished and cfg.eval_trials:
            options = [f"--trials={cfg.eval_trials}", f"--device={cfg.device}", f"--dtype={cfg.dtype}", "--logn=0,2"]
            if (cfg.model, cfg.data, cfg.train_len) == ("tiny", "data/builtin", 512):  # as in the committed results
                results = sorted((Path(__file__).parent / "paper/results/tiny").glob("*-s?.json"))
                options += ["--reference", *(str(file) for file in results if file.stem[:-3] in COMPARED)]
            eval_passkey.main([cfg.out, *options])
    if "RANK" in os.environ:
        # DDP never releases its process group. gloo's threads outlive it, and sometimes abort the process at its end.
        os._exit(0)


if __name__ == "__main__":
    main()
