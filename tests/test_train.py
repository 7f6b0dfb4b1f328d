"""train.py: data order, AdamW, runs that are stopped and resumed, several processes. All on the CPU in float32."""

import json
import math
import random
import re
import shutil
import signal
import sys
import time
from functools import partial
from signal import SIG_IGN, SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import runs
import torch
from conftest import make_data
from hypothesis import given
from hypothesis import strategies as st
from runs import BATCH, FLAGS, FOX, SEQUENCES, STEPS, N, checkpoint, flags, log, logged, run
from torch.utils._python_dispatch import TorchDispatchMode

import plot
import train
from model import GPT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "fox", FOX[: SEQUENCES * N + 1], FOX[:700])


@pytest.fixture(autouse=True)
def this_process():
    """A run that is refused leaves its handlers of signals."""
    kept = {number: signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGHUP, SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def configure(argv):
    return train.configure(train.parse_flags(argv))


def train_here(argv):
    """The run in this process."""
    return train.train(train.parse_flags(argv))


def resumed(out):
    """The lines of log.jsonl that say where a run was resumed, and what was changed."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if '"resumed"' in line]


def assert_same_run(out, reference):
    """Bit for bit: weights, optimizer, log. And no temporary file is left."""
    (saved, expected) = ([checkpoint(run)[name] for name in ("step", "model", "optimizer")] for run in (out, reference))
    torch.testing.assert_close(saved, expected, rtol=0, atol=0)
    assert log(out) == log(reference)
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
def test_every_epoch_is_one_shuffle_whose_parts_go_to_micro_batches_and_processes(
    seed, sequences, world, share, micro_tokens
):
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


@pytest.mark.parametrize("final_lr", [0.1, 0.0])
def test_learning_rate_is_linear_then_a_cosine_to_its_final_share(final_lr):
    cfg = configure(["--lr=3e-3", "--warmup=20", "--steps=200", f"--final_lr={final_lr}"])
    rates = [train.learning_rate(step, cfg) for step in range(201)]
    assert rates[:20] == pytest.approx([3e-3 * (step + 1) / 20 for step in range(20)])
    cosine = [0.5 + 0.5 * math.cos(math.pi * i / 180) for i in range(181)]
    assert rates[20:] == pytest.approx([3e-3 * (final_lr + (1 - final_lr) * x) for x in cosine])


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
        assert logged(tmp_path / "out", "grad_norm")[step] == pytest.approx(norm, rel=1e-5)
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
# The log, and what a step costs


def test_log_has_every_step_and_what_was_promised(reference):
    lines = [json.loads(line) for line in (reference[1] / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 11), 10, *range(11, 21), 20]
    promised = {"step", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"}
    assert all(line.keys() in (promised, {"step", "val_loss"}) for line in lines)
    assert all(line["tokens_per_s"] > 0 for line in lines[1:] if "loss" in line)  # the first step may compile


def test_tokens_per_second_are_those_of_the_steps_alone(data, tmp_path, monkeypatch):
    for name in ("save", "validate"):  # twice each
        monkeypatch.setattr(train, name, lambda *args: time.sleep(0.5) or 0.0)
    begin = time.perf_counter()
    train_here(flags(data, tmp_path / "out", "--steps=6", "--log_every=6", "--save_every=3", "--eval_every=4"))
    awake = time.perf_counter() - begin - 4 * 0.5
    last = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-2])  # after it, the validation
    assert last["tokens_per_s"] > 2 * BATCH * N / awake  # measured over the two steps since the validation


def test_a_step_waits_for_the_device_once(data, tmp_path, monkeypatch):
    waits, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: waits.append("tolist") or real(x))

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:  # item(), float(), if tensor: ..
                waits.append("item")
            return func(*args, **kwargs or {})

    counts = []
    for steps in (2, 12):
        waits.clear()
        with Count():
            train_here(flags(data, tmp_path / str(steps), f"--steps={steps}", "--save_every=99", "--eval_every=99"))
        counts.append(len(waits))
    assert counts[1] - counts[0] == 10


def test_wandb_logs_the_loss_and_a_resumed_run_goes_on_as_the_same_one(monkeypatch, data, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run_class, seen = wandb.sdk.wandb_run.Run, []
    real = run_class.log
    monkeypatch.setattr(run_class, "log", lambda self, values, step: (seen.append(values), real(self, values, step)))
    argv = flags(data, tmp_path / "out", "--wandb")
    train_here([*argv, "--steps=2"])
    train_here([*argv, "--steps=4", "--resume"])
    assert [values["loss"] for values in seen if "loss" in values] == logged(tmp_path / "out", "loss")
    ids = [path.stem.removeprefix("run-") for path in tmp_path.glob("wandb/offline-run-*/*.wandb")]
    assert ids == [(tmp_path / "out" / "wandb_id").read_text()] * 2
    assert wandb.run is None  # finished
    wandb.teardown()  # its service would complain when pytest ends


# ----------------------------------------------------------------------------------------------------------------------
# Killed and stopped: the continuation must be the run that was never stopped. Checkpoints fall on steps 8, 16 and 20.


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_stopped_and_killed_at_random_steps_ends_as_one_that_was_not(data, reference, tmp_path, world, seed):
    rng, out, saved = random.Random(seed), tmp_path / "out", 0
    for number in rng.sample([SIGTERM, SIGKILL], 2):
        n = rng.randint(1, STEPS - 1 - saved)
        argv = flags(data, out, *(["--resume"] if out.exists() else []))
        end = run(argv, runs.at_step(n, number), world=world, rank=rng.randrange(world))
        step, saved = saved + n, checkpoint(out)["step"]
        if number == SIGTERM:  # the processes agree on it in the next step
            assert end.returncode == [0] * world, end.stderr
            assert saved == step + 1 and f"stopped and saved at step {saved}: --resume continues" in end.stdout
        else:
            assert -SIGKILL in end.returncode and step - 8 <= saved <= step
    end = run(flags(data, out, "--resume"), world=world)
    assert end.returncode == [0] * world, end.stderr
    assert_same_run(out, reference[world])


STOPS = {  # name: the rank with the patches, the patches, status of each process (None: any but 0), the last line
    "by SIGUSR1, and by SIGTERM while it saves":
        (0, [runs.at_step(5, SIGUSR1), runs.before_call(1, "torch.save", SIGTERM)], [0], "step 6: --resume continues"),
    "by SIGHUP in one of two processes": (1, [runs.at_step(5, SIGHUP)], [0, 0], "step 6: --resume continues"),
    "not by SIGHUP under nohup":
        (0, [partial(signal.signal, SIGHUP, SIG_IGN), runs.at_step(5, SIGHUP)], [0], "step 20/20  validation"),
    "by Ctrl-C, which ends a tee too":
        (0, [runs.at_step(5, runs.close_pipe), runs.at_step(7, SIGINT)], [0], "step 4/20"),
    "by a second Ctrl-C, at once":
        (0, [runs.at_step(13, SIGINT), runs.before_call(2, "torch.save", SIGINT)], [1], "KeyboardInterrupt"),
    "by a disk too full for a checkpoint":
        (0, [runs.at_step(11, partial(runs.leave_room, 20_000))], [2], "no checkpoint of step 16 could be"),
    "by a disk too full for a log line, in one of two processes":
        (0, [runs.at_step(11, partial(runs.leave_room, 20))], [2, None], "log.jsonl could not be written"),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_says_so_and_resumes_bit_for_bit(data, reference, tmp_path, name):
    rank, patches, expected, words = STOPS[name]
    world, out = len(expected), tmp_path / "out"
    end = run(flags(data, out), *patches, world=world, rank=rank)
    assert [None if code and want is None else code for code, want in zip(end.returncode, expected)] == expected
    lines = (end.stderr if expected[0] else end.stdout).splitlines()
    if expected[0] == 2:  # rank 1 loses its neighbor and may show a traceback
        lines = [line for line in lines if line.startswith("train.py: ")]
        assert len(lines) == 1
    assert words in lines[-1] and not (out / "ckpt.tmp").exists()
    step = checkpoint(out)["step"]
    assert step == 8 or expected[0] == 0
    again = run(["--resume", f"--out={out}"], world=world)  # the other flags come from the checkpoint
    assert again.returncode == [0] * world, again.stderr
    assert resumed(out) == [{"resumed": step, "changed": {}}]
    assert_same_run(out, reference[world])


EVALUATE = "train.eval_passkey.evaluate"
AFTER_TRAINING = {  # patches, exit status, the last line
    "Ctrl-C ends the evaluation": ([runs.before_call(1, EVALUATE, SIGINT)], 1, "KeyboardInterrupt"),
    "a signal in the last step skips it": ([runs.at_step(1, SIGTERM), runs.before_call(1, EVALUATE, SIGKILL)], 0, None),
}


@pytest.mark.parametrize("name", AFTER_TRAINING)
def test_a_signal_after_training_leaves_the_checkpoint(tmp_path, name):
    patches, status, line = AFTER_TRAINING[name]
    folder = make_data(tmp_path / "data", FOX[: SEQUENCES * N + 1], np.full(4097, 32))
    end = run(flags(folder, tmp_path / "out", "--steps=1", "--eval_trials=1", "--train_len=256"), *patches)
    assert end.returncode == [status] and checkpoint(tmp_path / "out")["step"] == 1
    assert (end.stderr.splitlines() or [None])[-1] == line


def test_a_run_that_diverges_ends_before_it_saves(capsys, data, reference, tmp_path):
    with pytest.raises(SystemExit):
        train.main(flags(data, tmp_path / "new", "--lr=1e38"))
    assert "at step 2: there is no checkpoint yet; a lower --lr may help\n" in capsys.readouterr().err
    out = shutil.copytree(reference[1], tmp_path / "out")
    with pytest.raises(SystemExit):
        train.main(["--resume", f"--out={out}", "--steps=25", "--save_every=99", "--lr=1e38"])
    assert f"at step 22: {out}/ckpt.pt is from before; a lower --lr may help\n" in capsys.readouterr().err
    assert not (tmp_path / "new/ckpt.pt").exists() and checkpoint(out)["step"] == 20


def test_a_resumed_run_may_change_steps_data_and_optimizer_settings_and_says_so(capsys, reference, tmp_path):
    out = shutil.copytree(reference[1], tmp_path / "out")
    other = make_data(tmp_path / "other", FOX[1:1000], FOX[:700])
    changed = {"data": str(other), "steps": 25, "lr": 1e-3, "weight_decay": 0.5, "beta1": 0.7}
    train_here(["--resume", f"--out={out}", *(f"--{name}={value}" for name, value in changed.items())])
    said = " ".join(f"--{name}={value}" for name, value in changed.items())
    assert f"changed from here on: {said}\n" in capsys.readouterr().out
    assert resumed(out) == [{"resumed": 20, "changed": changed}]
    cfg = configure(["--steps=25", "--lr=1e-3", "--warmup=0", "--final_lr=0"])
    rates = [line["lr"] for line in log(out) if line["step"] > 20 and "loss" in line]
    assert rates == [train.learning_rate(step, cfg) for step in range(20, 25)]
    assert checkpoint(out)["step"] == 25
    adamw, muon = (state["param_groups"][0] for state in checkpoint(out)["optimizer"])
    assert adamw["weight_decay"] == muon["weight_decay"] == 0.5 and adamw["betas"] == (0.7, 0.95)


def second_run():
    with pytest.raises(SystemExit):
        train.main([*sys.argv[1:], "--resume"])


def test_a_second_run_is_refused_while_the_first_runs(data, reference, tmp_path):
    end = run(flags(data, tmp_path / "out"), runs.at_step(5, second_run))
    assert end.returncode == [0], end.stderr
    (line,) = end.stderr.splitlines()
    assert line.startswith(f"train.py: another process is working in {tmp_path / 'out'}")
    assert_same_run(tmp_path / "out", reference[1])


def test_the_same_command_works_after_a_crash_in_the_first_step(data, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AttributeError, match="no_such_thing"):
        patch.setattr("model.MLP.forward", lambda self, x: self.no_such_thing)
        train_here(flags(data, tmp_path / "out"))
    assert train_here(flags(data, tmp_path / "out", "--steps=2", f"--seed={2**60}"))[1]


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def test_two_processes_agree_with_one(reference):
    one, two = reference[1], reference[2]
    assert logged(one, "loss")[0] - logged(one, "loss")[-1] > 0.5
    for name, tolerance in dict(step=0, lr=0, loss=1e-5, val_loss=1e-5, grad_norm=1e-4).items():
        assert logged(two, name) == pytest.approx(logged(one, name), rel=tolerance, abs=0), name


def test_two_processes_say_once_that_they_do_not_share_a_folder(data, reference, tmp_path):
    shutil.copytree(reference[1], tmp_path / "run")
    (tmp_path / "run-of-rank-1").mkdir()
    other = partial(exec, "import sys; sys.argv[-1] += '-of-rank-1'")
    end = run([*FLAGS, f"--data={data}", "--resume", f"--out={tmp_path / 'run'}"], other, world=2, rank=1)
    (line,) = (line for line in end.stderr.splitlines() if line.startswith("train.py: "))
    assert end.returncode == [2, 2] and "--out must be a folder that all share" in line


def test_torchrun_sigterm_saves_at_an_agreed_step(data, tmp_path):
    argv = flags(data, tmp_path / "out", "--steps=100000", "--save_every=100000")
    process = runs.start(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", runs.ROOT / "train.py", *argv
    )
    next(line for line in process.stdout if line.startswith("step 20/"))
    process.terminate()
    stdout, stderr = process.communicate(timeout=200)  # torchrun's own status is not 0: it was asked to end
    step = checkpoint(tmp_path / "out")["step"]
    assert step >= 20 and f"step {step}:" in stdout.splitlines()[-1]
    assert "in train\n" not in stderr  # no rank left with a traceback of its own


def test_two_agents(data, reference, tmp_path):
    meet = f"--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{runs.free_port()} --local_addr=127.0.0.1".split()
    agent = ["-m", "torch.distributed.run", *meet, runs.ROOT / "train.py", *flags(data, tmp_path / "out")]
    for process in [runs.start(*agent), runs.start(*agent)]:
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
    assert logged(tmp_path / "out", "loss") == pytest.approx(logged(reference[1], "loss"), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile and --init_from


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_loss_is_eager_loss(data, reference, tmp_path):
    end = run(flags(data, tmp_path / "out", "--compile=on"))
    assert end.returncode == [0], end.stderr
    assert "compiled" in end.stdout.splitlines()[0]
    assert logged(tmp_path / "out", "loss") == pytest.approx(logged(reference[1], "loss"), rel=0, abs=1e-4)
    assert checkpoint(tmp_path / "out")["model"].keys() == checkpoint(reference[1])["model"].keys()


def test_no_compiler_means_eager_and_a_line_that_says_so(data, tmp_path):
    argv = flags(data, tmp_path / "out", "--compile=auto", "--steps=1")
    env = dict(PATH=str(tmp_path), CXX="/nonexistent", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    process = runs.start(runs.ROOT / "train.py", *argv, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), **env)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0 and checkpoint(tmp_path / "out")["step"] == 1, stderr
    assert re.search("eager.*torch.compile does not work here", stdout.splitlines()[0])


def test_no_compiler_is_bad_input_to_compile_on(monkeypatch, capsys, data, tmp_path):
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=OSError("no compiler\nand pages of details")))
    with pytest.raises(SystemExit, match="2"):
        train.main(flags(data, tmp_path / "out", "--compile=on"))
    assert capsys.readouterr().err.endswith(": --compile=on does not work here: OSError: no compiler\n")


def test_a_cache_folder_that_cannot_be_made_is_one_line(data, tmp_path):
    (tmp_path / "file").write_text("")
    process = runs.start(
        runs.ROOT / "train.py", *flags(data, tmp_path / "out"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file")
    )
    _, stderr = process.communicate(timeout=200)
    (line,) = stderr.splitlines()
    assert process.returncode == 2 and str(tmp_path / "file") in line and "set TORCHINDUCTOR_CACHE_DIR" in line
    assert not (tmp_path / "out").exists()


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
