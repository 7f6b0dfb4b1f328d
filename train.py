"""Train a GPT. One process or torchrun, CPU or GPU: what is there is found, used and printed.

    python train.py                                  the tiny preset on the built-in corpus, then its evaluation
    python train.py --pos=rope --seed=1              any field of TrainConfig and GPTConfig is a flag
    torchrun --standalone --nproc_per_node=4 train.py --model=60M --data=data/c4

Global batch s holds the same sequences however many processes and micro batches share it: the order is a function of
(seed, s) alone. So a run is resumed from its step, and 1, 2 or 4 processes train the same model up to rounding.
"""

import argparse
import functools
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import eval_passkey
from data import prepare
from data.files import fail, replace_file
from data.passkey import passkey_document
from data.tokenizer import get_tokenizer
from model import GPT, PRESETS, GPTConfig, find_device, load_checkpoint

# What a preset trains with. The paper's recipe (App. A.3): 10B tokens in steps of 524 288.
PAPER = dict(data="data/c4", batch_tokens=524_288, steps=19_073, lr=6e-4, warmup=10_000, eval_every=500, save_every=500)
RECIPES = {
    "tiny": dict(data="data/builtin", batch_tokens=4096, micro_tokens=4096, steps=3000, lr=2e-3, warmup=100,
                 log_every=50, eval_every=500, save_every=500),
    "60M": PAPER | dict(micro_tokens=32_768),  # a 48 GB card's share; less memory: less of it at once, same result
    "180M": PAPER | dict(micro_tokens=16_384),
    "1.2B": PAPER | dict(micro_tokens=4096),
}  # fmt: skip


@dataclass
class TrainConfig(GPTConfig):
    """Every field, GPTConfig's too, is a flag. --model sets those of its preset; a flag beside it wins."""

    model: str = "tiny"  # preset: tiny, 60M, 180M or 1.2B
    vocab_size: int = 0  # 0: the data's, padded to a multiple of 64
    data: str = "data/builtin"  # folder with train.bin and val.bin
    out: str = ""  # where checkpoint, log and evaluation go; empty: out/MODEL-POS-sSEED
    resume: bool = False  # go on from out's checkpoint
    init_from: str = ""  # start from this checkpoint's weights; the position embedding may be another

    steps: int = 3000  # optimizer steps
    batch_tokens: int = 4096  # tokens in a step, over all processes
    micro_tokens: int = 4096  # tokens at once on a process, at most
    lr: float = 2e-3  # after the warm-up; the cosine ends at a tenth of it
    warmup: int = 100  # steps
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1  # on every parameter, as the paper
    clip: float = 1.0  # of the gradient's norm

    log_every: int = 10  # steps
    eval_every: int = 500  # steps between validation losses
    save_every: int = 500  # steps between checkpoints
    eval_tokens: int = 65_536  # validation tokens for a validation loss
    eval_trials: int = 100  # passkey trials a length in the evaluation after training; 0: no evaluation

    device: str = "auto"  # auto: cuda, mps or cpu
    dtype: str = "auto"  # auto: bfloat16 autocast where the hardware has it, else float32
    compile: str = "auto"  # auto: torch.compile where it works; or on, off


# What may change between a run and its continuation: everything else changes what is computed.
FREE = {"resume", "init_from", "data", "out", "micro_tokens", "log_every", "eval_every", "save_every", "eval_tokens",
        "eval_trials", "device", "dtype", "compile"}  # fmt: skip


def parse_flags(argv: list[str]) -> TrainConfig:
    """--name=value and --name value for every field; a flag wins over the preset, the preset over the default."""

    def boolean(text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"

    boolean.__name__ = "true or false"
    parser = argparse.ArgumentParser(description="Type and default of every flag; --model's preset wins over the default.", allow_abbrev=False)
    parser.error = fail
    for f in fields(TrainConfig):
        kind = dict(type=boolean, nargs="?", const=True) if f.type is bool else dict(type=f.type)
        parser.add_argument(f"--{f.name}", default=MISSING, metavar="", help=f"({f.type.__name__}, {f.default!r})", **kind)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        fail(f"unknown argument {unknown[0]}: the flags are {' '.join('--' + f.name for f in fields(TrainConfig))}")
    flags = {name: value for name, value in vars(known).items() if value is not MISSING}
    preset = flags.get("model", "tiny")
    if preset not in PRESETS:
        fail(f"model {preset!r} is unknown: use {', '.join(PRESETS)}")
    cfg = TrainConfig(**PRESETS[preset] | RECIPES[preset] | flags)
    cfg.out = cfg.out or f"out/{cfg.model}-{cfg.pos}-s{cfg.seed}"
    for name in ("n_layer", "n_head", "n_embd", "n_hidden", "train_len", "steps", "batch_tokens", "log_every", "eval_every", "save_every"):
        if getattr(cfg, name) < 1:
            fail(f"--{name} must be at least 1")
    for name in ("seed", "warmup", "eval_trials", "weight_decay", "lr"):
        if not getattr(cfg, name) >= 0:
            fail(f"--{name} must not be negative")
    if not cfg.clip > 0:
        fail("--clip must be above 0")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < 1:
            fail(f"--{name} must be at least 0 and less than 1")
    if cfg.eval_tokens < cfg.train_len:
        fail(f"--eval_tokens must be at least --train_len, {cfg.train_len}")
    return cfg


# ---------------------------------------------------------------------------------------------------------------------
# The machine


PEAK = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12, "RTX A6000": 154.8e12}  # dense bf16 FLOP/s


def one_line(error: Exception) -> str:
    """Its name too: not every exception has a message, and some messages go on for pages."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].removesuffix(": ")


class Machine:
    """The device, its arithmetic, and the other processes. Made once, in every process."""

    def __init__(self, cfg: TrainConfig):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        try:
            self.device, dtype, self.autocast = find_device(cfg.device, cfg.dtype)
        except ValueError as error:
            fail(str(error))

        if cfg.compile not in ("auto", "on", "off"):
            fail(f"compile {cfg.compile!r} is unknown: use auto, on or off")
        self.compile, why = cfg.compile == "on" or (cfg.compile == "auto" and self.device.type != "mps"), ""
        if self.compile:
            try:
                torch.compile(torch.sin)(torch.zeros(8, device=self.device))
            except Exception as error:  # no C++ compiler, no Triton, a Python too new: each has its own exception
                self.compile, why = False, f"torch.compile does not work here: {one_line(error)}"
        if why and cfg.compile == "on":
            fail(why)

        cuda = self.device.type == "cuda"
        if "RANK" in os.environ:
            dist.init_process_group("nccl" if cuda else "gloo")
        name = torch.cuda.get_device_name() if cuda else self.device.type
        self.peak = next((flops for card, flops in PEAK.items() if card in name and dtype == "bfloat16"), None)
        backend = f", {self.world} processes over {dist.get_backend()}" if dist.is_initialized() else ""
        self.say(f"device {name}, {dtype}, {'compiled' if self.compile else 'eager'}{why and f' ({why})'}{backend}")

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes: also how they agree to stop."""
        if not dist.is_initialized():
            return list(values)
        total = torch.tensor(values, dtype=torch.float64 if self.device.type == "cpu" else torch.float32, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The data


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_sequences(seed: int, step: int, batch: int, n: int) -> np.ndarray:
    """Which of the n sequences make up global batch `step`: each once an epoch, in an order of that epoch's own."""
    epoch, place = np.divmod(np.arange(step * batch, (step + 1) * batch), n)
    return np.concatenate([permutation(seed, int(e), n)[place[epoch == e]] for e in np.unique(epoch)])


def take(tokens: np.ndarray, sequences: np.ndarray, T: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence i is tokens[i T : i T + T], its targets one further. Two (B, T) int64 tensors on the device."""
    both = torch.from_numpy(tokens[sequences[:, None] * T + np.arange(T + 1)].astype(np.int64))
    if device.type == "cuda":
        both = both.pin_memory()
    both = both.to(device, non_blocking=True)
    return both[:, :-1], both[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def open_log(path: Path, step: int):
    """The log without the lines past `step`, which will be written again, open for more, unbuffered."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    replace_file(path, lambda f: f.writelines(line.encode() + b"\n" for line in kept))
    return open(path, "ab", buffering=0)


def initial_weights(model: GPT, path: str) -> str:
    """Load a checkpoint's weights, and of the position embedding's own state what both have."""
    checkpoint = load_checkpoint(path)
    saved, own = checkpoint["model"], model.state_dict()
    weights = {name: x for name, x in saved.items() if ".position." not in name}
    expected = {name: x.shape for name, x in own.items() if ".position." not in name}
    if {name: x.shape for name, x in weights.items()} != expected or checkpoint["config"]["n_head"] != model.cfg.n_head:
        raise ValueError(f"{path} is a checkpoint of another shape: use the preset and the vocabulary that it was trained with")
    kept = {name: x for name, x in saved.items() if ".position." in name and name in own}
    for name, x in kept.items():
        if x.shape != own[name].shape:
            # FoPE's coefficients, whose last two dimensions are D and M: at another N it keeps more frequencies or fewer. As in the
            # release, those that both have keep theirs (both lists begin with the highest kept one); the others are as drawn, also
            # those that n_freqs adds, since they lie elsewhere above another floor.
            M = min(x.shape[-1], own[name].shape[-1])
            kept[name] = own[name].clone()
            kept[name][..., :M, :M] = x[..., :M, :M]
    model.load_state_dict(own | weights | kept)
    drawn = any(name not in saved or saved[name].shape != x.shape for name, x in own.items() if ".position." in name)
    return f"weights from {path}" + (", position coefficients that it lacks drawn afresh" if drawn else "")


# ---------------------------------------------------------------------------------------------------------------------
# The run


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Linear warm-up to lr, then a cosine that would reach lr / 10 one step after the last."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    done = (step - cfg.warmup) / max(cfg.steps - cfg.warmup, 1)
    return cfg.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def clock(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


def train(cfg: TrainConfig) -> Path | None:
    """The whole run, up to the last checkpoint. Returns where it lies, or None if a signal stopped it before."""
    stop_asked = []

    def on_signal(number, frame):
        stop_asked.append(number)
        if number == signal.SIGINT:  # a second Ctrl-C ends the process at once; a scheduler may well send SIGTERM twice
            signal.signal(number, handlers[number])

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    # Everything that can be wrong with the input is found before anything is written.
    machine = Machine(cfg)
    main, device, N = machine.rank == 0, machine.device, cfg.train_len
    if Path(cfg.data) == Path("data/builtin"):
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not Path(cfg.data).exists():
            machine.say("making the built-in corpus")
            prepare.builtin(Path(cfg.data))
    machine.sum(0)  # the others of this machine wait for it, and all for each other: from here on they fail alike
    tokens, meta = prepare.load(cfg.data, "train")
    val_tokens, _ = prepare.load(cfg.data, "val")
    cfg.vocab_size = cfg.vocab_size or -(-meta["vocab_size"] // 64) * 64
    for name, array in (("train", tokens), ("val", val_tokens)):
        if len(array) <= N:
            fail(f"{cfg.data}/{name}.bin has {len(array)} tokens: a sequence takes {N + 1} (--train_len plus one)")
        if array.max() >= cfg.vocab_size:
            fail(f"{cfg.data}/{name}.bin has token {array.max()}, outside the vocabulary of {cfg.vocab_size}")
    n_sequences = (len(tokens) - 1) // N
    share, remainder = divmod(cfg.batch_tokens, N * machine.world)  # sequences a step on this process
    if remainder or not share:
        fail(f"--batch_tokens {cfg.batch_tokens} is not a multiple of {N} tokens x {machine.world} processes")
    micro = next(m for m in range(min(share, max(cfg.micro_tokens // N, 1)), 0, -1) if share % m == 0)
    if cfg.eval_trials:  # hours later would be late to hear that the evaluation cannot work
        skip = "--eval_trials=0 trains without the evaluation"
        try:
            passkey_document(get_tokenizer(meta["tokenizer"], cfg.data), N, 12_345, 0.5)
        except ValueError as error:
            fail(f"{error}: name a longer --train_len; {skip}")
        if len(val_tokens) <= 16 * N:
            fail(f"{cfg.data}/val.bin has {len(val_tokens)} tokens: the evaluation takes {16 * N + 1} (16 x --train_len, plus one); {skip}")

    out, start = Path(cfg.out), 0
    if out.exists() and not cfg.resume:
        fail(f"{out} exists: --resume goes on with it, --out=NAME starts another")
    try:
        raw = GPT(cfg)
        checkpoint = load_checkpoint(out) if (out / "ckpt.pt").exists() else None
        if cfg.init_from and not checkpoint:
            machine.say(initial_weights(raw, cfg.init_from))
    except ValueError as error:
        fail(str(error))
    if checkpoint:
        other = {k: v for k, v in checkpoint["config"].items() if k not in FREE and v != getattr(cfg, k, None)}
        if other:
            fail(f"{out} was trained with other settings: " + " ".join(f"--{k}={v}" for k, v in other.items()))
        if checkpoint.get("data") != meta.get("train"):
            fail(f"{out} was trained on other data than {cfg.data}: name the same --data")
        raw.load_state_dict(checkpoint["model"])
    raw.to(device)
    decay = dict(lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=1e-8, weight_decay=cfg.weight_decay)
    optimizer = torch.optim.AdamW(raw.parameters(), **decay, fused=device.type in ("cuda", "cpu"))
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
    first = machine.sum(float(start) if main else 0.0)[0]
    if machine.sum(float(start != first))[0]:  # behind this sum every process has looked: one may write
        fail(f"the machines do not see the same checkpoint in {out}: --out must be a folder that all of them share")

    log = None
    if main:
        try:
            log = open_log(out / "log.jsonl", start)
        except OSError as error:
            fail(f"{out} cannot be written: {error}")

    model = torch.compile(raw) if machine.compile else raw
    if dist.is_initialized():
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # they never change; the argument of this name is deprecated since torch 2.13

    unwritten, broken = bytearray(), []  # what the log could not take yet, and why

    def record(**line):
        if main:
            unwritten.extend(json.dumps(line).encode() + b"\n")
            try:
                while unwritten:  # a full disk may take half a line: the next one begins with the rest
                    del unwritten[: log.write(unwritten)]
            except OSError as error:
                broken.append(f"{out}/log.jsonl could not be written ({error}): free the disk, then --resume")

    def save(step: int) -> None:
        error = None
        if main:
            try:
                state = {"model": raw.state_dict(), "optimizer": optimizer.state_dict()}
                facts = {"step": step, "config": asdict(cfg), "tokenizer": meta["tokenizer"], "data": meta.get("train")}
                replace_file(out / "ckpt.pt", lambda f: torch.save(facts | state, f))
            except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
                error = one_line(e)
        if machine.sum(float(error is not None))[0]:  # all stop at the same step
            fail(f"the checkpoint of step {step} could not be written ({error}): free the disk, then --resume")

    @torch.no_grad()
    def validate() -> float:
        """Mean loss over the first eval_tokens of the validation text, in sequences of N."""
        mine = np.arange(min(cfg.eval_tokens, len(val_tokens) - 1) // N)[machine.rank :: machine.world]
        total = 0.0
        for i in range(0, len(mine), micro):
            x, y = take(val_tokens, mine[i : i + micro], N, device)
            with machine.autocast():
                total += raw(x, y)[1].item() * len(x)
        total, count = machine.sum(total, len(mine))
        return total / max(count, 1)

    machine.say(
        f"{cfg.pos}, {raw.n_params():,} parameters (one embedding counted), N = {N}\n"
        f"{n_sequences:,} sequences, {cfg.batch_tokens * cfg.steps / len(tokens):.2f} epochs in {cfg.steps} steps of "
        f"{cfg.batch_tokens:,} tokens = {machine.world} processes x {share // micro} micro batches x {micro} sequences\n"
        f"to {out}" + (f", from step {start}" if start else "")
    )

    def batch(step: int) -> list:
        """This process's micro batches of a step."""
        mine = batch_sequences(cfg.seed, step, share * machine.world, n_sequences)[machine.rank * share :][:share]
        return [take(tokens, mine[i : i + micro], N, device) for i in range(0, share, micro)]

    done, upcoming = start, batch(start)
    logged_at, logged_step = time.perf_counter(), start
    for step in range(start, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        loss = torch.zeros((), device=device)
        for i, (x, y) in enumerate(upcoming):
            last = i == len(upcoming) - 1
            with nullcontext() if last or machine.world == 1 else model.no_sync():  # gradients meet once a step
                with machine.autocast():
                    micro_loss = model(x, y)[1] / len(upcoming)
                micro_loss.backward()
            loss += micro_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.clip)
        upcoming = batch(step + 1)  # while the accelerator works
        loss, stop = machine.sum(loss.item(), float(bool(stop_asked or broken)))
        loss, norm = loss / machine.world, norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            fail(f"loss {loss}, gradient norm {norm} at step {step + 1}: the last checkpoint is from before")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        stopping = stop > 0 or done == cfg.steps
        if done % cfg.log_every == 0 or done == start + 1 or stopping:
            now = time.perf_counter()
            speed = (done - logged_step) * cfg.batch_tokens / (now - logged_at) if done > start + 1 else None  # 1: compiling
            share_of_peak = 6 * raw.n_params() * speed / (machine.world * machine.peak) if speed and machine.peak else None
            rate = optimizer.param_groups[0]["lr"]
            if done % cfg.log_every == 0 or done in (1, cfg.steps):  # the same lines, stopped and resumed or not
                record(step=done, loss=loss, lr=rate, grad_norm=norm, tokens_per_s=speed and round(speed), share_of_peak=share_of_peak)
            text = f"step {done}/{cfg.steps}  loss {loss:.4f}  lr {rate:.2e}  grad norm {norm:.2f}"
            if speed:
                text += f"  {speed:,.0f} tokens/s" + (f"  {share_of_peak:.1%} of peak" if share_of_peak else "")
                text += f"  {clock((cfg.steps - done) * cfg.batch_tokens / speed)} left"
            machine.say(text)
            logged_at, logged_step = time.perf_counter(), done
        if done % cfg.eval_every == 0 or done == cfg.steps:
            val_loss = validate()
            record(step=done, val_loss=val_loss)
            machine.say(f"step {done}/{cfg.steps}  validation loss {val_loss:.4f}")
            logged_at, logged_step = time.perf_counter(), done
        if done % cfg.save_every == 0 or stopping:
            save(done)
        if stopping:
            break
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if dist.is_initialized():
        del model  # DDP holds the group: let go of first, or tearing gloo down hangs once in a while
        dist.barrier()
        dist.destroy_process_group()
    if done < cfg.steps:
        machine.say(f"stopped and saved at step {done}: --resume goes on")
    if broken:
        fail(broken[0])
    return out if main and done == cfg.steps and not stop_asked else None


def main() -> None:
    cfg = parse_flags(sys.argv[1:])
    out = train(cfg)
    if out and cfg.eval_trials:
        eval_passkey.main([str(out), f"--trials={cfg.eval_trials}", f"--device={cfg.device}", f"--dtype={cfg.dtype}"])
    if "RANK" in os.environ:
        # DDP never lets go of its process group: gloo's threads outlive it, and now and then Python's own end, when it
        # comes to them, aborts a process that has done all its work.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
