"""eval_passkey.py: one forward pass per passkey trial, perplexity in chunks, and the records that keep them."""

import contextlib
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
from model import GPT
from train import TrainConfig

FLOAT32 = contextlib.nullcontext  # no autocast
BYTES = get_tokenizer("bytes")


def make_model(**changes):
    shape = dict(n_layer=1, n_head=2, n_embd=32, n_hidden=64, vocab_size=257, train_len=256)
    return GPT(TrainConfig(**shape | changes)).eval()


def evaluate(*argv):
    """Runs the command on the folder that comes first. Returns the records in it."""
    eval_passkey.main([*map(str, argv), "--device=cpu", "--dtype=float32"])
    return plot.read(argv[0] / "eval.jsonl")


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


@pytest.mark.parametrize("pos, length, batch_tokens", [("fope", 16, 80), ("alibi", 48, 1)])
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


# ---------------------------------------------------------------------------------------------------------------------
# Records


def test_a_record_holds_the_configuration_the_conditions_and_what_was_measured(run, data, tmp_path, capsys):
    records = evaluate(run, "--lengths=512,256", "--trials=3", "--eval_tokens=300", f"--out={tmp_path / 'new'}")
    facts = dict(run="toy-s0", n_embd=32, seed=0, pos="rope", step=7, trials=3, key_seed=0, behind_text=False)
    facts |= dict(eval_tokens=512, train_eval_tokens=65_536)
    facts |= dict(data=str(data), train_data=str(data), source="a test", logn=0.0, scaling="none")
    facts |= dict(dtype="float32", train_dtype="auto", device="cpu", threads=torch.get_num_threads())
    for record, length in zip(records, (256, 512), strict=True):
        assert record | facts == record and (record["length"], record["torch"]) == (length, torch.__version__)
        assert 200 < record["perplexity"] < 350  # about 257: an untrained model guesses
    assert (tmp_path / "new/eval.md").read_text() == plot.table(records) + "\n"
    out, _ = capsys.readouterr()
    assert "raised from 300 to 512" in out and plot.table(records) in out


def test_right_trials_are_counted_in_each_tenth_of_depth(run, monkeypatch):
    depths = eval_passkey.passkey_trials(BYTES, 256, 50, seed=0)[2]
    monkeypatch.setattr(eval_passkey, "passkey_right", lambda *_: depths < 0.3)
    (record,) = evaluate(run, "--trials=50", "--lengths=256")
    count = np.histogram(depths, bins=10, range=(0, 1))[0].tolist()
    assert record["right_by_depth"] == [[n, n] for n in count[:3]] + [[0, n] for n in count[3:]]
    assert record["right"] == sum(count[:3]) > 5


def test_behind_text_the_prompt_has_the_training_length(run, data, seen):
    records = evaluate(run, "--trials=1", "--lengths=256,512", "--behind_text")
    val = np.fromfile(data / "val.bin", dtype=np.uint16)
    for (_, (document,)), record, before in zip(seen, records, (0, 256), strict=True):
        assert document[:before].tolist() == val[:before].tolist() and record["behind_text"]
        assert BYTES.decode(document[before:].tolist()).startswith("There is an important info")


def test_log_n_is_measured_beyond_n_and_is_the_checkpoints_if_no_flag_says_more(data, tmp_path):
    model = make_model(pos="fope", logn=2.0)
    torch.nn.init.normal_(model.blocks[0].attention.qkv.weight)  # so that attention matters
    make_run(tmp_path / "a", model, data=data)
    options = ["--trials=2", "--lengths=256,512", "--eval_tokens=2048"]
    short, short2, long, long2 = records = evaluate(tmp_path / "a", "--logn=2,0", *options)
    facts = [(r["length"], r["logn"], r["train_logn"]) for r in records]
    assert facts == [(length, p, 2) for length in (256, 512) for p in (0, 2)]
    assert short | dict(logn=2) == short2 and long["perplexity"] != long2["perplexity"]
    assert evaluate(tmp_path / "a", *options)[4:] == [short2, long2]


def test_with_skip_lost_each_p_is_measured_up_to_the_first_length_without_a_key(run, monkeypatch):
    found = {(256, 0): 3, (512, 0): 0, (512, 2): 2, (1024, 2): 1}  # the keys at a length and p: no others are measured
    trials = np.arange(4)
    monkeypatch.setattr(eval_passkey, "passkey_right", lambda m, x, *_: trials < found[x.shape[1], m.logn])
    options = ["--trials=4", "--lengths=256,512,1024", "--logn=0,2", "--eval_tokens=0"]
    measured = [(r["length"], r["logn"], r["right"]) for r in evaluate(run, *options, "--skip_lost")]
    assert measured == [(256, 0, 3), (256, 2, 3), (512, 0, 0), (512, 2, 2), (1024, 0, None), (1024, 2, 1)]
    with pytest.raises(KeyError):  # without the flag, they are
        evaluate(run, *options)


def test_frequencies_are_scaled_first_and_clipped_then_as_in_training(data, tmp_path, seen):
    """Of 16 frequencies, YaRN at 2N slows one below the floor of N: 7 are kept. Clipped first, 8 would be."""
    trained = make_model(train_len=512, n_embd=64, pos="fope")
    make_run(tmp_path / "a", trained, data=data)
    (record,) = evaluate(tmp_path / "a", "--trials=1", "--lengths=512", "--scaling=yarn", "--scale=2")
    before, now = (model.blocks[0].attention.position for model in (trained, seen[0][0]))
    expected = yarn(rope_frequencies(32, 1e4), 2.0, 512, head_dim=32, theta=1e4)
    torch.testing.assert_close(now.omega, expected[expected >= 2 * math.pi / 512])
    assert (len(before.omega), len(now.omega)) == (8, 7) and torch.equal(now.coef, before.coef[..., :7, :7])
    assert record | dict(scaling="yarn", scale=2.0, original_len=512, train_scaling="none") == record


# ---------------------------------------------------------------------------------------------------------------------
# What was measured is not lost


def test_records_of_an_evaluation_that_was_cut_off_stay_and_half_a_line_spoils_nothing(run, monkeypatch):
    file, options, found = run / "eval.jsonl", ["--trials=1", "--lengths=256,512,1024"], {256: [True], 512: [True]}
    with monkeypatch.context() as patch, pytest.raises(KeyError):  # at 1024
        patch.setattr(eval_passkey, "passkey_right", lambda model, x, *_: np.array(found[x.shape[1]]))
        evaluate(run, *options)
    assert [record["length"] for record in plot.read(file)] == [256, 512]
    file.write_bytes(file.read_bytes()[:-20])  # the disk was full
    assert [record["length"] for record in evaluate(run, *options)] == [256, 256, 512, 1024]


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
    first, *_ = evaluate(run, "--trials=1")
    others = [first | change for change in (dict(pos="alibi", seed=3, source="other"), dict(trials=9), dict(lr=9.0))]
    drawn, options = [], eval_passkey.Options(trials=1, device="cpu", dtype="float32")
    monkeypatch.setattr(plot, "save", lambda path, draw, records, *_: not drawn.append(records))
    eval_passkey.evaluate([run], options, committed=others)
    for records in drawn:
        assert [record["pos"] for record in records if record.get("committed")] == ["alibi"]
