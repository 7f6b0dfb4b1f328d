"""The paper's pre-training experiments. Each is one command, with the tiny preset or at the paper's scale.

    python paper/experiments.py fig1                 tiny: one run per CPU core or GPU, side by side
    python paper/experiments.py fig1 --scale=1.2B    as in the paper: torchrun on all GPUs, one run after another
    python paper/experiments.py tables               no training: write the tables and figures of the records again

A run is a command of train.py and some of eval_passkey.py. Each is printed, so you can also type it. A run whose
records exist is skipped. Ctrl-C and SIGTERM let the running commands save, and then the same command resumes. Records
are in paper/results/SCALE/eval.jsonl. The table and the figure, EXPERIMENT.md and .png beside them, show all seeds.
"""

import itertools
import math
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot
from common import Parser, UserError, command, replace_file, say
from data.prepare import builtin
from eval_passkey import append, numbers
from train import TrainConfig, configure, on_stop

# ----------------------------------------------------------------------------------------------------------------------
# The grid

SCALES = ("tiny", "60M", "180M", "1.2B")
LENGTHS = (512, 1024, 2048, 4096, 8192)
EXPERIMENTS = {  # the runs of each
    "fig1": ["nope", "alibi", "kerple", "fire", "rope", "fope"],
    "fig4": ["rope-then-yarn", "rope-then-fope", "fope-then-yarn", "fope-then-fope"],
    "fig5": ["books-fope", "books-rope", "books-alibi"],
    "fig6a": ["fope", "fope-no-fs", "fope-no-cf", "rope", "fope-double-head-dim", "fope-double-heads-layers"],
    "fig6b": ["fope-sigma0", "fope-sigma0.1", "fope-sigma0.2", "fope", "fope-sigma0.4", "fope-sigma0.5"],
    "fig6c": ["fope", "fope-d32", "fope-d64", "fope-d128"],
    "table2": ["rope", "rope-qknorm", "rope-a", "rope-a-qknorm", "nope", "nope-qknorm"],
    "release": ["fope", "fope-eq13", "fope-normal"],
    "qknorm": ["rope", "rope-qknorm", "fope", "fope-qknorm"],
    "logn": ["alibi", "kerple", "fire", "rope", "fope"],
}
LOGN = {  # the runs of each that are also shown with log-n scaling, p = 2
    "fig1": ["rope", "fope"],
    "fig6a": ["fope", "fope-no-fs", "fope-no-cf", "books-fope", "books-fope-no-fs", "books-fope-no-cf"],
    "release": ["fope", "fope-eq13", "fope-normal"],
    "qknorm": ["rope", "rope-qknorm", "fope", "fope-qknorm"],
    "logn": EXPERIMENTS["logn"],
}
TITLES = {  # of the figures of tiny that the pages show
    "fig1": "With log-n scaling at test time, FoPE finds nine keys in ten at 8N, RoPE half at 2N",
    "logn": "Log-n scaling lets FoPE find nine keys in ten at 8N. It harms KERPLE",
}


TEXT = ("data", "source", "eval_tokens")  # in these fields, records of two texts differ
TORCHRUN = ["torchrun", "--standalone", f"--nproc_per_node={max(torch.cuda.device_count(), 1)}"]
# The paper's Table 1: SmolLM-1.7B continued at 4096 tokens with FoPE and with RoPE, then scored on LongBench. The paper
# does not name the text, the number of tokens or the learning rate. These are ours.
TASKS = ",".join(f"longbench_{task}_e" for task in ("gov_report", "multi_news", "trec", "triviaqa", "samsum"))
CONTINUE = """\
{torchrun} train.py --init_from=out/smollm --pos={pos} --sigma=0.6 --train_len=4096 --data=data/gutenberg-smollm \
--batch_tokens=524288 --steps=1907 --warmup=95 --optimizer=adamw --lr=1e-4 --recompute --eval_trials=0 \
--out=out/table1-{pos}
python -m hf.convert to out/table1-{pos} out/table1-{pos}-hf --dtype=bfloat16
lm_eval --model hf --model_args pretrained=out/table1-{pos}-hf,trust_remote_code=True,max_length=32768 \
--tasks {tasks} --log_samples --output_path out/table1-{pos}-scores"""
TABLE1 = [
    "hf download HuggingFaceTB/SmolLM-1.7B --local-dir SmolLM-1.7B",
    "python -m hf.convert from SmolLM-1.7B out/smollm",
    "python data/prepare.py gutenberg --tokens=1e9 --tokenizer=out/smollm/tokenizer.json --out=data/gutenberg-smollm",
    *(CONTINUE.format(torchrun=" ".join(TORCHRUN), pos=pos, tasks=TASKS) for pos in ("fope", "rope")),
]


def runs_of(p: TrainConfig) -> dict[str, dict]:
    """The flags of every run that change the preset p. init_from is the run that a run continues."""
    doubled = dict(n_embd=2 * p.n_embd, n_hidden=2 * p.n_hidden)
    runs = {pos: dict(pos=pos) for pos in ("nope", "alibi", "kerple", "fire", "rope", "fope")}
    runs |= {
        "fope-no-fs": dict(fourier_series=False),
        "fope-no-cf": dict(clip_floor=False),
        "fope-double-head-dim": doubled,
        "fope-double-heads-layers": doubled | dict(n_head=2 * p.n_head, n_layer=2 * p.n_layer),
        **{f"fope-sigma{sigma}": dict(sigma=sigma) for sigma in (0, 0.1, 0.2, 0.4, 0.5)},
        **{f"fope-d{d}": dict(n_freqs=d) for d in (32, 64, 128)},
        "rope-qknorm": dict(pos="rope", qk_norm=True),
        "rope-a": dict(pos="rope", whole_cycles=True),
        "rope-a-qknorm": dict(pos="rope", whole_cycles=True, qk_norm=True),
        "fope-qknorm": dict(qk_norm=True),
        "nope-qknorm": dict(pos="nope", qk_norm=True),
        "fope-eq13": dict(zero_phase=True),
        "fope-normal": dict(coef_init="normal"),
    }
    books = "data/books" if p.model == "tiny" else "data/gutenberg"
    runs |= {f"books-{name}": flags | dict(data=books) for name, flags in runs.items()}
    # A tenth of the tokens at 2N. The paper gives no schedule: we halve lr, and warm up for 5% of the steps.
    longer = dict(train_len=2 * p.train_len, steps=p.steps // 10, warmup=p.steps // 200, lr=p.lr / 2)
    for start in ("rope", "fope"):
        runs[f"{start}-then-yarn"] = dict(pos=start, init_from=start, scaling="yarn") | longer
        runs[f"{start}-then-fope"] = dict(pos="fope", init_from=start) | longer
    return runs


def runs_in(experiment: str, scale: str) -> list[str]:
    """The runs of an experiment. At the paper's scale, those of Figure 6a are trained on books."""
    books = "books-" if experiment == "fig6a" and scale != "tiny" else ""
    return [books + run for run in EXPERIMENTS[experiment]]


def records_in(file: Path) -> list[dict]:
    return plot.read(file) if file.exists() else []


def words_of(flags: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def commands(run: str, seed: int, scale: str, trials: int, records: list[dict]) -> list[list[str]]:
    """The words of the commands that a run takes: none if its records exist."""
    runs, tiny = runs_of(configure({"model": scale})), scale == "tiny"
    texts, powers = ["data/builtin" if tiny else "data/c4"], (0, 2) if run in sum(LOGN.values(), []) else (0,)
    if "data" in runs[run]:  # a run on books is measured on other text too
        texts = [runs[run]["data"], *(["data/essay", "data/speeches"] if tiny else ["data/c4"])]
    last = dict(run=run, seed=seed, trials=trials, data=texts[-1], logn=powers[-1], length=LENGTHS[-1])
    if any(last.items() <= {name: record[name] for name in last}.items() for record in records):
        return []
    found = []
    for name in dict.fromkeys([runs[run].get("init_from", run), run]):
        flags, out = runs[name] | dict(seed=seed, eval_trials=0), f"out/{scale}/{name}-s{seed}"
        if "init_from" in flags:
            flags["init_from"] = f"out/{scale}/{flags['init_from']}-s{seed}"
        flags |= dict(out=out, resume=True) if (ROOT / out).exists() else dict(out=out)
        found.append([*(["python"] if tiny else TORCHRUN), "train.py", f"--model={scale}", *words_of(flags)])
    flags = dict(lengths=",".join(map(str, LENGTHS)), logn=",".join(map(str, powers)), trials=trials)
    return found + [["python", "eval_passkey.py", out, *words_of(flags | dict(data=text))] for text in texts]


# ----------------------------------------------------------------------------------------------------------------------
# The driver


class Driver:
    """Runs jobs side by side. What their commands print goes to out/SCALE/RUN-sSEED.log."""

    def __init__(self, scale: str, environments: list[dict]):
        self.scale, self.processes, self.stopped, self.failed = scale, [], False, []
        self.free = queue.SimpleQueue()  # each job takes the environment of one GPU or core
        for environment in environments:
            self.free.put(environment)

    def stop(self, *signal) -> None:
        """Lets the running commands save and end, and starts no more."""
        self.stopped = True
        for process in self.processes:
            process.terminate()

    def call(self, words: list[str], log: Path, environment: dict) -> bool:
        """Prints a command and carries it out. Returns whether it succeeded."""
        say(" ".join([*(f"{name}={value}" for name, value in environment.items()), *words]))
        words = [sys.executable, *(["-m", "torch.distributed.run"] if words[0] == "torchrun" else []), *words[1:]]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            # A session of its own: Ctrl-C in a terminal reaches the driver only, which sends one SIGTERM.
            options = dict(cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True)
            self.processes.append(process := subprocess.Popen(words, **options))
        if self.stopped:
            process.terminate()
        return process.wait() == 0

    def carry_out(self, jobs: list[dict]) -> None:
        """Carries out the commands of jobs one after another, and copies the new records to paper/results."""
        environment = self.free.get()
        try:
            for job in jobs:
                self.carry_out_one(job, environment)
        finally:
            self.free.put(environment)

    def carry_out_one(self, job: dict, environment: dict) -> None:
        out = f"out/{self.scale}/{job['run']}-s{job['seed']}"
        before = len(records_in(ROOT / out / "eval.jsonl"))
        log = ROOT / f"{out}.log"
        ended = all(not self.stopped and self.call(words, log, environment) for words in job["commands"])
        records = records_in(ROOT / out / "eval.jsonl")[before:]
        if not ended or any(record["step"] < record["steps"] for record in records):  # a stopped training has status 0
            self.failed.append(out)
            if not self.stopped:
                say(f"{out} is not finished: see {log}", sys.stderr)
            return
        for record in records:  # without the seed in these names, seeds agree in all other fields
            names = {"run": job["run"], "init_from": job["init_from"]}
            append(ROOT / f"paper/results/{self.scale}/eval.jsonl", record | names)


def report(experiment: str, scale: str, records: list[dict]) -> None:
    """Writes the experiment's table and figure, from every seed that has records."""
    records = [plot.any_dtype(record) for record in records if record["run"] in runs_in(experiment, scale)]
    records = [record for record in records if not record["logn"] or record["run"] in LOGN.get(experiment, ())]
    own = {plot.identity(r, *TEXT): r["perplexity"] for r in records if r["data"] == r["train_data"]}
    other = [record for record in records if record["data"] != record["train_data"]]
    for record in other:  # the paper's Figure 6a has ratios
        record["ratio"] = record["perplexity"] / own[plot.identity(record, *TEXT)]
    for record in records if experiment == "table2" else ():  # the paper's Table 2 has losses
        record["loss"] = math.log(record.pop("perplexity"))
    if records:
        folder, text = ROOT / "paper/results" / scale, plot.table(other or records)
        replace_file(folder / f"{experiment}.md", lambda file: file.write(f"{text}\n".encode()))
        title = TITLES.get(experiment, "") if scale == "tiny" else ""
        plot.save(folder / f"{experiment}.png", plot.figure, other or records, title)
        say(f"\n{text}\n\nwritten: {folder}/{experiment}.md")


@command
def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("experiment", choices=[*EXPERIMENTS, "table1", "tables"], help="table1 only prints commands; tables redraws")
    add("--scale", choices=SCALES, default="tiny", help="the size of the model (default: tiny)")
    add("--seeds", default="0", help="comma-separated (default: 0)")
    add("--runs", help="comma-separated: only these runs of the experiment")
    add("--trials", type=int, help="passkey trials per length (default: 50 for tiny, else 1000)")
    add("--jobs", type=int, help="runs at a time for tiny (default: one on every CPU core or GPU)")
    add("--dry_run", action="store_true", help="print the commands and exit")
    args = parser.parse_args(argv)
    if min(args.jobs or 1, args.trials or 1) < 1:
        raise UserError("--jobs and --trials must be at least 1")
    if args.experiment == "table1":
        return say("\n".join(TABLE1))
    if args.experiment == "tables":
        for file in sorted((ROOT / "paper/results" / args.scale).glob("*.md")):
            report(file.stem, args.scale, records_in(file.parent / "eval.jsonl"))
        return
    tiny, known = args.scale == "tiny", runs_in(args.experiment, args.scale)
    runs, trials = args.runs.split(",") if args.runs else known, args.trials or (50 if tiny else 1000)
    if unknown := set(runs) - set(known):
        raise UserError(f"{args.experiment} has no run {min(unknown)}: it has {', '.join(known)}")
    results = ROOT / f"paper/results/{args.scale}/eval.jsonl"
    flags, jobs, done = runs_of(configure({"model": args.scale})), {}, [] if args.dry_run else records_in(results)
    for seed, run in itertools.product(numbers("seeds", args.seeds, 0), runs):
        if todo := commands(run, seed, args.scale, trials, done):
            start = flags[run].get("init_from", "")
            # Runs that continue one run follow each other, so that it is trained once.
            job = dict(run=run, seed=seed, init_from=start, commands=todo)
            jobs.setdefault((start or run, seed), []).append(job)
    if args.dry_run:
        every = (" ".join(words) for some in jobs.values() for job in some for words in job["commands"])
        return say("\n".join(dict.fromkeys(every)))
    results.parent.mkdir(parents=True, exist_ok=True)
    if tiny and jobs and not (ROOT / "data/builtin").exists():
        builtin(ROOT / "data/builtin")  # before the runs start: only one process may make it
    environments = [{}]  # at the paper's scale, one worker has all GPUs
    if tiny:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible.split(",") if torch.cuda.is_available()]
        environments = environments or [{"OMP_NUM_THREADS": "1"}] * torch.get_num_threads()
        environments = list(itertools.islice(itertools.cycle(environments), args.jobs or len(environments)))
    driver = Driver(args.scale, environments)
    on_stop(driver.stop)
    with ThreadPoolExecutor(len(environments)) as pool:
        list(pool.map(driver.carry_out, jobs.values()))
    if driver.stopped:
        raise UserError("stopped: the same command resumes")
    report(args.experiment, args.scale, records_in(results))
    sys.exit(bool(driver.failed))


if __name__ == "__main__":
    main()
