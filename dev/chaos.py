"""Stop train.py again and again, at random moments and in random ways, and resume it each time.

    python dev/chaos.py --rounds=10 --seed=0

The final state must equal that of an undisturbed run, bit for bit.
"""

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import make_data
from runs import ENV, FLAGS, FOX, N, child, forks

WAYS = ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGKILL", "closed output", "full disk"]


class Run:
    """train.main() in a process of its own, whose output is a pipe that a thread reads."""

    def __init__(self, folder, argv):
        self.folder, self.started = tempfile.TemporaryDirectory(dir=folder), threading.Event()
        pipe = f"{self.folder.name}/stdout"
        os.mkfifo(pipe)
        with mock.patch.dict(os.environ, ENV):
            self.process = forks.Process(target=child, args=(self.folder.name, argv, (), {}))
            self.process.start()
        self.output = os.open(pipe, os.O_RDONLY)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        try:
            while text := os.read(self.output, 4096):
                if b"step " in text:
                    self.started.set()
        except OSError:  # closed by disturb()
            pass

    def disturb(self, way, log):
        if way == "closed output":
            os.close(self.output)
            time.sleep(0.2)
            way = "SIGTERM"  # otherwise it would go on to its end
        if way == "full disk":  # files may grow to this size: no checkpoint fits, and perhaps half a log line
            size = log.stat().st_size + 100 if log.exists() else 0
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, size))
        elif self.process.is_alive():
            os.kill(self.process.pid, getattr(signal, way))

    def end(self):
        """The exit status, and what it wrote on stderr."""
        self.process.join()
        return self.process.exitcode, Path(self.folder.name, "stderr").read_text()


def chaos(folder, argv, rounds, seed):
    """argv: flags of train.py without --out. Returns how each round ended: (way, step of its checkpoint, status)."""
    rng, calm, out, told = random.Random(seed), folder / "calm", folder / "out", []
    begin = time.time()
    assert Run(folder, [*argv, f"--out={calm}"]).end()[0] == 0
    seconds = time.time() - begin
    for way in rng.choices(WAYS, k=rounds):
        run = Run(folder, [*argv, f"--out={out}", *["--resume"] * out.exists()])
        run.started.wait(120)
        time.sleep(rng.random() * 2 * seconds / rounds)
        run.disturb(way, out / "log.jsonl")
        status, stderr = run.end()
        if way != "SIGKILL":
            assert not (out / "ckpt.tmp").exists()
            assert "Traceback" not in stderr or way == "full disk", stderr  # closing a full log may print one
        step = torch.load(out / "ckpt.pt")["step"] if (out / "ckpt.pt").exists() else 0
        told.append((way, step, status))
    status, stderr = Run(folder, [*argv, f"--out={out}", *["--resume"] * out.exists()]).end()
    assert status == 0, stderr
    for name in ("step", "model", "optimizer"):
        ends = [torch.load(run / "ckpt.pt")[name] for run in (out, calm)]
        torch.testing.assert_close(*ends, rtol=0, atol=0)
    return told


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder) / "data", FOX[: 45 * N + 1], FOX[:700])
        argv = [*FLAGS, f"--data={data}", "--steps=600", "--save_every=50"]
        for way, step, status in chaos(Path(folder), argv, args.rounds, args.seed):
            print(f"{way}: checkpoint at step {step}, status {status}")
    print("The final state equals that of the undisturbed run.")
