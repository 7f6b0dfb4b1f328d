"""The pages: every command is valid, every link leads somewhere, the numbers are those of the committed results."""

import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import eval_passkey
import plot
import train
from fope import FoPE, RoPE, rotate

ROOT = Path(__file__).resolve().parent.parent
WORDS = (1800, 4660, 600, 1200, 1050)  # at most, of each page
PAGES = dict(zip(("README.md", "paper/README.md", "paper/guarantees.md", "data/README.md", "hf/README.md"), WORDS))


def blocks(page, language=""):
    every = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [block for kind, block in every if kind == language]


def commands():
    text = "".join(block.replace("\\\n", " ") for page in PAGES for block in blocks(page))
    lines = [line.split("  #")[0] for line in text.splitlines()]
    return sorted({part for line in lines for part in line.split(" && ") if re.match(r"python|torchrun|pip", part)})


@functools.cache
def help_of(script):
    return subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_pages_are_valid(command):
    words = shlex.split(command)
    if words[0] == "pip":
        assert all((ROOT / word).is_file() for word in words if word.endswith(".txt"))
    elif "train.py" in words:
        words = [word.replace("--pos=yours", "--pos=fope") for word in words]
        train.configure(train.parse_flags(words[words.index("train.py") + 1 :]))
    elif words[1] == "eval_passkey.py":
        with mock.patch("eval_passkey.evaluate") as evaluate:
            eval_passkey.main(words[2:])
        evaluate.assert_called_once()
    elif words[1] == "-m":
        assert words[2] == "pytest" or (words[2] == "hf.convert" and words[3] in ("from", "to") and len(words) == 6)
    else:
        assert (ROOT / words[1]).is_file()
        assert all(word.split("=")[0] in help_of(words[1]) for word in words[2:] if word.startswith("--"))


def test_fope_can_be_pasted_as_the_front_page_shows():
    (block,) = blocks("README.md", "python")
    q, k = torch.randn(1, 32, 5, 128), torch.randn(1, 8, 5, 128)
    names = dict(q=q, k=k, layer=0, offset=7)
    exec(block, names)
    assert names["q"].shape == q.shape and not torch.equal(names["q"], q)


@pytest.mark.parametrize("page, words", PAGES.items())
def test_pages_are_short_and_their_links_lead_somewhere(page, words):
    text = (ROOT / page).read_text()
    assert len(text.split()) <= words
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert not re.search(r"^ *[>+] ", prose, re.MULTILINE)  # a line of a paragraph would become a quotation or a list
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link


def test_the_verdicts_have_the_numbers_of_the_committed_tables():
    """A row names its experiment. Means with a range are unmistakable."""
    rows = re.findall(r"^\|[^|]+\| (d32 )?(\w+) \|(.+)$", (ROOT / "paper/README.md").read_text(), re.MULTILINE)
    checked = 0
    for older, experiment, text in rows:
        file = ROOT / f"paper/results/tiny{'-d32' * bool(older)}/{experiment}.md"
        for number in re.findall(r"[\d.]+ \([\d.]+-[\d.]+\)", text):
            assert number in file.read_text(), f"{number} is not in {file}"
            checked += 1
    assert checked > 60


# ----------------------------------------------------------------------------------------------------------------------
# The numbers that a page cites are those of the committed records


def measured(folder, metric="right", logn=0, **fields):
    """A metric of the records with these fields, (seeds, lengths)."""
    fields |= {"logn": logn}
    found = [r for r in plot.read(ROOT / f"paper/results/{folder}/eval.jsonl") if fields.items() <= r.items()]
    found = {(r["seed"], r["length"]): r for r in found}
    lengths = sorted({length for _, length in found})
    seeds = sorted({seed for seed, _ in found})
    assert len(found) == len(seeds) * len(lengths) > 0
    return np.array([plot.values_of([found[seed, length] for length in lengths], metric) for seed in seeds])


def cells(values):
    return [f"{x.mean():.2f} ({x.min():.2f}-{x.max():.2f})" for x in values.T]


def page(name="paper/README.md"):
    return " ".join((ROOT / name).read_text().split())  # a sentence may be broken anywhere


@pytest.mark.parametrize("changed", ["rope", "fope"])
def test_what_fope_adds_to_rope_is_what_the_front_page_says(changed):
    """Without its lines that start with +, the block on the front page is RoPE. With them, it is FoPE."""
    (block,) = blocks("README.md", "diff")
    lines = [line[2:] for line in block.splitlines() if changed == "fope" or not line.startswith("+")]
    position, x, d, N = FoPE(n_head=1, head_dim=64, train_len=512, seed=0), torch.randn(2, 1, 1, 9, 64), 64, 512
    M, (a, b) = len(position.omega), position.coef[:, 0].double()
    names = dict(torch=torch, F=torch.nn.functional, theta=1e4, d=d, N=N, M=M, a=a, b=b, q=x[0], k=x[1], rotate=rotate)
    exec("\n".join(lines), names | dict(t=torch.arange(9, dtype=torch.float64)), got := {})
    expected = (position if changed == "fope" else RoPE(head_dim=64))(*x)
    for ours, theirs in zip((got["q"], got["k"]), expected):
        torch.testing.assert_close(ours.float(), theirs, atol=1e-5, rtol=0)


def test_means_with_a_range_on_the_front_page_are_in_a_committed_table():
    tables = "".join(file.read_text() for file in sorted((ROOT / "paper/results").glob("tiny*/*.md")))
    cited = re.findall(r"[\d.]+ \([\d.]+-[\d.]+", page("README.md"))
    assert cited and [number for number in cited if f"{number})" not in tables] == []


SINGLE = {"search": "heads4-hidden256-s0 heads2-hidden512-s1 heads2-hidden256-s0 heads2-hidden256-s10"}
SINGLE |= {"rounding": "f32-s0 f32-s1 f32-s2 again-s0 avx2-s0", "first_run": "tiny-fope-s0"}


@pytest.mark.parametrize("folder, run", [(folder, run) for folder in SINGLE for run in SINGLE[folder].split()])
def test_rows_of_single_runs_have_the_numbers_of_the_records(folder, run):
    right, perplexity = (measured(folder, metric, run=run, logn=2)[0] for metric in ("right", "perplexity"))
    p2, without = [f"{x:.2f}" for x in right], f"{measured(folder, run=run, length=1024)[0, 0]:.2f}"
    cells = [", ".join(p2), without] if folder == "search" else [without, ", ".join(p2[1:])]
    assert f"| {' | '.join(cells)} | {perplexity[0]:.2f}, {perplexity[4]:.2f} |" in page()


def test_the_front_page_shows_what_train_py_printed():
    table = plot.table(plot.read(ROOT / "paper/results/first_run/eval.jsonl"))
    assert re.sub(r" \[[^]]*\]", "", table) in (ROOT / "README.md").read_text()


def test_the_front_page_compares_what_the_records_hold():
    columns = []
    for run, logn in (("rope", 0), ("rope", 2), ("fope", 0), ("fope", 2), ("alibi", 0), ("kerple", 0)):
        right, perplexity = (measured("tiny", metric, run=run, logn=logn).mean(0) for metric in ("right", "perplexity"))
        columns.append([*(f"{x:.2f}" for x in right[1:]), *(f"{x:.2f}" for x in perplexity[[0, 4]])])
    names = [f"passkey at {n}" for n in ("2N", "4N", "8N", "16N")] + [f"perplexity at {n}" for n in ("N", "16N")]
    for name, *row in zip(names, *columns):
        assert f"| {name} | {' | '.join(row)} |" in page("README.md")


@pytest.mark.parametrize("run, logn", [("fope", 0), ("fope", 2), ("rope", 0), ("alibi", 0), ("kerple", 0)])
def test_the_probe_behind_text_has_the_numbers_of_the_records(run, logn):
    *_, at_768, at_1024 = cells(measured("tiny-d32/behind_text", run=run, logn=logn, behind_text=True))
    if (run, logn) == ("fope", 0):
        assert f"finds {at_768} of the keys at 1.5N and {at_1024} at 2N" in page()
    else:
        assert at_1024 == ("0.00 (0.00-0.00)" if run == "rope" else "1.00 (1.00-1.00)")


def test_scaling_at_test_time_has_the_numbers_of_the_records():
    before, after = (cells(measured(name, "perplexity", run="rope"))[1] for name in ("tiny-d32", "tiny-d32/yarn2"))
    right = measured("tiny-d32/yarn2", run="rope", scaling="yarn", scale=2.0, train_scaling="none")[:, 1]
    assert (right.mean(), right.min(), right.max()) == pytest.approx((0.19, 0.08, 0.32), abs=0.00501)
    fope = cells(measured("tiny-d32", "perplexity", run="fope", data="data/builtin"))[1]
    rose = "Its passkey accuracy rose from 0.00 to 0.19 (0.08-0.32)."
    assert f"from {before} to {after}, near FoPE's {fope}. {rose}" in page()


# The exponents of log n in the three layers
LAYERS = {"none": [0, 0, 0], "p = 1 in all layers": [1, 1, 1], "p = 2 in all layers": [2, 2, 2]}
LAYERS |= {"p = 2 in all but the last": [2, 2, 0], "p = 2 in the last alone": [0, 0, 2]}


def fope_rows(length, p):
    """The measured row of each FoPE model, and the head that reads the key at N."""
    for run in json.loads((ROOT / "paper/results/attention.json").read_text()).values():
        if run["pos"] == "fope":
            shares = np.array(run["rows"][0]["share"])
            (row,) = (row for row in run["rows"] if row["length"] == length and row["p"] == p)
            yield row, np.unravel_index(shares.argmax(), shares.shape)


@pytest.mark.parametrize("label", LAYERS)
def test_what_log_n_does_in_which_layers_is_what_was_measured(label):
    found = [
        (row["right"], row["share"][layer][head], row["lead"][layer][head])
        for row, (layer, head) in fope_rows(2048, LAYERS[label])
    ]
    right, share, lead = zip(*found)
    *both, _ = cells(np.array([right, share, lead]).T)
    lead = f"{np.mean(lead):.1f} ({min(lead):.1f}-{max(lead):.1f})"
    assert len(found) == 4 and f"| {label} | {' | '.join(both)} | {lead} |" in page()


def test_the_first_layers_attention_on_the_latest_tokens_is_the_measured_one():
    near = []
    for length, p in ((512, 0.0), (8192, 0.0), (8192, 1.0), (8192, 2.0)):
        near.append([np.mean(row["near"][0]) for row, _ in fope_rows(length, [p] * 3)])
    at_n, p0, p1, p2 = cells(np.array(near).T)
    assert f"They put {at_n} of their attention on the 16 latest tokens at N." in page()
    assert f"falls to {p0} without log n and to {p1} with p = 1. With p = 2, it is {p2}." in page()


def test_the_losses_of_smollm2_are_the_measured_ones():
    results = json.loads((ROOT / "paper/results/loss_by_position.json").read_text())
    for run in ("smol", "smol-swap", "smol-fope", "smol-rope"):
        quarters = torch.tensor(results[run]["loss"]).view(4, 4).mean(1).tolist()
        assert f" | {' | '.join(f'{x:.2f}' for x in quarters)} |\n" in (ROOT / "hf/README.md").read_text()
