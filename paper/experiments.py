"""The paper's pre-training experiments, each by one command, at its scale or in miniature with the same code.

    python paper/experiments.py fig1                               in miniature: every CPU core or GPU takes a run at a time
    python paper/experiments.py fig1 --scale=1.2B                  as the paper: torchrun on all GPUs, a run at a time

A run is a command of train.py and one of eval_passkey.py; both are printed, and do the same when typed. What is done is not
done again, what was stopped goes on: kill this, or let it run on several machines with different --seeds. Results are
paper/results/SCALE/RUN-sSEED.json; from them, paper/results/SCALE/EXPERIMENT.md and .png are made for the seeds there are.
"""

import argparse
import asyncio
import fcntl
import json
import os
import signal
import sys
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

RUNS = {  # what each changes about the preset; books-RUN is the same, trained on books and tested on C4
    **{pos: f"--pos={pos}" for pos in ("fope", "rope", "alibi", "kerple", "fire", "nope")},
    # Fig 6a. Double is meant at the same head count, or at the same head_dim: the paper does not give the shapes.
    "fope-no-fs": "--fourier_series=false",
    "fope-no-cf": "--clip_floor=false",
    "fope-double-head-dim": "--n_embd={2*n_embd} --n_hidden={2*n_hidden}",
    "fope-double-heads-layers": "--n_head={2*n_head} --n_embd={2*n_embd} --n_hidden={2*n_hidden} --n_layer={2*n_layer}",
    **{f"fope-sigma{sigma}": f"--sigma={sigma}" for sigma in (0.1, 0.2, 0.4, 0.5)},
    **{f"fope-d{d}": f"--n_freqs={d}" for d in (32, 64, 128)},
    "rope-qknorm": "--pos=rope --qk_norm",  # and on: Table 2
    "rope-a": "--pos=rope --whole_cycles",
    "rope-a-qknorm": "--pos=rope --whole_cycles --qk_norm",
    "nope-qknorm": "--pos=nope --qk_norm",
    "fope-release": "--zero_phase=false",  # what the release does, and
    "fope-normal": "--coef_init=normal",  # what the text says
    # Fig 4: a tenth of the tokens at 2N. The paper gives no schedule: here half of the learning rate, a twentieth of warm-up.
    **{f"{start}-then-{name}": flags + " --train_len=1024 --steps={steps//10} --warmup={steps//200} --lr={lr/2}"
       for start in ("rope", "fope")
       for name, flags in (("yarn", f"--pos={start} --scaling=yarn"), ("fope", "--pos=fope"))},
}  # fmt: skip

EXPERIMENTS = {  # the runs in the order of the paper's legend
    "fig1": ["nope", "alibi", "kerple", "fire", "rope", "fope"],
    "fig4": ["rope-then-yarn", "rope-then-fope", "fope-then-yarn", "fope-then-fope"],
    "fig5": ["fope", "rope", "alibi"],  # on books; so is Fig 6a, with the ratio of the two perplexities
    "fig6a": ["fope", "fope-no-fs", "fope-no-cf", "rope", "fope-double-head-dim", "fope-double-heads-layers"],
    "fig6b": ["fope-no-fs", "fope-sigma0.1", "fope-sigma0.2", "fope", "fope-sigma0.4", "fope-sigma0.5"],
    "fig6c": ["fope", "fope-d32", "fope-d64", "fope-d128"],
    "table2": ["rope", "rope-qknorm", "rope-a", "rope-a-qknorm", "nope", "nope-qknorm"],
    "release": ["fope", "fope-release", "fope-normal"],
}
VARIED = {  # the figures that are drawn against what is varied
    "fig6b": dict(xlabel="sigma", varied=dict(zip(EXPERIMENTS["fig6b"], (0, 0.1, 0.2, 0.3, 0.4, 0.5)))),
    "fig6c": dict(xlabel="number of frequencies D", varied=dict(zip(EXPERIMENTS["fig6c"], (16, 32, 64, 128)))),
}
MINIATURES = {"tiny": "--model=tiny", "tiny5k": "--model=tiny --steps=5000"}
SCALES = MINIATURES | {name: f"--model={name}" for name in ("60M", "180M", "1.2B")}
LENGTHS = "512,1024,2048,4096,8192"


def runs_of(experiment: str, scale: str) -> list[str]:
    books = experiment in ("fig5", "fig6a") and scale not in MINIATURES
    return [f"books-{run}" if books else run for run in EXPERIMENTS[experiment]]


def commands(run: str, scale: str, seed: int, trials: int, gpus: int) -> list[tuple[str, str]]:
    """(NAME, line): what makes out/SCALE/NAME/eval.json (eval-on-c4.json, where books are trained on), NAME = RUN-sSEED.

    Before a continuation comes the line that trains what it continues, which ends at once where that is done."""
    preset = vars(parse_flags(SCALES[scale].split()))
    python = "python" if scale in MINIATURES else f"torchrun --standalone --nproc_per_node={max(gpus, 1)}"
    books, start = run.startswith("books-"), run.split("-then-")[0]

    def training(run: str, more: str) -> tuple[str, str]:
        flags = eval("f" + repr(RUNS[run.removeprefix("books-")]), {}, preset)  # RUNS is ours
        line = f"{python} train.py {SCALES[scale]} {flags}{more} --seed={seed} --out=out/{scale}/{run}-s{seed} --eval_trials=0 --resume"
        return f"{run}-s{seed}", line

    evaluation = f"python eval_passkey.py out/{scale}/{run}-s{seed} --lengths={LENGTHS} --trials={trials}{' --data=data/c4' * books}"
    more = f" --init_from=out/{scale}/{start}-s{seed}" if start != run else " --data=data/gutenberg" * books
    return [*[training(start, "")] * (start != run), training(run, more), (f"{run}-s{seed}", evaluation)]


async def carry_out(lines: list[tuple[str, str]], kept: Path, scale: str, own: str) -> bool:
    """The lines of one run, with `own` in their environment and their output in out/SCALE/NAME.log. True if all went well."""
    for name, line in lines:
        out = ROOT / f"out/{scale}/{name}"
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{out}.log", "a") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the command holds it too, should it outlive this one
            except BlockingIOError:
                print(f"{name} is being run already", file=sys.stderr, flush=True)
                return False
            print(f"{own} {line}".strip(), flush=True)
            program = [sys.executable, *["-m", "torch.distributed.run"] * line.startswith("torchrun"), *line.split()[1:]]
            process = await asyncio.create_subprocess_exec("env", *own.split(), *program, cwd=ROOT, stdout=log, stderr=log)
            try:
                status = await process.wait()
            except asyncio.CancelledError:  # the driver was stopped: the command saves and ends
                if process.returncode is None:
                    process.terminate()
                await process.wait()
                raise
        flags = line.partition("train.py ")[2]  # a training that a signal stopped has saved and ended well, but is not finished
        if status or flags and json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] < parse_flags(flags.split()).steps:
            print(f"{name} is not finished (status {status}): see {out}.log", file=sys.stderr, flush=True)
            return False
    made = (out / ("eval-on-c4.json" if "--data=" in line else "eval.json")).read_bytes()
    kept.parent.mkdir(parents=True, exist_ok=True)
    replace_file(kept, lambda file: file.write(made))
    print(f"done: {kept}", flush=True)
    return True


def report(experiment: str, scale: str) -> None:
    """The experiment's table and figure, from every seed that there is."""
    folder, found = ROOT / "paper/results" / scale, []
    for run in runs_of(experiment, scale):
        for file in sorted(folder.glob(f"{run}-s[0-9]*.json")):
            found.append(plot.read_result(file))
    if not found:
        return
    losses = [r | {"perplexity": np.log(r["perplexity"]).tolist()} for r in found]  # as the paper's Table 2 has them
    text = plot.table(losses).replace(": perplexity", ": loss") if experiment == "table2" else plot.table(found)
    (folder / f"{experiment}.md").write_text(text + "\n")
    drawn = plot.figure(found, folder / f"{experiment}.png", **VARIED.get(experiment, {}))
    print(f"\n{text}\n\nwritten: {folder}/{experiment}.md" + f", {folder}/{experiment}.png" * drawn)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="tiny5k: tiny with 5000 steps, where retrieval has settled")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--runs", help="comma-separated: only these of the experiment")
    parser.add_argument("--trials", type=int, help="passkey trials a length: 100 in miniature, else the paper's 1000, unless told")
    parser.add_argument("--dry_run", action="store_true", help="print all commands, also of what is done, and end")
    args = parser.parse_args(argv)
    seeds = numbers("--seeds", args.seeds, at_least=0)
    known, miniature = runs_of(args.experiment, args.scale), args.scale in MINIATURES
    runs = args.runs.split(",") if args.runs else known
    if not set(runs) <= set(known):
        fail(f"{args.experiment} has no run {min(set(runs) - set(known))}: it has {', '.join(known)}")
    if miniature and args.experiment == "fig5":
        fail("fig5 is about two corpora, and the miniature has one: give --scale=60M, 180M or 1.2B, with data/gutenberg and data/c4")
    if args.scale in ("180M", "1.2B") and args.experiment in ("fig6b", "fig6c"):
        fail(f"{args.experiment} varies the 60M model's sigma 0.3 and 16 frequencies, as the paper does: give --scale=60M or tiny")
    trials = (100 if miniature else 1000) if args.trials is None else args.trials
    if trials < 1:
        fail("--trials must be at least 1")

    gpus, chains = torch.cuda.device_count(), {}
    for seed, run in dict.fromkeys((seed, run) for seed in seeds for run in runs):
        kept = ROOT / f"paper/results/{args.scale}/{run}-s{seed}.json"
        if args.dry_run or not kept.exists():
            # What continues one start is a chain: one after another, since the first of them may have to train the start.
            chains.setdefault((run.split("-then-")[0], seed), []).append((commands(run, args.scale, seed, trials, gpus), kept))
    if args.dry_run:
        print("\n".join(dict.fromkeys(line for chain in chains.values() for lines, _ in chain for _, line in lines)))
        return
    if chains and miniature and not (ROOT / "data/builtin").exists():  # once, not in every run at the same time
        builtin(ROOT / "data/builtin")
    slots = [""]  # all GPUs together, or Apple's one
    if miniature and not torch.backends.mps.is_available():
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).replace(" ", "").split(",")[:gpus]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        slots = [f"CUDA_VISIBLE_DEVICES={card}" for card in cards] or ["OMP_NUM_THREADS=1"] * cores
    left = iter(chains.values())  # every slot takes the next one as soon as it is free

    async def work(own: str) -> list[bool]:
        return [await carry_out(*job, args.scale, own) for chain in left for job in chain]

    async def spread() -> bool:
        """Whether all went well. Not by gather(): stopped, that would wait for one of the slots only."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
        done, _ = await asyncio.wait([asyncio.create_task(work(own)) for own in slots])
        return all(all(task.result()) for task in done)

    try:
        well = asyncio.run(spread())
    except (KeyboardInterrupt, asyncio.CancelledError):
        fail("stopped: the same command goes on")
    report(args.experiment, args.scale)
    sys.exit(not well)


if __name__ == "__main__":
    main(sys.argv[1:])
