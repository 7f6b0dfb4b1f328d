"""Train a GPT, on one process or on many through torchrun. Then evaluate it.

    python train.py                                  the tiny preset on the built-in corpus
    python train.py --pos=rope --seed=1              every field of TrainConfig and GPTConfig is a flag
    torchrun --standalone --nproc_per_node=4 train.py --model=60M --data=data/c4
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py --model=60M

The last command runs on each of two machines. Both need the data and a shared disk for --out. Ctrl-C, SIGTERM, SIGHUP
and SIGUSR1 save a checkpoint and stop the run. torchrun forwards all of them if given
--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1.

The order of the data depends on the seed and the step alone. So a resumed run continues bit for bit on a CPU with one
thread, and up to rounding elsewhere. 1, 2 or 4 processes train the same model up to rounding.
"""

import functools
import json
import math
import os
import signal
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
from common import Parser, UserError, at_least, command, find_device, local_rank, lock, one_of, replace_file, say
from data import prepare
from data.read import load
from data.tokenizer import copy_tokenizer
from model import GPT, PRESETS, GPTConfig, keep_coefficients, load_checkpoint
from muon import Muon

# How a preset is trained. The paper's recipe (App. A.3) is 10B tokens in steps of 524,288.
PAPER = dict(data="data/c4", batch_tokens=524_288, steps=19_073, lr=6e-4, warmup=10_000)
RECIPES = {
    "tiny": dict(optimizer="muon", steps=2000, final_lr=0.0, log_every=100),
    "60M": PAPER | dict(micro_tokens=65_536),  # what fits a GPU of 48 GB. A smaller value does not change the result
    # 200M tokens: minutes on a card. The paper's batch would leave 375 steps, fewer than its warmup. A quarter of it
    # leaves 1500. lr is that of Pythia's 70M model (arXiv 2304.01373). The rest is habit, and nothing is tuned.
    "60M-short": dict(data="data/text60m", batch_tokens=131_072, steps=1500, lr=1e-3, warmup=150)
    | dict(micro_tokens=65_536, eval_tokens=1_600_000, eval_trials=400),
    "180M": PAPER | dict(micro_tokens=16_384),
    "1.2B": PAPER | dict(micro_tokens=8192),
}
# Committed runs (embedding, p of log-n scaling) that a figure shows beside a run with the same flags.
COMPARED = {("rope", 0), ("rope", 2), ("alibi", 0), ("kerple", 0), ("fope", 0), ("fope", 2)}
PEAK = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12, "RTX A6000": 154.8e12}  # dense bfloat16 FLOP/s


@dataclass
class TrainConfig(GPTConfig):
    """Every field is a flag, and the comment beside it is the flag's help. The same holds for GPTConfig in model.py."""

    # training
    model: str = "tiny"  # preset that sets the model's shape and the recipe: tiny, 60M-short, 60M, 180M or 1.2B
    vocab_size: int = 0  # tokens in the vocabulary; 0: those of the data, padded to a multiple of 64
    data: str = "data/builtin"  # folder with train.bin and val.bin
    out: str = ""  # folder for checkpoint, log and evaluation; empty: out/MODEL-POS-sSEED
    resume: bool = False  # continue from the checkpoint in out; flags that are not given come from it
    init_from: str = ""  # checkpoint to take the weights and the model's flags from; --pos may differ
    steps: int = 3000  # optimizer steps
    batch_tokens: int = 2048  # tokens per step, over all processes
    micro_tokens: int = 4096  # maximum tokens per micro-batch and process
    lr: float = 2e-3  # learning rate after warmup
    final_lr: float = 0.1  # fraction of lr that the cosine decays to
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

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "steps batch_tokens micro_tokens log_every eval_every save_every")
        at_least(self, 0, "lr final_lr warmup beta1 beta2 weight_decay clip eval_trials")
        at_least(self, self.train_len, "eval_tokens")
        one_of(self, model=PRESETS, optimizer=("adamw", "muon"), compile=("auto", "on", "off"))
        if not self.clip or max(self.beta1, self.beta2) >= 1:
            raise UserError("--clip must be above 0, and --beta1 and --beta2 less than 1")


def parse_flags(argv: list[str]) -> dict:
    """The flags given on the command line, with the folder `out` filled in."""
    parser = Parser(__doc__, TrainConfig)
    parser.description += " --model changes some of these defaults: see RECIPES, and PRESETS in model.py."
    flags = vars(parser.parse_args(argv))
    named = {"model": "tiny", "pos": "fope", "seed": 0} | flags
    return flags | {"out": flags.get("out") or f"out/{named['model']}-{named['pos']}-s{named['seed']}"}


def configure(flags: dict, checkpoint: dict | None = None, source: dict | None = None) -> TrainConfig:
    """A flag wins over the preset, and the preset over the default.

    `checkpoint` of a resumed run replaces the preset, and `source` (--init_from) its model fields.
    """
    name = flags.get("model", "tiny")
    preset = checkpoint["config"] if checkpoint else PRESETS.get(name, {}) | RECIPES.get(name, {})
    model_fields = {f.name for f in fields(GPTConfig)} - {"seed"}
    if source:
        preset = preset | {name: value for name, value in source["config"].items() if name in model_fields}
    known = {f.name for f in fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in (preset | flags).items() if name in known})


# ----------------------------------------------------------------------------------------------------------------------
# The machine and the data


class Machine:
    """The device, the dtype, and this process among those that a launcher started."""

    def __init__(self, cfg: TrainConfig):
        self.device, dtype, self.autocast = find_device(cfg.device, cfg.dtype)
        cuda, why = self.device.type == "cuda", ""
        try:
            import torch._dynamo  # eager training needs it too, and it makes torch.compile's cache folder
        except OSError as error:
            raise UserError(f"torch.compile has no cache folder ({error}): set TORCHINDUCTOR_CACHE_DIR") from error
        self.compile = cfg.compile == "on" or (cfg.compile == "auto" and self.device.type != "mps")
        try:
            if self.compile:
                torch.compile(torch.sin)(torch.zeros(8, device=self.device))
        except Exception as error:  # no C++ compiler, no Triton, a Python too new: each has its own exception
            why = f" (torch.compile does not work here: {type(error).__name__})"
            if cfg.compile == "on":  # the error may be pages long
                first = f"{type(error).__name__}: {error}".splitlines()[0]
                raise UserError(f"--compile=on does not work here: {first}") from error
            self.compile = False
        self.rank, self.world = 0, 1
        if "RANK" in os.environ:  # a launcher started this process
            try:
                dist.init_process_group("nccl" if cuda else "gloo")
            except (ValueError, RuntimeError) as error:
                raise UserError(f"the processes cannot find each other: {error}") from error
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        name = torch.cuda.get_device_name() if cuda else self.device.type
        self.peak = next((flops for card, flops in PEAK.items() if card in name and dtype == "bfloat16"), None)
        backend = f", {self.world} processes over {dist.get_backend()}" if dist.is_initialized() else ""
        self.say(f"device {name}, {dtype}, {'compiled' if self.compile else 'eager'}{why}{backend}")

    def say(self, text: str) -> None:
        if self.rank == 0:
            say(text)

    def mean(self, *values) -> list[float]:
        """Each value, a number or a scalar tensor, averaged over the processes: one reduction, one wait for the GPU."""
        scalars = [x if isinstance(x, torch.Tensor) else torch.full((), x, device=self.device) for x in values]
        total = torch.stack([x.float() for x in scalars])
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= self.world
        return total.tolist()


def load_data(cfg: TrainConfig, machine: Machine) -> tuple[np.ndarray, np.ndarray, dict]:
    """Training tokens, validation tokens and meta.json. Sets cfg.vocab_size. Raises UserError."""
    folder = Path(cfg.data)
    if folder == Path("data/builtin") and not folder.exists() and local_rank() == 0:
        machine.say("making the built-in corpus")
        prepare.builtin(folder)
    machine.mean(0)  # the other processes wait until it is there
    tokens, meta = load(cfg.data, "train", check=machine.rank == 0)
    val_tokens, _ = load(cfg.data, "val", check=machine.rank == 0)
    needed = 1 + cfg.train_len * (16 if cfg.eval_trials else 1)  # found now, not after the training
    if len(tokens) <= cfg.train_len or len(val_tokens) < needed:
        sizes = f"train.bin has {len(tokens)} tokens, val.bin {len(val_tokens)}"
        raise UserError(f"{cfg.data} is too short: {sizes}, and they need {cfg.train_len + 1} and {needed}: add text")
    cfg.vocab_size = cfg.vocab_size or -(-meta["vocab_size"] // 64) * 64
    if cfg.vocab_size < meta["vocab_size"]:
        raise UserError(f"--vocab_size {cfg.vocab_size} is less than the {meta['vocab_size']} tokens of {cfg.data}")
    return tokens, val_tokens, meta


@functools.lru_cache(maxsize=2)  # a batch may contain the end of one epoch and the start of the next
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_sequences(seed: int, step: int, batch: int, n: int) -> np.ndarray:
    """Which of the n sequences are in global batch `step`. Each occurs once per epoch, in a new order every epoch."""
    epoch, place = np.divmod(np.arange(step * batch, (step + 1) * batch), n)
    return np.concatenate([permutation(seed, int(e), n)[place[epoch == e]] for e in np.unique(epoch)])


def take(tokens: np.ndarray, sequences: np.ndarray, T: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T) int64: sequence i is tokens[i T : i T + T], and the targets are shifted by one."""
    both = torch.from_numpy(tokens[sequences[:, None] * T + np.arange(T + 1)].astype(np.int64))
    if device.type == "cuda":
        both = both.pin_memory()
    both = both.to(device, non_blocking=True)
    return both[:, :-1], both[:, 1:]


class Batches:
    """batches[step] is this process's part of global batch `step`: a list of micro-batches (inputs, targets)."""

    def __init__(self, tokens: np.ndarray, cfg: TrainConfig, machine: Machine):
        self.tokens, self.cfg, self.machine = tokens, cfg, machine
        self.share, remainder = divmod(cfg.batch_tokens, cfg.train_len * machine.world)  # sequences of this process
        if remainder or not self.share:
            unit = f"{cfg.train_len} tokens x {machine.world} processes"
            raise UserError(f"--batch_tokens {cfg.batch_tokens} is not a multiple of {unit}")
        most = max(cfg.micro_tokens // cfg.train_len, 1)
        self.micro = max(micro for micro in range(1, self.share + 1) if self.share % micro == 0 and micro <= most)

    def __getitem__(self, step: int) -> list:
        T, rank, world = self.cfg.train_len, self.machine.rank, self.machine.world
        every = batch_sequences(self.cfg.seed, step, self.share * world, (len(self.tokens) - 1) // T)
        micros = every[rank * self.share :][: self.share].reshape(-1, self.micro)
        return [take(self.tokens, micro, T, self.machine.device) for micro in micros]


@torch.no_grad()
def validate(model: GPT, val_tokens: np.ndarray, rows: int, cfg: TrainConfig, machine: Machine) -> float:
    """Mean loss in nats over the first eval_tokens of the validation text, in sequences of N, `rows` at a time."""
    model.eval()
    mine = np.arange(min(cfg.eval_tokens, len(val_tokens) - 1) // cfg.train_len)[machine.rank :: machine.world]
    total = torch.zeros((), device=machine.device)
    for i in range(0, len(mine), rows):
        x, y = take(val_tokens, mine[i : i + rows], cfg.train_len, machine.device)
        with machine.autocast():
            total += model(x, y) * len(x)
    total, count = machine.mean(total, len(mine))
    model.train()
    return total / count


# ----------------------------------------------------------------------------------------------------------------------
# Model, optimizers, checkpoint


def shapes(state: dict, without: str = "no such name") -> dict:
    return {name: x.shape for name, x in state.items() if without not in name}


@torch.no_grad()
def take_weights(model: GPT, source: dict, path: str) -> str:
    """Copy a checkpoint's weights into the model, and its position embedding where both have it. Returns a message.

    FoPE's coefficients stay as drawn for frequencies that the checkpoint lacks, or if sigma or coef_init differs.
    """
    ours, theirs, drawn = model.state_dict(), source["model"], ""
    cfg, was = model.cfg, source["config"]
    unlike = (cfg.n_head, cfg.tied) != (was["n_head"], was["tied"])
    if shapes(ours, ".position.") != shapes(theirs, ".position.") or unlike:
        raise UserError(f"{path} has a model of another shape: leave out the flags that change it")
    same_draw = (cfg.sigma, cfg.coef_init) == (was.get("sigma"), was.get("coef_init"))
    for name, x in ours.items():  # x is the model's own memory
        usable = name in theirs and (same_draw or not name.endswith(".coef"))
        if usable and theirs[name].shape == x.shape:
            x.copy_(theirs[name])
            continue
        drawn = ", missing position coefficients drawn anew"
        if usable and name.endswith(".coef"):
            keep_coefficients(x, theirs[name])
    return f"weights from {path}{drawn}"


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


def restore(model: GPT, optimizers: list, checkpoint: dict, cfg: TrainConfig) -> None:
    """Load the weights and the optimizers' states of the resumed run. Raises UserError."""
    if "optimizer" not in checkpoint:
        raise UserError(f"{cfg.out} is an imported model: train it with --init_from={cfg.out} and another --out")
    for name in ("sigma", "coef_init", "init_std"):
        if checkpoint["config"][name] != getattr(cfg, name):
            raise UserError(f"--resume cannot change --{name}: the run drew its random numbers with it")
    saved, ours = shapes(checkpoint["model"]), shapes(model.state_dict())
    if saved != ours or checkpoint["config"]["optimizer"] != cfg.optimizer:
        raise UserError(f"--resume cannot change the model or the optimizer of {cfg.out}: leave out the flags that do")
    model.load_state_dict(checkpoint["model"])
    try:
        for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
            optimizer.load_state_dict(state)
            for group in optimizer.param_groups:  # from the flags, not from the checkpoint
                group["weight_decay"] = cfg.weight_decay
                if "betas" in group:
                    group["betas"] = (cfg.beta1, cfg.beta2)
    except ValueError as error:  # the saved state has other parameter groups
        raise UserError(f"{cfg.out} has the optimizer state of another version: train anew with --out=NAME") from error


def save(model: GPT, optimizers: list, step: int, cfg: TrainConfig, data: dict) -> None:
    """Replace the checkpoint as a whole. Raises UserError."""
    facts = {"step": step, "config": asdict(cfg) | {"resume": False}} | data
    state = {"model": model.state_dict(), "optimizer": [optimizer.state_dict() for optimizer in optimizers]}
    try:
        replace_file(Path(cfg.out) / "ckpt.pt", lambda f: torch.save(facts | state, f))
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(f"no checkpoint of step {step} could be written ({error}): free space and --resume") from error


# ----------------------------------------------------------------------------------------------------------------------
# The run


class Log:
    """Appends to log.jsonl, which it locks, and to Weights & Biases with --wandb. Only the first process has one."""

    def __init__(self, cfg: TrainConfig):
        out, self.wandb = Path(cfg.out), None
        if cfg.wandb:
            import wandb

            known = out / "wandb_id"  # a resumed run goes on there too
            run = known.read_text() if known.exists() else None
            self.wandb = wandb.init(project="fope", name=out.name, id=run, resume="allow", config=asdict(cfg))
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.file = lock(out / "log.jsonl")
        except OSError as error:
            raise UserError(f"{out} cannot be written ({error}): name another --out") from error
        if self.file.tell() and not (out / "log.jsonl").read_bytes().endswith(b"\n"):
            self.file.write(b"\n")  # a killed run left half a line
        if self.wandb:
            known.write_text(self.wandb.id)

    def write(self, **values) -> None:
        try:
            self.file.write(json.dumps(values).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.file.name} could not be written ({error}): free space and --resume") from error
        if self.wandb and "step" in values:
            self.wandb.log(values, step=values["step"])

    def close(self) -> None:
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Linear warmup to lr, then a cosine that would reach final_lr * lr one step after the last."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(cfg.steps - cfg.warmup, 1)
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


stop_signals = []  # the signals that have asked this process to stop


def ask_to_stop(number, frame) -> None:
    stop_signals.append(number)
    if number == signal.SIGINT:  # a second Ctrl-C ends the process at once; a scheduler may send SIGTERM twice
        signal.signal(number, signal.default_int_handler)


def on_stop(handler) -> dict:
    """Sets `handler` for Ctrl-C and the signals that schedulers send before a kill. Returns the previous handlers.

    A signal that is ignored at the start stays ignored: nohup ignores SIGHUP, and `&` in a script ignores Ctrl-C.
    """
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]  # Windows has two
    return {n: signal.signal(n, handler) for n in numbers if n and signal.getsignal(n) != signal.SIG_IGN}


def train(flags: dict) -> tuple[TrainConfig, bool]:
    """The whole run up to its last checkpoint. Returns its configuration, and whether it finished."""
    stop_signals.clear()
    handlers = on_stop(ask_to_stop)
    # Bad input is found before anything is written.
    out, checkpoint, source = Path(flags["out"]), None, None
    if flags.get("resume") and (out / "ckpt.pt").exists():
        checkpoint = load_checkpoint(out)
    elif flags.get("init_from"):
        source = load_checkpoint(flags["init_from"])
    cfg = configure(flags, checkpoint, source)
    begun = out.is_file() or (out.is_dir() and any(path.stat().st_size for path in out.iterdir()))
    if begun and not cfg.resume or cfg.resume and not out.exists():  # an empty log is what a crash in step 1 leaves
        why = f"there is no {out} to resume" if cfg.resume else f"{out} exists: --resume continues it"
        raise UserError(f"{why}; --out=NAME names another folder")
    machine = Machine(cfg)
    if cfg.resume and not checkpoint:
        machine.say(f"{out} has no checkpoint yet: starting at step 0")
    start = checkpoint["step"] if checkpoint else 0
    if machine.mean(start)[0] != start:  # from here on, the first process may write
        raise UserError(f"the machines do not see the same checkpoint in {out}: --out must be a folder that all share")
    tokens, val_tokens, meta = load_data(cfg, machine)
    data = {"tokenizer": meta["tokenizer"], "data": meta["train"].get("sha256")}
    theirs = (checkpoint or source or data)["tokenizer"]
    if theirs != data["tokenizer"]:
        raise UserError(f"{cfg.data} has {data['tokenizer']} tokens, the checkpoint has {theirs} tokens: change --data")
    batches, raw = Batches(tokens, cfg, machine), GPT(cfg)
    if source:
        machine.say(take_weights(raw, source, cfg.init_from))
    raw.to(machine.device).recompute = cfg.recompute
    optimizers, changed = make_optimizers(raw, cfg), {}
    if checkpoint:
        restore(raw, optimizers, checkpoint, cfg)
        old = asdict(TrainConfig()) | checkpoint["config"] | {"resume": True, "out": flags["out"]}
        changed = {name: value for name, value in flags.items() if value != old[name]}
        if checkpoint["data"] != data["data"]:
            changed["data"] = cfg.data
    origins = [cfg.data, *([source["folder"]] if source else [])]
    del checkpoint, source  # releases the files that their tensors are mapped from
    model = torch.compile(raw) if machine.compile else raw
    if dist.is_initialized():
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # they never change; the argument of this name is deprecated in torch 2.13
    machine.say(
        f"{cfg.pos}, {raw.n_params():,} parameters (one embedding counted), N = {cfg.train_len}\n"
        f"{cfg.steps} steps of {cfg.batch_tokens:,} tokens, {cfg.batch_tokens * cfg.steps / len(tokens):.2f} epochs\n"
        f"a step is {machine.world} processes x {batches.share // batches.micro} micro-batches x {batches.micro} "
        f"sequences\nto {out}" + (f", from step {start}" if start else "")
    )
    log = Log(cfg) if machine.rank == 0 else None
    for folder in origins if log else ():
        copy_tokenizer(folder, out)  # so that the run can be moved and exported
    if log and cfg.resume:
        log.write(resumed=start, changed=changed)
    if changed:
        machine.say("changed from here on: " + " ".join(f"--{name}={value}" for name, value in changed.items()))

    upcoming = batches[start]
    step, timed_from, clock = start, start, time.perf_counter()
    for step in range(start + 1, cfg.steps + 1):
        # ------------------------------------------------------------------------------------------------- batch, step
        # If you add dropout or other random draws to the model, each step and process gets its own seed.
        torch.manual_seed(((cfg.seed * 2**24 + step) * machine.world + machine.rank) % 2**63)
        rate = learning_rate(step - 1, cfg)
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
        upcoming = batches[step]  # the next batch, while the accelerator works
        loss, norm, stop = machine.mean(loss, norm, bool(stop_signals))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            saved = start or step > cfg.save_every
            before = f"{cfg.out}/ckpt.pt is from before" if saved else "there is no checkpoint yet"
            raise UserError(f"loss {loss}, gradient norm {norm} at step {step}: {before}; a lower --lr may help")
        with machine.autocast():  # for Muon's products
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        raw.constrain()

        # ----------------------------------------------------------------------------------------- log, validate, save
        logs = step % cfg.log_every == 0 or step in (1, cfg.steps)
        validates = step % cfg.eval_every == 0 or step == cfg.steps
        saves = step % cfg.save_every == 0 or step == cfg.steps or stop > 0
        if logs:
            speed, mfu = None, None
            if step > start + 1:  # the first step compiles
                speed = round((step - timed_from) * cfg.batch_tokens / (time.perf_counter() - clock))
                mfu = machine.peak and 6 * raw.n_params() * speed / (machine.world * machine.peak)
            text = f"step {step}/{cfg.steps}  loss {loss:.4f}  lr {rate:.2e}  grad norm {norm:.2f}"
            if speed:
                left = timedelta(seconds=round((cfg.steps - step) * cfg.batch_tokens / speed))
                text += f"  {speed:,} tokens/s" + (f"  mfu {mfu:.1%}" if mfu else "") + f"  {left} left"
            if log:
                log.write(step=step, loss=loss, lr=rate, grad_norm=norm, tokens_per_s=speed, mfu=mfu)
            machine.say(text)
        if validates:
            val_loss = validate(raw, val_tokens, batches.micro, cfg, machine)
            if log:
                log.write(step=step, val_loss=val_loss)
            machine.say(f"step {step}/{cfg.steps}  validation loss {val_loss:.4f}")
        if saves and machine.rank == 0:
            save(raw, optimizers, step, cfg, data)
        if logs or validates or saves or step == start + 1:
            timed_from, clock = step, time.perf_counter()  # tokens/s counts the training steps only
        if stop > 0:
            break

    for number, handler in handlers.items():
        signal.signal(number, handler)
    if log:
        log.close()
    if dist.is_initialized():
        del model  # DDP holds the process group: without this, the end of gloo sometimes hangs
        dist.barrier()
        dist.destroy_process_group()
    if step < cfg.steps:
        machine.say(f"stopped and saved at step {step}: --resume continues")
    return cfg, not stop_signals and step >= cfg.steps


@command
def main(argv: list[str]) -> None:
    cfg, finished = train(parse_flags(argv))
    if int(os.environ.get("RANK", 0)) == 0:
        plot.save(Path(cfg.out) / "loss.png", plot.loss_figure, [Path(cfg.out) / "log.jsonl"])
        if finished and cfg.eval_trials:
            options = dict(trials=cfg.eval_trials, skip_lost=True, logn="0,2", device=cfg.device, dtype=cfg.dtype)
            results = Path(__file__).parent / "paper/results/tiny/eval.jsonl"
            committed = plot.read(results) if results.exists() else []
            committed = [record for record in committed if (record["pos"], record["logn"]) in COMPARED]
            eval_passkey.evaluate([Path(cfg.out)], eval_passkey.Options(**options), committed=committed)
    if "RANK" in os.environ:
        # DDP never releases its process group. gloo's threads outlive it, and sometimes abort the process at its end.
        os._exit(0)


if __name__ == "__main__":
    main()
