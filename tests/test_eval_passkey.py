"""eval_passkey.py: one forward pass per passkey trial, perplexity in chunks, and the command around them."""

import contextlib
import json
import math
import os
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_passkey
import plot
from baselines import yarn
from data import prepare
from data.passkey import passkey_document
from data.tokenizer import get_tokenizer
from model import GPT
from train import TrainConfig

FLOAT32 = contextlib.nullcontext  # no autocast
BYTES = get_tokenizer("bytes")


def make_model(train_len=256, **changes):
    shape = dict(n_layer=1, n_head=2, n_embd=32, n_hidden=64, vocab_size=257, train_len=train_len)
    return GPT(TrainConfig(**shape | changes)).eval()


def save(folder, model, data):
    """A checkpoint of train.py."""
    folder.mkdir(parents=True)
    facts = {"step": 7, "config": asdict(model.cfg) | {"data": str(data)}, "tokenizer": "bytes"}
    torch.save(facts | {"model": model.state_dict(), "optimizer": {}}, folder / "ckpt.pt")
    return folder


def evaluate(*argv):
    eval_passkey.main([*map(str, argv), "--device=cpu", "--dtype=float32"])


def refused(capsys, *argv):
    """The line on stderr of a command that must refuse its input."""
    with pytest.raises(SystemExit) as end:
        eval_passkey.main([*map(str, argv)])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    return error


def read(file):
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "text"
    text = np.random.default_rng(0).integers(97, 123, 6000).astype(np.uint16)
    prepare.write(folder, BYTES, text[:300], text[300:], {"source": "letters"})
    return folder


@pytest.fixture
def run(data, tmp_path):
    return save(tmp_path / "toy-rope-s0", make_model(pos="rope"), data)


# ---------------------------------------------------------------------------------------------------------------------
# Passkey


def test_trials_have_uniform_depths_and_five_digit_keys():
    documents, answers, depths = eval_passkey.passkey_trials(BYTES, 512, 400, seed=0)
    assert documents.shape == (400, 512) and set(answers) == {6}
    assert np.histogram(depths, bins=4, range=(0, 1))[0] == pytest.approx([100] * 4, abs=35)
    texts = [BYTES.decode(document.tolist()) for document in documents]
    keys = [int(text[-5:]) for text in texts]
    assert min(keys) >= 10_000 and max(keys) <= 99_999 and len(set(keys)) > 390
    for text, key, depth in zip(texts, keys, depths):
        assert text.count(str(key)) == 3
        assert len(text.split("\n")[1]) == pytest.approx(depth * 259, abs=1)  # filler before the key, in bytes


def test_trials_are_a_function_of_the_seed():
    first, again, other = (eval_passkey.passkey_trials(BYTES, 512, 40, seed)[0] for seed in (0, 0, 1))
    assert (again == first).all()
    assert (other != first).any(1).all()


def test_text_stands_before_a_shorter_prompt():
    text = np.arange(100, 400) % 256
    documents, _, depths = eval_passkey.passkey_trials(BYTES, 600, 5, 0, text)
    for document, depth in zip(documents, depths):
        key = int(BYTES.decode(document[-5:].tolist()))
        assert document[:300].tolist() == text.tolist()
        assert document[300:].tolist() == passkey_document(BYTES, 300, key, depth)[0]


def greedy_right(model, documents, answers):
    """What the forward pass stands for: the answer generated token by token from the prompt before it."""
    right = []
    for document, n in zip(torch.from_numpy(documents.astype(np.int64)), answers.tolist()):
        right.append(torch.equal(model.generate(document[None, :-n], n)[0], document))
    return np.array(right)


@pytest.mark.parametrize("batch_tokens", [1, 400, 10**6])
def test_one_forward_pass_decides_as_greedy_decoding_does(batch_tokens):
    """The prompts end in the model's own answers; in about half of these, one token is changed, any of them."""
    rng, model = np.random.default_rng(0), make_model(train_len=64, init_std=0.3)
    documents, answers, changed = np.empty((60, 40), np.uint16), rng.integers(2, 7, 60), rng.random(60) < 0.5
    for i, n in enumerate(answers):
        documents[i] = model.generate(torch.from_numpy(rng.integers(0, 257, (1, 40 - n))), int(n))[0]
        if changed[i]:
            place = 39 - i % n
            documents[i, place] = (documents[i, place] + 1 + rng.integers(256)) % 257
    right = eval_passkey.passkey_right(model, documents, answers, batch_tokens, FLOAT32)
    assert 12 <= right.sum() <= 48
    assert (right == ~changed).all()
    assert (right == greedy_right(model, documents, answers)).all()


def test_right_trials_are_counted_at_each_length_and_in_each_tenth_of_depth(run, monkeypatch):
    depths = {length: eval_passkey.passkey_trials(BYTES, length, 50, seed=0)[2] for length in (256, 512)}
    monkeypatch.setattr(eval_passkey, "passkey_right", lambda model, documents, *_: depths[documents.shape[1]] < 0.3)
    evaluate(run, "--trials=50", "--lengths=256,512")
    result = read(run / "eval.json")
    for length, right, by_depth in zip((256, 512), result["passkey"], result["by_depth"]):
        count = np.histogram(depths[length], bins=10, range=(0, 1))[0].tolist()
        assert by_depth == [[n, n] for n in count[:3]] + [[0, n] for n in count[3:]]
        assert right == sum(count[:3]) > 5


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity


@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
@pytest.mark.parametrize("length", [16, 48, 192])
@pytest.mark.parametrize("pos", ["fope", "alibi"])
def test_perplexity_is_that_of_a_plain_loop_in_float64(pos, length, batch_tokens):
    model, losses = make_model(train_len=64, init_std=0.2, pos=pos), []
    tokens = np.random.default_rng(1).integers(0, 257, 193)
    for i in range(0, 192, length):
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens[None, i : i + length]))[0].double().numpy()
        for t in range(length):
            losses.append(math.log(np.exp(logits[t]).sum()) - logits[t, tokens[i + t + 1]])
    assert len(losses) == 192
    measured = eval_passkey.perplexity(model, tokens.astype(np.uint16), length, batch_tokens, FLOAT32)
    assert measured == pytest.approx(math.exp(sum(losses) / 192), rel=1e-5)


def test_a_loss_too_large_for_exp_is_a_perplexity_of_inf():
    model, tokens = make_model(), np.random.default_rng(1).integers(0, 257, 65).astype(np.uint16)
    torch.nn.init.normal_(model.head.weight, std=1e4)
    assert eval_passkey.perplexity(model, tokens, 64, 4096, FLOAT32) == math.inf


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_several_checkpoints_make_one_table_and_one_figure(data, tmp_path, capsys):
    names = {f"toy-fope-s{seed}": make_model(seed=seed) for seed in (0, 1)} | {"toy-rope-s0": make_model(pos="rope")}
    folders = [save(tmp_path / name, model, data) for name, model in names.items()]
    evaluate(*folders, "--lengths=256,512", "--trials=3")
    captured = capsys.readouterr()
    assert captured.err == ""  # no progress bar where stderr is no terminal
    results = [plot.read_result(folder / "eval.json") for folder in folders]
    assert [result["name"] for result in results] == list(names)
    assert plot.table(results) in captured.out
    assert (tmp_path / "eval.md").read_text() == plot.table(results) + "\n"
    assert f"written: {tmp_path}/eval.md, {tmp_path}/eval.png" in captured.out and (tmp_path / "eval.png").exists()
    for result in results:
        assert (result["lengths"], result["trials"], result["eval_tokens"]) == ([256, 512], 3, 5699 // 512 * 512)
        assert (result["train_len"], result["step"], result["data"]) == (256, 7, "letters")
        assert (result["dtype"], result["torch"]) == ("float32", torch.__version__)
        assert all(200 < x < 350 for x in result["perplexity"])  # about 257: an untrained model guesses


def test_lengths_default_to_multiples_of_the_training_length(run, tmp_path):
    evaluate(run / "ckpt.pt", "--trials=1", f"--out={tmp_path / 'new/folder'}")
    assert read(run / "eval.json")["lengths"] == [256, 512, 1024, 2048, 4096]
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == ["eval.md", "eval.png"]


# Flags, and the name of the result: NAME-yarn2-s0 is another thing than NAME-s0.
KINDS = [
    ("", "eval", "toy-rope-s0"),
    ("--behind_text", "eval-behind-text", "toy-rope-behind-text-s0"),
    ("--scaling=yarn --scale=2", "eval-yarn2", "toy-rope-yarn2-s0"),
    ("--scaling=linear --scale=2.5", "eval-linear2.5", "toy-rope-linear2.5-s0"),
]


@pytest.mark.parametrize("flags, stem, name", KINDS)
def test_each_kind_of_evaluation_has_files_of_its_own(run, flags, stem, name):
    evaluate(run, "--trials=1", "--lengths=256,512", *flags.split())
    assert sorted(path.name for path in run.glob("eval*")) == [f"{stem}.{kind}" for kind in ("json", "md", "png")]
    assert read(run / f"{stem}.json")["name"] == name


def test_behind_text_the_prompt_has_the_training_length(run, data, monkeypatch):
    seen = []
    monkeypatch.setattr(
        eval_passkey, "passkey_right", lambda model, documents, *_: seen.append(documents) or documents[:, 0] > 0
    )
    evaluate(run, "--trials=1", "--lengths=256,512", "--behind_text")
    val = np.fromfile(data / "val.bin", dtype=np.uint16)
    for (document,), before in zip(seen, (0, 256)):
        assert document[:before].tolist() == val[:before].tolist()
        assert BYTES.decode(document[before:].tolist()).startswith("There is an important info")


def test_linear_scaling_is_position_interpolation(run, data, monkeypatch):
    """Frequencies over 4: position 4n of the scaled model has the rotation angle of position n before."""
    models = []
    monkeypatch.setattr(
        eval_passkey, "passkey_right", lambda model, documents, *_: models.append(model) or documents[:, 0] > 0
    )
    evaluate(run, "--trials=1", "--lengths=256")
    evaluate(run, "--trials=1", "--lengths=256", "--scaling=linear", "--scale=4")
    before, scaled = (next(iter(model.blocks[0].attention.position.tables.values()))[0] for model in models)  # cos
    torch.testing.assert_close(scaled[:, ::4], before[:, :64])


def test_scaling_starts_from_the_training_length_of_the_model():
    model = make_model(pos="rope", train_len=64)  # its original_len is 512
    want = yarn(model.blocks[0].attention.position.omega, 4.0, 64, head_dim=model.cfg.head_dim, theta=1e4)
    eval_passkey.scale_frequencies(model, "yarn", 4.0)
    torch.testing.assert_close(model.blocks[0].attention.position.omega, want)


def test_every_answer_token_counts_even_the_first():
    model = make_model(pos="nope", train_len=64)
    tokens = torch.randint(97, 123, (1, 30), generator=torch.Generator().manual_seed(0))
    documents = np.repeat(model.generate(tokens, 1).numpy(), 2, axis=0)  # answers of one token
    documents[1, -1] = (documents[1, -1] + 1) % 257
    right = eval_passkey.passkey_right(model, documents, np.array([1, 1]), 10**6, FLOAT32)
    assert right.tolist() == [True, False]


def test_every_length_has_its_own_keys_and_depths():
    depths = [eval_passkey.passkey_trials(BYTES, length, 5, seed=0)[2].tolist() for length in (300, 400)]
    assert depths[0] != depths[1]


def test_other_data_is_compared_with_the_checkpoints_own(run, data, tmp_path):
    """As the paper trains on books and tests on C4. The oracle averages the losses of single chunks."""
    other = np.frombuffer(b"Another text than that of before, over and over. " * 100, dtype=np.uint8).astype(np.uint16)
    prepare.write(tmp_path / "other", BYTES, other[:300], other, {"source": "another"})
    evaluate(run, "--lengths=256,768", "--trials=2", f"--data={tmp_path / 'other'}")
    model, result = make_model(pos="rope"), read(run / "eval-on-other.json")

    def by_chunk(tokens, length):
        n = (len(tokens) - 1) // 768 * 768
        chunks = torch.from_numpy(np.stack([tokens[i : i + length + 1] for i in range(0, n, length)]).astype(np.int64))
        with torch.no_grad():
            losses = [F.cross_entropy(model(chunk[None, :-1])[0].double(), chunk[1:]).item() for chunk in chunks]
        return math.exp(np.mean(losses))

    own = np.fromfile(data / "val.bin", dtype=np.uint16)
    expected = [by_chunk(other, length) for length in (256, 768)]
    assert result["perplexity"] == pytest.approx(expected, rel=1e-4) and result["data"] == "another"
    ratios = [ppl / by_chunk(own, length) for ppl, length in zip(expected, (256, 768))]
    assert result["perplexity_ratio"] == pytest.approx(ratios, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# What was measured is not lost


LARGE = ["--trials=2", "--lengths=256,512", "--eval_tokens=2048"]
SMALLER = [  # flags after those above, and the flag that the message names
    ("--trials=1", "--trials=2"),
    ("--eval_tokens=1024", "--eval_tokens=2048"),
    ("--lengths=256", "--lengths=256,512"),
    ("--lengths=512,1024", "--lengths=256,512,1024"),
]


@pytest.mark.parametrize("flag, named", SMALLER)
def test_a_smaller_evaluation_does_not_replace_a_larger_one(run, capsys, flag, named):
    evaluate(run, *LARGE)
    before = (run / "eval.json").read_bytes()
    line = refused(capsys, run, *LARGE, flag)
    assert "eval.json holds a larger evaluation" in line and named in line
    assert (run / "eval.json").read_bytes() == before
    evaluate(run, *LARGE, "--trials=3", "--lengths=256,512,1024")  # a larger one does
    assert read(run / "eval.json")["trials"] == 3


def test_results_are_printed_even_if_they_cannot_be_written(run, capsys, monkeypatch):
    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(eval_passkey, "replace_file", full)
    with pytest.raises(SystemExit) as end:
        evaluate(run, *LARGE)
    captured = capsys.readouterr()
    assert end.value.code == 2 and "eval.json could not be written" in captured.err
    assert "| toy-rope: passkey | 1 |" in captured.out


def test_results_are_written_even_if_they_cannot_be_printed(run, monkeypatch):
    with open(os.devnull) as closed:  # print() raises OSError, as for a closed pipe
        monkeypatch.setattr(sys, "stdout", closed)
        evaluate(run, *LARGE)
    assert len(read(run / "eval.json")["passkey"]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line on stderr, exit status 2, found before any measurement


@pytest.fixture(scope="module")
def bad(data, tmp_path_factory):
    """{d}/NAME in the cases below."""
    d = tmp_path_factory.mktemp("bad")
    save(d / "run", make_model(), data)
    shutil.copytree(d / "run", d / "copy/run")
    save(d / "nope", make_model(pos="nope", train_len=128), data)
    whole = (d / "run/ckpt.pt").read_bytes()
    (d / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (d / "result.json").write_text("{}")
    saved = torch.load(d / "run/ckpt.pt", weights_only=True)
    (d / "other/run-s1").mkdir(parents=True)
    torch.save(saved | {"step": 8, "config": saved["config"] | {"seed": 1}}, d / "other/run-s1/ckpt.pt")
    (d / "gpt2").mkdir()  # nanoGPT's layout
    np.full(5000, 200, dtype=np.uint16).tofile(d / "gpt2/val.bin")
    prepare.write(d / "large", BYTES, np.zeros(300, np.uint16), np.full(5000, 300, np.uint16), {"source": "too large"})
    shutil.copytree(d / "run", d / "taken")
    (d / "taken/eval.json").mkdir()
    return d


BAD = [  # arguments, and what the line must contain
    ("{d}/run --lengths=256,128", "its fixed strings take 253 tokens"),
    ("{d}/nope --lengths=256 --behind_text", "length 128 is too short"),
    ("{d}/run --lengths=256,300", "these lengths take 19201"),
    ("{d}/run --lengths=0", "--lengths 0"),
    ("{d}/run --lengths=256,long", "--lengths 256,long"),
    ("{d}/run --lengths=256,8192", "val.bin has 5700 tokens"),
    ("{d}/run --trials=0", "--trials must be from 1"),
    ("{d}/run --trials=1000000000000", "--trials must be from 1 to 90000"),
    ("{d}/run --batch_tokens=0", "--batch_tokens must be"),
    ("{d}/run --eval_tokens=-5", "--eval_tokens must be"),
    ("{d}/run --seed=-1", "--seed must be"),
    ("{d}/run --scaling=linear --scale=nan", "--scale must be"),
    ("{d}/run --scaling=ntk", "ntk"),
    ("{d}/nope --lengths=256 --scaling=yarn", "use it with rope or fope"),
    ("{d}/run --length=256", "--length"),
    ("{d}/run --lengths=256 --device=abacus", "abacus"),
    ("", "checkpoints"),
    ("{d}/nothing", "there is no checkpoint"),
    ("{d}/cut.pt", "cut.pt is not a whole checkpoint"),
    ("{d}/result.json", "plot.py"),
    ("{d}/run --lengths=256 --data={d}/gpt2", "gpt2 has gpt2 tokens"),
    ("{d}/run --lengths=256 --data={d}/large", "token 300, outside the vocabulary"),
    ("{d}/run --lengths=256 --data={d}/nothing", "val.bin"),
    ("{d}/run {d}/run --lengths=256", "same name and seed 0"),
    ("{d}/run {d}/copy/run --lengths=256", "same name and seed 0"),
    ("{d}/run {d}/other/run-s1 --lengths=256", "step 7 and 8"),
    ("{d}/run --lengths=256 --out={d}/cut.pt", "cut.pt"),
    ("{d}/taken --lengths=256", "eval.json"),
]


@pytest.mark.parametrize("argv, words", BAD)
def test_bad_input_gets_one_line_before_any_measurement(capsys, monkeypatch, bad, argv, words):
    monkeypatch.setattr(eval_passkey, "measure", None)
    before = sorted(bad.rglob("*"))
    assert words in refused(capsys, *argv.format(d=bad).split())
    assert sorted(bad.rglob("*")) == before
