"""data/: whatever files, servers and kills do, a folder has exactly its tokens or is not there.

The oracles are the tokenizer's own library on whole texts in memory, and `regex` for the pattern that splits them.
"""

import base64
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet
import pytest
import regex
import requests
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from data import prepare, tokenizer
from data.read import load

ROOT = Path(__file__).resolve().parent.parent
BYTES = tokenizer.get_tokenizer("bytes")
BOM = b"\xef\xbb\xbf"
ODD = ["", "naïve café", "\U0001f600", "日本語", "don't we'll"]
ODD += ["<|endoftext|>", "a\r\n\tb", "\x1c\u2003\u00a0", "x" * 300]


def texts(n, seed=0):
    """n different texts of 2 to 40 random words, most of them with something odd at the end."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))) for _ in range(500)]
    return [" ".join([*rng.choices(words, k=rng.randint(2, 40)), rng.choice(ODD)]) for _ in range(n)]


def tokens(some, encoding=BYTES.encoding):
    return [token for text in some for token in [*encoding.encode_ordinary(text), encoding.eot_token]]


def by_split(some):
    """The texts that train, and those that validate by their hash."""
    sides = [], []
    for text in some:
        sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        sides[int(sha256[:8], 16) < 0.01 * 2**32].append(text)
    return sides


def lines(some, field="text"):
    return "".join(json.dumps({"url": "u", field: text}) + "\n" for text in some).encode()


def parquet(some, column="text"):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"source": ["s"] * len(some), column: some}), file)
    return file.getvalue()


def write(folder, files):
    for name, content in files.items():
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
        Path(folder, name).write_bytes(content)


def both(folder):
    """(training tokens, validation tokens, meta.json)"""
    (train, meta), (val, _) = (load(folder, split) for split in ("train", "val"))
    return train.tolist(), val.tolist(), meta


def main(argv, out="out"):
    """prepare.py in this process and in the current folder."""
    prepare.main(["--tokenizer=bytes", *argv.split(), f"--out={out}"])
    assert not Path(f"{out}.partial").exists()
    return both(out)


def refused(capsys, argv):
    """The command ends with status 2 and one line on stderr: that line."""
    with pytest.raises(SystemExit) as end:
        prepare.main(["--tokenizer=bytes", "--out=out", *argv.split()])
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(said) == 1, said
    return said[0]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_built_in_corpus_is_byte_for_byte_what_it_was(monkeypatch, here):
    documents = [(f"{i}.py", text) for i, text in enumerate(texts(3000))]
    monkeypatch.setattr(prepare, "standard_library", lambda: ("random words", documents))
    meta = prepare.builtin(here / "out")
    assert (meta["train"]["tokens"], meta["val"]["tokens"]) == (1_916_928, 13_968)
    assert meta["train"]["sha256"] == "326917bac15e95828579fcfe09175e47c29cc0fd22de738f2ffeee3bb821dd8e"
    assert meta["val"]["sha256"] == "25f4b471f7bd9c352c7650ebaee015315ebbacc12df028abc11a59593cc359e2"


A = texts(200, seed=3)  # two of them are held out
BAD = b'{"text": null}\n{"url": "u"}\n["text"]\n7\n{"text": 7}\n{text}\n{"text": "\xe9"}\n' + b"[" * 10**5 + b"\n"
FORMATS = {"a.jsonl": lines(A[:20]), "b.ndjson": lines(A[20:40]), "c.JSON.gz": gzip.compress(lines(A[40:60]))}
FORMATS |= {"d.parquet": parquet(A[60:]), "e.txt": b"one", "f.TXT.GZ": gzip.compress(b"two")}
HALVES = [*A, "half: \ud83d", "\ude00\ud83d"]
SINGLE = "line 59\r\ntwo\rthree\r\n"  # its hash would hold it out as a whole
LONG = ["word " * 60_000, "word\n" * 300_000]
READ = {  # {file: content}, the documents in it; flags as one more
    "every format": (FORMATS, [*A, "one", "two"]),
    "another field": ({"a.jsonl": lines(A, "b"), "b.parquet": parquet(A, "b")}, A + A, "b"),
    "line ends": ({"a.jsonl": lines(A[:2]).replace(b"\n", b"\r\n") + b"\n \r\n" + lines(A[2:])[:-1]}, A),
    "a single text": ({"a.txt": SINGLE.encode()}, [SINGLE]),
    "byte-order marks": ({"a.txt": BOM + b"one", "b.jsonl.gz": gzip.compress(BOM + b"\n" + lines(A))}, ["one", *A]),
    "empty texts": ({"a.jsonl": lines(["", *A, ""]), "b.txt": b""}, A),
    "halves of surrogate pairs": ({"a.jsonl": lines(HALVES)}, HALVES),
    "long texts": ({"a.jsonl": lines(LONG[:1]), "b.txt": LONG[1].encode()}, LONG),
    "99 bad records": ({"a.jsonl": b"?\n" * 99 + lines(A)}, A),
    "1 % of bad records": ({"a.jsonl": b"?\n" * 100 + lines(["a"] * 9900)}, ["a"] * 9900),
    "nulls in Parquet": ({"a.parquet": parquet([None, *A, None])}, A),
    "broken UTF-8 in Parquet": ({"a.parquet": parquet(["(XX)", *A]).replace(b"(XX)", b"(\xff\xff)")}, A),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_has_the_tokens_of_its_documents(name):
    files, documents, *field = READ[name]
    write("", files)
    train, val, meta = main(" ".join([*files, *(f"--text_column={f}" for f in field)]))
    training, held_out = by_split(documents) if len(documents) > 1 else (documents, [])
    assert train + val == tokens(training) + tokens(held_out)
    assert len(val) == (len(tokens(held_out)) or max(1, round(0.01 * len(train + val))))
    assert meta["records"]["good"] == len(documents) and meta["shards"] == list(files)


def test_the_first_bad_record_of_a_file_is_reported_and_all_are_counted(capsys):
    write("", {"a.jsonl": lines(A[:1]) + BAD + BAD})
    train, val, meta = main("a.jsonl")
    assert train + val == tokens(A[:1]) and meta["records"] == {"good": 1, "bad": 16}
    assert re.findall(r"a\.jsonl, line (\d+): (.*text)\.", capsys.readouterr().out) == [
        ("2", "TypeError: 'text' is NoneType, not text")
    ]


@pytest.mark.parametrize("limit", [9999, 10**6])
def test_tokens_are_at_most_the_number_and_fewer_are_announced(limit, capsys):
    write("", {"a.jsonl": lines(A[:20]), "b.jsonl": lines(A[20:])})
    train, val, _ = main(f"a.jsonl b.jsonl --tokens={limit}")
    training, held_out = by_split(A)
    assert (train, val) == (tokens(training)[:limit], tokens(held_out))
    assert ("fewer than" in capsys.readouterr().out) == (limit == 10**6)


def test_a_folder_gives_all_that_can_be_read_and_names_the_rest(capsys, here):
    files = ["b/train.jsonl", "b/val.jsonl", "test.jsonl"]
    write("in put", {name: lines([name]) for name in [*files, ".cache/a.jsonl"]} | {"README.md": b"", "c/a.csv": b""})
    write("elsewhere", {"a.jsonl": lines(["linked"])})
    (here / "in put/linked").symlink_to(here / "elsewhere")
    (here / "in put/z.jsonl").symlink_to(here / "elsewhere/a.jsonl")
    prepare.main(["in put", "--tokenizer=bytes"])
    train, val, meta = both("data/mine")
    assert train + val == tokens([*files, "linked"]) and meta["shards"][0] == "in put/b/train.jsonl"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("not read"))
    assert line.endswith(": in put/README.md, in put/c/a.csv, in put/linked")


def test_val_names_the_validation_files_which_then_do_not_train():
    write("in", {name: lines([name]) for name in ["a.jsonl", "val.jsonl", "more/b.jsonl", "more/c.jsonl"]})
    train, val, _ = main("in --val in/val.jsonl in/more")
    assert (train, val) == (tokens(["a.jsonl"]), tokens(["val.jsonl", "more/b.jsonl", "more/c.jsonl"]))


RANKS = [bytes([b]) for b in range(256)] + [bytes(pair) for pair in product(range(256), repeat=2)]


def ranks_file(ranked):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranked))


@pytest.mark.parametrize("package, made", [("pyarrow", "bytes"), ("tokenizers", "tokenizer.json")])
def test_a_missing_package_is_named(package, made, monkeypatch, capsys):
    write("", {"a.parquet": parquet(A), "tokenizer.json": b""})
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in refused(capsys, f"a.parquet --tokenizer={made}")


@pytest.mark.parametrize("file, some", [("a.jsonl", A[:15]), ("c.jsonl", A)])  # a longer one, and one repaired
def test_a_file_that_changed_between_runs_is_read_again(file, some, capsys):
    write("", {"a.jsonl": lines(A[:10]), "b.jsonl": lines(A[10:20]), "c.jsonl": b"?\n"})
    argv = f"a.jsonl b.jsonl c.jsonl --tokens={len(tokens(A[:20])) + 1}"
    assert "c.jsonl" in refused(capsys, argv)
    write("", {file: lines(some)})
    assert main(argv) == main(argv, "another")


def test_a_run_stopped_at_its_very_end_has_the_same_bytes_after_the_next_one(monkeypatch):
    write("", {"a.txt": " ".join(A).encode()})
    for step, effects in (("truncate", [None, KeyboardInterrupt]), ("file_hash", [KeyboardInterrupt])):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
            patch.setattr(prepare, step, mock.Mock(side_effect=effects))
            main("a.txt")
    assert main("a.txt") == main("a.txt", "another")


def test_an_ascii_locale_reads_and_prints_what_utf8_does(here):
    write("", {"é/a.jsonl": lines(A), "é/é.csv": b"", "hand/val.bin": bytes(4)})
    write("hand", {"meta.json": '{"é": "é", "tokenizer": "x", "vocab_size": 9, "dtype": "uint16"}'.encode()})
    script = (
        "import warnings, sys; from data import prepare, read\n"
        "warnings.filterwarnings('error', category=EncodingWarning, module='data|common')\n"
        "prepare.main(sys.argv[1:]); assert '\\xe9' in read.load('hand', 'val')[1]"
    )
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-X", "warn_default_encoding", "-c", script, "é", "--tokenizer=bytes", "--out=out"]
    subprocess.run(argv, env=env, check=True)
    assert both("out")[:2] == tuple(map(tokens, by_split(A)))


SIGNS = ["a", "b", "Z", "é", "7", "²", "Ⅷ", "日", "'s", "'", "'ll", ".", "!?", "\U0001f600", "\u0301", "<|endoftext|>"]
SIGNS += [" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", "\u3000", "\x1c", "\x85"]
SIGNS += [" word", " don't"]


@pytest.fixture
def own():
    """A tokenizer whose tokens are single bytes and all pairs of bytes, so that a wrong cut shows in the tokens."""
    write("", {"own.tiktoken": ranks_file(RANKS)})
    return tokenizer.get_tokenizer("own.tiktoken")


@settings(max_examples=200)
@given(
    text=st.lists(st.sampled_from(SIGNS), max_size=200).map("".join),
    size=st.sampled_from([1, 2, 3, 5, 8, 13, 50, 200]),
    block=st.sampled_from([1, 2, 7, 30, 1000]),
)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(own, text, size, block):
    with mock.patch.object(tokenizer, "PIECE", size):
        pieces, last = zip(*own.pieces(text[i : i + block] for i in range(0, len(text), block)))
    assert "".join(pieces) == text and last == (False,) * (len(pieces) - 1) + (True,)
    assert np.concatenate(own.encode_batch(pieces)).tolist() == own.encoding.encode_ordinary(text)
    starts = {match.start() for match in regex.finditer(tokenizer.GPT2_PATTERN, text)}  # each begins a new match
    assert {sum(map(len, pieces[:i])) for i in range(len(pieces))} <= starts | {0}
    assert not any(regex.search(r"\s(?=\S)", piece[size:]) for piece in pieces)  # where it should have been cut


def test_a_million_white_space_characters_in_a_row_do_not_make_tiktoken_panic(own):
    parts = [" word" + "\t" * 10**6, "\n\x1c"]  # GPT-2's pattern cuts there
    write("", {"a.jsonl": lines(["".join(parts)])})
    train, val, _ = main("a.jsonl --tokenizer=own.tiktoken")
    assert train + val == [token for part in parts for token in own.encoding.encode_ordinary(part)] + [own.eot]


@pytest.mark.parametrize("n, dtype", [(65_535, "uint16"), (65_536, "uint32")])  # and one more ends a document
def test_ranks_lie_beside_their_tokens_which_take_uint32_if_they_must(n, dtype):
    write("", {"a.jsonl": lines(A), "own.tiktoken": ranks_file(RANKS[:n])})
    train, val, meta = main("a.jsonl --tokenizer=own.tiktoken")
    again = tokenizer.get_tokenizer(meta["tokenizer"], "out")
    assert [train, val] == [tokens(some, again.encoding) for some in by_split(A)]
    assert (meta["dtype"], Path("out/train.bin").stat().st_size) == (dtype, len(train) * np.dtype(dtype).itemsize)
    write("out", {"tokenizer.tiktoken": ranks_file(RANKS[:256])})
    with pytest.raises(UserError, match="the tokenizer ranks-.* is not in"):
        tokenizer.get_tokenizer(meta["tokenizer"], "out")


@pytest.fixture
def llama():
    """A tokenizer.json like Llama 2's, which marks the beginning of a text. The file truncates and pads, as some do."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=False)
    options = {"vocab_size": 300, "special_tokens": ["<unk>", "</s>", "<end>", "<s>"], "show_progress": False}
    made.train_from_iterator(texts(50), tokenizers.trainers.BpeTrainer(**options))
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    plain = tokenizers.Tokenizer.from_str(made.to_str())
    made.enable_truncation(5)
    made.enable_padding(length=5)
    made.save("tokenizer.json")
    return plain


@pytest.mark.parametrize(
    "config, flag, end",
    [
        ({"eos_token": "</s>"}, "<end>", "<end>"),
        ({"eos_token": {"content": "<end>"}}, None, "<end>"),
        ({"eos_token_id": [2, 1]}, None, "<end>"),
    ],
)
def test_a_config_or_a_flag_names_the_end_of_a_document(llama, config, flag, end):
    write("", dict.fromkeys(["tokenizer_config.json", "config.json"], json.dumps(config).encode()))
    assert tokenizer.get_tokenizer("tokenizer.json", eot=flag).eot == llama.token_to_id(end)


def test_a_tokenizer_without_an_end_of_a_document_is_refused(llama):
    with pytest.raises(UserError, match="--eot"):
        tokenizer.get_tokenizer("tokenizer.json")


def test_a_tokenizer_json_gives_its_own_tokens_then_and_later(llama):
    some = [*A, "a", "a b  " * 60_000, "half: \ud83d"]
    write("", {"a.jsonl": lines(some)})
    train, val, meta = main("a.jsonl --tokenizer=tokenizer.json --eot=</s>")
    again = tokenizer.get_tokenizer(meta["tokenizer"], "out")
    for ids, texts in zip((train, val), by_split(some)):
        encoded = llama.encode_batch([text.replace("\ud83d", "\ufffd") for text in texts])  # with BOS, as llama adds it
        assert ids == [token for encoding in encoded for token in [*encoding.ids, again.eot]]
    assert (again.n_vocab, again.eot) == (llama.get_vocab_size(), llama.token_to_id("</s>"))
    assert again.encode_ordinary(A[0]) == llama.encode(A[0], add_special_tokens=False).ids
    assert again.decode(train) == llama.decode(train, skip_special_tokens=False)


@pytest.mark.parametrize("error", [requests.ConnectionError("no network"), ValueError("Hash mismatch")])
def test_gpt2_without_a_network_gets_one_line(monkeypatch, capsys, error):
    monkeypatch.setattr(tiktoken, "get_encoding", mock.Mock(side_effect=error))
    write("", {"a.jsonl": lines(A)})
    assert "TIKTOKEN_CACHE_DIR" in refused(capsys, "a.jsonl --tokenizer=gpt2")


C4 = [f"en/c4-validation.{i:05d}-of-00008.json.gz" for i in range(8)]
C4 += [f"en/c4-train.{i:05d}-of-01024.json.gz" for i in range(3)]
COMMIT = "5" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's paths. The first transfer of server.breaks ends in the middle. server.log has the requests."""

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        revision, _, name = path.removeprefix(f"/datasets/{hub.repository}/resolve/").partition("/")
        hub.log.append((self.command, revision, name))
        facts = {"id": "x", "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]}
        body = json.dumps(facts).encode() if path == f"/api/datasets/{hub.repository}" else hub.files[name]
        first = int(re.search(r"\d+", self.headers["Range"] or "bytes=0-")[0])
        self.send_response(206 if first else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        if self.command == "GET":
            breaks, hub.breaks = name == hub.breaks, None if name == hub.breaks else hub.breaks
            self.wfile.write(body[first : len(body) // 2 if breaks else None])
            self.close_connection = True

    do_HEAD = do_GET


def start(*argv, port=9):
    """prepare.py in a process of its own, with the hub at a port."""
    env = os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}
    env |= {"HF_HOME": os.path.abspath("hf"), "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    command = [sys.executable, ROOT / "data/prepare.py", *argv, "--out=out", "--tokenizer=bytes"]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def fetch(repository, files, *argv, breaks=None):
    """prepare.py with a hub on 127.0.0.1: what it wrote, and the requests that the hub got."""
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    hub.repository, hub.files, hub.breaks, hub.log = repository, files, breaks, []
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    process = start(*argv, port=hub.server_port)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert hub.breaks is None  # it was met
    return *both("out"), hub.log


def test_c4_comes_from_the_hub_at_one_commit_over_a_broken_transfer():
    some = {name: texts(20, name) for name in C4}
    files = {name: gzip.compress(lines(its)) for name, its in some.items()}
    wanted, val = (tokens(text for name in names for text in some[name]) for names in (C4[8:10], C4[:8]))
    *fetched, meta, log = fetch("allenai/c4", files, "c4", f"--tokens={len(wanted)}", breaks=C4[9])
    assert fetched == [wanted, val]
    assert meta["revision"] == COMMIT and meta["shards"] == C4[:10]
    got = {(revision, name) for command, revision, name in log if command == "GET" and name.startswith("en/")}
    assert got == {(COMMIT, name) for name in C4[:10]}  # the last one is not needed


def test_gutenberg_lists_the_hubs_files():
    some = [texts(200, seed) for seed in range(2)]
    files = {f"data/train-{i:05d}-of-00002.parquet": parquet(its, "TEXT") for i, its in enumerate(some)}
    train, val, *_ = fetch("sedthh/gutenberg_english", {"README.md": b""} | files, "gutenberg")
    assert [train, val] == [tokens(side) for side in by_split(some[0] + some[1])]


def test_a_hub_out_of_reach_gets_one_line():
    process = start("c4")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "could not be read" in err


def test_a_run_killed_five_times_has_the_bytes_of_one_that_was_not(here):
    files, rng, state = [f"{i}.jsonl" for i in range(60)], random.Random(0), here / "out.partial/state.json"
    write("", {name: lines(texts(300, name)) for name in files})
    main(" ".join(files), "whole")
    for done in (1, 10, 20, 30, 40):
        process = start(*files)
        while not state.exists() or len(json.loads(state.read_text())["finished"]) < done:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(rng.random() / 50)  # a file takes about as long
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    _, err = start(*files).communicate()
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (here / "out" / name).read_bytes() == (here / "whole" / name).read_bytes(), err
    assert not (here / "out.partial").exists()


def meta_json(**facts):
    return {"meta.json": json.dumps({"tokenizer": "x", "vocab_size": 60_001, "dtype": "uint16"} | facts).encode()}


@pytest.mark.parametrize("expected, dtype", [([1, 60_000], "uint16"), ([1, 99_999, 0], "uint32")])
def test_load_gives_the_tokens_and_their_hash(expected, dtype):
    content = np.array(expected, dtype).tobytes()
    write("", {"val.bin": content} | meta_json(vocab_size=max(expected) + 1, dtype=dtype))
    array, facts = load("", "val")
    assert array.tolist() == expected
    assert facts["val"] == {"tokens": len(expected), "sha256": hashlib.sha256(content).hexdigest()}
    assert load("", "val", check=False)[1]["val"] == {"tokens": len(expected), "sha256": None}
