"""The pages: every command is valid, every link leads somewhere, the numbers are those of the committed results."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_passkey
import train

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": 1800,
    "paper/README.md": 3500,
    "data/README.md": 1200,
    "hf/README.md": 850,
}  # and their words at most


def blocks(page, language=""):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


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
        train.configure(train.parse_flags(words[words.index("train.py") + 1 :]))
    elif words[1] == "eval_passkey.py":
        eval_passkey.parse(words[2:])
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
        file = ROOT / f"paper/results/tiny/{experiment}.md"
        for number in re.findall(r"[\d.]+ \([\d.]+-[\d.]+\)", text):
            assert number in file.read_text(), f"{number} is not in {file}"
            checked += 1
    assert checked > 60


def results(folder, run):
    """The results of the four seeds of a run."""
    # In the order of the seeds, as in the tables, so that both sums round alike.
    files = sorted((ROOT / "paper/results" / folder).glob(f"{run}-s[0-9].json"))
    found = [json.loads(file.read_text()) for file in files]
    assert len(found) == 4
    return found


def passkey(found):
    """The accuracy, (seeds, lengths)."""
    return np.array([[right / r["trials"] for right in r["passkey"]] for r in found])


def test_at_n_the_four_embeddings_find_399_or_400_of_400_keys():
    found = [r for run in ("rope", "fope", "alibi", "kerple") for r in results("trials400", run)]
    assert {(*r["passkey"], r["trials"], *r["lengths"]) for r in found} == {(399, 400, 512), (400, 400, 512)}


def test_the_front_page_shows_what_train_py_printed():
    page = (ROOT / "README.md").read_text()
    for run in ("fope", "fope-logn2"):
        result = json.loads((ROOT / f"paper/results/cpu/{run}-s0.json").read_text())
        for name, values in (("perplexity", result["perplexity"]), ("passkey", passkey([result])[0])):
            assert f"| tiny-{run}: {name} | 1 | {' | '.join(f'{x:.2f}' for x in values)} |\n" in page


def test_the_front_page_compares_what_the_results_hold():
    names = (
        "passkey; perplexity at N",
        "passkey at 2N, 4N",
        "passkey prompt after N/2 ordinary bytes",
        "passkey; perplexity at 16N",
    )
    columns = []
    for run in ("rope", "fope", "fope-logn2", "alibi", "kerple"):
        found = results("tiny", run)
        n, n2, n4, _, n16 = passkey(found).mean(0)
        behind = passkey(results("behind_text", run)).mean(0)[2]
        first, *_, last = np.mean([r["perplexity"] for r in found], axis=0)
        columns.append([f"{n:.2f}; {first:.2f}", f"{n2:.2f}, {n4:.2f}", f"{behind:.2f}", f"{n16:.2f}; {last:.2f}"])
    page = (ROOT / "README.md").read_text()
    for name, *row in zip(names, *columns):
        assert f"| {name} | {' | '.join(row)} |\n" in page


def test_the_probe_behind_text_has_the_numbers_of_the_results():
    page = (ROOT / "paper/README.md").read_text()
    labels = {"alibi": "ALiBi", "kerple": "KERPLE", "fope": "FoPE", "rope": "RoPE"}
    labels |= {f"{run}-logn2": f"{labels[run]}, `--logn=2`" for run in ("fope", "rope")}
    for run, label in labels.items():
        columns = passkey(results("behind_text", run)).T
        cells = [f"{x.mean():.2f} ({x.min():.2f}-{x.max():.2f})" for x in columns]
        assert f"| {label} | {' | '.join(cells)} |\n" in page


def test_the_losses_of_smollm2_are_the_measured_ones():
    measured = json.loads((ROOT / "paper/results/loss_by_position.json").read_text())
    page = (ROOT / "hf/README.md").read_text()
    for run in ("smol", "smol-swap", "smol-fope", "smol-rope"):
        quarters = torch.tensor(measured[run]["loss"]).view(4, 4).mean(1).tolist()
        assert f" | {' | '.join(f'{x:.2f}' for x in quarters)} |\n" in page
