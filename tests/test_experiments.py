"""paper/experiments.py: the commands of the grid, the driver that carries them out, and the tables that it writes."""

import dataclasses
import multiprocessing
import os
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import make_data

import plot
import train
from model import load_checkpoint, position_embedding
from paper import experiments

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "paper/results"


def config(words):
    return train.configure(train.parse_flags(words[words.index("train.py") + 1 :]))


def commands(run, scale="60M"):
    return experiments.commands(run, seed=3, scale=scale, trials=7, records=[])


OTHER_TEXTS = {"tiny": ["data/essay", "data/speeches"], "60M": ["data/c4"]}  # for runs that were trained on books


@pytest.mark.parametrize("scale", OTHER_TEXTS)
@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_every_run_of_an_experiment_is_valid_and_different(experiment, scale):
    configs, on_books = [], experiment == "fig5" or (experiment == "fig6a" and scale == "60M")
    for run in experiments.runs_in(experiment, scale):
        *_, training = (words for words in commands(run, scale) if "train.py" in words)
        cfg = config(training)
        position_embedding(cfg, 0)  # refuses options that do not fit
        assert cfg.seed == 3 and training[0] == ("torchrun" if scale == "60M" else "python")
        assert (cfg.data in ("data/books", "data/gutenberg")) == on_books
        texts = [words[-1] for words in commands(run, scale) if {"eval_passkey.py", cfg.out, "--trials=7"} <= {*words}]
        assert texts == [f"--data={text}" for text in [cfg.data, *OTHER_TEXTS[scale] * on_books]]
        configs.append(dataclasses.asdict(cfg) | {"out": ""})
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])


def test_runs_have_the_shape_and_the_schedule_that_they_are_named_for():
    doubled, continued = (config(commands(run)[-2]) for run in ("fope-double-head-dim", "rope-then-fope"))
    assert (doubled.n_head, doubled.d, doubled.n_hidden, doubled.n_layer) == (8, 128, 4096, 8)
    assert (continued.pos, continued.init_from, continued.train_len) == ("fope", "out/60M/rope-s3", 1024)
    assert (continued.steps, continued.warmup, continued.lr) == (1907, 95, 3e-4)


def test_a_dry_run_prints_every_command_and_trains_a_start_once(capsys):
    experiments.main(["fig4", "--runs=rope-then-yarn,fope-then-fope,rope-then-fope", "--dry_run"])
    trained = [word for word in capsys.readouterr().out.split() if word.startswith("--out=")]
    names = ["rope-s0", "rope-then-yarn-s0", "rope-then-fope-s0", "fope-s0", "fope-then-fope-s0"]
    assert trained == [f"--out=out/tiny/{name}" for name in names]


# ----------------------------------------------------------------------------------------------------------------------
# The driver


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The repository that the driver works in, without its scripts."""
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    (tmp_path / "paper/results/tiny").mkdir(parents=True)
    fox = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 400, dtype=np.uint8)
    make_data(tmp_path / "data/builtin", fox, fox[:9000])
    return tmp_path


def run(*argv):
    """The driver in this process. Returns its exit status."""
    with pytest.raises(SystemExit) as end, mock.patch("signal.signal"):  # its handlers are not for pytest
        experiments.main(["--trials=2", "--jobs=2", *argv])
    return end.value.code


def kept(folder):
    return plot.read(folder / "paper/results/tiny/eval.jsonl")


def test_ctrl_c_lets_every_running_command_save_and_the_same_command_resumes(folder, capfd, monkeypatch):
    small = dict(pos="rope", n_layer=1, n_embd=32, n_hidden=32, batch_tokens=1024, steps=5000, log_every=1)
    small |= dict(warmup=0, compile="off", device="cpu")
    monkeypatch.setattr(experiments, "runs_of", lambda preset: {"rope": small})
    monkeypatch.setattr(experiments, "LENGTHS", (512, 1024))
    for name in ("train.py", "eval_passkey.py"):
        (folder / name).symlink_to(ROOT / name)

    def drive():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
        experiments.main(["fig1", "--runs=rope", "--jobs=2", "--seeds=8,9,10"])

    driver = multiprocessing.get_context("fork").Process(target=drive, daemon=True)
    driver.start()
    deadline = time.monotonic() + 100
    while sum(log.stat().st_size > 0 for log in folder.glob("out/tiny/*/log.jsonl")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGINT)  # to the whole group, as a terminal does
    driver.join(100)
    assert driver.exitcode == 2 and capfd.readouterr().err.endswith("stopped: the same command resumes\n")
    saved = {out.name: load_checkpoint(out)["step"] for out in folder.glob("out/tiny/*/")}
    assert saved.keys() == {"rope-s8", "rope-s9"}

    small["steps"] = saved["rope-s8"] + 3  # so that it ends soon
    assert run("fig1", "--runs=rope", "--seeds=8") == 0
    assert f"from step {saved['rope-s8']}\n" in (folder / "out/tiny/rope-s8.log").read_text()
    facts = [(r["run"], r["seed"], r["step"], r["trials"], r["length"], r["logn"]) for r in kept(folder)]
    assert facts == [("rope", 8, small["steps"], 2, length, p) for length in (512, 1024) for p in (0, 2)]


# In place of train.py and eval_passkey.py. nope fails. fire is stopped by a signal that the driver did not send.
TRAIN = """import pathlib, sys
flags = dict(word.split("=") for word in sys.argv[1:])
out = pathlib.Path(flags["--out"])
out.mkdir(parents=True)
(out / "step").write_text("20" if flags["--pos"] == "fire" else "3000")
sys.exit(flags["--pos"] == "nope")
"""
EVALUATE = """import json, pathlib, sys
out, flags = pathlib.Path(sys.argv[1]), dict(word.split("=") for word in sys.argv[2:])
facts = dict(run=out.name, pos=out.name[:4], seed=0, data=flags["--data"], train_data=flags["--data"], train_len=512)
facts |= dict(step=int((out / "step").read_text()), steps=3000, trials=int(flags["--trials"]), right=1, perplexity=2)
with open(out / "eval.jsonl", "a") as file:
    for p in (0, 2):
        print(json.dumps(facts | dict(logn=p, length=8192)), file=file)
"""


def test_a_run_that_fails_stops_no_other_run_and_what_is_done_is_not_run_again(folder, capsys):
    (folder / "train.py").write_text(TRAIN)
    (folder / "eval_passkey.py").write_text(EVALUATE)
    assert run("fig1", "--runs=rope,nope,fire,fope") == 1
    error = capsys.readouterr().err
    assert "nope-s0 is not finished" in error and "fire-s0 is not finished" in error and error.count("\n") == 2
    assert sorted((r["run"], r["logn"]) for r in kept(folder)) == [("fope", 0), ("fope", 2), ("rope", 0), ("rope", 2)]
    assert run("fig1", "--runs=rope,fope") == 0
    out = capsys.readouterr().out
    assert ".py" not in out and "| fope, logn 2: passkey accuracy | 1 |" in out
    assert experiments.commands("rope", 0, "tiny", trials=3, records=kept(folder))  # other trials are other records


# ----------------------------------------------------------------------------------------------------------------------
# The tables


def report(folder, experiment, records):
    with mock.patch("plot.save"):
        experiments.report(experiment, "tiny", records)
    return (folder / f"paper/results/tiny/{experiment}.md").read_text()


OLDER = [RESULTS / f"tiny-d32/{name}.md" for name in ("fig1", "fig4", "fig5", "fig6a", "logn")]


@pytest.mark.parametrize("table", [*sorted(RESULTS.glob("tiny/*.md")), *OLDER], ids=lambda path: path.stem)
def test_committed_tables_follow_from_the_committed_records(table, folder):
    assert report(folder, table.stem, plot.read(table.parent / "eval.jsonl")) == table.read_text()
