"""paper/experiments.py: the commands of the grid, the driver that carries them out, and the tables that it writes."""

import dataclasses
import json
import multiprocessing
import os
import shutil
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
COMMITTED = ROOT / "paper/results/tiny/eval.jsonl"
OLDER = ROOT / "paper/results/tiny-d32/eval.jsonl"  # has more experiments


def config(words):
    return train.configure(train.parse_flags(words[words.index("train.py") + 1 :]))


def trainings(run, scale="60M"):
    every = experiments.commands(run, seed=3, scale=scale, trials=7, records=[])
    return [config(words) for words in every if "train.py" in words]


@pytest.mark.parametrize("scale", ["tiny", "60M"])
@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_every_run_of_an_experiment_is_valid_and_different(experiment, scale):
    configs = []
    for run in experiments.runs_in(experiment, scale):
        words = experiments.commands(run, seed=3, scale=scale, trials=7, records=[])
        cfg = trainings(run, scale)[-1]
        position_embedding(cfg, 0)  # refuses options that do not fit
        assert cfg.seed == 3 and words[0][0] == ("torchrun" if scale == "60M" else "python")
        texts = [line[-1] for line in words if "eval_passkey.py" in line and cfg.out in line and "--trials=7" in line]
        on_books = experiment == "fig5" or (scale == "60M" and experiment == "fig6a")
        own = f"--data={cfg.data}"
        if scale == "tiny":
            assert texts == ([own, "--data=data/essay", "--data=data/speeches"] if on_books else [own])
        else:
            assert texts == ([own, "--data=data/c4"] if on_books else [own])
        configs.append(dataclasses.asdict(cfg) | {"out": ""})
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])


CHANGES = [
    ("60M", "books-rope", dict(pos="rope", data="data/gutenberg")),
    ("60M", "fope-no-fs", dict(pos="fope", fourier_series=False, clip_floor=True)),
    ("60M", "fope-double-head-dim", dict(n_head=8, d=128, n_hidden=4096, n_layer=8)),
    ("tiny", "fope-double-heads-layers", dict(n_head=4, d=64, n_hidden=512, n_layer=6)),
    ("60M", "fope-then-yarn", dict(pos="fope", scaling="yarn", train_len=1024, init_from="out/60M/fope-s3")),
    ("60M", "rope-then-fope", dict(steps=1907, warmup=95, lr=3e-4, train_len=1024, init_from="out/60M/rope-s3")),
]


@pytest.mark.parametrize("scale, run, expected", CHANGES)
def test_what_a_run_changes(scale, run, expected):
    cfg = trainings(run, scale)[-1]
    assert {name: getattr(cfg, name) for name in expected} == expected


def test_a_dry_run_prints_every_command_and_trains_a_start_once(capsys):
    experiments.main(["fig4", "--runs=rope-then-yarn,fope-then-fope,rope-then-fope", "--dry_run"])
    trained = [word for word in capsys.readouterr().out.split() if word.startswith("--out=")]
    names = ["rope-s0", "rope-then-yarn-s0", "rope-then-fope-s0", "fope-s0", "fope-then-fope-s0"]
    assert trained == [f"--out=out/tiny/{name}" for name in names]


@pytest.mark.parametrize(
    "line", [line for text in experiments.TABLE1 for line in text.splitlines() if "train.py" in line]
)
def test_the_commands_of_table_1_are_valid(line):
    cfg = config(line.split())
    assert (cfg.train_len, cfg.lr, cfg.steps, cfg.recompute, cfg.eval_trials) == (4096, 1e-4, 1907, True, 0)


BAD = [
    ("fig2", "fig2"),
    ("fig1 --runs=llama", "no run llama"),
    ("fig1 --seeds=a", "--seeds"),
    ("fig1 --jobs=x", "--jobs"),
]


@pytest.mark.parametrize("argv, words", BAD)
def test_bad_input_gets_one_line(refused, argv, words):
    assert words in refused(experiments.main, *argv.split())


# ----------------------------------------------------------------------------------------------------------------------
# The driver

# In place of train.py. It "trains" until it is stopped, and with --resume it is finished at once. nope fails. fire is
# stopped by a signal that the driver did not send.
TRAIN = """import pathlib, signal, sys, time
def end(step, status=0):
    (out / "step").write_text(str(step))
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
if "--resume=True" not in sys.argv:
    time.sleep(100)
end(step=3000)
"""
EVALUATE = f"""import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
flags = dict(word.split("=") for word in sys.argv[2:])
with open("{OLDER}") as some, open(out / "eval.jsonl", "a") as file:
    for record in (json.loads(line) for line in some):
        run = "{{run}}-s{{seed}}".format(**record)
        if run == out.name.replace("fire", "rope") and record["data"] == flags["--data"]:
            trials, step = int(flags["--trials"]), int((out / "step").read_text())
            record |= dict(run=out.name, init_from="", trials=trials, right=min(record["right"], trials), step=step)
            file.write(json.dumps(record) + "\\n")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The repository that the driver works in, with stand-ins for train.py and eval_passkey.py."""
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    (tmp_path / "data/builtin").mkdir(parents=True)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "eval_passkey.py").write_text(EVALUATE)
    return tmp_path


def run(*argv):
    """The driver in this process. Returns its exit status."""
    with pytest.raises(SystemExit) as end, mock.patch("signal.signal"):  # its handlers are not for pytest
        experiments.main(["--trials=2", "--jobs=2", *argv])
    return end.value.code


def kept(folder):
    return plot.read(folder / "paper/results/tiny/eval.jsonl")


def stop(capfd, number, once, *argv):
    """The driver in a process of its own, with two jobs, which gets a signal `once` something holds."""

    def drive():
        os.setsid()
        experiments.main(["--jobs=2", *argv])

    process = multiprocessing.get_context("fork").Process(target=drive, daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not once() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, number)  # to the whole group, as a terminal does
    process.join(100)
    assert process.exitcode == 2 and capfd.readouterr().err.endswith("stopped: the same command resumes\n")


def test_a_real_run_is_stopped_resumed_and_evaluated(folder, capfd, monkeypatch):
    small = dict(n_layer=1, n_embd=32, n_hidden=32, batch_tokens=1024, steps=120, log_every=1)
    small |= dict(pos="rope", compile="off", device="cpu")
    monkeypatch.setattr(experiments, "runs_of", lambda preset: {"rope": small})
    monkeypatch.setattr(experiments, "LENGTHS", (512, 1024))
    for name in ("train.py", "eval_passkey.py"):
        (folder / name).unlink()
        (folder / name).symlink_to(ROOT / name)
    fox = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 400, dtype=np.uint8)
    (folder / "data/builtin").rmdir()
    make_data(folder / "data/builtin", fox, fox[:9000])
    out, argv = folder / "out/tiny/rope-s10", ("fig1", "--runs=rope", "--seeds=10")
    log = out / "log.jsonl"
    stop(capfd, signal.SIGTERM, lambda: log.exists() and log.read_text().count("\n") > 5, *argv)
    step = load_checkpoint(out)["step"]
    assert step < 120 and f"saved at step {step}" in (folder / "out/tiny/rope-s10.log").read_text()
    assert run(*argv) == 0 and f"from step {step}\n" in (folder / "out/tiny/rope-s10.log").read_text()
    facts = {(r["run"], r["seed"], r["step"], r["trials"], r["data"]) for r in kept(folder)}
    assert facts == {("rope", 10, 120, 2, "data/builtin")} and len(kept(folder)) == 2 * 2  # lengths, p
    assert (folder / "paper/results/tiny/fig1.png").exists()


def test_ctrl_c_lets_every_running_command_save(folder, capfd):
    out = folder / "out/tiny"
    stop(capfd, signal.SIGINT, lambda: len(list(out.glob("*/started"))) == 2, "fig1", "--runs=rope,alibi,fope")
    assert [(out / f"{name}-s0/step").read_text() for name in ("rope", "alibi")] == ["10", "10"]
    assert not (out / "fope-s0").exists()


def test_a_run_that_fails_stops_no_other_run_and_what_is_done_is_not_run_again(folder, capsys):
    for name in ("rope-s0", "fope-s0"):
        (folder / "out/tiny" / name).mkdir(parents=True)
    status, (out, error) = run("fig1", "--runs=rope,nope,fire,fope"), capsys.readouterr()
    trained = {line.split("--out=out/tiny/")[1].split()[0]: line for line in out.splitlines() if "train.py" in line}
    assert [name for name, line in trained.items() if "--resume=True" in line] == ["rope-s0", "fope-s0"]
    assert "nope-s0 is not finished" in error and "fire-s0 is not finished" in error and error.count("\n") == 2
    assert status == 1 and {(r["run"], r["logn"]) for r in kept(folder)} == {
        (x, p) for x in ("rope", "fope") for p in (0, 2)
    }

    status, (out, _) = run("fig1", "--runs=rope,fope"), capsys.readouterr()
    assert status == 0 and ".py" not in out and "| fope, logn 2: passkey accuracy | 1 |" in out
    assert run("fig1", "--runs=rope", "--trials=3") == 0 and "train.py" in capsys.readouterr().out


def test_figure_5_is_evaluated_on_its_own_text_and_on_others(folder):
    (folder / "out/tiny/books-fope-s0").mkdir(parents=True)
    assert run("fig5", "--runs=books-fope") == 0
    assert {r["data"] for r in kept(folder)} == {"data/books", "data/essay", "data/speeches"}


# ----------------------------------------------------------------------------------------------------------------------
# The tables


@pytest.mark.parametrize("table", sorted(COMMITTED.parent.glob("*.md")), ids=lambda path: path.stem)
def test_committed_tables_follow_from_the_committed_records(table, tmp_path, monkeypatch):
    shutil.copytree(COMMITTED.parent, tmp_path / "paper/results/tiny", ignore=shutil.ignore_patterns("*.md"))
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(plot, "save", mock.Mock())
    experiments.report(table.stem, "tiny", plot.read(COMMITTED))
    assert (tmp_path / "paper/results/tiny" / table.name).read_text() == table.read_text()


def test_table_2_has_losses_and_seeds_of_two_digits_count(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    (tmp_path / "paper/results/tiny").mkdir(parents=True)
    records = [json.loads(line) for line in COMMITTED.read_text().splitlines()]
    records = [r | {"seed": r["seed"] + 9} for r in records if r["run"] == "rope" and not r["logn"]]
    experiments.report("table2", "tiny", records)
    assert "| rope: loss | 4 | 1.33 (1.32-1.35) |" in (tmp_path / "paper/results/tiny/table2.md").read_text()
