"""The two commands of the README, small: train from nothing, then compare runs."""

import json

from runs import ROOT, command

SMALL = "--n_layer=1 --n_embd=32 --n_hidden=64 --steps=3 --batch_tokens=1024 --eval_tokens=8192 --eval_trials=2".split()
SMALL += ["--train_len=256", "--compile=off", "--device=cpu"]


def test_train_from_nothing_then_compare(tmp_path):
    def run(script, *argv):
        """A command in another folder than the repository: what it prints."""
        status, printed, stderr = command(ROOT / script, *argv, folder=tmp_path)
        assert status == 0, stderr
        return printed

    printed = run("train.py", *SMALL, "--data=data/builtin/")  # as a shell completes it
    assert "making the built-in corpus" in printed and "step 3/3  validation loss" in printed
    meta = json.loads((tmp_path / "data/builtin/meta.json").read_text())
    assert meta["train"]["tokens"] > 10_000_000 and meta["val"]["tokens"] > 100_000
    fope = tmp_path / "out/tiny-fope-s0"
    names = {path.name for path in fope.iterdir()}
    assert names == {"ckpt.pt", "eval.jsonl", "eval.md", "eval.png", "log.jsonl", "loss.png"}
    assert (fope / "eval.md").read_text() in printed and "| 256 | 512 | 1024 | 2048 | 4096 |" in printed

    printed = run("train.py", *SMALL, "--pos=rope", "--eval_trials=0", "--seed=1")
    assert "making the built-in corpus" not in printed  # it is there
    run("eval_passkey.py", tmp_path / "out/tiny-rope-s1", "--trials=2", "--device=cpu")
    printed = run("plot.py", *sorted((tmp_path / "out").iterdir()))
    for name in ("fope: perplexity", "fope, logn 2: perplexity", "rope: perplexity"):
        assert f"| {name} | 1 |" in printed
    assert {"eval.md", "eval.png", "loss.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
