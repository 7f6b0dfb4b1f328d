"""How fast, against what one would use instead: every line is a ratio of two things timed alternately in one run.

python dev/bench.py                       every section below but data and gpu, in one table
python dev/bench.py step                  training steps: FoPE, ALiBi, KERPLE, NoPE against RoPE; the batcher's share
python dev/bench.py length                a forward pass at 512 .. 16 384 tokens: time and memory
python dev/bench.py transformers          our RoPE model against Llama's with the same weights, and against GPT-2's
python dev/bench.py passkey               a trial by one forward pass, against greedy generation
python dev/bench.py data                  data/prepare.py [MB] against the bare tokenizer, and its memory
python dev/bench.py gpu [60M 180M 1.2B]   FoPE, RoPE, Llama: tokens/s, share of the card's peak
"""

import base64
import contextlib
import ctypes
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
from unittest import mock

import numpy as np
import regex  # tiktoken needs it too
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import UserError, command, find_device
from data import prepare
from data.tokenizer import GPT2_PATTERN, get_tokenizer
from eval_passkey import passkey_right, passkey_trials
from model import GPT, PRESETS, GPTConfig
from train import PEAK, RECIPES, batch_sequences, take

DEVICE, DTYPE, autocast = find_device()


def alternate(rounds: int, *works) -> list[list[float]]:
    """Seconds of each work in each round, after a round of warm-up: [work][round]."""
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


SHAPES = {"tiny": (8, 320, 60), "60M": (4, 50_304, 5)}  # sequences of 512 a step, vocabulary, rounds


def step() -> None:
    for preset, (B, vocab, rounds) in SHAPES.items():
        x, y = batch(B, 512, vocab)
        for compiled in (False, True):
            models = {
                pos: GPT(GPTConfig(pos=pos, vocab_size=vocab, **PRESETS[preset]))
                for pos in ("rope", "fope", "alibi", "kerple", "nope")
            }
            steps = [trainer(model, lambda run: run(x, y), compiled) for model in models.values()]
            times = dict(zip(models, alternate(rounds, *steps)))
            how = f"{preset} step, {'compiled' if compiled else 'eager'}"
            for pos, goal in (("fope", "<= 1.02"), ("alibi", "<= 1.10"), ("kerple", ""), ("nope", "")):
                row(f"{how}: {pos} / rope", times[pos], times["rope"], goal)
            if preset == "tiny":
                tokens = np.zeros(10**7, np.uint16)
                mine = alternate(
                    rounds, lambda: take(tokens, batch_sequences(0, 1000, B, 10**7 // 512 - 1), 512, DEVICE)
                )[0]
                row(f"{how}: batcher / rope", mine, times["rope"], "< 0.01")


def peak_bytes(work) -> int:
    """The most memory that work takes beside what is there before."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak below starts again from what is resident now

    def resident(name: str) -> int:
        return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024

    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


@torch.no_grad()
def length() -> None:
    """The tiny model, one sequence, the logits of its last position: only attention grows with T."""
    lengths, times, rest, memory = [512 * 2**i for i in range(6)], {}, {}, {}
    for pos in ("rope", "fope", "alibi", "nope"):
        model = GPT(GPTConfig(pos=pos, vocab_size=320, **PRESETS["tiny"])).to(DEVICE)
        for T in lengths:
            x, _ = batch(1, T, 320)

            def forward() -> None:
                with autocast():
                    model(x, last=1)

            def without_attention() -> None:
                with mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: v):
                    forward()

            times[pos, T], rest[pos, T] = alternate(5, forward, without_attention)
            memory[pos, T] = peak_bytes(forward)
    for pos in ("rope", "fope", "alibi", "nope"):
        for T in lengths[1:]:
            how = f"{pos}, {T} tokens"
            if pos != "rope":
                row(f"{how}: time / rope", times[pos, T], times["rope", T])
            row(
                f"{how} / 512: time a token without attention",
                [t / T for t in rest[pos, T]],
                [t / 512 for t in rest[pos, 512]],
                "<= 1",
            )
            row(f"{how} / 512: memory a token", [memory[pos, T] / T], [memory[pos, 512] / 512], "about 1")


@contextlib.contextmanager
def llama_elsewhere(preset: str):
    """A function that has a process of its own take a step of Llama, as transformers comes, and waits for it."""
    B, vocab, _ = SHAPES[preset]
    arguments = [sys.executable, __file__, "llama", preset, str(B), str(vocab), DEVICE.type, DTYPE]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step() -> None:
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "stepped\n"

    yield step
    process.stdin.close()
    process.wait()


def llama(preset: str, B: str, vocab: str, device: str, dtype: str) -> None:
    """The process of llama_elsewhere: for every line of stdin, a training step as a user of transformers writes it."""
    from conftest import llama_of

    model = llama_of(GPT(GPTConfig(pos="rope", vocab_size=int(vocab), **PRESETS[preset]))).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    x, y = batch(int(B), 512, int(vocab))
    for _ in sys.stdin:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(x, labels=y, shift_labels=y, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        print("stepped", flush=True)


def loss_of(run, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss of our model or of one of transformers, compiled or not."""
    if isinstance(getattr(run, "_orig_mod", run), GPT):
        return run(x, y)
    return run(x, labels=y, shift_labels=y, use_cache=False).loss


def transformers() -> None:
    from conftest import llama_of
    from transformers import GPT2Config, GPT2LMHeadModel

    def flops(model, embeddings: int) -> int:
        """FLOPs of a step per token: 6 per weight of a matrix, and 12 C T per layer for attention (PaLM, App. B)."""
        c = model.cfg if isinstance(model, GPT) else model.config
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - embeddings
        return 6 * matrices + 12 * c.n_layer * c.n_embd * 512

    for preset, (B, vocab, rounds) in SHAPES.items():
        x, y = batch(B, 512, vocab)
        for compiled in (False, True):
            ours = GPT(GPTConfig(pos="rope", vocab_size=vocab, **PRESETS[preset]))
            c = ours.cfg
            llama = llama_of(ours)
            gpt2 = GPT2LMHeadModel(
                GPT2Config(vocab_size=vocab, n_positions=512, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                           resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0)
            )  # fmt: skip

            steps = [
                trainer(ours, lambda run: run(x, y), compiled),
                trainer(llama, lambda run: loss_of(run, x, y), compiled),
                trainer(gpt2, lambda run: loss_of(run, x, y), compiled),
            ]
            mine, llamas, gpt2s = alternate(rounds, *steps)
            how = f"{preset} step, {'compiled' if compiled else 'eager'}: ours against"
            row(f"{how} Llama, tokens/s, in one process", llamas, mine, ">= 1.15")
            share = flops(ours, c.vocab_size * c.n_embd) / flops(gpt2, 512 * c.n_embd)
            row(f"{how} GPT-2, matmul FLOP/s", [t * share for t in gpt2s], mine, ">= 1.0")
        ours = GPT(GPTConfig(pos="rope", vocab_size=vocab, **PRESETS[preset]))
        with llama_elsewhere(preset) as theirs:
            mine, llamas = alternate(rounds, trainer(ours, lambda run: run(x, y), compiled=True), theirs)
        row(
            f"{preset} step as it comes (ours compiled and keeping memory): ours against Llama, tokens/s",
            llamas,
            mine,
            ">= 1.15",
        )


@torch.no_grad()
def passkey() -> None:
    """The rope model with random weights: what it answers changes nothing about the time."""
    model = GPT(GPTConfig(pos="rope", vocab_size=320, **PRESETS["tiny"])).to(DEVICE).eval()
    for T, trials in ((512, 64), (8192, 4)):
        documents, answers, _ = passkey_trials(get_tokenizer("bytes"), T, trials, 0)
        prompts, n = torch.from_numpy(documents[:, : -answers.max()].astype(np.int64)).to(DEVICE), int(answers.max())

        def ours() -> None:
            passkey_right(model, documents, answers, 16_384, autocast)

        def greedy(cached: bool, rows: int) -> None:
            with autocast():
                for tokens in prompts.split(rows):
                    if cached:
                        model.generate(tokens, n)
                        continue
                    for _ in range(n):
                        tokens = torch.cat([tokens, model(tokens, last=1).argmax(-1)], dim=1)

        rows = max(1, 16_384 // T)
        works = [ours, lambda: greedy(True, rows), lambda: greedy(True, 1), lambda: greedy(False, rows)]
        mine, cached, one_by_one, without = alternate(5, *works)
        row(
            f"passkey at {T}: one forward pass against greedy with a cache, trials/s, batched alike",
            cached,
            mine,
            ">= 1.2",
        )
        row(f"passkey at {T}: against greedy with a cache, trial by trial", one_by_one, mine, ">= 1.2")
        row(
            f"passkey at {T}: against greedy without a cache, batched alike", without, mine, ">= 5" if T == 8192 else ""
        )


def gpu(*presets: str) -> None:
    """Compiled training steps at N = 512. The micro batch fits 48 GB, the memory of the paper's cards.

    The share of the card's peak counts 6 FLOPs per token and parameter, with one embedding matrix.
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
                model = x = y = None  # of the try before
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
    """A vocabulary as large as GPT-2's: the bytes, and the commonest words of the texts with all their beginnings."""
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
    name, *arguments = argv or ["all"]
    tables = {"step": step, "length": length, "transformers": transformers, "passkey": passkey}
    others = {"data": data, "gpu": gpu, "llama": llama}
    if name in others:
        others[name](*arguments)
    elif name in ("all", *tables):
        print(f"{DEVICE}, {DTYPE}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        print("| | median | range | goal |\n|---|---|---|---|")
        for table in tables.values() if name == "all" else [tables[name]]:
            table()
    else:
        raise UserError(f"name one of {', '.join(tables)}, data, gpu")


if __name__ == "__main__":
    main()
