"""The paper's pre-training experiments. Each is one command, in miniature or at the paper's scale.

    python paper/experiments.py fig1                 in miniature: one run per CPU core or GPU, side by side
    python paper/experiments.py fig1 --scale=1.2B    as in the paper: torchrun on all GPUs, one run after another

A run is a command of train.py and one of eval_passkey.py (two in fig5). They are printed. You can type them instead.
A run that has a result is skipped. Ctrl-C and SIGTERM let the running commands save, and then the same command resumes.
Results are in paper/results/SCALE/RUN-sSEED.json. Table and figure, EXPERIMENT.md and .png beside them, show all seeds.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot
from common import UserError as fail_type, replace_file, say
from data.prepare import builtin
from eval_passkey import numbers
from train import TrainConfig, configure, on_stop, parse_flags

# ----------------------------------------------------------------------------------------------------------------------
# The grid

SCALES = {name: f"--model={name}" for name in ("tiny", "60M", "180M", "1.2B")}
LENGTHS = "512,1024,2048,4096,8192"

EXPERIMENTS = {  # the runs of each, in the order of the paper's legend
    "fig1": ["nope", "alibi", "kerple", "fire", "rope", "fope"],
    "fig4": ["rope-then-yarn", "rope-then-fope", "fope-then-yarn", "fope-then-fope"],
    "fig5": ["fope", "rope", "alibi"],
    "fig6a": ["fope", "fope-no-fs", "fope-no-cf", "rope", "fope-double-head-dim", "fope-double-heads-layers"],
    "fig6b": ["fope-no-fs", "fope-sigma0.1", "fope-sigma0.2", "fope", "fope-sigma0.4", "fope-sigma0.5"],
    "fig6c": ["fope", "fope-d32", "fope-d64", "fope-d128"],
    "table2": ["rope", "rope-qknorm", "rope-a", "rope-a-qknorm", "nope", "nope-qknorm"],
    "release": ["fope", "fope-release", "fope-normal"],
    "logn": ["alibi", "kerple", "fire", "rope", "fope"],
}
LOGN = {  # the runs of each whose results with log n, p = 2, are shown too
    "fig1": ["rope", "fope"],
    "fig6a": ["fope", "fope-no-fs", "fope-no-cf"],
    "table2": ["rope", "rope-qknorm"],
    "logn": EXPERIMENTS["logn"],
}
VARIED = {  # figures whose x axis is not the length
    "fig6b": dict(xlabel="sigma", varied=dict(zip(EXPERIMENTS["fig6b"], (0, 0.1, 0.2, 0.3, 0.4, 0.5)))),
    "fig6c": dict(xlabel="n_freqs, 0: the kept ones", varied=dict(zip(EXPERIMENTS["fig6c"], (0, 32, 64, 128)))),
}
TITLES = {  # of the figures of tiny that the pages show
    "fig1": "With log n at test time, FoPE finds nine keys in ten at 4N. RoPE finds none",
    "logn": "Log n lets FoPE retrieve at 4N. It harms KERPLE and FIRE",
}


def flags_of_runs(p: TrainConfig) -> dict[str, str]:
    """What each run changes about the preset p. A run START-then-NAME continues the run START."""
    doubled = f"--n_embd={2 * p.n_embd} --n_hidden={2 * p.n_hidden}"
    # A tenth of the tokens at 2N. The paper gives no schedule: we halve lr, and warm up for 5 % of the steps.
    longer = f"--train_len={2 * p.train_len} --steps={p.steps // 10} --warmup={p.steps // 200} --lr={p.lr / 2}"
    return {
        **{pos: f"--pos={pos}" for pos in ("nope", "alibi", "kerple", "fire", "rope", "fope")},
        "rope-then-yarn": f"--pos=rope --scaling=yarn {longer}",
        "rope-then-fope": f"--pos=fope {longer}",
        "fope-then-yarn": f"--pos=fope --scaling=yarn {longer}",
        "fope-then-fope": f"--pos=fope {longer}",
        "fope-no-fs": "--fourier_series=false",
        "fope-no-cf": "--clip_floor=false",
        "fope-double-head-dim": doubled,
        "fope-double-heads-layers": f"{doubled} --n_head={2 * p.n_head} --n_layer={2 * p.n_layer}",
        **{f"fope-sigma{sigma}": f"--sigma={sigma}" for sigma in (0.1, 0.2, 0.4, 0.5)},
        **{f"fope-d{d}": f"--n_freqs={d}" for d in (32, 64, 128)},
        "rope-qknorm": "--pos=rope --qk_norm",
        "rope-a": "--pos=rope --whole_cycles",
        "rope-a-qknorm": "--pos=rope --whole_cycles --qk_norm",
        "nope-qknorm": "--pos=nope --qk_norm",
        "fope-release": "--zero_phase=false",
        "fope-normal": "--coef_init=normal",
    }


def runs_of(experiment: str, scale: str) -> list[str]:
    """books-RUN is RUN trained on books and tested on other text: Figure 5 and, at the paper's scale, Figure 6a."""
    books = experiment == "fig5" or (experiment == "fig6a" and scale != "tiny")
    return [f"books-{run}" if books else run for run in EXPERIMENTS[experiment]]


def torchrun() -> str:
    return f"torchrun --standalone --nproc_per_node={max(torch.cuda.device_count(), 1)}"


def commands(run: str, seed: int, scale: str, trials: int) -> dict[str, str]:
    """The commands of a run in their order, and the folder that each works in."""
    flags = flags_of_runs(configure(parse_flags(SCALES[scale].split())))
    python = "python" if scale == "tiny" else torchrun()
    books, start, lines = run.startswith("books-"), run.split("-then-")[0], {}
    train_on, test_on = ("books", ("speeches", "essay")) if scale == "tiny" else ("gutenberg", ("c4",))
    for name in dict.fromkeys([start, run]):
        out = f"out/{scale}/{name}-s{seed}"
        line = f"{python} train.py {SCALES[scale]} {flags[name.removeprefix('books-')]}"
        line += f" --data=data/{train_on}" if books else ""
        line += f" --init_from=out/{scale}/{start}-s{seed}" if name != start else ""
        line += f" --seed={seed} --out={out} --eval_trials=0"
        line += " --resume" if (ROOT / out).exists() else ""
        lines[line] = out
    line = f"python eval_passkey.py {out} --lengths={LENGTHS} --trials={trials}"
    line += " --logn=0,2" if run.removeprefix("books-") in itertools.chain(*LOGN.values()) else ""
    return lines | ({f"{line} --data=data/{name}": out for name in test_on} if books else {line: out})


def table1() -> list[str]:
    """The paper's Table 1: SmolLM-1.7B continued at 4096 tokens with FoPE and with RoPE, then scored on LongBench.

    The paper does not name the text, the number of tokens or the learning rate. These are ours.
    """
    data = "data/gutenberg-smollm"
    tasks = ",".join(f"longbench_{task}_e" for task in ("gov_report", "multi_news", "trec", "triviaqa", "samsum"))
    lines = [
        "hf download HuggingFaceTB/SmolLM-1.7B --local-dir SmolLM-1.7B",
        "python -m hf.convert from SmolLM-1.7B out/smollm",
        f"python data/prepare.py gutenberg --tokens=1e9 --tokenizer=out/smollm/tokenizer.json --out={data}",
    ]
    for pos in ("fope", "rope"):
        out = f"out/table1-{pos}"
        lines += [
            f"{torchrun()} train.py --init_from=out/smollm --pos={pos} --sigma=0.6 "
            f"--train_len=4096 --data={data} --batch_tokens=524288 --steps=1907 --warmup=95 --optimizer=adamw "
            f"--lr=1e-4 --recompute --eval_trials=0 --out={out}",
            f"python -m hf.convert to {out} {out}-hf --dtype=bfloat16",
            f"lm_eval --model hf --model_args pretrained={out}-hf,trust_remote_code=True,max_length=32768 "
            f"--tasks {tasks} --log_samples --output_path {out}-scores",
        ]
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# The driver


def done(out: str, line: str) -> bool:
    """Checks a command that ended with status 0. Copies the result of an evaluation to paper/results."""
    if "train.py" in line:  # a training that a signal stopped has status 0 too
        last = json.loads((ROOT / out / "log.jsonl").read_text().splitlines()[-1])
        return last["step"] == configure(parse_flags(line.split("train.py ")[1].split())).steps
    (run, seed), data = out.removeprefix("out/").rsplit("-s", 1), line.partition("--data=data/")[2]
    stem = f"eval-on-{data}" if data else "eval"
    run += "-on-speeches" * (data == "speeches")
    for logn in ("-logn2", "") if "--logn" in line else ("",):  # RUN itself, without log n, says that the run is done
        result = (ROOT / out / f"{stem}{logn}.json").read_bytes()
        kept = ROOT / f"paper/results/{run}{logn}-s{seed}.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(kept, lambda file, content=result: file.write(content))
    say(f"done: {kept}")
    return True


def worker(jobs, environment: dict[str, str], failed: list[str]):
    """Takes jobs from an iterator that all workers share, and runs their commands one after another.

    This is a generator. It yields each process that it starts. Call it again when the process has ended.
    """
    for job in jobs:
        for line, out in job.items():
            say(" ".join([*(f"{name}={value}" for name, value in environment.items()), line]))
            program, *words = line.split()
            words = [sys.executable, *(["-m", "torch.distributed.run"] if program == "torchrun" else []), *words]
            log = ROOT / f"{out}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a") as file:
                # A session of its own: Ctrl-C in a terminal reaches the driver only, which sends one SIGTERM.
                options = dict(cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file)
                process = subprocess.Popen(words, start_new_session=True, **options)
            yield process
            if process.returncode or not done(out, line):
                say(f"{out} is not finished, status {process.returncode}: see {log}", sys.stderr)
                failed.append(out)
                break


def carry_out(workers: list) -> None:
    """Runs the workers side by side until all jobs are done, or a signal asks to stop."""
    signals = []
    on_stop(lambda number, frame: signals.append(number))
    processes = [next(worker, None) for worker in workers]
    while any(processes) and not signals:
        time.sleep(0.2)
        for i, process in enumerate(processes):
            if process and process.poll() is not None:
                processes[i] = next(workers[i], None)
    if signals:
        for process in filter(None, processes):
            process.terminate()  # train.py saves
        for process in filter(None, processes):
            process.wait()
        raise fail_type("stopped: the same command resumes")


def report(experiment: str, scale: str) -> None:
    """Writes the experiment's table and figure, from every seed that has a result."""
    folder, title = ROOT / "paper/results" / scale, TITLES.get(experiment, "") if scale == "tiny" else ""
    names = dict(zip(EXPERIMENTS[experiment], runs_of(experiment, scale)))
    runs = [*names.values(), *(f"{names[run]}-logn2" for run in LOGN.get(experiment, ()))]
    runs += [f"{run}-on-speeches" for run in runs if run.startswith("books-")]
    files = [file for run in runs for file in sorted(folder.glob(f"{run}-s[0-9]*.json"))]
    try:
        found = [plot.read_result(file) for file in files]
        if not found:
            return
        text = plot.table(found)
        if experiment == "table2":  # the paper's Table 2 has losses
            losses = [result | {"perplexity": np.log(result["perplexity"]).tolist()} for result in found]
            text = plot.table(losses).replace(": perplexity", ": loss")
    except ValueError as error:
        raise fail_type(str(error))
    (folder / f"{experiment}.md").write_text(text + "\n")
    drawn = plot.figure(found, folder / f"{experiment}.png", title, **VARIED.get(experiment, {}))
    say(f"\n{text}\n\nwritten: {folder}/{experiment}.md{' and .png' if drawn else ''}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("experiment", choices=[*EXPERIMENTS, "table1"], help="table1 only prints its commands, with --dry_run")
    add("--scale", choices=SCALES, default="tiny", help="the size of the model (default: tiny)")
    add("--seeds", default="0", help="comma-separated (default: 0)")
    add("--runs", help="comma-separated: only these runs of the experiment")
    add("--trials", type=int, help="passkey trials per length (default: 50 in miniature, else 1000)")
    add("--jobs", type=int, help="runs at a time in miniature (default: one on every CPU core or GPU)")
    add("--dry_run", action="store_true", help="print all commands and end")
    args = parser.parse_args(argv)
    if args.experiment == "table1":
        if not args.dry_run:
            raise fail_type("table1 needs GPUs and a network: type the commands that --dry_run prints")
        return say("\n".join(table1()))
    seeds, known = numbers("--seeds", args.seeds, 0), runs_of(args.experiment, args.scale)
    runs, miniature = args.runs.split(",") if args.runs else known, args.scale == "tiny"
    trials = (50 if miniature else 1000) if args.trials is None else args.trials
    if unknown := set(runs) - set(known):
        raise fail_type(f"{args.experiment} has no run {min(unknown)}: it has {', '.join(known)}")
    if args.scale in ("180M", "1.2B") and args.experiment in VARIED:
        raise fail_type(f"{args.experiment} varies the 60M model, as the paper does: use --scale=60M or tiny")
    if trials < 1 or (args.jobs is not None and args.jobs < 1):
        raise fail_type("--trials and --jobs must be at least 1")

    jobs = {}  # (START, seed): commands. Runs that continue one START are one job, which trains START once
    for seed in seeds:
        for run in runs:
            if args.dry_run or not (ROOT / f"paper/results/{args.scale}/{run}-s{seed}.json").exists():
                job = jobs.setdefault((run.split("-then-")[0], seed), {})
                job.update(commands(run, seed, args.scale, trials))
    if args.dry_run:
        say("\n".join(line for job in jobs.values() for line in job))
        return
    if jobs and miniature and args.experiment == "fig5":
        for name in (name for name in ("books", "speeches", "essay") if not (ROOT / "data" / name).exists()):
            raise fail_type(
                f"there is no data/{name}: python data/prepare.py {name}.jsonl --tokenizer=bytes --out=data/{name}"
            )
    try:
        folder = ROOT / "paper/results" / args.scale
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise fail_type(f"the results cannot be written: {error}")
    if jobs and miniature and not (ROOT / "data/builtin").exists():
        builtin(ROOT / "data/builtin")  # before the runs start: only one process may make it
    environments = [{}]  # at the paper's scale, one worker has all GPUs
    if miniature and not torch.backends.mps.is_available():
        gpus = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible.split(",")[:gpus]]
        environments = environments or [{"OMP_NUM_THREADS": "1"}] * cores
        environments = list(itertools.islice(itertools.cycle(environments), args.jobs or len(environments)))
    queue, failed = iter(jobs.values()), []
    carry_out([worker(queue, environment, failed) for environment in environments])
    report(args.experiment, args.scale)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
