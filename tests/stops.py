"""Runs of train.py: real processes, forked from a server that imports torch once, with what may happen to them."""

import itertools
import multiprocessing
import os
import pkgutil
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import train

ROOT = Path(__file__).resolve().parent.parent
ENV = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch._dynamo", "test_train"])


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def child(folder, argv, patches, env):
    signal.alarm(200)  # a process that hangs is a failure (status -14), not a wait without end
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ |= env
    sys.argv = ["train.py", *argv]
    train.plot.loss_figure = lambda *args: None  # drawing takes longer than these runs
    for patch in patches:
        patch()
    train.main()


def run(argv, *patches, world=1, rank=None):
    """train.main() in `world` processes as torchrun starts them. The patches are for one rank; None: for all."""
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ENV):
        for r in range(world):
            ranks = env | {"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {}
            args = folder, argv, patches if rank in (None, r) else (), ranks
            processes.append(forks.Process(target=child, args=args))
            processes[-1].start()
        for process in processes:
            process.join()
        printed = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    status = [process.exitcode for process in processes]
    return subprocess.CompletedProcess(argv, status if world > 1 else status[0], *printed)


def start(*argv, **env):
    """A Python command of its own, as from a shell."""
    env = os.environ | ENV | env
    return subprocess.Popen([sys.executable, *argv], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def before(function, n, action):
    """A patch. Before the n-th call of `function` (0: each), send a signal, raise an error or call a function."""
    return partial(patch_call, function, n, action)


def patch_call(function, n, action):
    owner, name = function.rsplit(".", 1)
    owner, calls = pkgutil.resolve_name(owner), itertools.count(1)
    real = getattr(owner, name)

    def patched(*args, **kwargs):
        if n in (0, next(calls)):
            if isinstance(action, signal.Signals):
                os.kill(os.getpid(), action)
            elif isinstance(action, Exception):
                raise action
            elif callable(action):
                action(*args)
            else:
                return action  # a value replaces the call
        return real(*args, **kwargs)

    setattr(owner, name, patched)


def half_then_kill(*args):
    file = getattr(args[-1], "file", args[-1])  # the log's, or the one that torch.save writes to
    file.write(b'{"step": 13, "lo')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def leave_room(size, log):
    """From now on, a file takes no more than the log has and `size` bytes. stdout is a file too: away with it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limit = os.fstat(log.file.fileno()).st_size + size
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
