"""train.py: data order, AdamW, runs that are stopped and resumed, several processes. All on the CPU in float32."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from signal import SIG_IGN, SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1, raise_signal, signal
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import runs
import torch
from conftest import make_data
from hypothesis import given
from hypothesis import strategies as st
from runs import BATCH, FLAGS, FOX, SEQUENCES, STEPS, N, checkpoint, flags, logged, run

import plot
import train
from model import GPT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "fox", FOX[: SEQUENCES * N + 1], FOX[:700])


def configure(argv):
    return train.configure(train.parse_flags(argv))


def train_here(argv):
    """The run in this process."""
    return train.train(train.parse_flags(argv))


def assert_same_run(out, reference):
    """Bit for bit: weights, optimizer, losses. And no temporary file is left."""
    saved, expected = ([checkpoint(run)[name] for name in ("step", "model", "optimizer")] for run in (out, reference))
    torch.testing.assert_close(saved, expected, rtol=0, atol=0)
    assert plot.read_log(out / "log.jsonl") == plot.read_log(reference / "log.jsonl")
    assert sorted(path.name for path in out.iterdir()) == ["ckpt.pt", "log.jsonl"]


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """The folder of the run that nothing stops, by its number of processes."""
    tmp = tmp_path_factory.mktemp("reference")
    for world in (1, 2):
        end = run(flags(data, tmp / str(world)), world=world)
        assert end.returncode == [0] * world, end.stderr
    return {1: tmp / "1", 2: tmp / "2"}


# ----------------------------------------------------------------------------------------------------------------------
# Flags, data order, schedule, optimizer


def test_flags_win_over_the_preset_and_the_preset_over_the_default():
    cfg = configure(["--model=60M", "--lr", "1e-3", "--clip_floor=false", "--resume"])
    assert (cfg.n_embd, cfg.batch_tokens, cfg.data) == (512, 524_288, "data/c4")
    assert (cfg.lr, cfg.clip_floor, cfg.fourier_series, cfg.resume) == (1e-3, False, True, True)
    assert cfg.out == "out/60M-fope-s0"


@given(
    seed=st.integers(0, 2**60),
    sequences=st.integers(1, 50),
    world=st.integers(1, 4),
    share=st.integers(1, 6),
    micro_tokens=st.integers(1, 50),
)
def test_every_epoch_is_one_shuffle_dealt_to_processes_and_micro_batches(seed, sequences, world, share, micro_tokens):
    """Sequence i is the tokens from 8 i to 8 i + 8, so that a batch says which sequences it holds."""
    tokens, batch = np.arange(8 * sequences + 1), world * share
    steps = 3 * sequences // batch + 1
    cfg = SimpleNamespace(seed=seed, train_len=8, batch_tokens=8 * batch, micro_tokens=micro_tokens)
    taken = np.empty((steps, world, share), dtype=int)
    for rank in range(world):
        machine = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
        batches = train.Batches(tokens, cfg, machine)
        for step in range(steps):
            for x, y in batches[step]:
                assert torch.equal(x[:, :1] + torch.arange(8), x) and torch.equal(x + 1, y)
                assert len(x) == 1 or x.numel() <= micro_tokens
            taken[step, rank] = torch.cat([x for x, _ in batches[step]])[:, 0] // 8
    epochs = [np.random.default_rng((seed, epoch)).permutation(sequences) for epoch in range(3 + batch)]
    assert taken.ravel().tolist() == np.concatenate(epochs)[: taken.size].tolist()


def test_learning_rate_is_linear_then_a_cosine_to_its_final_share():
    cfg = configure(["--lr=3e-3", "--warmup=20", "--steps=200", "--final_lr=0.1"])
    rates = [train.learning_rate(step, cfg) for step in range(201)]
    assert rates[:20] == pytest.approx([3e-3 * (step + 1) / 20 for step in range(20)])
    assert rates[20:] == pytest.approx([3e-3 * (0.55 + 0.45 * math.cos(math.pi * i / 180)) for i in range(181)])


def fresh(argv):
    """The model that train.py begins with."""
    return GPT(configure([*argv, "--vocab_size=320"]))  # 257 padded to a multiple of 64


def test_three_steps_are_clipped_adamw_with_decay_on_every_parameter(data, tmp_path):
    argv = flags(data, tmp_path / "out", "--steps=3", "--micro_tokens=256", "--beta2=0.8", "--lr=3e-3")
    argv += ["--optimizer=adamw", "--final_lr=0.1"]
    train_here(argv)
    model, tokens = fresh(argv), np.fromfile(data / "train.bin", dtype=np.uint16).astype(np.int64)
    order = np.random.default_rng((0, 0)).permutation(SEQUENCES)
    mean, square = ({name: 0.0 for name, _ in model.named_parameters()} for _ in range(2))
    for step in range(3):
        rows = np.stack([tokens[i * N :][: N + 1] for i in order[step * BATCH :][:BATCH]])
        model.zero_grad()
        model(torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        assert norm > 1  # so that clipping is seen
        assert logged(tmp_path / "out", "grad_norm")[step + 1] == pytest.approx(norm, rel=1e-5)
        lr = 3e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 3)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                grad = p.grad.double() / norm
                mean[name] = 0.9 * mean[name] + 0.1 * grad
                square[name] = 0.8 * square[name] + 0.2 * grad**2
                update = mean[name] / (1 - 0.9 ** (step + 1)) / ((square[name] / (1 - 0.8 ** (step + 1))).sqrt() + 1e-8)
                p.copy_(p.double() * (1 - lr * 0.1) - lr * update)
    saved = checkpoint(tmp_path / "out")["model"]
    for name, p in model.named_parameters():
        torch.testing.assert_close(saved[name], p.detach(), rtol=1e-4, atol=1e-6)


def test_a_step_leaves_kerples_parameters_in_their_bounds(data, tmp_path):
    train_here(flags(data, tmp_path / "out", "--pos=kerple", "--steps=1", "--weight_decay=9999"))  # far below
    learned = [x for name, x in checkpoint(tmp_path / "out")["model"].items() if ".position." in name]
    assert min(x.min() for x in learned) == pytest.approx(0.01)


# ----------------------------------------------------------------------------------------------------------------------
# The log


def test_tokens_per_second_are_those_of_the_steps_alone(data, tmp_path, monkeypatch):
    """By a clock on which a step takes a second, and a save or a validation a hundred."""
    passed = []
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: sum(passed)))
    for name, seconds in dict(learning_rate=1, save=100, validate=100).items():
        monkeypatch.setattr(train, name, lambda *args, seconds=seconds: passed.append(seconds) or 0.0)
    train_here(flags(data, tmp_path / "out", "--steps=6", "--log_every=6", "--save_every=3", "--eval_every=4"))
    assert logged(tmp_path / "out", "tokens_per_s")[6] == BATCH * N


def test_wandb_has_the_losses_and_a_resumed_run_goes_on_as_the_same_one(monkeypatch, data, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", wandb := mock.Mock())
    wandb.init.return_value.id = "a1"
    for more in ("--steps=2", "--steps=4 --resume"):
        train_here(flags(data, tmp_path / "out", "--wandb", *more.split()))
    assert [call.kwargs["id"] for call in wandb.init.call_args_list] == [None, "a1"]
    told = [call.args[0] for call in wandb.init.return_value.log.call_args_list]
    assert {values["step"]: values["loss"] for values in told if "loss" in values} == logged(tmp_path / "out", "loss")


# ----------------------------------------------------------------------------------------------------------------------
# Killed and stopped: the continuation must be the run that was never stopped. Checkpoints fall on steps 8, 16 and 20.


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_stopped_and_killed_at_random_steps_ends_as_one_that_was_not(data, reference, tmp_path, world, seed):
    rng, out, saved = random.Random(seed), tmp_path / "out", 0
    for number in rng.sample([SIGTERM, SIGKILL], 2):
        n = rng.randint(1, STEPS - 1 - saved)
        argv = flags(data, out, *(["--resume"] if out.exists() else []))
        end = run(argv, (runs.at_step, n, raise_signal, number), world=world, rank=rng.randrange(world))
        step, saved = saved + n, checkpoint(out)["step"]
        if number == SIGTERM:  # the processes agree on it in the next step
            assert end.returncode == [0] * world, end.stderr
            assert saved == step + 1 and f"stopped and saved at step {saved}: --resume continues" in end.stdout
        else:
            assert -SIGKILL in end.returncode and step - 8 <= saved <= step
    end = run(flags(data, out, "--resume"), world=world)
    assert end.returncode == [0] * world, end.stderr
    assert_same_run(out, reference[world])


STOPS = {  # name: the patches, exit status, the last line
    "by SIGUSR1, and by SIGHUP while it saves":
        ([(runs.at_step, 5, raise_signal, SIGUSR1), (runs.before, "torch.save", raise_signal, SIGHUP)], 0, "at step 6"),
    "not by SIGHUP under nohup":
        ([(signal, SIGHUP, SIG_IGN), (runs.at_step, 5, raise_signal, SIGHUP)], 0, "step 20/20  validation"),
    "by Ctrl-C, which ends a tee too":
        ([(runs.at_step, 5, runs.close_pipe), (runs.at_step, 7, raise_signal, SIGINT)], 0, "step 4/20"),
    "by a second Ctrl-C, at once":
        ([(runs.before, "torch.save", raise_signal, SIGINT)], 1, "KeyboardInterrupt"),
    "by a disk too full for a checkpoint":
        ([(runs.at_step, 11, runs.leave_room, 20_000)], 2, "train.py: no checkpoint of step 16 could be"),
    "by a disk too full for a log line":
        ([(runs.at_step, 11, runs.leave_room, 20)], 2, "log.jsonl could not be written"),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_says_so_and_resumes_bit_for_bit(data, reference, tmp_path, name):
    patches, status, words = STOPS[name]
    out = tmp_path / "out"
    end = run(flags(data, out), *patches)
    lines = (end.stderr if status else end.stdout).splitlines()
    assert end.returncode == [status] and words in lines[-1] and (status != 2 or len(lines) == 1)
    assert checkpoint(out)["step"] == 8 or status == 0
    again = run(["--resume", f"--out={out}"])  # the other flags come from the checkpoint
    assert again.returncode == [0], again.stderr
    assert_same_run(out, reference[1])


def test_a_signal_in_the_last_step_skips_the_evaluation_and_ctrl_c_ends_it(tmp_path):
    folder, evaluate = make_data(tmp_path / "data", FOX[: SEQUENCES * N + 1], FOX[:4097]), "train.eval_passkey.evaluate"
    for name, status, last, *patches in (
        ("skipped", 0, [], (runs.at_step, 1, raise_signal, SIGTERM), (runs.before, evaluate, raise_signal, SIGKILL)),
        ("ended", 1, ["KeyboardInterrupt"], (runs.before, evaluate, raise_signal, SIGINT)),
    ):
        end = run(flags(folder, tmp_path / name, "--steps=1", "--eval_trials=1", "--train_len=256"), *patches)
        assert end.returncode == [status] and end.stderr.splitlines()[-1:] == last
        assert checkpoint(tmp_path / name)["step"] == 1


def test_a_run_that_diverges_ends_before_it_saves(refused, data, reference, tmp_path):
    line = refused(train.main, *flags(data, tmp_path / "new", "--lr=1e38", "--save_every=2"))
    assert "at step 2: there is no checkpoint yet" in line and not (tmp_path / "new/ckpt.pt").exists()
    out = shutil.copytree(reference[1], tmp_path / "out")
    line = refused(train.main, "--resume", f"--out={out}", "--steps=25", "--save_every=11", "--lr=1e38")
    assert f"at step 22: {out}/ckpt.pt is from before" in line and checkpoint(out)["step"] == 20


def test_a_resumed_run_may_change_steps_data_and_optimizer_settings_and_the_log_says_so(reference, tmp_path):
    out = shutil.copytree(reference[1], tmp_path / "out")
    other = make_data(tmp_path / "other", FOX[1:1000], FOX[:700])
    changed = {"data": str(other), "steps": 25, "lr": 1e-3, "weight_decay": 0.5, "beta1": 0.7}
    train_here(["--resume", f"--out={out}", *(f"--{name}={value}" for name, value in changed.items())])
    assert json.dumps({"resumed": 20, "changed": changed}) in (out / "log.jsonl").read_text().splitlines()
    cfg = configure(["--steps=25", "--lr=1e-3", "--warmup=0", "--final_lr=0"])
    assert [*logged(out, "lr").values()][20:] == [train.learning_rate(step, cfg) for step in range(20, 25)]
    adamw, muon = (state["param_groups"][0] for state in checkpoint(out)["optimizer"])
    assert adamw["weight_decay"] == muon["weight_decay"] == 0.5 and adamw["betas"] == (0.7, 0.95)


def second_run():
    with pytest.raises(SystemExit):
        train.main([*sys.argv[1:], "--resume"])


def test_a_second_run_is_refused_while_the_first_runs(data, reference, tmp_path):
    end = run(flags(data, tmp_path / "out"), (runs.at_step, 5, second_run))
    assert end.returncode == [0], end.stderr
    (line,) = end.stderr.splitlines()
    assert line.startswith(f"train.py: another process is working in {tmp_path / 'out'}")
    assert_same_run(tmp_path / "out", reference[1])


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def test_two_processes_agree_with_one(reference):
    one, two = reference[1], reference[2]
    assert logged(one, "loss")[1] - logged(one, "loss")[STEPS] > 0.5
    for name, tolerance in dict(lr=0, loss=1e-5, val_loss=1e-5, grad_norm=1e-4).items():
        assert logged(two, name) == pytest.approx(logged(one, name), rel=tolerance, abs=0), name


def test_two_processes_say_once_that_they_do_not_share_a_folder(data, reference, tmp_path):
    shutil.copytree(reference[1], tmp_path / "run")
    (tmp_path / "run-of-rank-1").mkdir()
    other = (exec, "import sys; sys.argv[-1] += '-of-rank-1'")
    end = run([*FLAGS, f"--data={data}", "--resume", f"--out={tmp_path / 'run'}"], other, world=2, rank=1)
    (line,) = (line for line in end.stderr.splitlines() if line.startswith("train.py: "))
    assert end.returncode == [2, 2] and "--out must be a folder that all share" in line


def test_torchrun_sigterm_saves_at_an_agreed_step(data, tmp_path):
    argv = flags(data, tmp_path / "out", "--steps=100000", "--save_every=100000")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *argv]
    process = subprocess.Popen(torchrun, cwd=runs.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    next(line for line in process.stdout if line.startswith("step 20/"))
    process.terminate()
    stdout, stderr = process.communicate(timeout=200)  # torchrun's own status is not 0: it was asked to end
    step = checkpoint(tmp_path / "out")["step"]
    assert step >= 20 and f"step {step}:" in stdout.splitlines()[-1]
    assert "in train\n" not in stderr  # no rank left with a traceback of its own


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile and --init_from


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_loss_is_eager_loss(data, reference, tmp_path):
    end = run(flags(data, tmp_path / "out", "--compile=on"))
    assert end.returncode == [0], end.stderr
    assert "compiled" in end.stdout.splitlines()[0]
    assert logged(tmp_path / "out", "loss") == pytest.approx(logged(reference[1], "loss"), rel=0, abs=1e-4)
    assert checkpoint(tmp_path / "out")["model"].keys() == checkpoint(reference[1])["model"].keys()


def test_no_compiler_means_eager_and_a_line_that_says_so(monkeypatch, capsys, refused, data, tmp_path):
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=OSError("no compiler\nand pages of details")))
    train_here(flags(data, tmp_path / "out", "--compile=auto", "--steps=1"))
    assert re.search("eager.*torch.compile does not work here", capsys.readouterr().out)
    line = refused(train.main, *flags(data, tmp_path / "another", "--compile=on"))
    assert line.endswith(": --compile=on does not work here: OSError: no compiler\n")


INIT = {  # flags of the run that the weights come from, flags of the one that takes them, whether any are drawn anew
    "RoPE to FoPE": ("--pos=rope", "--pos=fope", True),
    "FoPE at the same N": ("", "", False),
    "FoPE at another N": ("", "--train_len=64", True),
    "a series that goes beyond the floor": ("--n_freqs=12", "--n_freqs=12 --train_len=64", True),
}


@pytest.mark.parametrize("name", INIT)
def test_init_from_takes_the_weights_and_the_coefficients_of_kept_frequencies(capsys, data, tmp_path, name):
    old, new, anew = INIT[name]
    argv = flags(data, tmp_path / "new", f"--init_from={tmp_path / 'old'}", "--lr=0", "--steps=1", "--seed=3")
    train_here(flags(data, tmp_path / "old", "--steps=2", *old.split()))
    train_here([*argv, *new.split()])
    assert ("coefficients drawn anew" in capsys.readouterr().out) == anew
    source, taken = (checkpoint(tmp_path / folder)["model"] for folder in ("old", "new"))
    expected = fresh([*argv, *new.split()]).state_dict()
    for key, x in source.items():
        M = x.shape[-1]
        if x.shape == expected[key].shape:
            expected[key] = x
        else:  # coefficients (.., D, M): the longer N has more frequencies above its floor
            assert M < expected[key].shape[-1]
            expected[key][..., :M, :M] = x[..., :M, :M]
    torch.testing.assert_close(taken, expected, rtol=0, atol=0)
