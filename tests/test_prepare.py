"""data/: whatever files, servers and kills do, a folder has exactly its tokens or is not there.

The oracles are the tokenizer's own library on whole texts in memory, and `regex` for the pattern that splits them.
"""

import base64
import gzip
import hashlib
import http.server
import io
import itertools
import json
import random
import re
import shutil
import sys
import threading
from pathlib import Path
from unittest import mock

import huggingface_hub as hf
import huggingface_hub.constants
import numpy as np
import pyarrow.parquet
import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from data import prepare, tokenizer
from data.read import load

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
    """The training tokens, the validation tokens, and meta.json, which has the hashes of both files."""
    (train, meta), (val, _) = (load(folder, split) for split in ("train", "val"))
    return train.tolist(), val.tolist(), meta


def main(argv, out="out"):
    prepare.main(["--tokenizer=bytes", *argv.split(), f"--out={out}"])
    assert not Path(f"{out}.partial").exists()
    return both(out)


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_the_built_in_corpus_is_byte_for_byte_what_it_was(monkeypatch):
    documents = [(f"{i}.py", text) for i, text in enumerate(texts(3000))]
    monkeypatch.setattr(prepare, "standard_library", lambda: ("random words", documents))
    meta = prepare.builtin(Path("out"))
    assert (meta["train"]["tokens"], meta["val"]["tokens"]) == (1_916_928, 13_968)
    assert meta["train"]["sha256"] == "326917bac15e95828579fcfe09175e47c29cc0fd22de738f2ffeee3bb821dd8e"
    assert meta["val"]["sha256"] == "25f4b471f7bd9c352c7650ebaee015315ebbacc12df028abc11a59593cc359e2"


A = texts(200, seed=3)  # two of them are held out
FORMATS = {"a.jsonl": lines(A[:20]), "b.ndjson": lines(A[20:40]), "c.JSON.gz": gzip.compress(lines(A[40:60]))}
FORMATS |= {"d.parquet": parquet(A[60:]), "e.txt": b"one", "f.TXT.GZ": gzip.compress(b"two")}
HALVES = [*A, "half: \ud83d", "\ude00\ud83d"]
SINGLE = "line 59\r\ntwo\rthree\r\n"  # its hash would hold it out as a whole
LONG = ["word " * 60_000, "word\n" * 300_000]
READ = {  # {file: content}, the documents in it; the name of the field, if it is another than "text"
    "every format": (FORMATS, [*A, "one", "two"]),
    "another field": ({"a.jsonl": lines(A, "b"), "b.parquet": parquet(A, "b")}, A + A, "b"),
    "line ends": ({"a.jsonl": lines(A[:2]).replace(b"\n", b"\r\n") + b"\n \r\n" + lines(A[2:])[:-1]}, A),
    "empty texts": ({"a.jsonl": lines(["", *A, ""]), "b.txt": b""}, A),
    "a single text": ({"a.txt": SINGLE.encode()}, [SINGLE]),
    "byte-order marks": ({"a.txt": BOM + b"one", "b.jsonl.gz": gzip.compress(BOM + b"\n" + lines(A))}, ["one", *A]),
    "halves of surrogate pairs": ({"a.jsonl": lines(HALVES)}, HALVES),
    "long texts": ({"a.jsonl": lines(LONG[:1]), "b.txt": LONG[1].encode()}, LONG),
    "1 % of bad records": ({"a.jsonl": b"?\n" * 100 + lines(["a"] * 9900)}, ["a"] * 9900),
    "bad Parquet": ({"a.parquet": parquet([None, "(XX)", *A]).replace(b"(XX)", b"(\xff\xff)")}, A),
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


def test_bad_records_are_skipped_and_counted_and_the_first_one_is_reported(capsys):
    bad = b'{"text": null}\n{"url": "u"}\n["text"]\n7\n{"text": 7}\n{text}\n{"text": "\xe9"}\n' + b"[" * 10**5 + b"\n"
    write("", {"a.jsonl": lines(A[:1]) + bad + lines(A[1:2]) + bad})
    train, val, meta = main("a.jsonl")
    assert train + val == tokens(A[:2]) and meta["records"] == {"good": 2, "bad": 16}
    assert re.findall(r"a\.jsonl, line \d+: \w+", capsys.readouterr().out) == ["a.jsonl, line 2: TypeError"]


def test_a_folder_gives_all_that_can_be_read_and_names_the_rest(capsys):
    files = ["in/b/train.jsonl", "in/test.jsonl"]
    write("", {name: lines([name]) for name in [*files, "in/.cache/a.jsonl", "elsewhere/a.jsonl"]})
    write("in", {"README.md": b"", "c/a.csv": b""})
    Path("in/linked").symlink_to(Path("elsewhere").resolve())
    train, val, _ = main("in")
    assert train + val == tokens(files)
    assert ": in/README.md, in/c/a.csv, in/linked\n" in capsys.readouterr().out


def test_val_names_the_validation_files_which_then_do_not_train():
    write("in", {name: lines([name]) for name in ["a.jsonl", "val.jsonl", "more/b.jsonl", "more/c.jsonl"]})
    train, val, _ = main("in --val in/val.jsonl in/more")
    assert (train, val) == (tokens(["a.jsonl"]), tokens(["val.jsonl", "more/b.jsonl", "more/c.jsonl"]))


def states_of(argv):
    """What is on the disk before each line of prepare.py that a run executes. What is in buffers is not."""
    states = []

    def trace(frame, *_):
        if frame.f_code.co_filename == prepare.__file__:
            state = {path: path.read_bytes() for path in Path().glob("out*/**/*") if path.is_file()}
            if state not in states:
                states.append(state)
            return trace

    sys.settrace(trace)
    try:
        main(argv)
    finally:
        sys.settrace(None)
    return states


@pytest.mark.parametrize("argv", ["a.jsonl b.jsonl", "c.txt"])
def test_a_run_killed_at_any_line_leaves_no_folder_and_the_next_one_has_the_same_bytes(argv):
    write("", {"a.jsonl": lines(A[:8]), "b.jsonl": lines(by_split(A)[1]), "c.txt": SINGLE.encode()})
    states = states_of(argv)
    assert len(states) > 10
    whole = both("out")
    for state in states:
        shutil.rmtree("out")
        write("", state)
        if not Path("out").exists():
            main(argv)
        assert both("out") == whole


def test_a_file_that_changed_between_runs_is_read_again():
    write("", {"a.jsonl": lines(A[:10]), "b.jsonl": lines(A[10:20]), "c.jsonl": b"?\n"})
    argv = f"a.jsonl b.jsonl c.jsonl --tokens={len(tokens(A[:20])) + 1}"
    with pytest.raises(SystemExit):  # c.jsonl has no good record
        main(argv)
    write("", {"a.jsonl": lines(A[:15]), "c.jsonl": lines(A)})
    assert main(argv) == main(argv, "another")


RANKS = [bytes([b]) for b in range(256)] + [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
SIGNS = " " * 8 + "\n\n\t\r\u00a0\u2003\u3000\x1c\x85abZésl7²Ⅷ日'.!\U0001f600\u0301"


def own(n):
    """A tokenizer whose tokens are the first n of single bytes and pairs of bytes, and its file."""
    ranks = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(RANKS[:n]))
    write("", {"own.tiktoken": ranks})
    return tokenizer.get_tokenizer("own.tiktoken")


@pytest.fixture
def pairs():
    return own(len(RANKS))  # a wrong cut shows in its tokens


@settings(max_examples=200)
@given(
    text=st.text(st.sampled_from(SIGNS), max_size=300),
    size=st.sampled_from([1, 2, 3, 5, 8, 13, 50, 200]),
    block=st.sampled_from([1, 2, 7, 30, 1000]),
)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(pairs, text, size, block):
    with mock.patch.object(tokenizer, "PIECE", size):
        pieces, last = zip(*pairs.pieces(text[i : i + block] for i in range(0, len(text), block)))
    assert "".join(pieces) == text and last == (False,) * (len(pieces) - 1) + (True,)
    assert np.concatenate(pairs.encode_batch(pieces)).tolist() == pairs.encoding.encode_ordinary(text)
    starts = {match.start() for match in regex.finditer(tokenizer.GPT2_PATTERN, text)}  # each begins a new match
    assert {sum(map(len, pieces[:i])) for i in range(len(pieces))} <= starts | {0}
    assert not any(regex.search(r"\s(?=\S)", piece[size:]) for piece in pieces)  # where it should have been cut


@pytest.mark.parametrize("n, dtype", [(65_535, "uint16"), (65_536, "uint32")])  # and one more ends a document
def test_ranks_lie_beside_their_tokens_which_take_uint32_if_they_must(n, dtype):
    ours = own(n)
    write("", {"a.jsonl": lines(A)})
    train, val, meta = main("a.jsonl --tokenizer=own.tiktoken")
    assert [train, val] == [tokens(some, ours.encoding) for some in by_split(A)]
    assert (meta["dtype"], Path("out/train.bin").stat().st_size) == (dtype, len(train) * np.dtype(dtype).itemsize)
    again = tokenizer.get_tokenizer(meta["tokenizer"], "out")
    assert (again.decode(train), again.eot) == (ours.decode(train), n)
    own(256)
    shutil.copy("own.tiktoken", "out/tokenizer.tiktoken")
    with pytest.raises(UserError, match="is not in out"):
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


def test_a_flag_or_else_a_config_beside_a_tokenizer_json_names_the_end_of_a_document(llama):
    def eot(flag=None, **config):
        write("", dict.fromkeys(["tokenizer_config.json", "config.json"], json.dumps(config).encode()))
        return tokenizer.get_tokenizer("tokenizer.json", eot=flag).eot

    assert eot("<end>", eos_token="</s>") == eot(eos_token={"content": "<end>"}) == eot(eos_token_id=[2, 1]) == 2
    with pytest.raises(UserError, match="--eot"):
        eot()


COMMIT = "5" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub's client asks of a server with server.files. The first transfer of server.breaks ends half-way."""

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        facts = {"id": "x", "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]}
        body = json.dumps(facts).encode() if "/api/" in path else hub.files[path.partition(f"/{COMMIT}/")[2]]
        first = int(re.search(r"\d+", self.headers["Range"] or "bytes=0-")[0])
        self.send_response(206 if first else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", hashlib.sha256(body).hexdigest())
        self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        if self.command == "GET":
            breaks, hub.breaks = path.endswith(hub.breaks), "/" if path.endswith(hub.breaks) else hub.breaks
            self.wfile.write(body[first : len(body) // 2 if breaks else None])
            self.close_connection = True

    do_HEAD = do_GET
    log_message = mock.Mock()


@pytest.fixture
def hub(monkeypatch):
    """The hub, on 127.0.0.1. Its client is the real one."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = hf.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hf.constants.ENDPOINT, address)
    monkeypatch.setattr(hf.constants, "ENDPOINT", address)
    monkeypatch.setattr(hf.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.shutdown()


def test_c4_comes_from_the_hub_as_far_as_it_is_needed_over_a_broken_transfer(hub):
    names = [f"en/c4-validation.{i:05d}-of-00008.json.gz" for i in range(8)]
    names += [f"en/c4-train.{i:05d}-of-01024.json.gz" for i in range(2)]  # the hub does not have a third one
    some = {name: texts(20, name) for name in names}
    hub.files, hub.breaks = {name: gzip.compress(lines(its)) for name, its in some.items()}, names[-1]
    val, train = (tokens(text for name in its for text in some[name]) for its in (names[:8], names[8:]))
    *fetched, meta = main(f"c4 --tokens={len(train) - 5}")
    assert (fetched, meta["revision"], meta["shards"]) == ([train[:-5], val], COMMIT, names)
    assert hub.breaks == "/"  # the transfer did break


def test_gutenberg_is_all_parquet_files_that_the_hub_lists(hub):
    files = {f"data/train-{i:05d}-of-00002.parquet": parquet(A[100 * i :][:100], "TEXT") for i in range(2)}
    hub.files, hub.breaks = {"README.md": b""} | files, "/"
    assert list(main("gutenberg")[:2]) == [tokens(side) for side in by_split(A)]
