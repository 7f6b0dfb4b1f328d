"""train.py: data order, AdamW, stopped and resumed runs, several processes, bad input. All on the CPU in float32."""

import gc
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import weakref
from functools import partial
from signal import SIG_IGN, SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import make_data
from runs import BATCH, FLAGS, FOX, ROOT, SEQUENCES, STEPS, N, checkpoint, flags, free_port, log, logged, run, start
from stops import at_line, at_step, before, close_pipe, fill_disk, half_then_kill, leave_room
from torch.utils._python_dispatch import TorchDispatchMode

import plot
import train
from model import GPT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "fox", FOX[: SEQUENCES * N + 1], FOX[:700])


@pytest.fixture(autouse=True)
def this_process():
    """Runs in this process have one thread, as those in processes of their own. One that is refused leaves handlers."""
    kept = {number: signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGHUP, SIGUSR1)}
    torch.set_num_threads(1)
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


def ours(stderr):
    """The lines that the command itself wrote."""
    return [line for line in stderr.splitlines() if line.startswith("train.py: ")]


def print_sequences(tokens, sequences, *args):
    if len(tokens) == SEQUENCES * N + 1:  # not those of the validation
        print(f"rank {os.environ.get('RANK', 0)} takes {sequences.tolist()}", flush=True)


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """The run that nothing stops, by its number of processes: (its folder, what it printed)."""
    tmp, runs = tmp_path_factory.mktemp("reference"), {}
    for world in (1, 2, 4):
        end = run(flags(data, tmp / str(world)), before("train.take", 0, print_sequences), world=world)
        assert end.returncode == ([0] * world if world > 1 else 0), end.stderr
        runs[world] = tmp / str(world), end.stdout
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# Flags, data order, schedule, optimizer


def test_flags_win_over_the_preset_and_the_preset_over_the_default():
    cfg = configure(["--model=60M", "--lr", "1e-3", "--clip_floor=false", "--resume"])
    assert (cfg.n_embd, cfg.batch_tokens, cfg.data) == (512, 524_288, "data/c4")
    assert (cfg.lr, cfg.clip_floor, cfg.fourier_series, cfg.resume) == (1e-3, False, True, True)
    assert cfg.out == "out/60M-fope-s0"


@pytest.mark.parametrize("preset, last", [("60M", 3e-4), ("tiny", 0.0)])
def test_learning_rate_is_linear_then_a_cosine_to_the_presets_share_of_it(preset, last):
    cfg = configure([f"--model={preset}", "--lr=3e-3", "--warmup=20", "--steps=200"])
    rates = [train.learning_rate(step, cfg) for step in range(201)]
    assert rates[:20] == pytest.approx([3e-3 * (step + 1) / 20 for step in range(20)])
    cosine = [0.5 + 0.5 * math.cos(math.pi * i / 180) for i in range(181)]
    assert rates[20:] == pytest.approx([last + (3e-3 - last) * x for x in cosine])


def fresh(argv):
    """The model that train.py begins with."""
    return GPT(configure([*argv, "--vocab_size=320"]))  # 257 padded to a multiple of 64


def test_three_steps_are_clipped_adamw_with_decay_on_every_parameter(data, tmp_path):
    argv = flags(data, tmp_path / "out", "--steps=3", "--micro_tokens=256", "--beta2=0.8", "--lr=3e-3")
    argv += ["--optimizer=adamw", "--final_lr=0.1"]
    train_here(argv)
    model, tokens = fresh(argv), np.fromfile(data / "train.bin", dtype=np.uint16).astype(np.int64)
    mean, square = ({name: 0.0 for name, _ in model.named_parameters()} for _ in range(2))
    for step in range(3):
        rows = np.stack([tokens[i * N :][: N + 1] for i in train.batch_sequences(0, step, BATCH, SEQUENCES)])
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
    lines = [json.loads(line) for line in (reference[1][0] / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 11), 10, *range(11, 21), 20]
    promised = {"step", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"}
    assert all(line.keys() in (promised, {"step", "val_loss"}) for line in lines)
    assert all(line["tokens_per_s"] > 0 for line in lines[1:] if "loss" in line)  # the first step may compile


def test_tokens_per_second_are_those_of_the_steps_alone(data, tmp_path, monkeypatch):
    for name in ("save", "validate"):
        monkeypatch.setattr(train, name, lambda *args: time.sleep(0.5) or 0.0)
    train_here(flags(data, tmp_path / "out", "--steps=6", "--log_every=6", "--save_every=3", "--eval_every=4"))
    last = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-2])  # after it, the validation
    assert last["tokens_per_s"] > 6 * BATCH * N / 0.5  # that of a run without any of the half seconds


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


def test_without_wandb_the_error_names_the_package_and_nothing_is_written(monkeypatch, data, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb"):
        train.main(flags(data, tmp_path / "out", "--wandb"))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Killed and stopped: the continuation must be the run that was never stopped. Checkpoints fall on steps 8, 16 and 20.


NO_CHECKPOINT, HALF_LINE, IGNORED = partial(leave_room, 20_000), partial(leave_room, 20), partial(signal.signal, SIGHUP)
STOPS = {  # name: patches, exit status, step of the checkpoint that is left, what the last line says
    "before the first checkpoint": ([at_step(6, SIGKILL)], -SIGKILL, None, ""),
    "between checkpoints": ([at_step(14, SIGKILL)], -SIGKILL, 8, ""),
    "in the middle of writing the first checkpoint": ([before("torch.save", 1, half_then_kill)], -SIGKILL, None, ""),
    "in the middle of writing a checkpoint": ([before("torch.save", 2, half_then_kill)], -SIGKILL, 8, ""),
    "before the rename": ([before("os.replace", 2, SIGKILL)], -SIGKILL, 8, ""),
    "in the middle of a log line": ([at_line(13, half_then_kill)], -SIGKILL, 8, ""),
    "by SIGTERM": ([at_step(6, SIGTERM)], 0, 6, "step 6: --resume continues"),
    "by SIGTERM, again while it saves": ([at_step(6, SIGTERM), before("torch.save", 1, SIGTERM)], 0, 6, "step 6:"),
    "by Ctrl-C": ([at_step(14, SIGINT)], 0, 14, "step 14: --resume continues"),
    "by a second Ctrl-C, at once": ([at_step(14, SIGINT), before("torch.save", 2, SIGINT)], 1, 8, "KeyboardInterrupt"),
    "by SIGUSR1": ([at_step(6, SIGUSR1)], 0, 6, "step 6: --resume continues"),
    "by SIGHUP": ([at_step(6, SIGHUP)], 0, 6, "step 6: --resume continues"),
    "by Ctrl-C, which ends a tee too": ([at_step(6, close_pipe), at_step(8, SIGINT)], 0, 8, "step 5/20"),
    "not by SIGHUP under nohup": ([partial(IGNORED, SIG_IGN), at_step(6, SIGHUP)], 0, 20, "validation loss"),
    "not by a closed pipe": ([at_step(6, close_pipe)], 0, 20, "step 5/20"),
    "not by output to a full disk": ([at_step(6, fill_disk)], 0, 20, "step 5/20"),
    "by a disk too full for a checkpoint": ([at_line(11, NO_CHECKPOINT)], 2, 8, "no checkpoint of step 16 could be"),
    "by a disk too full for a log line": ([at_line(12, HALF_LINE)], 2, 8, "log.jsonl could not be written"),
    "by an infinite learning rate": ([at_step(10, math.inf)], 2, 8, "step 11: {out}/ckpt.pt is from before"),
    "by one before the first checkpoint": ([at_step(3, math.inf)], 2, None, "step 4: there is no checkpoint yet"),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_says_so_and_resumes_bit_for_bit(data, reference, tmp_path, name):
    patches, status, step, words = STOPS[name]
    end = run(flags(data, tmp_path / "out"), *patches)
    assert (end.returncode, checkpoint(tmp_path / "out")["step"]) == (status, step), end.stderr
    if status != -SIGKILL:
        said = (end.stderr if status else end.stdout).splitlines()
        assert words.format(out=tmp_path / "out") in (said[-1] if status != 1 else end.stderr)
        assert status != 2 or len(said) == 1
        assert not (tmp_path / "out" / "ckpt.tmp").exists()
    known = [] if step else flags(data, tmp_path / "out")  # flags that are not given come from the checkpoint
    again = run([*known, "--resume", f"--out={tmp_path / 'out'}"])
    assert again.returncode == 0, again.stderr
    assert resumed(tmp_path / "out") == [{"resumed": step or 0, "changed": {}}]
    assert_same_run(tmp_path / "out", reference[1][0])


def test_a_run_killed_twice_resumes_bit_for_bit(data, reference, tmp_path):
    argv = flags(data, tmp_path / "out")
    assert run(argv, at_step(14, SIGKILL)).returncode == -SIGKILL
    assert run([*argv, "--resume"], at_step(19, SIGKILL)).returncode == -SIGKILL
    assert checkpoint(tmp_path / "out")["step"] == 16
    assert run([*argv, "--resume"]).returncode == 0
    assert_same_run(tmp_path / "out", reference[1][0])


def test_a_resumed_run_may_be_made_longer_and_take_other_data_and_says_so(capsys, reference, tmp_path):
    out = shutil.copytree(reference[1][0], tmp_path / "out")
    other = make_data(tmp_path / "other", FOX[1:1000], FOX[:700])
    train_here(["--resume", f"--out={out}", f"--data={other}", "--steps=25", "--lr=1e-3"])
    assert f"changed from here on: --data={other} --steps=25 --lr=0.001\n" in capsys.readouterr().out
    assert resumed(out) == [{"resumed": 20, "changed": {"data": str(other), "steps": 25, "lr": 1e-3}}]
    cfg = configure(["--steps=25", "--lr=1e-3", "--warmup=0"])
    rates = [line["lr"] for line in log(out) if line["step"] > 20 and "loss" in line]
    assert rates == [train.learning_rate(step, cfg) for step in range(20, 25)]
    assert checkpoint(out)["step"] == 25


def test_a_resumed_run_that_diverges_at_once_still_has_its_checkpoint(capsys, reference, tmp_path):
    out = shutil.copytree(reference[1][0], tmp_path / "out")
    with pytest.raises(SystemExit):
        train.main(["--resume", f"--out={out}", "--steps=25", "--save_every=99", "--lr=1e38"])
    assert f"at step 22: {out}/ckpt.pt is from before; a lower --lr may help\n" in capsys.readouterr().err


def test_a_resumed_run_maps_its_checkpoint_and_drops_it_before_the_first_step(monkeypatch, reference, tmp_path):
    out, read, alive = shutil.copytree(reference[1][0], tmp_path / "out"), [], []
    load, rate = train.load_checkpoint, train.learning_rate

    def load_checkpoint(path):
        with mock.patch("torch.load", wraps=torch.load) as mapped:
            found = load(path)
        assert mapped.call_args.kwargs["mmap"]  # memory only for what is used
        read.extend(weakref.ref(x) for x in found["model"].values())
        return found

    def learning_rate(*args):
        gc.collect()
        alive.append(sum(x() is not None for x in read))
        return rate(*args)

    monkeypatch.setattr(train, "load_checkpoint", load_checkpoint)
    monkeypatch.setattr(train, "learning_rate", learning_rate)
    train_here(["--resume", f"--out={out}", "--steps=21"])
    assert read and alive == [0]


def second_run(*args):
    with pytest.raises(SystemExit):
        train.main([*sys.argv[1:], "--resume"])


def test_a_second_run_is_refused_while_the_first_runs(data, reference, tmp_path):
    end = run(flags(data, tmp_path / "out"), at_step(5, second_run))
    assert end.returncode == 0, end.stderr
    (line,) = end.stderr.splitlines()
    assert line.startswith(f"train.py: another process is working in {tmp_path / 'out'}")
    assert_same_run(tmp_path / "out", reference[1][0])


def with_evaluation(tmp_path):
    folder = make_data(tmp_path / "data", FOX[: SEQUENCES * N + 1], np.full(4097, 32))
    return flags(folder, tmp_path / "out", "--steps=1", "--eval_trials=1", "--train_len=256")


def test_ctrl_c_ends_the_evaluation_after_training(tmp_path):
    end = run(with_evaluation(tmp_path), before("train.eval_passkey.evaluate", 1, SIGINT))
    assert end.returncode == 1 and end.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_a_signal_in_the_last_step_skips_the_evaluation(tmp_path):
    patches = before("torch.save", 1, SIGTERM), before("train.eval_passkey.evaluate", 1, SIGKILL)
    end = run(with_evaluation(tmp_path), *patches)
    assert end.returncode == 0 and checkpoint(tmp_path / "out")["step"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_process_takes_its_part_of_each_batch(reference, world):
    order = np.concatenate([np.random.default_rng((0, epoch)).permutation(SEQUENCES) for epoch in range(4)])
    parts = order[: (STEPS + 1) * BATCH].reshape(STEPS + 1, world, -1, 2)  # the next batch is read ahead
    for rank in range(world):
        taken = re.findall(rf"rank {rank} takes (\[.*?\])", reference[world][1])
        assert [x for sequences in taken for x in np.ravel(json.loads(sequences))] == parts[:, rank].ravel().tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_agree_with_one(reference, world):
    one, many = reference[1][0], reference[world][0]
    assert logged(one, "loss")[0] - logged(one, "loss")[-1] > 0.5
    for name, tolerance in dict(step=0, lr=0, loss=1e-5, val_loss=1e-5, grad_norm=1e-4).items():
        assert logged(many, name) == pytest.approx(logged(one, name), rel=tolerance, abs=0), name


FAILED = "no matter, but not 0"
PAIRS = {  # as STOPS: the rank with the patches, the patches, the status of rank 0 and 1, the checkpoint's step, words
    "rank 0 killed before the rename": (0, [before("os.replace", 2, SIGKILL)], [-SIGKILL, FAILED], 8, ""),
    "rank 1 killed between checkpoints": (1, [at_step(19, SIGKILL)], [FAILED, -SIGKILL], 16, ""),
    "rank 1 asked to stop": (1, [at_step(6, SIGTERM)], [0, 0], 6, "step 6: --resume continues"),
    "full disk": (0, [before("os.fsync", 2, OSError("No space left"))], [2, FAILED], 8, "No space left"),
    "full disk at a log line": (0, [at_line(12, HALF_LINE)], [2, FAILED], 8, "log.jsonl could not be written"),
    "infinite learning rate": (None, [at_step(10, math.inf)], [2, 2], 8, "/ckpt.pt is from before"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_stop_together_and_resume_bit_for_bit(data, reference, tmp_path, name):
    rank, patches, status, step, words = PAIRS[name]
    end = run(flags(data, tmp_path / "out"), *patches, world=2, rank=rank)
    assert [code == want or (want == FAILED and code != 0) for code, want in zip(end.returncode, status)] == [True] * 2
    assert checkpoint(tmp_path / "out")["step"] == step, end.stderr
    assert words in end.stderr + end.stdout and len(
        [line for line in ours(end.stderr) if line.startswith("train.py")]
    ) == (status[0] == 2)
    again = run(flags(data, tmp_path / "out", "--resume"), world=2)
    assert again.returncode == [0, 0], again.stderr
    assert_same_run(tmp_path / "out", reference[2][0])


def print_file(file, *args):
    print(f"rank {os.environ['RANK']} hashes {file.name}", flush=True)


def test_one_process_reads_the_whole_data(data, tmp_path):
    end = run(flags(data, tmp_path / "out", "--steps=1"), before("hashlib.file_digest", 0, print_file), world=2)
    assert end.returncode == [0, 0], end.stderr
    assert re.findall("rank . hashes .*/(.*)", end.stdout) == ["train.bin", "val.bin"]


def test_two_processes_say_once_that_they_do_not_share_a_folder(data, reference, tmp_path):
    shutil.copytree(reference[1][0], tmp_path / "run")
    (tmp_path / "run-of-rank-1").mkdir()
    other = partial(exec, "import sys; sys.argv[-1] += '-of-rank-1'")
    end = run([*FLAGS, f"--data={data}", "--resume", f"--out={tmp_path / 'run'}"], other, world=2, rank=1)
    (line,) = ours(end.stderr)
    assert end.returncode == [2, 2] and "--out must be a folder that all share" in line


def set_environment(variables):
    os.environ.update(variables)


def test_what_a_launcher_forgot_is_one_line(data, tmp_path):
    environment = dict(RANK="0", WORLD_SIZE="1", MASTER_PORT="1")
    end = run(flags(data, tmp_path / "out"), partial(set_environment, environment))
    (line,) = end.stderr.splitlines()
    assert end.returncode == 2 and "the processes cannot find each other" in line and "MASTER_ADDR" in line
    assert not (tmp_path / "out").exists()


def test_without_a_rank_it_trains_alone_whatever_other_variables_say(data, reference, tmp_path):
    left = dict(WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1")
    end = run(flags(data, tmp_path / "out"), partial(set_environment, left))
    assert end.returncode == 0 and "step 20/20" in end.stdout
    assert_same_run(tmp_path / "out", reference[1][0])


def test_torchrun_sigterm_saves_at_an_agreed_step(data, tmp_path):
    argv = flags(data, tmp_path / "out", "--steps=100000", "--save_every=100000")
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", *argv)
    next(line for line in process.stdout if line.startswith("step 20/"))
    process.terminate()
    stdout, stderr = process.communicate(timeout=200)  # torchrun's own status is not 0: it was asked to end
    step = checkpoint(tmp_path / "out")["step"]
    assert step >= 20 and f"step {step}:" in stdout.splitlines()[-1]
    assert "in train\n" not in stderr  # no rank left with a traceback of its own


def test_two_agents(data, reference, tmp_path):
    meet = f"--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{free_port()} --local_addr=127.0.0.1".split()
    agent = ["-m", "torch.distributed.run", *meet, ROOT / "train.py", *flags(data, tmp_path / "out")]
    for process in [start(*agent), start(*agent)]:
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
    assert logged(tmp_path / "out", "loss") == pytest.approx(logged(reference[1][0], "loss"), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile and --init_from


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_loss_is_eager_loss(data, reference, tmp_path):
    end = run(flags(data, tmp_path / "out", "--compile=on"))
    assert end.returncode == 0, end.stderr
    assert "compiled" in end.stdout.splitlines()[0]
    assert logged(tmp_path / "out", "loss") == pytest.approx(logged(reference[1][0], "loss"), rel=0, abs=1e-4)
    assert checkpoint(tmp_path / "out")["model"].keys() == checkpoint(reference[1][0])["model"].keys()


def test_no_compiler_means_eager_and_a_line_that_says_so(data, tmp_path):
    argv = flags(data, tmp_path / "out", "--compile=auto", "--steps=1")
    env = dict(PATH=str(tmp_path), CXX="/nonexistent", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    process = start(ROOT / "train.py", *argv, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), **env)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0 and checkpoint(tmp_path / "out")["step"] == 1, stderr
    assert re.search("eager.*torch.compile does not work here", stdout.splitlines()[0])


def test_no_compiler_is_bad_input_to_compile_on(data, tmp_path):
    error = OSError("no compiler\nand pages of details")
    end = run(flags(data, tmp_path / "out", "--compile=on"), before("torch.compile", 1, error))
    assert end.returncode == 2 and end.stderr == "train.py: --compile=on does not work here: OSError: no compiler\n"
    assert not (tmp_path / "out").exists()


def test_a_cache_folder_that_cannot_be_made_is_one_line(data, tmp_path):
    (tmp_path / "file").write_text("")
    process = start(ROOT / "train.py", *flags(data, tmp_path / "out"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file"))
    _, stderr = process.communicate(timeout=200)
    (line,) = stderr.splitlines()
    assert process.returncode == 2 and str(tmp_path / "file") in line and "set TORCHINDUCTOR_CACHE_DIR" in line
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_takes_other_settings_of_the_optimizer_and_refuses_what_is_drawn(data, tmp_path):
    argv = ["--resume", f"--out={tmp_path / 'out'}", "--steps=3"]
    assert run(flags(data, tmp_path / "out", "--steps=2", "--optimizer=muon")).returncode == 0
    end = run([*argv, "--weight_decay=0.5", "--beta1=0.7"])
    assert end.returncode == 0, end.stderr
    adamw, muon = (state["param_groups"][0] for state in checkpoint(tmp_path / "out")["optimizer"])
    assert adamw["weight_decay"] == muon["weight_decay"] == 0.5 and adamw["betas"] == (0.7, 0.95)
    end = run([*argv, "--sigma=1"])
    assert end.returncode == 2 and "cannot change --sigma" in end.stderr


def test_the_same_command_works_after_a_crash_in_the_first_step(data, tmp_path):
    assert (
        run(flags(data, tmp_path / "out"), before("model.MLP.forward", 1, ZeroDivisionError("a bug"))).returncode == 1
    )
    assert run(flags(data, tmp_path / "out", "--steps=2", f"--seed={2**60}")).returncode == 0


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


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line on stderr, status 2, nothing written


@pytest.fixture(scope="module")
def folders(data, reference, tmp_path_factory):
    """{d}/NAME in the cases below."""
    d = tmp_path_factory.mktemp("bad")
    make_data(d / "short", FOX[:N], FOX[:700])
    shutil.copytree(data, d / "words")
    (d / "words" / "meta.json").write_text((data / "meta.json").read_text().replace('"bytes"', '"words"'))
    shutil.copytree(reference[1][0], d / "run")
    shutil.copytree(reference[1][0], d / "cut")
    (d / "cut" / "ckpt.pt").write_bytes((d / "run" / "ckpt.pt").read_bytes()[:20_000])
    (d / "file").write_text("not a folder\n")
    old = checkpoint(d / "run")
    old["optimizer"][1]["param_groups"] *= 2  # Muon once had a group for each shape
    (d / "old").mkdir()
    torch.save(old, d / "old" / "ckpt.pt")
    return d


BAD = {  # flags, and what the line must contain
    "no data": ("--data={d}/nothing", "train.bin"),
    "small vocabulary": ("--vocab_size=64", "--vocab_size 64 is less than the 257 tokens"),
    "short corpus": ("--data={d}/short", "train.bin has 32 tokens, val.bin 700, and they need 33 and 33"),
    "evaluation of a short text": ("--eval_trials=1 --train_len=256", "val.bin 700, and they need 257 and 4097"),
    "init_from nothing": ("--init_from={d}/nothing", "there is no checkpoint"),
    "init_from another shape": ("--init_from={d}/run --n_embd=64", "leave out the flags"),
    "init_from other heads": ("--init_from={d}/run --n_head=1 --pos=rope", "leave out the flags"),
    "init_from other tokens": ("--init_from={d}/run --data={d}/words", "words tokens, the checkpoint has bytes tokens"),
    "unknown flag": ("--learning_rate=1", "--learning_rate=1 (--help lists the flags)"),
    "not finite": ("--lr=nan", "--lr nan must be at least 0"),
    "batch no multiple": ("--batch_tokens=100", "--batch_tokens 100 is not a multiple of 32"),
    "out inside a file": ("--out={d}/file/out", "{d}/file"),
    "out exists": ("--out={d}/run", "--resume continues it"),
    "resume a folder that is not there": ("--out={d}/nowhere --resume", "there is no {d}/nowhere to resume"),
    "resume half a checkpoint": ("--out={d}/cut --resume", "not a whole checkpoint"),
    "resume another shape": ("--out={d}/run --resume --n_embd=64", "cannot change the model"),
    "resume with another optimizer": ("--out={d}/run --resume --optimizer=adamw", "or the optimizer"),
    "resume another version": ("--out={d}/old --resume", "optimizer state of another version"),
    "resume with other tokens": ("--out={d}/run --resume --data={d}/words", "words tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(capsys, data, folders, tmp_path, name):
    argv, expected = (text.format(d=folders) for text in BAD[name])
    contents = [(path, path.read_bytes()) for path in folders.rglob("*") if path.is_file()]
    with pytest.raises(SystemExit) as end:
        train.main(flags(data, tmp_path / "out", *argv.split()))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and expected in line
    assert not (tmp_path / "out").exists()
    assert [(path, path.read_bytes()) for path in folders.rglob("*") if path.is_file()] == contents
