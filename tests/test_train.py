"""train.py: data order, one process against many, killed and stopped runs, bad input. All on the CPU in float32."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stops import KILL, on_call

import train
from data import prepare
from data.tokenizer import get_tokenizer
from model import GPT

ROOT = Path(__file__).resolve().parent.parent

# 45 sequences, 8 a step: every sixth batch or so straddles two epochs. 4 micro batches of 2 sequences on one process.
STEPS, N, BATCH, SEQUENCES = 20, 32, 8, 45
FLAGS = (
    f"--n_layer=1 --n_head=2 --n_embd=32 --n_hidden=64 --train_len={N} --batch_tokens={BATCH * N} --micro_tokens={2 * N} --steps={STEPS} "
    "--warmup=0 --lr=2e-3 --init_std=0.02 --log_every=1 --eval_every=10 --save_every=8 --eval_trials=0 "
    "--compile=off --dtype=float32 --device=cpu"
).split()
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TERM = "os.kill(os.getpid(), signal.SIGTERM)"


def write_data(folder, train_tokens=None, val_tokens=None):
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 100, dtype=np.uint8).astype(np.uint16)
    default = text[: SEQUENCES * N + 1], text[:700]
    tokens = [
        np.asarray(d if given is None else given, dtype=np.uint16)
        for d, given in zip(default, (train_tokens, val_tokens))
    ]
    prepare.write(folder, get_tokenizer("bytes"), *tokens, {"source": "a fox"})
    return folder


def flags(data, out, *more):
    return [*FLAGS, f"--data={data}", f"--out={out}", *more]


# One process imports torch and forks the processes of every job: real ones to kill, without an import for each. To
# train.py, several of them are what torchrun starts: the same variables are set.
FORKS = """
import io, json, os, resource, signal, socket, sys, traceback
import torch
import torch._dynamo  # every optimizer imports it: a second
import train
from data import prepare

train.plot.loss_figure = lambda *args: None  # drawing takes longer than these runs

def child(argv, patch, out, err):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.alarm(100)  # a process that hangs is a failure (status -14), not a wait without end
    status = 1
    try:
        sys.argv = ["train.py", *argv]
        exec(patch, globals())
        train.main()
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for world, *job in json.load(sys.stdin):
    if world > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    started = []
    for rank in range(world):
        if world > 1:
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        started.append(os.fork())
        if started[-1] == 0:
            child(*job)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]), flush=True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
"""


def run_jobs(tmp, jobs, world=1):
    """Run train.main() once for each (flags, code that patches it): a CompletedProcess for each job.

    With world > 1 every job is that many processes, and returncode a list.
    """
    orders = [
        (world, argv, patch, str(tmp / f"{world}-{i}.out"), str(tmp / f"{world}-{i}.err"))
        for i, (argv, patch) in enumerate(jobs)
    ]
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input=json.dumps(orders), env=ENV, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ends = []
    for (_, argv, _, out, err), line in zip(orders, done.stdout.splitlines(), strict=True):
        status = json.loads(line)
        ends.append(
            subprocess.CompletedProcess(
                argv, status if world > 1 else status[0], Path(out).read_text(), Path(err).read_text()
            )
        )
        Path(out).unlink(), Path(err).unlink()
    return ends


def start(command, **kwargs):
    kwargs = dict(env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) | kwargs
    return subprocess.Popen([sys.executable, *map(str, command)], **kwargs)


def torchrun(processes, argv, patch="", rendezvous=("--standalone",)):
    """Start torchrun on train.main(), patched."""
    code = f"import json, os, signal\nimport train\n{patch}\ntrain.main()"
    launcher = ["-m", "torch.distributed.run", *rendezvous, f"--nproc_per_node={processes}", "--no-python"]
    return start([*launcher, sys.executable, "-c", code, *argv])


def finish(process):
    """Wait for it: a CompletedProcess."""
    try:
        stdout, stderr = process.communicate(timeout=200)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def at_step(step, action):
    """Code that runs `action` when 0-based `step` begins: `step` steps are done and logged."""
    return f"""
real_learning_rate = train.learning_rate
def learning_rate(step, cfg):
    if step == {step}:
        {action}
    return real_learning_rate(step, cfg)
train.learning_rate = learning_rate
"""


def record_sequences(folder):
    """Code that writes the training sequences of every micro batch into folder/RANK, a line each."""
    return f"""
real_take = train.take
def take(tokens, sequences, T, device):
    if len(tokens) == {SEQUENCES * N + 1}:
        with open({str(folder)!r} + "/" + os.environ.get("RANK", "0"), "a") as f:
            print(json.dumps(sequences.tolist()), file=f)
    return real_take(tokens, sequences, T, device)
train.take = take
"""


def log(out):
    """log.jsonl without what depends on the machine."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu")} for line in lines]


def train_log(out):
    return [line for line in log(out) if "loss" in line]


def ours(stderr):
    """The lines that the command itself wrote, without the warnings of torch."""
    return [line for line in stderr.splitlines() if line.startswith("train.py: ") or "Error" in line]


def checkpoint(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def state(out):
    """Everything that a continuation needs, tensors as bytes: equal if and only if the runs are, bit for bit."""

    def flat(x):
        if isinstance(x, torch.Tensor):
            return str(x.dtype), tuple(x.shape), x.numpy().tobytes()
        if isinstance(x, dict):
            return {k: flat(v) for k, v in x.items()}
        return [flat(v) for v in x] if isinstance(x, (list, tuple)) else x

    saved = checkpoint(out)
    return {name: flat(saved[name]) for name in ("step", "tokenizer", "model", "optimizer")}


def assert_same_run(out, reference):
    assert state(out) == state(reference)
    assert [line["step"] for line in train_log(out)] == list(range(1, STEPS + 1))
    assert log(out) == log(reference)
    assert not list(out.glob("*.tmp"))


def run_here(monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    train.main()


def refused(monkeypatch, capsys, argv):
    """train.main() ends with status 2 and one line on stderr: that line."""
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert end.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "fox")


# ---------------------------------------------------------------------------------------------------------------------
# The data order and the schedule


@pytest.mark.parametrize("batch, n", [(8, 45), (45, 45), (7, 8), (100, 45), (1, 3)])
def test_each_sequence_once_an_epoch(batch, n):
    steps = -(-3 * n // batch)
    order = np.concatenate([train.batch_sequences(0, step, batch, n) for step in range(steps)])
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_order_differs_between_epochs_and_seeds_and_repeats_under_one_seed():
    first, second = (train.batch_sequences(0, epoch, 45, 45).tolist() for epoch in (0, 1))
    assert first != second
    assert first != train.batch_sequences(1, 0, 45, 45).tolist()
    assert first != sorted(first)
    train.permutation.cache_clear()
    assert first == train.batch_sequences(0, 0, 45, 45).tolist()


def test_take_gives_tokens_and_the_same_shifted_by_one():
    tokens = (np.arange(1000) * 61 % 65_521).astype(np.uint16)
    x, y = train.take(tokens, np.array([3, 0, 98]), 10, torch.device("cpu"))
    assert x.dtype == y.dtype == torch.int64
    for row, sequence in enumerate((3, 0, 98)):
        assert x[row].tolist() == tokens[10 * sequence : 10 * sequence + 10].tolist()
        assert y[row].tolist() == tokens[10 * sequence + 1 : 10 * sequence + 11].tolist()


def test_learning_rate_is_linear_then_a_cosine_to_a_tenth():
    cfg = train.parse_flags(["--lr=3e-3", "--warmup=20", "--steps=200"])
    warm = [train.learning_rate(step, cfg) for step in range(20)]
    assert warm == pytest.approx([3e-3 * (step + 1) / 20 for step in range(20)])
    rest = [train.learning_rate(step, cfg) for step in range(20, 201)]
    assert rest == pytest.approx([3e-4 + 2.7e-3 * (0.5 + 0.5 * math.cos(math.pi * i / 180)) for i in range(181)])
    assert rest[0] == pytest.approx(3e-3) and rest[90] == pytest.approx(1.65e-3) and rest[-1] == pytest.approx(3e-4)
    no_warmup = train.parse_flags(["--lr=3e-3", "--warmup=0", "--steps=200"])
    assert train.learning_rate(0, no_warmup) == pytest.approx(3e-3)


def test_three_steps_are_clipped_adamw_with_decay_on_every_parameter(monkeypatch, data, tmp_path):
    argv = flags(data, tmp_path / "out", "--steps=3", "--micro_tokens=256", "--beta2=0.9", "--lr=3e-3")
    run_here(monkeypatch, argv)
    cfg = train.parse_flags(argv)
    cfg.vocab_size = 320  # 257 padded to a multiple of 64
    model, tokens = GPT(cfg), np.fromfile(data / "train.bin", dtype=np.uint16).astype(np.int64)
    mean, square = ({name: 0.0 for name, _ in model.named_parameters()} for _ in range(2))
    for step in range(3):
        rows = np.stack([tokens[i * N : i * N + N + 1] for i in train.batch_sequences(0, step, BATCH, SEQUENCES)])
        model.zero_grad()
        model(torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        assert norm > 1  # so that clipping is seen
        assert train_log(tmp_path / "out")[step]["grad_norm"] == pytest.approx(norm, rel=1e-5)
        lr = 3e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 3)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                grad = p.grad.double() / norm
                mean[name] = 0.9 * mean[name] + 0.1 * grad
                square[name] = 0.9 * square[name] + 0.1 * grad**2
                update = mean[name] / (1 - 0.9 ** (step + 1)) / ((square[name] / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
                p.copy_(p.double() * (1 - lr * 0.1) - lr * update)
    saved = checkpoint(tmp_path / "out")
    for name, p in model.named_parameters():
        torch.testing.assert_close(saved["model"][name], p.detach(), rtol=1e-4, atol=1e-6)
    groups = saved["optimizer"]["param_groups"]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert all(g["weight_decay"] == 0.1 and tuple(g["betas"]) == (0.9, 0.9) and g["eps"] == 1e-8 for g in groups)


def test_flags_win_over_the_preset_and_the_preset_over_the_default():
    cfg = train.parse_flags(["--model=60M", "--lr", "1e-3", "--clip_floor=false", "--resume"])
    assert (cfg.n_embd, cfg.batch_tokens, cfg.data) == (512, 524_288, "data/c4")
    assert (cfg.lr, cfg.clip_floor, cfg.fourier_series, cfg.resume) == (1e-3, False, True, True)
    assert cfg.out == "out/60M-fope-s0"


# ---------------------------------------------------------------------------------------------------------------------
# Killed and stopped: the continuation must be the run that was never stopped. Checkpoints fall on steps 8, 16 and 20.


def at_log_line(step, action):
    """Code that runs `action` before the first write of a line of `step`; `log`, `data` are there for it."""
    return f"""
class Log(io.FileIO):
    tried = False
    def write(log, data):
        if b'"step": {step},' in data and not log.tried:
            log.tried = True
            {action}
        return super().write(data)
real_lock = train.lock
train.lock = lambda path: Log(real_lock(path).name, "ab")
"""


def limit_file_size(size):
    """Code: from now on no file grows beyond `size` bytes. What stdout gets is a file too: away with it."""
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))"
    return f"os.dup2(os.open(os.devnull, os.O_WRONLY), 1); signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {limit}"


NO_LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)"
NO_SPACE = "raise OSError(28, 'No space left')"
HALF_CHECKPOINT = (
    f"b = io.BytesIO(); real(args[0], b); args[1].write(b.getvalue()[:len(b.getvalue()) // 2]); args[1].flush(); {KILL}"
)
HALF_LINE = f"super().write(data[:20]); {KILL}"
ROOM_FOR_HALF = limit_file_size("os.fstat(log.fileno()).st_size + 20")

STOPS = {  # name: what happens, the exit status, the step of the checkpoint that it leaves
    "before the first checkpoint": (at_step(5, KILL), -signal.SIGKILL, None),
    "between checkpoints": (at_step(13, KILL), -signal.SIGKILL, 8),
    "in the middle of writing the first checkpoint": (on_call("torch.save", 1, HALF_CHECKPOINT), -signal.SIGKILL, None),
    "in the middle of writing a checkpoint": (on_call("torch.save", 2, HALF_CHECKPOINT), -signal.SIGKILL, 8),
    "before the rename": (on_call("os.replace", 2, KILL), -signal.SIGKILL, 8),  # the log's, two checkpoints'
    "after the rename": (on_call("os.replace", 2, f"real(*args); {KILL}"), -signal.SIGKILL, 16),
    "a log line past a checkpoint": (at_step(17, KILL), -signal.SIGKILL, 16),
    "in the middle of a log line": (at_log_line(13, HALF_LINE), -signal.SIGKILL, 8),
    "by SIGTERM": (at_step(5, TERM), 0, 6),
    "by SIGTERM, again while it saves": (at_step(5, TERM) + on_call("torch.save", 1, TERM), 0, 6),
    "by Ctrl-C": (at_step(13, "os.kill(os.getpid(), signal.SIGINT)"), 0, 14),
    "by a disk too full for a checkpoint": (at_step(10, limit_file_size(20_000)), 2, 8),
    "by a disk too full for a log line": (at_log_line(11, ROOM_FOR_HALF), 2, 8),
    "by a disk too full for a moment": (at_log_line(11, ROOM_FOR_HALF) + at_step(11, NO_LIMIT), 2, 12),
    "by a disk too full for the last step": (at_log_line(20, NO_SPACE), 2, 20),
}
AGAIN = {  # these are killed a second time: late in the continuation, and where it cuts the log before it begins
    "between checkpoints": at_step(18, KILL),
}


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """Every stop of STOPS and its continuation, and a run that nothing stops.

    A dict: "reference" -> folder, "seen" -> its recorded sequences, and for every stop (folder, the process, the step of
    its checkpoint, the names of the files it left, the process that went on).
    """
    tmp = tmp_path_factory.mktemp("stopped")
    out = {name: tmp / name.replace(" ", "-") for name in STOPS}
    (tmp / "seen").mkdir()
    first = [(flags(data, tmp / "reference"), record_sequences(tmp / "seen"))]
    first += [(flags(data, out[name]), patch) for name, (patch, _, _) in STOPS.items()]
    reference, *ends = run_jobs(tmp, first)
    assert reference.returncode == 0, reference.stderr
    left = {name: (checkpoint(out[name])["step"] if (out[name] / "ckpt.pt").exists() else None) for name in STOPS}
    files = {name: sorted(path.name for path in out[name].iterdir()) for name in STOPS}
    second = [
        (flags(data, out[name], "--resume"), patch) for name, patch in [*AGAIN.items(), *((name, "") for name in STOPS)]
    ]
    resumed = run_jobs(tmp, second)
    for again in [resumed.pop(0) for _ in AGAIN]:
        assert again.returncode == -signal.SIGKILL, again.stderr
    runs = {name: (out[name], ends[i], left[name], files[name], resumed[i]) for i, name in enumerate(STOPS)}
    return {"reference": tmp / "reference", "seen": tmp / "seen", **runs}


def test_log_has_every_step_and_what_was_promised(stopped):
    lines = [json.loads(line) for line in (stopped["reference"] / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all({"loss", "lr", "grad_norm", "tokens_per_s", "mfu"} <= line.keys() for line in steps)
    assert all(line["tokens_per_s"] > 0 for line in steps[1:])  # the first step's time is compilation's
    assert [line["step"] for line in lines if "val_loss" in line] == [10, 20]


@pytest.mark.parametrize("name", STOPS)
def test_stopped_run_goes_on_bit_for_bit(stopped, name):
    out, end, left, files, resumed = stopped[name]
    _, status, step = STOPS[name]
    assert (end.returncode, left) == (status, step), end.stderr
    assert ("ckpt.tmp" in files) == (name.startswith("in the middle of writing") or name == "before the rename")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(out, stopped["reference"])


@pytest.mark.parametrize("name", ["by SIGTERM", "by SIGTERM, again while it saves", "by Ctrl-C"])
def test_polite_stop_says_at_which_step(stopped, name):
    _, end, left, files, _ = stopped[name]
    assert f"step {left}:" in end.stdout.splitlines()[-1]
    assert "--resume" in end.stdout.splitlines()[-1]
    assert "Traceback" not in end.stderr
    assert files == ["ckpt.pt", "log.jsonl"]


@pytest.mark.parametrize(
    "name, expected",
    [("a checkpoint", "step 16"), ("a log line", "step 12"), ("a moment", "log.jsonl"), ("the last step", "log.jsonl")],
)
def test_full_disk_is_one_line(stopped, name, expected):
    _, end, _, files, _ = stopped[f"by a disk too full for {name}"]
    assert len(end.stderr.splitlines()) == 1 and expected in end.stderr
    assert files == ["ckpt.pt", "log.jsonl"]


def test_ctrl_c_from_outside(data, tmp_path):
    process = start([ROOT / "train.py", *flags(data, tmp_path / "out", "--steps=100000", "--save_every=100000")])
    for line in process.stdout:
        if line.startswith("step 20/"):
            break
    process.send_signal(signal.SIGINT)
    end = finish(process)
    assert end.returncode == 0 and "Traceback" not in end.stderr
    step = checkpoint(tmp_path / "out")["step"]
    assert step >= 20
    assert f"step {step}:" in end.stdout.splitlines()[-1]
    assert train_log(tmp_path / "out")[-1]["step"] == step


def test_ctrl_c_ends_the_evaluation_after_training(monkeypatch, tmp_path):
    def evaluation(argv):
        signal.raise_signal(signal.SIGINT)
        assert False, "the evaluation goes on after Ctrl-C"

    folder = write_data(tmp_path / "data", val_tokens=np.full(4097, 32))
    monkeypatch.setattr(train.eval_passkey, "main", evaluation)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts background jobs with Ctrl-C ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            run_here(monkeypatch, flags(folder, tmp_path / "out", "--steps=1", "--eval_trials=1", "--train_len=256"))
    finally:
        signal.signal(signal.SIGINT, before)


def test_checkpoints_are_plain_data(stopped):
    saved = torch.load(stopped["reference"] / "ckpt.pt", weights_only=True)
    assert (saved["step"], saved["tokenizer"], saved["config"]["train_len"]) == (STEPS, "bytes", N)


def test_a_finished_run_resumed_stays_as_it_is(monkeypatch, data, stopped, tmp_path):
    shutil.copytree(stopped["reference"], tmp_path / "out")
    run_here(monkeypatch, flags(data, tmp_path / "out", "--resume"))
    assert_same_run(tmp_path / "out", stopped["reference"])


def test_the_log_has_the_same_steps_stopped_or_not(monkeypatch, data, tmp_path):
    """With lines at every fifth step, a stop at step 13 leaves no line of its own."""
    argv = [*flags(data, tmp_path / "out", "--log_every=5"), "--resume"]
    real = train.learning_rate

    def stop_at_12(step, cfg):
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step, cfg)

    monkeypatch.setattr(train, "learning_rate", stop_at_12)
    run_here(monkeypatch, argv)
    assert checkpoint(tmp_path / "out")["step"] == 13
    monkeypatch.setattr(train, "learning_rate", real)
    run_here(monkeypatch, argv)
    assert [line["step"] for line in train_log(tmp_path / "out")] == [1, 5, 10, 15, 20]


def test_a_signal_in_the_last_step_skips_the_evaluation(monkeypatch, data, tmp_path):
    write_data(tmp_path / "long", np.arange(3000) % 250, np.arange(5000) % 250)
    argv = flags(
        tmp_path / "long", tmp_path / "out", "--train_len=256", "--batch_tokens=1024", "--eval_trials=1", "--steps=2"
    )
    real = train.replace_file

    def signal_while_it_saves(path, write):
        if path.name == "ckpt.pt":
            os.kill(os.getpid(), signal.SIGTERM)
        real(path, write)

    monkeypatch.setattr(train, "replace_file", signal_while_it_saves)
    run_here(monkeypatch, argv)
    assert checkpoint(tmp_path / "out")["step"] == 2 and not (tmp_path / "out" / "eval.json").exists()


def test_leftover_temporary_file_is_harmless(monkeypatch, data, stopped, tmp_path):
    run_here(monkeypatch, flags(data, tmp_path / "other"))  # in this process: what runs before must not matter either
    assert_same_run(tmp_path / "other", stopped["reference"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.tmp").write_bytes(b"half a checkpoint")
    run_here(monkeypatch, flags(data, tmp_path / "out", "--resume"))
    assert_same_run(tmp_path / "out", stopped["reference"])


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.fixture(scope="module")
def shared(data, tmp_path_factory):
    """The run of `stopped`'s reference shared by 2 and by 4 processes: {processes: (folder, its recorded sequences)}."""
    tmp = tmp_path_factory.mktemp("shared")
    started = {}
    for n in (2, 4):
        (tmp / f"seen{n}").mkdir()
        started[n] = torchrun(n, flags(data, tmp / f"out{n}"), record_sequences(tmp / f"seen{n}"))
    for end in map(finish, started.values()):
        assert end.returncode == 0, end.stderr
    return {n: (tmp / f"out{n}", tmp / f"seen{n}") for n in started}


def test_every_division_sees_the_same_global_batches(stopped, shared):
    seen = {1: stopped["seen"]} | {n: folder for n, (_, folder) in shared.items()}
    for processes, folder in seen.items():
        lines = [
            [json.loads(line) for line in (folder / str(rank)).read_text().splitlines()] for rank in range(processes)
        ]
        micro = 4 // processes
        assert all(len(sequences) == 2 for rank in lines for sequences in rank)
        for step in range(STEPS):
            mine = [sum(rank[step * micro : (step + 1) * micro], []) for rank in lines]
            assert sorted(sum(mine, [])) == sorted(train.batch_sequences(0, step, BATCH, SEQUENCES).tolist())


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree_with_one(stopped, shared, processes):
    one, many = train_log(stopped["reference"]), train_log(shared[processes][0])
    assert [line["step"] for line in many] == list(range(1, STEPS + 1))
    assert one[0]["loss"] - one[-1]["loss"] > 0.5
    assert [line["lr"] for line in many] == [line["lr"] for line in one]
    assert [line["loss"] for line in many] == pytest.approx([line["loss"] for line in one], rel=0, abs=1e-5)
    assert [line["grad_norm"] for line in many] == pytest.approx([line["grad_norm"] for line in one], rel=1e-4)
    assert any(line["grad_norm"] > 1 for line in one)  # before clipping
    val = [
        [line["val_loss"] for line in log(out) if "val_loss" in line]
        for out in (stopped["reference"], shared[processes][0])
    ]
    assert len(val[0]) == 2 and val[1] == pytest.approx(val[0], rel=0, abs=1e-5)


def only_rank(rank, patch):
    return f"if os.environ['RANK'] == '{rank}':\n" + "\n".join("    " + line for line in patch.splitlines())


SHARED_STOPS = {  # as STOPS, for two processes: rank 0 writes the checkpoints
    "rank 0 killed before the rename": (only_rank(0, on_call("os.replace", 2, KILL)), [-signal.SIGKILL, 1], 8),
    "rank 1 killed between checkpoints": (only_rank(1, at_step(18, KILL)), [1, -signal.SIGKILL], 16),
    "rank 1 asked to stop": (only_rank(1, at_step(5, TERM)), [0, 0], 6),
    "rank 1 starts late": (only_rank(1, on_call("prepare.load", 1, "import time; time.sleep(1)")), [0, 0], 20),
    "rank 0 has a full disk": (only_rank(0, on_call("os.fsync", 2, NO_SPACE)), [2, 2], 8),
    "rank 0 has a full disk at a log line": (only_rank(0, at_log_line(11, NO_SPACE)), [2, 0], 12),
}


@pytest.fixture(scope="module")
def pairs(data, stopped, tmp_path_factory):
    """Two processes: {name: (folder, how they ended)} for SHARED_STOPS and for what they refuse."""
    tmp = tmp_path_factory.mktemp("pairs")
    diverges = at_step(9, "return float('inf')")
    jobs = {name: (data, [], patch) for name, (patch, _, _) in SHARED_STOPS.items()}
    looks = on_call("train.DistributedDataParallel.forward", 1, "assert not args[0].will_sync_module_buffers()")
    jobs |= {"keeps its buffers": (data, ["--steps=1"], looks)}
    jobs |= {
        "no data": (tmp / "nothing", [], ""),
        "bad share": (data, ["--batch_tokens=96"], ""),
        "diverges": (data, [], diverges),
    }
    shutil.copytree(stopped["reference"], tmp / "no shared folder")
    elsewhere = only_rank(1, "sys.argv = [arg + '-elsewhere' if arg.startswith('--out') else arg for arg in sys.argv]")
    jobs |= {"no shared folder": (data, ["--resume"], elsewhere)}
    ends = run_jobs(
        tmp, [(flags(folder, tmp / name, *more), patch) for name, (folder, more, patch) in jobs.items()], world=2
    )
    return {name: (tmp / name, end) for name, end in zip(jobs, ends)}


def test_two_processes_stopped_go_on_bit_for_bit(data, shared, pairs, tmp_path):
    for name, (_, status, step) in SHARED_STOPS.items():
        out, end = pairs[name]
        assert (end.returncode, checkpoint(out)["step"]) == (status, step), end.stderr
        shutil.copytree(out, tmp_path / name)
    for end in run_jobs(tmp_path, [(flags(data, tmp_path / name, "--resume"), "") for name in SHARED_STOPS], world=2):
        assert end.returncode == [0, 0], end.stderr
    for name in SHARED_STOPS:
        assert_same_run(tmp_path / name, shared[2][0])


def test_buffers_are_not_broadcast_each_step(pairs):
    _, end = pairs["keeps its buffers"]
    assert end.returncode == [0, 0], end.stderr
    assert "broadcast_buffers" not in end.stderr  # a warning of torch 2.13


def test_a_signal_to_any_process_stops_all(pairs):
    _, end = pairs["rank 1 asked to stop"]
    assert "step 6:" in end.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "name, expected, step",
    [
        ("no data", "train.bin: make it with", None),
        ("bad share", "--batch_tokens 96", None),
        ("diverges", "step 11", 8),
        ("no shared folder", "--out must be a folder that all of them share", 20),
        ("rank 0 has a full disk", "No space left", 8),
        ("rank 0 has a full disk at a log line", "log.jsonl could not be written", 12),
    ],
)
def test_two_processes_say_once_what_is_wrong_and_end_together(pairs, name, expected, step):
    out, end = pairs[name]
    assert end.returncode == ([2, 0] if step == 12 else [2, 2]), end.stderr  # the others have saved and left
    assert len(ours(end.stderr)) == 1 and expected in ours(end.stderr)[0]
    assert checkpoint(out)["step"] == step if step else not out.exists()


def test_torchrun_sigterm_saves_at_an_agreed_step(data, tmp_path):
    process = torchrun(2, flags(data, tmp_path / "out", "--steps=100000", "--save_every=100000"))
    for line in process.stdout:
        if line.startswith("step 20/"):
            break
    process.terminate()
    end = finish(process)  # torchrun's own status is not 0: it was asked to end
    step = checkpoint(tmp_path / "out")["step"]
    assert step >= 20
    assert f"step {step}:" in end.stdout.splitlines()[-1]
    assert "in train\n" not in end.stderr  # no rank left with a traceback of its own
    assert not (tmp_path / "out" / "ckpt.tmp").exists()


def test_two_agents(data, stopped, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    rendezvous = (
        "--nnodes=2",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_id=test",
        "--local_addr=127.0.0.1",
    )
    agents = [torchrun(1, flags(data, tmp_path / "out"), rendezvous=rendezvous) for _ in range(2)]
    for end in map(finish, agents):
        assert end.returncode == 0, end.stderr
    one, two = checkpoint(stopped["reference"]), checkpoint(tmp_path / "out")
    assert two["step"] == STEPS
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-3, atol=1e-4)
    assert [line["step"] for line in train_log(tmp_path / "out")] == list(range(1, STEPS + 1))


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture(scope="module")
def compilers(data, tmp_path_factory):
    """Three steps with --compile=on; a step without a C++ compiler under --compile=auto and under --compile=on: the processes."""
    tmp = tmp_path_factory.mktemp("compilers")
    (tmp / "empty").mkdir()
    without = ENV | {"PATH": str(tmp / "empty"), "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp / "cache"),
                     "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # fmt: skip
    kinds = {"with": ("on", 3, ENV), "without auto": ("auto", 1, without), "without on": ("on", 1, without)}
    started = {
        kind: start(
            [ROOT / "train.py", *flags(data, tmp / kind, f"--steps={n}", "--micro_tokens=256"), f"--compile={how}"],
            env=env,
        )
        for kind, (how, n, env) in kinds.items()
    }
    return {kind: (tmp / kind, finish(process)) for kind, process in started.items()}


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_loss_is_eager_loss(monkeypatch, data, compilers, tmp_path):
    out, end = compilers["with"]
    assert end.returncode == 0, end.stderr
    assert "compiled" in end.stdout.splitlines()[0]
    run_here(monkeypatch, flags(data, tmp_path / "eager", "--steps=3", "--micro_tokens=256"))
    compiled, eager = ([line["loss"] for line in train_log(folder)] for folder in (out, tmp_path / "eager"))
    assert len(eager) == 3 and compiled == pytest.approx(eager, rel=0, abs=1e-4)
    assert checkpoint(out)["model"].keys() == checkpoint(tmp_path / "eager")["model"].keys()


def test_no_compiler_means_eager_and_a_line_that_says_so(compilers):
    out, end = compilers["without auto"]
    assert end.returncode == 0, end.stderr
    first = end.stdout.splitlines()[0]
    assert "eager" in first and "torch.compile does not work here" in first
    assert checkpoint(out)["step"] == 1


def test_no_compiler_is_bad_input_to_compile_on(compilers):
    out, end = compilers["without on"]
    assert end.returncode == 2, end.stderr
    assert "Traceback" not in end.stderr and len(ours(end.stderr)) == 1
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------------------------
# --init_from


def test_rope_weights_into_fope(monkeypatch, capsys, data, tmp_path):
    run_here(monkeypatch, flags(data, tmp_path / "rope", "--pos=rope", "--steps=2"))
    capsys.readouterr()
    argv = flags(data, tmp_path / "fope", f"--init_from={tmp_path}/rope", "--lr=0", "--steps=1", "--seed=3")
    run_here(monkeypatch, argv)
    assert "drawn anew" in capsys.readouterr().out
    rope, fope = checkpoint(tmp_path / "rope")["model"], checkpoint(tmp_path / "fope")["model"]
    assert rope.keys() < fope.keys()
    assert all(torch.equal(rope[name], fope[name]) for name in rope)
    cfg = train.parse_flags(argv)
    cfg.vocab_size = 320
    fresh = GPT(cfg).state_dict()
    coefficients = fope.keys() - rope.keys()
    assert len(coefficients) == 1 and all(torch.equal(fope[name], fresh[name]) for name in coefficients)


def test_fope_keeps_its_coefficients_unless_n_changes(monkeypatch, capsys, data, stopped, tmp_path):
    source = checkpoint(stopped["reference"])["model"]
    init = (f"--init_from={stopped['reference']}/ckpt.pt", "--lr=0", "--steps=1", "--seed=3")
    run_here(monkeypatch, flags(data, tmp_path / "same", *init))
    assert "drawn anew" not in capsys.readouterr().out
    same = checkpoint(tmp_path / "same")["model"]
    assert same.keys() == source.keys() and all(torch.equal(same[name], source[name]) for name in source)
    run_here(monkeypatch, flags(data, tmp_path / "longer", *init, "--train_len=64"))
    assert "drawn anew" in capsys.readouterr().out
    longer = checkpoint(tmp_path / "longer")["model"]
    assert all(torch.equal(longer[name], source[name]) for name in source if ".position." not in name)
    cfg = train.parse_flags(flags(data, tmp_path / "longer", *init, "--train_len=64"))
    cfg.vocab_size = 320
    fresh = GPT(cfg).state_dict()
    for name in (name for name in source if ".position." in name):
        d, m = source[name].shape[-2:]
        assert longer[name].shape[-1] > m  # more frequencies are above the floor of the longer N
        assert torch.equal(longer[name][..., :d, :m], source[name])
        assert torch.equal(longer[name][..., d:, :], fresh[name][..., d:, :]) and torch.equal(
            longer[name][..., m:], fresh[name][..., m:]
        )


def test_only_kept_frequencies_keep_their_coefficients(monkeypatch, data, tmp_path):
    """With n_freqs, a series also has frequencies between the floor and pi: at another N those are others."""
    run_here(monkeypatch, flags(data, tmp_path / "short", "--n_freqs=12", "--steps=1"))
    argv = flags(
        data,
        tmp_path / "longer",
        f"--init_from={tmp_path}/short",
        "--n_freqs=12",
        "--train_len=64",
        "--lr=0",
        "--steps=1",
        "--seed=3",
    )
    run_here(monkeypatch, argv)
    cfg = train.parse_flags(argv)
    cfg.vocab_size = 320
    fresh, source, longer = (
        GPT(cfg).state_dict(),
        *(checkpoint(tmp_path / name)["model"] for name in ("short", "longer")),
    )
    coefficients = [name for name in source if ".position." in name]
    assert coefficients
    for name in coefficients:
        M = source[name].shape[-1]
        assert longer[name].shape[-1] > M and longer[name].shape[-2] == source[name].shape[-2] == 12
        expected = fresh[name].clone()
        expected[..., :M, :M] = source[name][..., :M, :M]
        assert torch.equal(longer[name], expected) and not torch.equal(longer[name], fresh[name])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line on stderr, status 2, nothing written


@pytest.fixture(scope="module")
def folders(data, stopped, tmp_path_factory):
    """{d}/NAME in the cases below."""
    d = tmp_path_factory.mktemp("bad")
    text = np.fromfile(data / "train.bin", dtype=np.uint16)
    large = text.copy()
    large[700] = 60_000
    write_data(d / "large", large)
    write_data(d / "large-val", None, large)
    write_data(d / "short", text[:N])
    write_data(d / "short-val", None, text[:N])
    write_data(d / "other", text[::-1])
    write_data(d / "words")
    (d / "words" / "meta.json").write_text((data / "meta.json").read_text().replace('"bytes"', '"words"'))
    shutil.copytree(data, d / "damaged")
    (d / "damaged" / "meta.json").write_text((data / "meta.json").read_text()[:-20])
    shutil.copytree(data, d / "cut-data")
    (d / "cut-data" / "train.bin").write_bytes((data / "train.bin").read_bytes()[:-100])
    shutil.copytree(stopped["reference"], d / "run")
    shutil.copytree(stopped["reference"], d / "cut")
    whole = (d / "cut" / "ckpt.pt").read_bytes()
    (d / "cut" / "ckpt.pt").write_bytes(whole[: len(whole) // 2])
    (d / "file").write_text("not a checkpoint\n")
    torch.save({"weights": torch.zeros(3)}, d / "foreign.pt")
    cfg = train.parse_flags(["--n_embd=64", "--n_layer=1", "--train_len=32"])
    cfg.vocab_size = 320
    torch.save(
        {"step": 1, "config": {}, "tokenizer": "bytes", "model": GPT(cfg).state_dict(), "optimizer": {}}, d / "wide.pt"
    )
    return d


BAD = {  # flags, and what the line must contain
    "no data": ("--data={d}/nothing", "train.bin"),
    "token outside --vocab_size": ("--vocab_size=64", "outside the vocabulary of 64"),
    "token outside the tokenizer": ("--data={d}/large", "token 60000, outside the vocabulary"),
    "validation token outside": ("--data={d}/large-val", "val.bin has token 60000"),
    "short corpus": ("--data={d}/short", "32 tokens: a sequence takes --train_len plus one"),
    "short validation": ("--data={d}/short-val", "val.bin has 32 tokens"),
    "damaged meta.json": ("--data={d}/damaged", "meta.json is damaged"),
    "train.bin cut": ("--data={d}/cut-data", "meta.json says"),
    "init_from a text file": ("--init_from={d}/file", "file is not a whole checkpoint"),
    "init_from another program's file": ("--init_from={d}/foreign.pt", "foreign.pt is no checkpoint"),
    "init_from nothing": ("--init_from={d}/nothing", "there is no checkpoint"),
    "init_from half a checkpoint": ("--init_from={d}/cut", "not a whole checkpoint"),
    "init_from another preset": ("--init_from={d}/wide.pt", "preset"),
    "unknown model": ("--model=7B", "tiny, 60M, 180M, 1.2B"),
    "unknown pos": ("--pos=xpos", "fope, rope, alibi, kerple, fire or nope"),
    "heads do not divide": ("--n_head=3", "3 must divide n_embd 32"),
    "odd head_dim": ("--n_embd=34", "head_dim 17 must be an even"),
    "odd head_dim of rope": ("--n_embd=34 --pos=rope", "head_dim 17 must be an even"),
    "unknown flag": ("--learning_rate=1", "--learning_rate=1; python train.py --help"),
    "abbreviated flag": ("--warm=1", "--warm=1"),
    "stray word": ("tiny", "tiny"),
    "no number": ("--lr=abc", "abc"),
    "no boolean": ("--fourier_series=maybe", "maybe"),
    "no integer": ("--n_layer=1.5", "1.5"),
    "no value": ("--steps", "steps"),
    "negative seed": ("--seed=-1", "seed"),
    "negative trials": ("--eval_trials=-1", "eval_trials"),
    "zero layers": ("--n_layer=0", "n_layer"),
    "negative learning rate": ("--lr=-1", "lr must be at least 0"),
    "learning rate no number": ("--lr=nan", "lr must be at least 0"),
    "clip negative": ("--clip=-1", "clip"),
    "beta of one": ("--beta2=1", "beta2"),
    "negative decay": ("--weight_decay=-0.1", "weight_decay"),
    "validation under a sequence": ("--eval_tokens=31", "at least --train_len, 32"),
    "batch no multiple": ("--batch_tokens=100", "batch_tokens 100 is not a multiple of 32"),
    "evaluation without its tokenizer": ("--eval_trials=1 --data={d}/words", "tokenizer 'words' is unknown"),
    "evaluation of a short model": ("--eval_trials=1", "253 tokens: use another --train_len, or --eval_trials=0"),
    "evaluation of a short text": ("--eval_trials=1 --train_len=256 --batch_tokens=256", "takes 16 x --train_len + 1: use another"),
    "unknown device": ("--device=abacus", "abacus"),
    "unknown dtype": ("--dtype=float16", "bfloat16"),
    "unknown compile": ("--compile=perhaps", "auto, on or off"),
    "unknown coef_init": ("--coef_init=zeros", "xavier"),
    "too few frequencies": ("--n_freqs=1", "n_freqs 1"),
    "out inside a file": ("--out={d}/file/out", "{d}/file"),
    "out exists": ("--out={d}/run", "--resume"),
    "resume half a checkpoint": ("--out={d}/cut --resume", "not a whole checkpoint"),
    "resume with other data": ("--out={d}/run --resume --data={d}/other", "other data"),
    "resume with another width": ("--out={d}/run --resume --n_embd=64", "n_embd=32"),
    "resume with another seed": ("--out={d}/run --resume --seed=1", "seed=0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(monkeypatch, capsys, data, folders, tmp_path, name):
    def contents():
        return {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}

    argv, expected = (text.format(d=folders) for text in BAD[name])
    before = contents()
    line = refused(monkeypatch, capsys, flags(data, tmp_path / "out", *argv.split()))
    assert line.startswith("train.py: ") and expected in line
    assert not (tmp_path / "out").exists()
    assert contents() == before


def test_help_gives_every_flag_its_meaning_type_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        train.parse_flags(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert all(f"{group}:" in text for group in ("model", "position", "training", "machine"))
    for field in dataclasses.fields(train.TrainConfig):
        assert re.search(rf"--{field.name} [^-]\S.*?\({field.type.__name__}, default {field.default!r}\)", text), (
            field.name
        )


def test_bad_input_of_the_real_command(data, tmp_path):
    cases = ["--data=nowhere"], ["--learning_rate=1"]
    started = [start([ROOT / "train.py", *flags(data, tmp_path / "out"), *more], cwd=tmp_path) for more in cases]
    for end, expected in zip(map(finish, started), ("nowhere/train.bin", "--help")):
        assert end.returncode == 2
        assert len(end.stderr.splitlines()) == 1 and expected in end.stderr
        assert not (tmp_path / "out").exists()


def test_full_disk_keeps_the_previous_checkpoint(monkeypatch, capsys, data, tmp_path):
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:  # the first checkpoint's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    line = refused(monkeypatch, capsys, flags(data, tmp_path / "out"))
    assert "step 16" in line and os.strerror(errno.ENOSPC) in line
    assert checkpoint(tmp_path / "out")["step"] == 8
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ckpt.pt", "log.jsonl"]


def test_an_exception_without_a_message_is_one_line_too(monkeypatch, capsys, data, tmp_path):
    def raises(*args):
        raise OSError

    monkeypatch.setattr(torch, "compile", raises)
    line = refused(monkeypatch, capsys, flags(data, tmp_path / "out", "--compile=on"))
    assert line.endswith("torch.compile does not work here: OSError")
    monkeypatch.setattr(torch, "save", raises)
    line = refused(monkeypatch, capsys, flags(data, tmp_path / "out", "--compile=auto", "--save_every=1"))
    assert "step 1 could not be written (OSError): " in line


def test_non_finite_loss_stops_before_the_next_checkpoint(monkeypatch, capsys, data, tmp_path):
    real = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, cfg: math.inf if step == 9 else real(step, cfg))
    line = refused(monkeypatch, capsys, flags(data, tmp_path / "out"))
    assert re.search(r"step 11\b", line) and re.search("nan|inf", line)
    saved = checkpoint(tmp_path / "out")
    assert saved["step"] == 8 and all(weight.isfinite().all() for weight in saved["model"].values())
    assert train_log(tmp_path / "out")[-1]["step"] == 10


def test_learning_rate_beyond_reason_is_a_non_finite_loss(monkeypatch, capsys, data, tmp_path):
    line = refused(monkeypatch, capsys, flags(data, tmp_path / "out", "--lr=1e30"))
    assert re.search(r"step [23]\b", line)
    assert not (tmp_path / "out" / "ckpt.pt").exists()
