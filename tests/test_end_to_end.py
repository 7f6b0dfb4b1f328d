"""The two commands of the README, small: train from nothing, then compare runs."""

import json
import os
import subprocess
import sys

from runs import ROOT

SMALL = "--n_layer=1 --n_embd=32 --n_hidden=64 --steps=3 --batch_tokens=1024 --eval_tokens=8192 --eval_trials=2".split()
SMALL += ["--train_len=256", "--compile=off", "--device=cpu"]


def run(folder, script, *argv):
    """A command in another folder than the repository: what it prints."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / script, *map(str, argv)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_from_nothing_then_compare(tmp_path):
    printed = run(tmp_path, "train.py", *SMALL, "--data=data/builtin/")  # as a shell completes it
    assert printed.count("making the built-in corpus") == 1
    assert "step 3/3  loss" in printed and "step 3/3  validation loss" in printed
    meta = json.loads((tmp_path / "data" / "builtin" / "meta.json").read_text())
    assert meta["train"]["tokens"] > 10_000_000 and meta["val"]["tokens"] > 100_000
    fope = tmp_path / "out" / "tiny-fope-s0"
    names = {path.name for path in fope.iterdir()}
    assert names == {"ckpt.pt", "eval.jsonl", "eval.md", "eval.png", "log.jsonl", "loss.png"}
    assert (fope / "eval.md").read_text() in printed
    assert "| | seeds | 256 | 512 | 1024 | 2048 | 4096 |" in printed
    assert json.loads((fope / "eval.jsonl").read_text().splitlines()[0])["trials"] == 2

    printed = run(tmp_path, "train.py", *SMALL, "--pos=rope", "--eval_trials=0", "--seed=1")
    assert "making the built-in corpus" not in printed  # it is there
    run(tmp_path, "eval_passkey.py", tmp_path / "out/tiny-rope-s1", "--trials=2", "--device=cpu")
    printed = run(tmp_path, "plot.py", *sorted((tmp_path / "out").iterdir()))
    for name in ("fope: perplexity", "fope, logn 2: perplexity", "rope: perplexity"):
        assert f"| {name} | 1 |" in printed
    assert {"eval.md", "eval.png", "loss.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
