"""The pages: every command is valid, every link leads somewhere, the numbers are those of the committed results."""

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

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": 1800,
    "paper/README.md": 3620,
    "data/README.md": 1200,
    "hf/README.md": 1050,
}  # and their words at most


def blocks(page, language=""):
    every = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [block for kind, block in every if kind == language]


def commands():
    text = "".join(block.replace("\\\n", " ") for page in PAGES for block in blocks(page))
    lines = [line.split("  #")[0] for line in text.splitlines()]
    return sorted({part for line in lines for part in line.split(" && ") if re.match(r"python|torchrun|pip", part)})


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
        known = subprocess.run([sys.executable, ROOT / words[1], "--help"], capture_output=True, text=True).stdout
        assert all(word.split("=")[0] in known for word in words[2:] if word.startswith("--"))


def test_fope_can_be_pasted_as_the_front_page_shows():
    (block,) = blocks("README.md", "python")
    q, k = torch.randn(1, 32, 5, 128), torch.randn(1, 8, 5, 128)
    names = dict(q=q, k=k, layer=0, offset=7)
    exec(block, names)
    assert names["q"].shape == q.shape and not torch.equal(names["q"], q)


def test_longbench_scores_are_grouped_by_length(tmp_path, monkeypatch, capsys):
    (block,) = blocks("hf/README.md", "python")
    (tmp_path / "out/table1-fope-scores/model").mkdir(parents=True)
    samples = [{"doc": {"length": n}, "score": x} for n, x in ((100, 0.25), (3999, 0.75), (4000, 0.1), (9000, 0.2))]
    file = tmp_path / "out/table1-fope-scores/model/samples_longbench_trec_e_now.jsonl"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert capsys.readouterr().out.endswith("{'0-4k': 0.5, '4-8k': 0.1, '8k+': 0.2}\n")


@pytest.mark.parametrize("page, words", PAGES.items())
def test_pages_are_short_and_their_links_lead_somewhere(page, words):
    text = (ROOT / page).read_text()
    assert len(text.split()) <= words
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
    assert not re.search(r"^ *[>+] ", text, re.MULTILINE)  # a line of a paragraph would become a quotation or a list
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link


def test_the_verdicts_have_the_numbers_of_the_committed_tables():
    """A row names its experiment. Means with a range are unmistakable."""
    rows = re.findall(r"^\|[^|]+\| (\w+) \|(.+)$", (ROOT / "paper/README.md").read_text(), re.MULTILINE)
    checked = 0
    for experiment, text in rows:
        file = ROOT / f"paper/results/tiny-d32/{experiment}.md"
        for number in re.findall(r"[\d.]+ \([\d.]+-[\d.]+\)", text):
            assert number in file.read_text(), f"{number} is not in {file}"
            checked += 1
    assert checked > 60


def test_pandas_reads_records_as_the_page_shows(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pandas")
    (block,) = blocks("paper/README.md", "python")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tiny-fope-s0").symlink_to(ROOT / "paper/results/tiny-d32/cpu")
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert "8192      0.0      5.4030" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# The numbers that a page cites are those of the committed records


def measured(folder, metric="right", seeds=(0, 1, 2, 3), logn=0, **fields):
    """A metric of the records with these fields, (seeds, lengths)."""
    fields |= {"logn": logn}
    found = [r for r in plot.read(ROOT / f"paper/results/tiny-d32/{folder}/eval.jsonl") if fields.items() <= r.items()]
    found = {(r["seed"], r["length"]): r for r in found}
    lengths = sorted({length for _, length in found})
    assert len(found) == len(seeds) * len(lengths) > 0
    return np.array([plot.values_of([found[seed, length] for length in lengths], metric) for seed in seeds])


def cells(values):
    return [f"{x.mean():.2f} ({x.min():.2f}-{x.max():.2f})" for x in values.T]


def page(name="paper/README.md"):
    return " ".join((ROOT / name).read_text().split())  # a sentence may be broken anywhere


def test_at_n_the_four_embeddings_find_399_or_400_of_400_keys():
    for run in ("rope", "fope", "alibi", "kerple"):
        assert set(measured("trials400", run=run, trials=400, length=512).flat) <= {399 / 400, 1.0}


LOGN = ("", 0), (", logn 2", 2)  # what a label adds


@pytest.mark.parametrize("label, logn", LOGN)
def test_the_front_page_shows_what_train_py_printed(label, logn):
    for metric in ("perplexity", "right"):
        (values,) = measured("cpu", metric, seeds=[0], logn=logn)
        row = f"| fope{label}: {plot.METRICS[metric][0]} | 1 | {' | '.join(f'{x:.2f}' for x in values)} |"
        assert row in page("README.md")


def test_the_front_page_compares_what_the_records_hold():
    names = (
        "passkey; perplexity at N",
        "passkey at 2N, 4N",
        "passkey prompt after N/2 ordinary bytes",
        "passkey; perplexity at 16N",
    )
    columns = []
    for run, logn in (("rope", 0), ("fope", 0), ("fope", 2), ("alibi", 0), ("kerple", 0)):
        n, n2, n4, _, n16 = measured("", run=run, logn=logn).mean(0)
        behind = measured("behind_text", run=run, logn=logn).mean(0)[2]
        first, *_, last = measured("", "perplexity", run=run, logn=logn).mean(0)
        columns.append([f"{n:.2f}; {first:.2f}", f"{n2:.2f}, {n4:.2f}", f"{behind:.2f}", f"{n16:.2f}; {last:.2f}"])
    for name, *row in zip(names, *columns):
        assert f"| {name} | {' | '.join(row)} |" in page("README.md")


PROBE = {"ALiBi": "alibi", "KERPLE": "kerple", "FoPE": "fope", "RoPE": "rope"}


@pytest.mark.parametrize("label", [*PROBE, "FoPE, `--logn=2`", "RoPE, `--logn=2`"])
def test_the_probe_behind_text_has_the_numbers_of_the_records(label):
    name, comma, _ = label.partition(",")
    values = measured("behind_text", run=PROBE[name], logn=2 * len(comma), behind_text=True)
    assert f"| {label} | {' | '.join(cells(values))} |" in page()


def test_the_powers_of_log_n_have_the_numbers_of_the_records():
    powers = [measured("powers", seeds=[0], logn=p)[0] for p in (0.5, 1, 1.5)]
    powers += [measured("", run="fope", logn=2)[0, 2:4], measured("powers", seeds=[0], logn=3)[0]]
    at_4n, at_8n = (", ".join(f"{x:.2f}" for x in values) for values in zip(*powers))
    assert f"is {at_4n} (seed 0). At 8N, it is {at_8n}." in page()


def test_scaling_at_test_time_has_the_numbers_of_the_records():
    before, after = (cells(measured(name, "perplexity", run="rope"))[1] for name in ("", "yarn2"))
    right = measured("yarn2", run="rope", scaling="yarn", scale=2.0, train_scaling="none")[:, 1]
    assert (right.mean(), right.min(), right.max()) == pytest.approx((0.19, 0.08, 0.32), abs=0.00501)
    assert f"from {before} to {after}. Its passkey accuracy rises from 0.00 to 0.19 (0.08-0.32)." in page()


def test_seed_and_rounding_have_the_numbers_of_the_records():
    h100, cpu = measured("", run="fope")[0, 1], measured("cpu", seeds=[0])[0, 1]
    assert f"Seed 0 has {h100:.2f} on the H100, {cpu:.2f} [on a CPU]" in page()
    h100, cpu = measured("", run="fope", logn=2)[0, 2], measured("cpu", seeds=[0], logn=2)[0, 2]
    assert f"but {h100:.2f}, {cpu:.2f} and 0.32 at 4N" in page()


@pytest.mark.parametrize("label, pos", [("FoPE", "fope"), ("RoPE", "rope"), ("KERPLE", "kerple")])
def test_the_shares_of_attention_are_the_measured_ones(label, pos):
    runs = json.loads((ROOT / "paper/results/tiny-d32/attention.json").read_text()).values()
    columns = []
    for run in (run for run in runs if run["pos"] == pos):
        head = np.unravel_index(np.argmax(run["rows"][0]["share"]), np.shape(run["rows"][0]["share"]))
        share = {(row["length"] // 512, row["p"]): row["share"][head[0]][head[1]] for row in run["rows"]}
        columns.append([share[key] for key in ((1, 0), (2, 0), (4, 0), (16, 0), (16, 2))])
    row = [f"{min(values):.2f}-{max(values):.2f}" for values in zip(*columns)]
    assert len(columns) == 4 and f"| {label} | {' | '.join(row)} |" in page()


def test_the_losses_of_smollm2_are_the_measured_ones():
    results = json.loads((ROOT / "paper/results/loss_by_position.json").read_text())
    for run in ("smol", "smol-swap", "smol-fope", "smol-rope"):
        quarters = torch.tensor(results[run]["loss"]).view(4, 4).mean(1).tolist()
        assert f" | {' | '.join(f'{x:.2f}' for x in quarters)} |\n" in (ROOT / "hf/README.md").read_text()
