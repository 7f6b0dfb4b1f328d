"""Bad input to any command is one line on stderr and status 2, and nothing is written. Each row is one kind of it."""

import gzip
import json
import shlex
import shutil

import pyarrow.parquet
import pytest
import torch
from conftest import make_data, make_llama, make_run
from runs import FOX, N, flags

import eval_passkey
import sample
import train
from common import lock
from data import prepare
from hf import convert

# Command with its arguments, and what the line holds: all that stands between " .. ". The fixture makes the files.
ROWS = r"""
train --lr=nan                                           | --lr nan must be at least 0
train --pos=yarn                                         | --pos 'yarn' .. fope, rope, alibi, kerple, fire, nope
train --n_head=3                                         | --n_head 3 must divide --n_embd 32
train --vocab_size=64                                    | --vocab_size 64 is less than the 257 tokens
train --eval_trials=1 --train_len=256                    | val.bin 700, and they need 257 and 4097
train --batch_tokens=100                                 | --batch_tokens 100 is not a multiple of 32
train --data=bin-cut                                     | was cut off (1400 bytes, 701 tokens)
train --data=bin-changed                                 | train.bin does not have the sha256
train --data=meta-cut                                    | meta-cut/meta.json is damaged
train --data=meta-none                                   | nanoGPT .. {"tokenizer": "gpt2", "vocab_size": 50257, "dtype"
train --out=run                                          | run exists: --resume continues it
train --out=nowhere --resume                             | there is no nowhere to resume
train --out=cut --resume                                 | cut/ckpt.pt is not a whole checkpoint
train --out=run --resume --n_embd=64                     | --resume cannot change the model
train --out=run --resume --sigma=1                       | --resume cannot change --sigma
train --init_from=run --data=words                       | words tokens, the checkpoint has bytes tokens
train --init_from=run --n_head=1 --pos=rope              | leave out the flags that change it

eval_passkey run --lengths=250                           | its fixed strings take 253 tokens
eval_passkey run --lengths=256,300                       | these lengths take 19201
eval_passkey run --lengths=256,long                      | --lengths 256,long is not a list of numbers
eval_passkey nope --lengths=256 --scaling=yarn           | needs a model with rope or fope
eval_passkey gpt2 --lengths=256                          | the checkpoint was trained on gpt2 tokens
sample code.pt x                                         | code.pt is not a whole checkpoint
sample weights.pt x                                      | weights.pt is not a checkpoint of train.py

prepare good.jsonl --val empty.txt                       | no text to validate on
prepare bad.jsonl                                        | bad.jsonl has 9,900 records, and 100 of them are bad
prepare indented.json                                    | one record per line .. url, body .. --text_column
prepare body.parquet                                     | no column 'text' .. url .. body .. --text_column
prepare cut.jsonl.gz                                     | cut.jsonl.gz is damaged
prepare good.jsonl --out=run                             | run exists .. --out
prepare good.jsonl --out=begun                           | begun with other arguments
prepare good.jsonl --out=locked                          | another process is working

convert from nowhere new                                 | there is no nowhere/config.json
convert from llama-gpt2 new                              | cannot represent GPT2LMHeadModel
convert from llama-biases new                            | cannot represent biases
convert from llama-partial new                           | partial rotation
convert from llama-dynamic new                           | rope_type dynamic
convert from llama-constants new                         | yarn with other constants
convert from llama-deep new                              | the weights of its config.json: model.layers.2
convert from llama-pickle new                            | no file named model.safetensors
convert to kerple new                                    | kerple cannot be exported
"""
COMMANDS = {
    "train": (train.main, flags("fox", "new")),
    "eval_passkey": (eval_passkey.main, ["--device=cpu", "--trials=1"]),
    "sample": (sample.main, ["--device=cpu"]),
    "prepare": (prepare.main, ["--tokenizer=bytes", "--out=out"]),
    "convert": (convert.main, []),
}
RUNS = {  # what differs in the configuration of each
    "run": {},
    "nope": dict(pos="nope"),
    "gpt2": dict(tokenizer="gpt2"),
    "kerple": dict(pos="kerple"),
}
LLAMAS = {  # what differs in config.json
    "gpt2": dict(architectures=["GPT2LMHeadModel"]),
    "biases": dict(attention_bias=True),
    "partial": dict(partial_rotary_factor=0.5),
    "dynamic": dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
    "constants": dict(
        rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=9.0)
    ),
    "deep": dict(num_hidden_layers=3),
    "pickle": {},
}


class Surprise:
    """Neither a tensor nor a plain value: unpickling it would run code."""

    def __reduce__(self):
        return print, ("this must not run",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that a row names."""
    d = tmp_path_factory.mktemp("bad")
    make_data(d / "fox", FOX[:701], FOX[:700])
    for name, options in RUNS.items():
        small = dict(n_layer=1, n_head=2, n_embd=32, n_hidden=64, vocab_size=320, train_len=N, init_std=0.02)
        make_run(d / name, **small | dict(data="fox") | options)
    shutil.copytree(d / "run", d / "cut")
    (d / "cut/ckpt.pt").write_bytes((d / "run/ckpt.pt").read_bytes()[:20_000])
    torch.save(Surprise(), d / "code.pt")
    torch.save({"step": 1, "model": {}}, d / "weights.pt")

    content, meta = (d / "fox/train.bin").read_bytes(), json.loads((d / "fox/meta.json").read_text())
    for name, train_bin, facts in (
        ("bin-cut", content[:-2], json.dumps(meta)),
        ("bin-changed", content[:-1] + b"?", json.dumps(meta)),
        ("words", content, json.dumps(meta | {"tokenizer": "words"})),
        ("meta-cut", content, json.dumps(meta)[:-9]),
        ("meta-none", content, ""),
    ):
        shutil.copytree(d / "fox", d / name)
        (d / name / "train.bin").write_bytes(train_bin)
        (d / name / "meta.json").write_text(facts)
    (d / "meta-none/meta.json").unlink()

    body = [{"url": "u", "body": f"text {i}"} for i in range(200)]
    good = "".join(json.dumps({"text": line["body"]}) + "\n" for line in body).encode()
    for name, text in {
        "good.jsonl": good,
        "empty.txt": b"",
        "bad.jsonl": b"?\n" * 100 + b'{"text": "a"}\n' * 9800,
        "indented.json": json.dumps(body, indent=1).encode(),
        "cut.jsonl.gz": gzip.compress(good)[:-20],
        "begun.partial/state.json": b'{"arguments": []}',
        "begun.partial/lock": b"",
        "locked.partial/lock": b"",
    }.items():
        (d / name).parent.mkdir(exist_ok=True)
        (d / name).write_bytes(text)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(body), d / "body.parquet")

    make_llama(d / "llama")
    config = json.loads((d / "llama/config.json").read_text())
    for name, changes in LLAMAS.items():
        shutil.copytree(d / "llama", d / f"llama-{name}")
        (d / f"llama-{name}/config.json").write_text(json.dumps(config | changes))
    (d / "llama-pickle/model.safetensors").rename(d / "llama-pickle/pytorch_model.bin")
    return d


@pytest.mark.parametrize("row", [*filter(None, ROWS.splitlines())], ids=lambda row: row.split("|")[0].strip())
def test_bad_input_is_one_line_and_nothing_is_written(folder, monkeypatch, refused, row):
    argv, expected = (part.strip() for part in row.split(" | "))
    command, *argv = shlex.split(argv)
    main, usual = COMMANDS[command]
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with lock(folder / "locked.partial/lock"):
        line = refused(main, *usual, *argv)
    assert all(words in line for words in expected.split(" .. ")), line
    shutil.rmtree(folder / "out.partial", ignore_errors=True)  # from which prepare.py would resume
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
