"""How fast the code is, compared with what one would use instead. step and data time both alternately, in one run.

python dev/bench.py step                  training steps: FoPE, ALiBi, KERPLE, NoPE against RoPE
python dev/bench.py data [MB [ROUNDS]]    data/prepare.py against the bare tokenizer, and its memory
python dev/bench.py gpu [60M 180M 1.2B]   FoPE, RoPE, Llama: tokens/s, share of the GPU's peak
"""

import base64
import gc
import gzip
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import regex  # tiktoken needs it too
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import UserError, command, find_device
from data import prepare
from data.tokenizer import GPT2_PATTERN, get_tokenizer
from model import GPT, PRESETS, GPTConfig
from train import PEAK, RECIPES

DEVICE, DTYPE, autocast = find_device()


def alternate(rounds: int, *works) -> list[list[float]]:
    """Seconds that each function takes in each round, after a warm-up round: [function][round]."""
    seconds = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, mine in zip(works, seconds):
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            mine.append(time.perf_counter() - start)
    return [mine[1:] for mine in seconds]


def row(what: str, ours: list[float], theirs: list[float], goal: str = "") -> None:
    """One line of the table: the median over the rounds of ours / theirs, and the range."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    print(f"| {what} | {statistics.median(ratios):.3g} | {min(ratios):.3g} - {max(ratios):.3g} | {goal} |", flush=True)


def batch(B: int, T: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(vocab, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def trainer(model, loss_of, compiled: bool = False):
    """A function that takes one optimizer step as train.py does. loss_of(model) runs it on a batch."""
    model = model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    run = torch.compile(model) if compiled else model

    def step() -> None:
        with autocast():
            loss = loss_of(run)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step() -> None:
    print(f"{DEVICE}, {DTYPE}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | median | range | goal |\n|---|---|---|---|")
    x, y = batch(4, 512, 320)
    for compiled in (False, True):
        steps = {}
        for pos in ("rope", "fope", "alibi", "kerple", "nope"):
            model = GPT(GPTConfig(pos=pos, vocab_size=320, **PRESETS["tiny"]))
            steps[pos] = trainer(model, lambda run: run(x, y), compiled)
        times = dict(zip(steps, alternate(60, *steps.values())))
        for pos, goal in (("fope", "<= 1.02"), ("alibi", "<= 1.10"), ("kerple", ""), ("nope", "")):
            how = "compiled" if compiled else "eager"
            row(f"tiny step, {how}: {pos} / rope", times[pos], times["rope"], goal)


def loss_of(run, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss of our model or of one of transformers, compiled or not."""
    if isinstance(getattr(run, "_orig_mod", run), GPT):
        return run(x, y)
    return run(x, labels=y, shift_labels=y, use_cache=False).loss


def gpu(*presets: str) -> None:
    """Compiled training steps at N = 512. The micro-batch fits 48 GB, the memory of the paper's GPUs.

    The share of the GPU's peak counts 6 FLOPs per token and parameter, with one embedding matrix.
    """
    from conftest import llama_of

    if not set(presets) <= PRESETS.keys():
        raise UserError(f"gpu takes some of {', '.join(PRESETS)}")
    cuda, name = DEVICE.type == "cuda", DEVICE.type
    if cuda:
        name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(48e9 / total, 1.0))
    peak = next((flops for card, flops in PEAK.items() if card in name), math.nan)
    print(f"{name}, {DTYPE}, torch {torch.__version__}\n")
    print("| preset | model | tokens at once | GB | tokens/s | share of peak | hours for 10B tokens on 4 |")
    print("|---" * 7 + "|")
    for preset in presets or ("60M", "180M", "1.2B"):
        at_once, speeds = RECIPES[preset].get("micro_tokens", 4096) if cuda else 512, {}
        for kind in ("fope", "rope", "llama"):
            while at_once >= 512 and kind not in speeds:
                model = x = y = None  # frees those of the previous try
                torch.compiler.reset()
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                pos = "rope" if kind == "llama" else kind
                model = GPT(GPTConfig(pos=pos, vocab_size=50_304, **PRESETS[preset]))
                n_params, (x, y) = model.n_params(), batch(at_once // 512, 512, 50_304)
                model = llama_of(model) if kind == "llama" else model
                try:
                    step = trainer(model, lambda run: loss_of(run, x, y), compiled=True)
                    seconds = alternate(10 if cuda else 1, step)[0]
                except torch.OutOfMemoryError:
                    at_once //= 2
                    continue
                finally:
                    step = None
                speeds[kind] = at_once / statistics.median(seconds)
                memory = torch.cuda.max_memory_reserved() / 1e9 if cuda else math.nan
                print(
                    f"| {preset} | {kind} | {at_once:,} | {memory:.1f} | {speeds[kind]:,.0f} "
                    f"| {6 * n_params * speeds[kind] / peak:.1%} | {1e10 / 4 / speeds[kind] / 3600:.1f} |",
                    flush=True,
                )
        for other in list(speeds)[1:]:
            print(f"| {preset} | fope / {other}, time | | | {speeds[other] / speeds['fope']:.3f} | | |")


def write_ranks(path: Path, texts: list[str], n: int = 50_256) -> None:
    """A vocabulary as large as GPT-2's: the bytes, and the most common words of the texts with all their prefixes."""
    words = Counter(word for text in texts for word in regex.findall(GPT2_PATTERN, text))
    beginnings = Counter()
    for word, count in words.items():
        for end in range(2, len(word.encode()) + 1):
            beginnings[word.encode()[:end]] += count
    tokens = [bytes([b]) for b in range(256)] + [word for word, _ in beginnings.most_common(n - 256)]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))


# prepare.py in a process of its own: seconds, and the peak of its memory above that of the imports, in MB.
PREPARE = """
import sys, time
from data import prepare

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

before, start = peak(), time.perf_counter()
prepare.main(sys.argv[1:])
print(time.perf_counter() - start, peak() - before)
"""


def data(megabytes: int | str = 60, rounds: int | str = 3) -> None:
    """data/prepare.py on files, against encode_ordinary_batch on the same documents in memory, at two sizes."""
    import pyarrow
    import pyarrow.parquet

    cores = os.cpu_count()
    texts = [text for _, text in prepare.standard_library()[1] if text]
    texts *= -(-int(megabytes) * 10**6 // sum(map(len, texts)))
    print(f"{cores} cores\n")
    print("| file | MB of text | M tokens/s | bare | ratio, median (range), goal 0.80 | peak MB, goal 600 |")
    print("|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_ranks(root / "ranks.tiktoken", texts[: len(texts) // 4])
        bare = get_tokenizer(str(root / "ranks.tiktoken")).encoding
        for copies in (1, 4):
            with gzip.open(root / "text.jsonl.gz", "wb", compresslevel=6) as file:
                for _ in range(copies):
                    file.writelines(json.dumps({"text": text}).encode() + b"\n" for text in texts)
            pyarrow.parquet.write_table(pyarrow.table({"text": texts * copies}), root / "text.parquet")
            for file in ("text.jsonl.gz", "text.parquet"):
                ours, theirs = [], []
                for _ in range(int(rounds)):
                    arguments = [sys.executable, "-c", PREPARE, root / file, f"--out={root / 'out'}"]
                    arguments += [f"--tokenizer={root / 'ranks.tiktoken'}"]
                    printed = subprocess.run(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
                    seconds, peak = map(float, printed.splitlines()[-1].split())
                    shutil.rmtree(root / "out")
                    start, n_tokens = time.perf_counter(), 0
                    for _ in range(copies):
                        for i in range(0, len(texts), 256):
                            batch = bare.encode_ordinary_batch(texts[i : i + 256], num_threads=cores)
                            n_tokens += sum(map(len, batch))
                    ours.append(seconds)
                    theirs.append(time.perf_counter() - start)
                ratios = sorted(b / a for a, b in zip(ours, theirs))
                speeds = [f"{n_tokens / statistics.median(some) / 1e6:.2f}" for some in (ours, theirs)]
                size = copies * sum(map(len, texts)) / 1e6
                ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
                print(f"| {file} | {size:.0f} | {speeds[0]} | {speeds[1]} | {ratio} | {peak:.0f} |", flush=True)


@command
def main(argv: list[str]) -> None:
    sections = {"step": step, "data": data, "gpu": gpu}
    if not argv or argv[0] not in sections:
        raise UserError(f"name one of {', '.join(sections)}")
    sections[argv[0]](*argv[1:])


if __name__ == "__main__":
    main()
