"""paper/experiments.py: its commands are valid and differ; the driver stops, resumes and keeps results."""

import dataclasses
import json
import os
import shlex
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


def config(line):
    words = shlex.split(line)
    return train.parse_flags(words[words.index("train.py") + 1 :])


@pytest.mark.parametrize("scale", ["tiny", "tiny5k", "60M"])
@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_commands_are_valid_and_train_what_differs(experiment, scale):
    configs = []
    for run in experiments.runs_of(experiment, scale):
        *_, training, evaluation = experiments.commands(run, scale, 3, 7)
        cfg = config(training)
        position_embedding(cfg, 0)  # what it refuses is refused here
        assert (cfg.seed, cfg.resume, f"{cfg.out} --lengths={experiments.LENGTHS} --trials=7" in evaluation) == (
            3,
            False,
            True,
        )
        assert training.split()[0] == ("python" if "tiny" in scale else "torchrun")
        configs.append({name: value for name, value in dataclasses.asdict(cfg).items() if name != "out"})
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])


def test_books_are_tested_on_c4():
    training, evaluation = experiments.commands("books-rope", "60M", 0, 1)
    assert config(training).data == "data/gutenberg" and evaluation.endswith("--data=data/c4")


def test_a_continuation_is_a_tenth_of_the_steps_at_twice_the_length():
    start, training, _ = experiments.commands("rope-then-fope", "60M", 0, 1)
    first, then = config(start), config(training)
    assert (first.pos, then.pos, then.init_from) == ("rope", "fope", first.out)
    assert (then.train_len, then.steps, then.warmup, then.lr) == (1024, 1907, 95, 3e-4)


def test_doubling_keeps_the_heads_or_the_head_dim():
    wide, more = (
        config(experiments.commands(f"fope-double-{what}", "60M", 0, 1)[0]) for what in ("head-dim", "heads-layers")
    )
    assert (wide.n_head, wide.head_dim, wide.n_layer) == (8, 128, 8)
    assert (more.n_head, more.head_dim, more.n_layer, more.n_hidden) == (16, 64, 16, 4096)


SMALL = (
    "--n_layer=1 --n_embd=32 --n_hidden=32 --batch_tokens=1024 --steps=200 --warmup=1 --log_every=1 --eval_every=1000"
)


def drive(folder, *argv):
    """The driver in a process of its own, with a small model, writing into `folder`."""
    code = f"""from pathlib import Path
from paper import experiments
experiments.ROOT, experiments.LENGTHS = Path({str(folder)!r}), "512,1024"
experiments.SCALES["tiny"] = "--model=tiny {SMALL} --compile=off --device=cpu --eval_tokens=1024"
experiments.RUNS["rope-then-fope"] = "--pos=fope --train_len=1024 --steps=2"
experiments.RUNS["rope-then-yarn"] = "--pos=rope --scaling=ntk"
experiments.main({list(argv)!r})"""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)


def finish(process):
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


@pytest.fixture
def folder(tmp_path):
    for name in ("train.py", "eval_passkey.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 200, dtype=np.uint8).astype(np.uint16)
    prepare.write(tmp_path / "data/builtin", get_tokenizer("bytes"), text, text[:2000], {"source": "a fox"})
    return tmp_path


@pytest.mark.parametrize("stop", ["Ctrl-C", "SIGTERM"])
def test_a_stopped_driver_has_saved_its_runs_and_resumes(folder, stop):
    process, log = drive(folder, "fig4", "--runs=rope-then-fope", "--trials=2"), folder / "out/tiny/rope-s0/log.jsonl"
    deadline = time.monotonic() + 100
    while not (log.exists() and log.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    if stop == "Ctrl-C":  # a terminal sends it to all processes, a scheduler's SIGTERM goes to the driver alone
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    status, _, err = finish(process)
    assert status == 2 and err.endswith("stopped: the same command resumes\n")
    step = json.loads(log.read_text().splitlines()[-1])["step"]
    assert f"saved at step {step}" in (folder / "out/tiny/rope-then-fope-s0.log").read_text() and step < 200
    if stop == "SIGTERM":
        return  # it resumes as after Ctrl-C

    status, out, err = finish(drive(folder, "fig4", "--runs=rope-then-fope,rope-then-yarn", "--trials=2"))
    assert status == 1 and "rope-then-yarn-s0 is not finished" in err  # it has a bad flag; the other one is done
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 200
    result = json.loads((folder / "paper/results/tiny/rope-then-fope-s0.json").read_text())
    assert (result["step"], result["trials"], result["config"]["init_from"]) == (2, 2, "out/tiny/rope-s0")
    assert "rope-then-fope: passkey" in (folder / "paper/results/tiny/fig4.md").read_text()

    status, out, err = finish(drive(folder, "fig4", "--runs=rope-then-fope", "--trials=2"))
    assert status == 0 and "train.py" not in out and "rope-then-fope: passkey" in out  # nothing is run again


@pytest.mark.parametrize(
    "argv, words",
    [
        (["fig1", "--runs=llama"], "no run llama"),
        (["fig5"], "two corpora"),
        (["fig6b", "--scale=1.2B"], "--scale=60M"),
        (["fig1", "--trials=0"], "--trials"),
        (["fig1", "--seeds=a"], "--seeds"),
        (["fig2"], "fig2"),
    ],
)
def test_bad_input_gets_one_line(capsys, argv, words):
    with pytest.raises(SystemExit) as end:
        experiments.main(argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and words in err


def test_figure_6c_is_drawn_against_the_number_of_frequencies(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    folder, seen = tmp_path / "paper/results/tiny", []
    folder.mkdir(parents=True)
    for name in ("fope-s0", "fope-d64-s0"):
        (folder / f"{name}.json").write_text((ROOT / f"paper/results/tiny/{name}.json").read_text())
    monkeypatch.setattr(experiments.plot, "figure", lambda results, path, **options: seen.append(options))
    experiments.report("fig6c", "tiny")
    assert seen[0]["varied"]["fope-d64"] == 64 and "| fope-d64: perplexity | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize("table", sorted((ROOT / "paper/results").glob("*/*.md")), ids=lambda path: path.stem)
def test_committed_tables_follow_from_the_committed_results(table, tmp_path, monkeypatch, capsys):
    scale = table.parent.name
    folder = tmp_path / "paper/results" / scale
    folder.mkdir(parents=True)
    for file in table.parent.glob("*.json"):
        (folder / file.name).symlink_to(file)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments.plot, "figure", lambda *args, **options: True)
    experiments.report(table.stem, scale)
    assert (folder / table.name).read_text() == table.read_text()
