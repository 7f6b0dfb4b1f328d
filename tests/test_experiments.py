"""paper/experiments.py: the commands of the grid, the driver that carries them out, and the tables that it writes."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import train
from data import prepare
from data.tokenizer import get_tokenizer
from model import position_embedding
from paper import experiments

ROOT = Path(__file__).resolve().parent.parent

# ----------------------------------------------------------------------------------------------------------------------
# The commands


def lines(run, scale="60M"):
    return list(experiments.commands(run, seed=3, scale=scale, trials=7))


def config(line):
    return train.configure(train.parse_flags(line.split("train.py ")[1].split()))


@pytest.mark.parametrize("scale", ["tiny", "60M"])
@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_every_run_of_an_experiment_is_valid_and_different(experiment, scale):
    configs = []
    for run in experiments.runs_of(experiment, scale):
        *_, training, evaluation = [line for line in lines(run, scale) if "speeches" not in line]
        cfg = config(training)
        position_embedding(cfg, 0)  # refuses options that do not fit
        assert cfg.seed == 3 and f"{cfg.out} --lengths={experiments.LENGTHS} --trials=7" in evaluation
        assert training.split()[0] == ("torchrun" if scale == "60M" else "python")
        on_books = experiment == "fig5" or (scale == "60M" and experiment == "fig6a")
        other = "--data=data/essay" if scale == "tiny" else "--data=data/c4"
        assert run.startswith("books-") == evaluation.endswith(other) == on_books
        configs.append(dataclasses.asdict(cfg) | {"out": ""})
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])


CHANGES = [
    ("60M", "books-rope", dict(pos="rope", data="data/gutenberg")),
    ("60M", "fope-no-fs", dict(pos="fope", fourier_series=False, clip_floor=True)),
    ("60M", "fope-double-head-dim", dict(n_head=8, head_dim=128, n_hidden=4096, n_layer=8)),
    ("tiny", "fope-double-heads-layers", dict(n_head=8, head_dim=32, n_hidden=1024, n_layer=6)),
    ("60M", "fope-then-yarn", dict(pos="fope", scaling="yarn", train_len=1024, init_from="out/60M/fope-s3")),
    ("60M", "rope-then-fope", dict(steps=1907, warmup=95, lr=3e-4, train_len=1024, init_from="out/60M/rope-s3")),
]


@pytest.mark.parametrize("scale, run, expected", CHANGES)
def test_what_a_run_changes(scale, run, expected):
    cfg = config(lines(run, scale)[-2])
    assert {name: getattr(cfg, name) for name in expected} == expected


def test_continuations_of_one_start_follow_each_other_and_train_it_once(capsys):
    experiments.main(["fig4", "--runs=rope-then-yarn,fope-then-fope,rope-then-fope", "--dry_run"])
    printed = capsys.readouterr().out
    trained = [word for word in printed.split() if word.startswith("--out=")]
    names = ["rope-s0", "rope-then-yarn-s0", "rope-then-fope-s0", "fope-s0", "fope-then-fope-s0"]
    assert trained == [f"--out=out/tiny/{name}" for name in names]


BAD = [
    ("fig2", "fig2"),
    ("fig1 --runs=llama", "no run llama"),
    ("fig1 --seeds=a", "--seeds"),
    ("fig1 --trials=0", "--trials"),
    ("fig5 --seeds=99", "there is no data/books: python data/prepare.py"),
    ("fig6b --scale=1.2B", "--scale=60M"),
]


@pytest.mark.parametrize("argv, words", BAD)
def test_bad_input_gets_one_line(capsys, argv, words):
    with pytest.raises(SystemExit) as end:
        experiments.main(argv.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and words in error


# ----------------------------------------------------------------------------------------------------------------------
# The driver

SMALL = "--model=tiny --n_layer=1 --n_embd=32 --n_hidden=32 --batch_tokens=1024 --steps=120 --log_every=1 "
SMALL += "--data=data/fox --compile=off --device=cpu"
# In place of train.py. It "trains" until it is stopped, and with --resume it is finished at once. nope fails. fire is
# stopped by a signal that the driver did not send.
TRAIN = """import json, pathlib, signal, sys, time
def end(step, status=0):
    (out / "log.jsonl").write_text(json.dumps({"step": step}))
    sys.exit(status)
flags = dict(word.split("=") for word in sys.argv[1:] if "=" in word)
out = pathlib.Path(flags["--out"])
out.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), end(step=10)))
(out / "started").touch()
if flags["--pos"] == "nope":
    end(step=3000, status=3)
if flags["--pos"] == "fire":
    end(step=20)
if "--resume" not in sys.argv:
    time.sleep(100)
end(step=3000)
"""
EVALUATE = f"""import pathlib, shutil, sys
out = pathlib.Path(sys.argv[1])
stem = "-on-".join(["eval", *(word.split("/")[1] for word in sys.argv if word.startswith("--data="))])
for name in (stem, f"{{stem}}-logn2"):
    shutil.copy(f"{ROOT}/paper/results/tiny/{{out.name}}.json", out / f"{{name}}.json")
"""


def run(*argv):
    """The driver in this process. Returns its exit status."""
    with pytest.raises(SystemExit) as end, mock.patch("signal.signal"):  # its handlers are not for pytest
        experiments.main(["--trials=2", *argv])
    return end.value.code


def stop(capfd, number, once, *argv):
    """The driver in a process of its own, on two cores, which gets a signal `once` something holds."""

    def drive():
        os.setsid()
        with mock.patch("os.sched_getaffinity", return_value={0, 1}):
            experiments.main(argv)

    process = multiprocessing.get_context("fork").Process(target=drive, daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not once() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, number)  # to the whole group, as a terminal does
    process.join(100)
    assert process.exitcode == 2 and capfd.readouterr().err.endswith("stopped: the same command resumes\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The repository that the driver works in, with stand-ins for train.py and eval_passkey.py."""
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    (tmp_path / "data/builtin").mkdir(parents=True)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "eval_passkey.py").write_text(EVALUATE)
    return tmp_path


def last_step(folder, name):
    return json.loads((folder / f"out/tiny/{name}/log.jsonl").read_text().splitlines()[-1])["step"]


def test_a_real_run_is_stopped_resumed_and_evaluated(folder, capfd, monkeypatch):
    monkeypatch.setitem(experiments.SCALES, "tiny", SMALL)
    for name in ("train.py", "eval_passkey.py"):
        (folder / name).unlink()
        (folder / name).symlink_to(ROOT / name)
    fox = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 400, dtype=np.uint8).astype(np.uint16)
    prepare.write(folder / "data/fox", get_tokenizer("bytes"), fox, fox[:9000], {"source": "a fox"})
    log, printed = folder / "out/tiny/rope-s0/log.jsonl", folder / "out/tiny/rope-s0.log"
    stop(capfd, signal.SIGTERM, lambda: log.exists() and log.read_text().count("\n") > 5, "fig1", "--runs=rope")
    step = last_step(folder, "rope-s0")
    assert step < 120 and f"saved at step {step}" in printed.read_text()

    assert run("fig1", "--runs=rope") == 0 and f"from step {step}\n" in printed.read_text()
    result = json.loads((folder / "paper/results/tiny/rope-s0.json").read_text())
    assert (result["step"], result["trials"], result["lengths"][-1]) == (120, 2, 8192)
    assert (folder / "paper/results/tiny/fig1.png").exists()


def test_ctrl_c_lets_every_running_command_save(folder, capfd):
    out = folder / "out/tiny"
    stop(capfd, signal.SIGINT, lambda: len(list(out.glob("*/started"))) == 2, "fig1", "--runs=rope,alibi,fope")
    assert (last_step(folder, "rope-s0"), last_step(folder, "alibi-s0")) == (10, 10)
    assert not (out / "fope-s0").exists()


def test_a_run_that_fails_stops_no_other_run_and_what_is_done_is_not_run_again(folder, capsys):
    for name in ("rope-s0", "fope-s0"):
        (folder / "out/tiny" / name).mkdir(parents=True)
    status, (out, error) = run("fig1", "--runs=rope,nope,fire,fope"), capsys.readouterr()
    trained = {line.split("--out=out/tiny/")[1].split()[0]: line for line in out.splitlines() if "train.py" in line}
    assert [name for name, line in trained.items() if line.endswith("--resume")] == ["rope-s0", "fope-s0"]
    assert "nope-s0 is not finished, status 3" in error and "fire-s0 is not finished, status 0" in error
    kept = sorted(path.name for path in (folder / "paper/results/tiny").glob("*.json"))
    assert status == 1 and kept == [f"{name}-s0.json" for name in ("fope-logn2", "fope", "rope-logn2", "rope")]

    status, (out, _) = run("fig1", "--runs=rope,fope"), capsys.readouterr()
    assert status == 0 and ".py" not in out and "| fope: passkey | 1 |" in out


def test_figure_5_is_evaluated_on_both_texts(folder):
    for name in ("data/books", "data/essay", "data/speeches", "out/tiny/books-fope-s0"):
        (folder / name).mkdir(parents=True)
    assert run("fig5", "--runs=books-fope") == 0
    kept = {path.name for path in (folder / "paper/results/tiny").glob("*.json")}
    assert kept == {f"books-fope{name}-s0.json" for name in ("", "-logn2", "-on-speeches", "-on-speeches-logn2")}


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_as_many_runs_at_a_time_as_jobs(jobs, folder, capsys):
    for name in ("rope-s0", "fope-s0", "alibi-s0"):
        (folder / "out/tiny" / name).mkdir(parents=True)
    assert run("fig1", "--runs=rope,fope,alibi", f"--jobs={jobs}") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ".py" in line]
    assert ["train.py" in line for line in lines[: jobs + 1]] == [True] * jobs + [False]


# ----------------------------------------------------------------------------------------------------------------------
# The tables and figures


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of the committed results without their tables. report() draws no figure."""
    shutil.copytree(ROOT / "paper/results", tmp_path / "paper/results", ignore=shutil.ignore_patterns("*.md"))
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments.plot, "figure", mock.Mock())
    return tmp_path / "paper/results"


@pytest.mark.parametrize("table", sorted((ROOT / "paper/results").glob("*/*.md")), ids=lambda path: path.stem)
def test_committed_tables_follow_from_the_committed_results(table, results):
    experiments.report(table.stem, table.parent.name)
    assert (results / table.parent.name / table.name).read_text() == table.read_text()


def test_figure_6c_is_drawn_against_the_number_of_frequencies(results):
    experiments.report("fig6c", "tiny")
    varied = experiments.plot.figure.call_args.kwargs["varied"]
    assert varied == {"fope": 0, "fope-d32": 32, "fope-d64": 64, "fope-d128": 128}


def test_the_log_n_rows_of_a_run_on_books_are_its_own(results):
    (results / "60M").mkdir()
    for name in ("fope", "fope-logn2"):
        for run in (name, f"books-{name}"):
            shutil.copy(results / f"tiny/{run}-s0.json", results / f"60M/{run}-s0.json")
    experiments.report("fig6a", "60M")
    rows = re.findall(r"^\| (\S+): passkey", (results / "60M/fig6a.md").read_text(), re.MULTILINE)
    assert rows == ["books-fope", "books-fope-logn2"]


def test_results_that_are_not_alike_are_refused_in_one_line(results, capsys):
    file = results / "tiny/fope-s1.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trials": 7}))
    with pytest.raises(SystemExit):
        experiments.report("fig6c", "tiny")
    assert "not two seeds of one run" in capsys.readouterr().err
