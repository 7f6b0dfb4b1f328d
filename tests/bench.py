"""How fast, against what one would use instead: every line is a ratio of two things timed alternately in one run.

    python tests/bench.py data      data/prepare.py against the bare tokenizer, and its memory
"""

import base64
import contextlib
import functools
import gzip
import http.server
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import regex  # tiktoken needs it too

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import prepare


def write_ranks(path: Path, texts: list[str], n: int = 50_256) -> None:
    """A vocabulary as large as GPT-2's: the bytes, and the commonest words of the texts with all their beginnings."""
    words = Counter(word for text in texts for word in regex.findall(prepare.GPT2_PATTERN, text))
    beginnings = Counter()
    for word, count in words.items():
        for end in range(2, len(word.encode()) + 1):
            beginnings[word.encode()[:end]] += count
    tokens = [bytes([b]) for b in range(256)] + [word for word, _ in beginnings.most_common(n - 256)]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))


def memory(pid: int) -> int:
    """Resident bytes of a process and its children; what they share is counted in each."""
    with contextlib.suppress(OSError):  # it may end while we look
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return resident + sum(memory(int(child)) for child in children)
    return 0


def data(shards: int = 8, megabytes: int = 40, rounds: int = 3) -> None:
    """A C4 of the standard library's text, on 127.0.0.1: tokens/s of data/prepare.py against encode_ordinary_batch."""
    cores = os.cpu_count()
    texts = [text for _, text in prepare.standard_library()[1] if text]
    size = sum(len(text) for text in texts)
    texts *= -(-megabytes * 2**20 // size)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        hub = root / "datasets/allenai/c4/resolve/main/en"
        hub.mkdir(parents=True)
        write_ranks(root / "ranks.tiktoken", texts[: len(texts) // 4])
        tokenizer = prepare.ranks_tokenizer(root / "ranks.tiktoken")
        with gzip.open(hub / "c4-train.00000-of-01024.json.gz", "wb", compresslevel=6) as file:
            file.writelines(json.dumps({"text": text}).encode() + b"\n" for text in texts)
        for i in range(1, shards):
            os.link(hub / "c4-train.00000-of-01024.json.gz", hub / f"c4-train.{i:05d}-of-01024.json.gz")
        for i in range(8):
            with gzip.open(hub / f"c4-validation.{i:05d}-of-00008.json.gz", "wb") as file:
                file.write(json.dumps({"text": "A short text."}).encode() + b"\n")
        n_tokens = shards * sum(len(tokens) + 1 for tokens in tokenizer.encode_ordinary_batch(texts, num_threads=cores))
        print(f"{shards} shards, {shards * sum(map(len, texts)) / 1e6:.0f} MB of text, {n_tokens / 1e6:.0f} M tokens, {cores} cores")

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=root))
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def pipeline(workers: int) -> tuple[float, int]:
            """Seconds, from the start of Python to the folder's rename, and the most memory seen."""
            command = [sys.executable, ROOT / "data/prepare.py", "c4", f"--tokens={n_tokens}", f"--out={root / 'out'}"]
            command += [f"--tokenizer={root / 'ranks.tiktoken'}", f"--base_url=http://127.0.0.1:{server.server_port}", f"--workers={workers}"]
            start, most = time.perf_counter(), 0
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while process.poll() is None:
                most = max(most, memory(process.pid))
                time.sleep(0.2)
            assert process.returncode == 0
            shutil.rmtree(root / "out")
            return time.perf_counter() - start, most

        def bare() -> float:
            start = time.perf_counter()
            for _ in range(shards):
                for i in range(0, len(texts), 256):
                    tokenizer.encode_ordinary_batch(texts[i : i + 256], num_threads=cores)
            return time.perf_counter() - start

        ratios = []
        for _ in range(rounds):
            ours, most = pipeline(cores)
            theirs = bare()
            ratios.append(theirs / ours)
            print(f"data/prepare.py {n_tokens / ours:,.0f} tokens/s, encode_ordinary_batch {n_tokens / theirs:,.0f}, ratio {ratios[-1]:.2f}", flush=True)
        print(f"data/prepare.py / bare tokenizer: {statistics.median(ratios):.2f} (median of {rounds}; goal 0.85)")
        print(f"memory at most: {most / 1e6:,.0f} MB with {cores} workers, {pipeline(16)[1] / 1e6:,.0f} MB with 16 (goal 2000)")


if __name__ == "__main__":
    benchmarks = {"data": data}
    if sys.argv[1:] and sys.argv[1] in benchmarks:
        benchmarks[sys.argv[1]]()
    else:
        prepare.fail(f"name one of {', '.join(benchmarks)}")
