"""data/: whatever files, servers and kills do, a folder has exactly its tokens or is not there.

The oracle is the tokenizer's own library on whole texts in memory.
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
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import requests
import tiktoken
import tokenizers

from data import prepare, tokenizer
from data.files import lock, replace_file

ROOT = Path(__file__).resolve().parent.parent
BYTES = tokenizer.get_tokenizer("bytes")
ODD = [
    "",
    "naïve café",
    "\U0001f600",
    "日本語",
    "don't we'll",
    "<|endoftext|>",
    "a\r\n\tb",
    "\x1c\u2003\u00a0",
    "x" * 300,
]
BOM = b"\xef\xbb\xbf"


def texts(n, seed=0):
    """n different texts of 2 to 40 random words, most of them with something odd at the end."""
    rng, words = random.Random(seed), []
    for _ in range(500):
        words.append("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))))
    return [" ".join([*rng.choices(words, k=rng.randint(2, 40)), rng.choice(ODD)]) for _ in range(n)]


def tokens(some, encoding=BYTES.encoding):
    return [token for text in some for token in [*encoding.encode_ordinary(text), encoding.eot_token]]


def held_out(text):
    return int(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16) < 0.01 * 2**32


def lines(some):
    return "".join(json.dumps({"url": "u", "text": text}) + "\n" for text in some).encode()


def parquet(some, column="text"):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"source": ["s"] * len(some), column: some}), file)
    return file.getvalue()


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def main(folder, argv, out="out"):
    """prepare.py in this process on files in `folder`: (training tokens, validation tokens, meta.json)."""
    prepare.main([*argv.format(d=folder).split(), f"--out={folder / out}"])
    (train, meta), (val, _) = (prepare.load(folder / out, split) for split in ("train", "val"))
    assert not (folder / f"{out}.partial").exists()
    return train.tolist(), val.tolist(), meta


def refused(capsys, function, *args):
    """It ends with status 2 and one line on stderr: that line."""
    with pytest.raises(SystemExit) as end:
        function(*args)
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(said) == 1, said
    return said[0]


def test_the_built_in_corpus_is_byte_for_byte_what_it_was(monkeypatch, tmp_path):
    documents = [(f"{i}.py", text) for i, text in enumerate(texts(3000))]
    monkeypatch.setattr(prepare, "standard_library", lambda: ("random words", documents))
    meta = prepare.builtin(tmp_path / "out")
    assert meta["train"] == {
        "tokens": 1_916_928,
        "sha256": "a8b12666b1e745a85e2c66240b1a3b45476f4b5e7fa31dc319137bd63b3b8f82",
    }
    assert meta["val"] == {
        "tokens": 13_968,
        "sha256": "25f4b471f7bd9c352c7650ebaee015315ebbacc12df028abc11a59593cc359e2",
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is read

A = texts(200, seed=3)  # two of them are held out
BAD = b'{"text": null}\n{"url": "u"}\n["text"]\n7\n{"text": 7}\n{text}\n{"text": "\xe9"}\n'
READ = {  # {file: content}, the documents in it; FLAGS as one more
    ".jsonl": ({"a.jsonl": lines(A)}, A),
    ".ndjson": ({"a.ndjson": lines(A)}, A),
    ".json": ({"a.json": lines(A)}, A),
    ".JSONL": ({"a.JSONL": lines(A)}, A),
    ".jsonl.gz": ({"a.jsonl.gz": gzip.compress(lines(A))}, A),
    ".TXT.GZ": ({"a.TXT.GZ": gzip.compress(A[0].encode())}, A[:1]),
    ".parquet": ({"a.parquet": parquet(A)}, A),
    "a column TEXT": ({"a.parquet": parquet(A, "TEXT")}, A),
    "another column": ({"a.parquet": parquet(A, "body")}, A, "--text_column=body"),
    "another key": ({"a.jsonl": lines(A).replace(b'"text"', b'"body"')}, A, "--text_column=body"),
    "several files": ({"a.jsonl": lines(A), "b.txt": b"one", "c.txt": b"", "d.parquet": parquet(A)}, [*A, "one", *A]),
    "a blank third line": ({"a.jsonl": lines(A[:2]) + b"\n \r\n" + lines(A[2:])}, A),
    "CRLF lines": ({"a.jsonl": lines(A).replace(b"\n", b"\r\n")}, A),
    "CRLF kept": ({"a.txt": b"one\r\ntwo\rthree\r\n"}, ["one\r\ntwo\rthree\r\n"]),
    "a mark before text": ({"a.txt": BOM + b"one"}, ["one"]),
    "a mark before JSON": ({"a.jsonl": BOM + lines(A)}, A),
    "a mark before gzipped JSON": ({"a.jsonl.gz": gzip.compress(BOM + b"\n" + lines(A))}, A),
    "an empty text": ({"a.jsonl": lines(["", *A, ""])}, A),
    "halves of pairs": ({"a.jsonl": lines([*A, "half: \ud83d", "\ude00\ud83d"])}, [*A, "half: \ud83d", "\ude00\ud83d"]),
    "no last newline": ({"a.jsonl": lines(A)[:-1]}, A),
    "a bad record of each kind": ({"a.jsonl": BAD + lines(A)}, A),
    "bad records in front": ({"a.jsonl": b"?\n" * 99 + lines(A)}, A),
    "one bad in a hundred": ({"a.jsonl": b"?\n" * 100 + lines(A * 50)}, A * 50),
    "nulls in Parquet": ({"a.parquet": parquet([None, *A, None])}, A),
    "broken UTF-8 in Parquet": ({"a.parquet": parquet(["(XX)", *A]).replace(b"(XX)", b"(\xff\xff)")}, A),
    "a long line": ({"a.jsonl": lines(["word " * 400_000, *A])}, ["word " * 400_000, *A]),
    "a long text": ({"a.txt": b"word\n" * 600_000}, ["word\n" * 600_000]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_file_has_the_tokens_of_its_documents(name, tmp_path):
    files, documents, *flags = READ[name]
    write(tmp_path, files)
    argv = " ".join([*(f"{{d}}/{file}" for file in files), *flags, "--tokenizer=bytes"])
    train, val, meta = main(tmp_path, argv)
    by_split = [[text for text in documents if held_out(text) == split] for split in (False, True)]
    assert train + val == tokens(by_split[0]) + tokens(by_split[1])
    assert len(val) == (len(tokens(by_split[1])) or max(1, round(0.01 * len(train + val))))
    assert meta["records"]["good"] == len(documents) and meta["shards"] == list(files)


def test_the_first_bad_record_of_each_kind_is_reported_and_all_are_counted(capsys, tmp_path):
    write(tmp_path, {"a.jsonl": lines(A[:1]) + BAD + BAD})
    *_, meta = main(tmp_path, "{d}/a.jsonl --tokenizer=bytes")
    assert meta["records"] == {"good": 1, "no text": 10, "broken JSON": 2, "broken UTF-8": 2}
    said = capsys.readouterr().out
    assert re.findall(r"a\.jsonl, line (\d+): ([^.]*)\.", said) == [
        ("2", "no text"),
        ("7", "broken JSON"),
        ("8", "broken UTF-8"),
    ]


def test_spaces_in_paths_and_relative_paths(monkeypatch, tmp_path):
    write(tmp_path, {"a folder/a file.jsonl": lines(A)})
    monkeypatch.chdir(tmp_path)
    prepare.main(["a folder/a file.jsonl", "--tokenizer=bytes"])
    assert sorted(path.name for path in (tmp_path / "data/mine").iterdir()) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("limit", [9999, 10**6])
def test_tokens_are_at_most_the_number_and_fewer_are_announced(limit, capsys, tmp_path):
    write(tmp_path, {"a.jsonl": lines(A[:20]), "b.jsonl": lines(A[20:])})
    train, val, _ = main(tmp_path, f"{{d}}/a.jsonl {{d}}/b.jsonl --tokenizer=bytes --tokens={limit}")
    assert train == tokens(text for text in A if not held_out(text))[:limit]
    assert val == tokens(text for text in A if held_out(text))
    assert ("fewer than" in capsys.readouterr().out) == (limit == 10**6)


FOLDERS = {  # its files: those that train, those that validate
    "train-00000.parquet train-00001.parquet validation-00000.parquet test-00000.parquet README.md": ("01", "2"),
    "data/train/0.jsonl data/dev/test.txt": ("0", "1"),
    "train.jsonl test.jsonl .cache/train.jsonl": ("0", "1"),
    "latest.jsonl contest.jsonl trainer.jsonl": ("102", ""),
    "a.jsonl val.jsonl": ("0", "1"),
    "train_0.jsonl Train1.JSONL extra.jsonl": ("10", ""),
}


@pytest.mark.parametrize("names", FOLDERS)
def test_a_folder_is_split_by_the_words_in_its_names(names, capsys, tmp_path):
    some = {name: [f"{i}. {text}" for text in texts(20, i)] for i, name in enumerate(names.split())}
    kinds = {".parquet": parquet, ".txt": lambda its: its[0].encode()}
    write(tmp_path, {f"in put/{name}": kinds.get(Path(name).suffix, lines)(its) for name, its in some.items()})
    prepare.main([str(tmp_path / "in put"), f"--out={tmp_path}/out", "--tokenizer=bytes"])
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[:3])
    for split, file, wanted in (("train", "training", FOLDERS[names][0]), ("val", "validation", FOLDERS[names][1])):
        named = [names.split()[int(i)] for i in wanted]
        assert printed[file] == (", ".join(named) or "no file")
        if wanted and FOLDERS[names][1]:
            documents = [text for name in named for text in some[name][: 1 if name.endswith(".txt") else None]]
            assert prepare.load(tmp_path / "out", split)[0].tolist() == tokens(documents)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

RANKS = [bytes([b]) for b in range(256)]


def ranks_file(ranked):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranked))


FILES = {
    "good.jsonl": lines(A),
    "there/no.csv": b"a,b",
    "empty.txt": b"",
    "blank.jsonl": b"\n\n",
    "bad.jsonl": b"?\n" * 100 + lines(A * 49),
    "none.jsonl": b"?\n",
    "latin.txt": b"\xe9",
    "utf16.jsonl": lines(A).decode().encode("utf-16"),
    "pretty.json": b'{\n"text": "a"\n}\n',
    "cut.jsonl.gz": gzip.compress(lines(A))[:-20],
    "crc.jsonl.gz": gzip.compress(lines(A))[:-8] + b"12345678",
    "plain.txt.gz": b"plain",
    "body.parquet": parquet(A, "body"),
    "numbers.parquet": parquet([1, 2]),
    "cut.parquet": parquet(A)[:-10],
    "cut.tiktoken": ranks_file(RANKS)[:-5],
    "twice.tiktoken": ranks_file(RANKS) + b"YWI= 256\nYWI= 257\n",
    "bytes.tiktoken": ranks_file(RANKS[1:] + [b"ab"]),
    "tokenizer.json": b"{}",
}
REFUSED = {  # arguments: what the line must match
    "{d}/nothing.txt": "no file or folder .*nothing.txt",
    "{d}/there/no.csv": r"no\.csv .*\.ndjson",
    "{d}/there": r"there has no file to train on.*\.ndjson",
    "{d}/empty.txt": "no text",
    "{d}/blank.jsonl": "blank.jsonl .*none at all",
    "{d}/bad.jsonl": "bad.jsonl .*broken JSON: 100, good: 9,800",
    "{d}/good.jsonl {d}/none.jsonl": "none.jsonl .*broken JSON: 1",
    "{d}/pretty.json": "pretty.json .*bad records",
    "{d}/utf16.jsonl": "utf16.jsonl .*bad records",
    "{d}/good.jsonl --text_column=body": "good.jsonl .*no text: 200",
    "{d}/latin.txt": "latin.txt is damaged .*utf-8",
    "{d}/cut.jsonl.gz": "cut.jsonl.gz is damaged",
    "{d}/crc.jsonl.gz": "crc.jsonl.gz is damaged .*CRC",
    "{d}/plain.txt.gz": "plain.txt.gz is damaged",
    "{d}/body.parquet": "body.parquet has no column text.*source, body",
    "{d}/numbers.parquet": "numbers.parquet .*no text: 2",
    "{d}/cut.parquet": "cut.parquet is no Parquet file",
    "{d}/good.jsonl --out={d}/there": r"there exists: .*--out",
    "{d}/good.jsonl --out={d}/good.jsonl/out": r"good\.jsonl/out could not be made",
    "{d}/good.jsonl --tokens=nan": "--tokens",
    "{d}/good.jsonl --token=9": "--token=9",
    "c4 {d}/good.jsonl": "c4 stands alone",
    "builtin --tokens=9": "builtin takes no option",
    "{d}/good.jsonl --tokenizer=gpt3": "gpt3.*bytes.*tokenizer.json",
    "{d}/good.jsonl --eot=a": "--eot is for a tokenizer.json",
    "{d}/good.jsonl --tokenizer={d}/nothing.tiktoken": "nothing.tiktoken",
    "{d}/good.jsonl --tokenizer={d}/cut.tiktoken": "cut.tiktoken is not a file of tokenizer ranks",
    "{d}/good.jsonl --tokenizer={d}/twice.tiktoken": "twice.tiktoken .*once each",
    "{d}/good.jsonl --tokenizer={d}/bytes.tiktoken": "bytes.tiktoken .*256 bytes",
    "{d}/good.jsonl --tokenizer={d}/nothing.json": "nothing.json is not a tokenizer.json",
    "{d}/good.jsonl --tokenizer={d}/tokenizer.json": "tokenizer.json is not a tokenizer.json",
}


@pytest.mark.parametrize("argv", REFUSED)
def test_bad_input_gets_one_line_and_leaves_nothing(argv, monkeypatch, capsys, tmp_path):
    write(tmp_path, FILES)
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    line = refused(capsys, prepare.main, f"--tokenizer=bytes --out={tmp_path}/out {argv}".format(d=tmp_path).split())
    assert line.startswith("prepare.py: ") and re.search(REFUSED[argv], line), line
    assert {path.name for path in tmp_path.iterdir()} - {name.split("/")[0] for name in FILES} <= {"out.partial"}


@pytest.mark.parametrize("package, made", [("pyarrow", "bytes"), ("tokenizers", "tokenizer.json")])
def test_a_missing_package_is_named(package, made, monkeypatch, capsys, tmp_path):
    write(tmp_path, {"a.parquet": parquet(A)})
    monkeypatch.setitem(sys.modules, package, None)
    argv = f"{{d}}/a.parquet --tokenizer={made}"
    assert f"pip install {package}" in refused(capsys, main, tmp_path, argv)


def test_a_file_that_was_mended_is_read_again_and_other_arguments_are_refused(capsys, tmp_path):
    write(tmp_path, {"a.jsonl": lines(A), "b.jsonl": b"?\n", "c.jsonl": lines(A[::-1])})
    argv = f"{{d}}/a.jsonl {{d}}/b.jsonl {{d}}/c.jsonl --tokenizer=bytes --tokens={len(tokens(A)) + 500}"
    assert "b.jsonl" in refused(capsys, main, tmp_path, argv)
    assert "begun with other arguments" in refused(capsys, main, tmp_path, argv + "9")
    write(tmp_path, {"a.jsonl": lines(A[:10]), "b.jsonl": lines(A[10:20])})
    assert main(tmp_path, argv) == main(tmp_path, argv, "another")


def test_a_second_run_on_the_same_folder_is_refused(capsys, tmp_path):
    write(tmp_path, {"a.jsonl": lines(A), "out.partial/lock": b""})
    with lock(tmp_path / "out.partial/lock"):
        assert "another process is working" in refused(capsys, main, tmp_path, "{d}/a.jsonl --tokenizer=bytes")
    main(tmp_path, "{d}/a.jsonl --tokenizer=bytes")


def test_a_file_is_replaced_as_a_whole_with_the_usual_mode(tmp_path):
    (tmp_path / "b").touch()
    replace_file(tmp_path / "a.json", lambda f: f.write(b"old"))
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b").stat().st_mode
    with pytest.raises(ZeroDivisionError):
        replace_file(tmp_path / "a.json", lambda f: f.write(b"new") / 0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": b"old", "b": b""}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

SIGNS = [
    "a",
    "b",
    "Z",
    "é",
    "7",
    "²",
    "Ⅷ",
    "日",
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "'s",
    "'",
    "'ll",
    ".",
    "!?",
    "\U0001f600",
]
SIGNS += ["\u00a0", "\u2003", "\u3000", "\x1c", "\x85", "\u0301", "<|endoftext|>", " word", " don't"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A file of ranks: the bytes and the commonest runs of 2 to 5 bytes, so that a wrong cut shows in the tokens."""
    text = "".join(random.Random(1).choices(SIGNS, k=20_000)).encode()
    runs = Counter(text[i : i + n] for n in (2, 3, 4, 5) for i in range(len(text) - n))
    path = tmp_path_factory.mktemp("ranks") / "own.tiktoken"
    path.write_bytes(ranks_file(RANKS + [run for run, _ in runs.most_common(8000)]))
    return path


def test_a_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch, ranks):
    mine, rng, cuts = tokenizer.get_tokenizer(str(ranks)), random.Random(0), 0
    for size in [1, 2, 3, 5, 8, 13, 50, 200] * 40:
        monkeypatch.setattr(tokenizer, "PIECE", size)
        text, block = "".join(rng.choices(SIGNS, k=200)), rng.choice([1, 2, 7, 30, 1000])
        pieces, last = zip(*mine.pieces(text[i : i + block] for i in range(0, len(text), block)))
        assert "".join(pieces) == text and last == (False,) * (len(pieces) - 1) + (True,)
        assert [token for some in mine.encode_batch(list(pieces)) for token in some] == mine.encoding.encode_ordinary(
            text
        )
        cuts += len(pieces) - 1
    assert cuts > 2000


def test_a_million_white_space_characters_in_a_row_do_not_make_tiktoken_panic(ranks, tmp_path):
    parts = [" " * 10**6, " word" + "\t" * 10**6, "\t" + "word" * 80_000 + "\n" * 10**6, "\n\x1c" + " " * 10**6]
    mine, text = tokenizer.get_tokenizer(str(ranks)), "".join(parts)
    expected = [token for part in parts for token in mine.encoding.encode_ordinary(part)]  # GPT-2's pattern ends there
    assert mine.encode_ordinary(text) == expected
    write(tmp_path, {"a.jsonl": lines([text])})
    train, val, _ = main(tmp_path, f"{{d}}/a.jsonl --tokenizer={ranks}")
    assert train + val == [*expected, mine.eot]


def json_tokenizer(folder, config=None, words=()):
    """A tokenizer.json like Llama 2's, which marks the beginning of a text; it truncates and pads, as some do."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>", "<end>"], show_progress=False
    )
    made.train_from_iterator(texts(50), trainer)
    made.add_tokens([f"word{i}" for i in words])
    oracle = tokenizers.Tokenizer.from_str(made.to_str())
    made.enable_truncation(5)
    made.enable_padding(length=5)
    made.save(str(folder / "tokenizer.json"))
    if config:
        name, content = config
        (folder / name).write_text(json.dumps(content))
    return oracle


ENDS = {  # the config beside a tokenizer.json, flags, the token that ends a document
    "a string": (("tokenizer_config.json", {"eos_token": "</s>"}), "", "</s>"),
    "an object": (("tokenizer_config.json", {"eos_token": {"content": "<end>"}}), "", "<end>"),
    "an id": (("config.json", {"eos_token_id": 1}), "", "</s>"),
    "a list of ids": (("config.json", {"eos_token_id": [2, 1]}), "", "<end>"),
    "a flag": (None, "--eot=<end>", "<end>"),
    "a flag beside a config without": (("tokenizer_config.json", {"eos_token": None}), "--eot=</s>", "</s>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_tokenizer_json_gives_its_own_tokens(name, capsys, tmp_path):
    config, flag, end = ENDS[name]
    oracle = json_tokenizer(tmp_path, config)
    some = [*A, "a b  " * 100_000]
    write(tmp_path, {"a.jsonl": lines([*some, "half: \ud83d"])})
    train, val, meta = main(tmp_path, f"{{d}}/a.jsonl --tokenizer={{d}}/tokenizer.json {flag}")
    some += ["half: \ufffd"]
    ids = {text: [*oracle.encode(text, add_special_tokens=False).ids, oracle.token_to_id(end)] for text in some}
    assert train == [token for text in some if not held_out(text) for token in ids[text]]
    assert val == [token for text in some if held_out(text) for token in ids[text]]
    again = tokenizer.get_tokenizer(meta["tokenizer"], tmp_path / "out")
    assert (again.name, again.n_vocab, again.eot) == (meta["tokenizer"], meta["vocab_size"], oracle.token_to_id(end))
    assert again.encode_ordinary(A[0]) == ids[A[0]][:-1]
    assert again.decode(ids[A[0]]) == oracle.decode(ids[A[0]], skip_special_tokens=False)
    os.remove(tmp_path / "out/tokenizer_config.json")
    assert "--eot" in refused(capsys, tokenizer.get_tokenizer, meta["tokenizer"], tmp_path / "out")


def test_more_than_65_536_tokens_take_uint32(tmp_path):
    oracle = json_tokenizer(tmp_path, words=range(65_400))
    write(tmp_path, {"a.jsonl": lines([*A, "word65399"])})
    train, _, meta = main(tmp_path, "{d}/a.jsonl --tokenizer={d}/tokenizer.json --eot=</s>")
    assert (meta["dtype"], meta["vocab_size"]) == ("uint32", oracle.get_vocab_size())
    assert oracle.token_to_id("word65399") > 65_535 and train[-2] == oracle.token_to_id("word65399")
    assert (tmp_path / "out/train.bin").stat().st_size == 4 * len(train)


def test_ranks_lie_beside_their_tokens(capsys, ranks, tmp_path):
    write(tmp_path, {"a.jsonl": lines(A)})
    train, _, meta = main(tmp_path, f"{{d}}/a.jsonl --tokenizer={ranks}")
    again = tokenizer.get_tokenizer(meta["tokenizer"], tmp_path / "out")
    assert train == tokens([text for text in A if not held_out(text)], again.encoding) and meta["dtype"] == "uint16"
    (tmp_path / "out/tokenizer.tiktoken").write_bytes(ranks_file(RANKS))
    assert "is not the tokenizer ranks-" in refused(
        capsys, tokenizer.get_tokenizer, meta["tokenizer"], tmp_path / "out"
    )


@pytest.mark.parametrize("error", [requests.ConnectionError("no network"), ValueError("Hash mismatch")])
def test_gpt2_without_a_network(monkeypatch, capsys, error):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(error))
    assert "TIKTOKEN_CACHE_DIR" in refused(capsys, tokenizer.get_tokenizer, "gpt2")


# ---------------------------------------------------------------------------------------------------------------------
# The hub, kills

C4 = [f"en/c4-validation.{i:05d}-of-00008.json.gz" for i in range(8)] + [
    f"en/c4-train.{i:05d}-of-01024.json.gz" for i in range(3)
]
BOOKS = [f"data/train-{i:05d}-of-00002.parquet" for i in range(2)]
COMMIT = "5" * 40


class Hub(http.server.ThreadingHTTPServer):
    """The hub's paths on 127.0.0.1. The first transfer of `breaks` ends in the middle. `log` has requests."""

    def __init__(self, repository, files, breaks=None):
        super().__init__(("127.0.0.1", 0), HubAnswer)
        self.repository, self.files, self.breaks, self.log = repository, files, breaks, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class HubAnswer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        prefix = f"/datasets/{hub.repository}/resolve/"
        revision, _, name = path.removeprefix(prefix).partition("/")
        body, headers = hub.files.get(name), {}
        if path.startswith(f"/api/datasets/{hub.repository}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in hub.files.items()
            ]
            body = json.dumps(entries).encode()
        elif body is not None:
            headers = {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
        hub.log.append((self.command, revision, name))
        first = int((self.headers["Range"] or "bytes=0-")[len("bytes=") :].split("-")[0])
        self.send_response(404 if body is None else 206 if first else 200)
        body = body or b""
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        for header, value in {**headers, "Content-Length": str(len(body) - first)}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            stop, hub.breaks = (len(body) // 2, None) if name == hub.breaks else (len(body), hub.breaks)
            self.wfile.write(body[first:stop])
            self.close_connection = True

    do_HEAD = do_GET


def start(out, *argv, hub=None):
    """prepare.py in a process of its own, which first prints a line when the imports are done."""
    env = os.environ | {
        "HF_HOME": f"{out}.hf",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port if hub else 9}"}
    code = "import sys; from data import prepare; print('ready', flush=True); prepare.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *argv, f"--out={out}", "--tokenizer=bytes"]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_c4_comes_from_the_hub_at_one_commit_over_a_broken_transfer(tmp_path):
    some = {name: texts(20, name) for name in C4}
    hub = Hub("allenai/c4", {name: gzip.compress(lines(its)) for name, its in some.items()}, breaks=C4[9])
    train, val = (tokens(text for name in names for text in some[name]) for names in (C4[8:10], C4[:8]))
    process = start(tmp_path / "out", "c4", f"--tokens={len(train)}", hub=hub)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert hub.breaks is None  # it was met
    assert [prepare.load(tmp_path / "out", split)[0].tolist() for split in ("train", "val")] == [train, val]
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["revision"] == COMMIT and meta["shards"] == [Path(name).name for name in C4[:10]]
    assert {revision for command, revision, name in hub.log if command == "GET" and name in some} == {COMMIT}
    assert C4[10] not in {name for *_, name in hub.log}  # it is not needed


def test_gutenberg_lists_the_hubs_files(tmp_path):
    some = {name: texts(200, name) for name in BOOKS}
    hub = Hub(
        "sedthh/gutenberg_english", {"README.md": b""} | {name: parquet(its, "TEXT") for name, its in some.items()}
    )
    process = start(tmp_path / "out", "gutenberg", hub=hub)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    for split, side in (("train", False), ("val", True)):
        expected = tokens(text for its in some.values() for text in its if held_out(text) == side)
        assert prepare.load(tmp_path / "out", split)[0].tolist() == expected


def test_a_hub_out_of_reach_gets_one_line(tmp_path):
    process = start(tmp_path / "out", "c4")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "could not be read" in err


def test_a_run_killed_ten_times_has_the_bytes_of_one_that_was_not(tmp_path):
    files, rng, parts = [f"{tmp_path}/{i}.jsonl" for i in range(60)], random.Random(0), set()
    write(tmp_path, {f"{i}.jsonl": lines(texts(300, i)) for i in range(60)})
    begun = time.monotonic()
    main(tmp_path, " ".join(files) + " --tokenizer=bytes", "whole")
    seconds = time.monotonic() - begun
    for _ in range(10):
        process = start(tmp_path / "out", *files)
        process.stdout.readline()  # its imports are done
        time.sleep(seconds * rng.random() / 8)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        parts.add(len(list((tmp_path / "out.partial").glob("[0-9]*"))))
    assert len(parts) > 2  # the kills met it at different places
    _, err = start(tmp_path / "out", *files).communicate()
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), err
    assert not (tmp_path / "out.partial").exists()


# ---------------------------------------------------------------------------------------------------------------------
# load()


@pytest.fixture
def loaded(tmp_path):
    numbers = np.arange(200, dtype=np.uint16)
    prepare.write(tmp_path / "data", BYTES, numbers, numbers[:100], {"source": "numbers"})
    return tmp_path / "data"


def flip(content):
    return content[:50] + bytes([content[50] ^ 1]) + content[51:]


DAMAGES = {  # what becomes of a file of the folder: what the line must contain
    "missing": ("val.bin", lambda content: None, "there is no"),
    "empty": ("val.bin", lambda content: b"", "is empty"),
    "half a token": ("val.bin", lambda content: content[:-1], "was cut off"),
    "cut": ("val.bin", lambda content: content[:-2], "has 198 bytes, and meta.json says 100 tokens"),
    "too long": ("val.bin", lambda content: content + b"ab", "has 202 bytes, and meta.json says 100 tokens"),
    "another byte": ("val.bin", flip, "sha256"),
    "meta.json cut": ("meta.json", lambda content: content[:-10], "meta.json is damaged"),
    "meta.json a list": ("meta.json", lambda content: b"[]", "meta.json is damaged"),
    "meta.json without a vocabulary": ("meta.json", lambda content: b'{"tokenizer": "bytes"}', "meta.json is damaged"),
    "another type": ("meta.json", lambda content: content.replace(b"uint16", b"int16"), "meta.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_load_refuses_a_damaged_folder(name, capsys, loaded):
    file, damage, expected = DAMAGES[name]
    content = damage((loaded / file).read_bytes())
    (loaded / file).unlink() if content is None else (loaded / file).write_bytes(content)
    assert expected in refused(capsys, prepare.load, loaded, "val")


IDS = [1, 50_256, 7, 2]
NANOGPT = {  # the type of its ids, the ids, what else is in the folder: what is loaded, or what the line must match
    "GPT-2": ("uint16", IDS, {}, IDS),
    "a character vocabulary": ("uint16", IDS, {"meta.pkl": b""}, "meta.pkl, a pickle, .*meta.json, for example"),
    "a larger vocabulary": ("uint16", [1, 50_257], {}, "token 50257.*meta.json, for example"),
    "uint32": ("uint32", IDS, {}, "0 in every second place.*meta.json, for example"),
    "described": (
        "uint32",
        [1, 100_000],
        {"meta.json": b'{"tokenizer": "x", "vocab_size": 100001, "dtype": "uint32"}'},
        [1, 100_000],
    ),
    "an older folder of ours": (
        "uint16",
        [1, 60_000],
        {"meta.json": b'{"tokenizer": "x", "vocab_size": 60001}'},
        [1, 60_000],
    ),
}


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpts_folders_are_read_or_refused_and_hashed(name, capsys, tmp_path):
    dtype, ids, others, expected = NANOGPT[name]
    content = np.array(ids, dtype).tobytes()
    write(tmp_path, {"train.bin": content} | others)
    if isinstance(expected, str):
        assert re.search(expected, refused(capsys, prepare.load, tmp_path, "train"))
        return
    array, meta = prepare.load(tmp_path, "train")
    assert array.tolist() == expected
    assert meta["train"] == {"tokens": len(ids), "sha256": hashlib.sha256(content).hexdigest()}
    assert ("GPT-2 tokens in uint16" in capsys.readouterr().out) == (name == "GPT-2")
