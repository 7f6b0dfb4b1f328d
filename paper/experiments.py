"""The paper's pre-training experiments, each one command, at the paper's scale or in miniature.

    python paper/experiments.py fig1                  in miniature: one run at a time on every CPU core or GPU
    python paper/experiments.py fig1 --scale=1.2B     as in the paper: torchrun on all GPUs

A run is a command of train.py and one of eval_passkey.py. Both are printed and can be typed instead. What has a result
is skipped. What was stopped resumes. The result of a run is paper/results/SCALE/RUN-sSEED.json. From these, the command
makes paper/results/SCALE/EXPERIMENT.md and .png for all seeds that there are.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot
from data.files import fail, replace_file
from data.prepare import builtin
from eval_passkey import numbers
from train import parse_flags

# The paper gives no schedule for Figure 4's continuation at 2N. We take half of lr, and 5 % of the steps as warmup.
CONTINUED = "--train_len=1024 --steps={steps_10} --warmup={steps_200} --lr={half_lr}"
RUNS = {  # the flags of each run. {..} are values of the preset, see commands()
    "fope": "--pos=fope",
    "rope": "--pos=rope",
    "alibi": "--pos=alibi",
    "kerple": "--pos=kerple",
    "fire": "--pos=fire",
    "nope": "--pos=nope",
    "fope-no-fs": "--fourier_series=false",
    "fope-no-cf": "--clip_floor=false",
    "fope-double-head-dim": "--n_embd={twice_embd} --n_hidden={twice_hidden}",
    "fope-double-heads-layers": "--n_head={twice_head} --n_layer={twice_layer} --n_embd={twice_embd} "
    "--n_hidden={twice_hidden}",
    "fope-sigma0.1": "--sigma=0.1",
    "fope-sigma0.2": "--sigma=0.2",
    "fope-sigma0.4": "--sigma=0.4",
    "fope-sigma0.5": "--sigma=0.5",
    "fope-d32": "--n_freqs=32",
    "fope-d64": "--n_freqs=64",
    "fope-d128": "--n_freqs=128",
    "rope-qknorm": "--pos=rope --qk_norm",
    "rope-a": "--pos=rope --whole_cycles",
    "rope-a-qknorm": "--pos=rope --whole_cycles --qk_norm",
    "nope-qknorm": "--pos=nope --qk_norm",
    "fope-release": "--zero_phase=false",
    "fope-normal": "--coef_init=normal",
    "rope-then-yarn": f"--pos=rope --scaling=yarn {CONTINUED}",
    "rope-then-fope": f"--pos=fope {CONTINUED}",
    "fope-then-yarn": f"--pos=fope --scaling=yarn {CONTINUED}",
    "fope-then-fope": f"--pos=fope {CONTINUED}",
}
EXPERIMENTS = {  # the runs of each experiment, in the order of the paper's legend
    "fig1": ["nope", "alibi", "kerple", "fire", "rope", "fope"],
    "fig4": ["rope-then-yarn", "rope-then-fope", "fope-then-yarn", "fope-then-fope"],
    "fig5": ["fope", "rope", "alibi"],
    "fig6a": ["fope", "fope-no-fs", "fope-no-cf", "rope", "fope-double-head-dim", "fope-double-heads-layers"],
    "fig6b": ["fope-no-fs", "fope-sigma0.1", "fope-sigma0.2", "fope", "fope-sigma0.4", "fope-sigma0.5"],
    "fig6c": ["fope", "fope-d32", "fope-d64", "fope-d128"],
    "table2": ["rope", "rope-qknorm", "rope-a", "rope-a-qknorm", "nope", "nope-qknorm"],
    "release": ["fope", "fope-release", "fope-normal"],
}
VARIED = {  # figures that are drawn against a number
    "fig6b": ("sigma", [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
    "fig6c": ("number of frequencies D", [16, 32, 64, 128]),
}
TITLES = {("fig1", "tiny5k"): "FoPE's perplexity stays far below RoPE's beyond N. KERPLE and ALiBi retrieve farther"}
MINIATURES = {"tiny": "--model=tiny", "tiny5k": "--model=tiny --steps=5000"}
SCALES = MINIATURES | {name: f"--model={name}" for name in ("60M", "180M", "1.2B")}
LENGTHS = "512,1024,2048,4096,8192"


def runs_of(experiment: str, scale: str) -> list[str]:
    """At the paper's scale, Figures 5 and 6a train on books and test on C4: books-RUN is RUN on books."""
    books = experiment in ("fig5", "fig6a") and scale not in MINIATURES
    return [f"books-{run}" if books else run for run in EXPERIMENTS[experiment]]


def commands(run: str, scale: str, seed: int, trials: int) -> list[str]:
    """The commands of a run: training and evaluation, before them the training of the run that it continues."""
    cfg = parse_flags(SCALES[scale].split())
    values = dict(twice_embd=2 * cfg.n_embd, twice_hidden=2 * cfg.n_hidden, twice_head=2 * cfg.n_head)
    values |= dict(twice_layer=2 * cfg.n_layer, half_lr=cfg.lr / 2)
    values |= dict(steps_10=cfg.steps // 10, steps_200=cfg.steps // 200)
    gpus = max(torch.cuda.device_count(), 1)
    python = "python" if scale in MINIATURES else f"torchrun --standalone --nproc_per_node={gpus}"

    def training(run: str, more: str = "") -> str:
        out = f"out/{scale}/{run}-s{seed}"
        flags = RUNS[run.removeprefix("books-")].format(**values) + more
        resume = " --resume" if (ROOT / out).exists() else ""
        return f"{python} train.py {SCALES[scale]} {flags} --seed={seed} --out={out} --eval_trials=0{resume}"

    evaluation = f"python eval_passkey.py out/{scale}/{run}-s{seed} --lengths={LENGTHS} --trials={trials}"
    parent = run.split("-then-")[0]
    if parent != run:
        return [training(parent), training(run, f" --init_from=out/{scale}/{parent}-s{seed}"), evaluation]
    if run.startswith("books-"):
        return [training(run, " --data=data/gutenberg"), f"{evaluation} --data=data/c4"]
    return [training(run), evaluation]


def start(line: str, log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Prints a command and starts it, with its output in `log`."""
    print(*(f"{name}={value}" for name, value in environment.items()), line, flush=True)
    program, *words = line.split()
    words = [sys.executable, *["-m", "torch.distributed.run"] * (program == "torchrun"), *words]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        return subprocess.Popen(words, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file)


def keep_result(run: str, scale: str, seed: int, kept: Path) -> bool:
    """Copies a run's result to `kept`. False if its training was stopped before the last step."""
    made = ROOT / f"out/{scale}/{run}-s{seed}" / ("eval-on-c4.json" if run.startswith("books-") else "eval.json")
    result = json.loads(made.read_text())
    if result["step"] < result["config"]["steps"]:
        return False
    kept.parent.mkdir(parents=True, exist_ok=True)
    replace_file(kept, lambda file: file.write(made.read_bytes()))
    print(f"done: {kept}", flush=True)
    return True


def next_job(jobs: list, running: dict) -> tuple | None:
    """Takes a job from the list. Runs that continue one start wait for each other: the first may have to train it."""
    busy = {(run.split("-then-")[0], seed) for (run, seed, _), _, _ in running.values()}
    job = next((job for job in jobs if (job[0].split("-then-")[0], job[1]) not in busy), None)
    if job:
        jobs.remove(job)
    return job


def carry_out(jobs: list[tuple[str, int, Path]], scale: str, trials: int, slots: list[dict[str, str]]) -> bool:
    """Runs the jobs, one at a time on each slot, which is an environment. False if one of them failed."""
    running, well = {}, True  # slot number: (job, its commands that are left, process)
    try:
        while jobs or running:
            for slot, environment in enumerate(slots):
                job, left, process = running.pop(slot, (None, [], None))
                if process and process.poll() is None:
                    running[slot] = job, left, process
                    continue
                if job is None:
                    job = next_job(jobs, running)
                    if job is None:
                        continue
                    left = commands(job[0], scale, job[1], trials)
                run, seed, kept = job
                log = ROOT / f"out/{scale}/{run}-s{seed}.log"
                failed = process and process.returncode
                if left and not failed:
                    running[slot] = job, left[1:], start(left[0], log, environment)
                elif failed or not keep_result(run, scale, seed, kept):
                    print(f"{run}-s{seed} is not finished: see {log}", file=sys.stderr)
                    well = False
            time.sleep(0.2)
    except KeyboardInterrupt:
        for _, _, process in running.values():
            process.terminate()  # train.py saves
        for _, _, process in running.values():
            process.wait()
        fail("stopped: the same command resumes")
    return well


def report(experiment: str, scale: str) -> None:
    """Writes the experiment's table and figure, from every seed that has a result."""
    folder, runs = ROOT / "paper/results" / scale, runs_of(experiment, scale)
    found = [plot.read_result(file) for run in runs for file in sorted(folder.glob(f"{run}-s[0-9]*.json"))]
    if not found:
        return
    text = plot.table(found)
    if experiment == "table2":  # the paper's Table 2 has losses
        losses = [r | {"perplexity": np.log(r["perplexity"]).tolist()} for r in found]
        text = plot.table(losses).replace(": perplexity", ": loss")
    (folder / f"{experiment}.md").write_text(text + "\n")
    options = {"title": TITLES.get((experiment, scale), "")}
    if experiment in VARIED:
        options["xlabel"], values = VARIED[experiment]
        options["varied"] = dict(zip(runs, values))
    plot.figure(found, folder / f"{experiment}.png", **options)
    print(f"\n{text}\n\nwritten: {folder}/{experiment}.md and .png")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument(
        "--scale", choices=SCALES, default="tiny", help="tiny5k is tiny with 5000 steps (default: tiny)"
    )
    parser.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
    parser.add_argument("--runs", help="comma-separated: only these runs of the experiment")
    parser.add_argument("--trials", type=int, help="passkey trials per length (default: 100 in miniature, else 1000)")
    parser.add_argument("--dry_run", action="store_true", help="print all commands and end")
    args = parser.parse_args(argv)
    known, miniature = runs_of(args.experiment, args.scale), args.scale in MINIATURES
    runs = args.runs.split(",") if args.runs else known
    if not set(runs) <= set(known):
        fail(f"{args.experiment} has no run {min(set(runs) - set(known))}: it has {', '.join(known)}")
    if miniature and args.experiment == "fig5":
        fail("fig5 needs two corpora, and the miniature has one: use --scale=60M, 180M or 1.2B")
    if args.scale in ("180M", "1.2B") and args.experiment in VARIED:
        fail(f"{args.experiment} varies the 60M model, as the paper does: use --scale=60M or tiny")
    trials = (100 if miniature else 1000) if args.trials is None else args.trials
    if trials < 1:
        fail("--trials must be at least 1")

    folder = ROOT / "paper/results" / args.scale
    jobs = [(run, seed, folder / f"{run}-s{seed}.json") for seed in numbers("--seeds", args.seeds, 0) for run in runs]
    if args.dry_run:
        lines = [line for run, seed, _ in jobs for line in commands(run, args.scale, seed, trials)]
        print("\n".join(dict.fromkeys(lines)))
        return
    jobs = [job for job in jobs if not job[2].exists()]
    if jobs and miniature and not (ROOT / "data/builtin").exists():
        builtin(ROOT / "data/builtin")
    slots = [{}]  # all GPUs together, or Apple's one
    if miniature and not torch.backends.mps.is_available():
        cards = [{"CUDA_VISIBLE_DEVICES": str(card)} for card in range(torch.cuda.device_count())]
        slots = cards or [{"OMP_NUM_THREADS": "1"}] * os.cpu_count()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    well = carry_out(jobs, args.scale, trials, slots)
    report(args.experiment, args.scale)
    sys.exit(not well)


if __name__ == "__main__":
    main(sys.argv[1:])
