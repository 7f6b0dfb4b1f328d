"""Small runs of train.py in processes forked from a server that imports torch once, and what may happen to them."""

import itertools
import json
import multiprocessing
import os
import pkgutil
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import train

ROOT = Path(__file__).resolve().parent.parent
ENV = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch._dynamo", "test_train"])

# 45 sequences, 8 a step: every sixth batch or so straddles two epochs. 4 micro-batches of 2 sequences on one process.
STEPS, N, BATCH, SEQUENCES = 20, 32, 8, 45
FLAGS = (
    f"--n_layer=1 --n_head=2 --n_embd=32 --n_hidden=64 --train_len={N} --batch_tokens={BATCH * N} "
    f"--micro_tokens={2 * N} --steps={STEPS} --warmup=0 --lr=2e-3 --init_std=0.02 --optimizer=muon --final_lr=0 "
    "--log_every=1 --eval_every=10 --save_every=8 --eval_trials=0 --compile=off --dtype=float32 --device=cpu"
).split()
FOX = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 100, dtype=np.uint8).astype(np.uint16)


def flags(data, out, *more):
    return [*FLAGS, f"--data={data}", f"--out={out}", *more]


def logged(out, name):
    """{step: value} from log.jsonl. What a resumed run wrote again counts, and half a line does not."""
    lines = (line for line in (out / "log.jsonl").read_text().splitlines() if line.endswith("}"))
    return {line["step"]: line[name] for line in map(json.loads, lines) if name in line}


def checkpoint(out):
    return torch.load(out / "ckpt.pt", weights_only=True) if (out / "ckpt.pt").exists() else {"step": 0}


def command(*argv, folder=ROOT, **env):
    """A Python command of its own, as from a shell: its status, its stdout and its stderr."""
    argv, env = [sys.executable, *map(str, argv)], os.environ | ENV | env
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def child(folder, argv, patches, env):
    signal.alarm(400)  # a process that hangs is a failure (status -14), not a wait without end
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ |= env
    sys.argv = ["train.py", *argv]
    train.plot.save = lambda *args: None  # drawing takes longer than these runs
    for patch, *args in patches:
        patch(*args)
    train.main()


def run(argv, *patches, world=1, rank=None):
    """train.main() in `world` processes as torchrun starts and ends them. The patches, calls (function, argument, ..)
    that come before it, are for one rank; None: for all. The returncode is a list with that of each process.

    A single process has no RANK. So it has to train alone, although the other variables say something else.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = {"WORLD_SIZE": str(max(world, 2)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ENV):
        for r in range(world):
            ranks = env | {"LOCAL_RANK": str(r)} | ({"RANK": str(r)} if world > 1 else {})
            args = folder, argv, patches if rank in (None, r) else (), ranks
            processes.append(forks.Process(target=child, args=args))
            processes[-1].start()
        while alive := [process for process in processes if process.exitcode is None]:
            wait([process.sentinel for process in alive])
            if any(process.exitcode for process in processes):  # one has failed: the launcher ends the others
                for process in alive:
                    process.join(10)
                    process.kill()
                    process.join()
        printed = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(argv, [process.exitcode for process in processes], *printed)


# ----------------------------------------------------------------------------------------------------------------------
# Patches for run(). An action is a function, and its arguments follow.


def at_step(n, action, *args):
    """The action after the n-th step of AdamW in this process, with or without another optimizer beside it."""
    steps = itertools.count(1)

    def hook(optimizer, *_):
        if isinstance(optimizer, torch.optim.AdamW) and next(steps) == n:
            action(*args)

    register_optimizer_step_post_hook(hook)


def before(function, action, *args):
    """The action before each call of a function, which is given by its name."""
    real = pkgutil.resolve_name(function)
    mock.patch(function, lambda *a, **options: (action(*args), real(*a, **options))[1]).start()


def leave_room(size):
    """From now on, a file takes no more than the log has and `size` bytes. stdout is a file too: away with it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    (out,) = (word.removeprefix("--out=") for word in sys.argv if word.startswith("--out="))
    limit = Path(out, "log.jsonl").stat().st_size + size
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def close_pipe():
    """From now on, stdout is a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
