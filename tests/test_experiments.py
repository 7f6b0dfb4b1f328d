"""paper/experiments.py: each of its commands is a valid one, and one experiment is run for real, small."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train
from data import prepare
from data.tokenizer import get_tokenizer
from model import position_embedding
from paper import experiments

ROOT = Path(__file__).resolve().parent.parent


def lines_of(experiment, scale):
    """The lines of each run: its start's training (of continuations only), its own training, its evaluation."""
    return [
        [line for _, line in experiments.commands(run, scale, 3, 7, 4)]
        for run in experiments.runs_of(experiment, scale)
    ]


@pytest.mark.parametrize("scale", experiments.SCALES)
@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_commands_are_valid_and_differ(experiment, scale):
    configs = []
    for *start, train_line, eval_line in lines_of(experiment, scale):
        assert len(start) == (experiment == "fig4")
        words = shlex.split(train_line)
        cfg = train.parse_flags(words[words.index("train.py") + 1 :])
        configs.append({k: v for k, v in vars(cfg).items() if k != "out"})
        assert (
            cfg.seed == 3
            and cfg.resume
            and f"eval_passkey.py {cfg.out} --lengths=512,1024,2048,4096,8192 --trials=7" in eval_line
        )
        assert (cfg.data == "data/gutenberg") == ("--data=data/c4" in eval_line)
        assert (cfg.train_len == 1024) == (experiment == "fig4")
        if "tiny" in scale:
            assert words[0] == "python"
            position_embedding(cfg, 0)  # what fope.py refuses, it refuses here
        else:
            assert words[:3] == ["torchrun", "--standalone", "--nproc_per_node=4"]
    if scale not in ("180M", "1.2B") or experiment not in ("fig6b", "fig6c"):  # which are refused
        assert all(a != b for i, a in enumerate(configs) for b in configs[:i])


def test_continuation_is_a_tenth_at_twice_the_length():
    for scale, steps in (("tiny", 3000), ("tiny5k", 5000), ("60M", 19_073)):
        for start, line, _ in lines_of("fig4", scale):
            started, cfg = (
                train.parse_flags(shlex.split(x)[shlex.split(x).index("train.py") + 1 :]) for x in (start, line)
            )
            base = train.parse_flags([f"--model={cfg.model}"])
            assert (cfg.steps, cfg.warmup, cfg.lr, cfg.train_len) == (
                steps // 10,
                steps // 200,
                base.lr / 2,
                2 * base.train_len,
            )
            assert cfg.init_from == started.out == f"out/{scale}/{Path(cfg.out).name.split('-then-')[0]}-s3"
            assert (started.steps, started.train_len, started.init_from) == (steps, base.train_len, "")


def test_doubled():
    cfg = {
        run: train.parse_flags(shlex.split(experiments.commands(run, "60M", 0, 1, 1)[-2][1])[4:])
        for run in experiments.RUNS
    }
    assert cfg["fope-double-head-dim"].head_dim == 128 and cfg["fope-double-head-dim"].n_head == 8
    more = cfg["fope-double-heads-layers"]
    assert (more.head_dim, more.n_head, more.n_layer) == (64, 16, 16)


SMALL = "--model=tiny --n_layer=1 --n_embd=32 --n_hidden=32 --batch_tokens=1024 --steps=200 --warmup=1 --log_every=1 --eval_every=1000 "
SMALL += "--compile=off --device=cpu --eval_tokens=1024"


def call(folder, *argv, stop=None, at=None):
    """The driver in a process of its own, with a model that is small and fast, writing into `folder`."""
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from paper import experiments
experiments.ROOT, experiments.LENGTHS = Path({str(folder)!r}), "512,1024"
experiments.SCALES["tiny"] = {SMALL!r}
experiments.RUNS["rope-then-fope"] = "--pos=fope --train_len=1024 --steps=2"
experiments.RUNS["rope-then-yarn"] = "--pos=rope --scaling=ntk"
experiments.RUNS["nope"] = "--pos=nope --n_embd=256 --n_hidden=2048 --batch_tokens=8192"
experiments.RUNS["fope"] = "--pos=rope --scaling=ntk"
experiments.main({list(argv)!r})"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    if stop:  # `at` five more lines of this log
        deadline, before = time.monotonic() + 100, at.read_text().count("\n") if at.exists() else 0
        while not (at.exists() and at.read_text().count("\n") > before + 5) and time.monotonic() < deadline:
            time.sleep(0.02)
        stop(process.pid)
    stdout, stderr = process.communicate(timeout=200)
    return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)


def folder_with_a_corpus(folder):
    for name in ("train.py", "eval_passkey.py"):
        (folder / name).symlink_to(ROOT / name)
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 200, dtype=np.uint8).astype(np.uint16)
    prepare.write(folder / "data/builtin", get_tokenizer("bytes"), text, text[:2000], {"source": "a fox"})


def test_one_is_stopped_finished_and_not_run_again(tmp_path):
    folder_with_a_corpus(tmp_path)
    log = tmp_path / "out/tiny/rope-s0/log.jsonl"

    def ctrl_c(pid):  # goes to all processes
        os.killpg(pid, signal.SIGINT)

    def kill(pid):  # goes to the driver alone
        os.kill(pid, signal.SIGTERM)

    steps = [0]
    for stop in (ctrl_c, kill):  # the run ends well, half done
        stopped = call(tmp_path, "fig4", "--runs=rope-then-yarn", "--trials=2", stop=stop, at=log)
        assert stopped.returncode == 2 and "stopped: the same command goes on" in stopped.stderr
        steps.append(json.loads(log.read_text().splitlines()[-1])["step"])
        assert (
            steps[-2] < steps[-1] < 200
            and f"saved at step {steps[-1]}" in (tmp_path / "out/tiny/rope-s0.log").read_text()
        )
        assert not (tmp_path / "paper").exists()

    failed = call(tmp_path, "fig4", "--runs=rope-then-yarn", "--trials=2")  # a run with a bad flag
    assert failed.returncode == 1
    assert "rope-then-yarn-s0 is not finished (status 2): see" in failed.stderr
    assert "ntk" in (tmp_path / "out/tiny/rope-then-yarn-s0.log").read_text()
    start = tmp_path / "out/tiny/rope-s0"  # its start is trained
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 200
    before = (start / "ckpt.pt").stat().st_mtime_ns

    failed = call(
        tmp_path, "fig4", "--runs=fope-then-fope", "--trials=2"
    )  # a start with a bad flag: nothing is built on it
    assert failed.returncode == 1 and "train.py" in failed.stdout and "fope-then-fope" not in failed.stdout

    done = call(tmp_path, "fig4", "--runs=rope-then-fope", "--trials=2")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "paper/results/tiny/rope-then-fope-s0.json").read_text())
    assert (result["step"], result["lengths"], result["trials"], result["config"]["init_from"]) == (
        2,
        [512, 1024],
        2,
        "out/tiny/rope-s0",
    )
    assert "weights from out/tiny/rope-s0" in (tmp_path / "out/tiny/rope-then-fope-s0.log").read_text()
    assert (start / "ckpt.pt").stat().st_mtime_ns == before  # not trained again
    assert "rope-then-fope: passkey" in (tmp_path / "paper/results/tiny/fig4.md").read_text()
    assert (tmp_path / "paper/results/tiny/fig4.png").stat().st_size > 5000

    again = call(tmp_path, "fig4", "--runs=rope-then-fope", "--trials=2")
    assert again.returncode == 0 and "train.py" not in again.stdout and "rope-then-fope: passkey" in again.stdout


def test_a_stop_waits_for_every_run(tmp_path):
    """Two at a time where there are two cores: the slower one must have saved as well when the driver ends."""
    folder_with_a_corpus(tmp_path)
    slow = tmp_path / "out/tiny/nope-s0"
    stopped = call(
        tmp_path,
        "fig1",
        "--runs=rope,nope",
        "--trials=2",
        stop=lambda pid: os.killpg(pid, signal.SIGINT),
        at=slow / "log.jsonl",
    )
    assert stopped.returncode == 2 and "stopped: the same command goes on" in stopped.stderr
    assert (
        "stopped and saved at step" in (tmp_path / "out/tiny/nope-s0.log").read_text() and (slow / "ckpt.pt").exists()
    )


def test_figure_of_what_is_varied(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    folder = tmp_path / "paper/results/tiny"
    folder.mkdir(parents=True)
    source = ROOT / "paper/results/tiny5k/fope-s0.json"
    for name in ("fope-s0", "fope-d64-s0"):
        (folder / f"{name}.json").write_text(source.read_text())
    (folder / "fope-s1.json").write_text((source.parent / "fope-s1.json").read_text())
    experiments.report("fig6c", "tiny")
    assert (folder / "fig6c.png").stat().st_size > 5000
    assert "| fope: perplexity | 2 |" in capsys.readouterr().out
    for name in ("rope-s0", "rope-a-s0"):
        (folder / f"{name}.json").write_text(source.read_text())
    experiments.report("table2", "tiny")  # losses: the logarithm of 2.98
    assert json.loads(source.read_text())["perplexity"][0] == pytest.approx(2.98, abs=0.005)
    assert "| rope-a: loss | 1 | 1.09 |" in (folder / "table2.md").read_text()


def test_committed_tables_follow_from_committed_results(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.plot, "figure", lambda *_, **__: False)
    shutil.copytree(ROOT / "paper/results", tmp_path / "paper/results", ignore=shutil.ignore_patterns("*.md", "*.png"))
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    kept = [path for scale in experiments.SCALES for path in (ROOT / f"paper/results/{scale}").glob("*.md")]
    for path in kept:
        experiments.report(path.stem, path.parent.name)
        assert (tmp_path / path.relative_to(ROOT)).read_text() == path.read_text()
    shown = ROOT / "paper/results/tiny5k/fig1.md"
    assert shown in kept and shown.read_text() in (ROOT / "README.md").read_text()


def test_dry_run_prints_what_is_done_too_and_writes_nothing(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "paper/results/tiny5k"
    folder.mkdir(parents=True)
    (folder / "rope-s0.json").write_text((ROOT / "paper/results/tiny5k/rope-s0.json").read_text())
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    experiments.main(["fig4", "--scale=tiny5k", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 4 + 2 and " --pos=rope --seed=0 " in lines[0] and " --pos=fope --seed=0 " in lines[5]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["rope-s0.json"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["fig1", "--trials=0"], "--trials"),
        (["fig5"], "two corpora"),
        (["fig6b", "--scale=180M"], "--scale=60M"),
        (["fig1", "--seeds=x"], "list of numbers"),
        (["fig1", "--runs=fope,yarn"], "no run yarn"),
        (["fig9"], "fig9"),
    ],
)
def test_bad_input(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        experiments.main(argv)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
