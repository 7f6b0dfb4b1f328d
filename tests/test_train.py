"""train.py: data order, AdamW, stopped and resumed runs, several processes, bad input. All on the CPU in float32."""

import dataclasses
import json
import math
import os
import re
import shutil
import sys
from functools import partial
from signal import SIG_IGN, SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1, signal

import numpy as np
import pytest
import torch
from chaos import chaos
from stops import ROOT, before, free_port, half_then_kill, leave_room, run, start

import train
from data import prepare
from data.tokenizer import get_tokenizer
from model import GPT

# 45 sequences, 8 a step: every sixth batch or so straddles two epochs. 4 micro-batches of 2 sequences on one process.
STEPS, N, BATCH, SEQUENCES = 20, 32, 8, 45
FLAGS = (
    f"--n_layer=1 --n_head=2 --n_embd=32 --n_hidden=64 --train_len={N} --batch_tokens={BATCH * N} "
    f"--micro_tokens={2 * N} --steps={STEPS} --warmup=0 --lr=2e-3 --init_std=0.02 --log_every=1 --eval_every=10 "
    "--save_every=8 --eval_trials=0 --compile=off --dtype=float32 --device=cpu"
).split()
FOX = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 100, dtype=np.uint8).astype(np.uint16)


def write_data(folder, tokens=FOX[: SEQUENCES * N + 1], val_tokens=FOX[:700]):
    prepare.write(folder, get_tokenizer("bytes"), tokens, val_tokens.astype(np.uint16), {"source": "a fox"})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "fox")


def flags(data, out, *more):
    return [*FLAGS, f"--data={data}", f"--out={out}", *more]


def configure(argv):
    return train.configure(train.parse_flags(argv))


at_step = partial(before, "train.learning_rate")  # its n-th call begins step n of a run
at_line = partial(before, "train.Log.write")  # lines 1 to 10 are steps, 11 the validation, 12 is step 11


def log(out):
    """log.jsonl without what depends on the machine."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu")} for line in lines]


def logged(out, name):
    return [line[name] for line in log(out) if name in line]


def checkpoint(out):
    return torch.load(out / "ckpt.pt", weights_only=True) if (out / "ckpt.pt").exists() else {"step": None}


def assert_same_run(out, reference):
    """Bit for bit: weights, optimizer, log. And no temporary file is left."""
    (saved, expected) = ([checkpoint(run)[name] for name in ("step", "model", "optimizer")] for run in (out, reference))
    torch.testing.assert_close(saved, expected, rtol=0, atol=0)
    assert log(out) == log(reference)
    assert sorted(path.name for path in out.iterdir()) == ["ckpt.pt", "log.jsonl"]


def ours(stderr):
    """The lines that the command itself wrote, without the warnings of torch."""
    return [line for line in stderr.splitlines() if line.startswith("train.py: ") or "Error" in line]


def set_environment(variables):
    os.environ.update(variables)


def lose_cache(*args):
    """As if the disk that holds torch.compile's cache went away."""
    folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    shutil.rmtree(folder)
    open(folder, "w").close()


def print_sequences(tokens, sequences, *args):
    if len(tokens) == SEQUENCES * N + 1:  # not those of the validation
        print(f"rank {os.environ.get('RANK', 0)} takes {sequences.tolist()}", flush=True)


def assert_buffers_stay(model, *args):
    assert not model.will_sync_module_buffers()  # DDP sends no buffers from rank 0 at each step: they never change


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """The run that nothing stops, by its number of processes: (its folder, what it printed)."""
    tmp, runs = tmp_path_factory.mktemp("reference"), {}
    looks = [before("train.take", 0, print_sequences)]
    looks += [before("train.DistributedDataParallel.forward", 1, assert_buffers_stay)]
    for world in (1, 2, 4):
        end = run(flags(data, tmp / str(world)), *looks, world=world)
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


def test_help_gives_every_flag_its_meaning_type_and_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_flags(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{group}:" in text for group in ("model", "position", "training", "logging", "machine"))
    for f in dataclasses.fields(train.TrainConfig):
        assert re.search(rf"--{f.name} [^-]\S.*?\({f.type.__name__}, default {f.default!r}\)", text), f.name


def test_each_epoch_is_a_permutation_of_its_own():
    order = np.concatenate([train.batch_sequences(5, step, 100, 45) for step in range(9)])  # 20 epochs of 45 sequences
    assert order.tolist() == np.concatenate([np.random.default_rng((5, i)).permutation(45) for i in range(20)]).tolist()


@pytest.mark.parametrize("preset, last", [("60M", 3e-4), ("tiny", 0.0)])
def test_learning_rate_is_linear_then_a_cosine_to_the_presets_share_of_it(preset, last):
    cfg = configure([f"--model={preset}", "--lr=3e-3", "--warmup=20", "--steps=200"])
    rates = [train.learning_rate(step, cfg) for step in range(201)]
    assert rates[:20] == pytest.approx([3e-3 * (step + 1) / 20 for step in range(20)])
    cosine = [0.5 + 0.5 * math.cos(math.pi * i / 180) for i in range(181)]
    assert rates[20:] == pytest.approx([last + (3e-3 - last) * x for x in cosine])


def fresh(argv):
    """The model that train.py begins with."""
    cfg = configure(argv)
    cfg.vocab_size = 320  # 257 padded to a multiple of 64
    return GPT(cfg)


def test_three_steps_are_clipped_adamw_with_decay_on_every_parameter(data, tmp_path):
    argv = flags(data, tmp_path / "out", "--steps=3", "--micro_tokens=256", "--beta2=0.8", "--lr=3e-3")
    argv += ["--optimizer=adamw", "--final_lr=0.1"]
    assert run(argv).returncode == 0
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


def test_muon_takes_the_steps_of_torchs():
    shapes, generator = [(8, 24), (24, 8), (8, 24)], torch.Generator().manual_seed(0)
    starts, *grads = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4))
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    options = dict(lr=0.01, weight_decay=0.1)
    muon = train.Muon(ours, **options)
    torchs = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)  # its products are bfloat16
    for some in grads:
        for a, b, grad in zip(ours, theirs, some):
            a.grad, b.grad = grad.clone(), grad.clone()
        muon.step()
        torchs.step()
    for a, b, first in zip(ours, theirs, starts):
        assert (a - b).norm() < 0.02 * (a - first).norm()


@pytest.mark.parametrize("pos", ["fope", "fire"])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(pos):
    argv = [*FLAGS, f"--pos={pos}"]
    model, cfg = fresh(argv), configure(argv)
    names = {id(p): name.split(".", 2)[-1] for name, p in model.named_parameters()}
    adamw, muon = (
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in train.make_optimizers(model, cfg)
    )
    assert muon == {"attention.qkv.weight", "attention.out.weight", "mlp.gate_up.weight", "mlp.down.weight"}
    assert adamw == set(names.values()) - muon


def test_log_has_every_step_and_what_was_promised(reference):
    lines = [json.loads(line) for line in (reference[1][0] / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 11), 10, *range(11, 21), 20]
    promised = {"step", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"}
    assert all(line.keys() in (promised, {"step", "val_loss"}) for line in lines)
    assert all(line["tokens_per_s"] > 0 for line in lines[1:] if "loss" in line)  # the first step may compile


def test_every_run_leaves_loss_png(monkeypatch, data, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(data, tmp_path / "out", "--steps=2")])
    train.main()
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_wandb_logs_the_loss(monkeypatch, data, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(data, tmp_path / "out", "--steps=2", "--wandb")])
    run_class, seen = wandb.sdk.wandb_run.Run, []
    real = run_class.log
    monkeypatch.setattr(run_class, "log", lambda self, values, step: (seen.append(values), real(self, values, step)))
    train.main()
    assert [values["loss"] for values in seen if "loss" in values] == logged(tmp_path / "out", "loss")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb")) and wandb.run is None  # written and finished
    wandb.teardown()  # its service would complain when pytest ends


def test_without_wandb_one_line_names_the_package(data, tmp_path):
    end = run(flags(data, tmp_path / "out", "--wandb"), partial(exec, "import sys; sys.modules['wandb'] = None"))
    assert end.returncode == 2
    (line,) = end.stderr.splitlines()
    assert line.startswith("train.py: --wandb does not work (ModuleNotFoundError") and "pip install wandb" in line
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Killed and stopped: the continuation must be the run that was never stopped. Checkpoints fall on steps 8, 16 and 20.


def close_pipe(*args):
    """From now on, stdout is a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


def fill_disk(*args):
    """From now on, stdout is on a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


NO_CHECKPOINT, HALF_LINE, ENOUGH = (partial(leave_room, size) for size in (20_000, 20, 10**9))
STOPS = {  # name: patches, exit status, step of the checkpoint that is left, what the last line says
    "before the first checkpoint": ([at_step(6, SIGKILL)], -SIGKILL, None, ""),
    "between checkpoints": ([at_step(14, SIGKILL)], -SIGKILL, 8, ""),
    "in the middle of writing the first checkpoint": ([before("torch.save", 1, half_then_kill)], -SIGKILL, None, ""),
    "in the middle of writing a checkpoint": ([before("torch.save", 2, half_then_kill)], -SIGKILL, 8, ""),
    "before the rename": ([before("os.replace", 2, SIGKILL)], -SIGKILL, 8, ""),
    "after the rename": ([at_step(17, SIGKILL)], -SIGKILL, 16, ""),
    "a log line past a checkpoint": ([at_step(18, SIGKILL)], -SIGKILL, 16, ""),
    "in the middle of a log line": ([at_line(14, half_then_kill)], -SIGKILL, 8, ""),
    "by SIGTERM": ([at_step(6, SIGTERM)], 0, 6, "step 6: --resume continues"),
    "by SIGTERM, again while it saves": ([at_step(6, SIGTERM), before("torch.save", 1, SIGTERM)], 0, 6, "step 6:"),
    "by Ctrl-C": ([at_step(14, SIGINT)], 0, 14, "step 14: --resume continues"),
    "by SIGUSR1": ([at_step(6, SIGUSR1)], 0, 6, "step 6: --resume continues"),
    "by SIGHUP": ([at_step(6, SIGHUP)], 0, 6, "step 6: --resume continues"),
    "by Ctrl-C, which ends a tee too": ([at_step(6, close_pipe), at_step(8, SIGINT)], 0, 8, "step 5/20"),
    "not by SIGHUP under nohup": ([partial(signal, SIGHUP, SIG_IGN), at_step(6, SIGHUP)], 0, 20, "validation loss"),
    "not by a closed pipe": ([at_step(6, close_pipe)], 0, 20, "step 5/20"),
    "not by output to a full disk": ([at_step(6, fill_disk)], 0, 20, "step 5/20"),
    "by a disk too full for a checkpoint": ([at_line(12, NO_CHECKPOINT)], 2, 8, "step 16 could not be written"),
    "by a disk too full for a log line": ([at_line(12, HALF_LINE)], 2, 8, "step 12 could not be written"),
    "by a disk too full for a moment": ([at_line(12, HALF_LINE), at_line(13, ENOUGH)], 2, 12, "log.jsonl could not"),
    "by a disk too full in the last step": ([at_line(21, HALF_LINE), at_line(22, ENOUGH)], 2, 20, "log.jsonl could"),
    "by an infinite learning rate": ([at_step(10, math.inf)], 2, 8, "at step 11: the last checkpoint is from before"),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_says_so_and_resumes_bit_for_bit(data, reference, tmp_path, name):
    patches, status, step, words = STOPS[name]
    end = run(flags(data, tmp_path / "out"), *patches)
    assert (end.returncode, checkpoint(tmp_path / "out")["step"]) == (status, step), end.stderr
    if status != -SIGKILL:
        (said,) = end.stderr.splitlines() if status else end.stdout.splitlines()[-1:]
        assert words in said and "Traceback" not in end.stderr
        assert not (tmp_path / "out" / "ckpt.tmp").exists()
    resumed = run(flags(data, tmp_path / "out", "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "out", reference[1][0])


def test_a_run_killed_twice_resumes_bit_for_bit(data, reference, tmp_path):
    argv = flags(data, tmp_path / "out")
    assert run(argv, at_step(14, SIGKILL)).returncode == -SIGKILL
    assert run([*argv, "--resume"], at_step(11, SIGKILL)).returncode == -SIGKILL  # step 19, after 8
    assert checkpoint(tmp_path / "out")["step"] == 16
    assert run([*argv, "--resume"]).returncode == 0
    assert_same_run(tmp_path / "out", reference[1][0])


def test_three_random_stops_change_nothing(data, tmp_path):
    argv = flags(data, tmp_path / "out", "--steps=150", "--save_every=25")
    chaos(tmp_path, argv, rounds=3, seed=0)


def test_a_resumed_run_takes_the_flags_that_are_not_given_from_its_checkpoint(data, reference, tmp_path):
    assert run(flags(data, tmp_path / "out"), at_step(14, SIGTERM)).returncode == 0
    end = run(["--resume", f"--out={tmp_path / 'out'}"])
    assert end.returncode == 0, end.stderr
    assert_same_run(tmp_path / "out", reference[1][0])


def test_a_finished_run_can_be_made_longer(data, reference, tmp_path):
    shutil.copytree(reference[1][0], tmp_path / "out")
    end = run(["--resume", f"--out={tmp_path / 'out'}", "--steps=25", "--lr=1e-3"])
    assert end.returncode == 0, end.stderr
    assert "changed from here on: --steps=25 --lr=0.001\n" in end.stdout
    assert logged(tmp_path / "out", "changed") == [{"steps": 25, "lr": 1e-3}]
    cfg = configure(["--steps=25", "--lr=1e-3", "--warmup=0"])
    rates = [line["lr"] for line in log(tmp_path / "out") if line["step"] > 20 and "loss" in line]
    assert rates == [train.learning_rate(step, cfg) for step in range(20, 25)]
    assert checkpoint(tmp_path / "out")["step"] == 25


def test_a_checkpoint_with_adamw_alone_resumes(data, tmp_path):
    """Older versions saved one optimizer instead of a list of them, and no flags --optimizer and --final_lr."""
    argv = flags(data, tmp_path / "old", "--optimizer=adamw", "--final_lr=0.1", "--steps=10")
    assert run(argv).returncode == 0
    old = checkpoint(tmp_path / "old")
    old["optimizer"] = old["optimizer"][0]
    del old["config"]["optimizer"], old["config"]["final_lr"]
    (tmp_path / "new").mkdir()
    torch.save(old, tmp_path / "new" / "ckpt.pt")
    (tmp_path / "new" / "log.jsonl").write_bytes((tmp_path / "old" / "log.jsonl").read_bytes())
    for name in ("old", "new"):
        end = run(["--resume", f"--out={tmp_path / name}", "--steps=12"])
        assert end.returncode == 0, end.stderr
    assert_same_run(tmp_path / "new", tmp_path / "old")


def test_an_optimizer_state_of_another_shape_is_refused_in_one_line(data, tmp_path):
    argv = flags(data, tmp_path / "out", "--steps=10")
    assert run(argv).returncode == 0
    saved = checkpoint(tmp_path / "out")
    muon = saved["optimizer"][1]
    muon["param_groups"] = [muon["param_groups"][0] | {"params": [0, 1, 2, 3]}]  # as before its groups were by shape
    torch.save(saved, tmp_path / "out" / "ckpt.pt")
    end = run(["--resume", f"--out={tmp_path / 'out'}", "--steps=12"])
    assert end.returncode == 2 and len(ours(end.stderr)) == 1 and "another version" in end.stderr


def test_the_log_has_the_same_steps_stopped_or_not(data, tmp_path):
    """With lines at every fifth step, a stop at step 13 leaves no line of its own."""
    argv = flags(data, tmp_path / "out", "--log_every=5")
    assert run(argv, at_step(13, SIGTERM)).returncode == 0
    assert checkpoint(tmp_path / "out")["step"] == 13
    assert run([*argv, "--resume"]).returncode == 0
    assert [line["step"] for line in log(tmp_path / "out") if "loss" in line] == [1, 5, 10, 15, 20]


def second_run(*args):
    sys.argv.append("--resume")
    with pytest.raises(SystemExit):
        train.main()


def test_a_second_run_is_refused_while_the_first_runs(data, reference, tmp_path):
    end = run(flags(data, tmp_path / "out"), at_step(5, second_run))
    assert end.returncode == 0, end.stderr
    (line,) = end.stderr.splitlines()
    assert line.startswith(f"train.py: another process is working in {tmp_path / 'out'}")
    assert_same_run(tmp_path / "out", reference[1][0])


def with_evaluation(tmp_path):
    folder = write_data(tmp_path / "data", val_tokens=np.full(4097, 32))
    return flags(folder, tmp_path / "out", "--steps=1", "--eval_trials=1", "--train_len=256")


def test_ctrl_c_ends_the_evaluation_after_training(tmp_path):
    end = run(with_evaluation(tmp_path), before("train.eval_passkey.main", 1, SIGINT))
    assert end.returncode == 1 and end.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_a_signal_in_the_last_step_skips_the_evaluation(tmp_path):
    end = run(with_evaluation(tmp_path), before("torch.save", 1, SIGTERM))
    assert end.returncode == 0 and checkpoint(tmp_path / "out")["step"] == 1
    assert not (tmp_path / "out" / "eval.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_process_takes_its_part_of_each_batch(reference, world):
    order = np.concatenate([np.random.default_rng((0, epoch)).permutation(SEQUENCES) for epoch in range(4)])
    parts = order[: (STEPS + 1) * BATCH].reshape(STEPS + 1, world, -1, 2)  # the next batch is read ahead
    for rank in range(world):
        taken = re.findall(rf"rank {rank} takes (\[.*?\])", reference[world][1])
        assert [json.loads(sequences) for sequences in taken] == parts[:, rank].reshape(-1, 2).tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_agree_with_one(reference, world):
    one, many = reference[1][0], reference[world][0]
    assert logged(one, "loss")[0] - logged(one, "loss")[-1] > 0.5
    for name, tolerance in dict(step=0, lr=0, loss=1e-5, val_loss=1e-5, grad_norm=1e-4).items():
        assert logged(many, name) == pytest.approx(logged(one, name), rel=tolerance, abs=0), name


PAIRS = {  # as STOPS: the rank with the patches, the patches, the status of rank 0 and 1, the checkpoint's step, words
    "rank 0 killed before the rename": (0, [before("os.replace", 2, SIGKILL)], [-SIGKILL, 1], 8, ""),
    "rank 1 killed between checkpoints": (1, [at_step(19, SIGKILL)], [1, -SIGKILL], 16, ""),
    "rank 1 asked to stop": (1, [at_step(6, SIGTERM)], [0, 0], 6, "step 6: --resume continues"),
    "full disk": (0, [before("os.fsync", 2, OSError("No space left"))], [2, 2], 8, "No space left"),
    "full disk at a log line": (0, [at_line(12, HALF_LINE), at_line(13, ENOUGH)], [2, 0], 12, "log.jsonl could not"),
    "infinite learning rate": (None, [at_step(10, math.inf)], [2, 2], 8, "at step 11: the last checkpoint"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_stop_together_and_resume_bit_for_bit(data, reference, tmp_path, name):
    rank, patches, status, step, words = PAIRS[name]
    end = run(flags(data, tmp_path / "out"), *patches, world=2, rank=rank)
    assert (end.returncode, checkpoint(tmp_path / "out")["step"]) == (status, step), end.stderr
    if -SIGKILL not in status:
        (said,) = ours(end.stderr) if any(status) else end.stdout.splitlines()[-1:]
        assert words in said
    resumed = run(flags(data, tmp_path / "out", "--resume"), world=2)
    assert resumed.returncode == [0, 0], resumed.stderr
    assert_same_run(tmp_path / "out", reference[2][0])


REFUSED = {  # flags of both processes, what rank 1 does first, what the line must contain
    "no data": ("--data=nowhere", "", "train.bin: make it with"),
    "batch no multiple": ("--batch_tokens=96", "", "--batch_tokens 96"),
    "no shared folder": ("--resume --out={d}", "import sys; sys.argv[-1] += '2'", "a folder that all of them share"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_two_processes_say_once_what_is_wrong(data, reference, tmp_path, name):
    more, code, expected = REFUSED[name]
    argv = flags(data, tmp_path / "out", *more.format(d=reference[1][0]).split())
    end = run(argv, partial(exec, code), world=2, rank=1)
    (line,) = ours(end.stderr)
    assert end.returncode == [2, 2] and expected in line
    assert not (tmp_path / "out").exists()


HALF = {  # a launcher's environment of which a part is missing, and what the line must contain
    "no rank": (dict(WORLD_SIZE="2"), "no RANK and no LOCAL_RANK and no MASTER_ADDR"),
    "no address": (dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_PORT="1"), "no MASTER_ADDR: a launcher sets"),
    "only a local rank": (dict(LOCAL_RANK="1"), "no RANK and no WORLD_SIZE"),
    "no number": (dict(RANK="a", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1"), "'a'"),
}


@pytest.mark.parametrize("name", HALF)
def test_half_of_a_launchers_environment_is_one_line(data, tmp_path, name):
    environment, expected = HALF[name]
    end = run(flags(data, tmp_path / "out"), partial(set_environment, environment))
    (line,) = end.stderr.splitlines()
    assert end.returncode == 2 and expected in line
    assert not (tmp_path / "out").exists()


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
    end = run(flags(data, tmp_path / "out", "--compile=on"), before("torch.compile", 1, OSError()))
    assert (end.returncode, end.stderr) == (2, "train.py: torch.compile does not work here: OSError\n")
    assert not (tmp_path / "out").exists()


def test_a_cache_folder_that_cannot_be_made_is_one_line(data, tmp_path):
    (tmp_path / "file").write_text("")
    process = start(ROOT / "train.py", *flags(data, tmp_path / "out"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file"))
    _, stderr = process.communicate(timeout=200)
    (line,) = stderr.splitlines()
    assert process.returncode == 2 and str(tmp_path / "file") in line
    assert not (tmp_path / "out").exists()


def test_a_compiler_that_fails_in_the_first_step_leaves_no_folder(data, tmp_path):
    argv, cache = flags(data, tmp_path / "out", "--compile=on"), dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    end = run(argv, before("train.Log.__enter__", 1, lose_cache), partial(set_environment, cache))
    (line,) = end.stderr.splitlines()
    assert end.returncode == 2 and "--compile=off" in line and str(tmp_path / "cache") in line
    assert not (tmp_path / "out").exists()
    assert run([*argv[:-1], "--compile=off"]).returncode == 0


INIT = {  # flags of the run that the weights come from, flags of the one that takes them, whether any are drawn anew
    "RoPE to FoPE": ("--pos=rope", "--pos=fope", True),
    "FoPE at the same N": ("", "", False),
    "FoPE at another N": ("", "--train_len=64", True),
    "a series that goes beyond the floor": ("--n_freqs=12", "--n_freqs=12 --train_len=64", True),
}


@pytest.mark.parametrize("name", INIT)
def test_init_from_takes_the_weights_and_the_coefficients_of_kept_frequencies(data, tmp_path, name):
    old, new, anew = INIT[name]
    argv = flags(data, tmp_path / "new", f"--init_from={tmp_path / 'old'}", "--lr=0", "--steps=1", "--seed=3")
    assert run(flags(data, tmp_path / "old", "--steps=2", *old.split())).returncode == 0
    end = run([*argv, *new.split()])
    assert end.returncode == 0 and ("coefficients drawn anew" in end.stdout) == anew, end.stderr
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
    write_data(d / "large-val", val_tokens=np.full(700, 60_000))
    write_data(d / "short", FOX[:N])
    write_data(d / "other", FOX[1:1000])
    write_data(d / "words")
    (d / "words" / "meta.json").write_text((data / "meta.json").read_text().replace('"bytes"', '"words"'))
    shutil.copytree(reference[1][0], d / "run")
    shutil.copytree(reference[1][0], d / "cut")
    (d / "cut" / "ckpt.pt").write_bytes((d / "run" / "ckpt.pt").read_bytes()[:20_000])
    (d / "file").write_text("not a folder\n")
    return d


BAD = {  # flags, and what the line must contain
    "no data": ("--data={d}/nothing", "train.bin"),
    "token outside --vocab_size": ("--vocab_size=64", "outside the vocabulary of 64"),
    "validation token outside": ("--data={d}/large-val", "val.bin has token 60000, outside the vocabulary of 320"),
    "short corpus": ("--data={d}/short", "32 tokens: a sequence takes --train_len plus one"),
    "init_from nothing": ("--init_from={d}/nothing", "there is no checkpoint"),
    "init_from another shape": ("--init_from={d}/run --n_embd=64", "leave out the flags"),
    "init_from other heads": ("--init_from={d}/run --n_head=1 --pos=rope", "leave out the flags"),
    "init_from other tokens": (
        "--init_from={d}/run --data={d}/words",
        "run was trained on bytes",
    ),
    "unknown model": ("--model=7B", "tiny, 60M, 180M, 1.2B"),
    "unknown pos": ("--pos=xpos", "fope, rope, alibi, kerple, fire or nope"),
    "unknown device": ("--device=abacus", "abacus"),
    "unknown compile": ("--compile=perhaps", "auto, on or off"),
    "unknown flag": ("--learning_rate=1", "--learning_rate=1; python train.py --help"),
    "abbreviated flag": ("--warm=1", "--warm=1"),
    "no number": ("--lr=abc", "abc"),
    "no boolean": ("--fourier_series=maybe", "'maybe' is neither true nor false"),
    "negative seed": ("--seed=-1", "--seed must be at least 0"),
    "learning rate no number": ("--lr=nan", "--lr must be at least 0"),
    "clip zero": ("--clip=0", "--clip must be above 0"),
    "beta of one": ("--beta2=1", "--beta2 less than 1"),
    "validation under a sequence": ("--eval_tokens=31", "at least --train_len, 32"),
    "batch no multiple": ("--batch_tokens=100", "batch_tokens 100 is not a multiple of 32"),
    "evaluation without its tokenizer": ("--eval_trials=1 --data={d}/words", "tokenizer 'words' is unknown"),
    "evaluation of a short model": ("--eval_trials=1", "253 tokens: use another --train_len, or --eval_trials=0"),
    "evaluation of a short text": ("--eval_trials=1 --train_len=256", "takes 16 x --train_len + 1: use another"),
    "out inside a file": ("--out={d}/file/out", "{d}/file"),
    "out exists": ("--out={d}/run", "--resume"),
    "resume a folder that is not there": ("--out={d}/nowhere --resume", "no {d}/nowhere to resume"),
    "resume half a checkpoint": ("--out={d}/cut --resume", "not a whole checkpoint"),
    "resume with other data": ("--out={d}/run --resume --data={d}/other", "other data"),
    "resume with fewer steps": ("--out={d}/run --resume --steps=5", "trained for 20 steps"),
    "unknown optimizer": ("--optimizer=sgd", "adamw or muon"),
    "resume with another seed": ("--out={d}/run --resume --seed=1", "--seed=0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(data, folders, tmp_path, name):
    argv, expected = (text.format(d=folders) for text in BAD[name])
    contents = [(path, path.read_bytes()) for path in folders.rglob("*") if path.is_file()]
    end = run(flags(data, tmp_path / "out", *argv.split()))
    (line,) = end.stderr.splitlines()
    assert end.returncode == 2 and line.startswith("train.py: ") and expected in line
    assert not (tmp_path / "out").exists()
    assert [(path, path.read_bytes()) for path in folders.rglob("*") if path.is_file()] == contents
