"""eval_passkey.py: one forward pass per passkey trial, perplexity in chunks, and the command around them."""

import contextlib
import math
import os
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

import eval_passkey
import plot
from baselines import yarn
from data import prepare
from data.passkey import passkey_document
from data.tokenizer import get_tokenizer
from fope import rope_frequencies
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
    assert end.value.code == 2 and error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "text"
    text = np.random.default_rng(0).integers(97, 123, 6000).astype(np.uint16)
    prepare.write(folder, BYTES, text[:300], text[300:], {"source": "letters"})
    return folder


@pytest.fixture
def run(data, tmp_path):
    return save(tmp_path / "toy-rope-s0", make_model(pos="rope"), data)


@pytest.fixture
def measured(monkeypatch):
    """The (model, documents) of each length. Instead of a measurement, every trial is right and every perplexity 2."""
    seen = []

    def passkey_right(model, documents, *_):
        seen.append((model, documents))
        return np.ones(len(documents), dtype=bool)

    monkeypatch.setattr(eval_passkey, "passkey_right", passkey_right)
    monkeypatch.setattr(eval_passkey, "perplexity", lambda *_: 2.0)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# The two measurements


def test_trials_hide_five_digit_keys_at_uniform_depths_behind_the_text():
    text = list(range(100))
    documents, answers, depths = eval_passkey.passkey_trials(BYTES, 400, 400, seed=0, text=text)
    keys = [int(BYTES.decode(document[-5:].tolist())) for document in documents]
    for document, answer, key, depth in zip(documents, answers, keys, depths):
        prompt, n = passkey_document(BYTES, 300, key, depth)
        assert document.tolist() == text + prompt and answer == n
    assert min(keys) >= 10_000 and len(set(keys)) > 390
    assert np.histogram(depths, bins=4, range=(0, 1))[0] == pytest.approx([100] * 4, abs=35)


@pytest.mark.parametrize("length, seed, same", [(300, 0, True), (300, 1, False), (400, 0, False)])
def test_each_seed_and_each_length_has_keys_and_depths_of_its_own(length, seed, same):
    first, _, first_depths = eval_passkey.passkey_trials(BYTES, 300, 40, seed=0)
    other, _, other_depths = eval_passkey.passkey_trials(BYTES, length, 40, seed)
    assert np.array_equal(first_depths, other_depths) == same
    assert np.array_equal(first[:, -5:], other[:, -5:]) == same


def test_one_forward_pass_decides_as_greedy_decoding_does():
    """The prompts end in the model's own greedy answers. In about half of these, one token is changed, any of them."""
    rng, model = np.random.default_rng(0), make_model(train_len=64, init_std=0.3)
    documents, answers, changed = np.empty((60, 40), np.uint16), rng.integers(1, 7, 60), rng.random(60) < 0.5
    for i, n in enumerate(answers):
        documents[i] = model.generate(torch.from_numpy(rng.integers(0, 257, (1, 40 - n))), int(n))[0]
        if changed[i]:
            place = 39 - i % n
            documents[i, place] = (documents[i, place] + 1 + rng.integers(256)) % 257
    for batch_tokens in (1, 7 * 40):
        right = eval_passkey.passkey_right(model, documents, answers, batch_tokens, FLOAT32)
        assert right.tolist() == (~changed).tolist()


@pytest.mark.parametrize("pos, length, batch_tokens", [("fope", 16, 80), ("alibi", 48, 1), ("fope", 192, 10**6)])
def test_perplexity_is_that_of_a_plain_loop_in_float64(pos, length, batch_tokens):
    model, losses = make_model(train_len=64, init_std=0.2, pos=pos), []
    tokens = np.random.default_rng(1).integers(0, 257, 193)
    for i in range(0, 192, length):
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens[None, i : i + length]))[0].double().numpy()
        for t in range(length):
            losses.append(math.log(np.exp(logits[t]).sum()) - logits[t, tokens[i + t + 1]])
    measured = eval_passkey.perplexity(model, tokens.astype(np.uint16), length, batch_tokens, FLOAT32)
    assert measured == pytest.approx(math.exp(sum(losses) / 192), rel=1e-5)


def test_a_loss_too_large_for_exp_is_a_perplexity_of_inf():
    model, tokens = make_model(), np.random.default_rng(1).integers(0, 257, 65).astype(np.uint16)
    torch.nn.init.normal_(model.head.weight, std=1e4)
    assert eval_passkey.perplexity(model, tokens, 64, 4096, FLOAT32) == math.inf


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_several_checkpoints_make_one_table_and_one_figure(data, tmp_path, capsys):
    names = ["toy-fope-s0", "toy-fope-s1"]
    folders = [save(tmp_path / name, make_model(seed=seed), data) for seed, name in enumerate(names)]
    evaluate(*folders, "--lengths=512,256", "--trials=3")
    out, error = capsys.readouterr()
    results = [plot.read_result(folder / "eval.json") for folder in folders]
    assert [result["name"] for result in results] == names
    assert (tmp_path / "eval.md").read_text() == plot.table(results) + "\n"
    assert plot.table(results) in out and f"written: {tmp_path}/eval.md, {tmp_path}/eval.png" in out
    assert (tmp_path / "eval.png").exists()
    assert error == ""  # no progress bar where stderr is no terminal
    facts = {"lengths": [256, 512], "trials": 3, "eval_tokens": 5699 // 512 * 512, "train_len": 256, "step": 7}
    facts |= {"data": "letters", "dtype": "float32", "torch": torch.__version__}
    for result in results:
        assert result | facts == result
        assert all(200 < x < 350 for x in result["perplexity"])  # about 257: an untrained model guesses


def test_lengths_default_to_multiples_of_the_first_models_training_length(run, data, tmp_path, measured):
    other = save(tmp_path / "other-rope-s0", make_model(train_len=64), data)
    evaluate(run / "ckpt.pt", other, "--trials=1", f"--out={tmp_path / 'new/folder'}")
    for folder in (run, other):
        assert plot.read_result(folder / "eval.json")["lengths"] == [256, 512, 1024, 2048, 4096]
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == ["eval.md", "eval.png"]


def test_file_and_run_are_named_after_what_the_evaluation_changes(run, data, measured):
    evaluate(run, "--trials=1", f"--data={data}", "--behind_text", "--scaling=yarn", "--scale=2.5")
    stem = "eval-on-text-behind-text-yarn2.5"
    assert sorted(path.name for path in run.glob("eval*")) == [f"{stem}.json", f"{stem}.md", f"{stem}.png"]
    assert (
        plot.read_result(run / f"{stem}.json")["name"] == "toy-rope-on-text-behind-text-yarn2.5-s0"
    )  # the seed stays last


def test_right_trials_are_counted_at_each_length_and_in_each_tenth_of_depth(run, monkeypatch):
    depths = {length: eval_passkey.passkey_trials(BYTES, length, 50, seed=0)[2] for length in (256, 512)}
    monkeypatch.setattr(eval_passkey, "passkey_right", lambda model, documents, *_: depths[documents.shape[1]] < 0.3)
    evaluate(run, "--trials=50", "--lengths=256,512")
    result = plot.read_result(run / "eval.json")
    for length, right, by_depth in zip((256, 512), result["passkey"], result["by_depth"]):
        count = np.histogram(depths[length], bins=10, range=(0, 1))[0].tolist()
        assert by_depth == [[n, n] for n in count[:3]] + [[0, n] for n in count[3:]]
        assert right == sum(count[:3]) > 5


def test_behind_text_the_prompt_has_the_training_length(run, data, measured):
    evaluate(run, "--trials=1", "--lengths=256,512", "--behind_text")
    val = np.fromfile(data / "val.bin", dtype=np.uint16)
    for (_, (document,)), before in zip(measured, (0, 256)):
        assert document[:before].tolist() == val[:before].tolist()
        assert BYTES.decode(document[before:].tolist()).startswith("There is an important info")


SCALED = {  # position interpolation, and YaRN from the model's training length (its original_len is 512)
    "linear": lambda omega: omega / 4,
    "yarn": lambda omega: yarn(omega, 4.0, 64, head_dim=16, theta=1e4),
}


@pytest.mark.parametrize("scaling", SCALED)
def test_scaling_changes_the_frequencies_of_the_model_that_is_measured(data, tmp_path, measured, scaling):
    run = save(tmp_path / "toy-rope-s0", make_model(pos="rope", train_len=64), data)
    evaluate(run, "--trials=1", "--lengths=256", f"--scaling={scaling}", "--scale=4")
    ((model, _),) = measured
    expected = SCALED[scaling](rope_frequencies(16, 1e4))
    torch.testing.assert_close(model.blocks[0].attention.position.omega, expected)


def test_log_n_is_measured_beside_the_plain_model_and_only_beyond_n(data, tmp_path):
    model = make_model(pos="fope", train_len=256)
    torch.nn.init.normal_(model.blocks[0].attention.qkv.weight)  # so that attention matters
    run = save(tmp_path / "toy-fope-s0", model, data)
    options = ["--trials=2", "--lengths=256,512", "--eval_tokens=2048"]
    evaluate(run, "--logn=0,2", *options)
    plain, sharp = (plot.read_result(run / f"{stem}.json") for stem in ("eval", "eval-logn2"))
    assert (plain["name"], sharp["name"], plain["logn"], sharp["logn"]) == ("toy-fope-s0", "toy-fope-logn2-s0", 0, 2)
    assert plain["perplexity"][0] == sharp["perplexity"][0] and plain["perplexity"][1] != sharp["perplexity"][1]
    model.cfg.logn = 2.0
    other = save(tmp_path / "other-s0", model, data)
    evaluate(other, *options)  # p comes from the checkpoint
    measured = ("perplexity", "passkey", "by_depth", "logn")
    again = plot.read_result(other / "eval-logn2.json")
    assert [again[name] for name in measured] == [sharp[name] for name in measured]


def test_other_data_is_compared_with_the_checkpoints_own(run, data, tmp_path):
    """As the paper trains on books and tests on C4."""
    other = np.frombuffer(b"Another text than that of before, over and over. " * 100, dtype=np.uint8).astype(np.uint16)
    prepare.write(tmp_path / "other", BYTES, other[:300], other, {"source": "another"})
    evaluate(run, "--lengths=256,768", "--trials=1", "--eval_tokens=2000", f"--data={tmp_path / 'other'}")
    result = plot.read_result(run / "eval-on-other.json")

    def perplexities(tokens):
        model, whole = make_model(pos="rope"), tokens[: 2 * 768 + 1]  # fills chunks of either length
        return np.array([eval_passkey.perplexity(model, whole, length, 4096, FLOAT32) for length in (256, 768)])

    own = np.fromfile(data / "val.bin", dtype=np.uint16)
    assert result["data"] == "another"
    assert result["perplexity"] == pytest.approx(perplexities(other), rel=1e-4)
    assert result["perplexity_ratio"] == pytest.approx(perplexities(other) / perplexities(own), rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# What was measured is not lost

LARGE = ["--trials=2", "--lengths=256,512", "--eval_tokens=2048"]


def test_only_a_larger_evaluation_replaces_a_result(run, capsys, measured):
    evaluate(run, *LARGE)
    before = (run / "eval.json").read_bytes()
    line = refused(capsys, run, "--trials=1", "--lengths=512,1024", "--eval_tokens=1024")
    assert "holds a larger evaluation: use --trials=2 --eval_tokens=2048 --lengths=256,512,1024, or move" in line
    assert (run / "eval.json").read_bytes() == before
    evaluate(run, *LARGE, "--trials=3", "--lengths=256,512,1024")
    assert plot.read_result(run / "eval.json")["trials"] == 3


def test_results_are_printed_even_if_they_cannot_be_written(run, capsys, monkeypatch, measured):
    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(eval_passkey, "replace_file", full)
    with pytest.raises(SystemExit) as end:
        evaluate(run, *LARGE)
    out, error = capsys.readouterr()
    assert end.value.code == 2 and "eval.json could not be written" in error
    assert "| toy-rope: passkey | 1 |" in out


def test_results_are_written_even_if_they_cannot_be_printed(run, monkeypatch, measured):
    with open(os.devnull) as closed:  # print() raises OSError, as for a closed pipe
        monkeypatch.setattr(sys, "stdout", closed)
        evaluate(run, *LARGE)
    assert plot.read_result(run / "eval.json")["passkey"] == [2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line on stderr, exit status 2, found before any measurement


@pytest.fixture(scope="module")
def bad(data, tmp_path_factory):
    """{d}/NAME in the cases below."""
    d = tmp_path_factory.mktemp("bad")
    save(d / "run", make_model(), data)
    save(d / "nope", make_model(pos="nope", train_len=128), data)
    save(d / "yarn", make_model(scaling="yarn"), data)
    whole = (d / "run/ckpt.pt").read_bytes()
    (d / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (d / "result.json").write_text("{}")
    other = (
        '{"trials": 1, "train_len": 256, "lengths": [512], "passkey": [0], "perplexity": [2], "config": {"seed": 0}}'
    )
    (d / "other.json").write_text(other)
    (d / "gpt2").mkdir()  # nanoGPT's layout
    np.full(5000, 200, dtype=np.uint16).tofile(d / "gpt2/val.bin")
    prepare.write(d / "large", BYTES, np.zeros(300, np.uint16), np.full(5000, 300, np.uint16), {"source": "too large"})
    save(d / "taken", make_model(), data)
    (d / "taken/eval.json").mkdir()
    return d


BAD = [  # arguments, and what the line must contain
    ("{d}/run --lengths=256,128", "its fixed strings take 253 tokens"),
    ("{d}/nope --lengths=256 --behind_text", "length 128 is too short"),
    ("{d}/run --lengths=256,300", "these lengths take 19201"),
    ("{d}/run --lengths=0", "--lengths 0"),
    ("{d}/run --lengths=256,long", "--lengths 256,long"),
    ("{d}/run --trials=0", "--trials must be from 1"),
    ("{d}/run --trials=1000000000000", "--trials must be from 1 to 90000"),
    ("{d}/run --batch_tokens=0", "--batch_tokens must be"),
    ("{d}/run --eval_tokens=-5", "--eval_tokens must be"),
    ("{d}/run --seed=-1", "--seed must be"),
    ("{d}/run --logn=-1", "--logn -1"),
    ("{d}/run --logn=0,inf", "--logn 0,inf"),
    ("{d}/run --scaling=linear --scale=nan", "--scale must be"),
    ("{d}/nope --lengths=256 --scaling=yarn", "use it with rope or fope"),
    ("{d}/yarn --lengths=256 --scaling=linear", "leave --scaling out"),
    ("{d}/run --length=256", "--length"),
    ("{d}/run --lengths=256 --device=abacus", "abacus"),
    ("{d}/nothing", "there is no checkpoint"),
    ("{d}/cut.pt", "cut.pt is not a whole checkpoint"),
    ("{d}/result.json", "plot.py"),
    ("{d}/run --lengths=256 --data={d}/gpt2", "gpt2 has gpt2 tokens"),
    ("{d}/run --lengths=256 --data={d}/large", "token 300, outside the vocabulary"),
    ("{d}/run --lengths=256 --data={d}/nothing", "val.bin"),
    ("{d}/run {d}/run --lengths=256", "same name and seed 0"),
    ("{d}/run --lengths=256 --out={d}/cut.pt", "cut.pt"),
    ("{d}/run --lengths=256 --reference {d}/result.json", "not a whole result"),
    ("{d}/run --lengths=256 --reference {d}/other.json", "other.json has other lengths than"),
    ("{d}/taken --lengths=256", "eval.json"),
]


@pytest.mark.parametrize("argv, words", BAD)
def test_bad_input_gets_one_line_before_any_measurement(capsys, monkeypatch, bad, argv, words):
    monkeypatch.setattr(eval_passkey, "measure", None)
    before = sorted(bad.rglob("*"))
    assert words in refused(capsys, *argv.format(d=bad).split())
    assert sorted(bad.rglob("*")) == before
