"""eval_passkey.py: one forward pass per passkey trial, perplexity in chunks, and the records that keep them."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from conftest import make_data, make_run

import eval_passkey
import plot
from baselines import yarn
from data.passkey import passkey_document
from data.tokenizer import get_tokenizer
from fope import rope_frequencies
from model import GPT, scale_frequencies
from train import TrainConfig

FLOAT32 = contextlib.nullcontext  # no autocast
BYTES = get_tokenizer("bytes")
SHAPE = dict(n_layer=1, n_head=2, n_embd=32, n_hidden=64, vocab_size=257)
MEASURED = ("right", "right_by_depth", "perplexity")


def make_model(train_len=256, **changes):
    return GPT(TrainConfig(**SHAPE | dict(train_len=train_len) | changes)).eval()


def evaluate(*argv):
    eval_passkey.main([*map(str, argv), "--device=cpu", "--dtype=float32"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    text = np.random.default_rng(0).integers(97, 123, 6000)
    return make_data(tmp_path_factory.mktemp("data") / "text", text[:300], text[300:])


@pytest.fixture
def run(data, tmp_path):
    make_run(tmp_path / "toy-s0", make_model(pos="rope"), step=7, data=data)
    return tmp_path / "toy-s0"


@pytest.fixture
def seen(monkeypatch):
    """The (model, documents) of each measurement. Every trial is right and every perplexity 2."""
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


def test_each_seed_and_each_length_has_keys_and_depths_of_its_own():
    first, again, *others = (
        eval_passkey.passkey_trials(BYTES, length, 40, seed)
        for length, seed in ((300, 0), (300, 0), (300, 1), (400, 0))
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    for documents, _, depths in others:
        assert not np.array_equal(first[0][:, -5:], documents[:, -5:]) and not np.array_equal(first[2], depths)


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
# Records


def test_a_record_holds_the_configuration_the_conditions_and_what_was_measured(run, data, tmp_path, capsys):
    evaluate(run / "ckpt.pt", "--lengths=512,256", "--trials=3", "--eval_tokens=700", f"--out={tmp_path / 'new'}")
    first, second = plot.read(run / "eval.jsonl")
    facts = dict(
        run="toy-s0", n_embd=32, seed=0, pos="rope", step=7, trials=3, eval_tokens=512, train_eval_tokens=65_536
    )
    facts |= dict(data=str(data), train_data=str(data), source="a test", logn=0.0, scaling="none", behind_text=False)
    facts |= dict(dtype="float32", train_dtype="auto", device="cpu", threads=torch.get_num_threads(), key_seed=0)
    for record, length in ((first, 256), (second, 512)):
        assert record | facts == record and (record["length"], record["torch"]) == (length, torch.__version__)
        assert 200 < record["perplexity"] < 350  # about 257: an untrained model guesses
        assert not any(isinstance(value, (dict, list)) for name, value in record.items() if name != "right_by_depth")
    out, error = capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["eval.md", "eval.png"]
    assert (tmp_path / "new/eval.md").read_text() == plot.table([first, second]) + "\n"
    assert plot.table([first, second]) in out and error == ""  # no progress bar where stderr is not a terminal


def test_without_a_flag_the_lengths_are_n_to_16_n(run, seen):
    evaluate(run, "--trials=1")
    assert [record["length"] for record in plot.read(run / "eval.jsonl")] == [256, 512, 1024, 2048, 4096]


def test_right_trials_are_counted_in_each_tenth_of_depth(run, monkeypatch):
    depths = eval_passkey.passkey_trials(BYTES, 256, 50, seed=0)[2]
    monkeypatch.setattr(eval_passkey, "passkey_right", lambda *_: depths < 0.3)
    evaluate(run, "--trials=50", "--lengths=256")
    (record,) = plot.read(run / "eval.jsonl")
    count = np.histogram(depths, bins=10, range=(0, 1))[0].tolist()
    assert record["right_by_depth"] == [[n, n] for n in count[:3]] + [[0, n] for n in count[3:]]
    assert record["right"] == sum(count[:3]) > 5


def test_behind_text_the_prompt_has_the_training_length(run, data, seen):
    evaluate(run, "--trials=1", "--lengths=256,512", "--behind_text")
    val = np.fromfile(data / "val.bin", dtype=np.uint16)
    for (_, (document,)), before in zip(seen, (0, 256)):
        assert document[:before].tolist() == val[:before].tolist()
        assert BYTES.decode(document[before:].tolist()).startswith("There is an important info")
    assert all(record["behind_text"] for record in plot.read(run / "eval.jsonl"))


def test_log_n_is_measured_once_up_to_n_and_from_the_checkpoint_if_no_flag_says_more(data, tmp_path):
    model = make_model(pos="fope", logn=2.0)
    torch.nn.init.normal_(model.blocks[0].attention.qkv.weight)  # so that attention matters
    make_run(tmp_path / "a", model, data=data)
    options = ["--trials=2", "--lengths=256,512", "--eval_tokens=2048"]
    evaluate(tmp_path / "a", "--logn=2,0", *options)
    short, short2, long, long2 = records = plot.read(tmp_path / "a/eval.jsonl")
    assert [(r["length"], r["logn"], r["train_logn"]) for r in records] == [
        (n, p, 2) for n in (256, 512) for p in (0, 2)
    ]
    assert all(short[name] == short2[name] for name in MEASURED) and long["perplexity"] != long2["perplexity"]
    evaluate(tmp_path / "a", *options)
    assert [pick(r) for r in plot.read(tmp_path / "a/eval.jsonl")[4:]] == [pick(short2), pick(long2)]


def test_with_skip_lost_each_p_is_measured_up_to_the_first_length_without_a_key(run, monkeypatch):
    found = {(256, 0): 3, (512, 0): 0, (512, 2): 2, (1024, 2): 0}  # the keys at a length and p: no others are measured
    trials = np.arange(4)
    monkeypatch.setattr(eval_passkey, "passkey_right", lambda m, x, *_: trials < found[x.shape[1], m.logn])
    options = ["--trials=4", "--lengths=256,512,1024,2048", "--logn=0,2", "--eval_tokens=0"]
    evaluate(run, *options, "--skip_lost")
    measured = [(r["length"], r["logn"], r["right"]) for r in plot.read(run / "eval.jsonl")]
    expected = [(256, 0, 3), (256, 2, 3), (512, 0, 0), (512, 2, 2), (1024, 0, None), (1024, 2, 0)]
    assert measured == expected + [(2048, 0, None), (2048, 2, None)]
    with pytest.raises(KeyError):  # without the flag, they are
        evaluate(run, *options)


def test_keys_alone_need_no_data(run, data):
    make_run(run, make_model(pos="rope"), data="a folder that is not there")
    evaluate(run, "--trials=1", "--lengths=256", "--eval_tokens=0")
    evaluate((run / "ckpt.pt").rename(run / "other.pt"), "--trials=1", "--lengths=256", "--eval_tokens=0")
    for record, name in zip(plot.read(run / "eval.jsonl"), ("toy-s0", "other")):
        assert record["right"] in (0, 1) and "perplexity" not in record and record["run"] == name


def pick(record):
    return [record[name] for name in (*MEASURED, "logn", "length")]


def test_eval_tokens_that_the_lengths_raise_are_named(run, capsys, seen):
    evaluate(run, "--trials=1", "--lengths=256,384", "--eval_tokens=300")
    assert "--eval_tokens is raised from 300 to 768" in capsys.readouterr().out
    assert {record["eval_tokens"] for record in plot.read(run / "eval.jsonl")} == {768}


def test_a_record_is_a_row_of_a_table():
    """As pandas.read_json(.., lines=True) reads it: every line of the committed records has the same fields."""
    lines = (plot.Path(plot.__file__).parent / "paper/results/tiny/eval.jsonl").read_text().splitlines()
    assert len({tuple(json.loads(line)) for line in lines}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The order of --scaling


@pytest.mark.parametrize("pos", ["rope", "fope"])
def test_frequencies_are_scaled_first_and_clipped_then_as_in_training(run, data, tmp_path, seen, pos):
    """Of 16 frequencies, YaRN at 2N slows one below the floor of N: 7 are kept. Clipped first, 8 would be."""
    scaled = dict(scaling="yarn", scale=2.0, original_len=512)
    trained, other = make_model(512, n_embd=64, pos=pos), make_model(512, n_embd=64, pos=pos, **scaled)
    before = trained.blocks[0].attention.position
    make_run(tmp_path / "a", trained, data=data)
    evaluate(tmp_path / "a", "--trials=1", "--lengths=512", "--scaling=yarn", "--scale=2")
    ((model, _),), (record,) = seen, plot.read(tmp_path / "a/eval.jsonl")
    now, expected = (
        model.blocks[0].attention.position,
        yarn(rope_frequencies(32, 1e4), 2.0, 512, head_dim=32, theta=1e4),
    )
    kept = expected if pos == "rope" else expected[expected >= 2 * math.pi / 512]
    torch.testing.assert_close(now.omega, kept)
    torch.testing.assert_close(now.omega, other.blocks[0].attention.position.omega)
    if pos == "fope":
        M = len(kept)
        assert (len(before.omega), M) == (8, 7) and torch.equal(now.coef, before.coef[..., :M, :M])
    assert record | scaled | dict(train_scaling="none") == record


@pytest.mark.parametrize("scaling", ["none", "linear", "llama3"])
def test_a_model_scaled_by_one_or_not_at_all_is_the_trained_one(scaling):
    model, tokens = make_model(64, scaling="none"), torch.arange(100)[None]
    expected = model(tokens)
    if scaling != "none":
        scale_frequencies(model, scaling, 1.0)
    torch.testing.assert_close(model(tokens), expected)


# ---------------------------------------------------------------------------------------------------------------------
# What was measured is not lost


def test_a_killed_evaluation_is_made_anew_and_half_a_line_spoils_nothing(run, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(model, documents, *_):
        if documents.shape[1] == 1024:
            raise Killed
        return np.arange(len(documents)) < documents.shape[1] / 512

    options = ["--trials=2", "--lengths=256,512,1024"]
    monkeypatch.setattr(eval_passkey, "passkey_right", killed)
    with pytest.raises(Killed):
        evaluate(run, *options)
    file = run / "eval.jsonl"
    assert [record["length"] for record in plot.read(file)] == [256, 512]
    file.write_bytes(file.read_bytes()[:-20])  # the disk was full
    monkeypatch.undo()
    evaluate(run, *options)
    assert [record["length"] for record in plot.read(file)] == [256, 256, 512, 1024]
    once = file.with_name("once.jsonl")
    once.write_text("".join(file.read_text().splitlines(keepends=True)[-3:]))
    assert plot.table(plot.read(file)) == plot.table(plot.read(once))


def test_a_record_that_cannot_be_written_is_printed(run, capsys, seen):
    (run / "eval.jsonl").mkdir()
    with pytest.raises(SystemExit) as end:
        evaluate(run, "--trials=1")
    out, error = capsys.readouterr()
    assert end.value.code == 2 and "eval.jsonl could not be written" in error and "perplexity 2.00" in out


def test_a_bug_in_a_figure_costs_no_measurement_and_is_seen(run, monkeypatch, capsys, seen):
    monkeypatch.setattr(plot, "figure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(run, "--trials=1")
    assert len(plot.read(run / "eval.jsonl")) == 5 and "ZeroDivisionError" in capsys.readouterr().err


def test_committed_records_are_drawn_if_their_runs_differ_in_embedding_and_seed_alone(run, seen, monkeypatch):
    evaluate(run, "--trials=1")
    first, *_ = plot.read(run / "eval.jsonl")
    others = [first | change for change in (dict(pos="alibi", seed=3, source="other"), dict(trials=9), dict(lr=9.0))]
    drawn, options = [], eval_passkey.Options(trials=1, device="cpu", dtype="float32")
    monkeypatch.setattr(plot, "save", lambda path, draw, records, *_: not drawn.append(records))
    eval_passkey.evaluate([run], options, committed=others)
    for records in drawn:
        assert [record["pos"] for record in records if record.get("committed")] == ["alibi"]
