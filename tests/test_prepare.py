"""data/prepare.py: whatever servers, files, disks, kills and Ctrl-C do, a folder has exactly its tokens or is not there.

What is expected is computed here in the plainest way: whole texts in memory and tiktoken's encode_ordinary.
"""

import base64
import errno
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import requests
import tiktoken

import eval_passkey
import train
from data import prepare
from stops import KILL, on_call

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"}
BYTES = prepare.byte_tokenizer()
ODD = ["naïve café", "\U0001f600", "日本語", "don't we'll", "<|endoftext|>", "\r\n\t", "\x1c\u2003\u00a0", "x" * 300]


# ---------------------------------------------------------------------------------------------------------------------
# Texts, their tokens, and files of them


def documents(n, seed, words=40):
    """n texts of random words, most of them with something odd at the end."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        text = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))) for _ in range(rng.randint(1, words))]
        texts.append(" ".join(text + [rng.choice(["", *ODD])]))
    return texts


def tokens(texts, tokenizer=BYTES):
    flat = []
    for text in texts:
        flat += tokenizer.encode_ordinary(text) + [tokenizer.encode_single_token("<|endoftext|>")]
    return np.array(flat, dtype=np.uint16)


def held_out(text):
    return int(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16) < 0.01 * 2**32


def lines(texts):
    return "".join(json.dumps({"url": "u", "text": text}) + "\n" for text in texts).encode()


def parquet(texts, column="TEXT"):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"source": ["s"] * len(texts), column: texts}), file)
    return file.getvalue()


def ranks_file(ranked):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranked))


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place:][1:]


def assert_folder(out, train_tokens, val_tokens, **facts):
    """The folder `out` has these tokens, a true description of them, and nothing else."""
    meta = json.loads((out / "meta.json").read_text())
    for split, expected in (("train", train_tokens), ("val", val_tokens)):
        assert (out / f"{split}.bin").read_bytes() == expected.tobytes()
        assert meta[split]["tokens"] == len(expected) > 0
        assert meta[split]["sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()
    assert {name: meta[name] for name in facts} == facts
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert not out.with_name(out.name + ".partial").exists()


# ---------------------------------------------------------------------------------------------------------------------
# A server with faults, and commands that use it


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, name, wanted = self.server, self.path.rpartition("/")[2], self.headers["Range"]
        body = hub.files.get(self.path)
        fault = next(hub.faults.get(name, iter(())), 404 if body is None else "")
        first = int(wanted[len("bytes=") : -1]) if wanted and "ignores Range" not in str(fault) else 0
        good = 200 if first == 0 else 206 if first < len(body) else 416
        status = 0 if fault == "no HTTP" else fault if isinstance(fault, int) else good
        content = body[first:] if status in (200, 206) else b""
        if "cut" in str(fault) or fault == "stall":
            content = content[: len(content) // 2]
        hub.log.append((name, wanted, len(content)))
        if status == 0:
            self.wfile.write(b"what?\r\n\r\n")
            return
        self.send_response(status)
        if status == 302:
            self.send_header("Location", hub.url + self.path)
        if good != 200 and status == good and fault != "no Content-Range":
            self.send_header("Content-Range", f"bytes {f'{first}-{len(body) - 1}' if good == 206 else '*'}/{len(body)}")
        if status in (200, 206):
            self.send_header("Content-Length", str(len(body) - first + 100 * ("too long" in fault) - 100 * ("too short" in fault)))
        self.end_headers()
        self.wfile.write(content)
        if fault == "stall":
            self.wfile.flush()
            hub.stalled.set()
            self.connection.recv(1)  # until the client goes away


class Hub(http.server.ThreadingHTTPServer):
    """Serves files (path -> bytes) and keeps a log: (name, Range or None, bytes sent).

    faults[name] is an iterator: each request of a file of that name meets its next fault, an HTTP status or a word.
    """

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url, self.files, self.faults, self.log = f"http://127.0.0.1:{self.server_port}", files, {}, []
        self.stalled = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # the client went away


VAL = [f"c4-validation.{i:05d}-of-00008.json.gz" for i in range(8)]
TRAIN = [f"c4-train.{i:05d}-of-01024.json.gz" for i in range(4)]
TEXTS = {name: documents(4, name) for name in VAL} | {name: documents(60, name) for name in TRAIN}
TEXTS[TRAIN[1]] += ["half of a pair: \ud83d", "the wrong way round: \ude00\ud83d"]
TEXTS[VAL[2]] += documents(1, 0, 10_000)  # so that half of this shard is more than what waits in buffers
C4_VAL = tokens([text for name in VAL for text in TEXTS[name]])
C4_TRAIN = tokens([text for name in TRAIN[:3] for text in TEXTS[name]])  # --tokens ends with the third shard


def c4_hub():
    return Hub({f"/datasets/allenai/c4/resolve/main/en/{name}": gzip.compress(lines(texts)) for name, texts in TEXTS.items()})


def c4_command(hub, out, workers=2):
    return ["c4", f"--tokens={len(C4_TRAIN)}", f"--base_url={hub.url}", f"--out={out}", f"--workers={workers}", "--tokenizer=bytes"]


def start(argv, patch=None):
    """data/prepare.py, or its main() patched, as the leader of a process group."""
    code = f"import multiprocessing, os, resource, signal, sys, time\nfrom data import prepare\n{patch}\nprepare.main(sys.argv[1:])"
    # -X dev says what newer Pythons say anyway: that a file collected as garbage could not be closed.
    command = [sys.executable, *(["-X", "dev", "-W", "ignore", "-c", code] if patch else [ROOT / "data" / "prepare.py"]), *argv]
    return subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(process):
    """Wait for it and for its workers, who hold the same pipes: a CompletedProcess."""
    try:
        stdout, stderr = process.communicate(timeout=50)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


class Here:
    """In place of the pool of processes: everything in this one."""

    def __init__(self, workers, context, initializer, arguments):
        (prepare.worker_tokenizer,) = arguments

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **kwargs):
        pass


@pytest.fixture
def here(monkeypatch):
    """main() in this process, without workers and long pauses."""
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(prepare, "PAUSE", 0.001)
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def refused(capsys, function, *args):
    """It ends with status 2 and one line on stderr: that line."""
    with pytest.raises(SystemExit) as end:
        function(*args)
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(said) == 1, said
    return said[0]


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


class Stop:
    """In place of the event that stops a download: never set; waits for nothing and notes for how long it should."""

    def __init__(self):
        self.pauses = []

    def is_set(self):
        return False

    def wait(self, seconds):
        self.pauses.append(seconds)
        assert len(self.pauses) < 99


BODY = random.Random(0).randbytes(200_000)
CUT, REST = (None, 100_000), ("bytes=100000-", 100_000)  # (Range, bytes sent)
FAULTS = {  # what the server does, the requests it gets, the pauses between them
    "nothing": ([], [(None, 200_000)], []),
    "cut": (["cut"], [CUT, REST], [1]),
    "cut again and again": (["cut"] * 3, [CUT, (REST[0], 50_000), ("bytes=150000-", 25_000), ("bytes=175000-", 25_000)], [1, 1, 1]),
    "stall": (["stall"], [CUT, REST], [1]),
    "busy": ([503, 429, 408, 500, 502, 503, 504], [(None, 0)] * 7 + [(None, 200_000)], [1, 2, 4, 8, 16, 32, 64]),
    "busy, cut, busy": ([503, 503, "cut", 503], [(None, 0), (None, 0), CUT, (REST[0], 0), REST], [1, 2, 1, 2]),
    "ignores Range": (["cut", "ignores Range"], [CUT, (REST[0], 200_000)], [1]),
    "announces too much": (["too long"], [(None, 200_000), ("bytes=200000-", 0)], [1]),
    "no HTTP": (["no HTTP"], [(None, 0), (None, 200_000)], [1]),
    "moved": (["cut", 302], [CUT, (REST[0], 0), REST], [1]),
    "206 without Content-Range": (["cut", "no Content-Range"], [CUT, REST, REST], [1, 2]),
}


@pytest.fixture
def hub():
    return Hub({"/file": BODY})


@pytest.mark.parametrize("name", FAULTS)
def test_download_over_a_bad_connection(monkeypatch, here, hub, tmp_path, name):
    faults, asked, pauses = FAULTS[name]
    hub.faults["file"], stop = iter(faults), Stop()
    monkeypatch.setattr(prepare, "TIMEOUT", 0.5)
    monkeypatch.setattr(prepare, "PAUSE", 1.0)
    for _ in range(2):  # the second time it is there
        prepare.download(hub.url + "/file", tmp_path / "file", stop)
        assert (tmp_path / "file").read_bytes() == BODY
        assert [(wanted, sent) for _, wanted, sent in hub.log] == asked
        assert stop.pauses == pauses


HOPELESS = {  # what the server does without end, in how many attempts it is given up, what the line says
    "missing": (404, 1, "404"),
    "forbidden": (403, 1, "403"),
    "416 for a whole file": (416, 1, "416"),
    "busy": (503, 8, "8 attempts .*503.*the same command goes on"),
    "no HTTP": ("no HTTP", 8, "8 attempts .*what"),
    "always cut at one place": ("cut, ignores Range", 8, "8 attempts .*100000 of 200000"),
    "always announces too much": ("too long, ignores Range", 8, "8 attempts .*200000 of 200100"),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_download_gives_up(here, hub, tmp_path, name):
    fault, attempts, said = HOPELESS[name]
    hub.faults["file"] = itertools.repeat(fault)
    with pytest.raises(prepare.Broken, match=f"(?s){hub.url}/file .*{said}"):
        prepare.download(hub.url + "/file", tmp_path / "file", Stop())
    assert len(hub.log) == attempts and not (tmp_path / "file").exists()


def test_download_gives_up_where_nothing_listens(here, hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(prepare.Broken, match="8 attempts"):
        prepare.download(hub.url + "/file", tmp_path / "file", Stop())


@pytest.mark.parametrize("left, asked", [(BODY[:70_000], ["bytes=70000-"]), (BODY, ["bytes=200000-"]), (BODY + b"more", ["bytes=200004-", None])])
def test_download_goes_on_with_what_an_earlier_run_left(here, hub, tmp_path, left, asked):
    (tmp_path / "file.part").write_bytes(left)
    prepare.download(hub.url + "/file", tmp_path / "file", Stop())
    assert (tmp_path / "file").read_bytes() == BODY
    assert [wanted for _, wanted, _ in hub.log] == asked


def test_download_stops_when_told_to(monkeypatch, here, hub, tmp_path):
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(prepare, "CHUNK", 1000)
    prepare.download(hub.url + "/file", tmp_path / "file", stop)
    assert not (tmp_path / "file").exists()
    assert (tmp_path / "file.part").stat().st_size == 1000
    hub.faults["file"] = itertools.repeat(503)
    prepare.download(hub.url + "/file", tmp_path / "file", stop)
    assert len(hub.log) == 2


# ---------------------------------------------------------------------------------------------------------------------
# C4: the same bytes with any number of workers, over a bad connection, and however often it was stopped

IMPATIENT = "prepare.PAUSE, prepare.TIMEOUT, prepare.CHUNK = 0.01, 1.0, 3000"
C4_FAULTS = {
    VAL[2]: ["cut", "cut", "stall"],
    VAL[5]: [503, "cut", "ignores Range"],
    TRAIN[0]: ["no HTTP", "stall", 302],
    TRAIN[1]: ["too long"],
    TRAIN[2]: ["cut", 429, "no Content-Range"],
}


def test_same_bytes_with_any_number_of_workers_and_over_a_bad_connection(tmp_path):
    good, bad = c4_hub(), c4_hub()
    bad.faults = {name: iter(faults) for name, faults in C4_FAULTS.items()}
    started = {workers: start(c4_command(good, tmp_path / f"{workers}", workers)) for workers in (1, 3)}
    started[2] = start(c4_command(bad, tmp_path / "2"), IMPATIENT)
    for workers, process in started.items():
        end = finish(process)
        assert (end.returncode, end.stderr) == (0, "")
        assert_folder(tmp_path / f"{workers}", C4_TRAIN, C4_VAL, source="c4", tokenizer="bytes", vocab_size=257, shards=VAL + TRAIN[:3])
        assert (tmp_path / f"{workers}" / "meta.json").read_bytes() == (tmp_path / "1" / "meta.json").read_bytes()
    assert [list(faults) for faults in bad.faults.values()] == [[]] * len(C4_FAULTS)  # all of them were met


HEED_CTRL_C = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell starts background jobs with it ignored
CTRL_C = f"{HEED_CTRL_C}; os.killpg(0, signal.SIGINT)"  # all processes get it
KILL_WORKERS = "[child.kill() for child in multiprocessing.active_children()]"
FULL_DISK = "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))"


# What stops the command (a number: the signal that it gets from outside while a download stalls), its status, how many
# shards are done then. One after another in one folder: each goes on where the one before ended. Progress is called after
# each chunk of tokens: a validation shard is one, a training shard several. replace writes the state, and meta.json.
STOPS = {
    "killed during a download": (signal.SIGKILL, -9, 2),
    "Ctrl-C during a download": (signal.SIGINT, 130, 2),
    "Ctrl-C while the workers start": (on_call("prepare.ProcessPoolExecutor.submit", 1, f"real(*args); time.sleep(0.1); {CTRL_C}"), 130, 2),
    "killed in the middle of a shard": (on_call("prepare.Progress.__call__", 8, KILL), -9, 8),
    "killed between the tokens and the state": (on_call("prepare.replace", 1, KILL), -9, 8),
    "Ctrl-C in the middle of a shard": (on_call("prepare.Progress.__call__", 2, CTRL_C), 130, 8),
    "workers killed": ("prepare.CHUNK = 300" + on_call("prepare.Progress.__call__", 2, KILL_WORKERS), 2, 8),  # much is to come
    "killed after the state": (on_call("prepare.replace", 1, f"real(*args); {KILL}"), -9, 9),
    "full disk": (on_call("prepare.Progress.__call__", 1, FULL_DISK), 2, 9),
    "killed before the rename": (on_call("prepare.replace", 3, f"real(*args); {KILL}"), -9, 11),
}
SAID = {"workers killed": "a worker was killed", "full disk": os.strerror(errno.EFBIG)}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Every stop of STOPS, then the command left alone: {name, at last "end": (the process, what it left and asked for)}.

    That is the shards done, the sizes of the downloads, whether the folder is there, and the server's log.
    """
    out, hub, runs = tmp_path_factory.mktemp("stopped") / "c4", c4_hub(), {}
    work = out.with_name("c4.partial")
    hub.faults[VAL[2]] = iter(["stall", "stall"])
    for name, (patch, _, n_done) in (STOPS | {"end": ("", 0, 0)}).items():
        hub.log = []
        outside = isinstance(patch, int)
        process = start(c4_command(hub, out), f"prepare.CHUNK = 3000\n{HEED_CTRL_C if outside else patch}")
        if outside:
            assert hub.stalled.wait(60)
            while len(json.loads((work / "state.json").read_text())["shards"]) < n_done or (work / VAL[n_done - 1]).exists():
                time.sleep(0.01)
            process.send_signal(patch)
        end = finish(process)
        hub.stalled.clear()
        shards = json.loads((work / "state.json").read_text())["shards"] if work.exists() else []
        runs[name] = end, shards, {path.name: path.stat().st_size for path in work.glob("*.gz*")}, out.exists(), hub.log
    return runs | {"out": out}


@pytest.mark.parametrize("name", STOPS)
def test_a_stop_leaves_what_is_done_and_says_a_line(stopped, name):
    end, shards, downloads, exists, _ = stopped[name]
    _, status, n_done = STOPS[name]
    assert (end.returncode, shards, exists) == (status, (VAL + TRAIN)[:n_done], False), end.stderr
    assert not (set(shards) - {TRAIN[0]}) & set(downloads)  # they are deleted; a kill left that one until the end
    if status == 2:
        assert len(end.stderr.splitlines()) == 1 and SAID[name] in end.stderr
    else:
        assert end.stderr == ""
        assert (end.stdout.strip() == "stopped: the same command goes on from here") == (status == 130)


def test_stopped_again_and_again_has_the_same_bytes_and_fetches_nothing_twice(stopped):
    end, *_ = stopped["end"]
    assert (end.returncode, end.stderr) == (0, "")
    assert_folder(stopped["out"], C4_TRAIN, C4_VAL, source="c4", shards=VAL + TRAIN[:3])
    done, downloads, went_on = [], {}, 0
    for name in [*STOPS, "end"]:
        for shard, wanted, _ in stopped[name][4]:
            assert shard not in done
            have = downloads.get(f"{shard}.part")
            assert wanted == (f"bytes={have}-" if have else None)
            went_on += wanted is not None
        _, done, downloads, *_ = stopped[name]
    assert went_on >= 2


@pytest.mark.parametrize("damage", ["cut", "another CRC", "announced too short", "a bad line before the CRC is read"])
def test_a_shard_that_came_damaged_is_downloaded_again(monkeypatch, here, capsys, tmp_path, damage):
    monkeypatch.setattr(prepare, "CHUNK", 1000)
    monkeypatch.setattr(prepare, "DOWNLOADS", 1)  # or the first command's threads, still in this process, meet the second's
    hub = c4_hub()
    path = next(path for path in hub.files if path.endswith(TRAIN[1]))
    whole = hub.files[path]
    if damage == "announced too short":
        hub.faults[TRAIN[1]] = iter(["too short"])  # all that was announced came
    else:
        stored = gzip.compress(lines(TEXTS[TRAIN[1]]), compresslevel=0).replace(b'"text"', b'"tex"', 1)
        hub.files[path] = {"cut": whole[:-50], "another CRC": flipped(whole, -8)}.get(damage, stored)
    line = refused(capsys, prepare.main, c4_command(hub, tmp_path / "c4", workers=1))
    assert TRAIN[1] in line and "the same command downloads it again" in line
    assert not (tmp_path / "c4").exists()
    hub.files[path] = whole
    prepare.main(c4_command(hub, tmp_path / "c4"))
    assert_folder(tmp_path / "c4", C4_TRAIN, C4_VAL)


def test_full_disk_of_a_download(monkeypatch, here, capsys, tmp_path):
    def full(path, *args):
        if str(path).endswith(".part"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, *args)

    hub = c4_hub()
    monkeypatch.setattr(prepare, "open", full, raising=False)
    assert os.strerror(errno.ENOSPC) in refused(capsys, prepare.main, c4_command(hub, tmp_path / "c4"))
    assert max(Counter(hub.log).values()) == 1  # it is not tried again


# ---------------------------------------------------------------------------------------------------------------------
# Gutenberg

LISTING = "/api/datasets/sedthh/gutenberg_english/tree/main/data"


def test_gutenberg_stops_at_the_number(here, tmp_path):
    texts = documents(400, 0), documents(400, 1)
    shards = [parquet(texts[0]), parquet(texts[1]), b"no Parquet: it would be refused if it were read"]
    names = [f"train-{i:05d}-of-00003-a1b2.parquet" for i in range(3)]
    listing = [{"type": "file", "path": f"data/{name}"} for name in ["README.md", *reversed(names)]]
    folder = "/datasets/sedthh/gutenberg_english/resolve/main/data/"
    hub = Hub({LISTING: json.dumps(listing).encode()} | {folder + name: shard for name, shard in zip(names, shards)})
    train_tokens, val_tokens = (tokens([text for text in texts[0] + texts[1] if held_out(text) == split]) for split in (False, True))
    limit = len(train_tokens) - 12_345
    assert limit > len(tokens(texts[0]))
    prepare.main(["gutenberg", f"--tokens={limit}", f"--base_url={hub.url}/", f"--out={tmp_path / 'books'}", "--tokenizer=bytes"])
    assert_folder(tmp_path / "books", train_tokens[:limit], val_tokens, source="gutenberg", shards=names[:2])


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_files_of_every_kind(monkeypatch, here, tmp_path):
    held = [text for text in documents(2000, "held", 8) if held_out(text)]  # for validation, wherever they stand
    texts = {name: documents(200, name, 8) for name in ("a.jsonl", "b.jsonl.gz", "c.json.gz", "d.parquet")}
    texts["a.jsonl"] += [held[0], "", held[1], "half of a pair: \ud83d"]
    texts["d.parquet"] += ["", held[0], held[1]]
    texts |= {"e.txt": [held[0]], "f.txt.gz": ["two\nlines"], "g.txt": [""]}
    for name, its in texts.items():
        content = parquet(its, "text") if "parquet" in name else its[0].encode() if "txt" in name else lines(its)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    every = [text for its in texts.values() for text in its if text]
    expected = [[text for text in every if held_out(text) == split] for split in (False, True)]
    metas = []
    for chunk in (2**20, 999):
        monkeypatch.setattr(prepare, "CHUNK", chunk)
        prepare.main([*(str(tmp_path / name) for name in texts), f"--out={tmp_path}/{chunk}", "--tokenizer=bytes"])
        assert_folder(tmp_path / f"{chunk}", *map(tokens, expected), source="files", shards=list(texts), empty_documents=3)
        metas.append(json.loads((tmp_path / f"{chunk}" / "meta.json").read_text()))
    assert metas[0] == metas[1]
    assert [metas[0][split]["documents"] for split in ("train", "val")] == [len(its) for its in expected]


@pytest.mark.parametrize("limit", [None, 5000, 10**6])
def test_the_end_of_a_single_text_is_held_out(monkeypatch, here, capsys, tmp_path, limit):
    def killed(path, text):
        if json.loads(text)["val"]["tokens"]:  # the end is cut off
            if after:
                real(path, text)
            raise KeyboardInterrupt
        real(path, text)

    monkeypatch.setattr(prepare, "CHUNK", 1000)
    (tmp_path / "book.txt").write_text(" ".join(documents(200, 0)), encoding="utf-8")
    expected = tokens([(tmp_path / "book.txt").read_bytes().decode()])[:limit]
    cut = len(expected) - round(len(expected) / 100)
    argv = [str(tmp_path / "book.txt"), "--tokenizer=bytes", *([f"--tokens={limit}"] if limit else [])]
    real = prepare.replace
    for out, kills in ((tmp_path / "one", []), (tmp_path / "two", [False, True])):
        for after in kills:
            with monkeypatch.context() as patched, pytest.raises(SystemExit, match="130"):
                patched.setattr(prepare, "replace", killed)
                prepare.main([*argv, f"--out={out}"])
        prepare.main([*argv, f"--out={out}"])
        assert_folder(out, expected[:cut], expected[cut:], shards=["book.txt"])
    assert ("fewer than" in capsys.readouterr().out) == (limit == 10**6)


SIGNS = ["a", "b", "Z", "é", "7", "²", "Ⅷ", "日", "٣", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "'s", "'", "'ll", ".", "!?", "\U0001f600"]
SIGNS += ["\u00a0", "\u2003", "\u001c", "\u0301", "<|endoftext|>", " word", " don't"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A file of ranks: the bytes and the commonest runs of 2 to 5 bytes, so that a wrong cut shows in the tokens."""
    text = "".join(random.Random(1).choices(SIGNS, k=50_000)).encode()
    runs = Counter(text[i : i + n] for n in (2, 3, 4, 5) for i in range(len(text) - n))
    path = tmp_path_factory.mktemp("ranks") / "own.tiktoken"
    path.write_bytes(ranks_file([bytes([b]) for b in range(256)] + [run for run, _ in runs.most_common(8000)]))
    return path


def test_a_text_read_in_pieces_has_the_tokens_of_the_whole(monkeypatch, ranks):
    tokenizer, rng, cuts = prepare.ranks_tokenizer(ranks), random.Random(0), 0
    for size in [1, 2, 3, 5, 8, 13, 50, 200] * 20:
        monkeypatch.setattr(prepare, "CHUNK", size)
        text = "".join(rng.choices(SIGNS, k=300))
        parts = list(prepare.pieces(io.StringIO(text, newline="")))
        assert "".join(part for part, _ in parts) == text
        assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]
        joined = np.concatenate([prepare.encode(tokenizer, part) for part, _ in parts])
        assert joined.tolist() == tokenizer.encode_ordinary(text)
        cuts += len(parts) - 1
    assert cuts > 2000


@pytest.mark.parametrize("text", ["", "plain", *ODD, "\ud83d", "\ude00\ud83d", "a\ud800", "".join(SIGNS)])
def test_encode_is_encode_ordinary(ranks, text):
    for tokenizer in (BYTES, prepare.ranks_tokenizer(ranks)):
        assert prepare.encode(tokenizer, text).tolist() == tokenizer.encode_ordinary(text)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line on stderr, status 2, no folder

GOOD = lines(documents(50, 0))
BAD_FILES = {  # a file, its content, and what the line must match
    "quotes.jsonl": (lines(["a", "b"]) + b"{'text': 'c'}\n", r"line 3\b"),
    "content.jsonl": (lines(["a", "b"]) + b'{"content": "c"}\n', r"line 3\b"),
    "list.jsonl": (b'["text"]\n', r"line 1\b"),
    "latin.jsonl": ('{"text": "é"}\n'.encode("latin-1"), r"line 1\b"),
    "null.jsonl": (lines(["a"]) + b'{"text": null}\n', r"document 2\b.*null"),
    "number.jsonl": (b'{"text": 17}\n', r"document 1\b.*17"),
    "latin.txt": ("é".encode("latin-1"), "damaged .*utf-8"),
    "empty.txt": (b"", "no text"),
    "cut.jsonl.gz": (gzip.compress(GOOD)[:-20], "damaged"),
    "crc.jsonl.gz": (flipped(gzip.compress(GOOD), -8), "damaged .*CRC"),
    "deflate.txt.gz": (flipped(gzip.compress(GOOD), 99), "damaged"),
    "plain.txt.gz": (GOOD, "damaged .*[Gg]zip"),
    "other.parquet": (parquet(["a"], "content"), "no column .*text"),
    "numbers.parquet": (parquet([1, 2]), "no column of strings .*text"),
    "null.parquet": (parquet(["a", None]), r"document 2\b.*null"),
    "cut.parquet": (parquet(["a"])[:-10], "damaged"),
    "metadata.parquet": (parquet(["a"]).replace(b" ", b"\xff"), "damaged"),
    "plain.parquet": (GOOD, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("times", [1, 2])  # two texts are read otherwise than one
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(here, capsys, tmp_path, name, times):
    content, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    argv = [*[str(tmp_path / name)] * times, f"--out={tmp_path / 'out'}", "--tokenizer=bytes"]
    line = refused(capsys, prepare.main, argv)
    assert line.startswith("prepare.py: ") and re.search(expected, line), line
    assert name in line or name == "empty.txt"
    assert not (tmp_path / "out").exists()


BYTE_RANKS = [bytes([b]) for b in range(256)]
PAIRS = [bytes([a, b]) for a in range(255) for b in range(256)]
BAD_RANKS = {
    "damaged": (ranks_file(BYTE_RANKS) + b"?? 256\n", "is no file of tokenizer ranks"),
    "cut": (ranks_file(BYTE_RANKS)[:-5], "is no file of tokenizer ranks"),
    "without a byte": (ranks_file(BYTE_RANKS[:-1] + [b"ab"]), "the 256 bytes"),
    "with a gap": (ranks_file(BYTE_RANKS) + b"YWI= 257\n", "once each"),
    "a rank twice": (ranks_file(BYTE_RANKS) + b"YWI= 256\nY2Q= 256\n", "once each"),
    "a token twice": (ranks_file(BYTE_RANKS) + b"YWI= 256\nYWI= 257\n", "once each"),
    "65537 tokens": (ranks_file(BYTE_RANKS + PAIRS), "65537 tokens .*65536"),
}


@pytest.mark.parametrize("name", BAD_RANKS)
def test_bad_ranks(capsys, tmp_path, name):
    content, expected = BAD_RANKS[name]
    (tmp_path / "bad.tiktoken").write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    argv = [str(tmp_path / "good.jsonl"), f"--tokenizer={tmp_path / 'bad.tiktoken'}", f"--out={tmp_path / 'out'}"]
    assert re.search(rf"bad\.tiktoken .*{expected}", refused(capsys, prepare.main, argv))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tiktoken", "good.jsonl"]


LISTINGS = {"empty": b"[]", "object": b'{"error": "gone"}', "html": b"<html>", "words": b'["a", "b"]', "number": b"7", "paths": b'[{"path": 7}]'}
BAD = {  # arguments, and what the line must match
    "no file": ("{d}/good.jsonl {d}/nothing.txt", r"no file .*/nothing\.txt"),
    "a folder": ("{d}/there", r"no file .*/there"),
    "folder exists": ("{d}/good.jsonl --out={d}/there", r"there exists: .*--out"),
    "folder in a file": ("{d}/good.jsonl --out={d}/good.jsonl/out", r"good\.jsonl/out"),
    "tokens 0": ("{d}/good.jsonl --tokens=0", "--tokens"),
    "tokens nan": ("{d}/good.jsonl --tokens=nan", "--tokens"),
    "tokens without end": ("{d}/good.jsonl --tokens=inf", "--tokens"),
    "tokens no number": ("{d}/good.jsonl --tokens=many", "--tokens.*many"),
    "workers 0": ("{d}/good.jsonl --workers=0", "--workers"),
    "abbreviated flag": ("{d}/good.jsonl --token=9", "--token=9"),
    "nothing named": ("", "source"),
    "no address": ("c4 --base_url=huggingface.co", "huggingface.co.*https://"),
    "c4 and a file": ("c4 {d}/good.jsonl", "c4 stands alone"),
    "tokenizer unknown": ("{d}/good.jsonl --tokenizer=gpt3", "gpt3.*bytes, gpt2"),
    "tokenizer beyond uint16": ("{d}/good.jsonl --tokenizer=cl100k_base", "cl100k_base.*bytes, gpt2"),
    "ranks missing": ("{d}/good.jsonl --tokenizer={d}/nothing.tiktoken", r"nothing\.tiktoken"),
    "c4 missing": ("c4 --base_url={hub}", r"c4-validation\.00000.* cannot be downloaded: .*404"),
    "books missing": ("gutenberg --base_url={hub}", r"gutenberg_english.* cannot be downloaded: .*404"),
    **{f"books listed as {name}": (f"gutenberg --base_url={{hub}}/{name}", "did not answer with a list") for name in LISTINGS},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(here, capsys, hub, tmp_path, name):
    hub.files = {f"/{kind}{LISTING}": listing for kind, listing in LISTINGS.items()}
    (tmp_path / "there").mkdir()
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    argv, expected = BAD[name]
    line = refused(capsys, prepare.main, f"--tokenizer=bytes --out={tmp_path}/out {argv}".format(d=tmp_path, hub=hub.url).split())
    assert line.startswith("prepare.py: ") and re.search(expected, line), line
    assert {path.name for path in tmp_path.iterdir()} <= {"there", "good.jsonl", "out.partial"}
    assert not list(tmp_path.rglob("listing.json"))  # the next time it may be a better one


def test_a_folder_begun_with_other_arguments(here, capsys, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"no JSON\n")
    argv = [str(tmp_path / "a.jsonl"), f"--out={tmp_path / 'out'}", "--tokenizer=bytes"]
    assert "line 51" in refused(capsys, prepare.main, argv)
    assert "begun with other arguments" in refused(capsys, prepare.main, [*argv, "--tokens=9"])
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert "begun with other arguments" in refused(capsys, prepare.main, argv)
    assert not (tmp_path / "out").exists()


def test_without_pyarrow(monkeypatch, here, capsys, tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet(["a"]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    argv = [str(tmp_path / "a.parquet"), f"--out={tmp_path / 'out'}", "--tokenizer=bytes"]
    assert "pip install pyarrow" in refused(capsys, prepare.main, argv)


# ---------------------------------------------------------------------------------------------------------------------
# What others read: load() and get_tokenizer()


@pytest.fixture
def loaded(tmp_path):
    prepare.write(tmp_path / "data", BYTES, np.arange(200, dtype=np.uint16), np.arange(100, dtype=np.uint16), {"source": "numbers"})
    return tmp_path / "data"


def test_load(loaded):
    array, meta = prepare.load(loaded, "val")
    assert array.tolist() == list(range(100)) and (meta["source"], meta["vocab_size"]) == ("numbers", 257)
    (loaded / "meta.json").unlink()  # nanoGPT's folders have none
    array, meta = prepare.load(loaded, "train")
    assert array.tolist() == list(range(200)) and (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50_257)


DAMAGES = {  # the file, what becomes of it, what the line must contain
    "missing": ("val.bin", lambda content: None, "there is no"),
    "empty": ("val.bin", lambda content: b"", "is empty"),
    "cut": ("val.bin", lambda content: content[:-2], "has 198 bytes, meta.json says 200"),
    "too long": ("val.bin", lambda content: content + b"ab", "has 202 bytes, meta.json says 200"),
    "another byte": ("val.bin", lambda content: flipped(content, 50), "sha256"),
    "meta.json cut": ("meta.json", lambda content: content[:-10], "meta.json is damaged"),
    "meta.json a list": ("meta.json", lambda content: b"[]", "meta.json is damaged"),
    "meta.json without counts": ("meta.json", lambda content: b'{"tokenizer": "bytes"}', "meta.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_load_refuses(capsys, loaded, name):
    file, damage, expected = DAMAGES[name]
    content = damage((loaded / file).read_bytes())
    (loaded / file).unlink() if content is None else (loaded / file).write_bytes(content)
    assert expected in refused(capsys, prepare.load, loaded, "val")


def test_load_refuses_half_a_token_of_nanogpts(capsys, loaded):
    (loaded / "meta.json").unlink()
    (loaded / "val.bin").write_bytes((loaded / "val.bin").read_bytes()[:-1])
    assert "cut off" in refused(capsys, prepare.load, loaded, "val")


def test_training_and_evaluation_refuse_a_changed_byte(monkeypatch, capsys, loaded):
    (loaded / "val.bin").write_bytes(flipped((loaded / "val.bin").read_bytes(), 50))
    checkpoint = {"tokenizer": "bytes", "config": {"vocab_size": 320}}
    assert "sha256" in refused(capsys, eval_passkey.validation, str(loaded), checkpoint, [8], 99)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv = f"train.py --data={loaded} --out={loaded}/out --train_len=32 --batch_tokens=64 --compile=off --device=cpu"
    monkeypatch.setattr(sys, "argv", argv.split())
    assert "sha256" in refused(capsys, train.main)
    assert not (loaded / "out").exists()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_ranks_lie_beside_their_tokens(here, capsys, ranks, tmp_path):
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    (tmp_path / "largest.tiktoken").write_bytes(ranks_file(BYTE_RANKS + PAIRS[:-1]))
    prepare.main([str(tmp_path / "good.jsonl"), f"--out={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'largest.tiktoken'}"])
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["tokenizer"] == "ranks-" + hashlib.sha256((tmp_path / "largest.tiktoken").read_bytes()).hexdigest()[:16]
    tokenizer = prepare.get_tokenizer(meta["tokenizer"], tmp_path / "out")
    assert tokenizer.name == meta["tokenizer"] and tokenizer.n_vocab == meta["vocab_size"] == 65_536
    for split in ("train", "val"):
        expected = tokens([text for text in documents(50, 0) if held_out(text) == (split == "val")], tokenizer)
        assert expected.max() == 65_535
        assert prepare.load(tmp_path / "out", split)[0].tolist() == expected.tolist()
    (tmp_path / "out" / "tokenizer.tiktoken").write_bytes(ranks.read_bytes())
    assert f"is not the tokenizer {tokenizer.name}" in refused(capsys, prepare.get_tokenizer, tokenizer.name, tmp_path / "out")


@pytest.mark.parametrize("error", [requests.ConnectionError("no network"), ValueError("Hash mismatch for data downloaded")])
def test_gpt2_without_a_network(monkeypatch, capsys, error):
    def get_encoding(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    assert "TIKTOKEN_CACHE_DIR" in refused(capsys, prepare.get_tokenizer, "gpt2")
