"""eval_passkey.py, and the passkey documents of data/prepare.py that it asks about."""

import contextlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import eval_passkey
from data import prepare
from data.passkey import passkey_document
from data.tokenizer import END, get_tokenizer
from model import GPT
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
EAGER = contextlib.nullcontext, lambda share: None  # no autocast, no progress line

# The benchmark's own strings, typed again.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INFORMATION = "The pass key is 31415. Remember it. 31415 is the pass key."
QUESTION = "What is the pass key? The pass key is 31415"

BYTES = get_tokenizer("bytes")


def bpe_tokenizer(*words):
    """GPT-2's pattern and 256 bytes, with the merges that make each of the words one token."""
    pieces = [bytes([b]) for b in range(256)]
    for word in words:
        pieces += [word[:n].encode() for n in range(2, len(word) + 1) if word[:n].encode() not in pieces]
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    return tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


TOKENIZERS = {
    "bytes": BYTES,
    "bpe": bpe_tokenizer(" grass", " key", "The", " The", " pass", " sky", " 31", "41", " is", " important", "There", " There"),
    "bpe, a word costs less after a space": bpe_tokenizer(" The", " Here", " There", " grass"),
}


def make_model(train_len=256, **changes):
    return GPT(TrainConfig(n_layer=1, n_head=2, n_embd=32, n_hidden=64, vocab_size=257, train_len=train_len, **changes)).eval()


def save(folder, model, data, tokenizer="bytes"):
    folder.mkdir(parents=True)
    saved = {"step": 7, "config": asdict(model.cfg) | {"data": str(data)}, "tokenizer": tokenizer}
    torch.save(saved | {"model": model.state_dict(), "optimizer": {}}, folder / "ckpt.pt")
    return folder


def evaluate(*argv):
    eval_passkey.main([*map(str, argv), "--device=cpu", "--dtype=float32"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, text = tmp_path_factory.mktemp("data") / "text", np.random.default_rng(0).integers(97, 123, 6000).astype(np.uint16)
    prepare.write(folder, BYTES, text[:300], text[300:], {"source": "letters"})
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The document


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_document_has_exactly_the_length(tokenizer, depth):
    for length in [*range(256, 300, 7), 511, 512, 513, 1000, 1001, 4096, 8192]:
        tokens, n_answer = passkey_document(TOKENIZERS[tokenizer], length, 31415, depth)
        assert len(tokens) == length
        assert TOKENIZERS[tokenizer].decode(tokens[-n_answer:]) == " 31415"


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_document_is_the_benchmark_verbatim(tokenizer):
    tokens, _ = passkey_document(TOKENIZERS[tokenizer], 700, 31415, 0.4)
    text = TOKENIZERS[tokenizer].decode(tokens)
    task, before, information, after, question = text.split("\n")
    assert (task, information, question) == (TASK, INFORMATION, QUESTION)
    filler = " ".join([FILLER] * 100)
    assert before and filler.startswith(before)
    assert after and after in filler
    assert text.count("31415") == 3
    assert set(TOKENIZERS[tokenizer].encode_ordinary(INFORMATION)) <= set(tokens)


def test_fixed_strings_take_253_bytes():
    tokens, n_answer = passkey_document(BYTES, 253, 31415, 0.5)
    assert BYTES.decode(tokens) == "\n".join([TASK, "", INFORMATION, "", QUESTION])
    assert n_answer == 6
    with pytest.raises(ValueError, match="253"):
        passkey_document(BYTES, 252, 31415, 0.5)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_depth_is_the_share_of_filler_before_the_information(depth):
    tokens, _ = passkey_document(BYTES, 1253, 31415, depth)
    _, before, _, after, _ = BYTES.decode(tokens).split("\n")
    assert (len(before), len(after)) == (1000 * depth, 1000 - 1000 * depth)


def test_trials_have_uniform_depths_and_five_digit_keys_under_a_fixed_seed():
    documents, answers, depths = eval_passkey.passkey_trials(BYTES, 512, 400, seed=0)
    assert documents.shape == (400, 512) and set(answers) == {6} and len(depths) == 400
    assert np.histogram(depths, bins=4, range=(0, 1))[0] == pytest.approx([100] * 4, abs=35)
    texts = [BYTES.decode(document.tolist()) for document in documents]
    keys = [int(text[-5:]) for text in texts]
    assert min(keys) >= 10_000 and max(keys) <= 99_999 and len(set(keys)) > 390
    for text, key, depth in zip(texts, keys, depths):
        assert text.count(str(key)) == 3
        assert len(text.split("\n")[1]) == pytest.approx(depth * 259, abs=1)
    again, _, _ = eval_passkey.passkey_trials(BYTES, 512, 400, seed=0)
    other, _, _ = eval_passkey.passkey_trials(BYTES, 512, 400, seed=1)
    assert (again == documents).all() and (other != documents).any(1).all()


# ---------------------------------------------------------------------------------------------------------------------
# One forward pass a trial


def greedy_right(model, documents, answers):
    """What the forward pass stands for: the answer generated token by token from the prompt before it."""
    right = []
    for document, n in zip(torch.from_numpy(documents.astype(np.int64)), answers.tolist()):
        right.append(torch.equal(model.generate(document[None, :-n], n)[0], document))
    return np.array(right)


def test_one_forward_pass_decides_as_greedy_decoding_does():
    """Prompts that a model continued itself; in half of them one token of its answer is changed, any of them."""
    rng, model = np.random.default_rng(0), make_model(train_len=64, init_std=0.3)
    documents, answers, changed = np.empty((60, 40), dtype=np.uint16), rng.integers(2, 7, 60), rng.random(60) < 0.5
    for i, n in enumerate(answers):
        documents[i] = model.generate(torch.from_numpy(rng.integers(0, 257, (1, 40 - n))), int(n))[0]
        if changed[i]:
            place = 39 - i % n
            documents[i, place] = (documents[i, place] + 1 + rng.integers(256)) % 257
    right = eval_passkey.passkey_right(model, documents, answers, 400, *EAGER)
    assert 12 <= right.sum() <= 48
    assert (right == ~changed).all()
    assert (right == greedy_right(model, documents, answers)).all()
    assert (right == eval_passkey.passkey_right(model, documents, answers, 1, *EAGER)).all()  # a trial at a time
    assert (right == eval_passkey.passkey_right(model, documents, answers, 10**6, *EAGER)).all()  # all at once


@pytest.fixture(scope="module")
def half_right(data, tmp_path_factory):
    """A checkpoint that knows 20 passkey documents by heart, half of them with one wrong digit in the answer."""
    documents, answers, _ = eval_passkey.passkey_trials(BYTES, 256, 20, seed=0)
    learned = torch.from_numpy(documents.astype(np.int64))
    for i in range(10):
        place = 255 - i % 5
        learned[i, place] = ord("0") + (learned[i, place] - ord("0") + 1) % 10
    model = make_model(init_std=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model(learned[:, :-1], last=6).flatten(0, 1), learned[:, -6:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = save(tmp_path_factory.mktemp("half") / "toy-fope-s0", model.eval(), data)
    return folder, model, documents, answers


def test_trained_model_counted_in_one_pass_as_by_greedy_decoding(half_right, data):
    folder, model, documents, answers = half_right
    right = eval_passkey.passkey_right(model, documents, answers, 16_384, *EAGER)
    assert 4 <= right.sum() <= 16
    assert (right == greedy_right(model, documents, answers)).all()
    evaluate(folder, "--lengths=256", "--trials=20")
    result = json.loads((folder / "eval.json").read_text())
    assert result["passkey"] == [right.sum()]
    _, _, depths = eval_passkey.passkey_trials(BYTES, 256, 20, seed=0)
    for tenth, (n_right, n) in enumerate(result["by_depth"][0]):
        here = (depths >= tenth / 10) & (depths < (tenth + 1) / 10)
        assert (n_right, n) == (right[here].sum(), here.sum())


@pytest.mark.parametrize(
    "right, trials, low, high",
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_against_published_values(right, trials, low, high):
    """The last two: Newcombe 1998, table I."""
    assert eval_passkey.wilson(right, trials) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("right, trials", [(0, 1), (1, 7), (50, 100), (999, 1000)])
def test_wilson_bounds_are_where_the_normal_test_rejects(right, trials):
    for bound in eval_passkey.wilson(right, trials):
        assert abs(right / trials - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / trials), abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity


@pytest.mark.parametrize("length", [16, 48, 192])
@pytest.mark.parametrize("pos", ["fope", "alibi"])
def test_perplexity_against_a_plain_loop(pos, length):
    model = make_model(train_len=64, init_std=0.2, pos=pos)
    tokens = np.random.default_rng(1).integers(0, 257, 193)
    losses = []
    for i in range(0, 192, length):
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens[None, i : i + length]))[0].double().numpy()
        for t in range(length):
            shifted = logits[t] - logits[t].max()
            losses.append(math.log(np.exp(shifted).sum()) - shifted[tokens[i + t + 1]])
    assert len(losses) == 192
    expected = math.exp(sum(losses) / 192)
    for batch_tokens in (1, 100, 10**6):
        measured = eval_passkey.perplexity(model, tokens.astype(np.uint16), length, batch_tokens, *EAGER)
        assert measured == pytest.approx(expected, rel=1e-5)


def test_model_without_attention_has_one_perplexity_at_every_length():
    model, tokens = make_model(train_len=64, init_std=0.2), np.random.default_rng(1).integers(0, 257, 1025).astype(np.uint16)
    with_attention = [eval_passkey.perplexity(model, tokens, length, 4096, *EAGER) for length in (8, 64, 1024)]
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)
    without = [eval_passkey.perplexity(model, tokens, length, 4096, *EAGER) for length in (1, 8, 64, 1024)]
    assert without == pytest.approx([without[0]] * 4, rel=1e-6)
    assert max(with_attention) > 1.001 * min(with_attention)  # or the line above would say nothing


# ---------------------------------------------------------------------------------------------------------------------
# The command: table, eval.json, figure


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Two seeds of one model and a model of another kind."""
    out = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        save(out / f"toy-fope-s{seed}", make_model(seed=seed), data)
    save(out / "toy-rope-s0", make_model(pos="rope"), data)
    return out


def row(table, name):
    return next([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith(f"| {name} "))


def test_several_checkpoints_make_one_table_and_one_figure(runs, data, tmp_path, capsys):
    evaluate(*sorted(runs.glob("*/")), "--lengths=256,512", "--trials=3")
    printed, table = capsys.readouterr().out, (runs / "eval.md").read_text()
    assert table in printed
    assert str(runs / "eval.md") in printed and str(runs / "eval.png") in printed
    results = {path.parent.name: json.loads(path.read_text()) for path in runs.glob("*/eval.json")}
    assert sorted(results) == ["toy-fope-s0", "toy-fope-s1", "toy-rope-s0"]
    for name, result in results.items():
        assert result["name"] == name and result["lengths"] == [256, 512] and result["trials"] == 3
        assert (result["train_len"], result["step"], result["seed"], result["data"]) == (256, 7, 0, "letters")
        assert result["config"]["pos"] in name and (result["dtype"], result["torch"]) == ("float32", torch.__version__)
        assert result["eval_tokens"] == 5699 // 512 * 512
        assert all(0 <= right <= 3 for right in result["passkey"])
        assert [np.sum(tenths, axis=0).tolist() for tenths in result["by_depth"]] == [[right, 3] for right in result["passkey"]]
        assert all(200 < x < 350 for x in result["perplexity"])  # about 257: an untrained model guesses
    assert "256 | 512" in table.splitlines()[0]
    seeds = [results[f"toy-fope-s{seed}"]["perplexity"] for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    for cell, values in zip(row(table, "toy-fope: perplexity")[2:], zip(*seeds)):
        assert cell == f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"
    assert row(table, "toy-fope: perplexity")[1] == "2" and row(table, "toy-rope: perplexity")[1] == "1"

    evaluate(*sorted(runs.glob("*/eval.json")), f"--out={tmp_path / 'again'}")  # no checkpoint is opened
    assert (tmp_path / "again" / "eval.md").read_text() == table
    assert (tmp_path / "again" / "eval.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = matplotlib.image.imread(runs / "eval.png")
    assert picture.shape[0] > 200 and picture.shape[1] > 500 and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100


def test_one_checkpoint_is_evaluated_at_multiples_of_its_training_length(runs, data, tmp_path):
    folder = shutil.copytree(runs / "toy-rope-s0", tmp_path / "toy-rope-s0")
    evaluate(folder / "ckpt.pt", "--trials=1")
    result = json.loads((folder / "eval.json").read_text())
    assert result["lengths"] == [256, 512, 1024, 2048, 4096] and result["name"] == "toy-rope-s0"
    assert result["eval_tokens"] == 4096
    evaluate(folder, "--trials=1", "--lengths=256", "--eval_tokens=1000", f"--out={tmp_path / 'elsewhere'}")
    result = json.loads((folder / "eval.json").read_text())
    assert result["eval_tokens"] == 768
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["eval.md", "eval.png"]


def test_batch_tokens_changes_nothing(half_right, data):
    results = []
    for batch_tokens in (1, 1000, 100_000):
        evaluate(half_right[0], "--lengths=256,512", "--trials=20", f"--batch_tokens={batch_tokens}")
        results.append(json.loads((half_right[0] / "eval.json").read_text()))
    assert 4 <= results[0]["passkey"][0] <= 16
    for result in results[1:]:
        assert (result["passkey"], result["by_depth"]) == (results[0]["passkey"], results[0]["by_depth"])
        assert result["perplexity"] == pytest.approx(results[0]["perplexity"], rel=1e-5)


def test_behind_text_the_prompt_has_the_training_length(runs, data, tmp_path):
    text = np.arange(100, 400) % 256
    documents, answers, depths = eval_passkey.passkey_trials(BYTES, 600, 5, 0, text)
    for document, depth in zip(documents, depths):
        key = int(BYTES.decode(document[-5:].tolist()))
        assert document[:300].tolist() == text.tolist()
        assert document[300:].tolist() == passkey_document(BYTES, 300, key, depth)[0]
    assert set(answers) == {6}
    folder = shutil.copytree(runs / "toy-rope-s0", tmp_path / "toy-rope-s0", ignore=shutil.ignore_patterns("eval*"))
    evaluate(folder, "--trials=1", "--lengths=256,512", "--behind_text")
    assert sorted(path.name for path in folder.glob("eval*")) == [f"eval-behind-text.{kind}" for kind in ("json", "md", "png")]
    assert json.loads((folder / "eval-behind-text.json").read_text())["behind_text"] is True


def test_other_data_is_measured_beside_the_checkpoints_own(half_right, tmp_path):
    """As the paper trains on books and tests on C4: against losses of single chunks, in a file of its own."""
    folder, model, _, _ = half_right
    before = sorted(path.name for path in folder.iterdir())
    other = np.frombuffer(b"Another text than that of before, over and over. " * 100, dtype=np.uint8).astype(np.uint16)
    prepare.write(tmp_path / "other", BYTES, other[:300], other, {"source": "another"})
    evaluate(folder, "--lengths=256,768", "--trials=2", f"--data={tmp_path / 'other'}")
    new = [f"eval-on-other.{kind}" for kind in ("json", "md", "png")]
    assert sorted(path.name for path in folder.iterdir()) == sorted(before + new)
    result = json.loads((folder / "eval-on-other.json").read_text())

    def by_chunk(tokens, length):
        n = (len(tokens) - 1) // 768 * 768
        chunks = torch.from_numpy(np.stack([tokens[i : i + length + 1] for i in range(0, n, length)]).astype(np.int64))
        return math.exp(np.mean([model(chunk[None, :-1], chunk[None, 1:])[1].item() for chunk in chunks]))

    own = np.fromfile(Path(torch.load(folder / "ckpt.pt", weights_only=True)["config"]["data"]) / "val.bin", dtype=np.uint16)
    expected = [by_chunk(other, length) for length in (256, 768)]
    assert result["perplexity"] == pytest.approx(expected, rel=1e-4)
    ratios = [ppl / by_chunk(own, length) for ppl, length in zip(expected, (256, 768))]
    assert result["perplexity_ratio"] == pytest.approx(ratios, rel=1e-3)
    assert row((folder / "eval-on-other.md").read_text(), "toy-fope-on-other: ratio to perplexity on own data")[2:] == [f"{r:.2f}" for r in ratios]


def result_of(name, passkey, perplexity, trials=10, train_len=512):
    return {"name": name, "lengths": [512, 1024], "passkey": passkey, "perplexity": perplexity, "trials": trials, "train_len": train_len}


RESULTS = [
    result_of("small-fope-s0", [2, 0], [2.0, 3.0]),
    result_of("small-fope-s1", [4, 1], [4.0, 3.5]),
    result_of("small-fope-s12", [9, 2], [6.0, 4.0]),
    result_of("small-rope-s3", [5, 0], [7.25, 8.0]),
]


def test_table_has_mean_and_range_of_seeds_and_wilson_for_one():
    table = eval_passkey.table(RESULTS)
    assert row(table, "small-fope: perplexity")[1:] == ["3", "4.00 (2.00-6.00)", "3.50 (3.00-4.00)"]
    assert row(table, "small-fope: passkey")[1:] == ["3", "0.50 (0.20-0.90)", "0.10 (0.00-0.20)"]
    assert row(table, "small-rope: perplexity")[1:] == ["1", "7.25", "8.00"]
    assert row(table, "small-rope: passkey")[1:] == ["1", "0.50 [0.24, 0.76]", "0.00 [0.00, 0.28]"]
    assert len(table.splitlines()) == 6


def test_figure_shows_means_ranges_and_the_training_length(monkeypatch, tmp_path):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    eval_passkey.figure(RESULTS, tmp_path / "eval.png")
    accuracy, perplexity = plt.gcf().axes
    for axis, expected in ((accuracy, {"fope": [0.5, 0.1], "rope": [0.5, 0]}), (perplexity, {"fope": [4, 3.5], "rope": [7.25, 8]})):
        curves = {line.get_label(): line for line in axis.lines if "small" in line.get_label()}
        assert [sorted(name for name in curves if pos in name) for pos in expected] == [[name] for name in sorted(curves)]
        for name, curve in curves.items():
            assert curve.get_xdata().tolist() == [512, 1024]
            assert curve.get_ydata().tolist() == pytest.approx(expected["fope" if "fope" in name else "rope"])
        assert [set(line.get_xdata()) for line in axis.lines if line not in curves.values()] == [{512}]
        band = axis.collections[0].get_paths()[0].vertices
        low, high = ((0.2, 0.9), (2, 6))[axis is perplexity]
        assert band[band[:, 0] == 512, 1].min() == pytest.approx(low) and band[band[:, 0] == 512, 1].max() == pytest.approx(high)
    assert perplexity.get_legend() is not None
    monkeypatch.undo()
    plt.close("all")


def test_figure_against_what_is_varied(monkeypatch, tmp_path):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    eval_passkey.figure(RESULTS, tmp_path / "eval.png", xlabel="size", varied={"small-rope": 1, "small-fope": 0.5})
    expected = ({1: (0.5, 0), 0.5: (0.5, 0.1)}, {1: (7.25, 8), 0.5: (4, 3.5)})  # value: at 512, at 1024
    for axis, at in zip(plt.gcf().axes, expected):
        assert axis.get_xlabel() == "size" and [line.get_label() for line in axis.lines] == ["length 512", "length 1024"]
        for i, line in enumerate(axis.lines):
            assert dict(zip(line.get_xdata(), line.get_ydata())) == pytest.approx({value: both[i] for value, both in at.items()})
    monkeypatch.undo()
    plt.close("all")


def test_without_matplotlib_there_is_a_table_and_no_word_of_a_figure_written(monkeypatch, tmp_path, capsys):
    for i, result in enumerate(RESULTS):
        (tmp_path / f"{i}.json").write_text(json.dumps(result))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluate(*sorted(tmp_path.glob("*.json")))
    printed = capsys.readouterr().out
    assert "matplotlib is not installed" in printed and "small-rope: passkey" in printed
    assert (tmp_path / "eval.md").exists() and not (tmp_path / "eval.png").exists()
    assert "eval.png" not in printed


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line on stderr, status 2, nothing written


@pytest.fixture(scope="module")
def bad(data, tmp_path_factory):
    """{d}/NAME in the cases below."""
    d = tmp_path_factory.mktemp("bad")
    save(d / "run", make_model(), data)
    whole = (d / "run" / "ckpt.pt").read_bytes()
    for name, content in (("cut.pt", whole[: len(whole) // 2]), ("text.pt", b"not a checkpoint\n"), ("empty.pt", b"")):
        (d / name).write_bytes(content)
    save(d / "misfit", make_model(), data)
    saved = torch.load(d / "misfit" / "ckpt.pt", weights_only=True)
    torch.save(saved | {"config": saved["config"] | {"n_embd": 64}}, d / "misfit" / "ckpt.pt")
    (d / "gpt2").mkdir()  # nanoGPT's layout
    np.full(5000, 200, dtype=np.uint16).tofile(d / "gpt2" / "val.bin")
    prepare.write(d / "large", BYTES, np.zeros(300, np.uint16), np.full(5000, 300, np.uint16), {"source": "too large"})
    (d / "one.json").write_text(json.dumps(RESULTS[0]))
    (d / "other.json").write_text(json.dumps(RESULTS[1] | {"lengths": [512, 2048]}))
    (d / "cut.json").write_text(json.dumps(RESULTS[0])[:-20])
    (d / "foreign.json").write_text('{"tokenizer": "bytes"}')
    (d / "list.json").write_text("[1, 2]")
    return d


BAD = {  # arguments, and what the line must contain
    "length too short": ("{d}/run --lengths=256,128", "its fixed strings take 253 tokens"),
    "lengths with no common chunk": ("{d}/run --lengths=256,300", "fewer than the 19201"),
    "length zero": ("{d}/run --lengths=0", "length"),
    "length no number": ("{d}/run --lengths=256,long", "long"),
    "half a checkpoint": ("{d}/cut.pt", "cut.pt is not a whole checkpoint"),
    "a text file": ("{d}/text.pt", "text.pt is not a whole checkpoint"),
    "an empty file": ("{d}/empty.pt", "empty.pt is not a whole checkpoint"),
    "no checkpoint": ("{d}/nothing", "there is no checkpoint"),
    "weights of another shape": ("{d}/misfit --lengths=256", "do not fit"),
    "val.bin too short": ("{d}/run --lengths=256,8192", "val.bin has 5700 tokens, fewer than the 8193"),
    "other tokenizer": ("{d}/run --lengths=256 --data={d}/gpt2", "gpt2 has gpt2 tokens"),
    "token outside": ("{d}/run --lengths=256 --data={d}/large", "token 300, outside the vocabulary"),
    "no data": ("{d}/run --lengths=256 --data={d}/nothing", "val.bin"),
    "no trials": ("{d}/run --trials=0", "--trials must be at least 1"),
    "trials no number": ("{d}/run --trials=many", "many"),
    "negative seed": ("{d}/run --lengths=256 --seed=-1", "negative"),
    "unknown flag": ("{d}/run --length=256", "--length"),
    "unknown device": ("{d}/run --lengths=256 --device=abacus", "abacus"),
    "nothing to evaluate": ("", "checkpoints"),
    "mixed lengths": ("{d}/one.json {d}/other.json", "--lengths"),
    "half an eval.json": ("{d}/one.json {d}/cut.json", "cut.json"),
    "no eval.json": ("{d}/nothing.json", "nothing.json"),
    "another program's JSON": ("{d}/foreign.json", "foreign.json"),
    "a list": ("{d}/list.json", "list.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(capsys, bad, name):
    before = sorted(bad.rglob("*"))
    argv, expected = BAD[name]
    with pytest.raises(SystemExit) as end:
        eval_passkey.main(argv.format(d=bad).split() + ([] if "--device" in argv else ["--device=cpu"]))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert end.value.code == 2
    assert len(lines) == 1 and expected in lines[0]
    assert sorted(bad.rglob("*")) == before


def test_bad_input_of_the_real_command(bad):
    command = [sys.executable, ROOT / "eval_passkey.py", bad / "cut.pt"]
    end = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert end.returncode == 2 and end.stdout == ""
    assert len(end.stderr.splitlines()) == 1 and end.stderr.startswith("eval_passkey.py: ") and "cut.pt" in end.stderr
