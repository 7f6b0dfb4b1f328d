"""Train FoPE and RoPE with --model=60M-short on a machine that is lent for ten minutes, and keep the small results.

    python dev/lend.py TEXT KEEP SECONDS [flags of train.py]

TEXT is the folder that dev/text60m.py wrote, packed. KEEP gets logs, records and losses by position, but not the
checkpoints of 1 GB. The script ends after SECONDS. Both models train for the same number of steps: the recipe's, or as
many as the measured speed allows. So a rehearsal on a CPU goes through the same lines:

    python dev/lend.py text60m kept 1200 --n_layer=1 --n_head=1 --n_embd=32 --n_hidden=32 --steps=2 \
        --batch_tokens=1024 --micro_tokens=512 --eval_tokens=8192 --eval_trials=2 --dtype=float32 --compile=off

On a GPU of your own, without a time limit, type the commands of paper/README.md instead.
"""

import bz2
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import command, say
from plot import read_lines
from train import configure, parse_flags

EVALUATION = 100  # seconds that the evaluation gets
STARTUP = 25  # seconds of a training besides its steps: imports, compilation, validation, checkpoints
PROBE = 100  # steps that measure the speed


@command
def main(argv: list[str]) -> None:
    text, keep, deadline = Path(argv[0]).resolve(), Path(argv[1]).resolve(), time.monotonic() + float(argv[2])
    flags = ["--model=60M-short", *argv[3:]]
    cfg, work = configure(parse_flags(flags)), Path("out/lend")
    flags += ["--eval_trials=0"]  # both are evaluated at the end
    runs = {pos: work / f"60M-short-{pos}-s{cfg.seed}" for pos in ("fope", "rope")}
    os.environ["TIKTOKEN_CACHE_DIR"] = str(text / "ranks")
    os.chdir(ROOT)
    work.mkdir(parents=True)

    def left() -> float:
        return deadline - time.monotonic()

    def unpack(name: str) -> str:
        with bz2.open(text / f"{name}.jsonl.bz2") as packed, open(work / f"{name}.jsonl", "wb") as file:
            shutil.copyfileobj(packed, file, 2**20)
        return file.name

    def start(*words) -> subprocess.Popen:
        say(f"\n{left():.0f} s left: {' '.join(map(str, words))}")
        return subprocess.Popen([sys.executable, *map(str, words)])

    def wait(*processes, seconds: float) -> None:
        """Ask whatever still runs after this many seconds to stop. A training saves first."""
        until = time.monotonic() + seconds
        for process in processes:
            try:
                process.wait(max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                say(f"out of time: {' '.join(process.args)}")
                process.terminate()
                process.wait()

    def keep_results() -> None:
        files = [run / name for run in runs.values() for name in ("log.jsonl", "eval.jsonl")]
        for file in (*files, work / "data/meta.json", Path("paper/results/loss_by_position.json")):
            if file.exists():
                (keep / file.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, keep / file.parent.name)

    # ---- Tokens. Meanwhile, two short trainings on the held-out text measure the speed and fill the compiler's cache.
    wait(start("data/prepare.py", unpack("val"), f"--out={work}/probe"), seconds=left())
    probes = [
        start("train.py", *flags, f"--pos={pos}", f"--steps={n}", f"--data={work}/probe", f"--out={work}/probe-{pos}")
        for pos, n in (("fope", min(PROBE, cfg.steps)), ("rope", 2))
    ]
    # The passkey documents come first, so that each of them is a training window.
    parts = [unpack("passkey"), unpack("train"), f"--val={work}/val.jsonl"]
    wait(start("data/prepare.py", *parts, f"--out={work}/data"), *probes, seconds=left())

    # ---- Train. If time runs out for one after all, its records say at which step.
    speed = [line["tokens_per_s"] for line in read_lines(work / "probe-fope/log.jsonl") if "loss" in line][-1]
    affordable = ((left() - EVALUATION) / 2 - STARTUP) * speed / cfg.batch_tokens
    flags += [f"--data={work}/data", f"--steps={max(1, min(cfg.steps, int(affordable)))}"]
    say(f"\n{speed:,} tokens/s are enough for {affordable:.0f} steps; the recipe has {cfg.steps}")
    for pos, trainings_left in (("fope", 2), ("rope", 1)):
        training = start("train.py", *flags, f"--pos={pos}", f"--out={runs[pos]}")
        wait(training, seconds=(left() - EVALUATION) / trainings_left)
    keep_results()

    # ---- Evaluate, all at once. Short lengths come first, and each record is written as soon as it is measured.
    sizes = f"--eval_tokens={cfg.eval_tokens}", f"--trials={cfg.eval_trials}", "--batch_tokens=65536", "--skip_lost"
    evaluations = [start("eval_passkey.py", run, "--logn=0,1,2", *sizes) for run in runs.values()]
    windows = max(cfg.eval_tokens // 4 // 8192, 1)
    evaluations.append(start("paper/measure.py", "loss", *runs.values(), "--length=8192", f"--windows={windows}"))
    wait(*evaluations, seconds=left() - 5)
    keep_results()
    say(f"\n{left():.0f} s left")


if __name__ == "__main__":
    main()
